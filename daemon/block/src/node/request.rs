//! The path of a request through a node.

use super::{DetectZeroes, Node};
use crate::IoResult;
use crate::driver::{Facts, Mapping, Span, Support, WriteFlags, ZeroFlags};
use crate::perm::Bits;
use crate::stats::Op;
use buf::IoBuf;
use nix::errno::Errno;
use qapi::types::block_filters::BlkdebugEvent;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// The longest buffer that the core allocates for bounces and for zeroes, in bytes.
const BOUNCE: u64 = 1 << 20;

fn to_usize(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}

fn align_down(at: u64, align: u32) -> u64 {
    at & !(u64::from(align) - 1)
}

fn align_up(at: u64, align: u32) -> u64 {
    at.checked_next_multiple_of(u64::from(align)).unwrap_or(u64::MAX)
}

fn is_aligned(span: Span, align: u32) -> bool {
    (span.at | span.len) & (u64::from(align) - 1) == 0
}

fn len_of(buf: &IoBuf) -> u64 {
    u64::try_from(buf.len()).unwrap_or(u64::MAX)
}

/// Whether the driver takes this transfer as it is.
fn fits(facts: &Facts, at: u64, buf: &IoBuf) -> bool {
    let len = len_of(buf);
    len <= u64::from(facts.max_transfer)
        && is_aligned(Span::new(at, len), facts.request_align)
        && (facts.mem_align <= 1
            || buf.is_aligned(facts.mem_align as usize, facts.mem_align.min(facts.request_align) as usize))
}

/// See [`Node::fitting`].
pub(super) fn fitting(facts: &Facts) -> u64 {
    if facts.request_align <= 1 && facts.mem_align <= 1 { u64::from(facts.max_transfer) + 1 } else { 0 }
}

/// The longest piece that is cut from an unfitting transfer: bounded, and whole alignment units.
fn piece(facts: &Facts) -> u64 {
    align_down(u64::from(facts.max_transfer).min(BOUNCE), facts.request_align).max(u64::from(facts.request_align))
}

impl Node {
    /// Fills `buf` with the bytes from `at`. Bytes after the end read as zero.
    ///
    /// # Errors
    /// The driver's errno; `EINVAL` for a range that wraps.
    pub async fn read(&self, at: u64, buf: &IoBuf) -> IoResult {
        let len = len_of(buf);
        let Some(end) = at.checked_add(len) else {
            self.stats.refused(Op::Read);
            return Err(Errno::EINVAL);
        };
        let size = self.size();
        let result = if end <= size {
            if self.takes(at, buf) {
                self.driver.read(at, buf).await
            } else {
                Box::pin(self.read_in_pieces(at, buf)).await
            }
        } else {
            Box::pin(self.read_across_end(at, buf, size)).await
        };
        self.stats.done(Op::Read, len, result.is_ok());
        result
    }

    /// Whether the driver takes this transfer as it is.
    fn takes(&self, at: u64, buf: &IoBuf) -> bool {
        len_of(buf) < self.fitting.load(Ordering::Acquire) || fits(&self.facts.load(), at, buf)
    }

    /// [`Node::read`] on the first node from `top` downwards that does not merely pass it on to the next. Each of the others
    /// checks and counts it as if it had done it.
    pub(crate) async fn read_down(top: Arc<Self>, at: u64, buf: &IoBuf) -> IoResult {
        let mut node = top;
        let mut passed = Vec::new();
        while let Some(below) = node.read_through(at, buf) {
            passed.push(std::mem::replace(&mut node, below));
        }
        let result = node.read(at, buf).await;
        for node in passed {
            node.stats.done(Op::Read, len_of(buf), result.is_ok());
        }
        result
    }

    /// Where the driver sends a read of its whole length, unless the core has something to do about it here.
    fn read_through(&self, at: u64, buf: &IoBuf) -> Option<Arc<Self>> {
        let len = len_of(buf);
        let inside = at.checked_add(len).is_some_and(|end| end <= self.size());
        if inside && self.takes(at, buf) { self.driver.read_through(Span::new(at, len)) } else { None }
    }

    async fn read_across_end(&self, at: u64, buf: &IoBuf, size: u64) -> IoResult {
        let inside = to_usize(size.saturating_sub(at)).min(buf.len());
        buf.slice(inside, buf.len()).fill(0);
        if inside == 0 {
            return Ok(());
        }
        self.read_in_pieces(at, &buf.slice(0, inside)).await
    }

