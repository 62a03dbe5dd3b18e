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
use block::{Edge, Errno};
use buf::IoBuf;
use qapi::{Error, Result};

/// Most bytes of the table; the reference's limit.
pub const MAX_TABLE: u64 = 64 << 20;
/// Bytes of the fixed part of an entry.
pub const FIXED: u64 = 40;
/// Most bytes of extra data of an entry that are understood.
const MAX_EXTRA: u64 = 1024;
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

/// Reads the table of snapshots, and checks that it is one. Also gives its length in bytes.
///
/// # Errors
/// It cannot be read, or is malformed.
pub async fn read_table(file: &Edge, header: &Header) -> Result<(Vec<Snapshot>, u64)> {
    let mut at = header.snapshots_at;
    let mut found = Vec::new();
    let too_large = || Error::generic("Snapshot table too large");
    for _ in 0..header.snapshots {
        at = at.checked_next_multiple_of(8).ok_or_else(too_large)?;
        let fixed = piece(file, at, FIXED).await?;
        let (id_len, name_len) = (u64::from(be16(&fixed, 12)), u64::from(be16(&fixed, 14)));
        let extra_len = u64::from(be32(&fixed, 36));
        if extra_len > MAX_EXTRA {
            return Err(Error::generic("Too much extra metadata in snapshot table entry"));
        }
        let rest = piece(file, at + FIXED, extra_len + id_len + name_len).await?;
        let part = |from: u64, len: u64| rest.get(us(from)..us(from + len)).unwrap_or_default().to_vec();
        found.push(Snapshot {
            l1_at: be64(&fixed, 0),
            l1_entries: be32(&fixed, 8),
            date_sec: be32(&fixed, 16),
            date_nsec: be32(&fixed, 20),
            clock_nsec: be64(&fixed, 24),
            vm_state: be32(&fixed, 32),
            extra: part(0, extra_len),
            id: part(extra_len, id_len),
            name: part(extra_len + id_len, name_len),
        });
        at += FIXED + extra_len + id_len + name_len;
        if at - header.snapshots_at > MAX_TABLE {
            return Err(too_large());
        }
    }
    Ok((found, at - header.snapshots_at))
}

/// Reads the table of snapshots through, and checks that it is one.
///
/// # Errors
/// It cannot be read, or is malformed.
pub async fn check_table(file: &Edge, header: &Header) -> Result<()> {
    read_table(file, header).await.map(drop)
}

async fn piece(file: &Edge, at: u64, len: u64) -> Result<Vec<u8>> {
    if at.checked_add(len).is_none_or(|end| end > file.size()) {
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
        read_table(&self.file, &self.header_now()).await
    }

    async fn make_snapshot(&self, facts: &SnapshotFacts) -> Result<()> {
        let (mut list, table_len) = self.snapshots_now().await?;
        let failed = |errno: Errno| Error::io("the image", errno.into());
        if list.len() >= us(header::MAX_SNAPSHOTS.into()) {
            return Err(failed(Errno::EFBIG));
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
