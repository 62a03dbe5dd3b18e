//! Refcounts [qcow2 §Host cluster management]: who uses which cluster of the image file, and which are free.
//!
//! Owns the refcount table and the cache of refcount blocks. In memory a count is never lower than the number of users
//! that the image has now or may have after a crash: it rises before a reference is made, and falls (see the flush code)
//! only when the last reference is gone for good. So blocks may be written at any time, and a crash leaks at most.

use super::bytes::{be16, be32, be64, put32, put64, u64_of, us};
use super::cache::{Block, Cache};
use block::{BlkdebugEvent, Edge, Errno, IoResult};
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes of the pieces in which tables are written.
pub const SECTOR: u64 = 512;

/// The refcount table.
#[derive(Debug, Default)]
struct Table {
    /// Offsets of blocks; 0 where there is none.
    entries: Vec<u64>,
    /// Where the table is, in bytes.
    at: u64,
    /// Sectors of it that have to be written.
    dirty: BTreeSet<u64>,
    /// The clusters of the table that the header names.
    saved: Range<u64>,
    /// The table has outgrown its place and is to be written anew, at `at`.
    moved: bool,
    /// No cluster below this one is free.
    first_free: u64,
    /// Where the rest of a cluster is that compressed data have begun to fill, in bytes; 0 if there is none. The cluster has
    /// a reference: it is forgotten with the last one.
    rest: u64,
}

impl Table {
    fn read(cluster_bits: u32, at: u64, table: &[u8]) -> Self {
        let entries = table.chunks_exact(8).map(|b| be64(b, 0) & !0x1ff).collect();
        let first = at >> cluster_bits;
        let saved = first..first + (u64_of(table.len()) >> cluster_bits);
        Self { entries, at, saved, first_free: 1, ..Self::default() }
    }
}

/// What a flush has to write of the table.
#[derive(Debug, Default)]
pub struct TableCopy {
    /// Offset and bytes of pieces.
    pub pieces: Vec<(u64, Vec<u8>)>,
    sectors: BTreeSet<u64>,
    /// The table has a new place, which the header has to name.
    pub moved: bool,
    /// Where the table is, in bytes.
    pub at: u64,
    /// Length of the table in clusters.
    pub clusters: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Refcounts {
    cluster_bits: u32,
    order: u32,
    /// Guards the table and serialises allocation. Taken before the lock of a block; never across an await.
    table: Mutex<Table>,
    /// Refcount blocks, each a cluster.
    pub blocks: Arc<Cache>,
    /// See [`Refcounts::raised`].
    raised: AtomicU64,
}

/// A try at something that needs a block.
enum Try<T> {
    Done(T),
    /// This block has to be loaded first.
    Load(u64),
    /// The table has to grow to have this many entries.
    Grow(u64),
}

/// How wide a count is: log2 of its bits, 0 to 6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Width(pub u32);

impl Width {
    /// The greatest count.
    pub fn most(self) -> u64 {
        if self.0 >= 6 { u64::MAX } else { (1 << (1u32 << self.0)) - 1 }
    }

    /// The count with index `index` of a block.
    pub fn read(self, bytes: &[u8], index: u64) -> u64 {
        let i = us(index);
        match self.0 {
            6 => be64(bytes, i * 8),
            5 => be32(bytes, i * 4).into(),
            4 => be16(bytes, i * 2).into(),
            order => {
                let width = 1u32 << order;
                let bit = index << order;
                let byte = bytes.get(us(bit / 8)).copied().unwrap_or(0);
                u64::from(byte) >> (bit % 8) & ((1 << width) - 1)
            }
        }
    }

    /// Sets the count with index `index` of a block.
    pub fn write(self, bytes: &mut [u8], index: u64, value: u64) {
        let i = us(index);
        match self.0 {
            6 => put64(bytes, i * 8, value),
            5 => put32(bytes, i * 4, u32::try_from(value).unwrap_or(u32::MAX)),
            4 => {
                if let Some(place) = bytes.get_mut(i * 2..i * 2 + 2) {
                    place.copy_from_slice(&u16::try_from(value).unwrap_or(u16::MAX).to_be_bytes());
                }
            }
            order => {
                let width = 1u32 << order;
                let bit = index << order;
                let mask = u8::try_from(((1u32 << width) - 1) << (bit % 8)).unwrap_or(0);
                let value = u8::try_from(value << (bit % 8) & 0xff).unwrap_or(0);
                if let Some(place) = bytes.get_mut(us(bit / 8)) {
                    *place = *place & !mask | value & mask;
                }
            }
        }
    }
}

impl Refcounts {
    /// The refcounts with the table whose bytes are `table`, at `at`.
    pub fn new(cluster_bits: u32, order: u32, at: u64, table: &[u8], cache: u64) -> Self {
        Self {
            cluster_bits,
            order,
            table: Mutex::new(Table::read(cluster_bits, at, table)),
            blocks: Arc::new(Cache::new(cache, 1 << cluster_bits, BlkdebugEvent::RefblockLoad)),
            raised: AtomicU64::new(0),
        }
    }

