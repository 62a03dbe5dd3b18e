//! The log: who has which place in it, and how many entries from its beginning are complete.
//!
//! An entry gets its place when it is known how long it is, and is written on its own; the superblock counts it once all
//! before it are there too. An entry that cannot be written ends the log: from then on changes fail, for a log with a gap is
//! none.

use super::format::{self, Entry, Flags, SUPER_LEN, Super};
use block::{Edge, Errno, IoResult, Span, WriteFlags, ZeroFlags};
use buf::IoBuf;
use qapi::{Error, Result};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// Where a log goes on.
#[derive(Clone, Copy, Debug)]
pub struct Start {
    /// Bytes of a sector.
    sector: u32,
    /// Entries that are there.
    entries: u64,
    /// The first free sector.
    next: u64,
}

impl Start {
    /// An empty log. The superblock is the first sector.
    pub const fn new(sector: u32) -> Self {
        Self { sector, entries: 0, next: 1 }
    }
}

/// Finds the end of a log that is there.
///
/// # Errors
/// It is no log, or not whole.
pub async fn find_end(log: &Edge) -> Result<Start> {
    let unreadable = |errno: Errno| Error::io("Could not read log superblock", errno.into());
    if log.size() == 0 {
        return Ok(Start::new(super::DEFAULT_SECTOR));
    }
    let bytes = IoBuf::alloc(SUPER_LEN);
    log.read(0, &bytes).await.map_err(unreadable)?;
    let Super { entries, sector } = Super::decode(&bytes.to_vec())?;
    let (unit, sectors) = (u64::from(sector), log.size() / u64::from(sector));
    let mut next = 1_u64;
    let bytes = IoBuf::alloc(format::ENTRY_LEN);
    for number in 0..entries {
        let damaged = || Error::generic(format!("The log ends before entry {number} of {entries} that it counts"));
        if next >= sectors {
            return Err(damaged());
        }
        let failed = |errno: Errno| Error::io(format!("Could not read log entry {number}"), errno.into());
        log.read(next * unit, &bytes).await.map_err(failed)?;
        let entry = Entry::decode(&bytes.to_vec()).ok_or_else(damaged)?;
        next = next.saturating_add(1).saturating_add(entry.data_sectors());
        // The file may end inside the last sector that it shows.
        if next > sectors + 1 {
            return Err(damaged());
        }
    }
    Ok(Start { sector, entries, next })
}

#[derive(Debug)]
struct State {
    next_sector: u64,
    next_entry: u64,
    /// Entries with a place that are not written yet.
    open: BTreeSet<u64>,
    /// Entries that the superblock counts.
    counted: u64,
}

impl State {
    /// How many entries from the beginning are complete.
    fn complete(&self) -> u64 {
        self.open.first().copied().unwrap_or(self.next_entry)
    }
}

/// A place in the log.
#[derive(Debug)]
pub struct Place {
    entry: u64,
    sector: u64,
}

/// A log that is written to.
#[derive(Debug)]
pub struct Log {
    edge: Arc<Edge>,
    sector: u32,
    interval: u64,
    /// Guards places and counts; never across an await.
    state: Mutex<State>,
    /// An entry has been completed.
    completed: Notify,
    /// Whoever writes the superblock.
    counting: tokio::sync::Mutex<()>,
    broken: AtomicBool,
}

impl Log {
    /// A log that goes on at `start`.
    pub fn new(edge: Arc<Edge>, start: Start, interval: u64) -> Self {
        let state =
            State { next_sector: start.next, next_entry: start.entries, open: BTreeSet::new(), counted: start.entries };
        Self {
            edge,
            sector: start.sector,
            interval,
            state: state.into(),
            completed: Notify::new(),
            counting: tokio::sync::Mutex::default(),
            broken: false.into(),
        }
    }

    /// The node with the log.
    pub fn edge(&self) -> &Edge {
        &self.edge
    }

