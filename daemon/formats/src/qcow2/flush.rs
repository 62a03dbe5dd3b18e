//! Flushing: the one place that writes metadata, in the order that a crash at any point allows.
//!
//! 1. Refcount blocks; behind a barrier the refcount table; behind another the header, if the table has moved. Counts in
//!    memory are never too low, so these may be written whenever.
//! 2. A barrier: what L2 entries will name is counted, and data and copies are there.
//! 3. L2 tables; behind a barrier the L1 table.
//! 4. A barrier: what is not named any more in memory is not named in the image either. Those clusters may be reused, once
//!    the requests are over that found them before: only now their counts fall.
//!
//! With lazy refcounts step 1 waits until the image is closed, but for blocks that are new; meanwhile the image is marked as dirty.
//!
//! What is written are copies that are taken in the opposite order of the dependencies (unlinked clusters, L1, L2,
//! refcounts), so that nothing in a copy refers to something that a later copy lacks. Requests go on meanwhile and make
//! things dirty again. A block counts as written only after the last barrier; after a failure everything is tried again.

use super::bytes::u64_of;
use super::cache::Copy;
use super::guard::Kinds;
use super::header::{self, Header};
use super::image::{Free, Qcow2, Turn, lock};
use super::join::join_all;
use super::refcount::SECTOR;
use block::{BlkdebugEvent, Edge, IoResult, Span, WriteFlags};
use buf::IoBuf;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

/// A piece of the L1 table, to be written.
#[derive(Debug)]
pub(super) struct Sector {
    /// Which.
    index: u64,
    /// Where it goes.
    at: u64,
    bytes: Vec<u8>,
}

/// Most runs of unlinked clusters that wait while one request goes on: 32 MiB.
const MAX_UNLINKED: usize = 1 << 20;

/// Writes that are in flight at a time.
const AT_ONCE: usize = 16;

impl Qcow2 {
    /// Everything that completed before is on stable storage afterwards.
    pub(super) async fn flush_guest(&self) -> IoResult {
        self.check_sound()?;
        if self.is_clean() {
            // Nobody has unlinked anything either, or it would be dirty.
            return self.barrier().await;
        }
        self.write_out().await
    }

    /// Data, and metadata that has been written, is on stable storage.
    async fn barrier(&self) -> IoResult {
        if let Some(data) = &self.data_file {
            data.flush().await?;
        }
        self.file.flush().await
    }

    /// Writes all dirty metadata. Callers that come while one is at it share the next one's work.
    pub(super) async fn write_out(&self) -> IoResult {
        let before = self.turns.load(Ordering::Acquire);
        let turn = self.turn.lock().await;
        if turn.done > before {
            return Ok(());
        }
        self.take_turn(turn).await
    }

    async fn take_turn(&self, mut turn: tokio::sync::MutexGuard<'_, Turn>) -> IoResult {
        self.check_sound()?;
        let number = self.turns.fetch_add(1, Ordering::AcqRel) + 1;
        self.write_in_order(&mut turn).await?;
        turn.done = number;
        turn.handed = number;
        Ok(())
    }

    /// Writes metadata if there is so much of it that the caches do not take more, or so many clusters wait for it to be
    /// freed. Called after each change. Goes on while another one is at it, unless a cache holds nothing else any more.
    pub(super) async fn make_room(&self) -> IoResult {
        let counts = self.refs.blocks.is_crowded();
        let links = self.l2.is_crowded() || self.much_unlinked.load(Ordering::Relaxed);
        if !counts && !links {
            return Ok(());
        }
        let turn = match self.turn.try_lock() {
            Ok(turn) => turn,
            Err(_) if !self.refs.blocks.is_full() && !self.l2.is_full() => return Ok(()),
            Err(_) => self.turn.lock().await,
        };
        if links && (self.l2.is_crowded() || self.much_unlinked.load(Ordering::Relaxed)) {
            return self.take_turn(turn).await;
        }
        // Another request may have found damage since this one began.
        self.check_sound()?;
        // Counts alone need no barrier: they are never too low, and who writes what relies on them begins with one.
        let blocks = self.refs.blocks.dirty_copies();
        self.check_blocks(&blocks)?;
        self.write_blocks(&blocks).await?;
        self.blocks_written(&blocks);
        Ok(())
    }

    /// Whether a request that goes on for long has to see to [`Qcow2::make_room`] meanwhile.
    pub(super) fn is_overdue(&self) -> bool {
        self.l2.is_full() || self.refs.blocks.is_full() || lock(&self.unlinked).len() > MAX_UNLINKED
    }

