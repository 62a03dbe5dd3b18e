//! Counters of requests, per node and per disk.
//!
//! Written by every request on any thread, with relaxed atomics; read by queries. A query may see a request half counted, which is
//! all that counters promise.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

/// What a request does, as the accounting tells them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Read.
    Read,
    /// Write, and write of zeroes.
    Write,
    /// Flush.
    Flush,
    /// Discard.
    Unmap,
}

#[derive(Debug, Default)]
struct Counters {
    bytes: AtomicU64,
    operations: AtomicU64,
    failed: AtomicU64,
    invalid: AtomicU64,
    time_ns: AtomicU64,
}

/// The counters of one kind of request, as read at some time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    /// Bytes of completed requests.
    pub bytes: u64,
    /// Completed requests.
    pub operations: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Requests that were refused before they reached a driver (out of bounds, read-only).
    pub invalid: u64,
    /// Time that completed requests took in total, in nanoseconds; 0 where it is not measured.
    pub time_ns: u64,
}

/// The accounting of a node or a disk.
#[derive(Debug, Default)]
pub struct Stats {
    read: Counters,
    write: Counters,
    flush: Counters,
    unmap: Counters,
    highest_write: AtomicU64,
    /// When the last request completed, in nanoseconds since `origin`, plus one; 0 before the first.
    last: AtomicU64,
    origin: Origin,
}

#[derive(Debug)]
struct Origin(Instant);

impl Default for Origin {
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl Stats {
    fn of(&self, op: Op) -> &Counters {
        match op {
            Op::Read => &self.read,
            Op::Write => &self.write,
            Op::Flush => &self.flush,
            Op::Unmap => &self.unmap,
        }
    }

    /// Counts a request that ended: its bytes if it succeeded, a failure if not.
    pub fn done(&self, op: Op, bytes: u64, ok: bool) {
        let counters = self.of(op);
        if ok {
            counters.bytes.fetch_add(bytes, Relaxed);
            counters.operations.fetch_add(1, Relaxed);
        } else {
            counters.failed.fetch_add(1, Relaxed);
        }
    }

    /// Adds the time that a user's request took from `started` to `now`.
    pub fn took(&self, op: Op, started: Instant, now: Instant) {
        self.of(op).time_ns.fetch_add(nanos(started, now), Relaxed);
        self.last.store(nanos(self.origin.0, now).saturating_add(1), Relaxed);
    }

    /// Counts a request that was refused.
    pub fn refused(&self, op: Op) {
        self.of(op).invalid.fetch_add(1, Relaxed);
    }

    /// Remembers the highest byte written; `end` is the offset after it.
    pub fn wrote_up_to(&self, end: u64) {
        if self.highest_write.load(Relaxed) < end {
            self.highest_write.fetch_max(end, Relaxed);
        }
    }

    /// The offset after the highest byte written since the start, 0 before the first write.
    pub fn highest_write(&self) -> u64 {
        self.highest_write.load(Relaxed)
    }

    /// Nanoseconds since the last request completed, none before the first.
    pub fn idle_ns(&self) -> Option<u64> {
        let last = self.last.load(Relaxed).checked_sub(1)?;
        Some(nanos(self.origin.0, Instant::now()).saturating_sub(last))
    }

    /// The counters of `op` as they are now.
    pub fn read(&self, op: Op) -> Reading {
        let c = self.of(op);
        Reading {
            bytes: c.bytes.load(Relaxed),
            operations: c.operations.load(Relaxed),
            failed: c.failed.load(Relaxed),
            invalid: c.invalid.load(Relaxed),
            time_ns: c.time_ns.load(Relaxed),
        }
    }
}

fn nanos(from: Instant, to: Instant) -> u64 {
    u64::try_from(to.saturating_duration_since(from).as_nanos()).unwrap_or(u64::MAX)
}
