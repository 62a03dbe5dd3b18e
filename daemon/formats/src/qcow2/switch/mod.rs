//! Another state of all metadata, entered by one write of the header.
//!
//! Making or deleting an internal snapshot changes the counts of all clusters that it shares, and with them the COPIED bit
//! of every active L2 entry that names one: neither may be seen without the other. So nothing is changed in place. The
//! active L1 table, its L2 tables, the refcount blocks that change, the refcount table and the table of snapshots are written to
//! clusters that were free, behind a barrier the header names them all at once, and then the old ones are free. A crash before that
//! leaks the new ones; a crash after it leaks nothing.
//!
//! Nothing is in flight above the image meanwhile.
//!
//! Memory does not grow with the image, see `counts`; of L2 tables there is one at a time, and a few words of each.

mod counts;

use super::bytes::{be64, put64, u64_of, us};
use super::entry::{COPIED, Entry, OFFSET, Place};
use super::image::Qcow2;
use super::refcount::Width;
use super::snapshot::{Snapshot, clusters_for, encode_table};
use block::{Errno, IoResult, WriteFlags};
use buf::IoBuf;
use counts::{Counts, Freed, blocks_of_a_piece};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::PoisonError;

/// The change of a list of snapshots.
pub struct Switch<'q> {
    /// The image.
    pub image: &'q Qcow2,
    /// The snapshots that there will be.
    pub list: Vec<Snapshot>,
    /// Bytes of the table as it is now.
    pub table_len: u64,
    /// The one that there will not be any more; if none, the last of the list is new.
    pub gone: Option<Snapshot>,
}

/// An L2 table.
struct Table {
    /// Where it is, in bytes.
    at: u64,
    /// The indices of the first and the last refcount block that count what it names; the first is greater if it names nothing.
    reach: (u32, u32),
}

impl Table {
    fn meets(&self, counts: &Counts) -> bool {
        let (first, last) = counts.reach();
        u64::from(self.reach.0) <= last && first <= u64::from(self.reach.1)
    }
}

/// Where the new metadata goes.
struct Places {
    l1: Range<u64>,
    table: Range<u64>,
    snapshots: Range<u64>,
    /// For the active L2 tables.
    tables: Vec<u64>,
    /// For refcount blocks, by their indices: those that change.
    blocks: BTreeMap<u64, u64>,
}

