//! Handing over: what a user that stays when this process dies needs of it.
//!
//! Such a user, a guest whose front-end connects to the next process, has been told that a write is done, and flushes it
//! later: that flush reaches a process that knows nothing of what this one had in memory. So while there is such a user, a change
//! of the mapping is done only when the host has been given the metadata that makes it visible. Those that wait at the
//! same time share one turn, as with flushes. Who writes where the data already is, and the host has that mapping, waits for nothing.
//!
//! The host keeps what it was given when the process dies, in whatever order. When its power fails it keeps any part of it, so before
//! L2 entries are written there is a barrier, as in a flush, if something that they name may not be there: a
//! count, or bytes that have to be right once the entry is there. None is needed for clusters that have been set aside for it: a
//! run behind the end of the file, counted and zero before, so that no part of the data can be wrong where zeroes were, in the
//! image or in what shows through. A barrier behind it all is for those who flush: blocks stay dirty until then, and unlinked
//! clusters in use.
//!
//! A crash leaks what was set aside, at most [`SPARE`] bytes.

use super::image::{Qcow2, Turn, lock};
use block::{IoResult, Span, WriteFlags};
use buf::IoBuf;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// Bytes of the image file that are set aside at a time.
const SPARE: u64 = 16 << 20;

/// What is known of it.
#[derive(Debug, Default)]
pub(super) struct Handover {
    /// There is a user that stays.
    wanted: AtomicBool,
    /// See [`Handover::exposed`].
    exposed: AtomicU64,
    /// Clusters that are set aside. Never across an await.
    spare: Mutex<Range<u64>>,
    /// One at a time sets some aside.
    filling: tokio::sync::Mutex<()>,
    /// The file does not get longer: it is a device, or there was no space when it was last tried.
    fixed: AtomicBool,
}

impl Handover {
    /// How often L2 entries were changed that rely on bytes which may not be stable.
    pub fn exposed(&self) -> u64 {
        self.exposed.load(Ordering::Acquire)
    }

    /// An L2 entry is about to be changed that relies on bytes which have been written, and must be there when it is.
    pub fn expose(&self) {
        self.exposed.fetch_add(1, Ordering::AcqRel);
    }

    /// The file has become longer: it can again.
    pub fn grew(&self) {
        if self.fixed.load(Ordering::Relaxed) {
            self.fixed.store(false, Ordering::Relaxed);
        }
    }

    /// What is set aside is nobody's any more.
    pub fn take_spare(&self) -> Range<u64> {
        std::mem::take(&mut *lock(&self.spare))
    }

    /// Up to `most` of the clusters that are set aside; none if there are none, or clusters before them may be free.
    fn split_spare(&self, most: u64, first_free: u64) -> Option<Range<u64>> {
        let mut spare = lock(&self.spare);
        if spare.is_empty() || first_free < spare.start {
            return None;
        }
        let end = spare.end.min(spare.start + most);
        let taken = spare.start..end;
        spare.start = end;
        Some(taken)
    }
}

impl Qcow2 {
    /// Whether there is a user that stays.
    pub(super) fn set_outlived(&self, outlived: bool) {
        self.handover.wanted.store(outlived, Ordering::Release);
    }

    /// A change of `span` is done: if a user stays when this process dies, the host has what makes it visible when this returns.
    pub(super) async fn keep(&self, span: Span) -> IoResult {
        if !self.handover.wanted.load(Ordering::Acquire) || self.is_handed(span) {
            return Ok(());
        }
        let before = self.turns.load(Ordering::Acquire);
        let turn = self.turn.lock().await;
        if turn.handed > before {
            return Ok(());
        }
        self.hand_over(turn).await
    }

    /// Whether the host has the mapping of `span` as it is. What is not in the cache was written before it left.
    fn is_handed(&self, span: Span) -> bool {
        if !self.l1.read().unwrap_or_else(PoisonError::into_inner).unhanded.is_empty() {
            return false;
        }
        let reach = self.slice_reach();
        let mut at = span.at;
        while !self.l2.is_handed() && at < span.end() {
            if self.cached_slice(at).is_some_and(|slice| !slice.is_handed()) {
                return false;
            }
            at += reach - at % reach;
        }
        true
    }

    async fn hand_over(&self, mut turn: tokio::sync::MutexGuard<'_, Turn>) -> IoResult {
        self.check_sound()?;
        let number = self.turns.fetch_add(1, Ordering::AcqRel) + 1;
        // L1 entries only need their tables as these were when they were made, so they may be the newer ones; the entries of
        // a table that is not named would be lost.
        let l2 = self.l2.unhanded_copies();
        let l1 = self.take_l1(false);
        let written = async {
            // What the copies name was counted, and written, before they were taken.
            let relied = self.refs.raised() != turn.counted || self.handover.exposed() != turn.stable;
            if relied || !l1.is_empty() {
                self.write_counts(&mut turn).await?;
            }
            self.write_l2(&l1, &l2).await?;
            self.write_l1(&l1).await
        };
        let result: IoResult = written.await;
        if result.is_err() {
            self.give_back_l1(&l1, false);
            return result;
        }
        l2.iter().for_each(|copy| self.l2.handed(copy));
        turn.handed = number;
        Ok(())
    }

    /// Claims up to `most` clusters in a row for data, at least one; also whether they are set aside: counted in the image before
    /// the host is given an entry that names them, and zeroes.
    pub(super) async fn claim_for_data(&self, most: u64) -> IoResult<(Range<u64>, bool)> {
        let handover = &self.handover;
        if !handover.wanted.load(Ordering::Acquire) || handover.fixed.load(Ordering::Relaxed) {
            return Ok((self.claim(most, None).await?, false));
        }
        if let Some(clusters) = handover.split_spare(most, self.refs.first_free()) {
            return Ok((clusters, true));
        }
        let _filling = handover.filling.lock().await;
        if let Some(clusters) = handover.split_spare(most, self.refs.first_free()) {
            return Ok((clusters, true));
        }
        let bits = self.shape.cluster_bits;
        let end = self.file.size();
        let clusters = self.claim(most, None).await?;
        if let Some(spare) = handover.split_spare(most, clusters.start) {
            self.unclaim(clusters).await;
            return Ok((spare, true));
        }
        // What lies before the end of the file may have been used.
        if clusters.start << bits < end {
            return Ok((clusters, false));
        }
        let set_aside = self.set_aside(clusters.end).await?;
        Ok((clusters, set_aside))
    }

    /// Sets clusters aside from `first` on, which lies at the end of the file or behind it; whether that can be done.
    async fn set_aside(&self, first: u64) -> IoResult<bool> {
        let bits = self.shape.cluster_bits;
        let more = self.refs.claim((SPARE >> bits).clamp(1, 4096), Some(first), &self.file).await?;
        let end = if more.is_empty() { first } else { more.end } << bits;
        let sector = IoBuf::zeroed(512);
        // So that the file is that long, and holes read as zeroes.
        if self.file.write(end - 512, &sector, WriteFlags::NONE).await.is_err() {
            self.handover.fixed.store(true, Ordering::Relaxed);
            self.unclaim(more).await;
            return Ok(false);
        }
        // The next turn makes the length as stable as the counts.
        self.refs.note_raised();
        let old = std::mem::replace(&mut *lock(&self.handover.spare), more);
        self.unclaim(old).await;
        Ok(true)
    }

    /// What was set aside is free again. Nothing is in flight.
    pub(super) async fn give_back_spare(&self) {
        self.unclaim(self.handover.take_spare()).await;
    }
}