    /// Forgets everything in favour of the table whose bytes are `table`, at `at`.
    pub fn read_anew(&self, at: u64, table: &[u8]) {
        *self.table() = Table::read(self.cluster_bits, at, table);
        self.blocks.clear();
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How often counts have risen. Blocks and table that are copied after this call have all those rises.
    pub fn raised(&self) -> u64 {
        self.raised.load(Ordering::Acquire)
    }

    /// Notes that a count has risen, or that the image has become longer for clusters that are counted.
    pub fn note_raised(&self) {
        self.raised.fetch_add(1, Ordering::AcqRel);
    }

    /// No cluster below this one is free.
    pub fn first_free(&self) -> u64 {
        self.table().first_free
    }

    /// Refcounts in a block.
    fn per_block(&self) -> u64 {
        1 << (self.cluster_bits + 3 - self.order)
    }

    fn read(&self, bytes: &[u8], index: u64) -> u64 {
        Width(self.order).read(bytes, index)
    }

    fn write(&self, bytes: &mut [u8], index: u64, value: u64) {
        Width(self.order).write(bytes, index, value);
    }

    /// The block with index `index` of an image whose first `clusters` clusters are used once each.
    pub fn full_block(&self, index: u64, clusters: u64) -> Vec<u8> {
        let mut bytes = vec![0; 1 << self.cluster_bits];
        for i in 0..clusters.saturating_sub(index * self.per_block()).min(self.per_block()) {
            self.write(&mut bytes, i, 1);
        }
        bytes
    }

    /// Offset of the block with index `index`, 0 if there is none.
    fn block_at(&self, table: &Table, index: u64) -> IoResult<u64> {
        let at = table.entries.get(us(index)).copied().unwrap_or(0);
        if at.is_multiple_of(1 << self.cluster_bits) { Ok(at) } else { Err(Errno::EUCLEAN) }
    }

    async fn load(&self, index: u64, file: &Edge) -> IoResult<Option<Arc<Block>>> {
        let at = self.block_at(&self.table(), index)?;
        if at == 0 { Ok(None) } else { self.blocks.get(at, file).await.map(Some) }
    }

    /// Whether a cluster has one user left, which is about to go: no compressed data join it any more.
    ///
    /// # Errors
    /// The errno of the read; `EUCLEAN` for a table that is damaged.
    pub async fn is_last(&self, cluster: u64, file: &Edge) -> IoResult<bool> {
        let block = self.load(cluster / self.per_block(), file).await?;
        let mut table = self.table();
        let count = block.map_or(0, |block| block.look(|bytes| self.read(bytes, cluster % self.per_block())));
        if count == 1 && table.rest >> self.cluster_bits == cluster {
            table.rest = 0;
        }
        Ok(count == 1)
    }

    /// The refcount of a cluster.
    ///
    /// # Errors
    /// The errno of the read; `EUCLEAN` for a table that is damaged.
    pub async fn get(&self, cluster: u64, file: &Edge) -> IoResult<u64> {
        let block = self.load(cluster / self.per_block(), file).await?;
        Ok(block.map_or(0, |block| block.look(|bytes| self.read(bytes, cluster % self.per_block()))))
    }

    /// Makes a block for the clusters from `index * per_block`, none of which has one: it takes the first of them.
    fn new_block(&self, table: &mut Table, index: u64, file: &Edge) -> IoResult {
        file.raise(BlkdebugEvent::RefblockAlloc);
        let first = index * self.per_block();
        // Clusters that are in use have a block, unless the image is damaged.
        if first == 0 {
            return Err(Errno::EUCLEAN);
        }
        let mut bytes = vec![0; 1 << self.cluster_bits];
        self.write(&mut bytes, 0, 1);
        let at = first << self.cluster_bits;
        self.blocks.put(at, bytes);
        if let Some(entry) = table.entries.get_mut(us(index)) {
            *entry = at;
        }
        table.dirty.insert(index * 8 / SECTOR);
        Ok(())
    }

    /// Claims up to `most` free clusters in a row from the first free one.
    fn try_claim(&self, most: u64, from: Option<u64>, file: &Edge) -> IoResult<Try<Range<u64>>> {
        let mut table = self.table();
        let mut cluster = from.unwrap_or(table.first_free).max(1);
        loop {
            let (index, within) = (cluster / self.per_block(), cluster % self.per_block());
            if cluster >= 1 << (56 - self.cluster_bits) {
                return Err(Errno::EFBIG);
            }
            if index >= u64_of(table.entries.len()) {
                return Ok(Try::Grow(index + 1));
            }
            let at = self.block_at(&table, index)?;
            if at == 0 {
                self.new_block(&mut table, index, file)?;
                continue;
            }
            let Some(block) = self.blocks.peek(at) else { return Ok(Try::Load(index)) };
            let free = |bytes: &[u8], i: u64| {
                let cluster = index * self.per_block() + i;
                self.read(bytes, i) == 0 && !self.in_table(&table, cluster)
            };
            let run = block.look(|bytes| {
                let start = (within..self.per_block()).find(|i| free(bytes, *i))?;
                let end = (start..self.per_block()).take(us(most)).take_while(|i| free(bytes, *i)).last()? + 1;
                Some(start..end)
            });
            let first = index * self.per_block();
            let Some(run) = run else {
                if from.is_some() {
                    return Ok(Try::Done(cluster..cluster));
                }
                cluster = first + self.per_block();
                table.first_free = cluster;
                continue;
            };
            if from.is_some_and(|from| from != first + run.start) {
                return Ok(Try::Done(cluster..cluster));
            }
            let claimed = self.blocks.change(&block, |bytes| {
                for i in run.clone() {
                    self.write(bytes, i, 1);
                }
            });
            if claimed.is_none() {
                return Ok(Try::Load(index));
            }
            if from.is_none() {
                table.first_free = first + run.end;
            }
            return Ok(Try::Done(first + run.start..first + run.end));
        }
    }

    /// Claims up to `most` free clusters in a row, at least one; their refcounts are 1 then. With `from` the first of them
    /// is that one, or the result is empty.
    ///
    /// # Errors
    /// The errno of reading a block; `EUCLEAN` for a damaged table; `EFBIG` when no more can be counted.
    pub async fn claim(&self, most: u64, from: Option<u64>, file: &Edge) -> IoResult<Range<u64>> {
        loop {
            match self.try_claim(most, from, file)? {
                Try::Done(run) => {
                    self.note_raised();
                    return Ok(run);
                }
                Try::Load(index) => drop(self.load(index, file).await?),
                Try::Grow(entries) => self.grow(entries, file)?,
            }
        }
    }

    /// The first cluster from `cluster` on that is free, or has no block to be counted in.
    async fn free_from(&self, mut cluster: u64, file: &Edge) -> IoResult<u64> {
        loop {
            let (index, within) = (cluster / self.per_block(), cluster % self.per_block());
            let Some(block) = self.load(index, file).await? else { return Ok(cluster) };
            let first = index * self.per_block();
            let table = self.table();
            let free = |bytes: &[u8], i: &u64| self.read(bytes, *i) == 0 && !self.in_table(&table, first + i);
            match block.look(|bytes| (within..self.per_block()).find(|i| free(bytes, i))) {
                Some(i) => return Ok(first + i),
                None => cluster = first + self.per_block(),
            }
        }
    }

    /// Sees to it that each of `clusters` has a block to be counted in. The blocks may lie among them.
    async fn cover(&self, clusters: Range<u64>, file: &Edge) -> IoResult {
        for index in clusters.start / self.per_block()..=(clusters.end - 1) / self.per_block() {
            loop {
                let (known, at) = {
                    let table = self.table();
                    (u64_of(table.entries.len()), self.block_at(&table, index)?)
                };
                if at != 0 {
                    break;
                }
                if index >= known {
                    self.grow(index + 1, file)?;
                    continue;
                }
                // Which may get it a block.
                let place = self.claim(1, None, file).await?.start;
                {
                    let mut table = self.table();
                    if self.block_at(&table, index)? == 0 {
                        self.blocks.put(place << self.cluster_bits, vec![0; 1 << self.cluster_bits]);
                        if let Some(entry) = table.entries.get_mut(us(index)) {
                            *entry = place << self.cluster_bits;
                        }
                        table.dirty.insert(index * 8 / SECTOR);
                        break;
                    }
                }
                self.release(place, file).await?;
            }
        }
        Ok(())
    }

    /// Claims exactly `count` clusters in a row, behind everything else in the file.
    ///
    /// # Errors
    /// As [`Refcounts::claim`].
    pub async fn claim_row(&self, count: u64, file: &Edge) -> IoResult<Range<u64>> {
        let mut start = file.size().div_ceil(1 << self.cluster_bits).max(1);
        'row: loop {
            start = self.free_from(start, file).await?;
            // A row may be longer than what one block counts: those that are new must not interrupt it.
            self.cover(start..start + count, file).await?;
            let mut end = start;
            while end < start + count {
                let run = self.claim(start + count - end, Some(end), file).await?;
                if run.is_empty() {
                    for cluster in start..end {
                        self.release(cluster, file).await?;
                    }
                    start = end + 1;
                    continue 'row;
                }
                end = run.end;
            }
            return Ok(start..end);
        }
    }

