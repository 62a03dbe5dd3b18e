//! Finds every reference to a cluster [qcow2 §Host cluster management]: header, tables, data, snapshots, bitmaps.
//!
//! Tells of damage on the way. Entries that cannot be meant are counted as damage and passed over; of what can be
//! repaired where it stands, it is.

use super::super::bytes::{be16, be32, be64, put64, u64_of, us};
use super::super::entry::{COPIED, OFFSET, PACKED, ZERO};
use super::super::header::MAX_L1_BYTES;
use super::counts::Counts;
use super::{Image, read, write};
use block::check::{Fix, Found};
use block::driver::Prealloc;
use block::{Errno, IoResult};
use std::collections::{BTreeMap, BTreeSet};

/// Bits of L1 entries that are reserved.
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
/// Bits of L2 entries of clusters that are not compressed that are reserved.
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// Bits of refcount table entries that are reserved.
pub(super) const REFTABLE_RESERVED: u64 = 0x1ff;
/// Most L2 tables of an image.
const MAX_TABLES: usize = 16 << 20;
/// Most L2 tables that are not at a cluster's beginning: each of them may be read.
const MAX_UNALIGNED: u64 = 1024;
/// Most clusters that are remembered because damaged entries name them.
const MAX_DANGLING: usize = 1 << 16;
/// Most bytes of the L1 tables of all snapshots, and of the tables of all bitmaps.
const MAX_L1S: u64 = 1 << 30;

/// What a walk has found.
#[derive(Debug, Default)]
pub struct Walked {
    pub counts: Counts,
    pub found: Found,
    /// Clusters that are in use are counted as free, or the refcount structures cannot be mended in place: the reference makes
    /// new ones in both cases.
    pub rebuild: bool,
    /// The refcount structures cannot be mended in place.
    pub beyond_repair: bool,
    /// Clusters behind the end of the file that damaged entries name: what is put there would be theirs too.
    pub dangling: BTreeSet<u64>,
    /// L2 tables by their offsets, and how many L1 entries name them: the active table's, all.
    tables: BTreeMap<u64, (u64, u64)>,
    unaligned: u64,
}

impl Walked {
    /// Notes that the refcount structures cannot be mended in place, if `so`.
    pub(super) fn must_rebuild(&mut self, so: bool) {
        self.rebuild |= so;
        self.beyond_repair |= so;
    }
}

impl Image {
    /// Counts all references.
    pub(super) async fn walk(&mut self, fix: Fix) -> IoResult<Walked> {
        let mut walked = Walked::default();
        walked.found.total_clusters = self.header.size.div_ceil(self.cluster());
        self.refer(&mut walked, 0, self.cluster(), 1)?;
        self.walk_l1s(&mut walked).await?;
        for (at, (active, all)) in std::mem::take(&mut walked.tables) {
            self.walk_l2(&mut walked, at, active, all, fix).await?;
        }
        self.refer(&mut walked, self.header.snapshots_at, self.snapshots.len, 1)?;
        self.refer(&mut walked, self.header.reftable_at, self.header.reftable_bytes(), 1)?;
        self.walk_bitmaps(&mut walked).await?;
        self.walk_blocks(&mut walked, fix).await?;
        Ok(walked)
    }

    /// Counts `times` references to `len` bytes from `at`.
    fn refer(&self, walked: &mut Walked, at: u64, len: u64, times: u64) -> IoResult {
        if len == 0 {
            return Ok(());
        }
        // The last cluster of an image may be there in part only, but not less.
        if at.checked_add(len).is_none_or(|end| end >= self.file.size().saturating_add(self.cluster())) {
            walked.found.corruptions += times;
            let clusters = at >> self.header.cluster_bits..=at.saturating_add(len - 1) >> self.header.cluster_bits;
            let room = MAX_DANGLING.saturating_sub(walked.dangling.len());
            walked.dangling.extend(clusters.take(room));
            return Ok(());
        }
        let bits = self.header.cluster_bits;
        for cluster in at >> bits..=((at + len - 1) >> bits) {
            let count = walked.counts.get(cluster).saturating_add(times);
            let most = self.width().most();
            if count > most {
                walked.found.corruptions += count - most;
            }
            walked.counts.set(cluster, count.min(most))?;
        }
        Ok(())
    }

