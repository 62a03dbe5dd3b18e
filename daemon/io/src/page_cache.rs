//! Whether the page cache has anything of a file: mincore(2) over a mapping that nobody can touch.

use crate::File;
use crate::pool;
use nix::errno::Errno;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::Arc;

/// Bytes that are looked at in one go: 128 MiB, which bounds the memory for the answer.
const WINDOW: u64 = 128 << 20;
/// The bit of a page that is in memory. `[mincore(2)]`
const RESIDENT: u8 = 1;

/// Pages of a file, mapped without permission to touch them.
struct Window {
    base: NonNull<libc::c_void>,
    len: usize,
}

impl Window {
    fn new(file: BorrowedFd<'_>, at: u64, len: u64) -> io::Result<Self> {
        let too_large = || io::Error::from(Errno::EFBIG);
        let (at, len) = (libc::off_t::try_from(at), usize::try_from(len));
        let (Ok(at), Ok(len)) = (at, len) else { return Err(too_large()) };
        let prot = libc::PROT_NONE;
        // SAFETY: a new mapping wherever the kernel likes; it touches no memory of ours.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, libc::MAP_SHARED, file.as_raw_fd(), at) };
        let base = if base == libc::MAP_FAILED { None } else { NonNull::new(base) };
        Ok(Self { base: base.ok_or_else(io::Error::last_os_error)?, len })
    }

    fn has_resident_pages(&self) -> io::Result<bool> {
        // SAFETY: sysconf takes a number.
        let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096);
        let mut pages = vec![0_u8; self.len.div_ceil(page)];
        // SAFETY: the range is mapped, and there is a byte for each of its pages.
        let failed = unsafe { libc::mincore(self.base.as_ptr(), self.len, pages.as_mut_ptr()) } != 0;
        if failed { Err(io::Error::last_os_error()) } else { Ok(pages.iter().any(|page| page & RESIDENT != 0)) }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: this owner made the mapping, and nobody has pointers into it.
        unsafe { libc::munmap(self.base.as_ptr(), self.len) };
    }
}

impl File {
    /// Whether the page cache has any of the file's first `len` bytes. The kernel says yes for every page of a file that this
    /// process neither owns nor may write.
    ///
    /// # Errors
    /// What mmap(2) and mincore(2) say.
    pub async fn is_cached(&self, len: u64) -> io::Result<bool> {
        let fd = Arc::clone(&self.fd);
        pool::blocking(move || {
            let mut at = 0;
            while at < len {
                let part = WINDOW.min(len - at);
                if Window::new(fd.as_fd(), at, part)?.has_resident_pages()? {
                    return Ok(true);
                }
                at += part;
            }
            Ok(false)
        })
        .await?
    }
}
