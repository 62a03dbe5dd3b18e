//! [`IoBuf`]: segments of memory, a window on them, and what keeps them alive.

use crate::pool::{self, PoolBuf};
use std::fmt;
use std::mem::ManuallyDrop;
use std::ptr::NonNull;
use std::sync::Arc;

/// Memory that an [`IoBuf`] can point into.
///
/// # Safety
/// While any clone of the `Arc` that holds the implementor lives, each segment that was given to
/// [`IoBuf::from_backing`] with it stays mapped, readable and writable at its address, and nobody holds a Rust
/// reference into it.
pub unsafe trait Backing: Send + Sync + 'static {}

/// One run of bytes at a fixed address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First byte.
    pub ptr: NonNull<u8>,
    /// Length in bytes.
    pub len: usize,
}

impl Segment {
    /// The part `[at, at + len)` of this segment; the caller has checked that it lies inside.
    fn part(self, at: usize, len: usize) -> Self {
        debug_assert!(at <= self.len && len <= self.len - at);
        // SAFETY: `at` is at most the length of the segment, which is one allocation or mapping.
        Self { ptr: unsafe { self.ptr.add(at) }, len }
    }
}

#[derive(Clone)]
enum Owner {
    Pool(Arc<PoolBuf>),
    Shared(#[expect(dead_code, reason = "held for its drop")] Arc<dyn Backing>),
}

#[derive(Clone)]
enum List {
    One(NonNull<u8>),
    /// All segments of the backing; the window starts `skip` bytes into them.
    Many {
        all: Arc<[Segment]>,
        skip: usize,
    },
}

/// A counted reference to bytes, contiguous or scattered; see the crate's documentation for the rules.
///
/// Cloning and slicing copy no bytes. All copies are bounded: a range that does not fit is cut to the bytes that exist
/// and the number of bytes done is returned.
pub struct IoBuf {
    owner: ManuallyDrop<Owner>,
    list: List,
    len: usize,
}

// SAFETY: an IoBuf only moves raw addresses about; its owner is Send + Sync and keeps them valid. The bytes themselves
// are shared memory by contract and only touched by raw copies.
unsafe impl Send for IoBuf {}
// SAFETY: as above.
unsafe impl Sync for IoBuf {}

impl Clone for IoBuf {
    fn clone(&self) -> Self {
        Self { owner: self.owner.clone(), list: self.list.clone(), len: self.len }
    }
}

impl Drop for IoBuf {
    fn drop(&mut self) {
        // SAFETY: the owner is taken once, here, and not used afterwards.
        if let Owner::Pool(buf) = unsafe { ManuallyDrop::take(&mut self.owner) } {
            pool::give(buf);
        }
    }
}

impl fmt::Debug for IoBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.segments()).finish()
    }
}

impl IoBuf {
    /// `len` bytes of pooled memory, aligned to [`MAX_ALIGN`](crate::MAX_ALIGN).
    ///
    /// The bytes are whatever the last user left there: fill all of them before a peer can see any.
    pub fn alloc(len: usize) -> Self {
        let buf = pool::take(len);
        let ptr = buf.ptr();
        Self { owner: ManuallyDrop::new(Owner::Pool(buf)), list: List::One(ptr), len }
    }

    /// `len` bytes of zeroes in pooled memory.
    pub fn zeroed(len: usize) -> Self {
        let buf = Self::alloc(len);
        buf.fill(0);
        buf
    }

    /// A pooled copy of `bytes`.
    pub fn copy_of(bytes: &[u8]) -> Self {
        let buf = Self::alloc(bytes.len());
        buf.write_at(0, bytes);
        buf
    }

    /// A buffer over memory that `backing` keeps alive.
    ///
    /// # Safety
    /// The segments lie in memory for which `backing` makes the promise of [`Backing`].
    pub unsafe fn from_backing(backing: Arc<dyn Backing>, segments: &[Segment]) -> Self {
        let len = segments.iter().map(|s| s.len).sum();
        let list = match segments {
            [one] => List::One(one.ptr),
            many => List::Many { all: many.into(), skip: 0 },
        };
        Self { owner: ManuallyDrop::new(Owner::Shared(backing)), list, len }
    }

