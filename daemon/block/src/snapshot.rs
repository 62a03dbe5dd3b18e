//! [`Snapshots`]: the facet of a format that keeps snapshots inside its image.

use crate::driver::LocalFuture;
use qapi::Result;
use qapi::types::snapshot::SnapshotInfo;

/// What is known of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct SnapshotFacts {
    /// Its number, as a text.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Bytes of a machine's state that are kept with it.
    pub vm_state_size: u64,
    /// When it was made: seconds since 1970.
    pub date_sec: u32,
    /// The rest of that time in nanoseconds.
    pub date_nsec: u32,
    /// The machine's clock then, in nanoseconds.
    pub clock_nsec: u64,
    /// Instructions that the machine had carried out, if they were counted.
    pub icount: Option<u64>,
}

impl From<SnapshotFacts> for SnapshotInfo {
    fn from(facts: SnapshotFacts) -> Self {
        let signed = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        Self {
            vm_state_size: signed(facts.vm_state_size),
            date_sec: facts.date_sec.into(),
            date_nsec: facts.date_nsec.into(),
            vm_clock_sec: signed(facts.clock_nsec / 1_000_000_000),
            vm_clock_nsec: signed(facts.clock_nsec % 1_000_000_000),
            icount: facts.icount.map(signed),
            id: facts.id,
            name: facts.name,
        }
    }
}

/// The snapshots of an image. Nothing is in flight above the node while one is made or deleted.
pub trait Snapshots: Send + Sync {
    /// All of them, in the order of the image.
    fn list(&self) -> LocalFuture<'_, Result<Vec<SnapshotFacts>>>;

    /// Keeps the disk as it is now, and what was written before on stable storage with it. All or nothing.
    fn create<'a>(&'a self, facts: &'a SnapshotFacts) -> LocalFuture<'a, Result<()>>;

    /// Deletes the snapshot with this id. All or nothing.
    fn delete<'a>(&'a self, id: &'a str) -> LocalFuture<'a, Result<()>>;
}