    async fn walk_l1s(&self, walked: &mut Walked) -> IoResult {
        self.refer(walked, self.header.l1_at, u64_of(self.l1.len()) * 8, 1)?;
        self.walk_l1(walked, &self.l1, 1, true)?;
        if self.header.has_data_file() && !self.snapshots.list.is_empty() {
            walked.found.corruptions += 1;
        }
        // Each table once, however many snapshots name it.
        let mut tables: BTreeMap<_, u64> = BTreeMap::new();
        for snapshot in &self.snapshots.list {
            *tables.entry((snapshot.l1_at, u64::from(snapshot.l1_entries))).or_default() += 1;
        }
        let mut total = 0;
        for ((at, entries), times) in tables {
            if !at.is_multiple_of(self.cluster()) || entries * 8 > MAX_L1_BYTES {
                walked.found.corruptions += times;
                continue;
            }
            total += entries * 8;
            if total > MAX_L1S {
                return Err(Errno::EFBIG);
            }
            self.refer(walked, at, entries * 8, times)?;
            if at >= self.file.size() {
                continue;
            }
            let bytes = read(&self.file, at, entries * 8).await?;
            let table: Vec<u64> = bytes.chunks_exact(8).map(|entry| be64(entry, 0)).collect();
            self.walk_l1(walked, &table, times, false)?;
        }
        Ok(())
    }

    /// An L1 table that is named `times`, as that of the guest's present disk if `active`.
    fn walk_l1(&self, walked: &mut Walked, entries: &[u64], times: u64, active: bool) -> IoResult {
        for entry in entries.iter().filter(|entry| **entry != 0) {
            if entry & L1_RESERVED != 0 {
                walked.found.corruptions += times;
            }
            let at = entry & OFFSET;
            self.refer(walked, at, self.cluster(), times)?;
            let aligned = at.is_multiple_of(self.cluster());
            if !aligned {
                walked.found.corruptions += times;
            }
            if at >= self.file.size() {
                continue;
            }
            if !walked.tables.contains_key(&at) {
                walked.unaligned += u64::from(!aligned);
                if walked.tables.len() >= MAX_TABLES || walked.unaligned > MAX_UNALIGNED {
                    return Err(Errno::EFBIG);
                }
            }
            let (active_times, all) = walked.tables.entry(at).or_default();
            *active_times += u64::from(active);
            *all += times;
        }
        Ok(())
    }

    /// The L2 table at `at`, which `times` L1 entries name, `active` of them the guest's present disk's.
    async fn walk_l2(&self, walked: &mut Walked, at: u64, active: u64, times: u64, fix: Fix) -> IoResult {
        let mut table = read(&self.file, at, self.cluster()).await?;
        let wide = us(self.header.l2_entry_size());
        let mut changed = false;
        let mut next = 0;
        for entry in table.chunks_exact_mut(wide) {
            let word = be64(entry, 0);
            let bitmap = if wide == 16 { be64(entry, 8) } else { 0 };
            if word == 0 && bitmap == 0 {
                continue;
            }
            if word & PACKED != 0 {
                self.walk_packed(walked, word, bitmap, active, times)?;
                continue;
            }
            if word & L2_RESERVED != 0 {
                walked.found.corruptions += times;
            }
            let host = word & OFFSET;
            let plain_zero = wide == 8 && word & ZERO != 0;
            if host == 0 && !(self.header.has_data_file() && word & COPIED != 0 && !plain_zero) {
                // A cluster that is not there has no data.
                if bitmap & 0xffff_ffff != 0 {
                    walked.found.corruptions += times;
                }
                continue;
            }
            if bitmap >> 32 & bitmap != 0 {
                walked.found.corruptions += times;
            }
            if !host.is_multiple_of(self.cluster()) {
                let has_data = if wide == 16 { bitmap & 0xffff_ffff != 0 } else { !plain_zero };
                if !has_data && fix == Fix::All {
                    // It reads as zero wherever it is, so it need not be anywhere.
                    put64(entry, 0, if wide == 8 { ZERO } else { 0 });
                    changed = true;
                    walked.found.corruptions_fixed += times;
                    continue;
                }
                walked.found.corruptions += times;
            }
            if active > 0 {
                walked.found.allocated_clusters += active;
                if next != 0 && next != host {
                    walked.found.fragmented_clusters += active;
                }
                next = host.saturating_add(self.cluster());
            }
            if !self.header.has_data_file() {
                self.refer(walked, host, self.cluster(), times)?;
            }
        }
        if changed {
            write(&self.file, at, &table).await?;
        }
        Ok(())
    }

