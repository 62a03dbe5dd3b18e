//! Commands about the daemon itself.

use super::{Control, table};
use crate::version;
use qapi::types::control::{
    CommandInfo, QmpCapabilities, QueryCommands, QueryQmpSchema, QueryVersion, Quit, SandboxInfo, VersionInfo,
    VersionTriple, XQuerySandbox,
};
use qapi::types::introspect::SchemaInfo;
use qapi::{Error, Result};

/// The version as the greeting and `query-version` give it.
pub fn version_info() -> VersionInfo {
    let (major, minor, micro) = version::QEMU;
    VersionInfo { qemu: VersionTriple { major, minor, micro }, package: version::PACKAGE.to_owned() }
}

impl Control {
    pub(super) async fn qmp_capabilities(&mut self, _: QmpCapabilities) -> Result<()> {
        Err(Error::command_not_found("Capabilities negotiation is already complete, command ignored"))
    }

    pub(super) async fn query_version(&mut self, _: QueryVersion) -> Result<VersionInfo> {
        Ok(version_info())
    }

    pub(super) async fn query_commands(&mut self, _: QueryCommands) -> Result<Vec<CommandInfo>> {
        Ok(table::COMMANDS.iter().map(|row| CommandInfo { name: (row.def)().name.to_owned() }).collect())
    }

    pub(super) async fn query_qmp_schema(&mut self, _: QueryQmpSchema) -> Result<Vec<SchemaInfo>> {
        Ok(table::schema().build())
    }

    pub(super) async fn x_query_sandbox(&mut self, _: XQuerySandbox) -> Result<SandboxInfo> {
        Ok(self.sandbox.info())
    }

    pub(super) async fn quit(&mut self, _: Quit) -> Result<()> {
        // The exports' last events come before the reply, after which a client may stop reading.
        self.close_exports().await;
        self.quit = true;
        Ok(())
    }
}