    /// Bytes of a sector.
    pub fn sector(&self) -> u32 {
        self.sector
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the log can still be written.
    ///
    /// # Errors
    /// `EIO` if an entry is missing.
    pub fn check(&self) -> IoResult {
        if self.broken.load(Ordering::Acquire) { Err(Errno::EIO) } else { Ok(()) }
    }

    /// Takes the next place, for an entry with that many sectors of data.
    pub fn place(&self, data_sectors: u64) -> Place {
        let mut state = self.state();
        let place = Place { entry: state.next_entry, sector: state.next_sector };
        state.next_entry += 1;
        state.next_sector = state.next_sector.saturating_add(1).saturating_add(data_sectors);
        state.open.insert(place.entry);
        place
    }

    /// Writes an entry at the end; without `data` the entry's data are zeroes.
    ///
    /// # Errors
    /// The errno of the log's node.
    pub async fn append(&self, entry: Entry, data: Option<&IoBuf>) -> IoResult {
        let place = self.place(entry.data_sectors());
        self.fill(place, entry, data).await
    }

    /// Writes an entry to its place, and counts it where it is time for that.
    ///
    /// # Errors
    /// The errno of the log's node.
    pub async fn fill(&self, place: Place, entry: Entry, data: Option<&IoBuf>) -> IoResult {
        if let Err(errno) = self.write_entry(&place, &entry, data).await {
            self.broken.store(true, Ordering::Release);
            self.completed.notify_waiters();
            return Err(errno);
        }
        let due = {
            let mut state = self.state();
            state.open.remove(&place.entry);
            state.complete() >= state.counted.saturating_add(self.interval)
        };
        self.completed.notify_waiters();
        if entry.flags.contains(Flags::FLUSH) || entry.flags.contains(Flags::FUA) {
            self.wait_for(place.entry).await?;
            self.count().await?;
            return self.edge.flush().await;
        }
        if due { self.count().await } else { Ok(()) }
    }

    async fn write_entry(&self, place: &Place, entry: &Entry, data: Option<&IoBuf>) -> IoResult {
        let unit = u64::from(self.sector);
        let at = place.sector.checked_mul(unit).ok_or(Errno::EFBIG)?;
        let data_at = at.checked_add(unit).ok_or(Errno::EFBIG)?;
        let head = IoBuf::copy_of(&entry.encode(usize::try_from(self.sector).unwrap_or(format::ENTRY_LEN)));
        self.edge.write(at, &head, WriteFlags::NONE).await?;
        let len = entry.data_sectors().saturating_mul(unit);
        match data {
            Some(data) => self.edge.write(data_at, data, WriteFlags::NONE).await,
            None if len > 0 => self.edge.zero(Span::new(data_at, len), ZeroFlags::default()).await,
            None => Ok(()),
        }
    }

    /// Waits until all entries up to that one are complete.
    async fn wait_for(&self, entry: u64) -> IoResult {
        loop {
            let mut completed = std::pin::pin!(self.completed.notified());
            // From here on a completion is not missed.
            completed.as_mut().enable();
            if self.state().complete() > entry {
                return Ok(());
            }
            self.check()?;
            completed.await;
        }
    }

    /// Brings the superblock up to date.
    async fn count(&self) -> IoResult {
        let _alone = self.counting.lock().await;
        let (entries, counted) = {
            let state = self.state();
            (state.complete(), state.counted)
        };
        if entries == counted && entries > 0 {
            return Ok(());
        }
        let bytes = Super { entries, sector: self.sector }.encode();
        self.edge.write(0, &IoBuf::copy_of(&bytes), WriteFlags::NONE).await?;
        self.state().counted = entries;
        Ok(())
    }

    /// Counts what is there. Nothing is in flight.
    ///
    /// # Errors
    /// The errno of the log's node.
    pub async fn finish(&self) -> IoResult {
        if self.edge.node().options().read_only {
            return Ok(());
        }
        self.count().await?;
        self.edge.flush().await
    }
}
