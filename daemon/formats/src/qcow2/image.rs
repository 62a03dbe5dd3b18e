//! [`Qcow2`]: an open image, its state, and how a guest offset becomes a place.
//!
//! All state is shared by all threads. Locks guard memory only and are never held across I/O. Requests on the same
//! clusters that change the mapping are serialised by a reservation; those that write where data already is are not.

use super::bitmap::Recorder;
use super::bytes::{be64, put64, u64_of, us};
use super::cache::{Block, Cache};
use super::cleaner::Cleaner;
use super::damage::Damage;
use super::entry::{COPIED, Entry, Malformed, OFFSET, Place, Shape};
use super::epoch::Epochs;
use super::extensions::Extensions;
use super::guard::Guard;
use super::handover::Handover;
use super::header::Header;
use super::refcount::{Refcounts, SECTOR};
use super::unpacked::Unpacked;
use crate::Workers;
use arc_swap::ArcSwapOption;
use block::overlap::Overlap;
use block::{Edge, IoResult};
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

/// The active L1 table [qcow2 §Cluster mapping].
#[derive(Debug, Default)]
pub(super) struct L1 {
    pub entries: Vec<u64>,
    /// Where it is, in bytes.
    pub at: u64,
    /// Sectors of it that have to be written.
    pub dirty: BTreeSet<u64>,
    /// Sectors of it that the host does not have, see `handover`.
    pub unhanded: BTreeSet<u64>,
}

/// Host clusters that nothing refers to any more, as soon as what unlinked them is in the image for good.
#[derive(Clone, Debug)]
pub(super) struct Free {
    pub clusters: Range<u64>,
    /// The space is given back to the file below.
    pub discard: bool,
    /// It was an L2 table, so that slices of it may be cached.
    pub table: bool,
}

/// What the options make of discards that are passed to the file below.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Discards {
    /// Those of the client.
    pub request: bool,
    /// Those of clusters that are given up for other reasons.
    pub other: bool,
    /// Those of clusters that only a deleted snapshot has used.
    pub snapshot: bool,
    /// A discarded cluster stays where it is.
    pub no_unref: bool,
}

impl Discards {
    /// As a number.
    pub fn bits(self) -> u8 {
        u8::from(self.request) | u8::from(self.other) << 1 | u8::from(self.no_unref) << 2 | u8::from(self.snapshot) << 3
    }

    fn of(bits: u8) -> Self {
        let has = |bit: u8| bits & bit != 0;
        Self { request: has(1), other: has(2), no_unref: has(4), snapshot: has(8) }
    }
}

/// What a flush has to keep in order, see `flush`.
#[derive(Debug, Default)]
pub(super) struct Turn {
    /// Number of the last turn that succeeded as a flush.
    pub done: u64,
    /// Number of the last turn that handed over.
    pub handed: u64,
    /// What of [`Refcounts::raised`] is in the image for good.
    pub counted: u64,
    /// What of [`Handover::exposed`] is in the image for good.
    pub stable: u64,
}

/// An open image.
#[derive(Debug)]
pub struct Qcow2 {
    pub(super) file: Arc<Edge>,
    pub(super) data_file: Option<Arc<Edge>>,
    /// What shows through where the image stores nothing. Replaced by the control task, while nothing is in flight.
    pub(super) backing: ArcSwapOption<Edge>,
    /// The name that the image has for it.
    /// Guards the name; never across an await.
    pub(super) backing_name: Mutex<Option<String>>,
    pub(super) shape: Shape,
    /// Guards the header as it is in the image. Changed by flushes only, one at a time.
    pub(super) header: Mutex<Header>,
    pub(super) extensions: Extensions,
    pub(super) raw_data: bool,
    pub(super) read_only: AtomicBool,
    /// See [`Qcow2::discards`].
    pub(super) discards: AtomicU8,
    /// Refcounts are written when the image is closed.
    pub(super) lazy: AtomicBool,
    /// Length of the guest's disk.
    pub(super) size: AtomicU64,
    /// Guards the L1 table; never across an await.
    pub(super) l1: RwLock<L1>,
    pub(super) l2: Arc<Cache>,
    pub(super) cleaner: Cleaner,
    pub(super) refs: Refcounts,
    pub(super) unpacked: Unpacked,
    /// Where clusters are unpacked.
    pub(super) workers: Workers,
    pub(super) epochs: Epochs,
    /// Guest clusters whose mapping is being changed, in bytes.
    pub(super) busy: Overlap,
    /// L1 entries that are being changed, by index.
    pub(super) tables: Overlap,
    /// What was unlinked since the last flush. Never across an await.
    pub(super) unlinked: Mutex<Vec<Free>>,
    /// That is so much that it should not wait for the guest to flush.
    pub(super) much_unlinked: AtomicBool,
    /// What was unlinked before it, and the epoch whose requests may still use it. Never across an await.
    pub(super) retired: Mutex<Vec<(u64, Vec<Free>)>>,
    pub(super) turn: tokio::sync::Mutex<Turn>,
    /// Turns that have begun.
    pub(super) turns: AtomicU64,
    pub(super) handover: Handover,
    /// What has to be done once before the first change has been done.
    pub(super) prepared: AtomicBool,
    /// One at a time does it.
    pub(super) preparing: tokio::sync::Mutex<()>,
    pub(super) bitmaps: Recorder,
    pub(super) guard: Guard,
    pub(super) damage: Damage,
}

