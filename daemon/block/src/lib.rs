//! The block graph: nodes, edges, permissions, and the path that every request takes.
//!
//! | module | noun |
//! | --- | --- |
//! | [`driver`] | what the author of a driver writes ([`Driver`]) and what the core asks ([`DynDriver`]) |
//! | [`node`] | [`Node`]: one driver in the graph, and the one place that checks, splits, aligns, emulates, serialises, counts |
//! | [`edge`] | [`Edge`]: parent → child, with role and permissions; replaced only while nothing is in flight |
//! | [`disk`] | [`Disk`]: what an export or a job holds: a root edge with a gate, statistics and a write-back setting |
//! | [`gate`] | [`gate::Gate`]: lets requests in and counts them; a drain closes it and waits for zero |
//! | [`overlap`] | serialises requests on overlapping bytes |
//! | [`perm`] | permissions, their combination and the texts of their conflicts |
//! | `halt` | requests that wait after an error instead of failing ([`OnError`]) |
//! | [`graph`] | [`Graph`]: the only writer: adds, deletes, resizes, attaches; plan, then drain, then commit |
//! | [`reopen`] | what a driver does about changes of its options and children |
//! | [`report`] | what drivers and exports report to the daemon, for the events of its clients |
//! | [`reservation`] | persistent reservations: what a medium, a manager and a filter do about them |
//! | [`resource`] | the objects that nodes can name |
//! | [`snapshot`] | snapshots inside an image |
//! | [`status`] | block status over a chain: what is data, what is zero, how deep it lies |
//! | [`stats`] | counters of nodes and disks |
//! | [`check`] | the facet of a format that can check its image |
//! | [`fault`] | the facet of a driver that fails on purpose |
//! | [`throttle`] | limits of throughput, shared by groups of nodes |
//! | [`join`] | several requests of one task at the same time |
//! | [`clock`] | the time, so that tests can move it |
//!
//! Two threads of control meet here. The *control task* owns [`Graph`] and is the only one that changes anything
//! structural. *Requests* run on the IOThread that issued them, read the structure through snapshots, and never wait for
//! the control task except at the gate of their [`Disk`].
//!
//! A request passes one gate, that of its disk, and no other: edges below are never gated, so a nested request cannot
//! wait for a drain that waits for its parent. To change an edge the control task closes the gates of all disks above it.
#![forbid(unsafe_code)]

pub mod check;
pub mod clock;
pub mod disk;
pub mod driver;
pub mod edge;
pub mod fault;
pub mod gate;
pub mod graph;
mod halt;
pub mod join;
pub mod node;
pub mod overlap;
pub mod perm;
pub mod reopen;
pub mod report;
pub mod reservation;
pub mod resource;
pub mod snapshot;
pub mod stats;
pub mod status;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod throttle;

pub use disk::Disk;
pub use driver::{Driver, DynDriver, Facts, ImageDetails, Mapping, Prealloc, Span, Support, WriteFlags, ZeroFlags};
pub use edge::{Edge, Role};
pub use graph::{CreateContext, Graph, OpenContext, Opener};
pub use halt::OnError;

pub use nix::errno::Errno;
pub use node::{Node, NodeOptions};
pub use perm::Perms;
pub use report::{Report, Reporter};

pub use qapi::types::block_filters::BlkdebugEvent;

/// Result of a request: the data path carries an errno and nothing else.
pub type IoResult<T = ()> = Result<T, Errno>;
