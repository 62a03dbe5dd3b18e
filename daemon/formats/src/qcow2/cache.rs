//! A cache of metadata: slices of L2 tables, or refcount blocks. Shared by all threads.
//!
//! A block is loaded once, however many requests ask for it; the lock of its bytes is held for the look at them or the
//! change, never across an await. Dirty blocks stay until the flush code has written them; clean ones go when the cache is
//! over its size: a hand goes round over them and takes those that nobody has used since it last came by, so that neither a
//! hit nor a miss costs more in a large cache. Whoever changes a block must do it in the one that is in the cache, so a block
//! that has gone refuses changes and the caller loads it again.
//!
//! Of a dirty block two things are known: which version of it is in the file for good, and which one the host has been given, so
//! that it stays when this process dies (see `handover`).
//!
//! Locks are taken in the order table, block, list of dirty blocks.

use super::bytes::u64_of;
use block::{BlkdebugEvent, Edge, IoResult};
use buf::IoBuf;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use tokio::sync::OnceCell;

/// Bytes of a page of the host.
const PAGE: usize = 4096;

#[derive(Debug)]
struct State {
    bytes: Vec<u8>,
    /// Counts changes.
    version: u64,
    /// The last version that is in the file for good.
    written: u64,
    /// The last version that has been given to the host: this process may die.
    handed: u64,
    /// The bytes that have changed since.
    unhanded: Range<usize>,
    /// One bit for each eight bytes: some of them are not zero. Made when it is asked for, until the bytes change.
    marks: OnceLock<Vec<u64>>,
    gone: bool,
}

impl State {
    fn new(bytes: Vec<u8>, version: u64) -> Self {
        let unhanded = if version > 0 { 0..bytes.len() } else { 0..0 };
        Self { bytes, version, written: 0, handed: 0, unhanded, marks: OnceLock::new(), gone: false }
    }

    fn marks(&self) -> &[u64] {
        self.marks.get_or_init(|| {
            let bits = |words: &[u8]| (0..).zip(words.chunks(8)).fold(0, |bits, (bit, word)| bits | mark(bit, word));
            self.bytes.chunks(8 * 64).map(bits).collect()
        })
    }
}

/// The bit for eight bytes.
fn mark(bit: u32, word: &[u8]) -> u64 {
    u64::from(word.iter().any(|byte| *byte != 0)) << bit
}

/// A run of metadata bytes.
#[derive(Debug)]
pub struct Block {
    at: u64,
    /// Guards the bytes; never across an await.
    state: OnceCell<RwLock<State>>,
    /// Since the hand last came by.
    used: AtomicBool,
}

impl Block {
    fn new(at: u64, state: Option<State>) -> Arc<Self> {
        Arc::new(Self { at, state: OnceCell::new_with(state.map(RwLock::new)), used: AtomicBool::new(true) })
    }

