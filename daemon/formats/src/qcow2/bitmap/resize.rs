//! Bitmaps of a disk that gets another length: their tables grow and shrink with it, and bits behind the end are cleared.
//!
//! Meanwhile all bitmaps are marked as in use, disabled ones too: after a crash they count as inconsistent, whatever length
//! the disk has then. Only their references must be right at any time, so that no cluster is named that is not counted. A
//! table that moves to a larger place is cut to one entry before: its place and its length are not changed by one write.
//!
//! What needs space is done before the disk changes, by [`Qcow2::plan_bitmaps`]: a full disk fails the resize as a whole.

use super::{Bitmap, FLAGS_AT, MAX_DATA};
use crate::qcow2::bytes::{be64, u64_of, us};
use crate::qcow2::entry::OFFSET;
use crate::qcow2::guard::Kinds;
use crate::qcow2::image::{Free, Qcow2, lock};
use crate::qcow2::snapshot::clusters_for;
use block::{Errno, IoResult, WriteFlags};
use buf::IoBuf;
use qapi::{Error, Result};
use std::ops::Range;
use std::sync::atomic::Ordering;

/// Most entries of the tables of all bitmaps: 1000 bitmaps of a disk of 64 TiB, with the usual granularity. What becomes of them is
/// in memory at the same time.
const MAX_ENTRIES: u64 = 4 << 20;
/// An entry of a table of which all bits are set, and which has no cluster.
const ALL_SET: u64 = 1;

/// What becomes of a bitmap.
#[derive(Default)]
pub(in crate::qcow2) struct Change {
    /// Its index.
    bitmap: usize,
    /// Where its table will be, in bytes.
    table_at: u64,
    /// Entries that it will have.
    table_len: u32,
    /// The table has another place, where it has been written.
    moved: bool,
    /// Else: entries that change, from this one on.
    changed: (u64, Vec<u64>),
    /// The host offset of a cluster of bits, and from which bit on they are cleared.
    cut: Option<(u64, u64)>,
    /// What was claimed and is not named yet.
    claimed: Vec<Range<u64>>,
    /// What will not be named any more.
    gone: Vec<Range<u64>>,
}

impl Qcow2 {
    /// Prepares all bitmaps for a disk of `size` bytes: what was recorded is stored, and they are marked. Nothing is in flight.
    ///
    /// # Errors
    /// A bitmap is inconsistent, or would be too large; those of the file. No bitmap has changed then.
    pub(in crate::qcow2) async fn suspend_bitmaps(&self, size: u64) -> Result<()> {
        let failed = |errno: Errno| Error::io("Failed to store the bitmaps of the image", errno.into());
        self.store_bitmaps().await.map_err(failed)?;
        let bitmaps = self.bitmaps.list();
        let mut entries = 0;
        for bitmap in &bitmaps {
            self.check_resize(bitmap, size)?;
            entries += bitmap.entries_for(size.max(self.length_now()), self.shape.cluster());
        }
        if entries > MAX_ENTRIES {
            return Err(Error::generic(format!(
                "The bitmaps of the image are too large to be resized with it: their tables have {entries} entries, and \
                 {MAX_ENTRIES} are the most; remove some bitmaps before ('qemu-img bitmap --remove')"
            )));
        }
        self.mark_all(bitmaps.len(), true).await.map_err(failed)
    }

    fn check_resize(&self, bitmap: &Bitmap, size: u64) -> Result<()> {
        let (name, cluster) = (&bitmap.name, self.shape.cluster());
        if bitmap.in_use {
            return Err(Error::generic(format!("Bitmap '{name}' is inconsistent and cannot be used")));
        }
        if !bitmap.known || u64::from(bitmap.table_len) != bitmap.entries_for(self.length_now(), cluster) {
            return Err(Error::generic(format!("Bitmap '{name}' doesn't satisfy the constraints")));
        }
        if bitmap.entries_for(size, cluster) > MAX_DATA / cluster {
            return Err(Error::generic(format!("Bitmap '{name}' would be larger than {MAX_DATA} bytes")));
        }
        Ok(())
    }

    async fn mark_all(&self, count: usize, in_use: bool) -> IoResult {
        if count == 0 {
            return Ok(());
        }
        for index in 0..count {
            self.set_in_use(index, in_use).await?;
        }
        self.file.flush().await
    }

    /// Bitmaps count again, and record. What the resize itself has written is not a change of the guest's.
    ///
    /// # Errors
    /// Those of the file. The bitmaps stay marked then.
    pub(in crate::qcow2) async fn resume_bitmaps(&self) -> IoResult {
        lock(&self.bitmaps.records).clear();
        self.bitmaps.armed.store(false, Ordering::Release);
        let count = self.bitmaps.list().len();
        self.mark_all(count, false).await
    }

    /// Finds out how all bitmaps become those of a disk of `size` bytes, and writes what nothing names yet.
    ///
    /// # Errors
    /// Those of the file. Nothing has changed then.
    pub(in crate::qcow2) async fn plan_bitmaps(&self, size: u64) -> IoResult<Vec<Change>> {
        let mut changes = Vec::new();
        for (index, bitmap) in self.bitmaps.list().into_iter().enumerate() {
            let mut change = Change { bitmap: index, table_at: bitmap.table_at, ..Change::default() };
            let planned = self.plan_bitmap(&bitmap, size, &mut change).await;
            changes.push(change);
            if let Err(errno) = planned {
                self.drop_changes(changes).await;
                return Err(errno);
            }
        }
        Ok(changes)
    }

    /// Gives back what was claimed for changes that are not to be.
    pub(in crate::qcow2) async fn drop_changes(&self, changes: Vec<Change>) {
        for clusters in changes.into_iter().flat_map(|change| change.claimed) {
            self.unclaim(clusters).await;
        }
    }

