//! What must not be overwritten: clusters with metadata, and which kinds of it are looked for before each write
//! (`overlap-check`).
//!
//! A sound image never has two users of one cluster. A damaged one may, and would be damaged more by writing to it. All known
//! places of metadata are in a table in memory, so that a look costs no I/O. The table may have places that are not metadata any
//! more: a hit is looked at closely before it counts.

use super::bytes::{be64, u64_of, us};
use super::entry::OFFSET;
use super::image::Qcow2;
use super::snapshot::read_table;
use block::{Errno, IoResult};
use buf::IoBuf;
use qapi::types::block::{Qcow2OverlapCheckFlags, Qcow2OverlapCheckMode, Qcow2OverlapChecks};
use std::collections::HashMap;
use std::ops::{BitOr, Not, Range};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{PoisonError, RwLock};

/// Most clusters with metadata of snapshots that are remembered, of L1 tables and of L2 tables each: about 100 MiB. What goes
/// beyond that is not looked for.
const MAX_INACTIVE: usize = 4 << 20;

/// Kinds of metadata.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(super) struct Kinds(u16);

impl Kinds {
    pub const NONE: Self = Self(0);
    pub const HEADER: Self = Self(1);
    pub const ACTIVE_L1: Self = Self(1 << 1);
    pub const ACTIVE_L2: Self = Self(1 << 2);
    pub const REFCOUNT_BLOCK: Self = Self(1 << 3);
    pub const REFCOUNT_TABLE: Self = Self(1 << 4);
    pub const SNAPSHOT_TABLE: Self = Self(1 << 5);
    pub const INACTIVE_L1: Self = Self(1 << 6);
    pub const INACTIVE_L2: Self = Self(1 << 7);
    pub const BITMAP_DIRECTORY: Self = Self(1 << 8);

    /// Names in messages, by bit.
    const NAMES: [&'static str; 9] = [
        "qcow2_header",
        "active L1 table",
        "active L2 table",
        "refcount block",
        "refcount table",
        "snapshot table",
        "inactive L1 table",
        "inactive L2 table",
        "bitmap directory",
    ];

    /// Those whose place does not change while the guest writes.
    fn constant() -> Self {
        Self::HEADER | Self::ACTIVE_L1 | Self::REFCOUNT_TABLE | Self::SNAPSHOT_TABLE | Self::BITMAP_DIRECTORY
    }

    /// Those that are known without reading.
    fn cached() -> Self {
        Self::constant() | Self::ACTIVE_L2 | Self::REFCOUNT_BLOCK | Self::INACTIVE_L1
    }

    fn of_mode(mode: Qcow2OverlapCheckMode) -> Self {
        match mode {
            Qcow2OverlapCheckMode::None => Self::NONE,
            Qcow2OverlapCheckMode::Constant => Self::constant(),
            Qcow2OverlapCheckMode::Cached => Self::cached(),
            Qcow2OverlapCheckMode::All => Self::cached() | Self::INACTIVE_L2,
        }
    }

    /// What the option says; the default is `cached`.
    pub fn chosen(option: Option<&Qcow2OverlapChecks>) -> Self {
        let flags = match option {
            None => return Self::cached(),
            Some(Qcow2OverlapChecks::Mode(mode)) => return Self::of_mode(*mode),
            Some(Qcow2OverlapChecks::Flags(flags)) => flags,
        };
        let Qcow2OverlapCheckFlags {
            template,
            main_header,
            active_l1,
            active_l2,
            refcount_table,
            refcount_block,
            snapshot_table,
            inactive_l1,
            inactive_l2,
            bitmap_directory,
        } = **flags;
        let base = Self::of_mode(template.unwrap_or(Qcow2OverlapCheckMode::Cached));
        [
            (Self::HEADER, main_header),
            (Self::ACTIVE_L1, active_l1),
            (Self::ACTIVE_L2, active_l2),
            (Self::REFCOUNT_TABLE, refcount_table),
            (Self::REFCOUNT_BLOCK, refcount_block),
            (Self::SNAPSHOT_TABLE, snapshot_table),
            (Self::INACTIVE_L1, inactive_l1),
            (Self::INACTIVE_L2, inactive_l2),
            (Self::BITMAP_DIRECTORY, bitmap_directory),
        ]
        .into_iter()
        .fold(base, |all, (kind, wanted)| match wanted {
            Some(true) => all | kind,
            Some(false) => all.without(kind),
            None => all,
        })
    }

    pub fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    fn both(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The name of the first of these in a message.
    fn name(self) -> &'static str {
        Self::NAMES.get(self.0.trailing_zeros() as usize).copied().unwrap_or("metadata")
    }

    fn is_inactive(self) -> bool {
        !self.both(Self::INACTIVE_L1 | Self::INACTIVE_L2).is_empty()
    }
}