    /// Takes the rest of a cluster and counts its new user; none if there is no rest. What the caller leaves
    /// of it is its to give back.
    async fn take_rest(&self, file: &Edge) -> IoResult<Option<u64>> {
        loop {
            let index = {
                let mut table = self.table();
                let at = std::mem::take(&mut table.rest);
                if at == 0 {
                    return Ok(None);
                }
                let cluster = at >> self.cluster_bits;
                let (index, within) = (cluster / self.per_block(), cluster % self.per_block());
                let block = self.block_at(&table, index)?;
                let counted = self.blocks.peek(block).and_then(|block| {
                    let count = block.look(|bytes| self.read(bytes, within));
                    if count == 0 || count == Width(self.order).most() {
                        return Some(false);
                    }
                    self.blocks.change(&block, |bytes| self.write(bytes, within, count + 1)).map(|()| true)
                });
                match counted {
                    Some(true) => {
                        self.note_raised();
                        return Ok(Some(at));
                    }
                    Some(false) => return Ok(None),
                    None => table.rest = at,
                }
                index
            };
            drop(self.load(index, file).await?);
        }
    }

    /// Claims `len` bytes, fewer than a cluster has, for compressed data: where the last ones ended, if there is room. Every
    /// cluster that they touch has a reference more.
    ///
    /// # Errors
    /// As [`Refcounts::claim`].
    pub async fn claim_bytes(&self, len: u64, file: &Edge) -> IoResult<u64> {
        let bits = self.cluster_bits;
        if let Some(at) = self.take_rest(file).await? {
            let next = (at >> bits) + 1;
            let fits = at + len <= next << bits;
            if fits || !self.claim(1, Some(next), file).await?.is_empty() {
                self.leave_rest(at + len);
                return Ok(at);
            }
            self.release(next - 1, file).await?;
        }
        let at = self.claim(1, None, file).await?.start << bits;
        self.leave_rest(at + len);
        Ok(at)
    }