    fn loaded(&self) -> Option<RwLockReadGuard<'_, State>> {
        self.state.get().map(|state| state.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn loaded_mut(&self) -> Option<RwLockWriteGuard<'_, State>> {
        self.state.get().map(|state| state.write().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether the host has the block as it is now, stable or not.
    pub fn is_handed(&self) -> bool {
        self.loaded().is_none_or(|state| state.version == state.handed)
    }

    /// Looks at the bytes.
    pub fn look<R>(&self, look: impl FnOnce(&[u8]) -> R) -> R {
        match self.loaded() {
            Some(state) => look(&state.bytes),
            None => look(&[]),
        }
    }

    /// Whether the eight bytes at each of `words` are zero, counted in such words. For many such questions between changes: it is
    /// answered from one bit for each, which the processor still has when the block itself would have to come from memory.
    pub fn is_zero(&self, mut words: Range<usize>) -> bool {
        let Some(state) = self.loaded() else { return false };
        let marks = state.marks();
        words.all(|word| marks.get(word / 64).is_some_and(|bits| bits >> (word % 64) & 1 == 0))
    }
}

/// A copy of a dirty block, or a piece of it, to be written.
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
    unit: AtomicUsize,
    /// What is about to happen when a block is read.
    load: BlkdebugEvent,
    /// Blocks to keep.
    capacity: AtomicUsize,
    /// Guards the table; never across an await.
    table: RwLock<Table>,
    /// Guards the lists of blocks that have to be written; never across an await.
    dirty: Mutex<Dirty>,
    /// How many have to be written for good.
    dirty_count: AtomicUsize,
    /// How many the host does not have.
    unhanded_count: AtomicUsize,
    /// Room was needed when most of the cache was dirty.
    short: AtomicBool,
}

/// Blocks by their place.
#[derive(Debug, Default)]
struct Dirty {
    /// Those that are not in the file for good.
    unwritten: BTreeMap<u64, Arc<Block>>,
    /// Those that the host does not have.
    unhanded: BTreeMap<u64, Arc<Block>>,
}

#[derive(Debug, Default)]
struct Table {
    map: HashMap<u64, Arc<Block>>,
    /// All blocks of the map, and some that have gone, as the hand comes by them.
    round: VecDeque<Arc<Block>>,
}

impl Table {
    fn insert(&mut self, block: &Arc<Block>) {
        self.map.insert(block.at, Arc::clone(block));
        self.round.push_back(Arc::clone(block));
        // What was forgotten stays in the round until the hand comes by, which it may never do.
        if self.round.len() > 2 * self.map.len() + 16 {
            let map = &self.map;
            self.round.retain(|block| map.get(&block.at).is_some_and(|there| Arc::ptr_eq(there, block)));
        }
    }

    /// Takes clean blocks out while there are as many as `capacity`, or more.
    fn make_room(&mut self, capacity: usize) {
        // Twice round: the first time may only take marks away.
        let mut steps = 2 * self.round.len();
        while steps > 0 && self.map.len() >= capacity {
            steps -= 1;
            let Some(block) = self.round.pop_front() else { return };
            if !self.map.get(&block.at).is_some_and(|there| Arc::ptr_eq(there, &block)) {
                continue;
            }
            let keep = match block.state.get() {
                Some(_) => block.used.swap(false, Ordering::Relaxed),
                // Being loaded, unless that has failed and nobody waits for it any more: then only these two are left.
                None => Arc::strong_count(&block) > 2,
            };
            if keep || !self.take_out(block.at, false) {
                self.round.push_back(block);
            }
        }
    }

    /// Takes the block at `at` out; a dirty one only if it is to be forgotten.
    fn take_out(&mut self, at: u64, dirty_too: bool) -> bool {
        let Some(block) = self.map.get(&at) else { return false };
        if let Some(mut state) = block.loaded_mut() {
            if state.version != state.written && !dirty_too {
                return false;
            }
            state.gone = true;
        }
        self.map.remove(&at);
        true
    }
}

/// Blocks in a cache of `bytes` bytes, two at least.
fn capacity(bytes: u64, unit: usize) -> usize {
    usize::try_from(bytes / u64_of(unit).max(1)).unwrap_or(usize::MAX).max(2)
}

impl Cache {
    /// A cache of `bytes` bytes in blocks of `unit` bytes, two at least. `load` is raised on the file before one is read.
    pub fn new(bytes: u64, unit: usize, load: BlkdebugEvent) -> Self {
        Self {
            unit: AtomicUsize::new(unit),
            load,
            capacity: AtomicUsize::new(capacity(bytes, unit)),
            table: RwLock::default(),
            dirty: Mutex::default(),
            dirty_count: AtomicUsize::new(0),
            unhanded_count: AtomicUsize::new(0),
            short: AtomicBool::new(false),
        }
    }

    /// Bytes of a block.
    pub fn unit(&self) -> usize {
        self.unit.load(Ordering::Relaxed)
    }

    fn capacity(&self) -> usize {
        self.capacity.load(Ordering::Relaxed)
    }

    /// Becomes a cache of `bytes` bytes in blocks of `unit` bytes, and empty. Nothing in it is dirty, nobody uses it.
    pub fn reshape(&self, bytes: u64, unit: usize) {
        self.clear();
        self.unit.store(unit, Ordering::Relaxed);
        self.capacity.store(capacity(bytes, unit), Ordering::Relaxed);
    }

