//! Another state of all metadata, entered by one write of the header.
//!
//! Making or deleting an internal snapshot changes the counts of all clusters that it shares, and with them the COPIED bit
//! of every active L2 entry that names one: neither may be seen without the other. So nothing is changed in place. The
//! active L1 table, its L2 tables, all refcount blocks, the refcount table and the table of snapshots are written to clusters
//! that were free, behind a barrier the header names them all at once, and then the old ones are free. A crash before that
//! leaks the new ones; a crash after it leaks nothing.
//!
//! Nothing is in flight above the image meanwhile.

use super::bytes::{be64, put64, u64_of, us};
use super::entry::{COPIED, Entry, OFFSET, Place};
use super::image::Qcow2;
use super::refcount::Width;
use super::snapshot::{Snapshot, clusters_for, encode_table};
use block::{Errno, IoResult, Span, WriteFlags};
use buf::IoBuf;
use std::collections::{BTreeMap, VecDeque};
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

/// Refcount blocks as they will be.
struct Counts {
    width: Width,
    cluster_bits: u32,
    /// By index.
    blocks: BTreeMap<u64, Vec<u8>>,
    /// Clusters that nobody uses any more.
    freed: Vec<u64>,
}

impl Counts {
    fn per_block(&self) -> u64 {
        1 << (self.cluster_bits + 3 - self.width.0)
    }

    fn get(&self, cluster: u64) -> u64 {
        let block = self.blocks.get(&(cluster / self.per_block()));
        block.map_or(0, |bytes| self.width.read(bytes, cluster % self.per_block()))
    }

    /// One user more or less. `EINVAL` where the count is too narrow, `EUCLEAN` where it is wrong.
    fn add(&mut self, clusters: Range<u64>, more: bool) -> IoResult {
        let (per_block, width) = (self.per_block(), self.width);
        for cluster in clusters {
            let bytes = self.blocks.get_mut(&(cluster / per_block)).ok_or(Errno::EUCLEAN)?;
            let count = width.read(bytes, cluster % per_block);
            let new = if more {
                count.checked_add(1).filter(|new| *new <= width.most()).ok_or(Errno::EINVAL)?
            } else {
                count.checked_sub(1).ok_or(Errno::EUCLEAN)?
            };
            width.write(bytes, cluster % per_block, new);
            if new == 0 {
                self.freed.push(cluster);
            }
        }
        Ok(())
    }
}

