//! A packed ring against a driver that is a model of the specification, with any order of completion; and its record, which the
//! next process finds in any state.

use super::packed::Position;
use super::{Descriptor, Ring, RingAddresses, RingFeatures, Taken};
use crate::virtio_blk::inflight::Inflight;
use buf::{GuestMemory, Mapping, Region, Window};
use proptest::prelude::*;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::collections::{BTreeMap, VecDeque};
use std::os::fd::AsFd;
use std::sync::Arc;

const GUEST: u64 = 0x1_0000;
const DRIVER: usize = 0x800;
const DEVICE: usize = 0x810;
/// The buffer of the request with id n is at n times this, behind the rings; its first byte is n.
const BUFFER: usize = 0x100;
const BUFFERS: usize = 0x1000;
const LEN: u64 = 0x4000;

/// The driver's side.
struct Driver {
    memory: Arc<GuestMemory>,
    all: Window,
    size: u16,
    next: Position,
    used: Position,
    /// Places by id, of requests that it waits for.
    waits: BTreeMap<u16, u16>,
}

impl Driver {
    fn new(size: u16) -> Self {
        let fd = memfd_create("driver", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, LEN).unwrap();
        let map = Arc::new(Mapping::new(fd.as_fd(), 0, LEN).unwrap());
        let all = map.window(0, map.len()).unwrap();
        let memory = Arc::new(GuestMemory::new(vec![Region { guest: GUEST, monitor: GUEST, map }]).unwrap());
        let first = Position { index: 0, wrap: true };
        Self { memory, all, size, next: first, used: first, waits: BTreeMap::new() }
    }

    fn ring(&self, base: u32, event_idx: bool) -> Ring {
        let at = |offset: usize| GUEST + u64::try_from(offset).unwrap();
        let addresses = RingAddresses { descriptors: GUEST, available: at(DRIVER), used: at(DEVICE), log: Some(0) };
        let features = RingFeatures { indirect: true, event_idx, packed: true };
        Ring::new(&self.memory, &addresses, self.size, base, features).unwrap()
    }

    /// Where a device begins that has nothing in flight.
    fn base(&self) -> u32 {
        let used = u32::from(self.used.encode());
        used | used << 16
    }

    fn room(&self) -> u16 {
        self.size - self.waits.values().sum::<u16>()
    }

    /// Makes a request of so many descriptors available, if there is room. Says whether the device wants a kick.
    fn offer(&mut self, slots: u16, indirect: bool) -> Option<u16> {
        let slots = if indirect { 1 } else { slots };
        let id = (0..self.size).find(|id| !self.waits.contains_key(id))?;
        if slots > self.room() {
            return None;
        }
        let buffer = BUFFERS + BUFFER * usize::from(id);
        self.all.store_u8(buffer, u8::try_from(id).unwrap());
        let mut at = self.next;
        let mut first = None;
        for slot in 0..slots {
            let place = 16 * usize::from(at.index);
            let own = if at.wrap { 1 << 7 } else { 1 << 15 };
            let next = u16::from(slot + 1 < slots);
            let mut addr = buffer + 8 * usize::from(slot);
            let mut len = 8;
            if indirect {
                // One entry, at the end of the buffer.
                self.all.store_u64(buffer + 0x80, GUEST + u64::try_from(buffer).unwrap());
                self.all.store_u64(buffer + 0x88, 8);
                (addr, len) = (buffer + 0x80, 16);
            }
            self.all.store_u64(place, GUEST + u64::try_from(addr).unwrap());
            self.all.store_u32(place + 8, len);
            self.all.store_u16(place + 12, id);
            let flags = own | next | if indirect { 4 } else { 0 };
            if slot == 0 {
                first = Some((place + 14, flags));
            } else {
                self.all.store_u16(place + 14, flags);
            }
            at = at.after(1, self.size);
        }
        let (place, flags) = first?;
        self.all.store_u16(place, flags);
        self.next = at;
        self.waits.insert(id, slots);
        Some(id)
    }

