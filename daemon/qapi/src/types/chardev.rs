//! Character devices: what monitors talk on.

use crate::{Qapi, types::sockets::SocketAddressLegacy};

/// What all character devices have.
#[derive(Debug, Clone, PartialEq, Eq, Default, Qapi)]
#[qapi(since = "2.6")]
pub struct ChardevCommon {
    /// A file for a copy of everything that is sent on the device.
    pub logfile: Option<String>,
    /// Add to the log file instead of replacing its content.
    #[qapi(default)]
    pub logappend: bool,
    /// Start every line of the log file with the time.
    #[qapi(default, since = "11.0")]
    pub logtimestamp: bool,
}

/// A character device over files.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(since = "1.4")]
pub struct ChardevFile {
    /// The log file.
    #[qapi(flatten)]
    pub common: ChardevCommon,
    /// The file to read from. Without it nothing is ever received.
    #[qapi(rename = "in")]
    pub input: Option<String>,
    /// The file to write to.
    pub out: String,
    /// Add to the file instead of replacing its content.
    #[qapi(default, since = "2.6")]
    pub append: bool,
}

/// A character device over a device of the host, or over pipes.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(since = "1.4")]
pub struct ChardevHostdev {
    /// The log file.
    #[qapi(flatten)]
    pub common: ChardevCommon,
    /// The path of the device. Of pipes: the path without `.in` and `.out`, or one pipe for both directions.
    pub device: String,
}

/// A character device over a socket.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct ChardevSocket {
    /// The log file.
    #[qapi(flatten)]
    pub common: ChardevCommon,
    /// The address to listen on or to connect to.
    pub addr: SocketAddressLegacy,
    /// The object with the credentials for TLS. There are none yet.
    #[qapi(since = "2.6")]
    pub tls_creds: Option<String>,
    /// The object that decides which clients of TLS are let in.
    #[qapi(since = "4.0")]
    pub tls_authz: Option<String>,
    /// Listen; otherwise connect.
    #[qapi(default = true)]
    pub server: bool,
    /// When listening: do not go on before a client has connected.
    pub wait: Option<bool>,
    /// Send small packets at once (`TCP_NODELAY`).
    #[qapi(default)]
    pub nodelay: bool,
    /// Speak the telnet protocol.
    #[qapi(default)]
    pub telnet: bool,
    /// Speak the telnet protocol as terminals of type 3270 do.
    #[qapi(default, since = "2.10")]
    pub tn3270: bool,
    /// Speak the WebSocket protocol; only when listening.
    #[qapi(default, since = "3.1")]
    pub websocket: bool,
    /// When connecting: seconds until another try after the connection is lost; 0 is never.
    #[qapi(deprecated, since = "2.2")]
    pub reconnect: Option<i64>,
    /// When connecting: milliseconds until another try after the connection is lost; 0 is never.
    #[qapi(since = "9.2")]
    pub reconnect_ms: Option<i64>,
}

/// A character device over datagrams.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(since = "1.5")]
pub struct ChardevUdp {
    /// The log file.
    #[qapi(flatten)]
    pub common: ChardevCommon,
    /// Where to send to, and whose datagrams are received.
    pub remote: SocketAddressLegacy,
    /// Where to receive.
    pub local: Option<SocketAddressLegacy>,
}

/// Up to four users of one character device.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(since = "1.5")]
pub struct ChardevMux {
    /// The log file.
    #[qapi(flatten)]
    pub common: ChardevCommon,
    /// The device that they share.
    pub chardev: String,
}

/// One user of up to four character devices.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(since = "10.0")]
pub struct ChardevHub {
    /// The log file.
    #[qapi(flatten)]
    pub common: ChardevCommon,
    /// The devices.
    pub chardevs: Vec<String>,
}

/// A character device over standard input and output.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct ChardevStdio {
    /// The log file.
    #[qapi(flatten)]
    pub common: ChardevCommon,
    /// The keys that send signals, like Ctrl-C, do so.
    #[qapi(default = true, since = "1.5")]
    pub signal: bool,
}

/// A character device over a pseudo terminal.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(since = "9.2")]
pub struct ChardevPty {
    /// The log file.
    #[qapi(flatten)]
    pub common: ChardevCommon,
    /// A symbolic link to make, which leads to the terminal.
    pub path: Option<String>,
}

