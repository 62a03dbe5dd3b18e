//! The bitmaps extension [qcow2 §Bitmaps extension]: which bitmaps an image has, and the recording of writes in those that are
//! enabled.
//!
//! Before the first change of the image every enabled bitmap is marked as in use, for good: after a crash it counts as
//! inconsistent, for it may lack writes. What is written meanwhile is kept in memory. When the image is closed that is added
//! to the bitmap's data and the mark is taken off. A bitmap that cannot be kept up keeps the mark. Bitmaps that are
//! disabled, or inconsistent already, are left as they are.

pub(super) mod resize;

use super::bytes::{be16, be32, be64, put32, u64_of, us};
use super::entry::OFFSET;
use super::extensions::Bitmaps;
use super::guard::Kinds;
use super::header::Header;
use super::image::{Qcow2, lock};
use block::{Edge, IoResult, Span, WriteFlags};
use buf::IoBuf;
use qapi::{Error, Result};
use std::collections::{BTreeMap, HashMap};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// Most bytes of a directory; the reference's limit.
pub const MAX_DIRECTORY: u64 = 64 << 20;
/// Most bitmaps; the reference's limit.
const MAX_BITMAPS: u32 = 65535;
/// Most bytes of the data of a bitmap; the reference's limit.
const MAX_DATA: u64 = 512 << 20;
/// Bytes of the fixed part of an entry.
const FIXED: usize = 24;
/// Where the flags are in an entry: behind the place of the table, and its length.
const FLAGS_AT: u64 = 12;
/// Flag of an entry: the bitmap was not stored when the image was closed.
const IN_USE: u32 = 1;
/// Flag of an entry: the bitmap records all writes.
const AUTO: u32 = 2;
/// The one type of bitmaps: it tells what was written.
const DIRTY_TRACKING: u8 = 1;
/// Bytes of the pieces in which records are kept.
const PIECE: usize = 512;
/// Most pieces: 128 MiB. What would take more is not recorded, and its bitmap stays marked.
const MAX_PIECES: usize = 256 << 10;

/// An entry of the directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Bitmap {
    /// The name.
    pub name: String,
    /// Bytes of the guest's disk that one bit stands for.
    pub granularity: u64,
    /// It was not stored when the image was closed, or is being recorded in.
    pub in_use: bool,
    /// It records writes.
    pub auto: bool,
    /// It is of the one type that there is, and nothing more is said of it.
    known: bool,
    /// Where its flags are in the image.
    flags_at: u64,
    flags: u32,
    table_at: u64,
    table_len: u32,
}

type Piece = Box<[u8; PIECE]>;

/// Bits that were set since the image was opened, in pieces.
#[derive(Debug, Default)]
struct Record {
    pieces: BTreeMap<u64, Piece>,
    /// Too much to be kept.
    lost: bool,
}

/// The bitmaps of an open image.
#[derive(Debug, Default)]
pub(super) struct Recorder {
    /// Where the directory is. Never across an await.
    directory: Mutex<Option<Bitmaps>>,
    /// All bitmaps, in the order of the directory. Never across an await.
    bitmaps: Mutex<Vec<Bitmap>>,
    /// Some bitmap is enabled.
    any: AtomicBool,
    /// The enabled bitmaps are marked in the image.
    armed: AtomicBool,
    /// One at a time arms.
    arming: tokio::sync::Mutex<()>,
    /// Guards what was recorded, by the index of the bitmap; never across an await.
    records: Mutex<HashMap<usize, Record>>,
}

