//! Entries for fuzzers: total functions of what a guest leaves in its memory. They panic only if an invariant is broken.

use super::inflight::{Inflight, Resume, queue_len};
use super::request::{self, Command, Limits};
use super::ring::{Chain, Descriptor, MAX_SIZE, Ring, RingAddresses, RingFeatures, Taken};
use buf::{GuestMemory, Mapping, Region};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

/// Bytes of the guest's memory.
const MEMORY: u64 = 64 << 10;
const GUEST: u64 = 0x1000;
const SIZE: u16 = 32;
/// Where a new packed ring begins.
const FIRST: u16 = 1 << 15;
/// Where the rings that go with an inflight region are.
const RINGS: usize = 32 << 10;

struct Guest {
    fd: OwnedFd,
    map: Arc<Mapping>,
    memory: Arc<GuestMemory>,
}

impl Guest {
    /// # Panics
    /// There is no memory to be had.
    fn new() -> Self {
        use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
        let made = memfd_create("guest", MemfdFlags::CLOEXEC).and_then(|fd| ftruncate(&fd, MEMORY).map(|()| fd));
        let Ok(fd) = made else { unreachable!("no memory file") };
        let Ok(map) = Mapping::new(fd.as_fd(), 0, MEMORY) else { unreachable!("no mapping") };
        let map = Arc::new(map);
        let regions = vec![Region { guest: GUEST, monitor: GUEST, map: Arc::clone(&map) }];
        let Ok(memory) = GuestMemory::new(regions) else { unreachable!("one region overlaps nothing") };
        Self { fd, map, memory: Arc::new(memory) }
    }

    fn fill(&self, bytes: &[u8]) {
        if let Some(all) = self.map.window(0, self.map.len()) {
            all.clear();
        }
        let room = usize::try_from(MEMORY).unwrap_or(0).min(bytes.len());
        // What is not written stays zero.
        let _ = rustix::io::pwrite(&self.fd, bytes.get(..room).unwrap_or_default(), 0);
    }
}

thread_local! {
    static WORLD: Guest = Guest::new();
}

/// A virtqueue of 32 entries, of either layout, in memory that starts with `bytes`: descriptors, available ring, used ring,
/// anything.
///
/// # Panics
/// A request is not what a guest may ask for, or reaches beyond its buffers.
pub fn fuzz_virtqueue(bytes: &[u8]) {
    WORLD.with(|guest| {
        for (indirect, event_idx, writable, packed) in [
            (true, true, true, false),
            (false, false, false, false),
            (true, true, false, true),
            (false, false, true, true),
        ] {
            guest.fill(bytes);
            let at = RingAddresses { descriptors: GUEST, available: GUEST + 512, used: GUEST + 1024, log: None };
            let features = RingFeatures { indirect, event_idx, packed };
            let base = if packed { u32::from(FIRST) | u32::from(FIRST) << 16 } else { 0 };
            let Ok(mut ring) = Ring::new(&guest.memory, &at, SIZE, base, features) else {
                unreachable!("it lies there")
            };
            let limits = Limits { writable, block_size: 512 };
            for turn in 0..2 * SIZE {
                let Ok(Some(taken)) = ring.pop() else { break };
                let Ok(chain) = ring.collect(&taken) else { break };
                assert!(chain.slots <= SIZE);
                let Ok(request) = request::parse(&mut ring.buffers, chain, limits) else { break };
                assert_eq!(request.status.len(), 1);
                match &request.command {
                    Command::Read { at, buf } | Command::Write { at, buf } => {
                        assert!(at % 512 == 0 && buf.len() % 512 == 0);
                        assert!(buf.segments().count() <= usize::from(MAX_SIZE));
                        assert!(writable || matches!(request.command, Command::Read { .. }));
                    }
                    Command::Id(buf) => {
                        buf.write_at(0, &[0; 20]);
                    }
                    Command::Discard(list) | Command::Zero(list) => assert!(writable && list.len() <= 64),
                    Command::Flush | Command::Refuse(_) => {}
                }
                request.status.write_at(0, &[0]);
                ring.push(&chain);
                if turn % 3 == 0 {
                    ring.publish();
                    ring.listen();
                }
            }
            assert!(ring.unpublished() <= 2 * SIZE);
        }
    });
}

/// An inflight region with `bytes` in it, of either layout, found by a daemon that takes over.
///
/// # Panics
/// It names a request twice, or one that cannot be.
pub fn fuzz_inflight(bytes: &[u8]) {
    WORLD.with(|guest| {
        guest.fill(bytes);
        let used = bytes.last().map_or(0, |byte| u16::from(*byte));
        split_region(guest, used);
        guest.fill(bytes);
        packed_region(guest, used);
    });
}

