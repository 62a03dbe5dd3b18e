//! Exports of block nodes: ways in which other programs use them. Today NBD.
//!
//! An export holds a [`block::Disk`], which the control task attached for it and detaches when the export has closed. What
//! this crate must not do: change the graph, or know QMP commands.
#![forbid(unsafe_code)]

pub mod nbd;

use block::Disk;
use std::pin::Pin;

/// Resolves when an export is closed; needs not the export to live.
pub type Closed = Pin<Box<dyn Future<Output = ()> + Send>>;

/// What the control task knows of an export of any kind.
pub trait Export: Send + Sync {
    /// By which it is removed.
    fn id(&self) -> &str;
    /// The name of its kind in QAPI: `nbd`.
    fn kind(&self) -> &'static str;
    /// What is exported; its statistics are the export's.
    fn disk(&self) -> &Disk;
    /// Clients that use it now; `block-export-del` in safe mode refuses unless there is none.
    fn clients(&self) -> usize;
    /// Whether a shutdown was requested.
    fn is_shutting_down(&self) -> bool;
    /// Takes no more clients and sends those that are there away. Requests that were started are completed and replied to.
    fn request_shutdown(&self);
    /// Waits for a shutdown to be requested, by whomever, and then until no client is left and no request is in flight.
    fn closed(&self) -> Closed;
}
