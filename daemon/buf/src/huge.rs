//! [`Block`]: memory in huge pages, of which large buffers are parts.
//!
//! What the kernel copies past the page tables of a process (requests of FUSE, direct I/O) it looks up page by page, which costs a
//! third of the copy with pages of 4 KiB. Where the system gives no huge pages a block is ordinary memory.

use std::ptr::NonNull;
use std::sync::Arc;

/// The size of huge pages where they are smallest, in bytes; elsewhere a block has none, or none of its own.
pub const HUGE_PAGE: usize = 2 << 20;
/// From this length on, in bytes, a buffer is worth huge pages.
pub const HUGE_FROM: usize = 512 << 10;

/// Zeroed memory that starts at a huge page.
pub(crate) struct Block {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: plain memory; the block has no method that touches it.
unsafe impl Send for Block {}
// SAFETY: as above.
unsafe impl Sync for Block {}

impl Block {
    /// `len` bytes, a multiple of the largest page size in use for mappings (64 KiB). None if there is no memory.
    pub(crate) fn new(len: usize) -> Option<Arc<Self>> {
        let mapped = len.checked_add(HUGE_PAGE)?;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping wherever the kernel likes; it touches no memory of ours.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), mapped, prot, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return None;
        }
        let start = start.cast::<u8>();
        let skip = start.align_offset(HUGE_PAGE).min(HUGE_PAGE);
        // SAFETY: `skip + len` is within the mapping.
        let (base, end) = unsafe { (start.add(skip), start.add(skip + len)) };
        for (edge, spare) in [(start, skip), (end, HUGE_PAGE - skip)] {
            if spare > 0 {
                // SAFETY: what lies in front of the block and behind it belongs to the new mapping, and nobody uses it.
                unsafe { libc::munmap(edge.cast(), spare) };
            }
        }
        // SAFETY: advice on the mapping just made, which changes no bytes. A kernel that does not take it goes on without.
        unsafe { libc::madvise(base.cast(), len, libc::MADV_HUGEPAGE) };
        NonNull::new(base).map(|base| Arc::new(Self { base, len }))
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The address of byte `at`, none outside.
    pub(crate) fn at(&self, at: usize) -> Option<NonNull<u8>> {
        // SAFETY: `at` is inside the block.
        (at < self.len).then(|| unsafe { self.base.add(at) })
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: this owner made the mapping, and all parts of it kept this alive.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}