impl Recorder {
    /// Reads the directory.
    ///
    /// # Errors
    /// It is malformed.
    pub async fn read(file: &Edge, header: &Header, bitmaps: Option<&Bitmaps>) -> Result<Self> {
        let Some(bitmaps) = bitmaps.filter(|_| header.has_bitmaps()) else {
            // Without its bit the extension counts for nothing: somebody who does not know bitmaps has written to the image.
            return Ok(Self::default());
        };
        let bad = |why: &str| Err(Error::generic(format!("bitmaps_ext: {why}")));
        if bitmaps.count == 0 || bitmaps.count > MAX_BITMAPS {
            return bad("found bitmaps extension with an impossible number of bitmaps");
        }
        if bitmaps.at == 0 || !bitmaps.at.is_multiple_of(header.cluster_size()) {
            return bad("Invalid bitmap directory offset");
        }
        if bitmaps.len > MAX_DIRECTORY || bitmaps.at.checked_add(bitmaps.len).is_none_or(|end| end > file.size()) {
            return bad("bitmap directory lies beyond the end of the image");
        }
        let buf = IoBuf::alloc(us(bitmaps.len));
        file.read(bitmaps.at, &buf)
            .await
            .map_err(|errno| Error::io("Failed to read bitmap directory", errno.into()))?;
        let bytes = buf.to_vec();
        let mut found = Vec::new();
        let mut at = 0;
        for _ in 0..bitmaps.count {
            let Some((bitmap, len)) = parse(&bytes, at, bitmaps.at) else { return bad("Broken bitmap directory") };
            bitmap.check(header)?;
            found.push(bitmap);
            at = at.saturating_add(len);
        }
        let any = found.iter().any(|bitmap| bitmap.auto && !bitmap.in_use).into();
        Ok(Self { directory: Some(bitmaps.clone()).into(), bitmaps: found.into(), any, ..Self::default() })
    }

    /// Becomes `new`, which has been read after others may have changed the image. Nothing is in flight.
    pub fn replace(&self, new: Self) {
        let Self { directory, bitmaps, any, .. } = new;
        *lock(&self.directory) = std::mem::take(&mut *lock(&directory));
        *lock(&self.bitmaps) = std::mem::take(&mut *lock(&bitmaps));
        self.any.store(any.into_inner(), Ordering::Release);
        self.armed.store(false, Ordering::Release);
        lock(&self.records).clear();
    }

    /// Where the directory is, in bytes, and how long.
    pub fn directory(&self) -> Option<(u64, u64)> {
        lock(&self.directory).as_ref().map(|directory| (directory.at, directory.len))
    }

    /// All bitmaps.
    pub fn list(&self) -> Vec<Bitmap> {
        lock(&self.bitmaps).clone()
    }

    /// Notes that `span` is being changed.
    fn record(&self, span: Span) {
        let bitmaps = lock(&self.bitmaps);
        let mut records = lock(&self.records);
        let mut kept: usize = records.values().map(|record| record.pieces.len()).sum();
        for (index, record) in records.iter_mut().filter(|(_, record)| !record.lost) {
            let Some(bitmap) = bitmaps.get(*index) else { continue };
            let (mut bit, last) = (span.at / bitmap.granularity, (span.end() - 1) / bitmap.granularity);
            let per_piece = u64_of(PIECE) * 8;
            while bit <= last {
                let piece = bit / per_piece;
                if !record.pieces.contains_key(&piece) {
                    kept += 1;
                    if kept > MAX_PIECES {
                        kept -= record.pieces.len();
                        *record = Record { lost: true, ..Record::default() };
                        break;
                    }
                }
                let bits = record.pieces.entry(piece).or_insert_with(|| Box::new([0; PIECE]));
                let end = last.min((piece + 1) * per_piece - 1);
                for bit in bit..=end {
                    if let Some(byte) = bits.get_mut(us(bit % per_piece / 8)) {
                        *byte |= 1 << (bit % 8);
                    }
                }
                bit = end + 1;
            }
        }
    }
}

