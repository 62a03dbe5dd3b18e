//! The split layout: a table of descriptors, a ring of what the driver made available, and one of what the device has used,
//! `[virtio 1.2 §2.7]`.

use super::{Broken, Buffers, DESCRIPTOR, Descriptor, MAX_SIZE, RingAddresses, RingFeatures, entry_of, flag, passes};
use buf::{GuestMemory, Window};
use std::sync::atomic::{Ordering, fence};

const USED_ELEMENT: usize = 8;
/// Bytes of flags and index in front of both rings.
const RING_HEAD: usize = 4;

/// The driver wants no interrupts.
const NO_INTERRUPT: u16 = 1;
/// The device wants no kicks.
const NO_NOTIFY: u16 = 1;

/// See the module.
#[derive(Debug)]
pub(super) struct Split {
    size: u16,
    features: RingFeatures,
    descriptors: Window,
    available: Window,
    used: Window,
    /// The guest address of the used ring, if it is to be in the dirty log.
    log_used: Option<u64>,
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
}

impl Split {
    pub(super) fn new(
        memory: &GuestMemory,
        at: &RingAddresses,
        size: u16,
        base: u32,
        features: RingFeatures,
    ) -> Result<Self, Broken> {
        if !size.is_power_of_two() || size > MAX_SIZE {
            return Err(Broken("the size of a ring is not a power of two up to 1024"));
        }
        let base = u16::try_from(base).map_err(|_| Broken("an index of a ring is beyond 65535"))?;
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
        };
        this.mute();
        Ok(this)
    }

    pub(super) fn relocate(&mut self, memory: &GuestMemory, at: &RingAddresses) -> Result<(), Broken> {
        let (descriptors, available, used, log_used) = windows(memory, at, self.size, self.features)?;
        (self.descriptors, self.available, self.used, self.log_used) = (descriptors, available, used, log_used);
        Ok(())
    }

    pub(super) fn base(&self) -> u32 {
        u32::from(self.next_available)
    }

    #[inline]
    pub(super) fn published(&self) -> u16 {
        self.published
    }

    #[inline]
    pub(super) fn to_be_published(&self) -> u16 {
        self.next_used
    }

    #[inline]
    pub(super) fn is_torn(&self) -> bool {
        self.descriptors.is_torn() || self.available.is_torn() || self.used.is_torn()
    }

    /// Whether the guest has made requests available that were not taken.
    fn has_available(&mut self) -> Result<bool, Broken> {
        if self.seen_available == self.next_available {
            self.seen_available = self.available.load_u16(2);
            if self.seen_available.wrapping_sub(self.next_available) > self.size {
                return Err(Broken("the available index is beyond the ring"));
            }
        }
        Ok(self.seen_available != self.next_available)
    }

    #[inline]
    pub(super) fn peek_available(&self) -> bool {
        self.available.load_u16(2) != self.next_available
    }

    /// Takes the number of the next request's first descriptor.
    #[inline]
    pub(super) fn pop(&mut self) -> Result<Option<u16>, Broken> {
        if !self.has_available()? {
            return Ok(None);
        }
        let slot = usize::from(self.next_available & (self.size - 1));
        let head = self.available.load_u16(RING_HEAD + 2 * slot);
        self.next_available = self.next_available.wrapping_add(1);
        Ok(Some(head))
    }

    #[inline]
    pub(super) fn collect(&self, head: u16, buffers: &mut Buffers) -> Result<(), Broken> {
        let mut at = head;
        // Each entry of the ring at most once: whoever comes to more goes in a circle.
        for _ in 0..self.size {
            if at >= self.size {
                return Err(Broken("a descriptor's number is beyond the table"));
            }
            let place = DESCRIPTOR * usize::from(at);
            let one = Descriptor::of_table(self.descriptors.load_u64(place), self.descriptors.load_u64(place + 8));
            if one.flags & flag::INDIRECT != 0 {
                // [virtio 1.2 §2.7.5.3.1] no NEXT with INDIRECT; chains of several tables are not a thing.
                if !self.features.indirect || one.flags & flag::NEXT != 0 || at != head {
                    return Err(Broken::INDIRECT);
                }
                return buffers.add_indirect(&one, walk);
            }
            buffers.add(&one)?;
            if one.flags & flag::NEXT == 0 {
                return Ok(());
            }
            at = one.number;
        }
        Err(Broken::CIRCLE)
    }

    #[inline]
    pub(super) fn push(&mut self, head: u16, written: u32) {
        let slot = usize::from(self.next_used & (self.size - 1));
        let at = RING_HEAD + USED_ELEMENT * slot;
        self.used.store_u32(at, u32::from(head));
        self.used.store_u32(at + 4, written);
        self.next_used = self.next_used.wrapping_add(1);
    }

    #[inline]
    pub(super) fn unpublished(&self) -> u16 {
        self.next_used.wrapping_sub(self.published)
    }

    #[inline]
    pub(super) fn publish(&mut self) -> bool {
        let new = self.next_used;
        if self.published == new {
            return false;
        }
        self.used.store_u16(2, new);
        self.published = new;
        // The index is to be seen before the wish is read, or both sides could wait. [virtio 1.2 §2.7.13]
        fence(Ordering::SeqCst);
        if !self.features.event_idx {
            return self.available.load_u16(0) & NO_INTERRUPT == 0;
        }
        let event = self.available.load_u16(RING_HEAD + 2 * usize::from(self.size));
        self.asked.replace(new).is_none_or(|since| passes(event, since, new))
    }

    pub(super) fn unpublished_ranges(&self, mut each: impl FnMut(u64, usize)) {
        let Some(start) = self.log_used else { return };
        let mut each = |offset: usize, len| each(start.saturating_add(u64::try_from(offset).unwrap_or(u64::MAX)), len);
        for entry in 0..self.unpublished() {
            let slot = self.published.wrapping_add(entry) & (self.size - 1);
            each(RING_HEAD + USED_ELEMENT * usize::from(slot), USED_ELEMENT);
        }
        each(0, RING_HEAD);
        each(self.available_event(), 2);
    }

    #[inline]
    pub(super) fn listen(&mut self) {
        self.listening = true;
        if self.features.event_idx {
            self.used.store_u16(self.available_event(), self.next_available);
        } else {
            self.used.store_u16(0, 0);
        }
        // As in `publish`, the other way round.
        fence(Ordering::SeqCst);
    }

    #[inline]
    pub(super) fn mute(&mut self) {
        if std::mem::take(&mut self.listening) && !self.features.event_idx {
            self.used.store_u16(0, NO_NOTIFY);
        }
        // With event indices there is nothing to do: the guest has passed the one that was asked for.
    }

    #[inline]
    pub(super) fn is_listening(&self) -> bool {
        self.listening
    }

    fn available_event(&self) -> usize {
        RING_HEAD + USED_ELEMENT * usize::from(self.size)
    }
}