    /// What the device has used since the last look.
    fn take(&mut self) -> Vec<u16> {
        let mut taken = Vec::new();
        loop {
            let place = 16 * usize::from(self.used.index);
            let flags = self.all.load_u16(place + 14);
            let (available, used) = (flags & 1 << 7 != 0, flags & 1 << 15 != 0);
            if available != self.used.wrap || used != self.used.wrap {
                return taken;
            }
            let id = self.all.load_u16(place + 12);
            let slots = self.waits.remove(&id).expect("it was waited for");
            self.used = self.used.after(slots, self.size);
            taken.push(id);
        }
    }
}

/// The device's side, with its record in a region that stays.
struct Served {
    ring: Ring,
    inflight: Inflight,
    /// Requests that were taken, by id.
    taken: Vec<super::Chain>,
    batch: Vec<u16>,
    left: VecDeque<Taken>,
}

impl Served {
    fn start(driver: &Driver, region: &Arc<Mapping>, event_idx: bool) -> Self {
        let first = driver.base();
        let mut ring = driver.ring(first, event_idx);
        let mut inflight = Inflight::new(region, 0, 0, driver.size, true).unwrap();
        let mut left = VecDeque::new();
        let resume = inflight.resume(ring.published(), driver.size, |slot| ring.flags_at(slot)).unwrap();
        if let Some(resume) = resume {
            ring = driver.ring(resume.base, event_idx);
            left = resume.left.into();
        }
        Self { ring, inflight, taken: Vec::new(), batch: Vec::new(), left }
    }

    /// Takes the next request, if there is one.
    fn pop(&mut self) -> Option<u16> {
        let next = match self.left.pop_front() {
            Some(left) => left,
            None => self.ring.pop().unwrap()?,
        };
        let mut chain = self.ring.collect(&next).unwrap();
        let mut data = [0xFF];
        assert!(self.ring.buffers.to_device.take_front(&mut data));
        assert_eq!(u16::from(data[0]), chain.id, "the buffer is that of the request");
        if matches!(next, Taken::Fresh(_)) {
            let descriptors: &[Descriptor] = &self.ring.buffers.descriptors;
            chain.entry = self.inflight.started(&chain, descriptors).unwrap();
        }
        self.taken.push(chain);
        Some(chain.id)
    }

    fn push(&mut self, which: usize) {
        if let Some(which) = which.checked_rem(self.taken.len()) {
            let chain = self.taken.swap_remove(which);
            self.ring.push(&chain);
            self.inflight.done(chain.entry);
            self.batch.push(chain.entry);
        }
    }

