//! What a daemon leaves behind for the one that takes over after it: which requests of a ring are in flight,
//! `[vhost-user §Inflight I/O tracking]`, in the layout of [`split`] or of [`packed`] rings.
//!
//! The region lies in shared memory that the front-end keeps while the daemon is away. Its bytes are the front-end's, and
//! so are claims: they are checked when they are read.

mod packed;
mod split;

#[cfg(doc)]
use super::ring::Ring;
use super::ring::{Chain, Descriptor, Taken};
use buf::{Mapping, Window};
use packed::PackedPart;
use split::SplitPart;
use std::sync::Arc;

/// Each queue's part starts at a multiple of this many bytes.
const ALIGN: usize = 64;
const VERSION: u16 = 1;
/// See [`Inflight::note_through`].
const BACK: u8 = 1;
const THROUGH: u8 = 2;

/// What both layouts begin with.
mod at {
    pub const FEATURES: usize = 0;
    pub const VERSION: usize = 8;
    pub const SIZE: usize = 10;
}

/// Bytes of the entries and of what is in front of them.
fn entries_len(size: u16, packed: bool) -> usize {
    let (head, entry) = if packed { (packed::HEAD, packed::ENTRY) } else { (split::HEAD, split::ENTRY) };
    head + entry * usize::from(size)
}

/// Bytes of one queue's part.
pub(crate) fn queue_len(size: u16, packed: bool) -> usize {
    // At least one byte more than the entries, for a note of ours; with a size of a power of two there is room anyway.
    (entries_len(size, packed) + 1).next_multiple_of(ALIGN)
}

/// Where a successor goes on.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Resume {
    /// As of [`Ring::new`].
    pub base: u32,
    /// Requests that were taken and are not done, oldest first.
    pub left: Vec<Taken>,
}

#[derive(Debug)]
enum Part {
    Split(SplitPart),
    Packed(PackedPart),
}

/// One queue's part of the region.
#[derive(Debug)]
pub(crate) struct Inflight {
    window: Window,
    part: Part,
    /// Where the note about the cache is.
    note: usize,
}

impl Inflight {
    /// The part of queue `index`, if the region, which begins at `start`, has one for it.
    pub(crate) fn new(map: &Arc<Mapping>, start: usize, index: usize, size: u16, packed: bool) -> Option<Self> {
        let len = queue_len(size, packed);
        let window = map.window(index.checked_mul(len)?.checked_add(start)?, len)?;
        let part = if packed {
            Part::Packed(PackedPart::new(window.clone(), size))
        } else {
            Part::Split(SplitPart::new(window.clone(), size))
        };
        Some(Self { window, part, note: entries_len(size, packed) })
    }

    /// Reads what the last daemon left, and makes it whole: a batch that it had shown to the guest and not struck out is struck
    /// out. None if the part is new, and is set up. `published` is where the ring is as of [`Ring::published`], and `flags_at`
    /// has the flags of its descriptors if it is packed.
    ///
    /// # Errors
    /// It is not what a daemon would leave of this ring.
    pub(crate) fn resume(
        &mut self,
        published: u16,
        ring_size: u16,
        flags_at: impl Fn(u16) -> u16,
    ) -> Result<Option<Resume>, &'static str> {
        match &mut self.part {
            Part::Split(part) => part.resume(published),
            Part::Packed(part) => part.resume(published, ring_size, flags_at),
        }
    }

    /// A request was taken, of these descriptors if its ring is packed. Says where it is noted.
    ///
    /// # Errors
    /// There is no room for it, which a ring that keeps to its size does not bring about.
    pub(crate) fn started(&mut self, chain: &Chain, descriptors: &[Descriptor]) -> Result<u16, &'static str> {
        match &mut self.part {
            Part::Split(part) => {
                part.started(chain.id);
                Ok(chain.id)
            }
            Part::Packed(part) => part.started(descriptors),
        }
    }

    /// A request is done and will be shown to the guest with the next batch.
    #[inline]
    pub(crate) fn done(&mut self, entry: u16) {
        match &mut self.part {
            Part::Split(part) => part.done(entry),
            // All at once, before they are shown.
            Part::Packed(_) => {}
        }
    }

    /// The guest is about to be shown `batch`, after which the ring will be at `used`.
    #[inline]
    pub(crate) fn publishing(&mut self, batch: &[u16], used: u16) {
        match &mut self.part {
            Part::Split(_) => {}
            Part::Packed(part) => part.publishing(batch, used),
        }
    }

    /// The guest was shown `batch`; the ring is at `used` now.
    #[inline]
    pub(crate) fn published(&mut self, batch: &[u16], used: u16) {
        match &mut self.part {
            Part::Split(part) => part.published(batch, used),
            Part::Packed(part) => part.published(batch, used),
        }
    }

    /// Notes whether the guest has its writes written through, behind the entries where the layout has room that nobody uses.
    ///
    /// The guest says so once, and a front-end does not repeat it to the daemon that takes over.
    pub(crate) fn note_through(&self, through: bool) {
        self.window.store_u8(self.note, if through { THROUGH } else { BACK });
    }

    /// What was noted by [`note_through`](Self::note_through), if anything.
    pub(crate) fn noted_through(&self) -> Option<bool> {
        match self.window.load_u8(self.note) {
            THROUGH => Some(true),
            BACK => Some(false),
            _ => None,
        }
    }

    /// Forgets all requests: the part is as a new one.
    pub(crate) fn clear(&self) {
        self.window.clear();
    }

    /// Forgets where the ring stood, which was stopped with nothing in flight: it goes on where it is told to. The used index of a
    /// split ring is in the guest's memory, so its part needs no such care.
    pub(crate) fn stopped(&self) {
        if matches!(self.part, Part::Packed(_)) {
            self.window.store_u16(at::VERSION, 0);
        }
    }

    /// Whether the memory was taken away.
    pub(crate) fn is_torn(&self) -> bool {
        self.window.is_torn()
    }
}
