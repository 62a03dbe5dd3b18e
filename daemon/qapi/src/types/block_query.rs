//! Block nodes: what they are, what they did, how they hang together.

use super::snapshot::SnapshotInfo;
use crate::{
    Qapi, Size,
    types::block::{BlockdevDetectZeroesOptions, BlockdevDriver},
    types::job::BlockDeviceIoStatus,
};

/// How much of the host's cache a node uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Qapi)]
pub struct BlockdevCacheInfo {
    /// A write is done before it is on stable storage.
    pub writeback: bool,
    /// The page cache is not used.
    pub direct: bool,
    /// Flushes are ignored.
    pub no_flush: bool,
}

/// A child of a node.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(since = "10.1")]
pub struct BlockdevChild {
    /// What the child is to the node, for instance `file`.
    pub child: String,
    /// The name of the child's node.
    pub node_name: String,
}

/// The limits of requests to a node.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(since = "10.2")]
pub struct BlockLimitsInfo {
    /// Offsets and lengths of requests are multiples of it, in bytes.
    pub request_alignment: u32,
    /// The longest discard request in bytes; left out if there is no limit.
    pub max_discard: Option<u64>,
    /// Discard works best on multiples of it, in bytes; left out if it makes no difference.
    pub discard_alignment: Option<u32>,
    /// The longest zero request in bytes; left out if there is no limit.
    pub max_write_zeroes: Option<u64>,
    /// Zero requests work best on multiples of it, in bytes; left out if it makes no difference.
    pub write_zeroes_alignment: Option<u32>,
    /// The best length of a request in bytes; left out if there is none.
    pub opt_transfer: Option<u32>,
    /// The longest request in bytes; left out if there is no limit.
    pub max_transfer: Option<u32>,
    /// The longest request that goes to the hardware as it is, in bytes; left out if there is no limit.
    pub max_hw_transfer: Option<u32>,
    /// Pieces of memory in a request at most.
    pub max_iov: i64,
    /// Pieces of memory in a request that goes to the hardware as it is, at most; left out if that is not known.
    pub max_hw_iov: Option<i64>,
    /// The alignment of memory, in bytes, that a request without copying needs.
    pub min_mem_alignment: u64,
    /// The alignment of memory, in bytes, that the daemon gives its own buffers.
    pub opt_mem_alignment: u64,
}

/// An image.
#[derive(Debug, Clone, PartialEq, Qapi)]
#[qapi(since = "1.3")]
pub struct ImageInfo {
    /// Its file name.
    pub filename: String,
    /// Its format: the name of the driver.
    pub format: String,
    /// It was not closed properly; left out where images have no such mark.
    pub dirty_flag: Option<bool>,
    /// Bytes that it takes in the host's file system, where that can be told.
    pub actual_size: Option<i64>,
    /// Its size in bytes as a client sees it.
    pub virtual_size: i64,
    /// Bytes of a cluster, in formats with clusters.
    pub cluster_size: Option<i64>,
    /// Its data are encrypted; left out if not.
    pub encrypted: Option<bool>,
    /// Its clusters are compressed; left out if not.
    #[qapi(since = "1.7")]
    pub compressed: Option<bool>,
    /// The name that it has for its backing file.
    pub backing_filename: Option<String>,
    /// The same as it can be opened, where that is another.
    pub full_backing_filename: Option<String>,
    /// The format that it gives its backing file.
    pub backing_filename_format: Option<String>,
    /// Its internal snapshots; left out if there are none.
    pub snapshots: Option<Vec<SnapshotInfo>>,
    /// What backs it; for a filter, what it filters.
    pub backing_image: Option<Box<ImageInfo>>,
    /// The limits of requests.
    #[qapi(since = "10.2")]
    pub limits: Option<BlockLimitsInfo>,
    /// What only images of this format have.
    #[qapi(since = "1.7")]
    pub format_specific: Option<ImageInfoSpecific>,
}

/// What only images of some formats have.
#[derive(Debug, Clone, PartialEq, Qapi)]
#[qapi(since = "1.7")]
pub struct ImageInfoSpecific {
    /// The format.
    #[qapi(variants, tag = "type")]
    pub kind: ImageInfoSpecificVariant,
}