    /// Length of the window in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the window holds no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The segments in order. Their addresses are valid while this buffer or a clone of it lives.
    pub fn segments(&self) -> Segments<'_> {
        match &self.list {
            List::One(ptr) => Segments { one: Some(Segment { ptr: *ptr, len: self.len }), rest: &[], skip: 0, left: 0 },
            List::Many { all, skip } => Segments { one: None, rest: all, skip: *skip, left: self.len },
        }
    }

    /// Whether each segment starts at a multiple of `addr` bytes in memory and is a multiple of `len` bytes long, as O_DIRECT
    /// asks. Both are powers of two.
    pub fn is_aligned(&self, addr: usize, len: usize) -> bool {
        let (addr, len) = (addr.wrapping_sub(1), len.wrapping_sub(1));
        self.segments().all(|s| s.ptr.as_ptr().addr() & addr == 0 && s.len & len == 0)
    }

    /// The bytes from `at`, at most `len` of them, as a buffer of their own.
    #[must_use]
    pub fn slice(&self, at: usize, len: usize) -> Self {
        let at = at.min(self.len);
        let len = len.min(self.len - at);
        let list = match &self.list {
            List::One(ptr) => List::One(Segment { ptr: *ptr, len: self.len }.part(at, len).ptr),
            List::Many { all, skip } => List::Many { all: Arc::clone(all), skip: skip + at },
        };
        Self { owner: self.owner.clone(), list, len }
    }

    /// Shortens the window to its first `len` bytes.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Copies from offset `at` into `out`; returns the bytes copied.
    pub fn read_at(&self, at: usize, out: &mut [u8]) -> usize {
        let mut done = 0;
        for s in self.window(at, out.len()) {
            // SAFETY: the segment is valid for its length, `out` has room (the window is no longer than it), and a
            // unique Rust slice does not overlap memory that nobody may borrow.
            unsafe { s.ptr.as_ptr().copy_to_nonoverlapping(out.as_mut_ptr().add(done), s.len) };
            done += s.len;
        }
        done
    }

    /// Copies `bytes` to offset `at`; returns the bytes copied.
    pub fn write_at(&self, at: usize, bytes: &[u8]) -> usize {
        let mut done = 0;
        for s in self.window(at, bytes.len()) {
            // SAFETY: as in read_at, the other way round.
            unsafe { s.ptr.as_ptr().copy_from_nonoverlapping(bytes.as_ptr().add(done), s.len) };
            done += s.len;
        }
        done
    }

    /// Copies the bytes of `from` to offset `at`; returns the bytes copied.
    ///
    /// Both may be windows on the same memory, as long as a run of one does not overlap a different run of the other.
    pub fn copy_from(&self, at: usize, from: &IoBuf) -> usize {
        let mut done = 0;
        for s in from.segments() {
            let mut taken = 0;
            for d in self.window(at + done, s.len) {
                // SAFETY: both runs are valid for `d.len` bytes; `copy_to` allows overlap.
                unsafe { s.ptr.as_ptr().add(taken).copy_to(d.ptr.as_ptr(), d.len) };
                taken += d.len;
            }
            done += taken;
            if taken < s.len {
                break;
            }
        }
        done
    }

    /// Sets each byte to `byte`.
    pub fn fill(&self, byte: u8) {
        for s in self.segments() {
            // SAFETY: the segment is valid for writes of its length.
            unsafe { s.ptr.as_ptr().write_bytes(byte, s.len) };
        }
    }

    /// Whether each byte is zero at the time it is looked at. Stops at the first that is not.
    pub fn is_zero(&self) -> bool {
        const WORD: usize = size_of::<u64>();
        self.segments().all(|s| {
            let base = s.ptr.as_ptr();
            let mut at = 0;
            while at + 4 * WORD <= s.len {
                let mut any = 0u64;
                for i in 0..4 {
                    // SAFETY: `at + 4 * WORD` is within the segment; the read may be unaligned.
                    any |= unsafe { base.add(at + i * WORD).cast::<u64>().read_unaligned() };
                }
                if any != 0 {
                    return false;
                }
                at += 4 * WORD;
            }
            // SAFETY: `i` is below the segment's length.
            (at..s.len).all(|i| unsafe { base.add(i).read() } == 0)
        })
    }

    /// A copy of all bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut out = vec![0; self.len];
        self.read_at(0, &mut out);
        out
    }

    fn window(&self, at: usize, len: usize) -> Segments<'_> {
        let at = at.min(self.len);
        let len = len.min(self.len - at);
        match &self.list {
            List::One(ptr) => {
                let one = Segment { ptr: *ptr, len: self.len }.part(at, len);
                Segments { one: Some(one), rest: &[], skip: 0, left: 0 }
            }
            List::Many { all, skip } => Segments { one: None, rest: all, skip: skip + at, left: len },
        }
    }
}

/// Iterator over the segments of an [`IoBuf`]; none of them is empty.
#[derive(Debug)]
pub struct Segments<'a> {
    one: Option<Segment>,
    rest: &'a [Segment],
    skip: usize,
    left: usize,
}

