//! The packed layout: one ring of descriptors, in which the driver makes requests available and the device shows that it has
//! used them, `[virtio 1.2 §2.8]`.
//!
//! Two flags of a descriptor say whose it is: compared with a bit that each side turns over whenever it comes to the ring's
//! end. A request has as many places in the ring as it has descriptors, one after the other; when it is done, the
//! device writes one descriptor in the place where it is, and goes on as many places behind. Requests are done in any order, so
//! descriptors of others are overwritten, and who wants to find them again has to note them elsewhere.

use super::{Broken, Buffers, DESCRIPTOR, Descriptor, MAX_SIZE, RingAddresses, RingFeatures, entry_of, flag, passes};
use buf::{GuestMemory, Window};
use std::sync::atomic::{Ordering, fence};

/// The driver's bit when it made the descriptor available.
const AVAILABLE: u16 = 1 << 7;
/// The device's bit when it used it.
const USED: u16 = 1 << 15;

/// Where the flags of a descriptor are, behind address, length and buffer id.
const LEN_AT: usize = 8;
const ID_AT: usize = 12;
const FLAGS_AT: usize = 14;

/// Bytes of what each side says of notifications: a position, and one of these. `[virtio 1.2 §2.8.14]`
const EVENTS: usize = 4;
const ENABLE: u16 = 0;
const DISABLE: u16 = 1;
/// When the other side comes to the position.
const AT_POSITION: u16 = 2;

/// The bit of a position that is turned over at the ring's end.
const WRAP: u16 = 1 << 15;

/// A place in the ring, and the bit that goes with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Position {
    pub index: u16,
    pub wrap: bool,
}

impl Position {
    /// As vhost and the driver write it.
    pub(crate) fn decode(raw: u16) -> Self {
        Self { index: raw & !WRAP, wrap: raw & WRAP != 0 }
    }

    /// See above.
    pub(crate) fn encode(self) -> u16 {
        self.index | if self.wrap { WRAP } else { 0 }
    }

    /// As many places behind this one; a round at most.
    pub(crate) fn after(self, slots: u16, size: u16) -> Self {
        let index = self.index.saturating_add(slots);
        match index.checked_sub(size) {
            Some(index) => Self { index, wrap: !self.wrap },
            None => Self { index, wrap: self.wrap },
        }
    }

    /// The places from this one to a later one.
    fn until(self, later: Self, size: u16) -> Option<u16> {
        let end = if self.wrap == later.wrap { later.index } else { later.index.checked_add(size)? };
        end.checked_sub(self.index).filter(|slots| *slots <= size)
    }
}

/// Whether the driver was shown the descriptor at this position: `flags` are not any more those that it was made available with.
pub(crate) fn is_published(flags: u16, at: Position) -> bool {
    !is_available(flags, at.wrap)
}

fn is_available(flags: u16, wrap: bool) -> bool {
    (flags & AVAILABLE != 0) == wrap && (flags & USED != 0) != wrap
}

/// See the module.
#[derive(Debug)]
pub(super) struct Packed {
    size: u16,
    features: RingFeatures,
    descriptors: Window,
    /// What the driver wants, and what the device does.
    driver: Window,
    device: Window,
    /// The guest addresses of descriptors and device's wishes, if writes are to be in the dirty log.
    logged: Option<(u64, u64)>,
    next_available: Position,
    next_used: Position,
    /// The position that the guest knows.
    published: Position,
    /// Requests that are done and not published.
    unpublished: u16,
    /// Flags of the first of these, which show all of them.
    first: Option<(usize, u16)>,
    /// Places of requests that were taken and are not published.
    busy: u16,
    /// Whether the guest's wish for interrupts was looked at before.
    asked: bool,
    /// Whether the guest was told to kick.
    listening: bool,
}