/// The formats that have something to tell.
#[derive(Debug, Clone, PartialEq, Qapi)]
#[qapi(variants, tag_enum = "ImageInfoSpecificKind")]
pub enum ImageInfoSpecificVariant {
    /// A QCOW2 image.
    Qcow2(Box<ImageInfoSpecificQCow2Wrapper>),
    /// A file.
    File(ImageInfoSpecificFileWrapper),
}

/// A wrapped description of a QCOW2 image.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct ImageInfoSpecificQCow2Wrapper {
    /// The description.
    pub data: ImageInfoSpecificQCow2,
}

/// How the clusters of an image are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Qapi)]
#[qapi(since = "5.1")]
pub enum Qcow2CompressionType {
    /// Raw deflate.
    Zlib,
    /// Zstandard.
    Zstd,
}

/// What is said of a bitmap in an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Qapi)]
#[qapi(since = "4.0")]
pub enum Qcow2BitmapInfoFlags {
    /// It is being recorded in, or was not stored when the image was last closed, and may lack writes.
    InUse,
    /// It records writes.
    Auto,
}

/// A bitmap in an image.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(since = "4.0")]
pub struct Qcow2BitmapInfo {
    /// Its name.
    pub name: String,
    /// Bytes of the disk that one bit stands for.
    pub granularity: u32,
    /// What is said of it.
    pub flags: Vec<Qcow2BitmapInfoFlags>,
}

/// What only QCOW2 images have.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(since = "1.7")]
pub struct ImageInfoSpecificQCow2 {
    /// The compatibility level: `0.10` for version 2, `1.1` for version 3.
    pub compat: String,
    /// The name of the file with the guest's data, if it is another.
    #[qapi(since = "4.0")]
    pub data_file: Option<String>,
    /// That file is the guest's disk as it is.
    #[qapi(since = "4.0")]
    pub data_file_raw: Option<bool>,
    /// It has subclusters; left out for version 2.
    #[qapi(since = "5.2")]
    pub extended_l2: Option<bool>,
    /// Refcounts may be written late; left out for version 2.
    pub lazy_refcounts: Option<bool>,
    /// It is marked as damaged; left out for version 2.
    #[qapi(since = "2.2")]
    pub corrupt: Option<bool>,
    /// The width of a refcount in bits.
    #[qapi(since = "2.3")]
    pub refcount_bits: i64,
    /// Its bitmaps; left out if there are none.
    #[qapi(since = "4.0")]
    pub bitmaps: Option<Vec<Qcow2BitmapInfo>>,
    /// How its clusters are compressed.
    #[qapi(since = "5.1")]
    pub compression_type: Qcow2CompressionType,
}

/// A wrapped description of a file.
#[derive(Debug, Clone, PartialEq, Eq, Default, Qapi)]
pub struct ImageInfoSpecificFileWrapper {
    /// The description.
    pub data: ImageInfoSpecificFile,
}

/// What only files have.
#[derive(Debug, Clone, PartialEq, Eq, Default, Qapi)]
#[qapi(since = "8.0")]
pub struct ImageInfoSpecificFile {
    /// By how many bytes at least the file system extends the file, as it was when the file was opened; left out where it
    /// keeps no such hint.
    pub extent_size_hint: Option<Size>,
}

