//! Exports, and the NBD server that some of them need.

use crate::{
    Qapi,
    types::sockets::{SocketAddress, SocketAddressLegacy},
};

/// The NBD server as `--nbd-server` starts it.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(since = "4.2")]
pub struct NbdServerOptions {
    /// Seconds that a client has to agree on an export; 0 is no limit.
    #[qapi(default = 10, since = "10.0")]
    pub handshake_max_seconds: u32,
    /// Clients at a time; 0 is no limit.
    #[qapi(default = 100, since = "5.2")]
    pub max_connections: u32,
    /// The address to listen on.
    pub addr: SocketAddress,
}

/// Starts the NBD server. There is one at most.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "nbd-server-start", since = "1.3")]
pub struct NbdServerOptionsLegacy {
    /// Seconds that a client has to agree on an export; 0 is no limit.
    #[qapi(default = 10, since = "10.0")]
    pub handshake_max_seconds: u32,
    /// Clients at a time; 0 is no limit.
    #[qapi(default = 100, since = "5.2")]
    pub max_connections: u32,
    /// The address to listen on.
    pub addr: SocketAddressLegacy,
}

impl From<NbdServerOptionsLegacy> for NbdServerOptions {
    fn from(legacy: NbdServerOptionsLegacy) -> NbdServerOptions {
        NbdServerOptions {
            handshake_max_seconds: legacy.handshake_max_seconds,
            max_connections: legacy.max_connections,
            addr: legacy.addr.into(),
        }
    }
}

/// What all NBD exports have.
#[derive(Debug, Clone, PartialEq, Eq, Default, Qapi)]
#[qapi(since = "5.0")]
pub struct BlockExportOptionsNbdBase {
    /// The name that clients ask for; the name of the node when left out. 4096 bytes at most.
    pub name: Option<String>,
    /// A text for people, 4096 bytes at most.
    #[qapi(since = "5.0")]
    pub description: Option<String>,
}

/// An NBD export.
#[derive(Debug, Clone, PartialEq, Eq, Default, Qapi)]
#[qapi(since = "5.2")]
pub struct BlockExportOptionsNbd {
    /// What all NBD exports have.
    #[qapi(flatten)]
    pub base: BlockExportOptionsNbdBase,
    /// Offer the metadata context `qemu:allocation-depth`.
    #[qapi(default)]
    pub allocation_depth: bool,
}

/// Who may use a FUSE export.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Qapi)]
pub enum FuseExportAllowOther {
    /// The user that runs the daemon, and nobody else, not even root.
    Off,
    /// Everybody whom the mode and the owner of the file allow. Where the daemon is not privileged this needs
    /// `user_allow_other` in `/etc/fuse.conf`.
    On,
    /// As `on`, and as `off` where that is refused.
    Auto,
}

/// A FUSE export: the image as a regular file.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(since = "6.0")]
pub struct BlockExportOptionsFuse {
    /// The regular file to mount on; also the image itself. Or `/dev/fd/N`: descriptor N is `/dev/fuse`, and somebody has
    /// mounted it, or will.
    pub mountpoint: String,
    /// Writes beyond the end make the image longer; otherwise they are cut there.
    #[qapi(default)]
    pub growable: bool,
    /// Who may use it.
    #[qapi(default = FuseExportAllowOther::Auto, since = "6.1")]
    pub allow_other: FuseExportAllowOther,
}

/// A vhost-user-blk export: a block device for a virtual machine.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(since = "5.2")]
pub struct BlockExportOptionsVhostUserBlk {
    /// The socket to listen on, of type `unix` or `fd`. One front-end is served at a time.
    pub addr: SocketAddress,
    /// The bytes of a block: a power of two, 512 at least and 2 MiB at most.
    #[qapi(default = 512)]
    pub logical_block_size: u64,
    /// The number of queues, 1 at least and 256 at most.
    #[qapi(default = 1)]
    pub num_queues: u16,
    /// The serial number that the guest sees, 20 bytes at most; `vhost_user_blk` when left out.
    pub serial: Option<String>,
}

/// A VDUSE export: a virtio block device of this machine's kernel.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(since = "7.1")]
pub struct BlockExportOptionsVduseBlk {
    /// The name of the device on the vDPA bus and in `/dev/vduse`.
    pub name: String,
    /// The number of queues, 1 at least and 256 at most.
    #[qapi(default = 1)]
    pub num_queues: u16,
    /// The most entries of a queue: a power of two, more than 2 and 1024 at most.
    #[qapi(default = 256)]
    pub queue_size: u16,
    /// The bytes of a block: a power of two, 512 at least and 2 MiB at most.
    #[qapi(default = 512)]
    pub logical_block_size: u64,
    /// The serial number that the driver sees, 20 bytes at most; none when left out.
    pub serial: Option<String>,
}

/// Exports a node over NBD; `block-export-add` does the same and more.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "nbd-server-add", since = "1.3", deprecated)]
pub struct NbdServerAddOptions {
    /// What all NBD exports have.
    #[qapi(flatten)]
    pub base: BlockExportOptionsNbdBase,
    /// The node.
    pub device: String,
    /// Clients may write. A node that is read-only is exported read-only all the same.
    #[qapi(default)]
    pub writable: bool,
}

/// How an export is removed that has clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Qapi)]
pub enum BlockExportRemoveMode {
    /// Not at all: that is an error.
    Safe,
    /// They are disconnected.
    Hard,
}

