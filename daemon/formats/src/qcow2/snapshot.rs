//! Internal snapshots [qcow2 §Snapshots]: their table, and how they are made and deleted.
//!
//! What the active disk and a snapshot share is copied before it changes. Making and deleting a snapshot changes counts, the
//! COPIED bits of all active L2 tables and the table of snapshots, which must never be seen half done: see `switch`.

use super::bytes::{be16, be32, be64, put32, put64, u64_of, us};
use super::header::{self, Header};
use super::image::Qcow2;
use super::switch::Switch;
use block::driver::LocalFuture;
use block::snapshot::{SnapshotFacts, Snapshots};
use block::{Errno, Node};
use buf::IoBuf;
use qapi::{Error, Result};

/// Most bytes of the table; the reference's limit.
pub const MAX_TABLE: u64 = 64 << 20;
/// Bytes of the fixed part of an entry.
pub const FIXED: u64 = 40;
/// Most bytes of extra data of an entry that are understood.
const MAX_EXTRA: u64 = 1024;
/// Most bytes of a name: what the reference shows of one.
const MAX_NAME: usize = 255;
/// What stands for no count of instructions.
const NO_ICOUNT: u64 = u64::MAX;

/// An entry of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Where its L1 table is.
    pub l1_at: u64,
    /// Entries of that table.
    pub l1_entries: u32,
    id: Vec<u8>,
    name: Vec<u8>,
    date_sec: u32,
    date_nsec: u32,
    clock_nsec: u64,
    /// As it stands in the fixed part.
    vm_state: u32,
    extra: Vec<u8>,
}

impl Snapshot {
    /// What it is.
    pub fn facts(&self) -> SnapshotFacts {
        let extra = |at: usize| (self.extra.len() >= at + 8).then(|| be64(&self.extra, at));
        SnapshotFacts {
            id: String::from_utf8_lossy(&self.id).into_owned(),
            name: String::from_utf8_lossy(&self.name).into_owned(),
            vm_state_size: extra(0).unwrap_or(self.vm_state.into()),
            date_sec: self.date_sec,
            date_nsec: self.date_nsec,
            clock_nsec: self.clock_nsec,
            icount: extra(16).filter(|count| *count != NO_ICOUNT),
        }
    }

    /// Gives an entry without them the extra data that version 3 asks for. `size` is that of the disk.
    pub fn complete(&mut self, size: u64) {
        if self.extra.len() < 16 {
            self.extra = vec![0; 24];
            put64(&mut self.extra, 0, self.vm_state.into());
            put64(&mut self.extra, 8, size);
            put64(&mut self.extra, 16, NO_ICOUNT);
        }
    }

    /// The entry as it stands in the table, without what pads it.
    fn encode(&self) -> Vec<u8> {
        let short = |len: usize| u16::try_from(len).unwrap_or(u16::MAX).to_be_bytes();
        let mut bytes = vec![0; us(FIXED)];
        put64(&mut bytes, 0, self.l1_at);
        put32(&mut bytes, 8, self.l1_entries);
        for (at, len) in [(12, self.id.len()), (14, self.name.len())] {
            if let Some(place) = bytes.get_mut(at..at + 2) {
                place.copy_from_slice(&short(len));
            }
        }
        put32(&mut bytes, 16, self.date_sec);
        put32(&mut bytes, 20, self.date_nsec);
        put64(&mut bytes, 24, self.clock_nsec);
        put32(&mut bytes, 32, self.vm_state);
        put32(&mut bytes, 36, u32::try_from(self.extra.len()).unwrap_or(u32::MAX));
        bytes.extend(&self.extra);
        bytes.extend(&self.id);
        bytes.extend(&self.name);
        bytes
    }
}

/// The table as bytes.
pub fn encode_table(snapshots: &[Snapshot]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for snapshot in snapshots {
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes.extend(snapshot.encode());
    }
    bytes
}

