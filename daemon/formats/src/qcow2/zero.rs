//! Zeroes and discards: the mapping changes, data is not touched. Whole subclusters only; the core writes the ends.

use super::bytes::us;
use super::entry::{Entry, Place};
use super::image::Qcow2;
use block::{Errno, IoResult, Span, ZeroFlags};

impl Qcow2 {
    /// Makes `span`, whole subclusters, read as zero.
    pub(super) async fn zero_guest(&self, span: Span, flags: ZeroFlags) -> IoResult {
        if self.shape.version < 3 {
            return Err(Errno::ENOTSUP);
        }
        self.prepare().await?;
        self.record(span).await?;
        if self.raw_data {
            self.data().zero(span, ZeroFlags { fua: false, ..flags }).await?;
        }
        let _inside = self.epochs.enter();
        let may_unmap = flags.may_unmap && !self.discards().no_unref;
        self.each_slice(span, true, |entry, mask| {
            let unmap = matches!(entry.place, Place::Packed { .. })
                || (may_unmap && entry.place != Place::None && mask == self.shape.all());
            if matches!(entry.place, Place::Packed { .. }) && mask != self.shape.all() {
                return Err(Errno::ENOTSUP);
            }
            Ok(if unmap && !self.raw_data {
                Entry { place: Place::None, stored: 0, zero: self.shape.all() }
            } else {
                Entry { stored: entry.stored & !mask, zero: entry.zero | mask, ..entry }
            })
        })
        .await
    }

    /// Gives up `span`, whole clusters: they read as zero where the format can say so.
    pub(super) async fn discard_guest(&self, span: Span) -> IoResult {
        if self.shape.version < 3 && self.backing.load().is_some() {
            // The backing file's old bytes would show through.
            return Err(Errno::ENOTSUP);
        }
        self.prepare().await?;
        self.record(span).await?;
        if self.raw_data {
            let flags = ZeroFlags { may_unmap: true, ..ZeroFlags::default() };
            return self.zero_guest(span, flags).await;
        }
        let _inside = self.epochs.enter();
        self.each_slice(span, self.backing.load().is_some(), |entry, mask| {
            if mask != self.shape.all() || (entry.place == Place::None && self.backing.load().is_none()) {
                return Ok(entry);
            }
            let place = match entry.place {
                Place::Plain { .. } if self.discards().no_unref && self.shape.version >= 3 => entry.place,
                _ => Place::None,
            };
            let zero = if self.shape.version >= 3 { self.shape.all() } else { 0 };
            Ok(Entry { place, stored: 0, zero })
        })
        .await
    }

    /// Applies `new` to each entry of `span` with the mask of the subclusters in it; clusters that an entry does not name
    /// any more are given up. Without `create`, what has no L2 table is passed over.
    pub(super) async fn each_slice(
        &self,
        span: Span,
        create: bool,
        new: impl Fn(Entry, u32) -> IoResult<Entry>,
    ) -> IoResult {
        let (cluster, reach) = (self.shape.cluster(), self.slice_reach());
        let mut at = span.at;
        while at < span.end() {
            let end = span.end().min(at - at % reach + reach);
            let start = at - at % cluster;
            let held = self.busy.reserve(Span::new(start, end.next_multiple_of(cluster) - start), true).await;
            if create || self.l1_entry(at) != 0 {
                self.own_table(at).await?;
                let change = |slice: &mut Vec<u8>| self.change_entries(slice, at, end, &new);
                let gone = self.change_slice(at..end, change).await??;
                self.unlink(&gone, self.discards().request);
            }
            drop(held);
            at = end;
            // Memory must not grow with the length of a disk that is cut off.
            if self.is_overdue() {
                self.make_room().await?;
            }
        }
        self.make_room().await
    }

    /// All entries of `at..end`, or none if one cannot be changed. Returns those that were given up.
    fn change_entries(
        &self,
        slice: &mut [u8],
        at: u64,
        end: u64,
        new: &impl Fn(Entry, u32) -> IoResult<Entry>,
    ) -> IoResult<Vec<Entry>> {
        let cluster = self.shape.cluster();
        let mut changes = Vec::with_capacity(us((end - at) / cluster + 1));
        let mut pos = at;
        while pos < end {
            let next = (pos - pos % cluster + cluster).min(end);
            let old = self.entry(slice, pos).map_err(|why| self.malformed(pos, why, true))?;
            changes.push((pos, old, new(old, self.touched(&(pos..next)))?));
            pos = next;
        }
        let mut gone = Vec::new();
        for (pos, old, new) in changes {
            if old != new {
                self.put_entry(slice, pos, new);
            }
            if new.place != old.place {
                gone.push(old);
            }
        }
        Ok(gone)
    }
}
