//! Character devices: what monitors talk on.

use crate::{Qapi, types::sockets::SocketAddressLegacy};

/// A character device over a socket.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct ChardevSocket {
    /// The address to listen on or to connect to.
    pub addr: SocketAddressLegacy,
    /// Listen; otherwise connect.
    #[qapi(default = true)]
    pub server: bool,
    /// When listening: do not go on before a client has connected.
    pub wait: Option<bool>,
    /// Send small packets at once (`TCP_NODELAY`).
    #[qapi(default)]
    pub nodelay: bool,
    /// When connecting: seconds until another try after the connection is lost; 0 is never.
    #[qapi(deprecated, since = "2.2")]
    pub reconnect: Option<i64>,
    /// When connecting: milliseconds until another try after the connection is lost; 0 is never.
    #[qapi(since = "9.2")]
    pub reconnect_ms: Option<i64>,
}

/// A character device over standard input and output.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct ChardevStdio {
    /// The keys that send signals, like Ctrl-C, do so.
    #[qapi(default = true, since = "1.5")]
    pub signal: bool,
}

/// What a character device talks over.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct ChardevBackend {
    /// The sort of character device.
    #[qapi(variants, tag = "type")]
    pub kind: ChardevBackendVariant,
}

/// The sorts of character devices.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(variants, tag_enum = "ChardevBackendKind")]
pub enum ChardevBackendVariant {
    /// A socket.
    Socket(ChardevSocketWrapper),
    /// Standard input and output.
    Stdio(ChardevStdioWrapper),
}

/// A wrapped socket.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct ChardevSocketWrapper {
    /// Its properties.
    pub data: ChardevSocket,
}

/// Wrapped standard input and output.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct ChardevStdioWrapper {
    /// Their properties.
    pub data: ChardevStdio,
}

/// What a new character device has to tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Qapi)]
pub struct ChardevReturn {}

/// Makes a character device.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "chardev-add", returns = "ChardevReturn", since = "1.4")]
pub struct ChardevAdd {
    /// Its name.
    pub id: String,
    /// What it talks over.
    pub backend: ChardevBackend,
}

/// Removes a character device that nothing uses.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "chardev-remove", since = "1.4")]
pub struct ChardevRemove {
    /// Its name.
    pub id: String,
}

/// A character device.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct ChardevInfo {
    /// Its name.
    pub label: String,
    /// What it is connected to, for people.
    pub filename: String,
    /// Something in the daemon, a monitor for instance, uses it.
    #[qapi(since = "2.1")]
    pub frontend_open: bool,
}

/// Lists the character devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Qapi)]
#[qapi(command = "query-chardev", returns = "Vec<ChardevInfo>", since = "0.14")]
pub struct QueryChardev;

/// A sort of character device.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct ChardevBackendInfo {
    /// Its name.
    pub name: String,
}

/// Lists the sorts of character devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Qapi)]
#[qapi(command = "query-chardev-backends", returns = "Vec<ChardevBackendInfo>", since = "2.0")]
pub struct QueryChardevBackends;