/// What of a table is not as it should be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flaws {
    /// Entries behind the end that the table may have.
    pub overhanging: u64,
    /// Entries with more extra data than a table may have.
    pub overlong: u64,
    /// Entries without the extra data that version 3 asks for.
    pub incomplete: u64,
}

impl Flaws {
    /// How many there are.
    pub fn total(self) -> u64 {
        self.overhanging.saturating_add(self.overlong).saturating_add(self.incomplete)
    }
}

/// A table as it was read.
#[derive(Debug, Default)]
pub struct Table {
    /// Its entries.
    pub list: Vec<Snapshot>,
    /// Its length in bytes.
    pub len: u64,
    /// What is wrong with it and can be mended.
    pub flaws: Flaws,
}

/// Reads the table of snapshots, and checks that it is one. Also gives its length in bytes.
///
/// # Errors
/// It cannot be read, or is malformed.
pub async fn read_table(file: &Node, header: &Header) -> Result<(Vec<Snapshot>, u64)> {
    let table = scan_table(file, header, false).await?;
    Ok((table.list, table.len))
}

/// The same; what goes beyond what a table may have is left out of it if it is to be mended, as the reference does.
///
/// # Errors
/// It cannot be read; without `mend`, it goes beyond what a table may have.
pub async fn scan_table(file: &Node, header: &Header, mend: bool) -> Result<Table> {
    let start = header.snapshots_at;
    let (mut at, mut table) = (start, Table::default());
    for index in 0..header.snapshots {
        let (mut entry, end) = entry_at(file, at, index, mend).await?;
        table.flaws.overlong += u64::from(entry.extra.len() > us(MAX_EXTRA));
        if end - start > MAX_TABLE {
            if !mend {
                return Err(Error::generic("Snapshot table too large"));
            }
            table.flaws.overhanging = u64::from(header.snapshots - index);
            break;
        }
        entry.extra.truncate(us(MAX_EXTRA));
        table.flaws.incomplete += u64::from(header.version >= 3 && entry.extra.len() < 16);
        table.list.push(entry);
        at = end;
    }
    table.len = at - start;
    Ok(table)
}

/// The entry behind `at`, and where it ends. Of extra data that are too long there is one byte too many.
async fn entry_at(file: &Node, at: u64, index: u32, mend: bool) -> Result<(Snapshot, u64)> {
    let at = at.checked_next_multiple_of(8).ok_or_else(|| Error::generic("Snapshot table too large"))?;
    // What a repair goes by reads as zero where there is nothing, as the reference has it; but there must be a table.
    let bounded = !mend || index == 0;
    let fixed = piece(file, at, FIXED, bounded).await?;
    let (id_len, name_len) = (u64::from(be16(&fixed, 12)), u64::from(be16(&fixed, 14)));
    let extra_len = u64::from(be32(&fixed, 36));
    if extra_len > MAX_EXTRA && !mend {
        return Err(Error::generic(format!("Too much extra metadata in snapshot table entry {index}")));
    }
    let extra = piece(file, at + FIXED, extra_len.min(MAX_EXTRA + 1), !mend).await?;
    let names = piece(file, at + FIXED + extra_len, id_len + name_len, !mend).await?;
    let (id, name) = names.split_at(us(id_len).min(names.len()));
    let snapshot = Snapshot {
        l1_at: be64(&fixed, 0),
        l1_entries: be32(&fixed, 8),
        date_sec: be32(&fixed, 16),
        date_nsec: be32(&fixed, 20),
        clock_nsec: be64(&fixed, 24),
        vm_state: be32(&fixed, 32),
        extra,
        id: id.to_vec(),
        name: name.to_vec(),
    };
    Ok((snapshot, at + FIXED + extra_len + id_len + name_len))
}