    fn walk_packed(&self, walked: &mut Walked, word: u64, bitmap: u64, active: u64, times: u64) -> IoResult {
        if word & COPIED != 0 {
            walked.found.corruptions += times;
        }
        if self.header.has_data_file() || bitmap != 0 {
            walked.found.corruptions += times;
            return Ok(());
        }
        let bits = 62 - (self.header.cluster_bits - 8);
        let at = word & ((1 << bits) - 1);
        let sectors = ((word & !(COPIED | PACKED)) >> bits) + 1;
        self.refer(walked, at, sectors * 512 - (at & 511), times)?;
        walked.found.allocated_clusters += active;
        walked.found.compressed_clusters += active;
        walked.found.fragmented_clusters += active;
        Ok(())
    }

    async fn walk_bitmaps(&self, walked: &mut Walked) -> IoResult {
        let Some(bitmaps) = &self.bitmaps else { return Ok(()) };
        let beyond = bitmaps.at.checked_add(bitmaps.len).is_none_or(|end| end > self.file.size());
        let too_long = bitmaps.len > super::super::bitmap::MAX_DIRECTORY;
        if !too_long {
            self.refer(walked, bitmaps.at, bitmaps.len, 1)?;
        }
        if beyond || too_long {
            walked.found.corruptions += 1;
            return Ok(());
        }
        let directory = read(&self.file, bitmaps.at, bitmaps.len).await?;
        let mut rest = &directory[..];
        let mut total = 0;
        for _ in 0..bitmaps.count {
            if rest.len() < 24 {
                walked.found.corruptions += 1;
                break;
            }
            let (at, entries) = (be64(rest, 0), u64::from(be32(rest, 8)));
            let len = 24 + u64::from(be16(rest, 18)) + u64::from(be32(rest, 20));
            rest = rest.get(us(len.next_multiple_of(8))..).unwrap_or_default();
            let end = at.checked_add(entries * 8);
            if end.is_some_and(|end| end < self.file.size().saturating_add(self.cluster())) {
                total += entries * 8;
                if total > MAX_L1S {
                    return Err(Errno::EFBIG);
                }
            }
            self.refer(walked, at, entries * 8, 1)?;
            if end.is_none_or(|end| end > self.file.size()) {
                continue;
            }
            for entry in read(&self.file, at, entries * 8).await?.chunks_exact(8).map(|entry| be64(entry, 0)) {
                let host = entry & OFFSET;
                let bad = if host == 0 { entry & !1 != 0 } else { entry & !OFFSET != 0 };
                if bad || !host.is_multiple_of(self.cluster()) {
                    walked.found.corruptions += 1;
                } else if host != 0 {
                    self.refer(walked, host, self.cluster(), 1)?;
                }
            }
        }
        Ok(())
    }

    /// The refcount blocks themselves.
    async fn walk_blocks(&mut self, walked: &mut Walked, fix: Fix) -> IoResult {
        let bits = self.header.cluster_bits;
        for entry in self.reftable.clone() {
            let at = entry & !REFTABLE_RESERVED;
            if entry & REFTABLE_RESERVED != 0 || !at.is_multiple_of(self.cluster()) {
                walked.found.corruptions += 1;
                walked.must_rebuild(true);
                continue;
            }
            if at == 0 {
                continue;
            }
            if at >> bits >= self.file.size().div_ceil(self.cluster()) {
                if fix == Fix::All && self.lengthen(at).await {
                    walked.found.corruptions_fixed += 1;
                    self.refer(walked, at, self.cluster(), 1)?;
                } else {
                    walked.found.corruptions += 1;
                    walked.must_rebuild(fix == Fix::All);
                }
                continue;
            }
            self.refer(walked, at, self.cluster(), 1)?;
            if walked.counts.get(at >> bits) != 1 {
                walked.found.corruptions += 1;
                walked.must_rebuild(true);
            }
        }
        Ok(())
    }

    /// Makes a file that was cut off long enough for the cluster at `at`.
    async fn lengthen(&self, at: u64) -> bool {
        let near = self.file.size().saturating_mul(2).max(1 << 30);
        match at.checked_add(self.cluster()).filter(|end| *end <= near) {
            Some(end) => self.file.truncate(end, false, Prealloc::Off).await.is_ok(),
            None => false,
        }
    }
}
