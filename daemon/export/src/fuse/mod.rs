//! FUSE exports: an image as a regular file, `[FUSE]` being `include/uapi/linux/fuse.h` of Linux, protocol 7.
//!
//! | module | noun |
//! | --- | --- |
//! | `wire` | the numbers of the protocol |
//! | `request` | what the kernel asks, without I/O |
//! | `reply` | what it is told, without I/O |
//! | `file` | the one file of an export: its attributes, and requests against the disk |
//! | `session` | the requests that one thread has in flight |
//! | `export` | mounting, threads, the end |
//! | `mounts` | where the exports of a daemon are mounted |
//!
//! The file is the root of its file system; there are no names in it. Each thread of an export has a descriptor of its own
//! and serves what it reads from it, many requests at a time. The kernel's page cache is bypassed (`FOPEN_DIRECT_IO`), so that
//! the image has no second copy there that a resize or another export would have to keep true; shared mappings work
//! all the same, as far as the kernel can (`FUSE_DIRECT_IO_ALLOW_MMAP`).
//!
//! Who mounted the device may not be the kernel's FUSE at all as far as this code is concerned: what is read is checked before it is
//! used, and no request takes more memory than the limits in `session` say.

mod export;
mod file;
mod mounts;
mod reply;
mod request;
mod session;
mod wire;

#[cfg(any(test, fuzzing))]
pub mod fuzz;

pub use export::{AllowOther, FuseDriver, FuseExport};
pub use mounts::Mounts;