impl Packed {
    pub(super) fn new(
        memory: &GuestMemory,
        at: &RingAddresses,
        size: u16,
        base: u32,
        features: RingFeatures,
    ) -> Result<Self, Broken> {
        if size == 0 || size > MAX_SIZE {
            return Err(Broken("the size of a packed ring is not 1 to 1024"));
        }
        let [low, high] = [base & 0xFFFF, base >> 16].map(|half| u16::try_from(half).unwrap_or(0));
        let (next_available, next_used) = (Position::decode(low), Position::decode(high));
        let busy = next_used.until(next_available, size);
        let (true, true, Some(busy)) = (next_available.index < size, next_used.index < size, busy) else {
            return Err(Broken("the position in a packed ring is beyond it"));
        };
        let (descriptors, driver, device, logged) = windows(memory, at, size)?;
        let mut this = Self {
            size,
            features,
            descriptors,
            driver,
            device,
            logged,
            next_available,
            next_used,
            published: next_used,
            unpublished: 0,
            first: None,
            busy,
            asked: false,
            listening: true,
        };
        this.mute();
        this.give_back();
        Ok(this)
    }

    /// Makes what is in flight look as the driver made it available, for a former process may have written what it did not
    /// come to publish.
    fn give_back(&self) {
        let mut at = self.next_used;
        for _ in 0..self.busy {
            let flags = if at.wrap { AVAILABLE } else { USED };
            self.descriptors.store_u16(DESCRIPTOR * usize::from(at.index) + FLAGS_AT, flags);
            at = at.after(1, self.size);
        }
    }

    pub(super) fn relocate(&mut self, memory: &GuestMemory, at: &RingAddresses) -> Result<(), Broken> {
        let (descriptors, driver, device, logged) = windows(memory, at, self.size)?;
        (self.descriptors, self.driver, self.device, self.logged) = (descriptors, driver, device, logged);
        Ok(())
    }

    pub(super) fn base(&self) -> u32 {
        u32::from(self.next_available.encode()) | u32::from(self.next_used.encode()) << 16
    }

    pub(super) fn published(&self) -> u16 {
        self.published.encode()
    }

    pub(super) fn to_be_published(&self) -> u16 {
        self.next_used.encode()
    }

    pub(super) fn is_torn(&self) -> bool {
        self.descriptors.is_torn() || self.driver.is_torn() || self.device.is_torn()
    }

    pub(super) fn flags_at(&self, slot: u16) -> u16 {
        self.descriptors.load_u16(DESCRIPTOR * usize::from(slot) + FLAGS_AT)
    }

    pub(super) fn peek_available(&self) -> bool {
        is_available(self.flags_at(self.next_available.index), self.next_available.wrap)
    }

    /// Takes the next request: the id of its buffer and the places it has.
    pub(super) fn collect(&mut self, buffers: &mut Buffers) -> Result<(u16, u16), Broken> {
        let mut at = self.next_available;
        let mut slots = 0;
        loop {
            // What was taken and not published has its places still. Nor does a chain go round to itself.
            if slots == self.size.saturating_sub(self.busy) {
                return Err(Broken("a packed ring that has more descriptors than places"));
            }
            let place = DESCRIPTOR * usize::from(at.index);
            // The flags first, in one load with what lies beside them.
            let high = self.descriptors.load_u64(place + LEN_AT);
            let one = descriptor(self.descriptors.load_u64(place), high);
            self.add(&one, slots == 0, buffers)?;
            buffers.descriptors.push(one);
            slots += 1;
            at = at.after(1, self.size);
            if one.flags & flag::NEXT == 0 {
                self.next_available = at;
                self.busy += slots;
                return Ok((one.number, slots));
            }
        }
    }

    /// Takes a request that was taken before.
    pub(super) fn collect_noted(&self, noted: &[Descriptor], buffers: &mut Buffers) -> Result<(u16, u16), Broken> {
        let Some(last) = noted.last() else { return Err(Broken("a note of no descriptors")) };
        for (index, one) in noted.iter().enumerate() {
            self.add(one, index == 0, buffers)?;
        }
        Ok((last.number, u16::try_from(noted.len()).map_err(|_| Broken::CIRCLE)?))
    }

    fn add(&self, one: &Descriptor, first: bool, buffers: &mut Buffers) -> Result<(), Broken> {
        if one.flags & flag::INDIRECT == 0 {
            return buffers.add(one);
        }
        // [virtio 1.2 §2.8.19]
        if !self.features.indirect || one.flags & flag::NEXT != 0 || !first {
            return Err(Broken::INDIRECT);
        }
        buffers.add_indirect(one, |buffers, table, count| {
            (0..count).try_for_each(|at| {
                let Some((low, high)) = entry_of(table, at) else { return Err(Broken("a table that ends early")) };
                buffers.add(&descriptor(low, high))
            })
        })
    }

