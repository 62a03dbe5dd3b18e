//! Options of the drivers that stand above other nodes and add behaviour.

use crate::Qapi;
use crate::types::block::BlockdevRef;

/// Limits the throughput of a node.
#[derive(Debug, Clone, PartialEq, Qapi)]
pub struct BlockdevOptionsThrottle {
    /// The name of the object with the limits. All nodes that name the same one share them.
    pub throttle_group: String,
    /// The node whose throughput is limited.
    pub file: BlockdevRef,
}
