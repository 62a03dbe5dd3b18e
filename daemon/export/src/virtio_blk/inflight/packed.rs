//! The part of a packed ring: copies of the descriptors in flight, as those in the ring are overwritten, in lists of entries; and
//! a list of free entries.
//!
//! Each change is made behind the head of the free list first, and holds when `old_free_head` and its companions say so: a
//! successor finds the state before it or after it. What is read back in normal operation is kept here as well, as the
//! region's bytes are the front-end's.

use super::{Resume, VERSION, at};
use crate::virtio_blk::ring::{Descriptor, Position, Taken, is_published};
use buf::Window;

/// features, version, number of entries, two heads of the free list, two used indices, two wrap counters, padding.
pub(super) const HEAD: usize = 32;
/// in flight, padding, next, last, number, counter; buffer id, flags, length, address.
pub(super) const ENTRY: usize = 32;

const FREE: usize = 12;
const OLD_FREE: usize = 14;
const USED: usize = 16;
const OLD_USED: usize = 18;
const WRAP: usize = 20;
const OLD_WRAP: usize = 21;
/// In an entry.
const NEXT: usize = 2;
const LAST: usize = 4;
const COUNT: usize = 6;
const COUNTER: usize = 8;
const ID: usize = 16;
const FLAGS: usize = 18;
const LEN: usize = 20;
const ADDR: usize = 24;

const UNLIKE: &str = "the inflight region does not go with the ring";
const LIAR: &str = "the inflight region names a request that cannot be";

/// See the module.
#[derive(Debug)]
pub(super) struct PackedPart {
    window: Window,
    size: u16,
    counter: u64,
    /// The next entry, of each, and the last one of the list that begins with it; as in the region.
    next: Vec<u16>,
    last: Vec<u16>,
    free: u16,
}

/// Where an entry begins.
fn entry(index: u16) -> usize {
    HEAD + ENTRY * usize::from(index)
}

fn set(list: &mut [u16], index: u16, value: u16) {
    if let Some(place) = list.get_mut(usize::from(index)) {
        *place = value;
    }
}

impl PackedPart {
    pub(super) fn new(window: Window, size: u16) -> Self {
        Self { window, size, counter: 0, next: Vec::new(), last: Vec::new(), free: 0 }
    }

    /// The entry behind this one; at the end, one that there is not.
    fn after(&self, index: u16) -> u16 {
        self.next.get(usize::from(index)).copied().unwrap_or(self.size)
    }

    fn link(&mut self, index: u16, next: u16) {
        set(&mut self.next, index, next);
        self.window.store_u16(entry(index) + NEXT, next);
    }

    fn load_position(&self, index: usize, wrap: usize) -> Position {
        Position { index: self.window.load_u16(index), wrap: self.window.load_u8(wrap) != 0 }
    }

    fn store_position(&self, index: usize, wrap: usize, at: Position) {
        self.window.store_u16(index, at.index);
        self.window.store_u8(wrap, u8::from(at.wrap));
    }