/// A character device that keeps what was written last.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(since = "1.5")]
pub struct ChardevRingbuf {
    /// The log file.
    #[qapi(flatten)]
    pub common: ChardevCommon,
    /// How many bytes are kept, a power of two; 65536 if nothing is given.
    pub size: Option<i64>,
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
    /// Files.
    File(ChardevFileWrapper),
    /// A serial port.
    Serial(ChardevHostdevWrapper),
    /// A parallel port.
    Parallel(ChardevHostdevWrapper),
    /// Named pipes.
    Pipe(ChardevHostdevWrapper),
    /// A socket.
    Socket(ChardevSocketWrapper),
    /// Datagrams.
    Udp(ChardevUdpWrapper),
    /// A pseudo terminal.
    Pty(ChardevPtyWrapper),
    /// Nothing: what is sent vanishes, and nothing is received.
    Null(ChardevCommonWrapper),
    /// Another device, for several users.
    Mux(ChardevMuxWrapper),
    /// Several devices, for one user.
    Hub(ChardevHubWrapper),
    /// Standard input and output.
    Stdio(ChardevStdioWrapper),
    /// Memory, to be read with `ringbuf-read`.
    Ringbuf(ChardevRingbufWrapper),
    /// The same under an older name.
    Memory(ChardevRingbufWrapper),
}

/// Wrapped: the properties of a character device.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct ChardevFileWrapper {
    /// The properties.
    pub data: ChardevFile,
}

/// Wrapped: the properties of a character device.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct ChardevHostdevWrapper {
    /// The properties.
    pub data: ChardevHostdev,
}

/// Wrapped: the properties of a character device.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct ChardevSocketWrapper {
    /// The properties.
    pub data: ChardevSocket,
}

/// Wrapped: the properties of a character device.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct ChardevUdpWrapper {
    /// The properties.
    pub data: ChardevUdp,
}

/// Wrapped: the properties of a character device.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct ChardevPtyWrapper {
    /// The properties.
    pub data: ChardevPty,
}

/// Wrapped: the properties of a character device.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct ChardevCommonWrapper {
    /// The properties.
    pub data: ChardevCommon,
}

/// Wrapped: the properties of a character device.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct ChardevMuxWrapper {
    /// The properties.
    pub data: ChardevMux,
}

/// Wrapped: the properties of a character device.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct ChardevHubWrapper {
    /// The properties.
    pub data: ChardevHub,
}

/// Wrapped: the properties of a character device.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct ChardevStdioWrapper {
    /// The properties.
    pub data: ChardevStdio,
}

/// Wrapped: the properties of a character device.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct ChardevRingbufWrapper {
    /// The properties.
    pub data: ChardevRingbuf,
}

/// What a new character device has to tell.
#[derive(Debug, Clone, PartialEq, Eq, Default, Qapi)]
#[qapi(since = "1.4")]
pub struct ChardevReturn {
    /// The name of the new pseudo terminal.
    pub pty: Option<String>,
}

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

/// Replaces what a character device talks over.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "chardev-change", returns = "ChardevReturn", since = "2.10")]
pub struct ChardevChange {
    /// The name of the device.
    pub id: String,
    /// What it talks over from now on.
    pub backend: ChardevBackend,
}

/// Sends a break to what uses a character device. A monitor does not care.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "chardev-send-break", since = "2.10")]
pub struct ChardevSendBreak {
    /// The name of the device.
    pub id: String,
}

/// The other side of a port of a virtual machine was opened or closed. There are no such ports in a storage daemon; clients
/// find the event in the schema.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(event = "VSERPORT_CHANGE", since = "2.1")]
pub struct VserportChange {
    /// The name of the port.
    pub id: String,
    /// Whether it is open.
    pub open: bool,
}

/// How bytes are written as text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Qapi)]
#[qapi(since = "1.4")]
pub enum DataFormat {
    /// As they are, in UTF-8.
    #[default]
    Utf8,
    /// In base64.
    Base64,
}

/// Writes to a ring buffer, as if its user had.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "ringbuf-write", since = "1.4")]
pub struct RingbufWrite {
    /// The name of the device.
    pub device: String,
    /// What to write.
    pub data: String,
    /// How `data` stands for bytes; `utf8` if nothing is given.
    pub format: Option<DataFormat>,
}

/// Takes what was written to a ring buffer, oldest bytes first.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "ringbuf-read", returns = "String", since = "1.4")]
pub struct RingbufRead {
    /// The name of the device.
    pub device: String,
    /// How many bytes to take at most.
    pub size: i64,
    /// How the bytes are to be written; `utf8` if nothing is given, which replaces what is not valid.
    pub format: Option<DataFormat>,
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