    /// Cuts a read at the driver's limits; what is not aligned goes through a bounce buffer.
    async fn read_in_pieces(&self, at: u64, buf: &IoBuf) -> IoResult {
        let facts = self.facts();
        let mut done = 0;
        while done < buf.len() {
            let start = at + len_of(buf).min(u64::try_from(done).unwrap_or(u64::MAX));
            let rest = buf.slice(done, buf.len());
            let direct = rest
                .slice(0, to_usize(align_down(len_of(&rest).min(u64::from(facts.max_transfer)), facts.request_align)));
            if !direct.is_empty() && fits(&facts, start, &direct) {
                self.driver.read(start, &direct).await?;
                done += direct.len();
                continue;
            }
            let from = align_down(start, facts.request_align);
            let to = align_up(start + len_of(&rest), facts.request_align).min(from + piece(&facts));
            let bounce = IoBuf::alloc(to_usize(to - from));
            self.driver.read(from, &bounce).await?;
            done += rest.copy_from(0, &bounce.slice(to_usize(start - from), rest.len()));
        }
        Ok(())
    }

    /// Writes `buf` at `at`.
    ///
    /// # Errors
    /// The driver's errno; `EPERM` on a read-only node; `EIO` beyond the end unless a user may resize the node.
    pub async fn write(&self, at: u64, buf: &IoBuf, flags: WriteFlags) -> IoResult {
        let len = len_of(buf);
        let span = Span::new(at, len);
        self.check_change(span, Op::Write)?;
        let detect = self.options.load().detect_zeroes;
        let result = if detect != DetectZeroes::Off && buf.is_zero() {
            let may_unmap = detect == DetectZeroes::Unmap;
            self.zero_inner(span, ZeroFlags { fua: flags.fua, may_unmap, no_fallback: false }).await
        } else {
            self.write_inner(at, buf, flags).await
        };
        self.changed(span, result.is_ok()).await;
        self.stats.done(Op::Write, len, result.is_ok());
        result
    }

    /// Writes `buf` at `at` in a form that takes less space. Both ends are multiples of [`Facts::compressed_unit`], or the end
    /// of the node.
    ///
    /// # Errors
    /// As for [`Node::write`]; `ENOTSUP` where there is no such form, `EINVAL` for other ends.
    pub async fn write_compressed(&self, at: u64, buf: &IoBuf) -> IoResult {
        let span = Span::new(at, len_of(buf));
        self.check_change(span, Op::Write)?;
        let unit = self.facts.load().compressed_unit;
        let fits = |at: u64| at.is_multiple_of(u64::from(unit));
        let result = if unit == 0 {
            Err(Errno::ENOTSUP)
        } else if fits(at) && (fits(span.end()) || span.end() == self.size()) {
            self.raise(BlkdebugEvent::Pwritev);
            self.driver.write_compressed(at, buf).await
        } else {
            Err(Errno::EINVAL)
        };
        self.changed(span, result.is_ok()).await;
        self.stats.done(Op::Write, span.len, result.is_ok());
        result
    }

    /// A change has ended. Even one that failed makes the next flush reach the medium: some of its bytes may be there.
    async fn changed(&self, span: Span, ok: bool) {
        self.raise(BlkdebugEvent::PwritevDone);
        self.written.fetch_add(1, Ordering::AcqRel);
        if ok {
            self.stats.wrote_up_to(span.end());
        }
        if span.end() > self.size() {
            // Of one that failed as well: whoever takes what is behind the end for untouched would find its bytes there.
            let end = if ok { Ok(span.end()) } else { Box::pin(self.driver.length()).await };
            self.size.fetch_max(super::whole_sectors(end.unwrap_or(0)), Ordering::AcqRel);
        }
    }

    /// What is checked before any change of data.
    fn check_change(&self, span: Span, op: Op) -> IoResult {
        let options = self.options.load();
        let refused = if options.read_only || options.inactive {
            Some(Errno::EPERM)
        } else if span.at.checked_add(span.len).is_none_or(|end| end > i64::MAX.unsigned_abs()) {
            Some(Errno::EINVAL)
        } else if span.end() > self.size() && !self.needed().contains(Bits::RESIZE) {
            Some(Errno::EIO)
        } else {
            None
        };
        match refused {
            Some(errno) => {
                self.stats.refused(op);
                Err(errno)
            }
            None => {
                if op == Op::Write {
                    self.check_threshold(span.end());
                }
                Ok(())
            }
        }
    }

    /// FUA as the driver can do it: the flags to pass on, and whether a flush has to follow.
    fn fua(&self, facts: &Facts, fua: bool) -> (bool, bool) {
        if !fua || self.options.load().no_flush {
            return (false, false);
        }
        match facts.fua {
            Support::None => (false, true),
            Support::Emulated | Support::Native => (true, false),
        }
    }