impl BitOr for Kinds {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl Not for Kinds {
    type Output = Self;
    fn not(self) -> Self {
        Self(!self.0)
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Guard {
    checked: AtomicU16,
    /// Guards the places, by cluster; never across an await.
    places: RwLock<HashMap<u64, Kinds>>,
}

impl Guard {
    pub fn new(checked: Kinds) -> Self {
        Self { checked: AtomicU16::new(checked.0), places: RwLock::default() }
    }

    pub fn checked(&self) -> Kinds {
        Kinds(self.checked.load(Ordering::Relaxed))
    }

    pub fn set_checked(&self, checked: Kinds) {
        self.checked.store(checked.0, Ordering::Relaxed);
    }

    /// There is metadata in `clusters`.
    pub fn add(&self, kind: Kinds, clusters: Range<u64>) {
        let mut places = self.places.write().unwrap_or_else(PoisonError::into_inner);
        for cluster in clusters {
            let known = places.entry(cluster).or_default();
            *known = *known | kind;
        }
    }

    /// There is none of that kind any more.
    pub fn remove(&self, kind: Kinds, clusters: Range<u64>) {
        let mut places = self.places.write().unwrap_or_else(PoisonError::into_inner);
        for cluster in clusters {
            if let Some(known) = places.get_mut(&cluster) {
                *known = known.without(kind);
                if known.is_empty() {
                    places.remove(&cluster);
                }
            }
        }
    }

    /// The first of `clusters` with metadata of these kinds.
    fn find(&self, kinds: Kinds, clusters: Range<u64>) -> Option<(u64, Kinds)> {
        if kinds.is_empty() {
            return None;
        }
        let places = self.places.read().unwrap_or_else(PoisonError::into_inner);
        clusters
            .filter_map(|cluster| Some((cluster, places.get(&cluster)?.both(kinds))))
            .find(|(_, found)| !found.is_empty())
    }
}

impl Qcow2 {
    fn clusters_of(&self, at: u64, len: u64) -> Range<u64> {
        let bits = self.shape.cluster_bits;
        at >> bits..at.saturating_add(len).div_ceil(self.shape.cluster())
    }

    /// Refuses a write of `len` bytes at `at` of the image file if metadata of a kind that is checked is there, other
    /// than `own`.
    pub(super) fn check_overlap(&self, own: Kinds, at: u64, len: u64) -> IoResult {
        let kinds = self.guard.checked().without(own);
        let found = self.guard.find(kinds, self.clusters_of(at, len));
        let Some((cluster, found)) = found else { return Ok(()) };
        if found == Kinds::ACTIVE_L2 && !self.is_active_table(cluster) {
            self.guard.remove(Kinds::ACTIVE_L2, cluster..cluster + 1);
            return Ok(());
        }
        let inactive = if found.is_inactive() { "inactive " } else { "" };
        Err(self.overwritten(
            &format!("Preventing invalid write on {inactive}metadata (overlaps with {})", found.name()),
            at,
            len,
        ))
    }

    fn is_active_table(&self, cluster: u64) -> bool {
        let at = cluster << self.shape.cluster_bits;
        let l1 = self.l1.read().unwrap_or_else(PoisonError::into_inner);
        l1.entries.iter().any(|entry| entry & OFFSET == at)
    }

    /// Finds all metadata, anew. Called when tables have got other places, with nothing in flight.
    pub(super) async fn guard_anew(&self) -> IoResult {
        self.guard_anew_for(self.guard.checked()).await
    }

    /// The same, if these kinds are to be checked. After an error, what could not be read is not checked.
    pub(super) async fn guard_anew_for(&self, kinds: Kinds) -> IoResult {
        let mut places = HashMap::new();
        let found = self.find_metadata(kinds, &mut places).await;
        *self.guard.places.write().unwrap_or_else(PoisonError::into_inner) = places;
        found
    }

    async fn find_metadata(&self, kinds: Kinds, places: &mut HashMap<u64, Kinds>) -> IoResult {
        let header = self.header_now();
        let bits = self.shape.cluster_bits;
        let mut add = |kind: Kinds, clusters: Range<u64>| {
            for cluster in clusters {
                let known = places.entry(cluster).or_default();
                *known = *known | kind;
            }
        };
        add(Kinds::HEADER, 0..1);
        {
            let l1 = self.l1.read().unwrap_or_else(PoisonError::into_inner);
            add(Kinds::ACTIVE_L1, self.clusters_of(l1.at, u64_of(l1.entries.len()) * 8));
            for entry in l1.entries.iter().filter(|entry| **entry & OFFSET != 0) {
                let cluster = (entry & OFFSET) >> bits;
                add(Kinds::ACTIVE_L2, cluster..cluster + 1);
            }
        }
        let (table, blocks) = self.refs.places();
        add(Kinds::REFCOUNT_TABLE, table);
        for cluster in blocks {
            add(Kinds::REFCOUNT_BLOCK, cluster..cluster + 1);
        }
        if let Some((at, len)) = self.bitmaps.directory() {
            add(Kinds::BITMAP_DIRECTORY, self.clusters_of(at, len));
        }
        let (snapshots, len) = read_table(&self.file.node(), &header).await.map_err(|_| Errno::EIO)?;
        add(Kinds::SNAPSHOT_TABLE, self.clusters_of(header.snapshots_at, len));
        let (mut inactive_l1, mut inactive_l2) = (0, 0);
        for snapshot in &snapshots {
            let (at, len) = (snapshot.l1_at, u64::from(snapshot.l1_entries) * 8);
            if len > super::header::MAX_L1_BYTES || at >= self.file.size() {
                // No table can be there; nobody reads it before it is used.
                continue;
            }
            inactive_l1 += us(len.div_ceil(self.shape.cluster()));
            if inactive_l1 > MAX_INACTIVE {
                break;
            }
            add(Kinds::INACTIVE_L1, self.clusters_of(at, len));
            inactive_l2 += us(len / 8);
            if kinds.both(Kinds::INACTIVE_L2).is_empty() || len == 0 || inactive_l2 > MAX_INACTIVE {
                continue;
            }
            let table = IoBuf::alloc(us(len));
            self.file.read(at, &table).await?;
            for entry in table.to_vec().chunks_exact(8).map(|entry| be64(entry, 0) & OFFSET).filter(|at| *at != 0) {
                add(Kinds::INACTIVE_L2, entry >> bits..(entry >> bits) + 1);
            }
        }
        Ok(())
    }
}
