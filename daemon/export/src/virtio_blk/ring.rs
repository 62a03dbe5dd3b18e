//! A virtqueue in the guest's memory, of either layout: [`split`] and [`packed`], `[virtio 1.2 §2.7, §2.8]`.
//!
//! The guest is hostile: each number is loaded once and checked afterwards, an entry that points nowhere or a chain that does
//! not end is [`Broken`], and nothing more is taken from such a ring. The ring owns no requests and does no I/O.

mod packed;
mod split;

use buf::{BadAddress, Gather, GuestMemory, Window};
use packed::Packed;
use split::Split;
use std::fmt;
use std::sync::Arc;

pub(crate) use packed::{Position, is_published};

/// The most entries of a ring, and the most descriptors of one chain, indirect ones with it. The specification would allow
/// 32768; no monitor offers more than this.
pub(crate) const MAX_SIZE: u16 = 1024;

/// Bytes of a descriptor, in either layout and in indirect tables.
const DESCRIPTOR: usize = 16;

mod flag {
    pub const NEXT: u16 = 1;
    pub const WRITE: u16 = 2;
    pub const INDIRECT: u16 = 4;
}

/// The guest broke the rules of the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Broken(pub &'static str);

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl Broken {
    /// An address that is none of the memory's, as far as it is known.
    pub(crate) const OUTSIDE: Self = Self("a descriptor points outside of the guest's memory");
    const CIRCLE: Self = Self("a chain of descriptors that goes in a circle");
    const INDIRECT: Self = Self("an indirect descriptor where none may be");
}

impl From<BadAddress> for Broken {
    fn from(_: BadAddress) -> Self {
        Self::OUTSIDE
    }
}

/// Where a ring lies, in the addresses of whoever set it up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RingAddresses {
    /// The table of descriptors, or the ring of them if it is packed.
    pub descriptors: u64,
    /// The used ring, or what the device says of notifications.
    pub used: u64,
    /// The available ring, or what the driver says of notifications.
    pub available: u64,
    /// The guest address of the used ring for the dirty log, if its writes are logged.
    pub log: Option<u64>,
}

/// What the two sides agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RingFeatures {
    pub indirect: bool,
    pub event_idx: bool,
    pub packed: bool,
}

/// A descriptor as it was read; of a packed ring with the number of its buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Descriptor {
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
    /// What the two layouts have in different places: the next descriptor of the table, or the buffer id.
    pub number: u16,
}

impl Descriptor {
    /// From its two words in a split ring, or in an indirect table.
    fn of_table(low: u64, high: u64) -> Self {
        let [a, b, c, d, e, f, g, h] = high.to_le_bytes();
        Self {
            addr: low,
            len: u32::from_le_bytes([a, b, c, d]),
            flags: u16::from_le_bytes([e, f]),
            number: u16::from_le_bytes([g, h]),
        }
    }
}

/// A request that is to be collected.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// The next one of a packed ring, or the one that begins with this descriptor of a split ring.
    Fresh(u16),
    /// One that a former process took from a packed ring and noted in the record of requests in flight.
    Noted {
        /// Where it is noted.
        entry: u16,
        descriptors: Vec<Descriptor>,
    },
}

/// A request that was collected. The guest's memory of it is left in [`Ring::buffers`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chain {
    /// What names it to the driver: its first descriptor, or the id of its buffer.
    pub id: u16,
    /// The places that it has in a packed ring.
    pub slots: u16,
    /// What names it in the record of requests in flight.
    pub entry: u16,
    /// Bytes that the device may write.
    pub writable: usize,
}

/// What the guest wrote for the device, and where the device writes, of the chain that was collected last.
#[derive(Debug)]
pub(crate) struct Buffers {
    pub to_device: Gather,
    pub from_device: Gather,
    /// A copy of an indirect table.
    table: Vec<u8>,
    /// The descriptors of the chain as they lay in a packed ring, to be noted.
    pub descriptors: Vec<Descriptor>,
}

impl Buffers {
    fn new(memory: &Arc<GuestMemory>) -> Self {
        Self {
            to_device: Gather::new(Arc::clone(memory)),
            from_device: Gather::new(Arc::clone(memory)),
            table: Vec::new(),
            descriptors: Vec::new(),
        }
    }

    #[inline]
    fn clear(&mut self) {
        self.to_device.clear();
        self.from_device.clear();
        self.descriptors.clear();
    }

