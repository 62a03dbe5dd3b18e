//! `blklogwrites`: passes requests on to a node and writes those that change it to a log, in the format of the device-mapper
//! target `log-writes` [kernel, admin-guide/device-mapper/log-writes], so that its tools can replay a disk up to any
//! point.
//!
//! | module | noun |
//! | --- | --- |
//! | [`format`](self::format) | the superblock and the entries |
//! | `log` | places in the log, and how many entries count |
//!
//! A request is logged when the node has done it and before its user hears of it, so the order of the log is that of
//! completion. A flush takes its place in the log before it begins: what follows it there may not be covered by it.

pub mod format;
mod log;

use crate::filter::{self, len_of};
use block::driver::Prealloc;
use block::perm::Bits;
use block::{Driver, Edge, Facts, IoResult, Mapping, OpenContext, Perms, Role, Span, Support, WriteFlags, ZeroFlags};
use buf::IoBuf;
use format::{Entry, Flags};
use log::Log;
use qapi::types::block_filters::BlockdevOptionsBlklogwrites;
use qapi::{Error, Result};
use serde_json::Value;
use std::sync::Arc;

/// Unit of the log where the user gives none, in bytes.
const DEFAULT_SECTOR: u32 = 512;
/// Requests between two updates of the superblock where the user gives no number.
const DEFAULT_INTERVAL: u64 = 4096;

/// A node whose changes are logged.
#[derive(Debug)]
pub struct BlkLogWrites {
    file: Arc<Edge>,
    options: BlockdevOptionsBlklogwrites,
    log: Log,
}

/// Opens the node and its log.
///
/// # Errors
/// A unit or an interval out of range, a log that cannot be gone on with; those of the children.
pub async fn open(cx: &mut OpenContext<'_>, options: &BlockdevOptionsBlklogwrites) -> Result<BlkLogWrites> {
    let append = options.log_append.unwrap_or(false);
    if append && options.log_sector_size.is_some() {
        return Err(Error::generic("log-append and log-sector-size are mutually exclusive"));
    }
    let sector = options.log_sector_size.unwrap_or(DEFAULT_SECTOR);
    format::check_sector(sector)?;
    let interval = options.log_super_update_interval.unwrap_or(DEFAULT_INTERVAL);
    if interval == 0 {
        return Err(Error::generic("Invalid log superblock update interval 0"));
    }
    let file = cx.child("file", Role::Filtered, &options.file).await?;
    let edge = cx.child("log", Role::Data, &options.log).await?;
    let start = if append { log::find_end(&edge).await? } else { log::Start::new(sector) };
    Ok(BlkLogWrites { file, options: options.clone(), log: Log::new(edge, start, interval) })
}

impl BlkLogWrites {
    /// An entry for `span`, whose unit is the log's.
    fn entry(&self, span: Span, flags: Flags) -> Entry {
        let unit = u64::from(self.log.sector());
        Entry { sector: span.at / unit, sectors: span.len / unit, flags }
    }
}

impl Driver for BlkLogWrites {
    fn name(&self) -> &'static str {
        "blklogwrites"
    }

    fn facts(&self) -> Facts {
        let below = filter::facts(&self.file);
        Facts {
            request_align: self.log.sector().max(below.request_align),
            // The log says that it happened, so it has to.
            discard: if below.discard == Support::None { Support::None } else { Support::Native },
            ..below
        }
    }

    fn filename(&self) -> String {
        let o = &self.options;
        let given: [(&str, Option<Value>); 3] = [
            ("log-sector-size", o.log_sector_size.map(Into::into)),
            ("log-append", o.log_append.map(Into::into)),
            ("log-super-update-interval", o.log_super_update_interval.map(Into::into)),
        ];
        let given: Vec<_> = given.into_iter().filter_map(|(name, value)| Some((name, value?))).collect();
        filter::describe("blklogwrites", &given, &[("file", &self.file), ("log", self.log.edge())])
    }

    async fn length(&self) -> IoResult<u64> {
        Ok(self.file.size())
    }

    async fn read(&self, at: u64, buf: &IoBuf) -> IoResult {
        self.file.read(at, buf).await
    }

    async fn write(&self, at: u64, buf: &IoBuf, flags: WriteFlags) -> IoResult {
        self.log.check()?;
        self.file.write(at, buf, flags).await?;
        let entry = self.entry(Span::new(at, len_of(buf)), if flags.fua { Flags::FUA } else { Flags::NONE });
        self.log.append(entry, Some(buf)).await
    }

    async fn flush(&self) -> IoResult {
        self.log.check()?;
        let place = self.log.place(0);
        let done = self.file.flush().await;
        // The place is taken: an entry without meaning fills it where there was no flush.
        let flags = if done.is_ok() { Flags::FLUSH } else { Flags::NONE };
        let logged = self.log.fill(place, Entry { sector: 0, sectors: 0, flags }, None).await;
        done.and(logged)
    }

    async fn zero(&self, span: Span, flags: ZeroFlags) -> IoResult {
        self.log.check()?;
        self.file.zero(span, flags).await?;
        // The log has no entry for zeroes: they are data.
        let entry = self.entry(span, if flags.fua { Flags::FUA } else { Flags::NONE });
        self.log.append(entry, None).await
    }

    async fn discard(&self, span: Span) -> IoResult {
        self.log.check()?;
        self.file.discard(span).await?;
        self.log.append(self.entry(span, Flags::DISCARD), None).await
    }

    async fn map(&self, span: Span, _precise: bool) -> IoResult<Mapping> {
        Ok(Mapping::forward(span.len, Arc::clone(&self.file), span.at))
    }

    async fn truncate(&self, size: u64, exact: bool, prealloc: Prealloc) -> Result<()> {
        self.file.truncate(size, exact, prealloc).await
    }

    /// The log is this node's alone to write.
    fn child_perms(&self, child: &Edge, of_node: Perms) -> Perms {
        if child.name() != "log" {
            return of_node;
        }
        Perms {
            need: Bits::CONSISTENT_READ | Bits::WRITE | Bits::RESIZE,
            shared: Bits::CONSISTENT_READ | Bits::WRITE_UNCHANGED,
        }
    }

    async fn close(&self) {
        // The node has been flushed, which counts all entries: what fails here could not be told to anybody.
        let _ = self.log.finish().await;
    }
}