    /// Publishes as far as a process comes that is killed after so many steps.
    fn publish(&mut self, steps: usize) {
        if steps > 0 {
            self.inflight.publishing(&self.batch, self.ring.to_be_published());
        }
        if steps > 1 {
            self.ring.publish();
        }
        if steps > 2 {
            self.inflight.published(&self.batch, self.ring.published());
            self.batch.clear();
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Offer(u16, bool),
    Pop,
    Push(usize),
    Publish,
    Take,
    /// The device's process dies while it publishes.
    Die(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (1_u16..5, prop::bool::weighted(0.3)).prop_map(|(slots, indirect)| Step::Offer(slots, indirect)),
        4 => Just(Step::Pop),
        4 => any::<usize>().prop_map(Step::Push),
        2 => Just(Step::Publish),
        2 => Just(Step::Take),
        1 => (0_usize..4).prop_map(Step::Die),
    ];
    prop::collection::vec(step, 0..300)
}

fn region(size: u16) -> Arc<Mapping> {
    let len = u64::try_from(crate::virtio_blk::inflight::queue_len(size, true)).unwrap();
    let fd = memfd_create("region", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, len).unwrap();
    Arc::new(Mapping::new(fd.as_fd(), 0, len).unwrap())
}

proptest! {
    /// Each request is taken, and is done in the driver's eyes once, whenever the device's process dies.
    #[test]
    fn requests_are_done_once(steps in steps(), size in 1_u16..12, event_idx: bool) {
        let mut driver = Driver::new(size);
        let region = region(size);
        let mut device = Served::start(&driver, &region, event_idx);
        let (mut offered, mut done) = (0, 0);
        for step in steps {
            match step {
                Step::Offer(slots, indirect) => offered += usize::from(driver.offer(slots, indirect).is_some()),
                Step::Pop => drop(device.pop()),
                Step::Push(which) => device.push(which),
                Step::Publish => device.publish(3),
                Step::Take => done += driver.take().len(),
                Step::Die(after) => {
                    if !device.batch.is_empty() {
                        device.publish(after);
                    }
                    // The driver may see what was shown before the successor looks.
                    if after % 2 == 0 {
                        done += driver.take().len();
                        while driver.offer(1, false).is_some() {
                            offered += 1;
                        }
                    }
                    device = Served::start(&driver, &region, event_idx);
                }
            }
        }
        while device.pop().is_some() {}
        while !device.taken.is_empty() {
            device.push(0);
        }
        device.publish(3);
        done += driver.take().len();
        prop_assert_eq!(done, offered);
        prop_assert!(driver.waits.is_empty());
    }

    /// A driver that sleeps until it is told is told of what it has not seen.
    #[test]
    fn interrupts_come_when_they_are_wanted(batches in prop::collection::vec(1_u16..6, 1..60), size in 1_u16..9) {
        let mut driver = Driver::new(size);
        let mut ring = driver.ring(driver.base(), true);
        for batch in batches {
            // It asks, looks once more, and sleeps.
            driver.all.store_u16(DRIVER, driver.used.encode());
            driver.all.store_u16(DRIVER + 2, 2);
            assert!(driver.take().is_empty());
            for _ in 0..batch {
                driver.offer(1, false);
            }
            while let Some(taken) = ring.pop().unwrap() {
                let chain = ring.collect(&taken).unwrap();
                ring.push(&chain);
            }
            prop_assert!(ring.publish());
            driver.take();
        }
        prop_assert!(driver.waits.is_empty());
        driver.all.store_u16(DRIVER + 2, 1);
        driver.offer(1, false);
        let taken = ring.pop().unwrap().unwrap();
        let chain = ring.collect(&taken).unwrap();
        ring.push(&chain);
        prop_assert!(!ring.publish(), "it wants none");
    }
}

#[test]
fn chains_longer_than_the_ring_are_refused() {
    for size in [1, 2, 8] {
        let driver = Driver::new(size);
        for slot in 0..usize::from(size) {
            driver.all.store_u64(16 * slot, GUEST);
            driver.all.store_u64(16 * slot + 8, 8 | (1 | 1 << 7) << 48);
        }
        let mut ring = driver.ring(driver.base(), true);
        let taken = ring.pop().unwrap().unwrap();
        assert!(ring.collect(&taken).is_err());
    }
}

#[test]
fn positions_beyond_the_ring_are_refused() {
    let driver = Driver::new(4);
    let at = RingAddresses {
        descriptors: GUEST,
        available: GUEST + u64::try_from(DRIVER).unwrap(),
        used: GUEST + u64::try_from(DEVICE).unwrap(),
        log: None,
    };
    let features = RingFeatures { indirect: true, event_idx: true, packed: true };
    for base in [4, 0x8004, 0x8004_8000, 0x8000_8005, 0x8002_8001] {
        assert!(Ring::new(&driver.memory, &at, 4, base, features).is_err(), "{base:#x}");
    }
    for base in [0, 3, 0x0003_0003, 0x8000_8000, 0x8000_8003, 0x8002_0001] {
        assert!(Ring::new(&driver.memory, &at, 4, base, features).is_ok(), "{base:#x}");
    }
    assert!(Ring::new(&driver.memory, &at, 0, 0x8000_8000, features).is_err());
}

#[test]
fn what_is_written_is_in_the_log() {
    let mut driver = Driver::new(4);
    let mut ring = driver.ring(driver.base(), true);
    for _ in 0..3 {
        driver.offer(1, false);
        let taken = ring.pop().unwrap().unwrap();
        let chain = ring.collect(&taken).unwrap();
        ring.push(&chain);
    }
    let mut ranges = Vec::new();
    ring.unpublished_ranges(|at, len| ranges.push((at, len)));
    let device = GUEST + u64::try_from(DEVICE).unwrap();
    assert_eq!(ranges, [(GUEST, 16), (GUEST + 16, 16), (GUEST + 32, 16), (device, 4)]);
}
