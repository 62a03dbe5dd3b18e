//! Exports of block nodes: ways in which other programs use them.
//!
//! | module | kind |
//! | --- | --- |
//! | [`nbd`] | NBD clients, over sockets |
//! | [`vhost_user_blk`] | virtual machines, through their memory |
//! | [`vduse`] | this machine's kernel, as a disk |
//! | [`fuse`] | a regular file |
//!
//! The control task makes an export in three steps: the [`ExportDriver`] of its kind says what it needs of the node, the
//! control task attaches a [`block::Disk`] with that, and the driver starts the export on it. It ends in two: it is asked to
//! shut down, and when its last client has gone the control task takes the disk back. What this crate must not do: change
//! the graph, or know QMP commands.
#![forbid(unsafe_code)]

pub mod fuse;
mod lifetime;
pub mod nbd;
mod patience;
mod slots;
pub mod vduse;
pub mod vhost_user_blk;
pub mod virtio_blk;

use block::driver::LocalFuture;
use block::perm::Bits;
use block::{Disk, IoResult, Perms};
use io::IoThread;
use lifetime::Lifetime;
use qapi::Result;
use std::pin::Pin;
use std::sync::Arc;

/// Resolves when an export is closed; needs not the export to live.
pub type Closed = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Resolves when the control task has set the length of a node, or could not.
pub type Resized = Pin<Box<dyn Future<Output = IoResult> + Send>>;

/// How an export asks for another length of its node: the control task does it, for all who use the node.
pub trait Resize: Send + Sync {
    /// Sets the length, in bytes. With `grow_only` a node that is as long already stays as it is.
    ///
    /// Resolves with the errno of the node. Must not be awaited by a request that is inside a [`Disk`], as that is drained,
    /// nor by what an export waits for before it says that it has closed.
    fn resize(&self, size: u64, grow_only: bool) -> Resized;
}

/// What an export of any kind is started with.
pub struct ExportParams {
    /// By which it is removed.
    pub id: String,
    /// Clients may write.
    pub writable: bool,
    /// What is exported. Write-through is a property of the disk.
    pub disk: Disk,
    /// The threads that the user named for it, in order and perhaps none.
    pub threads: Vec<Arc<IoThread>>,
    /// How to ask for another length.
    pub resize: Arc<dyn Resize>,
}

impl ExportParams {
    /// The threads to serve on, at least one: those that the user named, else that of the caller.
    ///
    /// # Errors
    /// The caller is no IOThread.
    pub fn serving_threads(&self) -> Result<Vec<Arc<IoThread>>> {
        if !self.threads.is_empty() {
            return Ok(self.threads.clone());
        }
        let main = IoThread::current().ok_or_else(|| qapi::Error::generic("no event loop runs on this thread"))?;
        Ok(vec![main])
    }
}

/// What the disk of an export needs and shares, unless its kind needs more. Everything is shared: several exports and jobs may
/// use one node, and it may be resized under its clients.
pub fn permissions(writable: bool) -> Perms {
    let need = if writable { Bits::CONSISTENT_READ | Bits::WRITE } else { Bits::CONSISTENT_READ };
    Perms { need, shared: Bits::ALL }
}

/// One kind of export, with the options of one to be started. Runs on the control task, which awaits it: it must neither
/// block nor wait for a client.
pub trait ExportDriver {
    /// What the disk of the export needs and shares.
    fn permissions(&self, writable: bool) -> Perms {
        permissions(writable)
    }

    /// Whether a client stays when this process dies, and goes on with the next one as if nothing had happened, see
    /// [`Graph::outlive`](block::Graph::outlive).
    fn is_outlived(&self) -> bool {
        false
    }

    /// Starts the export. After an error nothing is left of it.
    fn start<'a>(&'a self, params: ExportParams) -> LocalFuture<'a, Result<Arc<dyn Export>>>;
}

/// How requests reach an export, where there is more than one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// They are read from a device of the kernel.
    Device,
    /// The kernel sends them over an io_uring.
    IoUring,
}

/// What the control task knows of an export of any kind.
pub trait Export: Send + Sync {
    /// By which it is removed.
    fn id(&self) -> &str;
    /// The name of its kind in QAPI: `nbd`.
    fn kind(&self) -> &'static str;
    /// What is exported; its statistics are the export's.
    fn disk(&self) -> &Disk;
    /// How its requests come; none where there is only one way.
    fn transport(&self) -> Option<Transport> {
        None
    }
    /// Clients that use it now; `block-export-del` in safe mode refuses unless there is none.
    fn clients(&self) -> usize;
    /// Its end, and who is inside until then.
    fn lifetime(&self) -> &Lifetime;
    /// Whether a shutdown was requested.
    fn is_shutting_down(&self) -> bool {
        self.lifetime().is_ending()
    }
    /// Takes no more clients and sends those that are there away. Requests that were started are completed and replied to.
    fn request_shutdown(&self) {
        self.lifetime().end();
    }
    /// Waits for a shutdown to be requested, by whomever, and then until no client is left and no request is in flight.
    fn closed(&self) -> Closed {
        self.lifetime().ended()
    }
}