/// The part at the beginning, of a ring at the end.
fn found(guest: &Guest, packed: bool, used: u16) -> (Inflight, Result<Option<Resume>, &'static str>) {
    assert!(queue_len(SIZE, packed) < RINGS);
    let Some(mut inflight) = Inflight::new(&guest.map, 0, 0, SIZE, packed) else { unreachable!("there is room") };
    let end = GUEST + u64::try_from(RINGS).unwrap_or(0);
    let at = RingAddresses { descriptors: end, available: end + 512, used: end + 1024, log: None };
    if let Some(index) = guest.map.window(RINGS + 1024 + 2, 2) {
        index.store_u16(0, used);
    }
    let features = RingFeatures { indirect: true, event_idx: true, packed };
    let ring = Ring::new(&guest.memory, &at, SIZE, u32::from(FIRST), features);
    let Ok(ring) = ring else { unreachable!("it lies there") };
    let resume = inflight.resume(ring.published(), SIZE, |slot| ring.flags_at(slot));
    (inflight, resume)
}

fn split_region(guest: &Guest, used: u16) {
    let (mut inflight, Ok(Some(resume))) = found(guest, false, used) else { return };
    let count = u16::try_from(resume.base).unwrap_or(0).wrapping_sub(used);
    let heads = resume.left.iter().map(|taken| if let Taken::Fresh(head) = taken { *head } else { SIZE });
    let mut once: Vec<u16> = heads.collect();
    once.sort_unstable();
    once.dedup();
    assert!(
        once.len() == resume.left.len() && once.len() == usize::from(count) && once.iter().all(|head| *head < SIZE)
    );
    for head in once {
        let chain = Chain { id: head, slots: 1, entry: head, writable: 0 };
        assert_eq!(inflight.started(&chain, &[]), Ok(head));
        inflight.done(head);
        inflight.published(&[head], used.wrapping_add(1));
    }
}

fn packed_region(guest: &Guest, used: u16) {
    let (mut inflight, Ok(Some(resume))) = found(guest, true, used) else { return };
    let mut room = usize::from(SIZE);
    let mut entries = Vec::new();
    for taken in &resume.left {
        let Taken::Noted { entry, descriptors } = taken else { unreachable!("a note of another kind of ring") };
        assert!(*entry < SIZE && !descriptors.is_empty() && !entries.contains(entry));
        entries.push(*entry);
        room = room.checked_sub(descriptors.len()).unwrap_or_else(|| unreachable!("more than there is room for"));
    }
    // What is left is free, and all of it is when all is done.
    let one = [Descriptor { addr: 0, len: 0, flags: 0, number: 0 }];
    let chain = Chain { id: 0, slots: 1, entry: 0, writable: 0 };
    for _ in 0..room {
        let Ok(entry) = inflight.started(&chain, &one) else { unreachable!("there is room") };
        assert!(!entries.contains(&entry));
        entries.push(entry);
    }
    assert!(inflight.started(&chain, &one).is_err());
    inflight.publishing(&entries, FIRST);
    inflight.published(&entries, FIRST);
    assert!((0..SIZE).all(|_| inflight.started(&chain, &one).is_ok()));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn virtqueues(mut bytes in prop::collection::vec(any::<u8>(), 0..2000), available in 0_u8..40) {
            // An index that makes some of it available.
            if let Some(index) = bytes.get_mut(514..516) {
                index.copy_from_slice(&[available, 0]);
            }
            fuzz_virtqueue(&bytes);
        }

        #[test]
        fn inflight_regions(mut bytes in prop::collection::vec(0_u8..3, 600), used in 0_u8..40) {
            bytes[8..12].copy_from_slice(&[1, 0, 32, 0]);
            bytes.push(used);
            fuzz_inflight(&bytes);
        }

        #[test]
        fn packed_regions(
            lists in prop::collection::vec((0_u8..3, 0_u8..34, 0_u8..5, any::<u8>()), 32),
            head in prop::collection::vec(0_u8..34, 10),
        ) {
            let mut bytes = vec![0; 8];
            bytes.extend([1, 0, 32, 0, head[0], 0, head[1], 0, head[2], 0, head[3], 0, head[4] % 2, head[5] % 2]);
            bytes.resize(32, 0);
            for (flight, next, count, counter) in lists {
                bytes.extend([flight, 0, next, 0, 0, 0, count, 0, counter]);
                bytes.resize(bytes.len().next_multiple_of(32), 0);
            }
            fuzz_inflight(&bytes);
        }

        #[test]
        fn packed_rings(slots in prop::collection::vec((0_u64..5, 0_u32..64, 0_u16..4, 0_u16..16, any::<bool>()), 32)) {
            let mut bytes = Vec::new();
            for (addr, len, id, flags, available) in slots {
                bytes.extend((GUEST + addr * 0x200).to_le_bytes());
                bytes.extend((len * 16).to_le_bytes());
                bytes.extend(id.to_le_bytes());
                bytes.extend((flags | if available { 1 << 7 } else { 1 << 15 }).to_le_bytes());
            }
            fuzz_virtqueue(&bytes);
        }
    }
}
