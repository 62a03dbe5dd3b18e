//! Block nodes: how they are made and removed.
//!
//! A driver is one struct with its options, and one variant of [`BlockdevDriverOptions`].

use crate::Qapi;
use crate::types::block_filters::*;
use crate::types::fault::BlockdevOptionsXFault;

/// What becomes of discard requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Qapi)]
pub enum BlockdevDiscardOptions {
    /// They do nothing.
    Ignore,
    /// They free space.
    Unmap,
}

/// What becomes of writes that consist of zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Qapi)]
pub enum BlockdevDetectZeroesOptions {
    /// They are written.
    Off,
    /// They become zero writes, where that is faster.
    On,
    /// They become zero writes that may free space; needs `discard` to be `unmap`.
    Unmap,
}

/// How blocking requests reach a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Qapi)]
pub enum BlockdevAioOptions {
    /// A pool of threads makes ordinary system calls.
    Threads,
    /// Linux AIO; needs `cache.direct`.
    Native,
    /// io_uring.
    #[qapi(rename = "io_uring", since = "5.0")]
    IoUring,
}

/// A switch that can be left to the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Qapi)]
pub enum OnOffAuto {
    /// What is possible.
    Auto,
    /// On, and an error if that is not possible.
    On,
    /// Off.
    Off,
}

/// How much of the host's cache is used.
#[derive(Debug, Clone, PartialEq, Eq, Default, Qapi)]
pub struct BlockdevCacheOptions {
    /// Go past the page cache (`O_DIRECT`). Inherited from the node above when left out; false at the root.
    pub direct: Option<bool>,
    /// Ignore flushes. Fast, and loses data when the host goes down. Inherited like `direct`.
    pub no_flush: Option<bool>,
}

/// A node: a driver with its options, and the options that all drivers share.
#[derive(Debug, Clone, PartialEq, Qapi)]
#[qapi(command = "blockdev-add", since = "2.9")]
pub struct BlockdevOptions {
    /// The driver.
    #[qapi(variants)]
    pub driver: BlockdevDriverOptions,
    /// The name of the node: letters, digits, `-`, `.` and `_`, a letter first, 31 bytes at most. A node that is not made
    /// inside another one must have it.
    pub node_name: Option<String>,
    /// Use the image from the start. False leaves it to another process until `blockdev-set-active`: it is not locked, and
    /// nothing is written. True when left out, and inherited by a node made inside another one.
    #[qapi(since = "10.0")]
    pub active: Option<bool>,
    /// What becomes of discard requests; `ignore` when left out, and for a node made inside another one the same as there.
    pub discard: Option<BlockdevDiscardOptions>,
    /// How much of the host's cache is used.
    pub cache: Option<BlockdevCacheOptions>,
    /// Refuse writes. False when left out, and inherited by a node made inside another one.
    pub read_only: Option<bool>,
    /// Become read-only instead of failing, when writing is not possible.
    #[qapi(since = "3.1")]
    pub auto_read_only: Option<bool>,
    /// Do not mind other programs that write to the image; needs `read-only`.
    #[qapi(since = "2.10")]
    pub force_share: Option<bool>,
    /// What becomes of writes that consist of zeroes; `off` when left out.
    pub detect_zeroes: Option<BlockdevDetectZeroesOptions>,
}

