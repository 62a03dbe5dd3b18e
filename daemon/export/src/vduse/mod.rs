//! VDUSE exports: a virtio block device on the vDPA bus of this machine's kernel, `[VDUSE]` being `linux/vduse.h` and
//! Documentation/userspace-api/vduse.rst of Linux. The kernel's own driver makes a disk of it (virtio_vdpa), or a virtual
//! machine gets it (vhost_vdpa).
//!
//! | module | noun |
//! | --- | --- |
//! | `message` | what the kernel says and is answered, without I/O |
//! | `memory` | the device's address space |
//! | `record` | requests in flight, for the process that takes over |
//! | `device` | the device while it is served |
//! | `export` | its beginning and its end |
//!
//! The device itself, with its rings and requests, is [`virtio_blk`](crate::virtio_blk). The kernel is trusted, the driver is
//! not: behind vhost_vdpa it is a guest's. Nobody but this process serves the device while it has it open; the
//! kernel keeps the device, and its driver waits, when the process goes.

mod device;
mod export;
mod memory;
mod message;
mod record;

#[cfg(test)]
mod tests;

pub use export::{VduseBlkDriver, VduseBlkExport};