    /// Takes out what is clean and has not been used since the last call.
    pub fn clean(&self) {
        let mut table = self.table_mut();
        let idle = |block: &&Arc<Block>| block.state.initialized() && !block.used.swap(false, Ordering::Relaxed);
        let idle: Vec<u64> = table.map.values().filter(idle).map(|block| block.at).collect();
        for at in idle {
            table.take_out(at, false);
        }
        // Blocks in the round would keep their bytes.
        let Table { map, round } = &mut *table;
        round.retain(|block| map.get(&block.at).is_some_and(|there| Arc::ptr_eq(there, block)));
        map.shrink_to_fit();
    }

    /// Bytes of metadata in memory.
    #[cfg(test)]
    fn bytes(&self) -> usize {
        self.table().map.len() * self.unit()
    }

    fn table(&self) -> RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn table_mut(&self) -> RwLockWriteGuard<'_, Table> {
        self.table.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the lists.
    fn with_lists<R>(&self, change: impl FnOnce(&mut Dirty) -> R) -> R {
        let mut dirty = self.dirty.lock().unwrap_or_else(PoisonError::into_inner);
        let result = change(&mut dirty);
        self.dirty_count.store(dirty.unwritten.len(), Ordering::Release);
        self.unhanded_count.store(dirty.unhanded.len(), Ordering::Release);
        result
    }

    /// Notes that a block has become dirty, while its bytes are locked or nobody else knows it.
    fn list(&self, block: &Arc<Block>) {
        self.with_lists(|lists| {
            lists.unwritten.insert(block.at, Arc::clone(block));
            lists.unhanded.insert(block.at, Arc::clone(block));
        });
    }

    /// Notes that the block at `at` is dirty no more, while its bytes are locked or it has gone.
    fn unlist(&self, at: u64) {
        self.with_lists(|lists| {
            lists.unwritten.remove(&at);
            lists.unhanded.remove(&at);
        });
    }

    /// The block at `at` if it is there.
    pub fn peek(&self, at: u64) -> Option<Arc<Block>> {
        self.peek_with(at, Arc::clone)
    }

    /// What `look` says of the block at `at`, if that is there. The table stays locked meanwhile.
    pub fn peek_with<R>(&self, at: u64, look: impl FnOnce(&Arc<Block>) -> R) -> Option<R> {
        let table = self.table();
        let block = table.map.get(&at).filter(|block| block.state.initialized())?;
        // Reading first keeps the line of a block that all use in all caches.
        if !block.used.load(Ordering::Relaxed) {
            block.used.store(true, Ordering::Relaxed);
        }
        Some(look(block))
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
            let mut table = self.table_mut();
            match table.map.get(&at) {
                Some(block) => Arc::clone(block),
                None => {
                    self.make_room(&mut table);
                    let block = Block::new(at, None);
                    table.insert(&block);
                    block
                }
            }
        };
        block
            .state
            .get_or_try_init(|| async {
                let buf = IoBuf::alloc(self.unit());
                file.raise(self.load);
                file.read(at, &buf).await?;
                Ok(RwLock::new(State::new(buf.to_vec(), 0)))
            })
            .await?;
        Ok(block)
    }

    fn make_room(&self, table: &mut Table) {
        if table.map.len() >= self.capacity() {
            if self.dirty() > self.capacity() / 2 {
                self.short.store(true, Ordering::Relaxed);
            }
            table.make_room(self.capacity());
        }
    }

    /// Puts a new block in, to be written.
    pub fn put(&self, at: u64, bytes: Vec<u8>) {
        let block = Block::new(at, Some(State::new(bytes, 1)));
        let mut table = self.table_mut();
        self.forget_one(&mut table, at);
        self.make_room(&mut table);
        self.list(&block);
        table.insert(&block);
    }

    fn forget_one(&self, table: &mut Table, at: u64) {
        if table.take_out(at, true) {
            self.unlist(at);
        }
    }