/// Removes an NBD export; `block-export-del` does the same.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "nbd-server-remove", since = "2.12", deprecated)]
pub struct NbdServerRemove {
    /// The name that clients ask for.
    pub name: String,
    /// What becomes of clients.
    #[qapi(default = BlockExportRemoveMode::Safe)]
    pub mode: BlockExportRemoveMode,
}

/// Stops the NBD server. Its exports are removed, their clients disconnected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Qapi)]
#[qapi(command = "nbd-server-stop", since = "1.3")]
pub struct NbdServerStop;

/// The threads that run an export.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(alternate, since = "11.0")]
pub enum BlockExportIothreads {
    /// One.
    Single(String),
    /// All of these, one at least. Cannot be used with `fixed-iothread`.
    Multi(Vec<String>),
}

/// What becomes of a request of an export that fails. A flush is never kept waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Qapi)]
pub enum BlockExportOnError {
    /// The client gets the error.
    Report,
    /// It waits until `x-block-export-resume` has it tried again, or the export ends.
    Stop,
    /// As `stop` if there is no space left, as `report` otherwise.
    Enospc,
}

/// Has the requests of an export tried again that wait after an error.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "x-block-export-resume", unstable)]
pub struct XBlockExportResume {
    /// The name of the export.
    pub id: String,
}

/// What the clients of an export did.
#[derive(Debug, Clone, PartialEq, Eq, Default, Qapi)]
pub struct BlockExportStatistics {
    /// Bytes read.
    pub rd_bytes: u64,
    /// Bytes written.
    pub wr_bytes: u64,
    /// Bytes discarded.
    pub unmap_bytes: u64,
    /// Reads.
    pub rd_operations: u64,
    /// Writes.
    pub wr_operations: u64,
    /// Flushes.
    pub flush_operations: u64,
    /// Discards.
    pub unmap_operations: u64,
    /// Requests of all kinds that failed.
    pub failed_operations: u64,
    /// Requests of all kinds that were refused because they were out of bounds.
    pub invalid_operations: u64,
    /// Requests that wait after an error now.
    pub waiting_operations: u64,
}

/// Exports a node.
#[derive(Debug, Clone, PartialEq, Qapi)]
#[qapi(command = "block-export-add", since = "5.2")]
pub struct BlockExportOptions {
    /// The sort of export.
    #[qapi(variants, tag = "type")]
    pub export: BlockExportVariant,
    /// The name of the export.
    pub id: String,
    /// The export stays on its thread, and fails if it cannot; otherwise it may move.
    #[qapi(default)]
    pub fixed_iothread: bool,
    /// The thread that runs the export, or several; where the node runs when left out.
    pub iothread: Option<BlockExportIothreads>,
    /// The node.
    pub node_name: String,
    /// Clients may write.
    #[qapi(default)]
    pub writable: bool,
    /// A write is done only when it is on stable storage.
    #[qapi(default)]
    pub writethrough: bool,
    /// A node that is not active stays so, with errors for clients; otherwise it is activated.
    #[qapi(default, since = "10.0")]
    pub allow_inactive: bool,
    /// What becomes of requests that fail. With it each failure is told by the event `BLOCK_IO_ERROR`, whose device is the
    /// name of the export. Otherwise clients get the errors, and nobody else hears of them.
    #[qapi(unstable)]
    pub x_on_error: Option<BlockExportOnError>,
}

/// The sorts of exports.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(variants, tag_enum = "BlockExportType")]
pub enum BlockExportVariant {
    /// NBD.
    Nbd(BlockExportOptionsNbd),
    /// A block device for a virtual machine, over a socket and shared memory.
    VhostUserBlk(BlockExportOptionsVhostUserBlk),
    /// A file, through FUSE.
    Fuse(BlockExportOptionsFuse),
    /// A block device of this machine, or of a virtual machine, through the kernel's vDPA bus.
    VduseBlk(BlockExportOptionsVduseBlk),
}

/// Removes an export. It is gone when the event `BLOCK_EXPORT_DELETED` says so.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "block-export-del", since = "5.2")]
pub struct BlockExportDel {
    /// The name of the export.
    pub id: String,
    /// What becomes of clients.
    #[qapi(default = BlockExportRemoveMode::Safe)]
    pub mode: BlockExportRemoveMode,
}

/// An export is gone, whoever removed it.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(event = "BLOCK_EXPORT_DELETED", since = "5.2")]
pub struct BlockExportDeleted {
    /// The name of the export.
    pub id: String,
}

/// How the requests of an export come from the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Qapi)]
#[qapi(since = "10.0")]
pub enum BlockExportTransport {
    /// They are read from a device.
    Device,
    /// The kernel sends them over an io_uring.
    IoUring,
}

/// An export.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(since = "5.2")]
pub struct BlockExportInfo {
    /// Its name.
    pub id: String,
    /// Its sort.
    #[qapi(rename = "type")]
    pub ty: BlockExportType,
    /// The name of its node.
    pub node_name: String,
    /// It is being removed.
    pub shutting_down: bool,
    /// What its clients did.
    #[qapi(unstable)]
    pub x_statistics: BlockExportStatistics,
    /// How requests come from the kernel, where it has more than one way.
    #[qapi(unstable)]
    pub x_transport: Option<BlockExportTransport>,
}

/// Lists the exports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Qapi)]
#[qapi(command = "query-block-exports", returns = "Vec<BlockExportInfo>", since = "5.2")]
pub struct QueryBlockExports;
