//! Which parts of a file hold data, and how to give space to it and take it back: SEEK_DATA, SEEK_HOLE, fallocate.

use crate::fd::Fd;
use crate::file::File;
use crate::pool;
use crate::ring::Request;
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use std::io;
use std::sync::Arc;

/// What fallocate(2) shall do with a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AllocMode {
    /// Give it space; bytes without any read as zeroes. The file grows to the end of the range if it is shorter.
    Allocate,
    /// As `Allocate`, the length stays.
    AllocateKeepSize,
    /// Take its space; it reads as zeroes. The length stays.
    PunchHole,
    /// It reads as zeroes, with its space kept or given where the file system can. The file grows as with `Allocate`.
    ZeroRange,
}

impl AllocMode {
    fn bits(self) -> i32 {
        match self {
            Self::Allocate => 0,
            Self::AllocateKeepSize => libc::FALLOC_FL_KEEP_SIZE,
            Self::PunchHole => libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
            Self::ZeroRange => libc::FALLOC_FL_ZERO_RANGE,
        }
    }
}

/// A run of bytes of one kind, as the file system sees it at the time of the call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Data up to this offset, which is beyond the one that was asked for.
    Data(u64),
    /// A hole up to this offset, which is beyond the one that was asked for.
    Hole(u64),
    /// The offset is at or after the end of the file.
    End,
    /// The file system cannot tell.
    Unknown,
}

impl File {
    /// fallocate(2) on a regular file or a block device.
    ///
    /// # Errors
    /// What the kernel says; `EOPNOTSUPP` where the file system cannot do it.
    pub async fn allocate(&self, mode: AllocMode, at: u64, len: u64) -> Result<(), Errno> {
        loop {
            match self.transfer(|| Request::Allocate(mode.bits(), at, len)).await {
                Err(Errno::EINTR) => continue,
                other => return other.map(drop),
            }
        }
    }

    /// What the file has at byte `at`: data or a hole, and up to where.
    ///
    /// Uses and moves the file position, which nothing else here depends on.
    ///
    /// # Errors
    /// The system has no thread for it. What the file system cannot answer is [`Extent::Unknown`], not an error.
    pub async fn extent_at(&self, at: u64) -> io::Result<Extent> {
        let fd = Arc::clone(&self.fd);
        pool::blocking(move || extent_at(&fd, at)).await
    }
}

fn extent_at(fd: &Fd, at: u64) -> Extent {
    let Ok(start) = i64::try_from(at) else { return Extent::End };
    let data = match lseek(fd, start, Whence::SeekData) {
        Ok(data) => data,
        // A hole up to the end, or nothing at all.
        Err(Errno::ENXIO) => {
            return match lseek(fd, 0, Whence::SeekEnd).map(u64::try_from) {
                Ok(Ok(end)) if end > at => Extent::Hole(end),
                Ok(Ok(_)) => Extent::End,
                _ => Extent::Unknown,
            };
        }
        Err(_) => return Extent::Unknown,
    };
    match u64::try_from(data) {
        Ok(data) if data > at => return Extent::Hole(data),
        Ok(data) if data == at => {}
        // Before the offset: the file system makes no sense.
        _ => return Extent::Unknown,
    }
    match lseek(fd, start, Whence::SeekHole).map(u64::try_from) {
        Ok(Ok(hole)) if hole > at => Extent::Data(hole),
        // The byte was punched or cut off between the two calls: whoever asks again learns more.
        _ => Extent::Unknown,
    }
}

pub(crate) fn fallocate(fd: &Fd, mode: i32, at: u64, len: u64) -> Result<(), Errno> {
    let at = libc::off_t::try_from(at).map_err(|_| Errno::EINVAL)?;
    let len = libc::off_t::try_from(len).map_err(|_| Errno::EINVAL)?;
    // SAFETY: takes no pointers; the descriptor is open.
    Errno::result(unsafe { libc::fallocate(fd.raw(), mode, at, len) }).map(drop)
}