    /// Forgets all blocks in `range`: the bytes are somebody else's now.
    pub fn forget(&self, range: Range<u64>) {
        let mut table = self.table_mut();
        for at in range.step_by(self.unit().max(1)) {
            self.forget_one(&mut table, at);
        }
    }

    /// Forgets all blocks.
    pub fn clear(&self) {
        let mut table = self.table_mut();
        let all: Vec<u64> = table.map.keys().copied().collect();
        for at in all {
            self.forget_one(&mut table, at);
        }
    }

    /// Changes a block; none if it has gone from the cache and must be loaded again.
    pub fn change<R>(&self, block: &Arc<Block>, change: impl FnOnce(&mut Vec<u8>) -> R) -> Option<R> {
        self.change_part(block, 0..self.unit(), change)
    }

    /// Changes `part` of a block and nothing else; none if it has gone from the cache and must be loaded again.
    pub fn change_part<R>(
        &self,
        block: &Arc<Block>,
        part: Range<usize>,
        change: impl FnOnce(&mut Vec<u8>) -> R,
    ) -> Option<R> {
        let mut state = block.loaded_mut()?;
        if state.gone {
            return None;
        }
        let result = change(&mut state.bytes);
        state.marks.take();
        if state.version == state.written || state.version == state.handed {
            self.list(block);
        }
        let before = &state.unhanded;
        state.unhanded = if before.is_empty() { part } else { before.start.min(part.start)..before.end.max(part.end) };
        state.version += 1;
        Some(result)
    }

    /// Blocks that have to be written.
    pub fn dirty(&self) -> usize {
        self.dirty_count.load(Ordering::Acquire)
    }

    /// Whether dirty blocks should be written, because others need their room.
    pub fn is_crowded(&self) -> bool {
        self.short.load(Ordering::Relaxed) && self.dirty() > self.capacity() / 2
    }

    /// Whether only dirty blocks are left, so that the cache grows beyond its size.
    pub fn is_full(&self) -> bool {
        self.is_crowded() && self.dirty() >= self.capacity()
    }

    /// Copies of all dirty blocks, in the order of the file.
    pub fn dirty_copies(&self) -> Vec<Copy> {
        if self.dirty() == 0 {
            return Vec::new();
        }
        self.short.store(false, Ordering::Relaxed);
        let blocks: Vec<_> = self.with_lists(|lists| lists.unwritten.values().cloned().collect());
        let copy = |block: Arc<Block>| {
            let state = block.loaded()?;
            if state.version == state.written || state.gone {
                return None;
            }
            let (at, bytes, version) = (block.at, state.bytes.clone(), state.version);
            drop(state);
            Some(Copy { block, at, bytes, version })
        };
        blocks.into_iter().filter_map(copy).collect()
    }

    /// Whether the host has all blocks as they are.
    pub fn is_handed(&self) -> bool {
        self.unhanded_count.load(Ordering::Acquire) == 0
    }

    /// Copies of what the host does not have, in the order of the file: whole pages, as nothing smaller is written faster.
    pub fn unhanded_copies(&self) -> Vec<Copy> {
        let blocks: Vec<_> = self.with_lists(|lists| lists.unhanded.values().cloned().collect());
        let copy = |block: Arc<Block>| {
            let state = block.loaded()?;
            if state.version == state.handed || state.gone {
                return None;
            }
            let start = state.unhanded.start / PAGE * PAGE;
            let end = state.unhanded.end.next_multiple_of(PAGE).min(state.bytes.len());
            let (at, version) = (block.at + u64_of(start), state.version);
            let bytes = state.bytes.get(start..end)?.to_vec();
            drop(state);
            Some(Copy { block, at, bytes, version })
        };
        blocks.into_iter().filter_map(copy).collect()
    }

    /// The copy has been written, stable or not.
    pub fn handed(&self, copy: &Copy) {
        let Some(mut state) = copy.block.loaded_mut() else { return };
        if !state.gone && state.handed < copy.version {
            state.handed = copy.version;
            if state.version == state.handed {
                state.unhanded = 0..0;
                self.with_lists(|lists| lists.unhanded.remove(&copy.block.at));
            }
        }
    }