/// A node.
#[derive(Debug, Clone, PartialEq, Qapi)]
#[qapi(since = "0.14")]
pub struct BlockDeviceInfo {
    /// Its file name, or what stands for it.
    pub file: String,
    /// Its name. Nodes without a name of the user's have a made up one, with a `#` in front.
    #[qapi(since = "2.0")]
    pub node_name: String,
    /// It refuses writes.
    pub ro: bool,
    /// The name of its driver.
    pub drv: String,
    /// The file name of its backing file, if it has one.
    #[qapi(rename = "backing_file")]
    pub backing_file: Option<String>,
    /// Backing files below it.
    #[qapi(rename = "backing_file_depth", since = "1.2")]
    pub backing_file_depth: i64,
    /// Its children.
    #[qapi(since = "10.1")]
    pub children: Vec<BlockdevChild>,
    /// It may be used. A node is not active while another process owns the image.
    #[qapi(since = "10.0")]
    pub active: bool,
    /// Its data are encrypted.
    pub encrypted: bool,
    /// What becomes of writes that consist of zeroes.
    #[qapi(rename = "detect_zeroes", since = "2.1")]
    pub detect_zeroes: BlockdevDetectZeroesOptions,
    /// The limit of bytes a second; 0 is none.
    pub bps: i64,
    /// The limit of bytes read a second; 0 is none.
    #[qapi(rename = "bps_rd")]
    pub bps_rd: i64,
    /// The limit of bytes written a second; 0 is none.
    #[qapi(rename = "bps_wr")]
    pub bps_wr: i64,
    /// The limit of requests a second; 0 is none.
    pub iops: i64,
    /// The limit of reads a second; 0 is none.
    #[qapi(rename = "iops_rd")]
    pub iops_rd: i64,
    /// The limit of writes a second; 0 is none.
    #[qapi(rename = "iops_wr")]
    pub iops_wr: i64,
    /// The image.
    #[qapi(since = "1.6")]
    pub image: ImageInfo,
    /// Bursts of bytes a second. Never there: limits belong to throttle groups here.
    #[qapi(rename = "bps_max", since = "1.7")]
    pub bps_max: Option<i64>,
    /// Bursts of bytes read a second. Never there: limits belong to throttle groups here.
    #[qapi(rename = "bps_rd_max", since = "1.7")]
    pub bps_rd_max: Option<i64>,
    /// Bursts of bytes written a second. Never there: limits belong to throttle groups here.
    #[qapi(rename = "bps_wr_max", since = "1.7")]
    pub bps_wr_max: Option<i64>,
    /// Bursts of requests a second. Never there: limits belong to throttle groups here.
    #[qapi(rename = "iops_max", since = "1.7")]
    pub iops_max: Option<i64>,
    /// Bursts of reads a second. Never there: limits belong to throttle groups here.
    #[qapi(rename = "iops_rd_max", since = "1.7")]
    pub iops_rd_max: Option<i64>,
    /// Bursts of writes a second. Never there: limits belong to throttle groups here.
    #[qapi(rename = "iops_wr_max", since = "1.7")]
    pub iops_wr_max: Option<i64>,
    /// Seconds that a burst of bytes may last. Never there.
    #[qapi(rename = "bps_max_length", since = "2.6")]
    pub bps_max_length: Option<i64>,
    /// Seconds that a burst of bytes read may last. Never there.
    #[qapi(rename = "bps_rd_max_length", since = "2.6")]
    pub bps_rd_max_length: Option<i64>,
    /// Seconds that a burst of bytes written may last. Never there.
    #[qapi(rename = "bps_wr_max_length", since = "2.6")]
    pub bps_wr_max_length: Option<i64>,
    /// Seconds that a burst of requests may last. Never there.
    #[qapi(rename = "iops_max_length", since = "2.6")]
    pub iops_max_length: Option<i64>,
    /// Seconds that a burst of reads may last. Never there.
    #[qapi(rename = "iops_rd_max_length", since = "2.6")]
    pub iops_rd_max_length: Option<i64>,
    /// Seconds that a burst of writes may last. Never there.
    #[qapi(rename = "iops_wr_max_length", since = "2.6")]
    pub iops_wr_max_length: Option<i64>,
    /// Bytes of a request that counts as one. Never there.
    #[qapi(rename = "iops_size", since = "1.7")]
    pub iops_size: Option<i64>,
    /// The throttle group. Never there: a node of the driver `throttle` names its group.
    #[qapi(since = "2.4")]
    pub group: Option<String>,
    /// How much of the host's cache it uses.
    #[qapi(since = "2.3")]
    pub cache: BlockdevCacheInfo,
    /// The offset beyond which the first write is reported, in bytes; 0 is none.
    #[qapi(rename = "write_threshold", since = "2.3")]
    pub write_threshold: u64,
}