/// The descriptors of an indirect table, each of which names the next one.
fn walk(buffers: &mut Buffers, table: &[u8], count: usize) -> Result<(), Broken> {
    let mut at = 0;
    for _ in 0..count {
        let Some((low, high)) = entry_of(table, at) else {
            return Err(Broken("a descriptor's number is beyond the table"));
        };
        let one = Descriptor::of_table(low, high);
        if one.flags & flag::INDIRECT != 0 {
            return Err(Broken::INDIRECT);
        }
        buffers.add(&one)?;
        if one.flags & flag::NEXT == 0 {
            return Ok(());
        }
        at = usize::from(one.number);
    }
    Err(Broken::CIRCLE)
}

type Windows = (Window, Window, Window, Option<u64>);

fn windows(memory: &GuestMemory, at: &RingAddresses, size: u16, features: RingFeatures) -> Result<Windows, Broken> {
    let entries = usize::from(size);
    let event = if features.event_idx { 2 } else { 0 };
    let (descriptors, _) = super::find(memory, at.descriptors, 16, DESCRIPTOR * entries)?;
    let (available, _) = super::find(memory, at.available, 2, RING_HEAD + 2 * entries + event)?;
    let (used, _) = super::find(memory, at.used, 4, RING_HEAD + USED_ELEMENT * entries + event)?;
    Ok((descriptors, available, used, at.log))
}