    async fn plan_bitmap(&self, bitmap: &Bitmap, size: u64, change: &mut Change) -> IoResult {
        let (cluster, bits) = (self.shape.cluster(), self.shape.cluster_bits);
        let buf = IoBuf::alloc(us(u64::from(bitmap.table_len) * 8));
        self.file.read(bitmap.table_at, &buf).await?;
        let old: Vec<u64> = buf.to_vec().chunks_exact(8).map(|entry| be64(entry, 0)).collect();
        let len = bitmap.entries_for(size, cluster);
        change.table_len = u32::try_from(len).map_err(|_| Errno::EFBIG)?;
        let mut entries: Vec<u64> = old.iter().copied().chain(std::iter::repeat(0)).take(us(len)).collect();
        let mut first = old.len().min(entries.len());
        let named = old.iter().skip(entries.len()).map(|entry| (entry & OFFSET) >> bits);
        change.gone.extend(named.filter(|cluster| *cluster != 0).map(|cluster| cluster..cluster + 1));
        // Bits behind the end of either disk must not come back when it grows.
        let kept = size.min(self.length_now()).div_ceil(bitmap.granularity);
        let (chunk, from) = (us(kept / (cluster * 8)), kept % (cluster * 8));
        if from != 0
            && let Some(entry) = entries.get_mut(chunk)
            && let Some(host) = self.plan_cut(*entry, from, change).await?
        {
            *entry = host;
            first = first.min(chunk);
        }
        let place = bitmap.table_at >> bits;
        let (before, after) = (clusters_for(old.len() * 8, cluster), clusters_for(entries.len() * 8, cluster));
        if after > before {
            let row = self.refs.claim_row(after, &self.file).await?;
            change.claimed.push(row.clone());
            change.table_at = row.start << bits;
            change.moved = true;
            self.write_piece(Kinds::NONE, change.table_at, &encode(&entries)).await?;
            change.gone.push(place..place + before);
        } else {
            change.changed = (u64_of(first), entries.split_off(first));
            change.gone.push(place + after..place + before);
        }
        Ok(())
    }

    /// The bits from `from` on in what a table's entry names are to be cleared: in place, or in a cluster that the table is to
    /// name instead.
    async fn plan_cut(&self, entry: u64, from: u64, change: &mut Change) -> IoResult<Option<u64>> {
        let (cluster, bits, host) = (self.shape.cluster(), self.shape.cluster_bits, entry & OFFSET);
        if host == 0 && entry & ALL_SET == 0 {
            return Ok(None);
        }
        let data = IoBuf::alloc(us(cluster));
        if host == 0 {
            data.fill(0xff);
        } else if self.is_own_data(host).await? {
            change.cut = Some((host, from));
            return Ok(None);
        } else {
            self.file.read(host, &data).await?;
            change.gone.push(host >> bits..(host >> bits) + 1);
        }
        clear_from(&data, from);
        let new = self.claim(1, None).await?;
        let at = new.start << bits;
        change.claimed.push(new);
        self.write_data(at, &data).await?;
        Ok(Some(at))
    }

    /// Changes the bitmaps, when the disk has changed.
    ///
    /// # Errors
    /// Those of the file. The bitmaps are to stay marked then.
    pub(in crate::qcow2) async fn change_bitmaps(&self, changes: Vec<Change>) -> IoResult {
        for change in &changes {
            let found = lock(&self.bitmaps.bitmaps).get(change.bitmap).map(|bitmap| bitmap.flags_at - FLAGS_AT);
            let Some(entry) = found else { continue };
            if let Some((host, from)) = change.cut {
                let data = IoBuf::alloc(us(self.shape.cluster()));
                self.file.read(host, &data).await?;
                clear_from(&data, from);
                self.write_data(host, &data).await?;
            }
            let (first, changed) = &change.changed;
            self.write_piece(Kinds::NONE, change.table_at + first * 8, &encode(changed)).await?;
            let own = Kinds::BITMAP_DIRECTORY;
            if change.moved {
                self.write_piece(own, entry + 8, &1u32.to_be_bytes()).await?;
                self.file.flush().await?;
                self.write_piece(own, entry, &change.table_at.to_be_bytes()).await?;
            }
            self.file.flush().await?;
            self.write_piece(own, entry + 8, &change.table_len.to_be_bytes()).await?;
            if let Some(bitmap) = lock(&self.bitmaps.bitmaps).get_mut(change.bitmap) {
                bitmap.table_at = change.table_at;
                bitmap.table_len = change.table_len;
            }
        }
        self.file.flush().await?;
        let discard = self.discards().other;
        let gone = changes.into_iter().flat_map(|change| change.gone).filter(|clusters| !clusters.is_empty());
        lock(&self.unlinked).extend(gone.map(|clusters| Free { clusters, discard, table: false }));
        Ok(())
    }

    async fn write_piece(&self, own: Kinds, at: u64, bytes: &[u8]) -> IoResult {
        if bytes.is_empty() {
            return Ok(());
        }
        self.check_overlap(own, at, u64_of(bytes.len()))?;
        self.file.write(at, &IoBuf::copy_of(bytes), WriteFlags::NONE).await
    }
}

fn encode(entries: &[u64]) -> Vec<u8> {
    entries.iter().flat_map(|entry| entry.to_be_bytes()).collect()
}

/// Clears the bits of a cluster from `from` on.
fn clear_from(data: &IoBuf, from: u64) {
    let (byte, bit) = (us(from / 8), from % 8);
    let mut last = [0];
    data.read_at(byte, &mut last);
    data.write_at(byte, &last.map(|byte| byte & !(0xff << bit)));
    data.slice(byte + 1, data.len() - byte - 1).fill(0);
}
