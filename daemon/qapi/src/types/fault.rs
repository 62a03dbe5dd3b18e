//! The fault node: a driver of this project's own for tests of durability, and the commands that steer it. All unstable.

use crate::Qapi;
use crate::types::block::BlockdevRef;
use crate::types::block_filters::BlkdebugIOType;

/// What a rule of the fault node does to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Qapi)]
pub enum XFaultAction {
    /// It waits until it is released, then goes on.
    Hold,
    /// It waits for a time, then goes on.
    Delay,
    /// It fails and changes nothing.
    Fail,
    /// It fails, and a part of its data has been written: the first bytes.
    Tear,
}

/// A rule of the fault node. The first one that fits decides.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct XFaultRule {
    /// What happens to the request.
    pub action: XFaultAction,
    /// The kind of requests; all when left out. Discards do not reach the node.
    pub iotype: Option<BlkdebugIOType>,
    /// The start of the range that a request must touch, in bytes; flushes touch every range.
    #[qapi(default)]
    pub offset: u64,
    /// The length of the range in bytes; up to the end when left out.
    pub length: Option<u64>,
    /// Let so many requests that fit pass before the first.
    #[qapi(default)]
    pub skip: u64,
    /// Only so many requests; all when left out.
    pub count: Option<u64>,
    /// What `fail` and `tear` fail with, as a number of errno.
    #[qapi(default = 5)]
    pub errno: i32,
    /// Nanoseconds that `delay` waits.
    #[qapi(default)]
    pub delay_ns: u64,
    /// Bytes that `tear` writes, rounded down to 512.
    #[qapi(default)]
    pub torn_bytes: u64,
}

/// A node whose writes are volatile until they are flushed: nothing else reaches the node below. A kill of the daemon is a
/// loss of power, and so is `x-fault-crash`, which also keeps a part of the volatile data.
#[derive(Debug, Clone, PartialEq, Qapi)]
pub struct BlockdevOptionsXFault {
    /// The durable node below.
    pub file: BlockdevRef,
    /// Rules that hold, delay, fail or tear requests.
    pub rules: Option<Vec<XFaultRule>>,
}

/// What of the volatile data a loss of power keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Qapi)]
pub enum XFaultKeep {
    /// Nothing.
    None,
    /// A part, by chance, in any order.
    Random,
    /// All of it.
    All,
}

/// Replaces the rules of a fault node. Requests that are held stay so.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "x-fault-set-rules", unstable)]
pub struct XFaultSetRules {
    /// The name of the node.
    pub node_name: String,
    /// The new rules.
    pub rules: Vec<XFaultRule>,
}

/// Lets the requests go on that a fault node holds.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "x-fault-release", returns = "XFaultInfo", unstable)]
pub struct XFaultRelease {
    /// The name of the node.
    pub node_name: String,
}

/// Loses power: of the volatile data some reach the node below, the rest are lost. From then on requests fail with EIO, also
/// those that are held, until `x-fault-restart`.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "x-fault-crash", returns = "XFaultInfo", unstable)]
pub struct XFaultCrash {
    /// The name of the node.
    pub node_name: String,
    /// What of the volatile data is kept.
    #[qapi(default = XFaultKeep::None)]
    pub keep: XFaultKeep,
    /// Decides what `random` keeps: the same number and the same writes give the same image.
    #[qapi(default)]
    pub seed: u64,
    /// Bytes that are kept or lost together: a multiple of 512.
    #[qapi(default = 512)]
    pub atomic_size: u32,
}

/// Power comes back: requests find the durable data.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "x-fault-restart", unstable)]
pub struct XFaultRestart {
    /// The name of the node.
    pub node_name: String,
}

/// Tells what a fault node holds.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "x-query-fault", returns = "XFaultInfo", unstable)]
pub struct XQueryFault {
    /// The name of the node.
    pub node_name: String,
}

/// What a fault node holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Qapi)]
pub struct XFaultInfo {
    /// Requests that are held.
    pub held: u64,
    /// Bytes written and not flushed.
    pub volatile_bytes: u64,
    /// Power is lost.
    pub crashed: bool,
}