/// Lists the nodes that have names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Qapi)]
#[qapi(command = "query-named-block-nodes", returns = "Vec<BlockDeviceInfo>", since = "2.0")]
pub struct QueryNamedBlockNodes {
    /// Leave out what can be found at other nodes of the list: the images of backing files.
    #[qapi(default, since = "5.0")]
    pub flat: bool,
}

/// A device of a guest.
#[derive(Debug, Clone, PartialEq, Qapi)]
#[qapi(since = "0.14")]
pub struct BlockInfo {
    /// Its name.
    pub device: String,
    /// The path of the guest's device in the tree of objects.
    #[qapi(since = "2.10")]
    pub qdev: Option<String>,
    /// Nothing that means anything: the member is there because it always was.
    #[qapi(rename = "type")]
    pub ty: String,
    /// Its medium can be taken out.
    pub removable: bool,
    /// Its medium is held by the guest.
    pub locked: bool,
    /// Its medium.
    pub inserted: Option<BlockDeviceInfo>,
    /// Its tray is open; left out where it has none.
    #[qapi(rename = "tray_open")]
    pub tray_open: Option<bool>,
    /// What came of its last request, where the guest is stopped by errors.
    pub io_status: Option<BlockDeviceIoStatus>,
}

/// Lists the devices of the guest. The daemon has no guest and therefore none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Qapi)]
#[qapi(command = "query-block", returns = "Vec<BlockInfo>", since = "0.14")]
pub struct QueryBlock {
    /// Leave out what can be found at other nodes: the images of backing files.
    #[qapi(default, since = "11.0")]
    pub flat: bool,
}

/// What a node did in one of the intervals that statistics are kept for.
#[derive(Debug, Clone, PartialEq, Qapi)]
#[qapi(rename_all = "snake_case", since = "2.5")]
pub struct BlockDeviceTimedStats {
    /// The length of the interval in seconds.
    pub interval_length: i64,
    /// The shortest time of a read in nanoseconds.
    pub min_rd_latency_ns: i64,
    /// The longest time of a read in nanoseconds.
    pub max_rd_latency_ns: i64,
    /// The average time of a read in nanoseconds.
    pub avg_rd_latency_ns: i64,
    /// The shortest time of a write in nanoseconds.
    pub min_wr_latency_ns: i64,
    /// The longest time of a write in nanoseconds.
    pub max_wr_latency_ns: i64,
    /// The average time of a write in nanoseconds.
    pub avg_wr_latency_ns: i64,
    /// The shortest time of a zone append in nanoseconds.
    #[qapi(since = "8.1")]
    pub min_zone_append_latency_ns: i64,
    /// The longest time of a zone append in nanoseconds.
    #[qapi(since = "8.1")]
    pub max_zone_append_latency_ns: i64,
    /// The average time of a zone append in nanoseconds.
    #[qapi(since = "8.1")]
    pub avg_zone_append_latency_ns: i64,
    /// The shortest time of a flush in nanoseconds.
    pub min_flush_latency_ns: i64,
    /// The longest time of a flush in nanoseconds.
    pub max_flush_latency_ns: i64,
    /// The average time of a flush in nanoseconds.
    pub avg_flush_latency_ns: i64,
    /// The average number of reads at a time.
    pub avg_rd_queue_depth: f64,
    /// The average number of writes at a time.
    pub avg_wr_queue_depth: f64,
    /// The average number of zone appends at a time.
    #[qapi(since = "8.1")]
    pub avg_zone_append_queue_depth: f64,
}