    /// `used` is where the ring stands if the part is new; `flags_at` has the flags of the ring's descriptors.
    pub(super) fn resume(
        &mut self,
        used: u16,
        ring_size: u16,
        flags_at: impl Fn(u16) -> u16,
    ) -> Result<Option<Resume>, &'static str> {
        if ring_size > self.size {
            return Err("the inflight region is too small for the ring");
        }
        (self.next, self.last) = (vec![self.size; usize::from(self.size)], vec![0; usize::from(self.size)]);
        match self.window.load_u16(at::VERSION) {
            0 => {
                self.window.clear();
                self.window.store_u16(at::SIZE, self.size);
                self.store_position(USED, WRAP, Position::decode(used));
                self.store_position(OLD_USED, OLD_WRAP, Position::decode(used));
                self.make_free(&vec![true; usize::from(self.size)]);
                self.window.store_u16(at::VERSION, VERSION);
                return Ok(None);
            }
            VERSION => {}
            _ => return Err("the inflight region has an unknown version"),
        }
        if self.window.load_u16(at::SIZE) != self.size {
            return Err("the inflight region is one of another ring");
        }
        let used = self.settle(ring_size, flags_at)?;
        self.strike_out_free()?;
        let mut found = Vec::new();
        let mut free = vec![true; usize::from(self.size)];
        let mut places = 0_u16;
        for head in 0..self.size {
            if self.window.load_u8(entry(head)) != 1 {
                continue;
            }
            let (counter, descriptors) = self.list(head, &mut free)?;
            let count = u16::try_from(descriptors.len()).map_err(|_| LIAR)?;
            places = places.checked_add(count).filter(|places| *places <= ring_size).ok_or(UNLIKE)?;
            found.push((counter, Taken::Noted { entry: head, descriptors }));
        }
        // What was free is a list of its own again, whatever it was.
        self.make_free(&free);
        found.sort_unstable_by_key(|(counter, _)| *counter);
        self.counter = found.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        let available = used.after(places, ring_size);
        let base = u32::from(available.encode()) | u32::from(used.encode()) << 16;
        Ok(Some(Resume { base, left: found.into_iter().map(|(_, taken)| taken).collect() }))
    }

    /// Takes the last batch as done if the guest was shown it, and else as not done. Returns where the ring stands.
    fn settle(&mut self, ring_size: u16, flags_at: impl Fn(u16) -> u16) -> Result<Position, &'static str> {
        let (old, new) = (self.load_position(OLD_USED, OLD_WRAP), self.load_position(USED, WRAP));
        if old.index >= ring_size || new.index >= ring_size {
            return Err(UNLIKE);
        }
        let used = if old != new && is_published(flags_at(old.index), old) {
            self.window.store_u16(OLD_FREE, self.window.load_u16(FREE));
            self.store_position(OLD_USED, OLD_WRAP, new);
            new
        } else {
            self.window.store_u16(FREE, self.window.load_u16(OLD_FREE));
            self.store_position(USED, WRAP, old);
            old
        };
        Ok(used)
    }

    /// What is free is not in flight.
    fn strike_out_free(&self) -> Result<(), &'static str> {
        let mut at = self.window.load_u16(FREE);
        for _ in 0..self.size {
            if at >= self.size {
                return Ok(());
            }
            self.window.store_u8(entry(at), 0);
            at = self.window.load_u16(entry(at) + NEXT);
        }
        if at >= self.size { Ok(()) } else { Err("the inflight region has a list without an end") }
    }

    /// The list of a request in flight, whose entries are struck out of `free`: its number, and its descriptors.
    fn list(&mut self, head: u16, free: &mut [bool]) -> Result<(u64, Vec<Descriptor>), &'static str> {
        let window = &self.window;
        let (counter, count) = (window.load_u64(entry(head) + COUNTER), window.load_u16(entry(head) + COUNT));
        if count == 0 || count > self.size {
            return Err(LIAR);
        }
        let (mut at, mut last) = (head, head);
        let mut descriptors = Vec::with_capacity(usize::from(count));
        for _ in 0..count {
            // Each entry belongs to one request at most.
            let place = free.get_mut(usize::from(at)).filter(|free| **free).ok_or(LIAR)?;
            *place = false;
            let from = entry(at);
            descriptors.push(Descriptor {
                addr: window.load_u64(from + ADDR),
                len: window.load_u32(from + LEN),
                flags: window.load_u16(from + FLAGS),
                number: window.load_u16(from + ID),
            });
            let next = window.load_u16(from + NEXT);
            set(&mut self.next, at, next);
            (last, at) = (at, next);
        }
        set(&mut self.last, head, last);
        Ok((counter, descriptors))
    }

    /// Makes a list of the free entries, in the order of their numbers.
    fn make_free(&mut self, free: &[bool]) {
        let mut next = self.size;
        for index in (0..self.size).rev().filter(|index| free.get(usize::from(*index)) == Some(&true)) {
            self.link(index, next);
            next = index;
        }
        self.free = next;
        self.window.store_u16(FREE, next);
        self.window.store_u16(OLD_FREE, next);
    }

    pub(super) fn started(&mut self, descriptors: &[Descriptor]) -> Result<u16, &'static str> {
        let (head, mut last) = (self.free, self.free);
        let count = u16::try_from(descriptors.len()).map_err(|_| LIAR)?;
        let mut at = head;
        for one in descriptors {
            if at >= self.size {
                return Err("more requests are in flight than the inflight region has room for");
            }
            let to = entry(at);
            self.window.store_u64(to + ADDR, one.addr);
            self.window.store_u32(to + LEN, one.len);
            self.window.store_u16(to + FLAGS, one.flags);
            self.window.store_u16(to + ID, one.number);
            (last, at) = (at, self.after(at));
        }
        set(&mut self.last, head, last);
        self.window.store_u16(entry(head) + LAST, last);
        self.window.store_u16(entry(head) + COUNT, count);
        self.window.store_u64(entry(head) + COUNTER, self.counter);
        self.counter = self.counter.wrapping_add(1);
        // It is free until the head of the list says otherwise.
        self.window.store_u8(entry(head), 1);
        self.free = at;
        self.window.store_u16(FREE, at);
        self.window.store_u16(OLD_FREE, at);
        Ok(head)
    }

    pub(super) fn publishing(&mut self, batch: &[u16], used: u16) {
        for head in batch {
            let last = self.last.get(usize::from(*head)).copied().unwrap_or(*head);
            self.link(last, self.free);
            self.free = *head;
        }
        self.window.store_u16(FREE, self.free);
        self.store_position(USED, WRAP, Position::decode(used));
    }

    pub(super) fn published(&mut self, batch: &[u16], used: u16) {
        for head in batch {
            self.window.store_u8(entry(*head), 0);
        }
        self.window.store_u16(OLD_FREE, self.free);
        self.store_position(OLD_USED, OLD_WRAP, Position::decode(used));
    }
}
