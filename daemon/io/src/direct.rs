//! What O_DIRECT asks of offsets, lengths and memory on a file.

use crate::fd::Fd;
use crate::file::File;
use crate::pool;
use buf::IoBuf;
use nix::errno::Errno;
use std::io;
use std::sync::Arc;

/// Alignments of direct I/O, in bytes; powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirectAlign {
    /// Offsets and lengths are multiples of this.
    pub offset: u32,
    /// Addresses of buffers are multiples of this.
    pub memory: u32,
}

/// What works everywhere in practice, where neither the kernel nor a trial tells.
const SAFE: DirectAlign = DirectAlign { offset: 4096, memory: 4096 };
const MAX_ALIGN: u32 = 4096;

impl File {
    /// Finds the alignments of direct I/O: what the kernel says, else by reading from the start of the file.
    ///
    /// For a file that is not opened with O_DIRECT both are 1.
    ///
    /// # Errors
    /// The file cannot be read at all.
    pub async fn direct_align(&self) -> io::Result<DirectAlign> {
        if !self.is_direct() {
            return Ok(DirectAlign { offset: 1, memory: 1 });
        }
        let fd = Arc::clone(&self.fd);
        Ok(pool::blocking(move || match told(&fd) {
            Some(align) => Ok(align),
            None => tried(&fd),
        })
        .await??)
    }
}

/// statx(STATX_DIOALIGN), Linux 6.1; file systems that do not implement it leave the mask bit off.
fn told(fd: &Fd) -> Option<DirectAlign> {
    // SAFETY: statx is a plain structure of integers, for which zeroes are a value.
    let mut stx: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is an empty C string, the result a structure of the right type.
    let result = unsafe { libc::statx(fd.raw(), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, &mut stx) };
    if result != 0 || stx.stx_mask & libc::STATX_DIOALIGN == 0 {
        return None;
    }
    let align = DirectAlign { offset: stx.stx_dio_offset_align, memory: stx.stx_dio_mem_align };
    let sane = |n: u32| n.is_power_of_two() && n <= MAX_ALIGN;
    // Zero says that direct I/O does not work; the file is open with it, so a trial knows better.
    (sane(align.offset) && sane(align.memory)).then_some(align)
}

/// Reads of growing size and alignment, until one is taken.
fn tried(fd: &Fd) -> nix::Result<DirectAlign> {
    let room = IoBuf::alloc(2 * MAX_ALIGN as usize);
    let Some(base) = room.segments().next() else { return Ok(SAFE) };
    let taken = |offset: u32, memory: u32| -> nix::Result<bool> {
        let start = memory as usize % MAX_ALIGN as usize;
        // SAFETY: `start` and `offset` are at most MAX_ALIGN each and the buffer has room for both.
        let result = unsafe { libc::pread(fd.raw(), base.ptr.as_ptr().add(start).cast(), offset as usize, 0) };
        match Errno::result(result) {
            Ok(_) => Ok(true),
            Err(Errno::EINVAL) => Ok(false),
            // What else goes wrong at the start of the file says nothing about alignment.
            Err(Errno::EIO) => Ok(true),
            Err(e) => Err(e),
        }
    };
    let steps = [1, 512, 1024, 2048, MAX_ALIGN];
    let mut found = SAFE;
    for offset in steps {
        if taken(offset, MAX_ALIGN)? {
            found.offset = offset;
            break;
        }
    }
    for memory in steps {
        // An address that is a multiple of `memory` and of nothing larger.
        if taken(found.offset, memory)? {
            found.memory = memory;
            break;
        }
    }
    // A single byte is no unit of any device: the file is empty, or the file system emulates. Either proves nothing.
    if found.offset == 1 {
        found.offset = SAFE.offset;
    }
    if found.memory == 1 {
        found.memory = SAFE.memory;
    }
    Ok(found)
}