impl Iterator for Segments<'_> {
    type Item = Segment;

    fn next(&mut self) -> Option<Segment> {
        if let Some(one) = self.one.take() {
            return (one.len > 0).then_some(one);
        }
        while self.left > 0 {
            let (first, rest) = self.rest.split_first()?;
            self.rest = rest;
            if self.skip >= first.len {
                self.skip -= first.len;
                continue;
            }
            let len = (first.len - self.skip).min(self.left);
            let part = first.part(self.skip, len);
            self.skip = 0;
            self.left -= len;
            return Some(part);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    struct Heap(NonNull<u8>, usize);
    // SAFETY: the test touches the block through IoBufs only.
    unsafe impl Send for Heap {}
    // SAFETY: as above.
    unsafe impl Sync for Heap {}
    // SAFETY: the block is leaked from a Box and freed when the last clone goes.
    unsafe impl Backing for Heap {}
    impl Drop for Heap {
        fn drop(&mut self) {
            // SAFETY: made by Box::leak in `scattered` with this length.
            drop(unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(self.0.as_ptr(), self.1)) });
        }
    }

    /// A buffer whose segments have the given lengths, with a gap of three bytes after each.
    fn scattered(lens: &[usize]) -> IoBuf {
        let total = lens.iter().map(|l| l + 3).sum::<usize>().max(1);
        let block = Box::leak(vec![0xEEu8; total].into_boxed_slice());
        let base = NonNull::from(&mut block[0]);
        let mut at = 0;
        let mut segs = Vec::new();
        for &len in lens {
            // SAFETY: `at` stays within the block.
            segs.push(Segment { ptr: unsafe { base.add(at) }, len });
            at += len + 3;
        }
        // SAFETY: Heap frees the block when the last clone is gone.
        unsafe { IoBuf::from_backing(Arc::new(Heap(base, total)), &segs) }
    }

    #[test]
    fn pooled_memory_is_aligned_and_comes_back() {
        let buf = IoBuf::alloc(4096);
        assert!(buf.is_aligned(4096, 4096));
        let at = buf.segments().next().map(|s| s.ptr);
        let part = buf.slice(512, 1024);
        drop(buf);
        assert_ne!(IoBuf::alloc(4096).segments().next().map(|s| s.ptr), at, "still owned by the slice");
        drop(part);
        assert_eq!(IoBuf::alloc(4096).segments().next().map(|s| s.ptr), at, "the last owner gives it back");
    }

    #[test]
    fn large_buffers_are_parts_of_one_block_and_apart() {
        let sizes = [512 << 10, 1 << 20, 300 << 10, 512 << 10, 1 << 20, 2 << 20, 3 << 20, 6 << 20, 5_000_000];
        let bufs: Vec<_> = sizes.iter().map(|size| IoBuf::alloc(*size)).collect();
        for (byte, buf) in (1..).zip(&bufs) {
            assert!(buf.is_aligned(4096, 1) && buf.is_zero(), "nobody had it before");
            buf.fill(byte);
        }
        for (byte, buf) in (1..).zip(&bufs) {
            assert!(buf.to_vec().iter().all(|found| *found == byte), "{} bytes", buf.len());
        }
        let kept = bufs.first().map(|buf| buf.slice(0, 4096));
        std::thread::spawn(move || drop(bufs)).join().unwrap();
        assert!(kept.unwrap().to_vec().iter().all(|found| *found == 1), "the block stays as long as a part of it");
    }

    #[test]
    fn the_pool_is_bounded() {
        let many: Vec<_> = (0..40).map(|_| IoBuf::alloc(1 << 20)).collect();
        drop(many);
        assert_eq!(pool::pooled_bytes(), 32 << 20);
        drop(IoBuf::alloc(64 << 20));
        assert!(pool::pooled_bytes() <= 32 << 20, "large buffers are not kept");
    }

    proptest! {
        /// Every operation on a scattered buffer equals the same on a flat vector.
        #[test]
        fn behaves_like_a_flat_vector(
            lens in prop::collection::vec(0usize..40, 0..6),
            cut in (0usize..200, 0usize..200),
            put in (0usize..200, prop::collection::vec(any::<u8>(), 0..60)),
        ) {
            let buf = scattered(&lens);
            let mut model = vec![0u8; buf.len()];
            buf.fill(0);
            prop_assert!(buf.is_zero());
            let n = buf.write_at(put.0, &put.1);
            let at = put.0.min(model.len());
            prop_assert_eq!(n, put.1.len().min(model.len() - at));
            model[at..at + n].copy_from_slice(&put.1[..n]);
            prop_assert_eq!(buf.to_vec(), model.clone());
            prop_assert_eq!(buf.is_zero(), model.iter().all(|b| *b == 0));

            let part = buf.slice(cut.0, cut.1);
            let start = cut.0.min(model.len());
            let end = (start + cut.1).min(model.len());
            prop_assert_eq!(part.to_vec(), &model[start..end]);

            let copy = scattered(&[7, 0, 50, 200]);
            copy.fill(1);
            prop_assert_eq!(copy.copy_from(5, &part), part.len());
            prop_assert_eq!(&copy.to_vec()[5..5 + part.len()], &model[start..end]);
        }
    }
}
