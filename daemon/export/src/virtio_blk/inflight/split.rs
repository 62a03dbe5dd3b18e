//! The part of a split ring.

use super::{Resume, VERSION, at};
use crate::virtio_blk::ring::{MAX_SIZE, Taken};
use buf::Window;

/// features, version, number of descriptors, head of the last batch, used index.
pub(super) const HEAD: usize = 16;
/// in flight, padding, next, counter.
pub(super) const ENTRY: usize = 16;

const LAST_BATCH: usize = 12;
const USED: usize = 14;
/// In an entry.
const NEXT: usize = 6;
const COUNTER: usize = 8;

/// See the module.
#[derive(Debug)]
pub(super) struct SplitPart {
    window: Window,
    size: u16,
    /// The next request's number, so that a successor takes them up in order.
    counter: u64,
}

impl SplitPart {
    pub(super) fn new(window: Window, size: u16) -> Self {
        Self { window, size, counter: 0 }
    }

    fn entry(head: u16) -> usize {
        HEAD + ENTRY * usize::from(head)
    }

    /// `used` is the used index in the guest's memory.
    pub(super) fn resume(&mut self, used: u16) -> Result<Option<Resume>, &'static str> {
        let window = &self.window;
        match window.load_u16(at::VERSION) {
            0 => {
                window.clear();
                window.store_u64(at::FEATURES, 0);
                window.store_u16(at::SIZE, self.size);
                window.store_u16(USED, used);
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
            if (0..self.size).any(|head| started(&head)) { used.wrapping_sub(window.load_u16(USED)) } else { 0 };
        if batch > self.size {
            return Err("the inflight region does not go with the ring");
        }
        let mut head = window.load_u16(LAST_BATCH);
        while batch > 0 {
            if head >= self.size {
                return Err("the inflight region names a request that cannot be");
            }
            window.store_u8(Self::entry(head), 0);
            head = window.load_u16(Self::entry(head) + NEXT);
            batch -= 1;
        }
        window.store_u16(USED, used);
        let mut left: Vec<(u64, u16)> =
            (0..self.size).filter(started).map(|head| (window.load_u64(Self::entry(head) + COUNTER), head)).collect();
        left.sort_unstable();
        self.counter = left.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        let count = u16::try_from(left.len()).unwrap_or(MAX_SIZE);
        let base = u32::from(used.wrapping_add(count));
        Ok(Some(Resume { base, left: left.into_iter().map(|(_, head)| Taken::Fresh(head)).collect() }))
    }

    pub(super) fn started(&mut self, head: u16) {
        let entry = Self::entry(head);
        self.window.store_u64(entry + COUNTER, self.counter);
        self.counter = self.counter.wrapping_add(1);
        self.window.store_u8(entry, 1);
    }

    pub(super) fn done(&mut self, head: u16) {
        self.window.store_u16(Self::entry(head) + NEXT, self.window.load_u16(LAST_BATCH));
        self.window.store_u16(LAST_BATCH, head);
    }

    pub(super) fn published(&mut self, batch: &[u16], used: u16) {
        for head in batch {
            self.window.store_u8(Self::entry(*head), 0);
        }
        self.window.store_u16(USED, used);
    }
}