    #[inline]
    fn add(&mut self, one: &Descriptor) -> Result<(), Broken> {
        let len = usize::try_from(one.len).map_err(|_| Broken("a descriptor's length"))?;
        if len == 0 {
            return Err(Broken("a descriptor of no bytes"));
        }
        if one.flags & flag::WRITE != 0 {
            self.from_device.push(one.addr, len)?;
        } else if self.from_device.is_empty() {
            self.to_device.push(one.addr, len)?;
        } else {
            return Err(Broken("a readable descriptor after a writable one"));
        }
        Ok(())
    }

    /// Copies an indirect table once; what the guest does to it afterwards does not matter.
    fn add_indirect(
        &mut self,
        table: &Descriptor,
        walk: impl FnOnce(&mut Self, &[u8], usize) -> Result<(), Broken>,
    ) -> Result<(), Broken> {
        let len = usize::try_from(table.len).map_err(|_| Broken("an indirect table's length"))?;
        let count = len / DESCRIPTOR;
        if count == 0 || !len.is_multiple_of(DESCRIPTOR) || count > usize::from(MAX_SIZE) {
            return Err(Broken("an indirect table of a wrong length"));
        }
        let mut copy = std::mem::take(&mut self.table);
        copy.resize(len, 0);
        let result = self.to_device.memory().read(table.addr, &mut copy).map_err(Broken::from);
        let result = result.and_then(|()| walk(self, &copy, count));
        self.table = copy;
        result
    }
}

/// The descriptor at `at` of a copied table: its first word, and its second.
fn entry_of(table: &[u8], at: usize) -> Option<(u64, u64)> {
    let (low, rest) = table.get(at.checked_mul(DESCRIPTOR)?..)?.split_first_chunk::<8>()?;
    let (high, _) = rest.split_first_chunk::<8>()?;
    Some((u64::from_le_bytes(*low), u64::from_le_bytes(*high)))
}