    async fn write_in_order(&self, turn: &mut Turn) -> IoResult {
        let unlinked = std::mem::take(&mut *lock(&self.unlinked));
        self.much_unlinked.store(false, Ordering::Relaxed);
        let l1 = self.take_l1(true);
        let l2 = self.l2.dirty_copies();
        let result = self.write_copies(&l1, &l2, turn).await;
        if result.is_err() {
            lock(&self.unlinked).extend(unlinked);
            self.give_back_l1(&l1, true);
            return result;
        }
        for copy in &l2 {
            self.l2.written(copy);
        }
        if !unlinked.is_empty() {
            lock(&self.retired).push((self.epochs.now(), unlinked));
        }
        self.reclaim().await;
        Ok(())
    }

    /// The sectors of the L1 table that are dirty, or not handed over at least. They count as what they will be then.
    pub(super) fn take_l1(&self, dirty: bool) -> Vec<Sector> {
        let mut l1 = self.l1.write().unwrap_or_else(PoisonError::into_inner);
        let mut sectors = std::mem::take(&mut l1.unhanded);
        if dirty {
            sectors = std::mem::take(&mut l1.dirty);
        }
        let per_sector = usize::try_from(SECTOR / 8).unwrap_or(64);
        sectors
            .into_iter()
            .filter_map(|index| {
                let entries = l1.entries.chunks(per_sector).nth(usize::try_from(index).ok()?)?;
                let bytes = entries.iter().flat_map(|e| e.to_be_bytes()).collect();
                Some(Sector { index, at: l1.at + index * SECTOR, bytes })
            })
            .collect()
    }

    /// These sectors could not be written.
    pub(super) fn give_back_l1(&self, sectors: &[Sector], dirty: bool) {
        let mut l1 = self.l1.write().unwrap_or_else(PoisonError::into_inner);
        l1.unhanded.extend(sectors.iter().map(|sector| sector.index));
        if dirty {
            l1.dirty.extend(sectors.iter().map(|sector| sector.index));
        }
    }

    async fn write_copies(&self, l1: &[Sector], l2: &[Copy], turn: &mut Turn) -> IoResult {
        self.write_counts(turn).await?;
        if l2.is_empty() && l1.is_empty() {
            return Ok(());
        }
        self.write_l2(l1, l2).await?;
        if !l1.is_empty() {
            self.file.flush().await?;
            self.write_l1(l1).await?;
        }
        self.file.flush().await
    }

    /// Steps 1 and 2: the counts of everything that has been copied are in the image, or it is marked so that they are not relied
    /// on; and so are data and copies, all of it for good. New refcount blocks are there in any case: a repair can count in them,
    /// on a full disk too.
    pub(super) async fn write_counts(&self, turn: &mut Turn) -> IoResult {
        let (counted, stable) = (self.refs.raised(), self.handover.exposed());
        if self.lazy.load(Ordering::Relaxed) {
            if !self.refs_are_clean() {
                self.mark_dirty().await?;
            }
            if self.refs.is_table_dirty() { self.write_refcounts().await? } else { self.barrier().await? }
        } else {
            self.write_refcounts().await?;
        }
        (turn.counted, turn.stable) = (counted, stable);
        Ok(())
    }

    /// Checks both, and writes the copies of L2 tables.
    pub(super) async fn write_l2(&self, l1: &[Sector], l2: &[Copy]) -> IoResult {
        for copy in l2 {
            self.check_overlap(Kinds::ACTIVE_L2, copy.at, u64_of(copy.bytes.len()))?;
        }
        for sector in l1 {
            self.check_overlap(Kinds::ACTIVE_L1, sector.at, u64_of(sector.bytes.len()))?;
        }
        if !l2.is_empty() {
            self.file.raise(BlkdebugEvent::L2Update);
        }
        write_all(&self.file, l2.iter().map(|copy| (copy.at, &copy.bytes[..]))).await
    }

    /// Writes the copies of the L1 table.
    pub(super) async fn write_l1(&self, l1: &[Sector]) -> IoResult {
        if !l1.is_empty() {
            self.file.raise(BlkdebugEvent::L1Update);
        }
        write_all(&self.file, l1.iter().map(|sector| (sector.at, &sector.bytes[..]))).await
    }

    /// From here on refcounts in the image may be too low [qcow2 §Header, dirty bit]. The caller has the turn.
    async fn mark_dirty(&self) -> IoResult {
        if self.header_now().incompatible & header::DIRTY != 0 {
            return Ok(());
        }
        self.set_header(|header| header.incompatible |= header::DIRTY).await
    }

