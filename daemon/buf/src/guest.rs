//! [`GuestMemory`]: the address space of a guest, pieced together from files that its virtual machine monitor shares.
//!
//! A table never changes: when the guest's memory does, a new one is made, which shares the mappings that stayed. Buffers
//! keep the table that they were made from, so no memory goes away under a request.

use crate::iobuf::{Backing, IoBuf, Segment};
use crate::mapping::{Mapping, Window};
use std::fmt;
use std::sync::Arc;

/// A run of guest memory that one file holds.
#[derive(Clone, Debug)]
pub struct Region {
    /// The guest's address of the first byte.
    pub guest: u64,
    /// The monitor's own address of the first byte, by which it names the rings.
    pub monitor: u64,
    /// The bytes; their number is the length of the region.
    pub map: Arc<Mapping>,
}

impl Region {
    fn len(&self) -> u64 {
        u64::try_from(self.map.len()).unwrap_or(u64::MAX)
    }

    fn guest_end(&self) -> Option<u64> {
        self.guest.checked_add(self.len())
    }
}

/// Why regions make no address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadTable(&'static str);

impl fmt::Display for BadTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for BadTable {}

/// An address that is none of the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadAddress;

/// See the module.
#[derive(Debug, Default)]
pub struct GuestMemory {
    /// By guest address; no two overlap.
    regions: Vec<Region>,
}

// SAFETY: the mappings of the regions make the same promise and live as long as this, which never changes.
unsafe impl Backing for GuestMemory {}

impl GuestMemory {
    /// The address space that `regions` make, in any order.
    ///
    /// # Errors
    /// Two of them overlap, or one reaches beyond the end of the addresses.
    pub fn new(mut regions: Vec<Region>) -> Result<Self, BadTable> {
        regions.sort_by_key(|region| region.guest);
        let mut end = 0;
        for region in &regions {
            if region.guest < end {
                return Err(BadTable("memory regions overlap"));
            }
            end = region.guest_end().ok_or(BadTable("a memory region ends beyond all addresses"))?;
            region.monitor.checked_add(region.len()).ok_or(BadTable("a memory region ends beyond all addresses"))?;
        }
        Ok(Self { regions })
    }

    /// The regions by guest address.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Whether the other side took memory away that it had shared, see [`Mapping::is_torn`].
    pub fn is_torn(&self) -> bool {
        self.regions.iter().any(|region| region.map.is_torn())
    }

    fn find(&self, guest: u64) -> Option<&Region> {
        let after = self.regions.partition_point(|region| region.guest <= guest);
        let region = self.regions.get(after.checked_sub(1)?)?;
        (guest - region.guest < region.len()).then_some(region)
    }

    /// `len` bytes at the monitor's address, which have to lie in one region, and their guest address.
    pub fn window_of_monitor(&self, monitor: u64, len: usize) -> Option<(Window, u64)> {
        self.regions.iter().find_map(|region| {
            let at = monitor.checked_sub(region.monitor)?;
            let window = region.map.window(usize::try_from(at).ok()?, len)?;
            Some((window, region.guest.checked_add(at)?))
        })
    }

    /// Copies from the guest's address into `out`.
    ///
    /// # Errors
    /// Not all of it is memory; `out` may be partly filled then.
    pub fn read(&self, guest: u64, out: &mut [u8]) -> Result<(), BadAddress> {
        let mut done = 0;
        while done < out.len() {
            let at = guest.checked_add(u64::try_from(done).map_err(|_| BadAddress)?).ok_or(BadAddress)?;
            let (part, _) = self.part(at, out.len() - done)?;
            let rest = out.get_mut(done..done + part.len).ok_or(BadAddress)?;
            // SAFETY: the part is mapped while `self` lives; a unique slice does not overlap memory that nobody may borrow.
            unsafe { part.ptr.as_ptr().copy_to_nonoverlapping(rest.as_mut_ptr(), part.len) };
            done += part.len;
        }
        Ok(())
    }

    /// The bytes at `guest` up to the end of their region, at most `len`; and whether the region starts there.
    fn part(&self, guest: u64, len: usize) -> Result<(Segment, bool), BadAddress> {
        let region = self.find(guest).ok_or(BadAddress)?;
        let at = usize::try_from(guest - region.guest).map_err(|_| BadAddress)?;
        let len = len.min(region.map.len() - at);
        Ok((Segment { ptr: region.map.at(at, len).ok_or(BadAddress)?, len }, at == 0))
    }