/// Whether the index passed `event` on its way from `old` to `new`. `[virtio 1.2 §2.7.10]`
fn passes(event: u16, old: u16, new: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// A part of a ring, and its guest address.
fn find(memory: &GuestMemory, addr: u64, align: usize, len: usize) -> Result<(Window, u64), Broken> {
    let found = memory.window_of_monitor(addr, len).ok_or(Broken("a ring lies outside of the guest's memory"))?;
    if found.0.is_aligned(align) { Ok(found) } else { Err(Broken("a ring is not aligned")) }
}

#[derive(Debug)]
enum Layout {
    Split(Split),
    Packed(Packed),
}

/// Calls the layout that it is.
macro_rules! of_either {
    ($layout:expr, $ring:ident => $call:expr) => {
        match $layout {
            Layout::Split($ring) => $call,
            Layout::Packed($ring) => $call,
        }
    };
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Ring {
    layout: Layout,
    pub(crate) buffers: Buffers,
}

impl Ring {
    /// The ring at these addresses, which goes on at `base`: the next entry of the available ring, or the two
    /// [`Position`]s of a packed one, available below used.
    ///
    /// # Errors
    /// The ring does not lie in the memory, or not as it must.
    pub(crate) fn new(
        memory: &Arc<GuestMemory>,
        at: &RingAddresses,
        size: u16,
        base: u32,
        features: RingFeatures,
    ) -> Result<Self, Broken> {
        let layout = if features.packed {
            Layout::Packed(Packed::new(memory, at, size, base, features)?)
        } else {
            Layout::Split(Split::new(memory, at, size, base, features)?)
        };
        Ok(Self { layout, buffers: Buffers::new(memory) })
    }

    /// Goes on in another memory or at other addresses, at the same place.
    ///
    /// # Errors
    /// The ring does not lie there.
    pub(crate) fn relocate(&mut self, memory: &Arc<GuestMemory>, at: &RingAddresses) -> Result<(), Broken> {
        of_either!(&mut self.layout, ring => ring.relocate(memory, at)?);
        self.buffers = Buffers::new(memory);
        Ok(())
    }

    /// Where another process would go on, as of [`new`](Self::new).
    pub(crate) fn base(&self) -> u32 {
        of_either!(&self.layout, ring => ring.base())
    }

    /// The used index as the guest knows it, or the [`Position`].
    #[inline]
    pub(crate) fn published(&self) -> u16 {
        of_either!(&self.layout, ring => ring.published())
    }

    /// What [`published`](Self::published) will be after [`publish`](Self::publish).
    #[inline]
    pub(crate) fn to_be_published(&self) -> u16 {
        of_either!(&self.layout, ring => ring.to_be_published())
    }

    /// Whether the memory below was taken away.
    #[inline]
    pub(crate) fn is_torn(&self) -> bool {
        of_either!(&self.layout, ring => ring.is_torn())
    }

    /// Whether there are requests that were not taken, for a look that changes nothing.
    #[inline]
    pub(crate) fn peek_available(&self) -> bool {
        of_either!(&self.layout, ring => ring.peek_available())
    }

    /// The next request, to be collected.
    ///
    /// # Errors
    /// The ring is broken.
    #[inline]
    pub(crate) fn pop(&mut self) -> Result<Option<Taken>, Broken> {
        Ok(match &mut self.layout {
            Layout::Split(ring) => ring.pop()?.map(Taken::Fresh),
            Layout::Packed(ring) => ring.peek_available().then_some(Taken::Fresh(0)),
        })
    }

    /// Collects a request. Until that has succeeded it can be tried again.
    ///
    /// # Errors
    /// The ring is broken.
    #[inline]
    pub(crate) fn collect(&mut self, taken: &Taken) -> Result<Chain, Broken> {
        let buffers = &mut self.buffers;
        buffers.clear();
        let (id, slots, entry) = match (&mut self.layout, taken) {
            (Layout::Split(ring), Taken::Fresh(head)) => {
                ring.collect(*head, buffers)?;
                (*head, 1, *head)
            }
            (Layout::Packed(ring), Taken::Fresh(_)) => {
                let (id, slots) = ring.collect(buffers)?;
                (id, slots, 0)
            }
            (Layout::Packed(ring), Taken::Noted { entry, descriptors }) => {
                let (id, slots) = ring.collect_noted(descriptors, buffers)?;
                (id, slots, *entry)
            }
            (Layout::Split(_), Taken::Noted { .. }) => return Err(Broken("a note of another kind of ring")),
        };
        Ok(Chain { id, slots, entry, writable: buffers.from_device.len() })
    }

    /// Notes a request as done; the guest sees it at the next [`publish`](Self::publish).
    #[inline]
    pub(crate) fn push(&mut self, chain: &Chain) {
        let written = u32::try_from(chain.writable).unwrap_or(u32::MAX);
        match &mut self.layout {
            Layout::Split(ring) => ring.push(chain.id, written),
            Layout::Packed(ring) => ring.push(chain.id, chain.slots, written),
        }
    }

    /// Requests that are noted as done and not published.
    #[inline]
    pub(crate) fn unpublished(&self) -> u16 {
        of_either!(&self.layout, ring => ring.unpublished())
    }

    /// Shows the guest what was done. Says whether it wants an interrupt for that.
    #[inline]
    pub(crate) fn publish(&mut self) -> bool {
        of_either!(&mut self.layout, ring => ring.publish())
    }

    /// Calls `each` with the guest address and the length of all that the next [`publish`](Self::publish) shows, if writes are
    /// to be in the dirty log.
    pub(crate) fn unpublished_ranges(&self, each: impl FnMut(u64, usize)) {
        of_either!(&self.layout, ring => ring.unpublished_ranges(each));
    }

    /// Asks the guest for kicks. To be followed by another [`peek_available`](Self::peek_available).
    #[inline]
    pub(crate) fn listen(&mut self) {
        of_either!(&mut self.layout, ring => ring.listen());
    }

    /// Wants no kicks for now.
    #[inline]
    pub(crate) fn mute(&mut self) {
        of_either!(&mut self.layout, ring => ring.mute());
    }

    /// Whether the guest was asked for kicks.
    #[inline]
    pub(crate) fn is_listening(&self) -> bool {
        of_either!(&self.layout, ring => ring.is_listening())
    }

    /// The flags of a descriptor of a packed ring, as they are now; of any, none.
    pub(crate) fn flags_at(&self, slot: u16) -> u16 {
        match &self.layout {
            Layout::Split(_) => 0,
            Layout::Packed(ring) => ring.flags_at(slot),
        }
    }
}

#[cfg(test)]
mod tests;