/// What a node did since it was made.
#[derive(Debug, Clone, PartialEq, Default, Qapi)]
#[qapi(rename_all = "snake_case", since = "0.14")]
pub struct BlockDeviceStats {
    /// Bytes read.
    pub rd_bytes: u64,
    /// Bytes written.
    pub wr_bytes: u64,
    /// Bytes appended to zones.
    #[qapi(since = "8.1")]
    pub zone_append_bytes: u64,
    /// Bytes discarded.
    #[qapi(since = "4.2")]
    pub unmap_bytes: u64,
    /// Reads.
    pub rd_operations: u64,
    /// Writes.
    pub wr_operations: u64,
    /// Zone appends.
    #[qapi(since = "8.1")]
    pub zone_append_operations: u64,
    /// Flushes.
    #[qapi(since = "0.15")]
    pub flush_operations: u64,
    /// Discards.
    #[qapi(since = "4.2")]
    pub unmap_operations: u64,
    /// Time spent on reads, in nanoseconds.
    #[qapi(since = "0.15")]
    pub rd_total_time_ns: u64,
    /// Time spent on writes, in nanoseconds.
    #[qapi(since = "0.15")]
    pub wr_total_time_ns: u64,
    /// Time spent on zone appends, in nanoseconds.
    #[qapi(since = "8.1")]
    pub zone_append_total_time_ns: u64,
    /// Time spent on flushes, in nanoseconds.
    #[qapi(since = "0.15")]
    pub flush_total_time_ns: u64,
    /// Time spent on discards, in nanoseconds.
    #[qapi(since = "4.2")]
    pub unmap_total_time_ns: u64,
    /// The offset behind the last byte that was ever written.
    pub wr_highest_offset: u64,
    /// Reads that were put together with others.
    #[qapi(since = "2.3")]
    pub rd_merged: u64,
    /// Writes that were put together with others.
    #[qapi(since = "2.3")]
    pub wr_merged: u64,
    /// Zone appends that were put together with others.
    #[qapi(since = "8.1")]
    pub zone_append_merged: u64,
    /// Discards that were put together with others.
    #[qapi(since = "4.2")]
    pub unmap_merged: u64,
    /// Nanoseconds since the last request; left out if there was none.
    #[qapi(since = "2.5")]
    pub idle_time_ns: Option<u64>,
    /// Reads that failed.
    #[qapi(since = "2.5")]
    pub failed_rd_operations: u64,
    /// Writes that failed.
    #[qapi(since = "2.5")]
    pub failed_wr_operations: u64,
    /// Zone appends that failed.
    #[qapi(since = "8.1")]
    pub failed_zone_append_operations: u64,
    /// Flushes that failed.
    #[qapi(since = "2.5")]
    pub failed_flush_operations: u64,
    /// Discards that failed.
    #[qapi(since = "4.2")]
    pub failed_unmap_operations: u64,
    /// Reads that were refused.
    #[qapi(since = "2.5")]
    pub invalid_rd_operations: u64,
    /// Writes that were refused.
    #[qapi(since = "2.5")]
    pub invalid_wr_operations: u64,
    /// Zone appends that were refused.
    #[qapi(since = "8.1")]
    pub invalid_zone_append_operations: u64,
    /// Flushes that were refused.
    #[qapi(since = "2.5")]
    pub invalid_flush_operations: u64,
    /// Discards that were refused.
    #[qapi(since = "4.2")]
    pub invalid_unmap_operations: u64,
    /// Requests that were refused count as accesses.
    #[qapi(since = "2.5")]
    pub account_invalid: bool,
    /// Requests that failed count as accesses, with their times.
    #[qapi(since = "2.5")]
    pub account_failed: bool,
    /// What happened in the intervals that statistics are kept for; the daemon keeps none.
    #[qapi(since = "2.5")]
    pub timed_stats: Vec<BlockDeviceTimedStats>,
    /// How long reads took. Never there, as nothing in the daemon asks for histograms.
    #[qapi(rename = "rd_latency_histogram", since = "4.0")]
    pub rd_latency_histogram: Option<BlockLatencyHistogramInfo>,
    /// How long writes took. Never there.
    #[qapi(rename = "wr_latency_histogram", since = "4.0")]
    pub wr_latency_histogram: Option<BlockLatencyHistogramInfo>,
    /// How long zone appends took. Never there.
    #[qapi(rename = "zone_append_latency_histogram", since = "8.1")]
    pub zone_append_latency_histogram: Option<BlockLatencyHistogramInfo>,
    /// How long flushes took. Never there.
    #[qapi(rename = "flush_latency_histogram", since = "4.0")]
    pub flush_latency_histogram: Option<BlockLatencyHistogramInfo>,
}