    /// Writes refcounts that were put off, upon which the image is dirty no more.
    pub(super) async fn write_lazy(&self) -> IoResult {
        let _turn = self.turn.lock().await;
        let dirty = self.header_now().incompatible & header::DIRTY != 0;
        // Counts may have fallen since the last flush, which alone makes nothing dirty.
        if dirty || !self.refs_are_clean() {
            self.write_refcounts().await?;
        }
        if !dirty {
            return Ok(());
        }
        self.set_header(|header| header.incompatible &= !header::DIRTY).await
    }

    /// Steps 1 and 2.
    async fn write_refcounts(&self) -> IoResult {
        // The table first: a block that is new in between is in a later copy of both.
        let table = self.refs.take_table();
        let blocks = self.refs.blocks.dirty_copies();
        let written = async {
            self.check_blocks(&blocks)?;
            for (at, bytes) in &table.pieces {
                self.check_overlap(Kinds::REFCOUNT_TABLE, *at, u64_of(bytes.len()))?;
            }
            // The table changes when there are new blocks, and moves when it has no room for them.
            let (new_blocks, new_table) = if table.moved {
                (BlkdebugEvent::RefblockAllocWriteBlocks, BlkdebugEvent::RefblockAllocWriteTable)
            } else {
                (BlkdebugEvent::RefblockAllocWrite, BlkdebugEvent::RefblockAllocHookup)
            };
            if !table.pieces.is_empty() {
                self.file.raise(new_blocks);
            }
            self.write_blocks(&blocks).await?;
            if table.pieces.is_empty() {
                return Ok(());
            }
            self.file.flush().await?;
            self.file.raise(new_table);
            self.file.raise(BlkdebugEvent::ReftableUpdate);
            write_all(&self.file, table.pieces.iter().map(|(at, bytes)| (*at, &bytes[..]))).await?;
            if table.moved {
                self.file.flush().await?;
                self.file.raise(BlkdebugEvent::RefblockAllocSwitchTable);
                let clusters = u32::try_from(table.clusters).unwrap_or(u32::MAX);
                self.set_header(|header| {
                    header.reftable_at = table.at;
                    header.reftable_clusters = clusters;
                })
                .await?;
            }
            Ok(())
        };
        let written = async {
            written.await?;
            self.barrier().await
        };
        let result: IoResult = written.await;
        if result.is_err() {
            self.refs.give_back(table);
            return result;
        }
        if table.moved {
            let old = self.refs.moved(&table);
            let first = table.at >> self.shape.cluster_bits;
            self.guard.add(Kinds::REFCOUNT_TABLE, first..first + table.clusters);
            self.guard.remove(Kinds::REFCOUNT_TABLE, old.clone());
            lock(&self.unlinked).push(Free { clusters: old, discard: self.discards().other, table: false });
        }
        self.blocks_written(&blocks);
        Ok(())
    }

    fn check_blocks(&self, blocks: &[Copy]) -> IoResult {
        let check = |copy: &Copy| self.check_overlap(Kinds::REFCOUNT_BLOCK, copy.at, u64_of(copy.bytes.len()));
        blocks.iter().try_for_each(check)
    }

    async fn write_blocks(&self, blocks: &[Copy]) -> IoResult {
        if !blocks.is_empty() {
            self.file.raise(BlkdebugEvent::RefblockUpdate);
            // The reference's name for it.
            self.file.raise(BlkdebugEvent::RefblockUpdatePart);
        }
        write_all(&self.file, blocks.iter().map(|copy| (copy.at, &copy.bytes[..]))).await
    }

    fn blocks_written(&self, blocks: &[Copy]) {
        for copy in blocks {
            let cluster = copy.at >> self.shape.cluster_bits;
            self.guard.add(Kinds::REFCOUNT_BLOCK, cluster..cluster + 1);
            self.refs.blocks.written(copy);
        }
    }

    /// Changes the header in the image and makes it stable. After an error the image has the old one, or nothing is written
    /// to it any more. The caller has the turn, or nobody else knows the image yet.
    pub(super) async fn set_header(&self, change: impl FnOnce(&mut Header)) -> IoResult {
        let old = self.header_now();
        let mut new = old.clone();
        change(&mut new);
        if let Err(errno) = self.write_header(&new).await {
            // Which of the two is there is not known. Tables that only the other one names would be given away or go stale.
            if !old.names_same_tables(&new) && self.write_header(&old).await.is_err() {
                return Err(self.damage("The header could not be written, and it is not known what it is now"));
            }
            return Err(errno);
        }
        *lock(&self.header) = new;
        Ok(())
    }