/// The entry at `at` of a directory, and its length; `base` is where the directory is in the image.
fn parse(directory: &[u8], at: usize, base: u64) -> Option<(Bitmap, usize)> {
    let entry = directory.get(at..).filter(|rest| rest.len() >= FIXED)?;
    let (flags, name_len, extra) = (be32(entry, 12), usize::from(be16(entry, 18)), us(be32(entry, 20).into()));
    let end = FIXED.checked_add(extra)?.checked_add(name_len)?;
    let name = entry.get(FIXED.checked_add(extra)?..end)?;
    let bits = entry.get(17).copied().filter(|bits| (9..=31).contains(bits))?;
    let known = entry.get(16) == Some(&DIRTY_TRACKING) && extra == 0;
    let bitmap = Bitmap {
        name: String::from_utf8_lossy(name).into_owned(),
        granularity: 1 << bits,
        in_use: flags & IN_USE != 0,
        // Extra data is not understood, so nothing is recorded that it might say something of.
        auto: flags & AUTO != 0 && known,
        known,
        flags_at: base + u64_of(at) + FLAGS_AT,
        flags,
        table_at: be64(entry, 0),
        table_len: be32(entry, 8),
    };
    Some((bitmap, end.next_multiple_of(8)))
}

impl Bitmap {
    fn check(&self, header: &Header) -> Result<()> {
        let aligned = self.table_at != 0 && self.table_at.is_multiple_of(header.cluster_size());
        let data = u64::from(self.table_len) << header.cluster_bits;
        if !aligned || self.table_len == 0 || data > MAX_DATA || self.name.len() > 1023 {
            return Err(Error::generic(format!("Bitmap '{}' doesn't satisfy the constraints", self.name)));
        }
        Ok(())
    }

    /// Entries of the table of this bitmap for a disk of `size` bytes and clusters of `cluster` bytes.
    fn entries_for(&self, size: u64, cluster: u64) -> u64 {
        size.div_ceil(self.granularity).div_ceil(8).div_ceil(cluster)
    }
}

impl Qcow2 {
    /// Before a change of `span`: enabled bitmaps are marked, and know of it.
    pub(super) async fn record(&self, span: Span) -> IoResult {
        let recorder = &self.bitmaps;
        if !recorder.any.load(Ordering::Acquire) || span.len == 0 {
            return Ok(());
        }
        if !recorder.armed.load(Ordering::Acquire) {
            self.arm().await?;
        }
        recorder.record(span);
        Ok(())
    }

    async fn arm(&self) -> IoResult {
        let recorder = &self.bitmaps;
        let _arming = recorder.arming.lock().await;
        if recorder.armed.load(Ordering::Acquire) {
            return Ok(());
        }
        let wanted: Vec<usize> = {
            let bitmaps = lock(&recorder.bitmaps);
            let enabled = |(_, bitmap): &(usize, &Bitmap)| bitmap.auto && !bitmap.in_use;
            bitmaps.iter().enumerate().filter(enabled).map(|(index, _)| index).collect()
        };
        for index in &wanted {
            self.set_in_use(*index, true).await?;
        }
        self.file.flush().await?;
        *lock(&recorder.records) = wanted.into_iter().map(|index| (index, Record::default())).collect();
        recorder.armed.store(true, Ordering::Release);
        Ok(())
    }

    async fn set_in_use(&self, index: usize, in_use: bool) -> IoResult {
        let found = lock(&self.bitmaps.bitmaps).get(index).map(|bitmap| (bitmap.flags_at, bitmap.flags));
        let Some((at, flags)) = found else { return Ok(()) };
        let flags = if in_use { flags | IN_USE } else { flags & !IN_USE };
        let mut bytes = [0; 4];
        put32(&mut bytes, 0, flags);
        self.check_overlap(Kinds::BITMAP_DIRECTORY, at, 4)?;
        self.file.write(at, &IoBuf::copy_of(&bytes), WriteFlags::NONE).await?;
        if let Some(bitmap) = lock(&self.bitmaps.bitmaps).get_mut(index) {
            bitmap.flags = flags;
            bitmap.in_use = in_use;
        }
        Ok(())
    }

