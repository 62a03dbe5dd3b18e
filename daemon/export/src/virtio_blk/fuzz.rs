//! Entries for fuzzers: total functions of what a guest leaves in its memory. They panic only if an invariant is broken.

use super::inflight::{Inflight, queue_len};
use super::request::{self, Command, Limits};
use super::ring::{MAX_SIZE, Ring, RingAddresses, RingFeatures};
use buf::{GuestMemory, Mapping, Region};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

/// Bytes of the guest's memory.
const MEMORY: u64 = 64 << 10;
const GUEST: u64 = 0x1000;
const SIZE: u16 = 32;

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

/// A virtqueue of 32 entries in memory that starts with `bytes`: descriptors, available ring, used ring, anything.
///
/// # Panics
/// A request is not what a guest may ask for, or reaches beyond its buffers.
pub fn fuzz_virtqueue(bytes: &[u8]) {
    WORLD.with(|guest| {
        for (indirect, event_idx, writable) in [(true, true, true), (false, false, false)] {
            guest.fill(bytes);
            let at = RingAddresses { descriptors: GUEST, available: GUEST + 512, used: GUEST + 1024, log: None };
            let features = RingFeatures { indirect, event_idx };
            let Ok(mut ring) = Ring::new(&guest.memory, &at, SIZE, 0, features) else { unreachable!("it lies there") };
            let limits = Limits { writable, block_size: 512 };
            for turn in 0..2 * SIZE {
                let Ok(Some(head)) = ring.pop() else { break };
                let Ok(chain) = ring.collect(head) else { break };
                let Ok(request) = request::parse(&mut ring, chain, limits) else { break };
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
                ring.push(chain.head, 1);
                if turn % 3 == 0 {
                    ring.publish();
                    ring.listen();
                }
            }
            assert!(ring.unpublished() <= 2 * SIZE);
        }
    });
}

/// An inflight region with `bytes` in it, found by a daemon that takes over.
///
/// # Panics
/// It names a request twice, or one that cannot be.
pub fn fuzz_inflight(bytes: &[u8]) {
    WORLD.with(|guest| {
        guest.fill(bytes);
        assert!(queue_len(SIZE) < guest.map.len());
        let Some(mut inflight) = Inflight::new(&guest.map, 0, 0, SIZE) else { unreachable!("there is room") };
        let used = bytes.last().map_or(0, |byte| u16::from(*byte));
        if let Ok(Some(resume)) = inflight.resume(used) {
            assert_eq!(usize::from(resume.base.wrapping_sub(used)), resume.heads.len());
            let mut heads = resume.heads.clone();
            heads.sort_unstable();
            heads.dedup();
            assert!(heads.len() == resume.heads.len() && heads.iter().all(|head| *head < SIZE));
            for head in resume.heads {
                inflight.started(head);
                inflight.done(head);
                inflight.published(&[head], used.wrapping_add(1));
            }
        }
    });
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
    }
}
