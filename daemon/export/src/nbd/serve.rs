//! One request against the disk: from a valid command to an outcome.
//!
//! No protocol and no socket here. Reads and writes are the hot path and wait in place; the rest is boxed, so that the
//! future of a request stays small.

use super::metacontext::{Context, Contexts};
use super::reply::{ContextExtents, Extent};
use super::request::Command;
use super::wire::{MAX_EXTENTS, state};
use block::status::Status;
use block::{Disk, Errno, Span, WriteFlags, ZeroFlags};
use buf::IoBuf;

/// How a request ended.
#[derive(Debug)]
pub(crate) enum Outcome {
    Done,
    /// The bytes that were read.
    Data(IoBuf),
    Extents(Vec<ContextExtents>),
    /// The errno, and what was being done.
    Failed(Errno, &'static str),
}

fn outcome(result: Result<(), Errno>, what: &'static str) -> Outcome {
    match result {
        Ok(()) => Outcome::Done,
        Err(errno) => Outcome::Failed(errno, what),
    }
}

/// Serves `command`; `payload` is the data of a write.
pub(crate) async fn serve(disk: &Disk, command: Command, payload: Option<IoBuf>) -> Outcome {
    match command {
        Command::Read { at, len, .. } => {
            let buf = IoBuf::alloc(usize::try_from(len).unwrap_or(usize::MAX));
            if len == 0 {
                return Outcome::Data(buf);
            }
            match disk.read(at, &buf).await {
                Ok(()) => Outcome::Data(buf),
                Err(errno) => Outcome::Failed(errno, "reading from file failed"),
            }
        }
        Command::Write { at, fua, .. } => match payload {
            Some(data) if !data.is_empty() => {
                outcome(disk.write(at, &data, WriteFlags { fua }).await, "writing to file failed")
            }
            _ => Outcome::Done,
        },
        other => Box::pin(rare(disk, other)).await,
    }
}

async fn rare(disk: &Disk, command: Command) -> Outcome {
    match command {
        Command::Flush => outcome(disk.flush().await, "flush failed"),
        Command::Trim { at, len, fua } => outcome(trim(disk, Span::new(at, len), fua).await, "discard failed"),
        Command::Cache { at, len } => outcome(cache(disk, at, len).await, "caching data failed"),
        Command::WriteZeroes { len: 0, .. } => Outcome::Done,
        Command::WriteZeroes { at, len, fua, may_unmap, fast_only } => {
            let flags = ZeroFlags { fua, may_unmap, no_fallback: fast_only };
            outcome(disk.zero(Span::new(at, len), flags).await, "writing to file failed")
        }
        Command::BlockStatus { at, len, one, contexts } => {
            let limit = if one { 1 } else { MAX_EXTENTS };
            match status(disk, Span::new(at, len), limit, contexts).await {
                Ok(found) => Outcome::Extents(found),
                Err(errno) => Outcome::Failed(errno, "can't get block status"),
            }
        }
        Command::Read { .. } | Command::Write { .. } => Outcome::Failed(Errno::EIO, "not a rare command"),
    }
}

async fn trim(disk: &Disk, span: Span, fua: bool) -> Result<(), Errno> {
    if span.len > 0 {
        disk.discard(span).await?;
    }
    if fua { disk.flush().await } else { Ok(()) }
}

/// Reads without a reply, so that what lies below keeps the bytes at hand.
async fn cache(disk: &Disk, at: u64, len: u32) -> Result<(), Errno> {
    const PIECE: u32 = 1 << 20;
    let scratch = IoBuf::alloc(usize::try_from(len.min(PIECE)).unwrap_or(0));
    let mut done = 0;
    while done < len {
        let now = PIECE.min(len - done);
        disk.read(at + u64::from(done), &scratch.slice(0, usize::try_from(now).unwrap_or(0))).await?;
        done += now;
    }
    Ok(())
}

/// Collects extents for one context until its list is full.
struct Collector {
    found: ContextExtents,
    full: bool,
}

impl Collector {
    fn add(&mut self, limit: usize, len: u64, flags: u64) {
        if self.full {
            return;
        }
        let count = self.found.extents.len();
        match self.found.extents.last_mut() {
            Some(last) if last.flags == flags => last.len += len,
            _ if count >= limit => self.full = true,
            _ => self.found.extents.push(Extent { len, flags }),
        }
    }
}

/// The status of `span`, at most `limit` extents for each context.
async fn status(disk: &Disk, span: Span, limit: usize, contexts: Contexts) -> Result<Vec<ContextExtents>, Errno> {
    let empty = |context| Collector { found: ContextExtents { context, extents: Vec::new() }, full: false };
    let mut all: Vec<Collector> = contexts.iter().map(empty).collect();
    let mut at = span.at;
    while at < span.end() && !all.iter().all(|c| c.full) {
        let status = whole_sectors(disk, Span::new(at, span.end() - at)).await?;
        for collector in &mut all {
            let flags = match collector.found.context {
                Context::BaseAllocation => {
                    let hole = if status.data { 0 } else { state::HOLE };
                    let zero = if status.zero { state::ZERO } else { 0 };
                    hole | zero
                }
                Context::AllocationDepth => u64::from(status.depth),
            };
            collector.add(limit, status.len, flags);
        }
        at += status.len;
    }
    Ok(all.into_iter().map(|c| c.found).collect())
}

/// The status at the start of `span`, up to a whole sector unless the span ends before.
///
/// Clients count in sectors and may round what is no multiple of one, so a sector that is partly a hole is none.
async fn whole_sectors(disk: &Disk, span: Span) -> Result<Status, Errno> {
    const SECTOR: u64 = 512;
    let first = disk.status(span).await?;
    let mut all = Status { len: first.len.min(span.len), ..first };
    let end = span.at + all.len;
    let floor = end - end % SECTOR;
    if all.len == 0 {
        return Err(Errno::EIO);
    }
    if end == floor || end == span.end() {
        return Ok(all);
    }
    if floor > span.at {
        all.len = floor - span.at;
        return Ok(all);
    }
    let sector_end = (floor + SECTOR).min(span.end());
    while span.at + all.len < sector_end {
        let at = span.at + all.len;
        let next = disk.status(Span::new(at, sector_end - at)).await?;
        if next.len == 0 {
            return Err(Errno::EIO);
        }
        all.len += next.len.min(sector_end - at);
        all.zero &= next.zero;
        all.data |= next.data;
        all.depth = all.depth.max(next.depth);
    }
    Ok(all)
}