    pub(super) fn push(&mut self, id: u16, slots: u16, written: u32) {
        let place = DESCRIPTOR * usize::from(self.next_used.index);
        let bits = if self.next_used.wrap { AVAILABLE | USED } else { 0 };
        let flags = bits | if written > 0 { flag::WRITE } else { 0 };
        self.descriptors.store_u32(place + LEN_AT, written);
        self.descriptors.store_u16(place + ID_AT, id);
        if self.unpublished == 0 {
            self.first = Some((place + FLAGS_AT, flags));
        } else {
            self.descriptors.store_u16(place + FLAGS_AT, flags);
        }
        self.unpublished = self.unpublished.saturating_add(1);
        self.next_used = self.next_used.after(slots, self.size);
    }

    pub(super) fn unpublished(&self) -> u16 {
        self.unpublished
    }

    pub(super) fn publish(&mut self) -> bool {
        let Some((place, flags)) = self.first.take() else { return false };
        self.descriptors.store_u16(place, flags);
        let (old, new) = (std::mem::replace(&mut self.published, self.next_used), self.next_used);
        let slots = old.until(new, self.size).unwrap_or(self.size);
        self.busy = self.busy.saturating_sub(slots);
        self.unpublished = 0;
        // As of the split layout. [virtio 1.2 §2.8.21.3.1]
        fence(Ordering::SeqCst);
        let [a, b, c, d] = self.driver.load_u32(0).to_le_bytes();
        let first = !std::mem::replace(&mut self.asked, true);
        match u16::from_le_bytes([c, d]) & 3 {
            DISABLE => false,
            AT_POSITION if self.features.event_idx && !first => {
                let event = Position::decode(u16::from_le_bytes([a, b]));
                let back = if event.wrap == new.wrap { 0 } else { self.size };
                passes(event.index.wrapping_sub(back), new.index.wrapping_sub(slots), new.index)
            }
            _ => true,
        }
    }

    pub(super) fn unpublished_ranges(&self, mut each: impl FnMut(u64, usize)) {
        let Some((descriptors, device)) = self.logged else { return };
        let (mut at, end) = (self.published, self.next_used);
        // All the way round it is the same place with the other bit.
        while at != end {
            let offset = u64::try_from(DESCRIPTOR).unwrap_or(0) * u64::from(at.index);
            each(descriptors.saturating_add(offset), DESCRIPTOR);
            at = at.after(1, self.size);
        }
        each(device, EVENTS);
    }

    pub(super) fn listen(&mut self) {
        self.listening = true;
        if self.features.event_idx {
            self.device.store_u16(0, self.next_available.encode());
            self.device.store_u16(2, AT_POSITION);
        } else {
            self.device.store_u16(2, ENABLE);
        }
        fence(Ordering::SeqCst);
    }

    pub(super) fn mute(&mut self) {
        if std::mem::take(&mut self.listening) {
            self.device.store_u16(2, DISABLE);
        }
    }

    pub(super) fn is_listening(&self) -> bool {
        self.listening
    }
}

/// From its two words.
fn descriptor(low: u64, high: u64) -> Descriptor {
    let [a, b, c, d, e, f, g, h] = high.to_le_bytes();
    Descriptor {
        addr: low,
        len: u32::from_le_bytes([a, b, c, d]),
        number: u16::from_le_bytes([e, f]),
        flags: u16::from_le_bytes([g, h]),
    }
}

type Windows = (Window, Window, Window, Option<(u64, u64)>);

fn windows(memory: &GuestMemory, at: &RingAddresses, size: u16) -> Result<Windows, Broken> {
    let (descriptors, descriptors_at) = super::find(memory, at.descriptors, 16, DESCRIPTOR * usize::from(size))?;
    let (driver, _) = super::find(memory, at.available, 4, EVENTS)?;
    let (device, device_at) = super::find(memory, at.used, 4, EVENTS)?;
    // What the front-end says for the log is the address of the used ring, which this layout has not.
    Ok((descriptors, driver, device, at.log.map(|_| (descriptors_at, device_at))))
}
