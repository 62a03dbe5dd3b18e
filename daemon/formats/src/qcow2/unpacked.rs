//! The last compressed clusters that were read, unpacked: requests are often smaller than a cluster, and follow each other.
//!
//! A cluster is unpacked once, however many requests ask for it at a time. What is kept is named by where it is in the
//! image, and must be forgotten before that place is given away.

use super::bytes::us;
use super::image::lock;
use block::IoResult;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use tokio::sync::OnceCell;

/// Bytes to keep; two clusters at least are kept.
const KEEP: u64 = 4 << 20;

#[derive(Debug)]
struct Slot {
    /// Where the compressed data begins in the image.
    at: u64,
    /// Its length at most.
    len: u64,
    bytes: OnceCell<Vec<u8>>,
}

/// See the module.
#[derive(Debug)]
pub struct Unpacked {
    capacity: usize,
    /// Most recently used last. Never across an await.
    slots: Mutex<VecDeque<Arc<Slot>>>,
    /// What held clusters that are not kept any more, for others; no more than are kept. Never across an await, taken after
    /// `slots`.
    spare: Mutex<Vec<Vec<u8>>>,
}

impl Unpacked {
    /// Keeps what is good for an image with clusters of that many bytes.
    pub fn new(cluster: u64) -> Self {
        Self { capacity: us(KEEP / cluster.max(KEEP / 64)).max(2), slots: Mutex::default(), spare: Mutex::default() }
    }

    /// Has `look` see the unpacked bytes of the data at `at`, which `unpack` makes if they are not there.
    ///
    /// # Errors
    /// Those of `unpack`.
    pub async fn look<F: Future<Output = IoResult<Vec<u8>>>>(
        &self,
        at: u64,
        len: u64,
        unpack: impl FnOnce() -> F,
        look: impl FnOnce(&[u8]),
    ) -> IoResult {
        let slot = self.slot(at, len);
        look(slot.bytes.get_or_try_init(unpack).await?);
        Ok(())
    }

    /// Memory for a cluster, of any length, with any bytes in it.
    pub fn room(&self) -> Vec<u8> {
        lock(&self.spare).pop().unwrap_or_default()
    }

    /// Keeps the memory of a slot that was taken out, unless somebody looks at it still.
    fn give_up(&self, slot: Arc<Slot>) {
        let mut spare = lock(&self.spare);
        if spare.len() < self.capacity {
            spare.extend(Arc::into_inner(slot).and_then(|slot| slot.bytes.into_inner()));
        }
    }

    fn slot(&self, at: u64, len: u64) -> Arc<Slot> {
        let mut slots = lock(&self.slots);
        let found = slots.iter().rposition(|slot| slot.at == at && slot.len == len);
        let slot = match found.and_then(|index| slots.remove(index)) {
            Some(slot) => slot,
            None => {
                if slots.len() >= self.capacity
                    && let Some(oldest) = slots.pop_front()
                {
                    self.give_up(oldest);
                }
                Arc::new(Slot { at, len, bytes: OnceCell::new() })
            }
        };
        slots.push_back(Arc::clone(&slot));
        slot
    }

    /// Forgets what lies in `range` of the image. No request that knows of it is left.
    pub fn forget(&self, range: &Range<u64>) {
        lock(&self.slots).retain(|slot| slot.at + slot.len <= range.start || range.end <= slot.at);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use block::Errno;

    fn at(kept: &Unpacked, at: u64, unpack: IoResult<u8>) -> IoResult<Option<u8>> {
        let mut seen = None;
        let runtime = tokio::runtime::Builder::new_current_thread().build().map_err(|_| Errno::ENOMEM)?;
        let made = kept.look(at, 512, || async move { Ok(vec![unpack?]) }, |bytes| seen = bytes.first().copied());
        runtime.block_on(made)?;
        Ok(seen)
    }

    #[test]
    fn keeps_what_was_used_last() {
        let kept = Unpacked::new(2 << 20);
        assert_eq!(at(&kept, 0, Ok(1)), Ok(Some(1)));
        assert_eq!(at(&kept, 512, Ok(2)), Ok(Some(2)));
        assert_eq!(at(&kept, 0, Ok(9)), Ok(Some(1)), "still there");
        assert_eq!(at(&kept, 1024, Ok(3)), Ok(Some(3)));
        assert_eq!(at(&kept, 0, Ok(9)), Ok(Some(1)), "used after the other one");
        assert_eq!(at(&kept, 512, Ok(9)), Ok(Some(9)), "made again");
    }

    #[test]
    fn memory_is_used_again_but_not_hoarded() {
        let kept = Unpacked::new(2 << 20);
        for place in 0..4 {
            assert_eq!(at(&kept, place * 512, Ok(7)), Ok(Some(7)));
        }
        assert_eq!(kept.room(), [7]);
        for place in 4..20 {
            assert_eq!(at(&kept, place * 512, Ok(8)), Ok(Some(8)));
        }
        assert_eq!(lock(&kept.spare).len(), 2);
        // Somebody looks at this one, so it stays his.
        let seen = kept.slot(0, 512);
        lock(&kept.spare).clear();
        for place in 20..22 {
            assert_eq!(at(&kept, place * 512, Ok(9)), Ok(Some(9)));
        }
        assert_eq!(lock(&kept.spare).len(), 1);
        drop(seen);
    }

    #[test]
    fn forgets_what_is_given_away() {
        let kept = Unpacked::new(65536);
        for place in [0, 512, 1024] {
            assert_eq!(at(&kept, place, Ok(1)), Ok(Some(1)));
        }
        kept.forget(&(600..1024));
        assert_eq!(at(&kept, 0, Ok(2)), Ok(Some(1)));
        assert_eq!(at(&kept, 512, Ok(2)), Ok(Some(2)));
        assert_eq!(at(&kept, 1024, Ok(2)), Ok(Some(1)));
    }

    #[test]
    fn a_failure_is_not_kept() {
        let kept = Unpacked::new(65536);
        assert_eq!(at(&kept, 0, Err(Errno::EIO)), Err(Errno::EIO));
        assert_eq!(at(&kept, 0, Ok(1)), Ok(Some(1)));
        assert_eq!(lock(&kept.slots).len(), 1);
    }
}
