//! What nodes tell without being asked.

use crate::Qapi;

/// An image is damaged.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(event = "BLOCK_IMAGE_CORRUPTED", since = "1.7")]
pub struct BlockImageCorrupted {
    /// The name of the device; empty, for there are none in this daemon.
    pub device: String,
    /// The name of the node.
    #[qapi(since = "2.4")]
    pub node_name: Option<String>,
    /// What is wrong, for people.
    pub msg: String,
    /// Where the access was that would have done damage, or met it, in bytes.
    pub offset: Option<i64>,
    /// How long that access was, in bytes.
    pub size: Option<i64>,
    /// The image can no longer be used; otherwise reading may go on.
    pub fatal: bool,
}

/// What was being done with a quorum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Qapi)]
pub enum QuorumOpType {
    /// Reading.
    Read,
    /// Writing.
    Write,
    /// Flushing.
    Flush,
}

/// A quorum found too few children that agree. At most one a second is sent.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(event = "QUORUM_FAILURE", since = "2.0")]
pub struct QuorumFailure {
    /// The name of the node.
    pub reference: String,
    /// Where the request began, in units of 512 bytes.
    pub sector_num: i64,
    /// How long it was, in units of 512 bytes.
    pub sectors_count: i64,
}

/// A child of a quorum failed, or has other data than the majority. At most one a second and child is sent.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(event = "QUORUM_REPORT_BAD", since = "2.0")]
pub struct QuorumReportBad {
    /// What was being done.
    #[qapi(rename = "type", since = "2.6")]
    pub kind: QuorumOpType,
    /// The error, for people; left out where the child succeeded and its data differ.
    pub error: Option<String>,
    /// The name of the child's node.
    pub node_name: String,
    /// Where the request began, in units of 512 bytes.
    pub sector_num: i64,
    /// How long it was, in units of 512 bytes.
    pub sectors_count: i64,
}

/// A write went beyond the threshold that `block-set-write-threshold` had set. The threshold is gone with it.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(event = "BLOCK_WRITE_THRESHOLD", since = "2.3")]
pub struct BlockWriteThreshold {
    /// The name of the node.
    pub node_name: String,
    /// How far beyond, in bytes.
    pub amount_exceeded: u64,
    /// The threshold, in bytes.
    pub write_threshold: u64,
}
