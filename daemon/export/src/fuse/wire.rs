//! Numbers of the protocol. `[FUSE]`
//!
//! The flags of INIT and OPEN are those of the crate `fuser`; it does not make the rest public.

/// The version of the protocol that replies are written in.
pub(crate) const MAJOR: u32 = 7;
/// The newest minor version of which something is used (`FUSE_OVER_IO_URING`).
pub(crate) const MINOR: u32 = 42;
/// The oldest one whose reply to INIT has the present layout (Linux 3.15).
pub(crate) const OLDEST_MINOR: u32 = 23;

/// Requests may come over io_uring; a flag of INIT.
pub(crate) const OVER_IO_URING: u64 = fuser::InitFlags::FUSE_OVER_IO_URING.bits();

/// The number of the only inode.
pub(crate) const ROOT: u64 = 1;

/// Bytes of the header of a request.
pub(crate) const IN_HEADER: usize = 40;
/// Bytes of the header of a reply.
pub(crate) const OUT_HEADER: usize = 16;
/// Bytes of the fixed part of a write, after which its data follow.
pub(crate) const WRITE_IN: usize = 40;
/// The most bytes of one read or write.
pub(crate) const MAX_TRANSFER: u32 = 1 << 20;

pub(crate) mod opcode {
    pub(crate) const LOOKUP: u32 = 1;
    pub(crate) const FORGET: u32 = 2;
    pub(crate) const GETATTR: u32 = 3;
    pub(crate) const SETATTR: u32 = 4;
    pub(crate) const OPEN: u32 = 14;
    pub(crate) const READ: u32 = 15;
    pub(crate) const WRITE: u32 = 16;
    pub(crate) const STATFS: u32 = 17;
    pub(crate) const RELEASE: u32 = 18;
    pub(crate) const FSYNC: u32 = 20;
    pub(crate) const FLUSH: u32 = 25;
    pub(crate) const INIT: u32 = 26;
    pub(crate) const DESTROY: u32 = 38;
    pub(crate) const BATCH_FORGET: u32 = 42;
    pub(crate) const FALLOCATE: u32 = 43;
    pub(crate) const LSEEK: u32 = 46;
}

/// Which attributes a SETATTR sets.
pub(crate) mod fattr {
    pub(crate) const MODE: u32 = 1 << 0;
    pub(crate) const UID: u32 = 1 << 1;
    pub(crate) const GID: u32 = 1 << 2;
    pub(crate) const SIZE: u32 = 1 << 3;
    /// Those that say how, not what: FH, LOCKOWNER, KILL_SUIDGID; and CTIME, which follows from every change.
    pub(crate) const MANNER: u32 = 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11;
}

/// The code of a notification, in the place of the error of a reply: the attributes of an inode have changed.
pub(crate) const NOTIFY_INVAL_INODE: i32 = 2;