/// Where the new metadata goes.
struct Places {
    l1: Range<u64>,
    table: Range<u64>,
    snapshots: Range<u64>,
    /// For L2 tables and refcount blocks.
    single: VecDeque<u64>,
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
        let places = self.claim(claimed).await?;
        let _turn = image.turn.lock().await;
        let mut counts = self.load_counts().await?;
        let l1 = self.l1();
        self.recount(&mut counts, &l1).await?;
        self.free_old(&mut counts)?;
        let new_l1 = self.write_tables(&counts, &l1, &places).await?;
        let table = self.write_counts(&counts, &places).await?;
        let snapshots = encode_table(&self.list);
        self.write(places.snapshots.start, &snapshots).await?;
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
        self.discard(counts.freed).await;
        Ok(())
    }

    fn l1(&self) -> Vec<u64> {
        self.image.l1.read().unwrap_or_else(PoisonError::into_inner).entries.clone()
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

    /// Claims a place for everything; claiming may need more refcount blocks, which need places too.
    async fn claim(&self, claimed: &mut Vec<Range<u64>>) -> IoResult<Places> {
        let image = self.image;
        let cluster = image.shape.cluster();
        let entries = self.l1();
        let l1 = self.claim_row(clusters_for(entries.len() * 8, cluster), claimed).await?;
        let snapshots = self.claim_row(clusters_for(encode_table(&self.list).len(), cluster), claimed).await?;
        let tables = entries.iter().filter(|entry| **entry & OFFSET != 0).count();
        let mut single: VecDeque<u64> = VecDeque::new();
        let mut table: Range<u64> = 0..0;
        loop {
            // The table may have grown in memory: it is written where it belongs first.
            image.write_out().await?;
            let (old_table, blocks) = image.refs.places();
            let needed = old_table.end - old_table.start;
            let missing = (tables + blocks.len()).saturating_sub(single.len());
            if missing == 0 && table.end - table.start >= needed {
                break;
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
        Ok(Places { l1, table, snapshots, single })
    }

    /// All refcount blocks as they are, which is as they are in the image.
    async fn load_counts(&self) -> IoResult<Counts> {
        let image = self.image;
        let header = image.header_now();
        let mut blocks = BTreeMap::new();
        for (index, at) in image.refs.block_places() {
            let block = image.refs.blocks.get(at, &image.file).await?;
            blocks.insert(index, block.look(<[u8]>::to_vec));
        }
        let cluster_bits = image.shape.cluster_bits;
        Ok(Counts { width: Width(header.refcount_order), cluster_bits, blocks, freed: Vec::new() })
    }

    async fn read_cluster(&self, at: u64) -> IoResult<Vec<u8>> {
        let cluster = self.image.shape.cluster();
        if !at.is_multiple_of(cluster) || at.saturating_add(cluster) > self.image.file.size().next_multiple_of(cluster)
        {
            return Err(self.image.damage(&format!("L2 table offset {at:#x} is unaligned or behind the end")));
        }
        let buf = IoBuf::alloc(us(cluster));
        self.image.file.read(at, &buf).await?;
        Ok(buf.to_vec())
    }

    /// The entries of an L2 table.
    fn entries(&self, table: &[u8]) -> IoResult<Vec<Entry>> {
        let image = self.image;
        let size = us(image.entry_size());
        table
            .chunks_exact(size)
            .map(|entry| {
                let bitmap = if size == 16 { be64(entry, 8) } else { 0 };
                Entry::decode(image.shape, be64(entry, 0), bitmap).map_err(|_| image.damage("an L2 entry is malformed"))
            })
            .collect()
    }

    fn clusters(&self, place: Place) -> Range<u64> {
        let bits = self.image.shape.cluster_bits;
        match place {
            Place::None => 0..0,
            Place::Plain { at, .. } => at >> bits..(at >> bits) + 1,
            Place::Packed { at, len } => at >> bits..((at + len - 1) >> bits) + 1,
        }
    }

    /// What the snapshot that comes or goes shares: one user more or less.
    async fn recount(&self, counts: &mut Counts, l1: &[u64]) -> IoResult {
        let bits = self.image.shape.cluster_bits;
        let theirs;
        let l1 = match &self.gone {
            None => l1,
            Some(gone) => {
                theirs = self.l1_of(gone).await?;
                &theirs
            }
        };
        for entry in l1.iter().map(|entry| entry & OFFSET).filter(|at| *at != 0) {
            for entry in self.entries(&self.read_cluster(entry).await?)? {
                counts.add(self.clusters(entry.place), self.gone.is_none())?;
            }
            if self.gone.is_some() {
                counts.add(entry >> bits..(entry >> bits) + 1, false)?;
            }
        }
        Ok(())
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

    /// What the header will not name any more.
    fn free_old(&self, counts: &mut Counts) -> IoResult {
        let image = self.image;
        let (bits, header) = (image.shape.cluster_bits, image.header_now());
        let clusters = |at: u64, len: u64| at >> bits..(at >> bits) + len.div_ceil(1 << bits);
        let l1_len = u64::from(header.l1_entries) * 8;
        match &self.gone {
            // The old L1 table and its L2 tables are the new snapshot's.
            None => {}
            Some(gone) => {
                counts.add(clusters(header.l1_at, l1_len), false)?;
                for entry in self.l1().into_iter().map(|entry| entry & OFFSET).filter(|at| *at != 0) {
                    counts.add(clusters(entry, 1), false)?;
                }
                counts.add(clusters(gone.l1_at, u64::from(gone.l1_entries) * 8), false)?;
            }
        }
        if header.snapshots > 0 {
            counts.add(clusters(header.snapshots_at, self.table_len), false)?;
        }
        let (table, blocks) = image.refs.places();
        counts.add(table, false)?;
        for block in blocks {
            counts.add(block..block + 1, false)?;
        }
        Ok(())
    }

    /// Writes the active L2 tables with the COPIED bits that fit the new counts, and the L1 table; gives the latter.
    async fn write_tables(&self, counts: &Counts, l1: &[u64], places: &Places) -> IoResult<Vec<u64>> {
        let image = self.image;
        let (bits, size) = (image.shape.cluster_bits, us(image.entry_size()));
        let mut single = places.single.iter();
        let mut new = Vec::with_capacity(l1.len());
        for entry in l1 {
            if entry & OFFSET == 0 {
                new.push(0);
                continue;
            }
            let mut table = self.read_cluster(entry & OFFSET).await?;
            let entries = self.entries(&table)?;
            for (i, entry) in entries.into_iter().enumerate() {
                if let Place::Plain { at, .. } = entry.place {
                    let alone = counts.get(at >> bits) == 1;
                    let word = be64(&table, i * size) & !COPIED;
                    put64(&mut table, i * size, if alone { word | COPIED } else { word });
                }
            }
            let place = *single.next().ok_or(Errno::EUCLEAN)?;
            self.write(place, &table).await?;
            new.push((place << bits) | COPIED);
        }
        let bytes: Vec<u8> = new.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        self.write(places.l1.start, &bytes).await?;
        Ok(new)
    }

    /// Writes the refcount blocks and their table; gives the bytes of the latter.
    async fn write_counts(&self, counts: &Counts, places: &Places) -> IoResult<Vec<u8>> {
        let bits = self.image.shape.cluster_bits;
        let tables = self.l1().iter().filter(|entry| **entry & OFFSET != 0).count();
        let mut single = places.single.iter().skip(tables);
        let mut table = vec![0; us((places.table.end - places.table.start) << bits)];
        for (index, bytes) in &counts.blocks {
            let place = *single.next().ok_or(Errno::EUCLEAN)?;
            self.write(place, bytes).await?;
            put64(&mut table, us(index * 8), place << bits);
        }
        self.write(places.table.start, &table).await?;
        Ok(table)
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

    /// Gives the space back. A hint: what cannot be discarded stays.
    async fn discard(&self, mut freed: Vec<u64>) {
        if !self.image.discards().snapshot {
            return;
        }
        let bits = self.image.shape.cluster_bits;
        freed.sort_unstable();
        let mut spans: Vec<Span> = Vec::new();
        for cluster in freed {
            match spans.last_mut() {
                Some(last) if last.end() == cluster << bits => last.len += 1 << bits,
                _ => spans.push(Span::new(cluster << bits, 1 << bits)),
            }
        }
        for span in spans {
            let _ = self.image.file.discard(span).await;
        }
    }
}
