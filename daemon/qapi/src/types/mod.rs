//! The types, commands and events of the daemon, one file for each area of the interface.
//!
//! A member stands here when the daemon implements it, and not before: `query-qmp-schema` is made from these types, and
//! clients take what it lists for granted. Names are QAPI's; where a newer QEMU has a member that the compatibility level
//! lacks, `since` says so.

pub mod block;
pub mod block_check;
pub mod block_event;
pub mod block_filters;
pub mod block_query;
pub mod chardev;
pub mod control;
pub mod create;
pub mod descriptors;
pub mod export;
pub mod fault;
pub mod introspect;
pub mod job;
pub mod qom;
pub mod reservation;
pub mod snapshot;
pub mod sockets;
pub mod throttle;