async fn piece(file: &Node, at: u64, len: u64, bounded: bool) -> Result<Vec<u8>> {
    if bounded && at.checked_add(len).is_none_or(|end| end > file.size()) {
        return Err(Error::generic("Could not read snapshots: the table lies beyond the end of the image"));
    }
    if len == 0 {
        return Ok(Vec::new());
    }
    let buf = IoBuf::alloc(us(len));
    file.read(at, &buf).await.map_err(|errno| Error::io("Could not read snapshots", errno.into()))?;
    Ok(buf.to_vec())
}

impl Qcow2 {
    async fn snapshots_now(&self) -> Result<(Vec<Snapshot>, u64)> {
        if self.data_file.is_some() {
            return Err(Error::io("Failed to get a snapshot list", Errno::EOPNOTSUPP.into()));
        }
        read_table(&self.file.node(), &self.header_now()).await
    }

    async fn make_snapshot(&self, facts: &SnapshotFacts) -> Result<()> {
        let (mut list, table_len) = self.snapshots_now().await?;
        let bits = 1 << self.header_now().refcount_order;
        let failed = |errno: Errno| match errno {
            Errno::EINVAL => Error::io(
                format!("refcounts of {bits} bits cannot count another user of what is shared already"),
                errno.into(),
            ),
            _ => Error::io("the image", errno.into()),
        };
        if list.len() >= us(header::MAX_SNAPSHOTS.into()) {
            return Err(failed(Errno::EFBIG));
        }
        if facts.name.len() > MAX_NAME {
            return Err(Error::generic(format!("its name is longer than {MAX_NAME} bytes")));
        }
        self.prepare().await.map_err(failed)?;
        let mut extra = vec![0; 24];
        put64(&mut extra, 0, facts.vm_state_size);
        put64(&mut extra, 8, self.length_now());
        put64(&mut extra, 16, facts.icount.unwrap_or(NO_ICOUNT));
        let header = self.header_now();
        // The L1 table of now is the snapshot's, with the L2 tables that it names; the active disk gets copies.
        list.push(Snapshot {
            l1_at: header.l1_at,
            l1_entries: header.l1_entries,
            id: facts.id.clone().into_bytes(),
            name: facts.name.clone().into_bytes(),
            date_sec: facts.date_sec,
            date_nsec: facts.date_nsec,
            clock_nsec: facts.clock_nsec,
            vm_state: 0,
            extra,
        });
        if u64_of(encode_table(&list).len()) > MAX_TABLE {
            return Err(failed(Errno::EFBIG));
        }
        Switch { image: self, list, table_len, gone: None }.carry_out().await.map_err(failed)
    }

    async fn delete_snapshot(&self, id: &str) -> Result<()> {
        let (mut list, table_len) = self.snapshots_now().await?;
        let Some(at) = list.iter().position(|snapshot| snapshot.id == id.as_bytes()) else {
            return Err(Error::generic(format!("Can't find the snapshot with id '{id}'")));
        };
        let failed = |errno: Errno| Error::io("the image", errno.into());
        self.prepare().await.map_err(failed)?;
        let gone = list.remove(at);
        Switch { image: self, list, table_len, gone: Some(gone) }.carry_out().await.map_err(failed)
    }
}

impl Snapshots for Qcow2 {
    fn list(&self) -> LocalFuture<'_, Result<Vec<SnapshotFacts>>> {
        Box::pin(async {
            let (list, _) = self.snapshots_now().await?;
            Ok(list.iter().map(Snapshot::facts).collect())
        })
    }

    fn create<'a>(&'a self, facts: &'a SnapshotFacts) -> LocalFuture<'a, Result<()>> {
        Box::pin(self.make_snapshot(facts))
    }

    fn delete<'a>(&'a self, id: &'a str) -> LocalFuture<'a, Result<()>> {
        Box::pin(self.delete_snapshot(id))
    }
}

/// Bytes of a table as the next multiple of clusters, for its place.
pub fn clusters_for(len: usize, cluster: u64) -> u64 {
    u64_of(len).div_ceil(cluster)
}