impl Switch<'_> {
    /// Does it. After an error everything is as it was.
    pub async fn carry_out(self) -> IoResult {
        // What waits to be written or freed would stand in the old places.
        for _ in 0..3 {
            self.image.write_out().await?;
        }
        let mut claimed = Vec::new();
        let result = self.write_new(&mut claimed).await;
        if result.is_err() {
            for clusters in claimed {
                self.image.unclaim(clusters).await;
            }
        }
        result
    }

    async fn write_new(&self, claimed: &mut Vec<Range<u64>>) -> IoResult {
        let image = self.image;
        let l1 = self.l1();
        let mut changing = BTreeSet::new();
        let (active, gone) = match &self.gone {
            None => (self.survey(&l1, Some(&mut changing)).await?, None),
            Some(gone) => {
                let theirs = self.l1_of(gone).await?;
                (self.survey(&l1, None).await?, Some(self.survey(&theirs, Some(&mut changing)).await?))
            }
        };
        let places = self.claim(&active, gone.as_deref(), changing, claimed).await?;
        let _turn = image.turn.lock().await;
        let mut freed = Freed::default();
        let table = self.write_counts(&active, gone.as_deref(), &places, &mut freed).await?;
        let new_l1 = self.write_l1(&l1, &places).await?;
        self.write(places.snapshots.start, &encode_table(&self.list)).await?;
        image.file.flush().await?;
        let bits = image.shape.cluster_bits;
        let count = u32::try_from(self.list.len()).map_err(|_| Errno::EFBIG)?;
        image
            .set_header(|header| {
                header.l1_at = places.l1.start << bits;
                header.reftable_at = places.table.start << bits;
                header.reftable_clusters = u32::try_from(places.table.end - places.table.start).unwrap_or(u32::MAX);
                header.snapshots = count;
                header.snapshots_at = if count == 0 { 0 } else { places.snapshots.start << bits };
            })
            .await?;
        {
            let mut l1 = image.l1.write().unwrap_or_else(PoisonError::into_inner);
            l1.entries = new_l1;
            l1.at = places.l1.start << bits;
            l1.dirty.clear();
            l1.unhanded.clear();
        }
        image.l2.clear();
        image.unpacked.forget(&(0..u64::MAX));
        image.refs.read_anew(places.table.start << bits, &table);
        // From here on it has been done. What follows only serves other checks, and space.
        claimed.clear();
        let _ = image.guard_anew().await;
        if image.discards().snapshot {
            for span in freed.spans(bits) {
                // A hint: what cannot be discarded stays.
                let _ = image.file.discard(span).await;
            }
        }
        Ok(())
    }

    fn l1(&self) -> Vec<u64> {
        self.image.l1.read().unwrap_or_else(PoisonError::into_inner).entries.clone()
    }

    fn per_block(&self) -> u64 {
        1 << (self.image.shape.cluster_bits + 3 - self.image.header_now().refcount_order)
    }

    /// Claims clusters in a row.
    async fn claim_row(&self, count: u64, claimed: &mut Vec<Range<u64>>) -> IoResult<Range<u64>> {
        if count == 0 {
            return Ok(0..0);
        }
        let row = self.image.refs.claim_row(count, &self.image.file).await?;
        claimed.push(row.clone());
        Ok(row)
    }

    /// Claims a place for everything; `changing` are the refcount blocks that count what is shared. Claiming may need more of
    /// them, which are in the image afterwards, and so are all counts.
    async fn claim(
        &self,
        active: &[Table],
        gone: Option<&[Table]>,
        changing: BTreeSet<u64>,
        claimed: &mut Vec<Range<u64>>,
    ) -> IoResult<Places> {
        let image = self.image;
        let cluster = image.shape.cluster();
        let l1 = self.claim_row(clusters_for(self.l1().len() * 8, cluster), claimed).await?;
        let snapshots = self.claim_row(clusters_for(encode_table(&self.list).len(), cluster), claimed).await?;
        let mut single: VecDeque<u64> = VecDeque::new();
        let mut table: Range<u64> = 0..0;
        loop {
            // The table may have grown in memory: it is written where it belongs first. Blocks that do not change have to be right.
            image.write_out().await?;
            image.write_lazy().await?;
            let old = image.refs.places().0;
            let blocks = self.blocks_that_change(active, gone, &changing)?;
            let needed = old.end - old.start;
            let missing = (active.len() + blocks.len()).saturating_sub(single.len());
            if missing == 0 && table.end - table.start >= needed {
                let tables = single.drain(..active.len()).collect();
                return Ok(Places { l1, table, snapshots, tables, blocks: blocks.into_iter().zip(single).collect() });
            }
            if table.end - table.start < needed {
                claimed.retain(|row| *row != table);
                image.unclaim(std::mem::replace(&mut table, 0..0)).await;
                table = self.claim_row(needed, claimed).await?;
            }
            let mut left = u64_of(missing);
            while left > 0 {
                let run = image.claim(left, None).await?;
                left -= run.end - run.start;
                single.extend(run.clone());
                claimed.push(run);
            }
        }
    }

    /// The refcount blocks that change: those in `changing`, those that count what is freed, and those that count the old
    /// places of all these.
    fn blocks_that_change(
        &self,
        active: &[Table],
        gone: Option<&[Table]>,
        changing: &BTreeSet<u64>,
    ) -> IoResult<BTreeSet<u64>> {
        let (bits, per_block) = (self.image.shape.cluster_bits, self.per_block());
        let places = self.block_places()?;
        let mut all = changing.clone();
        for clusters in self.freed(active, gone).into_iter().filter(|clusters| !clusters.is_empty()) {
            all.extend(clusters.start / per_block..=(clusters.end - 1) / per_block);
        }
        let mut new: Vec<u64> = all.iter().copied().collect();
        while let Some(index) = new.pop() {
            let at = places.get(&index).ok_or(Errno::EUCLEAN)?;
            let counted = (at >> bits) / per_block;
            if all.insert(counted) {
                new.push(counted);
            }
        }
        Ok(all)
    }

    /// The refcount blocks by their indices. None is two blocks.
    fn block_places(&self) -> IoResult<BTreeMap<u64, u64>> {
        let cluster = self.image.shape.cluster();
        let list = self.image.refs.block_places();
        let mut places: Vec<u64> = list.iter().map(|(_, at)| *at).collect();
        places.sort_unstable();
        let twice = places.windows(2).any(|two| two.first() == two.last());
        if twice || places.iter().any(|at| !at.is_multiple_of(cluster)) {
            return Err(Errno::EUCLEAN);
        }
        Ok(list.into_iter().collect())
    }

    async fn read_cluster(&self, at: u64) -> IoResult<Vec<u8>> {
        let buf = IoBuf::alloc(us(self.image.shape.cluster()));
        self.image.file.read(at, &buf).await?;
        Ok(buf.to_vec())
    }

    /// The entries of an L2 table.
    fn entries<'t>(&'t self, table: &'t [u8]) -> impl Iterator<Item = IoResult<Entry>> + 't {
        let image = self.image;
        let size = us(image.entry_size());
        table.chunks_exact(size).map(move |entry| {
            let bitmap = if size == 16 { be64(entry, 8) } else { 0 };
            Entry::decode(image.shape, be64(entry, 0), bitmap).map_err(|_| image.damage("an L2 entry is malformed"))
        })
    }

    fn clusters(&self, place: Place) -> Range<u64> {
        let bits = self.image.shape.cluster_bits;
        match place {
            Place::None => 0..0,
            Place::Plain { at, .. } => at >> bits..(at >> bits) + 1,
            Place::Packed { at, len } => at >> bits..((at + len - 1) >> bits) + 1,
        }
    }

    /// The L2 tables that an L1 table names. The refcount blocks that count what those name are added to `blocks`.
    async fn survey(&self, l1: &[u64], mut blocks: Option<&mut BTreeSet<u64>>) -> IoResult<Vec<Table>> {
        let image = self.image;
        let (cluster, per_block) = (image.shape.cluster(), self.per_block());
        let places: Vec<u64> = l1.iter().map(|entry| entry & OFFSET).filter(|at| *at != 0).collect();
        let end = image.file.size().next_multiple_of(cluster);
        if let Some(at) = places.iter().find(|at| !at.is_multiple_of(cluster) || at.saturating_add(cluster) > end) {
            return Err(image.damage(&format!("L2 table offset {at:#x} is unaligned or behind the end")));
        }
        let mut sorted = places.clone();
        sorted.sort_unstable();
        // As many copies would be made of it as there are names.
        if sorted.windows(2).any(|two| two.first() == two.last()) {
            return Err(image.damage("an L1 table names an L2 table twice"));
        }
        let mut tables = Vec::with_capacity(places.len());
        for at in places {
            let mut reach = (u32::MAX, 0);
            let mut last = None;
            let table = self.read_cluster(at).await?;
            for entry in self.entries(&table) {
                let clusters = self.clusters(entry?.place);
                if clusters.is_empty() {
                    continue;
                }
                let (from, to) = (clusters.start / per_block, (clusters.end - 1) / per_block);
                if last == Some((from, to)) {
                    continue;
                }
                last = Some((from, to));
                // No table has so many blocks.
                let index = |block: u64| u32::try_from(block).map_err(|_| Errno::EUCLEAN);
                reach = (reach.0.min(index(from)?), reach.1.max(index(to)?));
                if let Some(blocks) = &mut blocks {
                    blocks.extend(from..=to);
                }
            }
            tables.push(Table { at, reach });
        }
        Ok(tables)
    }

    async fn l1_of(&self, snapshot: &Snapshot) -> IoResult<Vec<u64>> {
        let (file, cluster) = (&self.image.file, self.image.shape.cluster());
        let len = u64::from(snapshot.l1_entries) * 8;
        let end = snapshot.l1_at.checked_add(len);
        if !snapshot.l1_at.is_multiple_of(cluster)
            || len > super::header::MAX_L1_BYTES
            || end.is_none_or(|end| end > file.size().next_multiple_of(cluster))
        {
            return Err(self.image.damage("the L1 table of a snapshot is not where it could be"));
        }
        if len == 0 {
            return Ok(Vec::new());
        }
        let buf = IoBuf::alloc(us(len));
        file.read(snapshot.l1_at, &buf).await?;
        Ok(buf.to_vec().chunks_exact(8).map(|entry| be64(entry, 0)).collect())
    }

    /// What has one user less, other than data and refcount blocks: what the header will not name any more.
    fn freed(&self, active: &[Table], gone: Option<&[Table]>) -> Vec<Range<u64>> {
        let (bits, header) = (self.image.shape.cluster_bits, self.image.header_now());
        let clusters = |at: u64, len: u64| at >> bits..(at >> bits) + len.div_ceil(1 << bits);
        let mut freed = vec![self.image.refs.places().0];
        if header.snapshots > 0 {
            freed.push(clusters(header.snapshots_at, self.table_len));
        }
        // Else the old L1 table and its L2 tables are the new snapshot's.
        if let (Some(snapshot), Some(tables)) = (&self.gone, gone) {
            freed.push(clusters(header.l1_at, u64::from(header.l1_entries) * 8));
            freed.push(clusters(snapshot.l1_at, u64::from(snapshot.l1_entries) * 8));
            freed.extend(active.iter().chain(tables).map(|table| table.at >> bits..(table.at >> bits) + 1));
        }
        freed
    }

    /// Writes the refcount blocks that change, the active L2 tables with the COPIED bits that fit them, and the refcount
    /// table, whose bytes this gives.
    async fn write_counts(
        &self,
        active: &[Table],
        gone: Option<&[Table]>,
        places: &Places,
        freed: &mut Freed,
    ) -> IoResult<Vec<u8>> {
        let image = self.image;
        let (bits, per_block) = (image.shape.cluster_bits, self.per_block());
        let width = Width(image.header_now().refcount_order);
        let mut block_places = self.block_places()?;
        let mut fewer = self.freed(active, gone);
        let old = |index: &u64| block_places.get(index).map(|at| at >> bits..(at >> bits) + 1);
        fewer.extend(places.blocks.keys().filter_map(old));
        let changing: Vec<u64> = places.blocks.keys().copied().collect();
        let mut written = vec![false; active.len()];
        for piece in changing.chunks(blocks_of_a_piece(image.shape.cluster())) {
            let mut counts = Counts { width, per_block, blocks: BTreeMap::new() };
            for index in piece {
                let at = *block_places.get(index).ok_or(Errno::EUCLEAN)?;
                let block = image.refs.blocks.get(at, &image.file).await?;
                counts.blocks.insert(*index, block.look(<[u8]>::to_vec));
            }
            self.recount(&mut counts, gone.unwrap_or(active), freed).await?;
            for clusters in &fewer {
                counts.add(clusters.clone(), false, freed)?;
            }
            for ((table, place), written) in active.iter().zip(&places.tables).zip(&mut written) {
                if table.meets(&counts) {
                    let from = if *written { *place << bits } else { table.at };
                    self.write_table(from, *place, &counts).await?;
                    *written = true;
                }
            }
            for (index, bytes) in &counts.blocks {
                let place = *places.blocks.get(index).ok_or(Errno::EUCLEAN)?;
                self.write(place, bytes).await?;
            }
        }
        for ((table, place), _) in active.iter().zip(&places.tables).zip(&written).filter(|(_, written)| !**written) {
            self.write(*place, &self.read_cluster(table.at).await?).await?;
        }
        block_places.extend(places.blocks.iter().map(|(index, place)| (*index, place << bits)));
        let mut table = vec![0; us((places.table.end - places.table.start) << bits)];
        for (index, at) in block_places {
            put64(&mut table, us(index * 8), at);
        }
        self.write(places.table.start, &table).await?;
        Ok(table)
    }

    /// What the snapshot that comes or goes shares: one user more or less.
    async fn recount(&self, counts: &mut Counts, tables: &[Table], freed: &mut Freed) -> IoResult {
        for at in tables.iter().filter(|table| table.meets(counts)).map(|table| table.at).collect::<Vec<_>>() {
            let table = self.read_cluster(at).await?;
            for entry in self.entries(&table) {
                counts.add(self.clusters(entry?.place), self.gone.is_none(), freed)?;
            }
        }
        Ok(())
    }

    /// Writes the active L2 table at `from` to `place`, with the COPIED bits that fit `counts`.
    async fn write_table(&self, from: u64, place: u64, counts: &Counts) -> IoResult {
        let (bits, size) = (self.image.shape.cluster_bits, us(self.image.entry_size()));
        let old = self.read_cluster(from).await?;
        let mut new = old.clone();
        for (i, entry) in self.entries(&old).enumerate() {
            if let Place::Plain { at, .. } = entry?.place
                && let Some(count) = counts.get(at >> bits)
            {
                let word = be64(&old, i * size) & !COPIED;
                put64(&mut new, i * size, if count == 1 { word | COPIED } else { word });
            }
        }
        self.write(place, &new).await
    }

    /// Writes the L1 table, which this gives.
    async fn write_l1(&self, old: &[u64], places: &Places) -> IoResult<Vec<u64>> {
        let bits = self.image.shape.cluster_bits;
        let mut tables = places.tables.iter();
        let mut new = Vec::with_capacity(old.len());
        for entry in old {
            new.push(match entry & OFFSET {
                0 => 0,
                _ => (tables.next().ok_or(Errno::EUCLEAN)? << bits) | COPIED,
            });
        }
        let bytes: Vec<u8> = new.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        self.write(places.l1.start, &bytes).await?;
        Ok(new)
    }

    /// Writes whole clusters, filled up with zeroes.
    async fn write(&self, cluster: u64, bytes: &[u8]) -> IoResult {
        if bytes.is_empty() {
            return Ok(());
        }
        let buf = IoBuf::zeroed(bytes.len().next_multiple_of(us(self.image.shape.cluster())));
        buf.write_at(0, bytes);
        self.image.file.write(cluster << self.image.shape.cluster_bits, &buf, WriteFlags::NONE).await
    }
}
