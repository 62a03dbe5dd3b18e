//! What a daemon leaves behind for the one that takes over after it: which requests of a ring are in flight,
//! `[vhost-user §Inflight I/O tracking]`, split rings.
//!
//! The region lies in shared memory that the front-end keeps while the daemon is away. Its bytes are the front-end's, and
//! so are claims: they are checked when they are read.

use super::ring::MAX_SIZE;
use buf::{Mapping, Window};
use std::sync::Arc;

/// Each queue's part starts at a multiple of this many bytes.
const ALIGN: usize = 64;
/// features, version, number of descriptors, head of the last batch, used index.
const HEAD: usize = 16;
/// in flight, padding, next, counter.
const ENTRY: usize = 16;
const VERSION: u16 = 1;
/// See [`Inflight::note_through`].
const BACK: u8 = 1;
const THROUGH: u8 = 2;

mod at {
    pub const FEATURES: usize = 0;
    pub const VERSION: usize = 8;
    pub const SIZE: usize = 10;
    pub const LAST_BATCH: usize = 12;
    pub const USED: usize = 14;
    /// In an entry.
    pub const NEXT: usize = 6;
    pub const COUNTER: usize = 8;
}

/// Bytes of one queue's part.
pub(crate) fn queue_len(size: u16) -> usize {
    // At least one byte more than the entries, for a note of ours; with a size of a power of two there is room anyway.
    (HEAD + ENTRY * usize::from(size) + 1).next_multiple_of(ALIGN)
}

/// One queue's part of the region.
#[derive(Debug)]
pub(crate) struct Inflight {
    window: Window,
    size: u16,
    /// The next request's number, so that a successor takes them up in order.
    counter: u64,
}

/// Where a successor goes on.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Resume {
    /// The next entry of the available ring.
    pub base: u16,
    /// Requests that were taken and are not done, oldest first.
    pub heads: Vec<u16>,
}

impl Inflight {
    /// The part of queue `index`, if the region, which begins at `start`, has one for it.
    pub(crate) fn new(map: &Arc<Mapping>, start: usize, index: usize, size: u16) -> Option<Self> {
        let len = queue_len(size);
        let window = map.window(index.checked_mul(len)?.checked_add(start)?, len)?;
        Some(Self { window, size, counter: 0 })
    }

    fn entry(head: u16) -> usize {
        HEAD + ENTRY * usize::from(head)
    }

    /// Reads what the last daemon left, and makes it whole: a batch that it had shown to the guest and not struck out is struck
    /// out. `used` is the used index in the guest's memory. None if the part is new, and is set up.
    ///
    /// # Errors
    /// It is not what a daemon would leave.
    pub(crate) fn resume(&mut self, used: u16) -> Result<Option<Resume>, &'static str> {
        let window = &self.window;
        match window.load_u16(at::VERSION) {
            0 => {
                window.clear();
                window.store_u64(at::FEATURES, 0);
                window.store_u16(at::SIZE, self.size);
                window.store_u16(at::USED, used);
                window.store_u16(at::VERSION, VERSION);
                return Ok(None);
            }
            VERSION => {}
            _ => return Err("the inflight region has an unknown version"),
        }
        if window.load_u16(at::SIZE) != self.size {
            return Err("the inflight region is one of another ring");
        }
        let started = |head: &u16| window.load_u8(Self::entry(*head)) == 1;
        // The last batch was shown, perhaps without being struck out. If nothing is noted, it was; and the guest may have begun
        // anew since.
        let mut batch =
            if (0..self.size).any(|head| started(&head)) { used.wrapping_sub(window.load_u16(at::USED)) } else { 0 };
        if batch > self.size {
            return Err("the inflight region does not go with the ring");
        }
        let mut head = window.load_u16(at::LAST_BATCH);
        while batch > 0 {
            if head >= self.size {
                return Err("the inflight region names a request that cannot be");
            }
            window.store_u8(Self::entry(head), 0);
            head = window.load_u16(Self::entry(head) + at::NEXT);
            batch -= 1;
        }
        window.store_u16(at::USED, used);
        let mut left: Vec<(u64, u16)> = (0..self.size)
            .filter(started)
            .map(|head| (window.load_u64(Self::entry(head) + at::COUNTER), head))
            .collect();
        left.sort_unstable();
        self.counter = left.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        let count = u16::try_from(left.len()).unwrap_or(MAX_SIZE);
        Ok(Some(Resume { base: used.wrapping_add(count), heads: left.into_iter().map(|(_, head)| head).collect() }))
    }

    /// A request was taken.
    pub(crate) fn started(&mut self, head: u16) {
        let entry = Self::entry(head);
        self.window.store_u64(entry + at::COUNTER, self.counter);
        self.counter = self.counter.wrapping_add(1);
        self.window.store_u8(entry, 1);
    }

    /// A request is done and will be shown to the guest with the next batch.
    pub(crate) fn done(&mut self, head: u16) {
        self.window.store_u16(Self::entry(head) + at::NEXT, self.window.load_u16(at::LAST_BATCH));
        self.window.store_u16(at::LAST_BATCH, head);
    }

    /// The guest was shown `batch`; its used index is `used` now.
    pub(crate) fn published(&mut self, batch: &[u16], used: u16) {
        for head in batch {
            self.window.store_u8(Self::entry(*head), 0);
        }
        self.window.store_u16(at::USED, used);
    }

    /// Notes whether the guest has its writes written through, behind the entries where the layout has room that nobody uses.
    ///
    /// The guest says so once, and a front-end does not repeat it to the daemon that takes over.
    pub(crate) fn note_through(&self, through: bool) {
        self.window.store_u8(Self::entry(self.size), if through { THROUGH } else { BACK });
    }

    /// What was noted by [`note_through`](Self::note_through), if anything.
    pub(crate) fn noted_through(&self) -> Option<bool> {
        match self.window.load_u8(Self::entry(self.size)) {
            THROUGH => Some(true),
            BACK => Some(false),
            _ => None,
        }
    }

    /// Forgets all requests: the part is as a new one.
    pub(crate) fn clear(&self) {
        self.window.clear();
    }

    /// Whether the memory was taken away.
    pub(crate) fn is_torn(&self) -> bool {
        self.window.is_torn()
    }
}