    /// Calls `each` with guest address and length of the bytes of `buf` that lie in this memory, run by run.
    pub fn guest_ranges(&self, buf: &IoBuf, mut each: impl FnMut(u64, usize)) {
        for segment in buf.segments() {
            let found = self.regions.iter().find_map(|region| {
                let base = region.map.at(0, 0)?.addr().get();
                let at = segment.ptr.addr().get().checked_sub(base)?;
                let inside = at < region.map.len() && segment.len <= region.map.len() - at;
                inside.then(|| region.guest.checked_add(u64::try_from(at).ok()?))?
            });
            if let Some(guest) = found {
                each(guest, segment.len);
            }
        }
    }
}

/// Collects runs of guest memory into one buffer; for use again and again.
#[derive(Debug)]
pub struct Gather {
    memory: Arc<GuestMemory>,
    segments: Vec<Segment>,
    len: usize,
}

// SAFETY: the segments point into `memory`, which is Send + Sync and kept alive; they are only addresses here.
unsafe impl Send for Gather {}

impl Gather {
    /// Nothing yet, of this memory.
    pub fn new(memory: Arc<GuestMemory>) -> Self {
        Self { memory, segments: Vec::new(), len: 0 }
    }

    /// The memory that it collects from.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Forgets what was collected.
    pub fn clear(&mut self) {
        self.segments.clear();
        self.len = 0;
    }

    /// Bytes so far.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no byte so far.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds `len` bytes at the guest's address.
    ///
    /// # Errors
    /// Not all of it is memory; the collection is to be thrown away then.
    pub fn push(&mut self, guest: u64, len: usize) -> Result<(), BadAddress> {
        self.len = self.len.checked_add(len).ok_or(BadAddress)?;
        let (mut guest, mut len) = (guest, len);
        while len > 0 {
            let (part, first) = self.memory.part(guest, len)?;
            // A run that goes on where the last one ended, in the same region, is one with it.
            match self.segments.last_mut() {
                Some(last) if !first && last.ptr.addr().get() + last.len == part.ptr.addr().get() => {
                    last.len += part.len
                }
                _ => self.segments.push(part),
            }
            len -= part.len;
            guest = guest.checked_add(u64::try_from(part.len).map_err(|_| BadAddress)?).ok_or(BadAddress)?;
        }
        Ok(())
    }

    /// Takes the first bytes out of the collection, as many as `out` has; false, and nothing done, if there are fewer.
    pub fn take_front(&mut self, out: &mut [u8]) -> bool {
        if out.len() > self.len {
            return false;
        }
        let mut done = 0;
        while let (Some(rest), Some(first)) = (out.get_mut(done..), self.segments.first_mut()) {
            let now = first.len.min(rest.len());
            // SAFETY: the segment is mapped; a unique slice does not overlap memory that nobody may borrow.
            unsafe { first.ptr.as_ptr().copy_to_nonoverlapping(rest.as_mut_ptr(), now) };
            // SAFETY: `now` is at most the length of the segment.
            first.ptr = unsafe { first.ptr.add(now) };
            first.len -= now;
            done += now;
            if first.len == 0 {
                self.segments.remove(0);
            }
            if done == out.len() {
                break;
            }
        }
        self.len -= done;
        true
    }

    /// Takes the last byte out of the collection, as a buffer of its own.
    pub fn take_last(&mut self) -> Option<IoBuf> {
        let last = self.segments.last_mut()?;
        let at = last.len.checked_sub(1)?;
        // SAFETY: `at` is below the length of the segment.
        let byte = Segment { ptr: unsafe { last.ptr.add(at) }, len: 1 };
        last.len = at;
        self.len -= 1;
        if at == 0 {
            self.segments.pop();
        }
        Some(self.buffer(&[byte]))
    }

    /// All that was collected as a buffer, leaving nothing.
    pub fn take(&mut self) -> IoBuf {
        let buf = self.buffer(&self.segments);
        self.clear();
        buf
    }

    fn buffer(&self, segments: &[Segment]) -> IoBuf {
        let memory: Arc<GuestMemory> = Arc::clone(&self.memory);
        // SAFETY: `push` made the segments of parts of this memory.
        unsafe { IoBuf::from_backing(memory, segments) }
    }
}