    async fn write_inner(&self, at: u64, buf: &IoBuf, flags: WriteFlags) -> IoResult {
        let facts = self.facts.load();
        let (fua, flush) = self.fua(&facts, flags.fua);
        let flags = WriteFlags { fua };
        let (fits, align) = (fits(&facts, at, buf), facts.request_align);
        drop(facts);
        self.raise(BlkdebugEvent::Pwritev);
        if fits && align == 1 {
            self.driver.write(at, buf, flags).await?;
        } else {
            Box::pin(self.write_serialised(at, buf, flags)).await?;
        }
        if flush { self.flush_after_change().await } else { Ok(()) }
    }

    /// A flush that belongs to a write which is not counted as completed yet.
    async fn flush_after_change(&self) -> IoResult {
        self.written.fetch_add(1, Ordering::AcqRel);
        self.flush_inner().await
    }

    /// A write on a node whose alignment is above one byte: registered, so that no read-modify-write loses it.
    async fn write_serialised(&self, at: u64, buf: &IoBuf, flags: WriteFlags) -> IoResult {
        let facts = self.facts();
        let span = Span::new(at, len_of(buf));
        let aligned = is_aligned(span, facts.request_align);
        let from = align_down(at, facts.request_align);
        let touched = Span::new(from, align_up(span.end(), facts.request_align) - from);
        let _held = if facts.request_align > 1 { Some(self.overlap.reserve(touched, !aligned).await) } else { None };
        self.write_reserved(&facts, at, buf, flags).await
    }

    /// Writes in pieces that fit; the caller holds a reservation of all units touched.
    async fn write_reserved(&self, facts: &Facts, at: u64, buf: &IoBuf, flags: WriteFlags) -> IoResult {
        let align = facts.request_align;
        let mut done = 0;
        while done < buf.len() {
            let rest = buf.slice(done, buf.len());
            let start = at + u64::try_from(done).unwrap_or(u64::MAX);
            let direct = rest.slice(0, to_usize(align_down(len_of(&rest).min(u64::from(facts.max_transfer)), align)));
            if !direct.is_empty() && fits(facts, start, &direct) {
                self.driver.write(start, &direct, flags).await?;
                done += direct.len();
                continue;
            }
            let from = align_down(start, align);
            let end = start + len_of(&rest);
            // Whole units where there are any; else the unit in which the data starts or ends.
            let to = if from == start && align_down(end, align) > start {
                align_down(end, align).min(from + piece(facts))
            } else {
                from + u64::from(align)
            };
            let bounce = IoBuf::alloc(to_usize(to - from));
            if from != start || end < to {
                let (before, after) = if from == start {
                    (BlkdebugEvent::PwritevRmwTail, BlkdebugEvent::PwritevRmwAfterTail)
                } else {
                    (BlkdebugEvent::PwritevRmwHead, BlkdebugEvent::PwritevRmwAfterHead)
                };
                self.raise(before);
                self.driver.read(from, &bounce).await?;
                self.raise(after);
            }
            let skip = to_usize(start - from);
            let into = bounce.slice(skip, bounce.len());
            let taken = into.copy_from(0, &rest.slice(0, into.len()));
            self.driver.write(from, &bounce, flags).await?;
            done += taken;
        }
        Ok(())
    }

    /// Makes `span` read as zero.
    ///
    /// # Errors
    /// As for [`Node::write`]; `ENOTSUP` with `no_fallback` where the medium has no fast way.
    pub async fn zero(&self, span: Span, flags: ZeroFlags) -> IoResult {
        self.check_change(span, Op::Write)?;
        let result = self.zero_inner(span, flags).await;
        self.changed(span, result.is_ok()).await;
        self.stats.done(Op::Write, span.len, result.is_ok());
        result
    }

    async fn zero_inner(&self, span: Span, flags: ZeroFlags) -> IoResult {
        let facts = self.facts();
        let (fua, flush) = self.fua(&facts, flags.fua);
        let may_unmap = flags.may_unmap && self.options.load().discard;
        self.raise(BlkdebugEvent::PwritevZero);
        Box::pin(self.zero_pieces(&facts, span, ZeroFlags { fua, may_unmap, ..flags })).await?;
        if flush { self.flush_after_change().await } else { Ok(()) }
    }