    /// The copy is in the file for good.
    pub fn written(&self, copy: &Copy) {
        self.handed(copy);
        if let Some(mut state) = copy.block.loaded_mut()
            && !state.gone
        {
            state.written = copy.version;
            if state.version == state.written {
                self.unlist(copy.at);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache_of(blocks: u64) -> Cache {
        let cache = Cache::new(blocks * 512, 512, BlkdebugEvent::L2Load);
        for i in 0..100 {
            cache.put(i * 512, vec![0; 512]);
            cache.dirty_copies().iter().for_each(|copy| cache.written(copy));
        }
        cache
    }

    #[test]
    fn what_is_zero_is_known_of_each_word_after_each_change() {
        let cache = Cache::new(1 << 20, 4096, BlkdebugEvent::L2Load);
        cache.put(0, vec![0; 4096]);
        let block = cache.peek(0).unwrap();
        assert!(block.is_zero(0..512));
        // The first and the last byte of a word, in the first and the last word of 64.
        for byte in [504, 511, 512, 4095, 0] {
            cache.change(&block, |bytes| bytes[byte] = 1).unwrap();
            for word in 0..512 {
                assert_eq!(block.is_zero(word..word + 1), word != byte / 8, "byte {byte}, word {word}");
            }
            assert!(!block.is_zero(0..512));
            assert!(block.is_zero(0..byte / 8) && block.is_zero(byte / 8 + 1..512));
            cache.change(&block, |bytes| bytes[byte] = 0).unwrap();
        }
        assert!(!block.is_zero(511..513), "what is not there is not zero");
    }

    #[test]
    fn memory_is_as_configured() {
        for blocks in [2, 10, 64] {
            let cache = cache_of(blocks);
            assert_eq!(u64_of(cache.bytes()), blocks * 512);
        }
    }

    #[test]
    fn what_the_host_has_is_not_given_again() {
        let cache = Cache::new(1 << 20, 64 << 10, BlkdebugEvent::L2Load);
        cache.put(0, vec![0; 64 << 10]);
        let all = cache.unhanded_copies();
        assert_eq!((all[0].at, all[0].bytes.len()), (0, 64 << 10), "a new block");
        let block = cache.peek(0).unwrap();
        let put = |at: usize| cache.change_part(&block, at..at + 8, |bytes| bytes[at] = 7).unwrap();
        put(5000);
        cache.handed(&all[0]);
        assert!(!cache.is_handed() && !block.is_handed(), "it has changed since the copy");
        cache.unhanded_copies().iter().for_each(|copy| cache.handed(copy));
        assert!(cache.is_handed() && cache.dirty() == 1);
        put(9000);
        put(13000);
        let part = cache.unhanded_copies();
        assert_eq!((part[0].at, part[0].bytes.len(), part[0].bytes[9000 - 8192]), (8192, 8192, 7));
        cache.dirty_copies().iter().for_each(|copy| cache.written(copy));
        assert!(cache.is_handed() && cache.dirty() == 0);
        cache.handed(&part[0]);
        put(0);
        assert!(!cache.is_handed());
        cache.forget(0..64 << 10);
        assert!(cache.is_handed(), "forgotten");
    }

    #[test]
    fn what_nobody_uses_is_cleaned_away() {
        let cache = cache_of(50);
        cache.put(0, vec![1; 512]);
        let all = (0..100).filter(|i| cache.peek(i * 512).is_some()).count();
        assert_eq!(all, 50);
        // The first time only takes notice.
        cache.clean();
        assert_eq!(cache.bytes(), 50 * 512);
        let used = cache.peek(99 * 512).unwrap();
        cache.clean();
        assert_eq!(cache.bytes(), 2 * 512, "what is used, and what is dirty");
        assert_eq!(cache.dirty(), 1);
        drop(used);
        cache.reshape(4 << 10, 1024);
        assert_eq!((cache.bytes(), cache.unit()), (0, 1024));
    }
}