/// The drivers.
#[derive(Debug, Clone, PartialEq, Qapi)]
#[qapi(variants, tag_enum = "BlockdevDriver")]
pub enum BlockdevDriverOptions {
    /// Lets requests fail by rule.
    Blkdebug(BlockdevOptionsBlkdebug),
    /// Writes a log of all changes.
    #[qapi(since = "3.0")]
    Blklogwrites(BlockdevOptionsBlklogwrites),
    /// Does everything to two nodes and compares.
    Blkverify(BlockdevOptionsBlkverify),
    /// Compresses what is written.
    #[qapi(since = "5.0")]
    Compress(BlockdevOptionsCompress),
    /// Copies what is read from backing files.
    CopyOnRead(BlockdevOptionsCor),
    /// A regular file.
    File(BlockdevOptionsFile),
    /// A drive for compact discs.
    #[qapi(rename = "host_cdrom")]
    HostCdrom(BlockdevOptionsFile),
    /// A block device or a character device of the host.
    #[qapi(rename = "host_device")]
    HostDevice(BlockdevOptionsFile),
    /// Nothing, with requests that complete later.
    NullAio(BlockdevOptionsNull),
    /// Nothing, with requests that complete at once.
    NullCo(BlockdevOptionsNull),
    /// A QCOW2 image.
    Qcow2(BlockdevOptionsQcow2),
    /// Reserves space ahead of what is written.
    #[qapi(since = "6.0")]
    Preallocate(BlockdevOptionsPreallocate),
    /// The same data in several nodes.
    #[qapi(since = "2.0")]
    Quorum(BlockdevOptionsQuorum),
    /// An image without format, or a part of one.
    Raw(BlockdevOptionsRaw),
    /// Limits the throughput of another node.
    Throttle(BlockdevOptionsThrottle),
    /// A disk with a volatile cache that fails on demand, for tests of durability.
    #[qapi(unstable)]
    XFault(BlockdevOptionsXFault),
}

/// A node, by name or by definition.
#[derive(Debug, Clone, PartialEq, Qapi)]
#[qapi(alternate, since = "2.9")]
pub enum BlockdevRef {
    /// A new node.
    Definition(Box<BlockdevOptions>),
    /// The name of a node that exists.
    Reference(String),
}

/// A node, by name or by definition, or none.
#[derive(Debug, Clone, PartialEq, Qapi)]
#[qapi(alternate, since = "2.9")]
pub enum BlockdevRefOrNull {
    /// A new node.
    Definition(Box<BlockdevOptions>),
    /// The name of a node that exists. An empty name is none.
    Reference(String),
    /// None, whatever the image names.
    Null(crate::Null),
}

/// Which metadata of an image is protected against being overwritten.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Qapi)]
#[qapi(since = "2.9")]
pub enum Qcow2OverlapCheckMode {
    /// None.
    None,
    /// What stays at its place while the guest writes: header, tables of the first level, directories.
    Constant,
    /// What is known without reading: this, refcount blocks, and all tables but the inactive L2 tables.
    Cached,
    /// All.
    All,
}

/// Which metadata of an image is protected, kind by kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Qapi)]
#[qapi(since = "2.9")]
pub struct Qcow2OverlapCheckFlags {
    /// What holds for the kinds that are left out; `cached` when left out.
    pub template: Option<Qcow2OverlapCheckMode>,
    /// The header.
    pub main_header: Option<bool>,
    /// The active L1 table.
    pub active_l1: Option<bool>,
    /// The L2 tables that it names.
    pub active_l2: Option<bool>,
    /// The refcount table.
    pub refcount_table: Option<bool>,
    /// The refcount blocks.
    pub refcount_block: Option<bool>,
    /// The table of snapshots.
    pub snapshot_table: Option<bool>,
    /// The L1 tables of snapshots.
    pub inactive_l1: Option<bool>,
    /// The L2 tables that they name.
    pub inactive_l2: Option<bool>,
    /// The directory of bitmaps.
    #[qapi(since = "3.0")]
    pub bitmap_directory: Option<bool>,
}

/// Which metadata of an image is protected.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(alternate, since = "2.9")]
pub enum Qcow2OverlapChecks {
    /// Kind by kind.
    Flags(Box<Qcow2OverlapCheckFlags>),
    /// By a name.
    Mode(Qcow2OverlapCheckMode),
}

