//! `quorum`: the same data in several nodes; what is read is what enough of them agree on.
//!
//! | module | noun |
//! | --- | --- |
//! | `vote` | who has what, who wins |
//!
//! Changes go to all children and succeed when `vote-threshold` of them do. Reads compare the children byte by byte. Whoever
//! fails or is outvoted is reported (`QUORUM_REPORT_BAD`); no majority is an error (`QUORUM_FAILURE`). A difference may be that
//! of a write under way, so the children are asked again, alone, before anybody is blamed; a correction is made then as well,
//! so it never undoes a write.

mod vote;

use crate::filter::{self, len_of};
use arc_swap::ArcSwap;
use block::driver::LocalFuture;
use block::overlap::Overlap;
use block::perm::Bits;
use block::reopen::ChildList;
use block::report::{Report, Reporter};
use block::{
    Driver, Edge, Errno, Facts, IoResult, Mapping, OpenContext, Perms, Role, Span, Support, WriteFlags, ZeroFlags,
};
use buf::IoBuf;
use qapi::types::block_event::{QuorumFailure, QuorumOpType, QuorumReportBad};
use qapi::types::block_filters::{BlockdevOptionsQuorum, QuorumReadPattern};
use qapi::{Error, Qapi, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// Unit of events, in bytes.
const SECTOR: u64 = 512;
/// Children at most: each has a buffer for every read.
const MAX_CHILDREN: usize = 1024;

/// Several nodes that hold the same.
#[derive(Debug)]
pub struct Quorum {
    name: Arc<str>,
    reporter: Reporter,
    options: BlockdevOptionsQuorum,
    /// Replaced by the control task, while nothing is in flight.
    children: ArcSwap<Vec<Arc<Edge>>>,
    threshold: usize,
    fifo: bool,
    blkverify: bool,
    rewrite: bool,
    /// The number in the name of the next child. Control task only.
    next: AtomicU32,
    /// Changes in flight, and reads that found a difference.
    overlap: Overlap,
}

/// Opens the children.
///
/// # Errors
/// Options that do not go together, children of different lengths; those of the children.
pub async fn open(cx: &mut OpenContext<'_>, options: &BlockdevOptionsQuorum) -> Result<Quorum> {
    let count = options.children.len();
    if count == 0 {
        return Err(Error::generic("Number of provided children must be 1 or more"));
    }
    if count > MAX_CHILDREN {
        return Err(Error::generic(format!("Number of provided children must be {MAX_CHILDREN} or less")));
    }
    let threshold =
        usize::try_from(options.vote_threshold).unwrap_or(if options.vote_threshold < 0 { 0 } else { usize::MAX });
    if threshold == 0 {
        return Err(Error::generic("Parameter 'vote-threshold' expects a value >= 1"));
    }
    if threshold > count {
        return Err(Error::generic("threshold may not exceed children count"));
    }
    let fifo = options.read_pattern == Some(QuorumReadPattern::Fifo);
    // Both are about votes, and with `fifo` there are none: as the reference has it, they are not looked at then.
    let blkverify = !fifo && options.blkverify.unwrap_or(false);
    let rewrite = !fifo && options.rewrite_corrupted.unwrap_or(false);
    if blkverify && (count != 2 || threshold != 2) {
        return Err(Error::generic(
            "blkverify=on can only be set if there are exactly two files and vote-threshold is 2",
        ));
    }
    if blkverify && rewrite {
        return Err(Error::generic("rewrite-corrupted=on cannot be used with blkverify=on"));
    }
    let mut children = Vec::with_capacity(count);
    for (number, child) in options.children.iter().enumerate() {
        children.push(cx.child(&format!("children.{number}"), Role::Data, child).await?);
    }
    same_length(&children).map_err(|errno| Error::io("Could not refresh total sector count", errno.into()))?;
    Ok(Quorum {
        name: cx.node_name(),
        reporter: cx.reporter(),
        options: options.clone(),
        children: ArcSwap::from_pointee(children),
        threshold,
        fifo,
        blkverify,
        rewrite,
        next: AtomicU32::new(u32::try_from(count).unwrap_or(u32::MAX)),
        overlap: Overlap::default(),
    })
}

fn same_length(children: &[Arc<Edge>]) -> IoResult<u64> {
    let mut lengths = children.iter().map(|child| child.size());
    let first = lengths.next().ok_or(Errno::ENOMEDIUM)?;
    if lengths.all(|length| length == first) { Ok(first) } else { Err(Errno::EIO) }
}

/// A place and a length as events have them.
fn sectors(span: Span) -> (i64, i64) {
    let first = span.at / SECTOR;
    let count = span.end().div_ceil(SECTOR).saturating_sub(first);
    let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    (number(first), if span.len == 0 { 0 } else { number(count) })
}

impl Quorum {
    fn report_bad(&self, kind: QuorumOpType, child: &Edge, span: Span, error: Option<Errno>) {
        let (sector_num, sectors_count) = sectors(span);
        self.reporter.report(Report::QuorumReportBad(QuorumReportBad {
            kind,
            error: error.map(|errno| qapi::error::errno_text(&errno.into())),
            node_name: child.node().name().to_owned(),
            sector_num,
            sectors_count,
        }));
    }

    fn report_failure(&self, span: Span) {
        let (sector_num, sectors_count) = sectors(span);
        let reference = self.name.to_string();
        self.reporter.report(Report::QuorumFailure(QuorumFailure { reference, sector_num, sectors_count }));
    }

    /// Has all children do the same; the result is the one that wins.
    async fn all<'a>(
        &self,
        kind: QuorumOpType,
        span: Span,
        children: &'a [Arc<Edge>],
        request: impl Fn(&'a Edge) -> LocalFuture<'a, IoResult>,
    ) -> IoResult {
        let results = block::join::each(children.iter().map(|child| request(child)).collect()).await;
        for (child, result) in children.iter().zip(&results) {
            if let Err(errno) = result {
                self.report_bad(kind, child, span, Some(*errno));
            }
        }
        let outcome = vote::of_results(&results, self.threshold);
        if outcome.is_err() && kind != QuorumOpType::Flush {
            self.report_failure(span);
        }
        outcome
    }

    async fn read_first(&self, at: u64, buf: &IoBuf) -> IoResult {
        let mut outcome = Err(Errno::EIO);
        for child in self.children.load_full().iter() {
            match child.read(at, buf).await {
                Ok(()) => return Ok(()),
                Err(errno) => {
                    self.report_bad(QuorumOpType::Read, child, Span::new(at, len_of(buf)), Some(errno));
                    outcome = Err(errno);
                }
            }
        }
        outcome
    }

    /// Reads from all children, from the first one into `first`.
    async fn read_all(&self, children: &[Arc<Edge>], at: u64, first: &IoBuf) -> Vec<IoResult<IoBuf>> {
        let read = |(number, child): (usize, &Arc<Edge>)| {
            let buf = if number == 0 { first.clone() } else { IoBuf::alloc(first.len()) };
            let child = Arc::clone(child);
            async move {
                child.read(at, &buf).await?;
                Ok(buf)
            }
        };
        block::join::each(children.iter().enumerate().map(read).collect()).await
    }

    async fn read_by_vote(&self, at: u64, buf: &IoBuf) -> IoResult {
        let children = self.children.load_full();
        let span = Span::new(at, len_of(buf));
        let read = self.read_all(&children, at, buf).await;
        if read.iter().all(Result::is_ok) && vote::versions(&read).len() == 1 {
            return Ok(());
        }
        // Perhaps somebody is writing there: once more, alone.
        let _alone = self.overlap.reserve(span, true).await;
        // Into memory of our own: a guest could change its own under the vote, and have that written to the others.
        let read = self.read_all(&children, at, &IoBuf::alloc(buf.len())).await;
        for (child, result) in children.iter().zip(&read) {
            if let Err(errno) = result {
                self.report_bad(QuorumOpType::Read, child, span, Some(*errno));
            }
        }
        let results: Vec<IoResult> =
            read.iter().map(|result| result.as_ref().map(drop).map_err(|errno| *errno)).collect();
        if let Err(errno) = vote::of_results(&results, self.threshold) {
            self.report_failure(span);
            return Err(errno);
        }
        let versions = vote::versions(&read);
        if self.blkverify && versions.len() > 1 {
            let place = vote::first_difference(&read).unwrap_or(0);
            eprintln!(
                "quorum: offset={at} bytes={} contents mismatch at offset {}",
                span.len,
                at.saturating_add(place)
            );
            return Err(Errno::EIO);
        }
        let winner = vote::winner(&versions).filter(|winner| winner.children.len() >= self.threshold);
        let Some(winner) = winner else {
            self.report_failure(span);
            return Err(Errno::EIO);
        };
        let right = IoBuf::copy_of(&winner.bytes);
        for loser in versions.iter().filter(|version| version.children != winner.children) {
            for child in loser.children.iter().filter_map(|number| children.get(*number)) {
                self.report_bad(QuorumOpType::Read, child, span, None);
                if self.rewrite {
                    // It was wrong before, and is reported again if it still is.
                    let _ = child.write(at, &right, WriteFlags::NONE).await;
                }
            }
        }
        buf.copy_from(0, &right);
        Ok(())
    }
}

impl Driver for Quorum {
    fn name(&self) -> &'static str {
        "quorum"
    }

    fn facts(&self) -> Facts {
        let children = self.children.load();
        let start = Facts { fua: Support::Native, zero: Support::Native, ..Facts::default() };
        children.iter().map(|child| filter::facts(child)).fold(start, |all, child| Facts {
            request_align: all.request_align.max(child.request_align),
            mem_align: all.mem_align.max(child.mem_align),
            max_transfer: all.max_transfer.min(child.max_transfer),
            max_zero: all.max_zero.min(child.max_zero),
            opt_transfer: all.opt_transfer.max(child.opt_transfer),
            // What a discard leaves may differ from child to child.
            discard: Support::None,
            ..all
        })
    }

    fn filename(&self) -> String {
        let options = self.options.to_value();
        let own = options.as_object().into_iter().flatten().filter(|(name, _)| *name != "children");
        let mut own: Vec<_> = own.map(|(name, value)| (name.as_str(), value.clone())).collect();
        let children: Vec<_> = self.children.load().iter().map(|child| filter::description(child)).collect();
        own.push(("children", children.into()));
        filter::describe("quorum", &own, &[])
    }

    async fn length(&self) -> IoResult<u64> {
        same_length(&self.children.load())
    }

    async fn read(&self, at: u64, buf: &IoBuf) -> IoResult {
        if self.fifo { self.read_first(at, buf).await } else { self.read_by_vote(at, buf).await }
    }

    async fn write(&self, at: u64, buf: &IoBuf, flags: WriteFlags) -> IoResult {
        let span = Span::new(at, len_of(buf));
        // Overlapping writes reach all children in the same order, or the children would differ for good.
        let _held = self.overlap.reserve(span, true).await;
        let children = self.children.load_full();
        self.all(QuorumOpType::Write, span, &children, |child| Box::pin(child.write(at, buf, flags))).await
    }

    async fn zero(&self, span: Span, flags: ZeroFlags) -> IoResult {
        let _held = self.overlap.reserve(span, true).await;
        let children = self.children.load_full();
        self.all(QuorumOpType::Write, span, &children, |child| Box::pin(child.zero(span, flags))).await
    }

    async fn flush(&self) -> IoResult {
        let children = self.children.load_full();
        self.all(QuorumOpType::Flush, Span::new(0, 0), &children, |child| Box::pin(child.flush())).await
    }

    /// Zero where all children are, data elsewhere.
    async fn map(&self, span: Span, _precise: bool) -> IoResult<Mapping> {
        let (mut zero, mut data) = (span.len, 0);
        for child in self.children.load_full().iter() {
            match block::status::of(&child.node(), span).await {
                Ok(found) if found.zero => zero = zero.min(found.len),
                Ok(found) => data = data.max(found.len),
                Err(errno) => {
                    self.report_bad(QuorumOpType::Read, child, span, Some(errno));
                    data = span.len;
                }
            }
        }
        Ok(if data > 0 { Mapping::data(data, span.at) } else { Mapping::hole(zero, span.at) })
    }

    /// The children stay alike: nobody else may write to one, or change its length.
    fn child_perms(&self, _child: &Edge, of_node: Perms) -> Perms {
        let rewrite = if self.rewrite { Bits::WRITE } else { Bits::NONE };
        Perms { need: of_node.need | rewrite, shared: (of_node.shared & Bits::CONSISTENT_READ) | Bits::WRITE_UNCHANGED }
    }

    fn child_list(&self) -> Option<&dyn ChildList> {
        Some(self)
    }
}

impl ChildList for Quorum {
    fn next(&self) -> Result<(String, Role)> {
        if self.blkverify {
            return Err(Error::generic("Cannot add a child to a quorum in blkverify mode"));
        }
        let number = self.next.load(Ordering::Relaxed);
        if self.children.load().len() >= MAX_CHILDREN || number == u32::MAX {
            return Err(Error::generic("Too many children"));
        }
        Ok((format!("children.{number}"), Role::Data))
    }

    fn may_remove(&self, _child: &Edge) -> Result<()> {
        if self.children.load().len() > self.threshold {
            return Ok(());
        }
        let threshold = self.threshold;
        Err(Error::generic(format!("The number of children cannot be lower than the vote threshold {threshold}")))
    }

    fn set(&self, children: &[Arc<Edge>]) {
        // A name is not used again while a later child has its own.
        let after = |child: &Arc<Edge>| child.name().rsplit('.').next()?.parse::<u32>().ok()?.checked_add(1);
        let next = children.iter().filter_map(after).max().unwrap_or(0);
        self.next.store(next, Ordering::Relaxed);
        self.children.store(Arc::new(children.to_vec()));
    }
}
