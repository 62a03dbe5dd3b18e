//! The monitor itself. [QMP §Capabilities negotiation], [QMP §query-version]

use crate::{Qapi, types::introspect::SchemaInfo};

/// What a client can switch on for its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Qapi)]
pub enum QMPCapability {
    /// Commands that jump the queue, sent with `exec-oob`.
    Oob,
}

/// Ends the negotiation that every connection starts with, and switches capabilities on. Until then no other command is
/// accepted.
#[derive(Debug, Clone, PartialEq, Qapi)]
#[qapi(command = "qmp_capabilities", since = "0.13")]
pub struct QmpCapabilities {
    /// The capabilities to switch on, out of those that the greeting offered.
    #[qapi(since = "2.12")]
    pub enable: Option<Vec<QMPCapability>>,
}

/// A version as three numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Qapi)]
pub struct VersionTriple {
    /// Changes with a new series.
    pub major: i64,
    /// Changes with a new release.
    pub minor: i64,
    /// Changes with a new correction.
    pub micro: i64,
}

/// Which interface the daemon speaks, and who made it.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct VersionInfo {
    /// The release of QEMU whose interface this daemon implements. Clients decide by it what they may use.
    pub qemu: VersionTriple,
    /// The name and the version of this program.
    pub package: String,
}

/// Tells the level of the interface and the version of the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Qapi)]
#[qapi(command = "query-version", returns = "VersionInfo", since = "0.14")]
pub struct QueryVersion;

/// A command that exists.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct CommandInfo {
    /// Its name.
    pub name: String,
}

/// Lists the commands. `query-qmp-schema` tells more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Qapi)]
#[qapi(command = "query-commands", returns = "Vec<CommandInfo>", since = "0.14")]
pub struct QueryCommands;

/// Describes every command and event with all their members and features.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Qapi)]
#[qapi(command = "query-qmp-schema", returns = "Vec<SchemaInfo>", since = "2.5")]
pub struct QueryQmpSchema;

/// Ends the daemon: exports are closed, nodes flushed and closed, then the process exits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Qapi)]
#[qapi(command = "quit", since = "0.14")]
pub struct Quit;

/// How much the process gives up before it serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Qapi)]
pub enum SandboxMode {
    /// What serving never needs, whatever a monitor asks for later: other programs, mounts, other processes, most
    /// capabilities.
    Default,
    /// All capabilities as well, and all files but those that the command line names.
    Strict,
    /// Nothing.
    Off,
}

/// The command line option `--sandbox`.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct SandboxOptions {
    /// How much.
    pub mode: SandboxMode,
    /// With `strict`, further files and folders that may be used later, with all that is in them.
    pub paths: Option<Vec<String>>,
}

/// How far the kernel restricts the process's way to files (Landlock).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Qapi)]
pub enum SandboxFiles {
    /// To files, TCP ports, signals and abstract sockets as the command line has them.
    Full,
    /// To files, but an older kernel leaves some of the rest.
    Partial,
    /// Not at all.
    Unrestricted,
}

/// Tells what the process gave up when it started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Qapi)]
#[qapi(command = "x-query-sandbox", returns = "SandboxInfo", since = "11.0", unstable)]
pub struct XQuerySandbox;

/// What is in force.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct SandboxInfo {
    /// What was asked for.
    pub mode: SandboxMode,
    /// Whether each thread's system calls are limited to a list.
    pub system_calls: bool,
    /// Files and network by Landlock.
    pub files: SandboxFiles,
    /// Whether no program could give privileges back.
    pub no_new_privileges: bool,
    /// The capabilities that are left.
    pub capabilities: Vec<String>,
    /// The system calls that were refused since the start, each once.
    pub refused: Vec<String>,
}

/// How a monitor talks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Qapi)]
pub enum MonitorMode {
    /// Text, for people. This daemon has none; the value is there to be refused by name.
    Readline,
    /// JSON, for programs: QMP.
    Control,
}

/// The command line option `--monitor`.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct MonitorOptions {
    /// A name for the monitor.
    pub id: Option<String>,
    /// How it talks.
    #[qapi(default = MonitorMode::Control)]
    pub mode: MonitorMode,
    /// Output over many lines, for people.
    #[qapi(default)]
    pub pretty: bool,
    /// The character device that it talks on.
    pub chardev: String,
}
