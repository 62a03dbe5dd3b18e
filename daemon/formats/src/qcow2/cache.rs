//! A cache of metadata: slices of L2 tables, or refcount blocks. Shared by all threads.
//!
//! A block is loaded once, however many requests ask for it; the lock of its bytes is held for the look at them or the
//! change, never across an await. Dirty blocks stay until the flush code has written them; clean ones go, least recently
//! used first, when the cache is over its size. Whoever changes a block must do it in the one that is in the cache, so a
//! block that has gone refuses changes and the caller loads it again.

use super::bytes::u64_of;
use block::{Edge, IoResult};
use buf::IoBuf;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use tokio::sync::OnceCell;

#[derive(Debug)]
struct State {
    bytes: Vec<u8>,
    /// Counts changes.
    version: u64,
    /// The last version that is in the file.
    written: u64,
    gone: bool,
}

/// A run of metadata bytes.
#[derive(Debug)]
pub struct Block {
    at: u64,
    /// Guards the bytes; never across an await.
    state: OnceCell<RwLock<State>>,
    used: AtomicU64,
}

impl Block {
    fn loaded(&self) -> Option<RwLockReadGuard<'_, State>> {
        self.state.get().map(|state| state.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn loaded_mut(&self) -> Option<RwLockWriteGuard<'_, State>> {
        self.state.get().map(|state| state.write().unwrap_or_else(PoisonError::into_inner))
    }

    /// Looks at the bytes.
    pub fn look<R>(&self, look: impl FnOnce(&[u8]) -> R) -> R {
        match self.loaded() {
            Some(state) => look(&state.bytes),
            None => look(&[]),
        }
    }

    fn is_dirty(&self) -> bool {
        self.loaded().is_some_and(|state| state.version != state.written)
    }
}

/// A copy of a dirty block, to be written.
#[derive(Debug)]
pub struct Copy {
    block: Arc<Block>,
    /// Where it goes.
    pub at: u64,
    /// The bytes.
    pub bytes: Vec<u8>,
    version: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Cache {
    /// Bytes of a block.
    unit: usize,
    /// Blocks to keep.
    capacity: usize,
    /// Guards the table; never across an await.
    map: RwLock<HashMap<u64, Arc<Block>>>,
    clock: AtomicU64,
    dirty: AtomicUsize,
}

impl Cache {
    /// A cache of `bytes` bytes in blocks of `unit` bytes, two at least.
    pub fn new(bytes: u64, unit: usize) -> Self {
        let capacity = usize::try_from(bytes / u64_of(unit).max(1)).unwrap_or(usize::MAX).max(2);
        Self { unit, capacity, map: RwLock::default(), clock: AtomicU64::new(0), dirty: AtomicUsize::new(0) }
    }

    /// Bytes of a block.
    pub fn unit(&self) -> usize {
        self.unit
    }

    fn map(&self) -> RwLockReadGuard<'_, HashMap<u64, Arc<Block>>> {
        self.map.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn map_mut(&self) -> RwLockWriteGuard<'_, HashMap<u64, Arc<Block>>> {
        self.map.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The block at `at` if it is there.
    pub fn peek(&self, at: u64) -> Option<Arc<Block>> {
        let map = self.map();
        let block = map.get(&at).filter(|block| block.state.initialized())?;
        block.used.store(self.clock.fetch_add(1, Ordering::Relaxed), Ordering::Relaxed);
        Some(Arc::clone(block))
    }

    /// The block at `at`, read from `file` unless it is there.
    ///
    /// # Errors
    /// The errno of the read.
    pub async fn get(&self, at: u64, file: &Edge) -> IoResult<Arc<Block>> {
        if let Some(block) = self.peek(at) {
            return Ok(block);
        }
        let block = {
            let mut map = self.map_mut();
            self.make_room(&mut map);
            let used = AtomicU64::new(self.clock.fetch_add(1, Ordering::Relaxed));
            Arc::clone(map.entry(at).or_insert_with(|| Arc::new(Block { at, state: OnceCell::new(), used })))
        };
        block
            .state
            .get_or_try_init(|| async {
                let buf = IoBuf::alloc(self.unit);
                file.read(at, &buf).await?;
                Ok(RwLock::new(State { bytes: buf.to_vec(), version: 0, written: 0, gone: false }))
            })
            .await?;
        Ok(block)
    }

