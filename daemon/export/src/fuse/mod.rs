//! FUSE exports: an image as a regular file, `[FUSE]` being `include/uapi/linux/fuse.h` of Linux, protocol 7.
//!
//! | module | noun |
//! | --- | --- |
//! | `wire` | the numbers of the protocol |
//! | `request` | what the kernel asks, without I/O |
//! | `reply` | what it is told, without I/O |
//! | `file` | the one file of an export: its attributes, and requests against the disk |
//! | `session` | the requests that one thread has in flight |
//! | `device`, `queues` | where they come from: `/dev/fuse`, or an io_uring |
//! | `transport` | which of the two it is |
//! | `export` | mounting, threads, the end |
//! | `mounts` | where the exports of a daemon are mounted |
//!
//! The file is the root of its file system; there are no names in it. Each thread of an export has a descriptor of its own
//! and serves what it reads from it, many requests at a time; where the kernel offers it, requests come over rings instead. The kernel's page cache is bypassed (`FOPEN_DIRECT_IO`), so that
//! the image has no second copy there that a resize or another export would have to keep true; shared mappings work
//! all the same, as far as the kernel can (`FUSE_DIRECT_IO_ALLOW_MMAP`).
//!
//! Who mounted the device may not be the kernel's FUSE at all as far as this code is concerned: what is read is checked before it is
//! used, and no request takes more memory than the limits in `session` and the entries of a ring say.

mod device;
mod export;
mod file;
mod mounts;
mod queues;
mod reply;
mod request;
mod session;
mod transport;
mod wire;

#[cfg(any(test, fuzzing))]
pub mod fuzz;

pub use export::{AllowOther, FuseDriver, FuseExport};
pub use mounts::Mounts;