/// A QCOW2 image.
#[derive(Debug, Clone, PartialEq, Qapi)]
pub struct BlockdevOptionsQcow2 {
    /// The node with the image.
    pub file: BlockdevRef,
    /// The node with what the image does not contain; the one that the image names when left out. The image must name its
    /// format then.
    pub backing: Option<BlockdevRefOrNull>,
    /// Refcounts need not be written by flushes: the image is marked dirty meanwhile, and repaired when it is opened after a
    /// crash. What the image says when left out.
    pub lazy_refcounts: Option<bool>,
    /// Discards of the client reach the file below; those that the node passes when left out.
    pub pass_discard_request: Option<bool>,
    /// Clusters that only a deleted snapshot has used are discarded in the file below; true when left out.
    pub pass_discard_snapshot: Option<bool>,
    /// Clusters that are given up for other reasons are discarded in the file below; false when left out.
    pub pass_discard_other: Option<bool>,
    /// Discarded clusters keep their place in the image; false when left out.
    #[qapi(since = "8.1")]
    pub discard_no_unref: Option<bool>,
    /// Metadata that is looked for before each write to the image file, so that a damaged image is not damaged more; `cached`
    /// when left out.
    #[qapi(since = "2.9")]
    pub overlap_check: Option<Qcow2OverlapChecks>,
    /// Bytes of metadata in memory at most, of both kinds together.
    pub cache_size: Option<i64>,
    /// Bytes of L2 tables in memory at most; what the image needs, but no more than 32 MiB, when left out.
    pub l2_cache_size: Option<i64>,
    /// Bytes of an L2 table that are read at once: a power of two from 512 to the cluster size. The cluster size, but no
    /// more than 64 KiB, when left out.
    #[qapi(since = "2.12")]
    pub l2_cache_entry_size: Option<i64>,
    /// Bytes of refcount blocks in memory at most; four clusters when left out.
    pub refcount_cache_size: Option<i64>,
    /// Seconds after which tables that nobody uses leave the memory; 0 is never, 600 when left out.
    #[qapi(since = "2.5")]
    pub cache_clean_interval: Option<i64>,
    /// The node with the guest's data, for an image that keeps them in another file; the one that it names when left out.
    #[qapi(since = "4.0")]
    pub data_file: Option<BlockdevRef>,
}

/// A file or a device of the host.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(feature = "dynamic-auto-read-only")]
pub struct BlockdevOptionsFile {
    /// The path; `/dev/fdset/N` is a descriptor of the set `N` that `add-fd` made.
    pub filename: String,
    /// The object that carries out commands about persistent reservations.
    #[qapi(since = "2.11")]
    pub pr_manager: Option<String>,
    /// Lock bytes of the file against other programs that use the same bytes; `auto`, or left out, does so where the file system can.
    #[qapi(since = "2.10")]
    pub locking: Option<OnOffAuto>,
    /// How requests reach the file; the daemon's own choice when left out.
    #[qapi(since = "2.8")]
    pub aio: Option<BlockdevAioOptions>,
    /// Requests that are handed to the kernel at once at most; 0 or left out is the setting of the thread.
    #[qapi(since = "6.2")]
    pub aio_max_batch: Option<i64>,
    /// Drop the page cache of the file when another host may have written to it.
    #[qapi(default = true, since = "4.0")]
    pub drop_cache: bool,
    /// Make sure that the page cache has nothing of the file afterwards, or fail; for tests, since it takes long with large
    /// files.
    #[qapi(default, since = "3.0", unstable)]
    pub x_check_cache_dropped: bool,
}

/// A device that keeps nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default, Qapi)]
pub struct BlockdevOptionsNull {
    /// Its size in bytes; 1 GiB when left out.
    pub size: Option<i64>,
    /// Nanoseconds that each request takes.
    pub latency_ns: Option<u64>,
    /// Block status says that it reads as zeroes. It does so in any case: memory that another client used is never shown.
    #[qapi(default)]
    pub read_zeroes: bool,
}

/// An image without format.
#[derive(Debug, Clone, PartialEq, Qapi)]
pub struct BlockdevOptionsRaw {
    /// The node with the data.
    pub file: BlockdevRef,
    /// Where the image begins in it, in bytes; 0 when left out.
    pub offset: Option<i64>,
    /// The size of the image in bytes; up to the end when left out.
    pub size: Option<i64>,
}