    /// Adds what was recorded to the bitmaps. Nothing is in flight, and everything else has been written.
    ///
    /// # Errors
    /// Those of the file. The bitmaps stay marked then.
    pub(super) async fn store_bitmaps(&self) -> IoResult {
        let recorder = &self.bitmaps;
        if !recorder.armed.load(Ordering::Acquire) {
            return Ok(());
        }
        let records = std::mem::take(&mut *lock(&recorder.records));
        recorder.armed.store(false, Ordering::Release);
        let mut stored = Vec::new();
        let mut tables = Vec::new();
        for (index, record) in records.into_iter().filter(|(_, record)| !record.lost) {
            let found = lock(&recorder.bitmaps).get(index).cloned();
            let Some(bitmap) = found else { continue };
            if let Some(changed) = self.store_data(&bitmap, record).await? {
                tables.extend(changed);
                stored.push(index);
            }
        }
        if !tables.is_empty() {
            // The new clusters are counted before anything names them.
            self.write_out().await?;
            for (at, entry) in tables {
                self.check_overlap(Kinds::NONE, at, 8)?;
                self.file.write(at, &IoBuf::copy_of(&entry.to_be_bytes()), WriteFlags::NONE).await?;
            }
        }
        self.file.flush().await?;
        for index in stored {
            self.set_in_use(index, false).await?;
        }
        self.file.flush().await
    }

    /// Adds bits to the data of a bitmap; the entries of its table that change, or none if the table is not one of this disk.
    async fn store_data(&self, bitmap: &Bitmap, record: Record) -> IoResult<Option<Vec<(u64, u64)>>> {
        let cluster = self.shape.cluster();
        let needed = bitmap.entries_for(self.length_now(), cluster);
        let len = u64::from(bitmap.table_len) * 8;
        if u64::from(bitmap.table_len) != needed || bitmap.table_at + len > self.file.size() {
            return Ok(None);
        }
        let mut chunks: BTreeMap<u64, Vec<(usize, Piece)>> = BTreeMap::new();
        for (piece, bits) in record.pieces {
            let at = piece * u64_of(PIECE);
            chunks.entry(at / cluster).or_default().push((us(at % cluster), bits));
        }
        let mut changed = Vec::new();
        for (chunk, pieces) in chunks {
            let place = bitmap.table_at + chunk * 8;
            let entry = IoBuf::alloc(8);
            self.file.read(place, &entry).await?;
            let entry = be64(&entry.to_vec(), 0);
            let host = entry & OFFSET;
            if host == 0 && entry & 1 != 0 {
                // All bits are set already.
                continue;
            }
            if !host.is_multiple_of(cluster) {
                return Ok(None);
            }
            let data = if host == 0 { IoBuf::zeroed(us(cluster)) } else { IoBuf::alloc(us(cluster)) };
            if host != 0 {
                self.file.read(host, &data).await?;
            }
            for (at, bits) in pieces {
                let mut old = [0; PIECE];
                data.read_at(at, &mut old);
                old.iter_mut().zip(bits.iter()).for_each(|(old, new)| *old |= new);
                data.write_at(at, &old);
            }
            // A cluster that somebody else has as well is left to them.
            let own = host != 0 && self.is_own_data(host).await?;
            let target = if own { host } else { self.claim(1, None).await?.start << self.shape.cluster_bits };
            self.write_data(target, &data).await?;
            if target != host {
                changed.push((place, target));
            }
        }
        Ok(Some(changed))
    }

    /// Whether the cluster of bits at `host` is nobody else's.
    async fn is_own_data(&self, host: u64) -> IoResult<bool> {
        Ok(self.refs.get(host >> self.shape.cluster_bits, &self.file).await? == 1)
    }

    async fn write_data(&self, at: u64, data: &IoBuf) -> IoResult {
        self.check_overlap(Kinds::NONE, at, self.shape.cluster())?;
        self.file.write(at, data, WriteFlags::NONE).await
    }
}
