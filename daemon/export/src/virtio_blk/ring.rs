//! A split virtqueue in the guest's memory, `[virtio 1.2 §2.7]`.
//!
//! The guest is hostile: each number is loaded once and checked afterwards, an entry that points nowhere or a chain that does
//! not end is [`Broken`], and nothing more is taken from such a ring. The ring owns no requests and does no I/O.

use buf::{BadAddress, Gather, GuestMemory, Window};
use std::fmt;
use std::sync::atomic::{Ordering, fence};

/// The most entries of a ring, and the most descriptors of one chain, indirect ones with it. The specification would allow
/// 32768; no monitor offers more than this.
pub(crate) const MAX_SIZE: u16 = 1024;

const DESCRIPTOR: usize = 16;
const USED_ELEMENT: usize = 8;
/// Bytes of flags and index in front of both rings.
const RING_HEAD: usize = 4;

mod flag {
    pub const NEXT: u16 = 1;
    pub const WRITE: u16 = 2;
    pub const INDIRECT: u16 = 4;
    /// The driver wants no interrupts.
    pub const NO_INTERRUPT: u16 = 1;
    /// The device wants no kicks.
    pub const NO_NOTIFY: u16 = 1;
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
}

impl From<BadAddress> for Broken {
    fn from(_: BadAddress) -> Self {
        Self::OUTSIDE
    }
}

/// Where a ring lies, in the addresses of whoever set it up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RingAddresses {
    pub descriptors: u64,
    pub used: u64,
    pub available: u64,
    /// The guest address of the used ring for the dirty log, if its writes are logged.
    pub log: Option<u64>,
}

/// What the two sides agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RingFeatures {
    pub indirect: bool,
    pub event_idx: bool,
}

/// A request that was taken from a ring: its number there, and the guest's memory in two buffers' worth of segments, which are
/// left in [`Ring::to_device`] and [`Ring::from_device`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chain {
    pub head: u16,
    /// Bytes that the device may write.
    pub writable: usize,
}

struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn parse(low: u64, high: u64) -> Self {
        let [a, b, c, d, e, f, g, h] = high.to_le_bytes();
        Self {
            addr: low,
            len: u32::from_le_bytes([a, b, c, d]),
            flags: u16::from_le_bytes([e, f]),
            next: u16::from_le_bytes([g, h]),
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Ring {
    size: u16,
    features: RingFeatures,
    descriptors: Window,
    available: Window,
    used: Window,
    /// The guest address of the used ring, if it is to be in the dirty log.
    pub(crate) log_used: Option<u64>,
    /// The next entry of the available ring to look at; counts on beyond the size.
    next_available: u16,
    /// The available index as last loaded.
    seen_available: u16,
    /// The next entry of the used ring to fill.
    next_used: u16,
    /// The used index as the guest knows it.
    published: u16,
    /// The used index when the guest's wish for interrupts was last looked at.
    asked: Option<u16>,
    /// Whether the guest was told to kick.
    listening: bool,
    /// What the guest wrote for the device, and where the device writes, of the chain that was taken last.
    pub(crate) to_device: Gather,
    pub(crate) from_device: Gather,
    /// A copy of an indirect table.
    table: Vec<u8>,
}

impl Ring {
    /// The ring at these addresses, from entry `base` of the available ring on.
    ///
    /// # Errors
    /// The ring does not lie in the memory, or not as it must.
    pub(crate) fn new(
        memory: &std::sync::Arc<GuestMemory>,
        at: &RingAddresses,
        size: u16,
        base: u16,
        features: RingFeatures,
    ) -> Result<Self, Broken> {
        if !size.is_power_of_two() || size > MAX_SIZE {
            return Err(Broken("the size of a ring is not a power of two up to 1024"));
        }
        let (descriptors, available, used, log_used) = windows(memory, at, size, features)?;
        let next_used = used.load_u16(2);
        let mut this = Self {
            size,
            features,
            descriptors,
            available,
            used,
            log_used,
            next_available: base,
            seen_available: base,
            next_used,
            published: next_used,
            asked: None,
            listening: true,
            to_device: Gather::new(std::sync::Arc::clone(memory)),
            from_device: Gather::new(std::sync::Arc::clone(memory)),
            table: Vec::new(),
        };
        this.mute();
        Ok(this)
    }

    /// Goes on in another memory or at other addresses, at the same place.
    ///
    /// # Errors
    /// The ring does not lie there.
    pub(crate) fn relocate(&mut self, memory: &std::sync::Arc<GuestMemory>, at: &RingAddresses) -> Result<(), Broken> {
        let (descriptors, available, used, log_used) = windows(memory, at, self.size, self.features)?;
        (self.descriptors, self.available, self.used, self.log_used) = (descriptors, available, used, log_used);
        self.to_device = Gather::new(std::sync::Arc::clone(memory));
        self.from_device = Gather::new(std::sync::Arc::clone(memory));
        Ok(())
    }

    /// The next entry of the available ring that will be taken.
    pub(crate) fn next_available(&self) -> u16 {
        self.next_available
    }

    /// The used index as the guest knows it.
    pub(crate) fn published(&self) -> u16 {
        self.published
    }

    /// Whether the memory below was taken away.
    pub(crate) fn is_torn(&self) -> bool {
        self.descriptors.is_torn() || self.available.is_torn() || self.used.is_torn()
    }

    /// Whether the guest has made requests available that were not taken.
    ///
    /// # Errors
    /// It claims more than the ring can hold.
    pub(crate) fn has_available(&mut self) -> Result<bool, Broken> {
        if self.seen_available == self.next_available {
            self.seen_available = self.available.load_u16(2);
            if self.seen_available.wrapping_sub(self.next_available) > self.size {
                return Err(Broken("the available index is beyond the ring"));
            }
        }
        Ok(self.seen_available != self.next_available)
    }

    /// As [`has_available`](Self::has_available), for a look that changes nothing.
    pub(crate) fn peek_available(&self) -> bool {
        self.available.load_u16(2) != self.next_available
    }

    /// Takes the number of the next request, to be collected.
    ///
    /// # Errors
    /// The ring is broken.
    pub(crate) fn pop(&mut self) -> Result<Option<u16>, Broken> {
        if !self.has_available()? {
            return Ok(None);
        }
        let slot = usize::from(self.next_available & (self.size - 1));
        let head = self.available.load_u16(RING_HEAD + 2 * slot);
        self.next_available = self.next_available.wrapping_add(1);
        Ok(Some(head))
    }

    /// Collects the request of this number.
    ///
    /// # Errors
    /// The ring is broken.
    pub(crate) fn collect(&mut self, head: u16) -> Result<Chain, Broken> {
        self.to_device.clear();
        self.from_device.clear();
        let mut at = head;
        // Each entry of the ring at most once: whoever comes to more goes in a circle.
        for _ in 0..self.size {
            if at >= self.size {
                return Err(Broken("a descriptor's number is beyond the table"));
            }
            let place = DESCRIPTOR * usize::from(at);
            let one = Descriptor::parse(self.descriptors.load_u64(place), self.descriptors.load_u64(place + 8));
            if one.flags & flag::INDIRECT != 0 {
                // [virtio 1.2 §2.7.5.3.1] no NEXT with INDIRECT; chains of several tables are not a thing.
                if !self.features.indirect || one.flags & flag::NEXT != 0 || at != head {
                    return Err(Broken("an indirect descriptor where none may be"));
                }
                self.collect_indirect(&one)?;
                return self.chain(head);
            }
            self.add(&one)?;
            if one.flags & flag::NEXT == 0 {
                return self.chain(head);
            }
            at = one.next;
        }
        Err(Broken("a chain of descriptors that goes in a circle"))
    }

    fn chain(&self, head: u16) -> Result<Chain, Broken> {
        Ok(Chain { head, writable: self.from_device.len() })
    }

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

    fn collect_indirect(&mut self, table: &Descriptor) -> Result<(), Broken> {
        let len = usize::try_from(table.len).map_err(|_| Broken("an indirect table's length"))?;
        let count = len / DESCRIPTOR;
        if count == 0 || !len.is_multiple_of(DESCRIPTOR) || count > usize::from(MAX_SIZE) {
            return Err(Broken("an indirect table of a wrong length"));
        }
        // Copied once; what the guest does to it afterwards does not matter.
        let mut copy = std::mem::take(&mut self.table);
        copy.resize(len, 0);
        let result = self.to_device.memory().read(table.addr, &mut copy).map_err(Broken::from);
        let result = result.and_then(|()| self.walk(&copy, count));
        self.table = copy;
        result
    }

    fn walk(&mut self, table: &[u8], count: usize) -> Result<(), Broken> {
        let mut at = 0;
        for _ in 0..count {
            let entry = table.get(at * DESCRIPTOR..).and_then(|rest| rest.split_first_chunk::<8>());
            let Some((low, rest)) = entry else { return Err(Broken("a descriptor's number is beyond the table")) };
            let Some((high, _)) = rest.split_first_chunk::<8>() else { return Err(Broken("a table that ends early")) };
            let one = Descriptor::parse(u64::from_le_bytes(*low), u64::from_le_bytes(*high));
            if one.flags & flag::INDIRECT != 0 {
                return Err(Broken("an indirect descriptor where none may be"));
            }
            self.add(&one)?;
            if one.flags & flag::NEXT == 0 {
                return Ok(());
            }
            at = usize::from(one.next);
        }
        Err(Broken("a chain of descriptors that goes in a circle"))
    }

    /// Notes a request as done; the guest sees it at the next [`publish`](Self::publish).
    pub(crate) fn push(&mut self, head: u16, written: u32) {
        let slot = usize::from(self.next_used & (self.size - 1));
        let at = RING_HEAD + USED_ELEMENT * slot;
        self.used.store_u32(at, u32::from(head));
        self.used.store_u32(at + 4, written);
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Requests that are noted as done and not published.
    pub(crate) fn unpublished(&self) -> u16 {
        self.next_used.wrapping_sub(self.published)
    }

    /// Shows the guest what was done. Says whether it wants an interrupt for that.
    pub(crate) fn publish(&mut self) -> bool {
        let new = self.next_used;
        if self.published == new {
            return false;
        }
        self.used.store_u16(2, new);
        self.published = new;
        // The index is to be seen before the wish is read, or both sides could wait. [virtio 1.2 §2.7.13]
        fence(Ordering::SeqCst);
        if !self.features.event_idx {
            return self.available.load_u16(0) & flag::NO_INTERRUPT == 0;
        }
        let event = self.available.load_u16(RING_HEAD + 2 * usize::from(self.size));
        self.asked.replace(new).is_none_or(|since| passes(event, since, new))
    }

    /// Guest offsets in the used ring that the entries from `from` on lie in, for the dirty log: start and length.
    pub(crate) fn used_ranges(&self, from: u16) -> impl Iterator<Item = (usize, usize)> {
        let size = self.size;
        let count = self.next_used.wrapping_sub(from);
        let entries = (0..count)
            .map(move |i| (RING_HEAD + USED_ELEMENT * usize::from(from.wrapping_add(i) & (size - 1)), USED_ELEMENT));
        entries.chain([(0, RING_HEAD), (RING_HEAD + USED_ELEMENT * usize::from(size), 2)])
    }

    /// Asks the guest for kicks. To be followed by another look at [`has_available`](Self::has_available).
    pub(crate) fn listen(&mut self) {
        self.listening = true;
        if self.features.event_idx {
            self.used.store_u16(self.available_event(), self.next_available);
        } else {
            self.used.store_u16(0, 0);
        }
        // As in `publish`, the other way round.
        fence(Ordering::SeqCst);
    }

    /// Wants no kicks for now.
    pub(crate) fn mute(&mut self) {
        if std::mem::take(&mut self.listening) && !self.features.event_idx {
            self.used.store_u16(0, flag::NO_NOTIFY);
        }
        // With event indices there is nothing to do: the guest has passed the one that was asked for.
    }

    /// Whether the guest was asked for kicks.
    pub(crate) fn is_listening(&self) -> bool {
        self.listening
    }

    fn available_event(&self) -> usize {
        RING_HEAD + USED_ELEMENT * usize::from(self.size)
    }
}

/// Whether the index passed `event` on its way from `old` to `new`. `[virtio 1.2 §2.7.10]`
fn passes(event: u16, old: u16, new: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

type Windows = (Window, Window, Window, Option<u64>);

fn windows(memory: &GuestMemory, at: &RingAddresses, size: u16, features: RingFeatures) -> Result<Windows, Broken> {
    let entries = usize::from(size);
    let event = if features.event_idx { 2 } else { 0 };
    let find = |addr: u64, align: usize, len: usize| {
        let (window, _) =
            memory.window_of_monitor(addr, len).ok_or(Broken("a ring lies outside of the guest's memory"))?;
        if window.is_aligned(align) { Ok(window) } else { Err(Broken("a ring is not aligned")) }
    };
    let descriptors = find(at.descriptors, 16, DESCRIPTOR * entries)?;
    let available = find(at.available, 2, RING_HEAD + 2 * entries + event)?;
    let used = find(at.used, 4, RING_HEAD + USED_ELEMENT * entries + event)?;
    Ok((descriptors, available, used, at.log))
}