/// Gives nodes new options, all of them or none. What is left out has its default again; what a driver cannot change must
/// stay as it is. A child is kept by its name, replaced by the name of another node, or defined again if it was made inside
/// its node; a `backing` of null is none. `backing` must be given where there is a backing file or the image names one.
#[derive(Debug, Clone, PartialEq, Qapi)]
#[qapi(command = "blockdev-reopen", since = "6.1")]
pub struct BlockdevReopen {
    /// The options of each node, with its `node-name`.
    pub options: Vec<BlockdevOptions>,
}

/// Makes a node active, with the nodes below it, or inactive, with those below it that nothing active needs. An inactive node
/// leaves its image to other processes: it holds no lock and is not written to. When it becomes active, the image is read
/// anew.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "blockdev-set-active", since = "10.0")]
pub struct BlockdevSetActive {
    /// The name of the node; all nodes when left out.
    pub node_name: Option<String>,
    /// Whether it is to be active.
    pub active: bool,
}

/// Has the next write that goes beyond an offset reported by the event `BLOCK_WRITE_THRESHOLD`, once.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "block-set-write-threshold", since = "2.3")]
pub struct BlockSetWriteThreshold {
    /// The name of the node.
    pub node_name: String,
    /// The offset in bytes; 0 takes the threshold away.
    pub write_threshold: u64,
}

/// Adds a child to a node, or takes one away: those of a quorum.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "x-blockdev-change", since = "2.7", unstable)]
pub struct XBlockdevChange {
    /// The name of the node.
    pub parent: String,
    /// What the child to be removed is to the node, for instance `children.1`.
    pub child: Option<String>,
    /// The name of the node to be added.
    pub node: Option<String>,
}

/// Names an iothread for a node and those that hang together with it. Nodes have no thread of their own in this daemon: the
/// requests of an export run on the export's threads, whatever nodes they go through. The command checks what it is given and
/// changes nothing.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "x-blockdev-set-iothread", since = "2.12", unstable)]
pub struct XBlockdevSetIothread {
    /// The name of the node.
    pub node_name: String,
    /// The id of the iothread; null is the main loop.
    pub iothread: StrOrNull,
    /// Also if an export uses the node.
    pub force: Option<bool>,
}

/// A text or nothing.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(alternate, since = "2.10")]
pub enum StrOrNull {
    /// The text.
    S(String),
    /// Nothing.
    N(crate::Null),
}

/// Removes a node that nothing uses.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "blockdev-del", since = "2.9")]
pub struct BlockdevDel {
    /// The name of the node.
    pub node_name: String,
}

/// Changes the size of a node. A smaller size cuts off what stands behind it.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "block_resize", since = "0.14")]
pub struct BlockResize {
    /// The name of a device. There are none in this daemon, so that naming one always fails.
    pub device: Option<String>,
    /// The name of the node.
    #[qapi(since = "2.0")]
    pub node_name: Option<String>,
    /// The new size in bytes.
    pub size: i64,
}

/// What was being done when a request failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Qapi)]
pub enum IoOperationType {
    /// Reading.
    Read,
    /// Writing.
    Write,
}

/// What was done about a request that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Qapi)]
pub enum BlockErrorAction {
    /// Nothing; it counts as done.
    Ignore,
    /// The client got the error.
    Report,
    /// The client was stopped.
    Stop,
}

/// A request failed. At most one a second and device is sent, unless the action is `stop`.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(event = "BLOCK_IO_ERROR", since = "0.13")]
pub struct BlockIoError {
    /// Where the device stands in the tree of objects; empty if it does not.
    #[qapi(since = "9.2")]
    pub qom_path: String,
    /// The name of the device; empty if it has none.
    pub device: String,
    /// The name of the node.
    #[qapi(since = "2.8")]
    pub node_name: Option<String>,
    /// What was being done.
    pub operation: IoOperationType,
    /// What was done about it.
    pub action: BlockErrorAction,
    /// It failed because there was no space left.
    #[qapi(since = "2.2")]
    pub nospace: Option<bool>,
    /// Why it failed, for people.
    #[qapi(since = "2.2")]
    pub reason: String,
}
