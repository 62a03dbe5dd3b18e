//! Reference-counted I/O buffers: a request owns its memory.
//!
//! An [`IoBuf`] names bytes that somebody else keeps alive: pooled heap memory, a guest's RAM, a FUSE or socket buffer.
//! It travels with the operation and every clone keeps the memory at its fixed address, so the kernel (or a guest) may
//! touch it until the last clone is gone, whatever happened to the future that started the operation.
//!
//! The bytes may change under us at any time (a guest writes to them, the kernel fills them), so nobody ever gets a
//! `&[u8]` into them: they are copied in, copied out, compared or handed to the kernel as raw segments. A value that a
//! decision depends on is copied out once and checked after the copy.
//!
//! What this crate must not do: I/O, blocking, knowledge of any protocol.
#![expect(unsafe_code, reason = "owns raw memory that the kernel or a guest shares")]

mod guest;
mod huge;
mod iobuf;
mod mapping;
mod pool;

pub use guest::{BadAddress, BadTable, Gather, GuestMemory, Region};
pub use huge::{HUGE_FROM, HUGE_PAGE};
pub use iobuf::{Backing, IoBuf, Segment, Segments};
pub use mapping::{Disposal, Mapping, Pages, Window, watch_faults};
pub use pool::{MAX_ALIGN, pooled_bytes};