    async fn write_header(&self, header: &Header) -> IoResult {
        self.file.write(0, &IoBuf::copy_of(&header.encode()), WriteFlags::NONE).await?;
        self.file.flush().await
    }

    /// Frees what nothing in the image refers to and no request can be using. The caller has the turn.
    async fn reclaim(&self) {
        self.epochs.advance();
        let (over, still): (Vec<_>, Vec<_>) =
            std::mem::take(&mut *lock(&self.retired)).into_iter().partition(|(epoch, _)| self.epochs.passed(*epoch));
        lock(&self.retired).extend(still);
        let mut free: Vec<_> = over.into_iter().flat_map(|(_, free)| free).collect();
        free.sort_by_key(|free| free.clusters.start);
        let bits = self.shape.cluster_bits;
        let mut discards: Vec<Span> = Vec::new();
        for free in &free {
            let span = Span::new(free.clusters.start << bits, (free.clusters.end - free.clusters.start) << bits);
            if free.table {
                self.l2.forget(span.at..span.end());
            }
            self.unpacked.forget(&(span.at..span.end()));
            for cluster in free.clusters.clone() {
                // The last reference's discard comes before anybody can claim the cluster.
                if free.discard && matches!(self.refs.is_last(cluster, &self.file).await, Ok(true)) {
                    match discards.last_mut() {
                        Some(last) if last.end() == cluster << bits => last.len += 1 << bits,
                        _ => discards.push(Span::new(cluster << bits, 1 << bits)),
                    }
                }
            }
        }
        for span in discards {
            // A hint: what cannot be discarded stays.
            let _ = self.file.discard(span).await;
        }
        for cluster in free.into_iter().flat_map(|free| free.clusters) {
            self.file.raise(BlkdebugEvent::ClusterFree);
            if self.refs.release(cluster, &self.file).await.is_err() {
                // A count that is already 0 would be given away while in use: nothing more is written.
                self.damage("A cluster that is in use has no refcount");
            }
        }
    }

    /// What has to be done once before the first change: features that others must not trust any more are taken back.
    pub(super) async fn prepare(&self) -> IoResult {
        self.check_sound()?;
        if self.prepared.load(Ordering::Acquire) {
            return Ok(());
        }
        let _preparing = self.preparing.lock().await;
        if self.prepared.load(Ordering::Acquire) {
            return Ok(());
        }
        self.repair_dirty().await.map_err(|_| block::Errno::EIO)?;
        let known = header::BITMAPS | header::RAW_DATA_FILE;
        if self.header_now().autoclear & !known != 0 {
            let _turn = self.turn.lock().await;
            self.set_header(|header| header.autoclear &= known).await?;
        }
        self.prepared.store(true, Ordering::Release);
        Ok(())
    }

    /// The last flush. Nothing is in flight.
    pub(super) async fn close_image(&self) {
        if self.is_read_only() || self.check_sound().is_err() || !self.prepared.load(Ordering::Acquire) {
            return;
        }
        self.give_back_spare().await;
        // Clusters that wait for nobody any more are freed by the second one, which writes their counts.
        for _ in 0..3 {
            if self.is_clean() && lock(&self.retired).is_empty() && lock(&self.unlinked).is_empty() {
                break;
            }
            // A failure cannot be told to anybody here; the node has been flushed before, and that could be.
            if self.write_out().await.is_err() {
                return;
            }
        }
        // Without this they stay marked as inconsistent, which is then what they are.
        let _ = self.store_bitmaps().await;
        // And without this the image stays dirty.
        let _ = self.write_lazy().await;
    }
}

/// Writes pieces of metadata, several at a time.
async fn write_all<'a>(file: &Edge, pieces: impl Iterator<Item = (u64, &'a [u8])>) -> IoResult {
    let mut batch = Vec::new();
    let write = |at: u64, bytes: &[u8]| {
        let buf = IoBuf::copy_of(bytes);
        async move { file.write(at, &buf, WriteFlags::NONE).await }
    };
    for (at, bytes) in pieces {
        debug_assert!(u64_of(bytes.len()) > 0, "nothing to write");
        batch.push(write(at, bytes));
        if batch.len() == AT_ONCE {
            join_all(std::mem::take(&mut batch)).await?;
        }
    }
    join_all(batch).await
}