/// Where some guest bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Where {
    /// They read as zero. The offset is that of the cluster that is reserved for them, if any.
    Zero(Option<u64>),
    /// Not in this image: in the backing file, or they read as zero if there is none.
    Backing,
    /// At this offset of the file with the data.
    Data(u64),
    /// In a compressed cluster.
    Packed {
        /// First byte of the compressed data.
        at: u64,
        /// Its length at most.
        len: u64,
        /// Offset of the bytes in the cluster.
        skip: u64,
    },
}

impl Where {
    /// What follows `len` bytes of this, if it goes on like this.
    fn after(self, len: u64) -> Option<Self> {
        match self {
            Self::Zero(at) => Some(Self::Zero(at.map(|at| at + len))),
            Self::Backing => Some(Self::Backing),
            Self::Data(at) => Some(Self::Data(at + len)),
            Self::Packed { .. } => None,
        }
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Qcow2 {
    /// What the options make of discards.
    pub(super) fn discards(&self) -> Discards {
        Discards::of(self.discards.load(Ordering::Relaxed))
    }

    /// The file with the guest's data.
    pub(super) fn data(&self) -> &Arc<Edge> {
        self.data_file.as_ref().unwrap_or(&self.file)
    }

    pub(super) fn entry_size(&self) -> u64 {
        if self.shape.subclusters == 32 { 16 } else { 8 }
    }

    /// Entries of an L2 table.
    pub(super) fn l2_entries(&self) -> u64 {
        self.shape.cluster() / self.entry_size()
    }

    /// Bytes of the guest's disk that one slice of an L2 table maps.
    pub(super) fn slice_reach(&self) -> u64 {
        u64_of(self.l2.unit()) / self.entry_size() * self.shape.cluster()
    }

    /// Bytes of the guest's disk that one L2 table maps.
    pub(super) fn l2_reach(&self) -> u64 {
        self.l2_entries() * self.shape.cluster()
    }

    /// The L1 entry for `at`; 0 beyond the table.
    pub(super) fn l1_entry(&self, at: u64) -> u64 {
        let l1 = self.l1.read().unwrap_or_else(PoisonError::into_inner);
        l1.entries.get(us(at / self.l2_reach())).copied().unwrap_or(0)
    }

    pub(super) fn set_l1_entry(&self, index: u64, value: u64) {
        let mut l1 = self.l1.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = l1.entries.get_mut(us(index)) {
            *entry = value;
        }
        l1.dirty.insert(index * 8 / SECTOR);
        l1.unhanded.insert(index * 8 / SECTOR);
    }

    /// Offset of the slice of the table at `table` that maps `at`.
    fn slice_at(&self, table: u64, at: u64) -> u64 {
        let index = at / self.shape.cluster() % self.l2_entries();
        let offset = index * self.entry_size();
        table + offset / u64_of(self.l2.unit()) * u64_of(self.l2.unit())
    }

    /// The slice of the L2 table that maps `at`; none if there is no table.
    pub(super) async fn slice(&self, at: u64) -> IoResult<Option<Arc<Block>>> {
        let entry = self.l1_entry(at);
        let table = entry & OFFSET;
        if table == 0 {
            return Ok(None);
        }
        if !table.is_multiple_of(self.shape.cluster()) {
            return Err(self.unaligned_table(at, table));
        }
        self.l2.get(self.slice_at(table, at), &self.file).await.map(Some)
    }

    /// The same if it is in the cache.
    pub(super) fn cached_slice(&self, at: u64) -> Option<Arc<Block>> {
        let table = self.l1_entry(at) & OFFSET;
        if table == 0 { None } else { self.l2.peek(self.slice_at(table, at)) }
    }

    /// Byte offset in its slice of the entry for `at`.
    pub(super) fn place_in_slice(&self, at: u64) -> usize {
        let per_slice = u64_of(self.l2.unit()) / self.entry_size();
        us(at / self.shape.cluster() % per_slice * self.entry_size())
    }

    /// The entry for `at` in its slice.
    pub(super) fn entry(&self, slice: &[u8], at: u64) -> Result<Entry, Malformed> {
        let place = self.place_in_slice(at);
        let bitmap = if self.shape.subclusters == 32 { be64(slice, place + 8) } else { 0 };
        Entry::decode(self.shape, be64(slice, place), bitmap)
    }

    /// Changes the entry for `at` in its slice.
    pub(super) fn put_entry(&self, slice: &mut [u8], at: u64, entry: Entry) {
        let place = self.place_in_slice(at);
        let (word, bitmap) = entry.encode(self.shape);
        put64(slice, place, word);
        if self.shape.subclusters == 32 {
            put64(slice, place + 8, bitmap);
        }
    }

    /// `len`, as far as one slice tells about the bytes from `at`.
    fn in_slice(&self, at: u64, len: u64) -> u64 {
        let reach = self.slice_reach();
        len.min(reach - at % reach)
    }

    /// Whether the image stores nothing of the `len` bytes from `at`, if that is plain from what is in memory; else it says no.
    pub(super) fn is_absent(&self, at: u64, len: u64) -> bool {
        if len == 0 || self.in_slice(at, len) < len {
            return false;
        }
        let table = self.l1_entry(at) & OFFSET;
        if table == 0 {
            return true;
        }
        if !table.is_multiple_of(self.shape.cluster()) {
            return false;
        }
        let words = us(self.entry_size() / 8);
        let first = self.place_in_slice(at) / 8;
        let last = self.place_in_slice(at + len - 1) / 8 + words;
        let absent = |slice: &Arc<Block>| {
            // An entry of zeroes is of nothing, whatever the shape; one that is not may still be of nothing here.
            slice.is_zero(first..last) || slice.look(|bytes| self.find_in(bytes, at, len)) == Ok((Where::Backing, len))
        };
        self.l2.peek_with(self.slice_at(table, at), absent).unwrap_or(false)
    }

    /// Where the bytes from `at` are, and for how many of `len` that holds.
    pub(super) async fn find(&self, at: u64, len: u64) -> IoResult<(Where, u64)> {
        let len = self.in_slice(at, len);
        let Some(slice) = self.slice(at).await? else { return Ok((Where::Backing, len)) };
        match slice.look(|bytes| self.find_in(bytes, at, len)) {
            Ok(found) => Ok(found),
            Err(why) => Err(self.malformed(at, why, false)),
        }
    }

    fn find_in(&self, slice: &[u8], at: u64, len: u64) -> Result<(Where, u64), Malformed> {
        let (cluster, unit) = (self.shape.cluster(), self.shape.subcluster());
        let mut done = 0;
        let mut first = None;
        let mut next = None;
        while done < len {
            let pos = at + done;
            let entry = match self.entry(slice, pos) {
                Err(_) if done > 0 => break,
                other => other?,
            };
            let within = pos % cluster;
            let bit = 1u32 << (within / unit);
            // A whole cluster at once where all of it is alike.
            let alike =
                [entry.stored, entry.zero, self.shape.all() & !(entry.stored | entry.zero)].contains(&self.shape.all());
            let step = if alike { cluster - within } else { unit - within % unit }.min(len - done);
            let found = match entry.place {
                Place::Packed { at, len } => Where::Packed { at, len, skip: within },
                Place::Plain { at, .. } if entry.stored & bit != 0 => Where::Data(at + within),
                Place::Plain { at, .. } if entry.zero & bit != 0 => Where::Zero(Some(at + within)),
                _ if entry.zero & bit != 0 => Where::Zero(None),
                _ => Where::Backing,
            };
            match first {
                None => first = Some(found),
                Some(_) if next == Some(found) => {}
                Some(_) => break,
            }
            next = found.after(step);
            done += step;
        }
        Ok((first.unwrap_or(Where::Backing), done))
    }

    /// Whether there is a table that may be changed in place: bit 63 of the L1 entry, which says nothing where there is none.
    pub(super) fn is_own_table(&self, at: u64) -> bool {
        let entry = self.l1_entry(at);
        entry & COPIED != 0 && entry & OFFSET != 0
    }

    /// Bytes of the guest's disk.
    pub(super) fn length_now(&self) -> u64 {
        self.size.load(std::sync::atomic::Ordering::Acquire)
    }

    pub(super) fn header_now(&self) -> Header {
        lock(&self.header).clone()
    }
}
