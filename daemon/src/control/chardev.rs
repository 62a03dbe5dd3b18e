//! Commands about character devices; the devices themselves are in [`crate::chardev`].

use super::Control;
use qapi::types::chardev::{
    ChardevAdd, ChardevBackendInfo, ChardevBackendKind, ChardevBackendVariant, ChardevInfo, ChardevRemove,
    ChardevReturn, QueryChardev, QueryChardevBackends,
};
use qapi::{Error, Result, ResultExt};

impl Control {
    pub(super) async fn chardev_add(&mut self, args: ChardevAdd) -> Result<ChardevReturn> {
        if self.chardevs.type_of(&args.id).is_some() {
            return Err(Error::generic(format!("Chardev with id '{}' already exists", args.id)));
        }
        if let ChardevBackendVariant::Socket(socket) = &args.backend.kind
            && socket.data.server
            && socket.data.wait == Some(true)
        {
            // The control task would take no other command and no signal until then.
            return Err(Error::generic(
                "'wait' can only be on on the command line: no other command would be executed",
            ));
        }
        let added = self.chardevs.add(&args.id, &args.backend).await;
        added.with_context(|| format!("Failed to add chardev '{}'", args.id))
    }

    pub(super) async fn chardev_remove(&mut self, args: ChardevRemove) -> Result<()> {
        self.chardevs.remove(&args.id).await
    }

    pub(super) async fn query_chardev(&mut self, _: QueryChardev) -> Result<Vec<ChardevInfo>> {
        Ok(self.chardevs.query())
    }

    pub(super) async fn query_chardev_backends(&mut self, _: QueryChardevBackends) -> Result<Vec<ChardevBackendInfo>> {
        Ok(ChardevBackendKind::ALL.iter().map(|kind| ChardevBackendInfo { name: kind.as_str().to_owned() }).collect())
    }
}