    /// The next compressed data may begin at `at`, in a cluster that the caller has a reference to.
    fn leave_rest(&self, at: u64) {
        if !at.is_multiple_of(1 << self.cluster_bits) {
            self.table().rest = at;
        }
    }

    /// Makes the table long enough for `entries` blocks, and half as many more, at a new place; the next flush writes it
    /// there. All of it happens at once: a longer table at the old place would reach into the clusters behind it.
    fn grow(&self, entries: u64, file: &Edge) -> IoResult {
        file.raise(BlkdebugEvent::ReftableGrow);
        let (per_cluster, per_block) = (1u64 << (self.cluster_bits - 3), self.per_block());
        let mut table = self.table();
        let old = u64_of(table.entries.len());
        if old >= entries {
            return Ok(());
        }
        // Nobody uses what no block counts. What lies behind the end of the file is not even junk.
        let start = (old * per_block).max(file.size().div_ceil(1 << self.cluster_bits));
        // First the blocks that count what is new, themselves included, then the table.
        let (mut blocks, mut wanted) = (1, entries);
        let (clusters, end) = loop {
            let clusters = (wanted + wanted / 2).div_ceil(per_cluster);
            if clusters << self.cluster_bits > super::header::MAX_REFTABLE_BYTES {
                return Err(Errno::EFBIG);
            }
            let end = start + blocks + clusters;
            let needed = (end - 1) / per_block - start / per_block + 1;
            let counted = end.div_ceil(per_block);
            if needed <= blocks && counted <= clusters * per_cluster {
                break (clusters, end);
            }
            (blocks, wanted) = (needed.max(blocks), counted.max(wanted));
        };
        table.entries.resize(us(clusters * per_cluster), 0);
        for i in 0..blocks {
            let index = start / per_block + i;
            let mut bytes = vec![0; 1 << self.cluster_bits];
            for cluster in start.max(index * per_block)..end.min((index + 1) * per_block) {
                self.write(&mut bytes, cluster % per_block, 1);
            }
            let at = (start + i) << self.cluster_bits;
            self.blocks.put(at, bytes);
            if let Some(entry) = table.entries.get_mut(us(index)) {
                *entry = at;
            }
        }
        // A place that was outgrown before it was written is left as a leak: that is too rare to be worth bookkeeping.
        table.at = (start + blocks) << self.cluster_bits;
        table.moved = true;
        Ok(())
    }