/// How many requests took how long.
#[derive(Debug, Clone, PartialEq, Eq, Default, Qapi)]
#[qapi(since = "4.0")]
pub struct BlockLatencyHistogramInfo {
    /// The times between two bins, in nanoseconds.
    pub boundaries: Vec<u64>,
    /// Requests in each bin, one more than there are boundaries.
    pub bins: Vec<u64>,
}

/// What files count besides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Qapi)]
#[qapi(since = "4.2")]
pub struct BlockStatsSpecificFile {
    /// Discards that worked.
    pub discard_nb_ok: u64,
    /// Discards that failed.
    pub discard_nb_failed: u64,
    /// Bytes in discards that worked.
    pub discard_bytes_ok: u64,
}

/// What some drivers count besides.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(since = "4.2")]
pub struct BlockStatsSpecific {
    /// The driver.
    #[qapi(variants)]
    pub driver: BlockStatsSpecificVariant,
}

/// The drivers that count something besides.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(variants, tag_type = "BlockdevDriver")]
pub enum BlockStatsSpecificVariant {
    /// A file.
    File(BlockStatsSpecificFile),
    /// A device of the host.
    #[qapi(rename = "host_device")]
    HostDevice(BlockStatsSpecificFile),
}

/// What a node did, and the nodes below it.
#[derive(Debug, Clone, PartialEq, Qapi)]
#[qapi(since = "0.14")]
pub struct BlockStats {
    /// The name of a device. Never there: the daemon has none.
    pub device: Option<String>,
    /// The path of a device. Never there.
    #[qapi(since = "3.0")]
    pub qdev: Option<String>,
    /// The name of the node.
    #[qapi(since = "2.3")]
    pub node_name: String,
    /// What it did.
    pub stats: BlockDeviceStats,
    /// What its driver counts besides.
    #[qapi(since = "4.2")]
    pub driver_specific: Option<BlockStatsSpecific>,
    /// The same for the node that has its data: its `file`.
    pub parent: Option<Box<BlockStats>>,
    /// The same for the node that backs it.
    #[qapi(since = "2.1")]
    pub backing: Option<Box<BlockStats>>,
}

/// Counts what was read and written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Qapi)]
#[qapi(command = "query-blockstats", returns = "Vec<BlockStats>", since = "0.14")]
pub struct QueryBlockstats {
    /// For each node; otherwise for each device of the guest, of which the daemon has none.
    #[qapi(default, since = "2.3")]
    pub query_nodes: bool,
}

/// What stands in the graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Qapi)]
pub enum XDbgBlockGraphNodeType {
    /// A user of a node: an export, for instance.
    BlockBackend,
    /// A job.
    BlockJob,
    /// A node.
    BlockDriver,
}

/// A vertex of the graph.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(since = "4.0")]
pub struct XDbgBlockGraphNode {
    /// Its number. Means nothing beyond one reply.
    pub id: u64,
    /// What it is.
    #[qapi(rename = "type")]
    pub ty: XDbgBlockGraphNodeType,
    /// Its name, if it has one.
    pub name: String,
}

/// What a user of a node may do, or lets others do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Qapi)]
pub enum BlockPermission {
    /// Read data that somebody wrote.
    ConsistentRead,
    /// Change data.
    Write,
    /// Write data that do not differ from what is there.
    WriteUnchanged,
    /// Change the size.
    Resize,
}

/// An edge of the graph.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(since = "4.0")]
pub struct XDbgBlockGraphEdge {
    /// The number of the upper end.
    pub parent: u64,
    /// The number of the lower end.
    pub child: u64,
    /// What the lower end is to the upper one.
    pub name: String,
    /// What the upper end may do.
    pub perm: Vec<BlockPermission>,
    /// What it lets others do.
    pub shared_perm: Vec<BlockPermission>,
}

/// The graph of nodes and their users.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(since = "4.0")]
pub struct XDbgBlockGraph {
    /// Its vertices.
    pub nodes: Vec<XDbgBlockGraphNode>,
    /// Its edges.
    pub edges: Vec<XDbgBlockGraphEdge>,
}

/// Shows the graph of nodes and their users.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Qapi)]
#[qapi(command = "x-debug-query-block-graph", returns = "XDbgBlockGraph", since = "4.0", unstable)]
pub struct XDebugQueryBlockGraph;
