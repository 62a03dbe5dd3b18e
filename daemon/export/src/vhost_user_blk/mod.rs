//! The vhost-user-blk back-end: a virtio block device for a virtual machine of another process, `[vhost-user]` being QEMU's
//! <https://www.qemu.org/docs/master/interop/vhost-user.html> and `[virtio 1.2]` the OASIS standard.
//!
//! | module | noun |
//! | --- | --- |
//! | `wire` | the messages of the front-end, without I/O |
//! | `config` | features and configuration space |
//! | `ring` | a virtqueue in the guest's memory |
//! | `request` | one request against the disk |
//! | `inflight`, `log` | what others read: requests in flight, pages that were written to |
//! | `queue` | a running ring |
//! | `vring`, `device` | what the front-end sets up |
//! | `export` | the socket, and one front-end after the other |
//!
//! Front-end and guest are hostile: neither the messages of the one nor the memory of the other can do more than end their
//! own connection. Guest memory is reached through [`buf::GuestMemory`] only, by checked copies and single loads; this
//! crate has no unsafe code. Data goes between the guest's memory and the file without a copy.

mod config;
mod device;
mod export;
mod inflight;
mod log;
mod queue;
mod request;
mod ring;
mod vring;
mod wire;

#[cfg(any(test, fuzzing))]
pub mod fuzz;

pub use export::{VhostUserBlkDriver, VhostUserBlkExport};