    /// Lowers the refcount of a cluster by one; returns what it is then.
    ///
    /// # Errors
    /// The errno of reading the block; `EUCLEAN` if it is 0 already.
    pub async fn release(&self, cluster: u64, file: &Edge) -> IoResult<u64> {
        let within = cluster % self.per_block();
        loop {
            let Some(block) = self.load(cluster / self.per_block(), file).await? else { return Err(Errno::EUCLEAN) };
            // The table's lock keeps allocation and this apart.
            let mut table = self.table();
            let count = block.look(|bytes| self.read(bytes, within));
            let new = count.checked_sub(1).ok_or(Errno::EUCLEAN)?;
            if self.blocks.change(&block, |bytes| self.write(bytes, within, new)).is_some() {
                if new == 0 {
                    table.first_free = table.first_free.min(cluster);
                    if table.rest >> self.cluster_bits == cluster {
                        table.rest = 0;
                    }
                }
                return Ok(new);
            }
        }
    }

    /// Whether the table has to be written.
    pub fn is_table_dirty(&self) -> bool {
        let table = self.table();
        !table.dirty.is_empty() || table.moved
    }

    /// What has to be written of the table; it counts as clean then.
    pub fn take_table(&self) -> TableCopy {
        let mut table = self.table();
        let moved = std::mem::take(&mut table.moved);
        let sectors = std::mem::take(&mut table.dirty);
        let encode = |entries: &[u64]| entries.iter().flat_map(|e| e.to_be_bytes()).collect::<Vec<_>>();
        let per_sector = us(SECTOR / 8);
        let pieces = if moved {
            vec![(table.at, encode(&table.entries))]
        } else {
            let piece = |sector: &u64| {
                let entries = table.entries.chunks(per_sector).nth(us(*sector)).unwrap_or_default();
                (table.at + sector * SECTOR, encode(entries))
            };
            sectors.iter().map(piece).collect()
        };
        let clusters = u64_of(table.entries.len()) >> (self.cluster_bits - 3);
        TableCopy { pieces, sectors, moved, at: table.at, clusters }
    }

    /// The copy could not be written: what it has is dirty as before.
    pub fn give_back(&self, copy: TableCopy) {
        let mut table = self.table();
        table.dirty.extend(copy.sectors);
        table.moved |= copy.moved;
    }

    /// The header names the new place of `copy`; returns the clusters of the old one.
    pub fn moved(&self, copy: &TableCopy) -> Range<u64> {
        let first = copy.at >> self.cluster_bits;
        std::mem::replace(&mut self.table().saved, first..first + copy.clusters)
    }

    /// The clusters of the table, and of the blocks.
    pub fn places(&self) -> (Range<u64>, Vec<u64>) {
        let table = self.table();
        let blocks = table.entries.iter().filter(|at| **at != 0).map(|at| at >> self.cluster_bits).collect();
        (table.saved.clone(), blocks)
    }

    /// The refcount blocks: index and place, in bytes.
    pub fn block_places(&self) -> Vec<(u64, u64)> {
        let table = self.table();
        let blocks = (0..).zip(&table.entries).filter(|(_, at)| **at != 0);
        blocks.map(|(index, at)| (index, *at)).collect()
    }

    /// Whether `cluster` is part of the table as it is now or in the image.
    fn in_table(&self, table: &Table, cluster: u64) -> bool {
        let first = table.at >> self.cluster_bits;
        let len = u64_of(table.entries.len() * 8).div_ceil(1 << self.cluster_bits);
        (first..first + len).contains(&cluster) || table.saved.contains(&cluster)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_all_widths_are_kept_apart() {
        for order in 0..=6 {
            let refs = Refcounts::new(9, order, 0, &[], 4096);
            let mut bytes = vec![0; 512];
            let per_block = refs.per_block();
            let modulus = if order < 4 { 1 << (1 << order) } else { 1000 };
            assert_eq!(per_block, (512 * 8) >> order);
            for i in 0..per_block {
                refs.write(&mut bytes, i, i % modulus);
            }
            for i in 0..per_block {
                assert_eq!(refs.read(&bytes, i), i % modulus, "width 2^{order}, entry {i}");
            }
        }
    }
}
