//! Options of the drivers that stand above other nodes and add behaviour.

use crate::Qapi;
use crate::types::block::BlockdevRef;
use crate::types::block_query::BlockPermission;

/// Limits the throughput of a node.
#[derive(Debug, Clone, PartialEq, Qapi)]
pub struct BlockdevOptionsThrottle {
    /// The name of the object with the limits. All nodes that name the same one share them.
    pub throttle_group: String,
    /// The node whose throughput is limited.
    pub file: BlockdevRef,
}

/// What a driver or the core does to a node, as the rules of `blkdebug` can name it. Formats raise most of them on the
/// node of their file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Qapi)]
#[qapi(rename_all = "snake_case", since = "2.9")]
pub enum BlkdebugEvent {
    /// Writes of the level 1 table.
    L1Update,
    /// Allocation of a larger level 1 table.
    L1GrowAllocTable,
    /// The larger level 1 table is written.
    L1GrowWriteTable,
    /// The larger level 1 table comes into use.
    L1GrowActivateTable,
    /// A level 2 table is read.
    L2Load,
    /// A level 2 table is written.
    L2Update,
    /// A level 2 table is written for a compressed cluster.
    L2UpdateCompressed,
    /// An old level 2 table is read to be copied.
    L2AllocCowRead,
    /// A new level 2 table is written.
    L2AllocWrite,
    /// Data are read.
    ReadAio,
    /// Data are read from the backing file.
    ReadBackingAio,
    /// A compressed cluster is read.
    ReadCompressed,
    /// Data are written.
    WriteAio,
    /// A compressed cluster is written.
    WriteCompressed,
    /// The state of a machine is read.
    VmstateLoad,
    /// The state of a machine is written.
    VmstateSave,
    /// Data are read to be copied on write.
    CowRead,
    /// Data that were copied are written.
    CowWrite,
    /// The refcount table is read.
    ReftableLoad,
    /// The refcount table grows.
    ReftableGrow,
    /// The refcount table is written.
    ReftableUpdate,
    /// A refcount block is read.
    RefblockLoad,
    /// A refcount block is written.
    RefblockUpdate,
    /// A part of a refcount block is written.
    RefblockUpdatePart,
    /// A refcount block is allocated.
    RefblockAlloc,
    /// A new refcount block is entered into the table.
    RefblockAllocHookup,
    /// A new refcount block is written.
    RefblockAllocWrite,
    /// The blocks of a new refcount table are written.
    RefblockAllocWriteBlocks,
    /// A new refcount table is written.
    RefblockAllocWriteTable,
    /// A new refcount table comes into use.
    RefblockAllocSwitchTable,
    /// Clusters are allocated.
    ClusterAlloc,
    /// A few bytes are allocated.
    ClusterAllocBytes,
    /// Clusters are freed.
    ClusterFree,
    /// What the node above keeps is given to this one.
    FlushToOs,
    /// A flush is about to reach this node.
    FlushToDisk,
    /// The start of an unaligned write is about to be read.
    PwritevRmwHead,
    /// The start of an unaligned write has been read.
    PwritevRmwAfterHead,
    /// The end of an unaligned write is about to be read.
    PwritevRmwTail,
    /// The end of an unaligned write has been read.
    PwritevRmwAfterTail,
    /// A write of data begins.
    Pwritev,
    /// A write of zeroes begins.
    PwritevZero,
    /// A write has ended.
    PwritevDone,
    /// An image is about to be emptied.
    EmptyImagePrepare,
    /// A smaller level 1 table is written.
    #[qapi(since = "2.11")]
    L1ShrinkWriteTable,
    /// Level 2 tables are freed for a smaller level 1 table.
    #[qapi(since = "2.11")]
    L1ShrinkFreeL2Clusters,
    /// Data are written that were copied on read.
    #[qapi(since = "2.11")]
    CorWrite,
    /// Space for clusters is allocated.
    #[qapi(since = "4.1")]
    ClusterAllocSpace,
    /// Happens once, when the node is made.
    #[qapi(since = "4.1")]
    None,
}

/// The kinds of requests that can fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Qapi)]
#[qapi(since = "4.1")]
pub enum BlkdebugIOType {
    /// Reads.
    Read,
    /// Writes of data.
    Write,
    /// Writes of zeroes.
    WriteZeroes,
    /// Discards.
    Discard,
    /// Flushes.
    Flush,
    /// Queries of block status.
    BlockStatus,
}

/// A rule that lets requests fail, from an event on.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(since = "2.9")]
pub struct BlkdebugInjectErrorOptions {
    /// The event that puts the rule in force, in place of those that were in force before.
    pub event: BlkdebugEvent,
    /// Only when the node is in this state; in any when left out or 0. The first state is 1.
    pub state: Option<i64>,
    /// The kind of requests that fail; all but `block-status` when left out.
    #[qapi(since = "4.1")]
    pub iotype: Option<BlkdebugIOType>,
    /// What they fail with, as a number of errno; 5 (EIO) when left out. 0 lets them go on, after the delay.
    pub errno: Option<i64>,
    /// Only requests that touch the sector of 512 bytes with this number; all when left out.
    pub sector: Option<i64>,
    /// The rule is gone after its first request.
    pub once: Option<bool>,
    /// Fail before other requests get their turn.
    pub immediately: Option<bool>,
    /// Nanoseconds that requests wait before they fail, or go on where `errno` is 0.
    #[qapi(since = "11.1")]
    pub delay_ns: Option<i64>,
}

