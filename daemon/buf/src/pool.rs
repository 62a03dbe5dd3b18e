//! Aligned heap memory, recycled per thread.
//!
//! Each thread keeps some free buffers of each size class: the classes are powers of two from a page to 4 MiB, larger
//! buffers come from and return to the allocator. A buffer that is freed on another thread stays there; as both ends of a
//! request are on one IOThread (law 4) the lists do not drift. Recycled memory keeps its old bytes: whoever allocates
//! for a peer fills all of it before it is shown to that peer.
//!
//! Large buffers are parts of blocks in huge pages, which are given back when none of their parts is left.

use crate::huge::{Block, HUGE_FROM, HUGE_PAGE};
use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::cell::RefCell;
use std::ptr::NonNull;
use std::sync::Arc;

/// The alignment of each buffer, in bytes: enough for O_DIRECT on any device in use.
pub const MAX_ALIGN: usize = 4096;

const MIN_CLASS: usize = MAX_ALIGN;
const MAX_CLASS: usize = 4 << 20;
const CLASSES: usize = MAX_CLASS.ilog2() as usize - MIN_CLASS.ilog2() as usize + 1;
/// What one thread may keep, in bytes: the eight requests of 2 MiB that a copying client has in flight, twice.
const KEEP_BYTES: usize = 32 << 20;

/// One aligned allocation.
pub(crate) struct PoolBuf {
    ptr: NonNull<u8>,
    layout: Layout,
    /// What it is a part of; else it is the allocator's.
    block: Option<Arc<Block>>,
}

// SAFETY: the memory belongs to the PoolBuf alone until it is dropped, and is only reached through raw copies.
unsafe impl Send for PoolBuf {}
// SAFETY: as above; a PoolBuf has no methods that touch the bytes.
unsafe impl Sync for PoolBuf {}

impl PoolBuf {
    pub(crate) fn ptr(&self) -> NonNull<u8> {
        self.ptr
    }

    fn new(len: usize) -> Self {
        let Ok(layout) = Layout::from_size_align(len, MAX_ALIGN) else {
            handle_alloc_error(Layout::new::<u8>());
        };
        if len >= HUGE_FROM && len.is_multiple_of(HUGE_FROM) {
            let Some((block, ptr)) = part(len) else { handle_alloc_error(layout) };
            return Self { ptr, layout, block: Some(block) };
        }
        // SAFETY: `len` is at least MIN_CLASS, so the layout is not of size zero.
        let Some(ptr) = NonNull::new(unsafe { alloc(layout) }) else { handle_alloc_error(layout) };
        // Fresh memory is zeroed once, so that not even a bug shows a peer what the allocator had there before.
        // SAFETY: the allocation has `len` bytes and nobody else knows it.
        unsafe { ptr.write_bytes(0, len) };
        Self { ptr, layout, block: None }
    }
}

impl Drop for PoolBuf {
    fn drop(&mut self) {
        if self.block.is_none() {
            // SAFETY: `ptr` came from `alloc` with this very layout and is freed once, here.
            unsafe { dealloc(self.ptr.as_ptr(), self.layout) };
        }
    }
}

/// `len` bytes, a multiple of [`HUGE_FROM`], of a block that nobody else has: of the one that the thread has begun, if they fit there.
fn part(len: usize) -> Option<(Arc<Block>, NonNull<u8>)> {
    let fresh = || Block::new(len.max(HUGE_PAGE));
    // A thread that ends has no lists any more: what is left of its block is then nobody's.
    let cut = FREE.try_with(|free| {
        let mut free = free.borrow_mut();
        let (block, used) = match free.begun.take() {
            Some((block, used)) if block.len() - used >= len => (block, used),
            _ => (fresh()?, 0),
        };
        let ptr = block.at(used)?;
        if used + len < block.len() {
            free.begun = Some((Arc::clone(&block), used + len));
        }
        Some((block, ptr))
    });
    cut.unwrap_or_else(|_| {
        let block = fresh()?;
        let ptr = block.at(0)?;
        Some((block, ptr))
    })
}

#[derive(Default)]
struct Free {
    classes: [Vec<Arc<PoolBuf>>; CLASSES],
    bytes: usize,
    /// A block of which parts are left, and where they begin.
    begun: Option<(Arc<Block>, usize)>,
}

thread_local! {
    static FREE: RefCell<Free> = RefCell::default();
}

/// Index of the class that holds `len` bytes, none if it is too large to be kept.
fn class_of(len: usize) -> Option<usize> {
    let size = len.max(MIN_CLASS).checked_next_power_of_two()?;
    (size <= MAX_CLASS).then(|| (size.ilog2() - MIN_CLASS.ilog2()) as usize)
}

/// A buffer of at least `len` bytes, from the thread's free list or the allocator.
pub(crate) fn take(len: usize) -> Arc<PoolBuf> {
    let Some(class) = class_of(len) else {
        return Arc::new(PoolBuf::new(len));
    };
    let kept = FREE.try_with(|free| {
        let mut free = free.borrow_mut();
        let found = free.classes.get_mut(class).and_then(Vec::pop);
        if found.is_some() {
            free.bytes -= MIN_CLASS << class;
        }
        found
    });
    match kept {
        Ok(Some(buf)) => buf,
        _ => Arc::new(PoolBuf::new(MIN_CLASS << class)),
    }
}

/// Keeps the buffer for the next [`take`] if this was its last owner and there is room for it.
pub(crate) fn give(mut buf: Arc<PoolBuf>) {
    if Arc::get_mut(&mut buf).is_none() {
        return;
    }
    let size = buf.layout.size();
    let Some(class) = class_of(size) else { return };
    // While the thread ends there is no list any more: the buffer is then simply freed.
    let _ = FREE.try_with(|free| {
        let Free { classes, bytes, .. } = &mut *free.borrow_mut();
        if let Some(list) = classes.get_mut(class)
            && *bytes + size <= KEEP_BYTES
        {
            list.push(buf);
            *bytes += size;
        }
    });
}

/// Bytes that the calling thread keeps for reuse, for statistics and tests.
pub fn pooled_bytes() -> usize {
    FREE.try_with(|free| free.borrow().bytes).unwrap_or(0)
}