    /// Takes clean blocks out while there are too many.
    fn make_room(&self, map: &mut HashMap<u64, Arc<Block>>) {
        while map.len() >= self.capacity {
            let idle = |block: &Arc<Block>| match block.state.get() {
                Some(_) => !block.is_dirty(),
                // Being loaded, unless that has failed and nobody waits for it any more.
                None => Arc::strong_count(block) == 1,
            };
            let oldest = map.values().filter(|b| idle(b)).min_by_key(|b| b.used.load(Ordering::Relaxed)).map(|b| b.at);
            let Some(at) = oldest else { return };
            if !Self::take_out(map, at, false) {
                return;
            }
        }
    }

    /// Takes the block at `at` out; a dirty one only if it is to be forgotten.
    fn take_out(map: &mut HashMap<u64, Arc<Block>>, at: u64, dirty_too: bool) -> bool {
        let Some(block) = map.get(&at) else { return false };
        if let Some(mut state) = block.loaded_mut() {
            if state.version != state.written && !dirty_too {
                return false;
            }
            state.gone = true;
        }
        map.remove(&at);
        true
    }

    /// Puts a new block in, to be written.
    pub fn put(&self, at: u64, bytes: Vec<u8>) {
        let state = State { bytes, version: 1, written: 0, gone: false };
        let used = AtomicU64::new(self.clock.fetch_add(1, Ordering::Relaxed));
        let block = Arc::new(Block { at, state: OnceCell::new_with(Some(RwLock::new(state))), used });
        let mut map = self.map_mut();
        self.forget_one(&mut map, at);
        map.insert(at, block);
        self.dirty.fetch_add(1, Ordering::AcqRel);
    }

    fn forget_one(&self, map: &mut HashMap<u64, Arc<Block>>, at: u64) {
        if map.get(&at).is_some_and(|block| block.is_dirty()) {
            self.dirty.fetch_sub(1, Ordering::AcqRel);
        }
        Self::take_out(map, at, true);
    }

    /// Forgets all blocks in `range`: the bytes are somebody else's now.
    pub fn forget(&self, range: Range<u64>) {
        let mut map = self.map_mut();
        for at in range.step_by(self.unit.max(1)) {
            self.forget_one(&mut map, at);
        }
    }

    /// Forgets all blocks.
    pub fn clear(&self) {
        let mut map = self.map_mut();
        let all: Vec<u64> = map.keys().copied().collect();
        for at in all {
            self.forget_one(&mut map, at);
        }
    }

    /// Changes a block; none if it has gone from the cache and must be loaded again.
    pub fn change<R>(&self, block: &Block, change: impl FnOnce(&mut Vec<u8>) -> R) -> Option<R> {
        let mut state = block.loaded_mut()?;
        if state.gone {
            return None;
        }
        let result = change(&mut state.bytes);
        if state.version == state.written {
            self.dirty.fetch_add(1, Ordering::AcqRel);
        }
        state.version += 1;
        Some(result)
    }

    /// Blocks that have to be written.
    pub fn dirty(&self) -> usize {
        self.dirty.load(Ordering::Acquire)
    }

    /// Whether so much of the cache is dirty that it should be written.
    pub fn is_crowded(&self) -> bool {
        self.dirty() > (self.capacity / 2).max(1)
    }

    /// Copies of all dirty blocks, in the order of the file.
    pub fn dirty_copies(&self) -> Vec<Copy> {
        if self.dirty() == 0 {
            return Vec::new();
        }
        let blocks: Vec<_> = self.map().values().cloned().collect();
        let mut copies: Vec<_> = blocks
            .into_iter()
            .filter_map(|block| {
                let state = block.loaded()?;
                if state.version == state.written || state.gone {
                    return None;
                }
                let (at, bytes, version) = (block.at, state.bytes.clone(), state.version);
                drop(state);
                Some(Copy { block, at, bytes, version })
            })
            .collect();
        copies.sort_by_key(|copy| copy.at);
        copies
    }

    /// The copy is in the file.
    pub fn written(&self, copy: &Copy) {
        if let Some(mut state) = copy.block.loaded_mut()
            && !state.gone
        {
            state.written = copy.version;
            if state.version == state.written {
                self.dirty.fetch_sub(1, Ordering::AcqRel);
            }
        }
    }
}