/// A rule that changes the state of the node.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(since = "2.9")]
pub struct BlkdebugSetStateOptions {
    /// The event upon which it does.
    pub event: BlkdebugEvent,
    /// Only when the node is in this state; in any when left out or 0.
    pub state: Option<i64>,
    /// The new state.
    #[qapi(rename = "new_state")]
    pub new_state: i64,
}

/// Lets requests to a node fail by rule, and limits what the node can do.
#[derive(Debug, Clone, PartialEq, Qapi)]
pub struct BlockdevOptionsBlkdebug {
    /// The node below.
    pub image: BlockdevRef,
    /// A file with more rules: sections `[inject-error]` and `[set-state]` with lines `member = "value"`.
    pub config: Option<String>,
    /// Requests are multiples of this many bytes: a power of two, at most 1 MiB.
    pub align: Option<i64>,
    /// The longest request in bytes.
    pub max_transfer: Option<i32>,
    /// Zero requests are multiples of this many bytes.
    #[qapi(since = "2.10")]
    pub opt_write_zero: Option<i32>,
    /// The longest zero request in bytes.
    #[qapi(since = "2.10")]
    pub max_write_zero: Option<i32>,
    /// Discards are multiples of this many bytes.
    #[qapi(since = "2.10")]
    pub opt_discard: Option<i32>,
    /// The longest discard in bytes.
    #[qapi(since = "2.10")]
    pub max_discard: Option<i32>,
    /// Rules that let requests fail.
    pub inject_error: Option<Vec<BlkdebugInjectErrorOptions>>,
    /// Rules that change the state of the node.
    pub set_state: Option<Vec<BlkdebugSetStateOptions>>,
    /// What this node needs of the one below besides what its users need.
    #[qapi(since = "5.0")]
    pub take_child_perms: Option<Vec<BlockPermission>>,
    /// What this node does not let others do with the one below.
    #[qapi(since = "5.0")]
    pub unshare_child_perms: Option<Vec<BlockPermission>>,
}

/// Copies what is read from backing files to the node below.
#[derive(Debug, Clone, PartialEq, Qapi)]
pub struct BlockdevOptionsCor {
    /// The node below.
    pub file: BlockdevRef,
    /// The name of the lowest node in its chain that data are copied from; all when left out.
    #[qapi(since = "6.0")]
    pub bottom: Option<String>,
}

/// Does everything to two nodes and compares.
#[derive(Debug, Clone, PartialEq, Qapi)]
pub struct BlockdevOptionsBlkverify {
    /// The node that is tested.
    pub test: BlockdevRef,
    /// The node with what must come out.
    pub raw: BlockdevRef,
}

/// Compresses what is written to another node, whose format must be able to.
#[derive(Debug, Clone, PartialEq, Qapi)]
#[qapi(since = "5.0")]
pub struct BlockdevOptionsCompress {
    /// The node below.
    pub file: BlockdevRef,
}

/// Reserves space at the end of another node ahead of writes that make it grow.
#[derive(Debug, Clone, PartialEq, Qapi)]
#[qapi(since = "6.0")]
pub struct BlockdevOptionsPreallocate {
    /// The node below.
    pub file: BlockdevRef,
    /// The node below ends at a multiple of this many bytes: a multiple of 512; 1 MiB when left out.
    pub prealloc_align: Option<i64>,
    /// How many bytes are reserved behind what is written; 128 MiB when left out.
    pub prealloc_size: Option<i64>,
}

/// Passes requests on to a node, and writes a log of those that change it to another one, as the device-mapper target
/// `log-writes` does.
#[derive(Debug, Clone, PartialEq, Qapi)]
#[qapi(since = "3.0")]
pub struct BlockdevOptionsBlklogwrites {
    /// The node whose changes are logged.
    pub file: BlockdevRef,
    /// The node with the log.
    pub log: BlockdevRef,
    /// The unit of the log in bytes, and of requests: a power of two from 32, below 16 MiB; 512 when left out.
    pub log_sector_size: Option<u32>,
    /// Go on with the log that is there, and with its unit. False when left out: the log begins anew.
    pub log_append: Option<bool>,
    /// The number of entries in the log is brought up to date after that many requests, and at each flush; 4096 when left out.
    pub log_super_update_interval: Option<u64>,
}

/// How a quorum reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Qapi)]
#[qapi(since = "2.9")]
pub enum QuorumReadPattern {
    /// All children, which vote.
    Quorum,
    /// The first child that can be read.
    Fifo,
}

/// Keeps the same data in several nodes, and reads what enough of them agree on.
#[derive(Debug, Clone, PartialEq, Qapi)]
#[qapi(since = "2.9")]
pub struct BlockdevOptionsQuorum {
    /// Stop at the first difference: for exactly two children and a threshold of 2. False when left out.
    pub blkverify: Option<bool>,
    /// The nodes, all of the same length.
    pub children: Vec<BlockdevRef>,
    /// How many children have to agree, and how many have to succeed in what they are asked to do.
    pub vote_threshold: i64,
    /// Children that were outvoted when read get what the others have. False when left out.
    #[qapi(since = "2.1")]
    pub rewrite_corrupted: Option<bool>,
    /// How to read; `quorum` when left out.
    #[qapi(since = "2.2")]
    pub read_pattern: Option<QuorumReadPattern>,
}