    async fn zero_pieces(&self, facts: &Facts, span: Span, flags: ZeroFlags) -> IoResult {
        let align = facts.zero_align.max(facts.request_align);
        let from = align_down(span.at, facts.request_align);
        let touched = Span::new(from, align_up(span.end(), facts.request_align) - from);
        let unaligned = !is_aligned(span, facts.request_align);
        let _held = if facts.request_align > 1 { Some(self.overlap.reserve(touched, unaligned).await) } else { None };
        let mut at = span.at;
        while at < span.end() {
            let middle = align_down(span.end(), align);
            let (end, fast) = if at.is_multiple_of(u64::from(align)) && middle > at {
                let longest = align_down(u64::try_from(i64::MAX).unwrap_or(u64::MAX).min(facts.max_zero), align);
                (middle.min(at + longest.max(u64::from(align))), true)
            } else {
                (align_up(at + 1, align).min(span.end()), false)
            };
            let part = Span::new(at, end - at);
            let result = if fast { self.zero_fast(facts, part, flags).await } else { Err(Errno::ENOTSUP) };
            match result {
                Err(Errno::ENOTSUP) if flags.no_fallback => return Err(Errno::ENOTSUP),
                Err(Errno::ENOTSUP) => self.write_zeroes(facts, part, flags.fua).await?,
                other => other?,
            }
            at = end;
        }
        Ok(())
    }

    async fn zero_fast(&self, facts: &Facts, part: Span, flags: ZeroFlags) -> IoResult {
        if facts.zero == Support::None { Err(Errno::ENOTSUP) } else { self.driver.zero(part, flags).await }
    }

    /// Zeroes the slow way; the caller holds the reservation.
    async fn write_zeroes(&self, facts: &Facts, part: Span, fua: bool) -> IoResult {
        let zeroes = IoBuf::zeroed(to_usize(part.len.min(BOUNCE)));
        let mut at = part.at;
        while at < part.end() {
            let piece = zeroes.slice(0, to_usize(part.end() - at));
            self.write_reserved(facts, at, &piece, WriteFlags { fua }).await?;
            at += len_of(&piece);
        }
        Ok(())
    }

    /// Tells the medium that `span` is not needed any more. Without `discard=unmap`, or where the medium cannot, nothing
    /// happens; the bytes may read as anything afterwards.
    ///
    /// # Errors
    /// As for [`Node::write`].
    pub async fn discard(&self, span: Span) -> IoResult {
        self.check_change(span, Op::Unmap)?;
        let facts = self.facts();
        let result = if self.options.load().discard && facts.discard != Support::None {
            Box::pin(self.discard_pieces(&facts, span)).await
        } else {
            Ok(())
        };
        self.written.fetch_add(1, Ordering::AcqRel);
        self.stats.done(Op::Unmap, span.len, result.is_ok());
        result
    }

    async fn discard_pieces(&self, facts: &Facts, span: Span) -> IoResult {
        let align = facts.discard_align.max(facts.request_align);
        let (mut at, end) = (align_up(span.at, align), align_down(span.end(), align));
        if at >= end {
            return Ok(());
        }
        let touched = Span::new(at, end - at);
        let _held = if facts.request_align > 1 { Some(self.overlap.reserve(touched, false).await) } else { None };
        while at < end {
            let len = (end - at).min(align_down(facts.max_discard, align).max(u64::from(align)));
            match self.driver.discard(Span::new(at, len)).await {
                Err(Errno::ENOTSUP) => {}
                other => other?,
            }
            at += len;
        }
        Ok(())
    }

    /// Everything that completed before this call is on stable storage when it returns (unless `cache.no-flush`).
    ///
    /// # Errors
    /// The driver's errno.
    pub async fn flush(&self) -> IoResult {
        let result = self.flush_inner().await;
        self.stats.done(Op::Flush, 0, result.is_ok());
        result
    }

    async fn flush_inner(&self) -> IoResult {
        if self.options.load().no_flush {
            return Ok(());
        }
        let upto = self.written.load(Ordering::Acquire);
        if self.flushed.load(Ordering::Acquire) >= upto {
            return Ok(());
        }
        self.driver.flush().await?;
        self.flushed.fetch_max(upto, Ordering::AcqRel);
        Ok(())
    }

    /// What lies at the start of `span`, see [`Mapping`]. Beyond the end is a hole.
    ///
    /// # Errors
    /// The driver's errno; `EINVAL` for an empty span.
    pub async fn map(&self, span: Span, precise: bool) -> IoResult<Mapping> {
        let size = self.size();
        if span.len == 0 {
            return Err(Errno::EINVAL);
        }
        if span.at >= size {
            return Ok(Mapping { allocated: false, at: None, ..Mapping::hole(span.len, 0) });
        }
        let align = self.facts.load().request_align;
        let end = span.end().min(size);
        let from = align_down(span.at, align);
        let mut found = self.driver.map(Span::new(from, align_up(end, align) - from), precise).await?;
        let skip = span.at - from;
        if found.len <= skip {
            // A driver whose medium changes inside an alignment unit: only reading can tell about the rest of that.
            let len = (from + u64::from(align)).min(end).saturating_sub(span.at).max(1);
            return Ok(Mapping { at: None, ..Mapping::data(len, 0) });
        }
        found.len = (found.len - skip).min(end - span.at);
        found.at = found.at.map(|at| at + skip);
        Ok(found)
    }
}
