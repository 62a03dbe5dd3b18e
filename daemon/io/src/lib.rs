//! IOThreads, file engines, image locks, sockets for the hot path.
//!
//! - [`IoThread`]: an OS thread with one event loop, one io_uring and a bounded pool for calls that block.
//! - [`File`]: reads and writes of whole buffers at offsets, on the ring of the calling thread or on its pool.
//! - [`ImageLock`]: the lock bytes that keep two programs from writing to one image.
//! - [`FuseDevice`], [`FuseRing`], [`fuse_mount`]: the kernel's requests to a file system, and how to get some.
//! - [`VduseControl`], [`VduseDevice`]: virtio devices of the kernel that this process serves.
//! - [`Stream`], [`Listener`]: sockets that receive into and send from [`buf::IoBuf`]s.
//!
//! An operation owns its memory and its descriptor until the kernel is done with them, whatever happens to the future that
//! waits for it. All public functions are safe. What this crate must not do: know block nodes, formats or protocols.
#![expect(unsafe_code, reason = "system calls and the ring take raw pointers")]

mod blkdev;
mod channel;
mod create;
mod direct;
mod doorbell;
mod extent;
mod fd;
pub mod fdset;
mod file;
mod foreign;
mod fuse_device;
pub mod fuse_mount;
mod fuse_ring;
pub mod keyring;
mod lock;
mod messages;
pub mod mounter;
mod page_cache;
pub mod parport;
mod polling;
mod pool;
pub mod process;
mod reservation;
mod ring;
mod send_queue;
pub mod socket;
mod stream;
mod thread;
pub mod threads;
mod vduse;
mod writer;

pub use blkdev::{BlockDevice, QueueLimits};
pub use channel::{Channel, MAX_PASSED};
pub use direct::DirectAlign;
pub use doorbell::{Bell, Doorbell};
pub use extent::{AllocMode, Extent};
pub use fdset::{FdSetUse, FdSets};
pub use file::{Access, Engine, File, FileKind, FileStat, OpenHow};
pub use foreign::{Foreign, Lane, dispose};
pub use fuse_device::FuseDevice;
pub use fuse_ring::{FUSE_FIXED, FUSE_HEADER, Fetched, FuseQueues, FuseRing};
pub use lock::{ImageLock, LockError, LockMode, LockSet, Locking};
pub use messages::MessageSocket;
pub use polling::{Look, Polling, Watched, is_polling, is_polling_for_queues, look_around};
pub use pool::{blocking, detach};
pub use send_queue::SendQueue;
pub use stream::{Listener, Stream};
pub use thread::{IoThread, Params, RingUse, Stopped, run_main};
pub use vduse::{VDUSE_MESSAGE, VduseControl, VduseDevice, VduseNew, VduseQueue, VduseRegion, vduse_is_attached};
