//! The vhost-user-blk back-end: a virtio block device for a virtual machine of another process, `[vhost-user]` being QEMU's
//! <https://www.qemu.org/docs/master/interop/vhost-user.html> and `[virtio 1.2]` the OASIS standard.
//!
//! | module | noun |
//! | --- | --- |
//! | `wire` | the messages of the front-end, without I/O |
//! | `device` | what the front-end sets up |
//! | `export` | the socket, and one front-end after the other |
//!
//! Front-end and guest are hostile: neither the messages of the one nor the memory of the other can do more than end their
//! own connection. The device itself, with its rings and requests, is [`virtio_blk`](crate::virtio_blk).

mod device;
mod export;
mod wire;

#[cfg(any(test, fuzzing))]
pub mod fuzz;

pub use export::{VhostUserBlkDriver, VhostUserBlkExport};
