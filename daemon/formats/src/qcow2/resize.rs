//! Resizing: a larger L1 table where it takes one, then the length in the header. Bitmaps follow, see `bitmap::resize`, and
//! so does an external data file.

use super::bitmap::resize::Change;
use super::bytes::us;
use super::header;
use super::image::{Free, Qcow2, lock};
use block::driver::Prealloc;
use block::{BlkdebugEvent, Errno, IoResult, Span, WriteFlags, ZeroFlags};
use buf::IoBuf;
use qapi::{Error, Result};
use std::ops::Range;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

impl Qcow2 {
    /// Sets the length of the guest's disk; that of an external data file becomes the same, to the byte if `exact`. Nothing is
    /// in flight.
    ///
    /// # Errors
    /// The length cannot change, or not to this; an error of the file. The length is the old one then, unless that is said.
    pub(super) async fn resize(&self, size: u64, exact: bool, prealloc: Prealloc) -> Result<()> {
        if prealloc != Prealloc::Off {
            return Err(Error::generic("Resizing a qcow2 image with preallocation is not supported"));
        }
        if !size.is_multiple_of(512) {
            return Err(Error::generic("The new size must be a multiple of 512"));
        }
        let header = self.header_now();
        if header.version < 3 && header.snapshots > 0 {
            return Err(Error::generic("Can't resize a v2 image which has snapshots"));
        }
        let failed = |errno: Errno| Error::io("Failed to resize the image", errno.into());
        let old = self.length_now();
        self.prepare().await.map_err(failed)?;
        self.suspend_bitmaps(size).await?;
        let bitmaps = match self.resize_disk(size, exact).await {
            Ok(bitmaps) => bitmaps,
            Err(error) => {
                // They are as they were. Where the mark cannot be taken off, they count as inconsistent.
                let _ = self.resume_bitmaps().await;
                return Err(error);
            }
        };
        let followed = async {
            self.change_bitmaps(bitmaps).await?;
            self.resume_bitmaps().await
        };
        followed.await.map_err(|errno| Error::io("The image was resized, but its bitmaps were lost", errno.into()))?;
        match &self.data_file {
            Some(data) if size < old => data.truncate(size, exact, Prealloc::Off).await,
            _ => Ok(()),
        }
    }

    /// Sets the length, all but what bitmaps make of it.
    async fn resize_disk(&self, size: u64, exact: bool) -> Result<Vec<Change>> {
        let failed = |errno: Errno| Error::io("Failed to resize the image", errno.into());
        let old = self.length_now();
        let bitmaps = self.plan_bitmaps(size).await.map_err(failed)?;
        let done = match &self.data_file {
            Some(data) if size > old => data.truncate(size, exact, Prealloc::Off).await,
            _ => Ok(()),
        };
        let done = match done {
            Ok(()) if size < old => self.shrink(size, old).await.map_err(failed),
            Ok(()) => self.grow_to(size, old).await.map_err(failed),
            Err(error) => Err(error),
        };
        match done {
            Ok(()) => Ok(bitmaps),
            Err(error) => {
                self.drop_changes(bitmaps).await;
                Err(error)
            }
        }
    }

    async fn shrink(&self, size: u64, old: u64) -> IoResult {
        // The clusters behind the new end are given up in any case, or a later growth would show their bytes.
        let start = size.next_multiple_of(self.shape.cluster());
        let end = old.next_multiple_of(self.shape.cluster());
        if start < end {
            let none = super::entry::Entry::NONE;
            self.each_slice(Span::new(start, end - start), false, |_, _| Ok(none)).await?;
        }
        self.write_out().await?;
        self.set_size(size).await
    }

    async fn grow_to(&self, size: u64, old: u64) -> IoResult {
        let needed = self.header_now().l1_entries_for(size);
        if needed * 8 > header::MAX_L1_BYTES {
            return Err(Errno::EFBIG);
        }
        if needed > u64::from(self.header_now().l1_entries) {
            self.grow_l1(needed).await?;
        }
        // What was behind the old end must not show: rests in the last cluster, or the backing file.
        let shown = self.backing.load().as_ref().map_or(0, |backing| backing.size());
        let end = size.min(old.next_multiple_of(self.shape.cluster()).max(shown));
        if old < end {
            self.hide(old, end).await?;
        }
        self.write_out().await?;
        self.set_size(size).await
    }

    /// Makes `from..to` read as zero, the ends by writing.
    async fn hide(&self, from: u64, to: u64) -> IoResult {
        let unit = self.shape.subcluster();
        // Whole units alone may be zeroed: what is before `from` in its unit stays.
        let (first, last) = (from.next_multiple_of(unit), to.next_multiple_of(unit));
        if from < first {
            self.write_guest(from, &IoBuf::zeroed(us(first.min(to) - from)), WriteFlags::NONE).await?;
        }
        if first >= last {
            return Ok(());
        }
        let flags = ZeroFlags::default();
        match self.zero_guest(Span::new(first, last - first), flags).await {
            Err(Errno::ENOTSUP) => {
                let mut at = first;
                while at < last {
                    let part = IoBuf::zeroed(us((last - at).min(1 << 20)));
                    self.write_guest(at, &part, WriteFlags::NONE).await?;
                    at += super::bytes::u64_of(part.len());
                }
                Ok(())
            }
            other => other,
        }
    }

    /// Moves the L1 table to a larger place.
    async fn grow_l1(&self, needed: u64) -> IoResult {
        // No dirty sector may be left behind at the old place.
        self.write_out().await?;
        let turn = self.turn.lock().await;
        let clusters = (needed * 8).div_ceil(self.shape.cluster());
        self.file.raise(BlkdebugEvent::L1GrowAllocTable);
        let place = self.refs.claim_row(clusters, &self.file).await?;
        drop(turn);
        let moved = self.move_l1(needed, place.clone()).await;
        if moved.is_err() {
            self.unclaim(place).await;
        }
        moved
    }

    /// Moves the L1 table to the clusters `place`, which nothing names yet.
    async fn move_l1(&self, needed: u64, place: Range<u64>) -> IoResult {
        let bits = self.shape.cluster_bits;
        // Its clusters are counted in the image before anything names them.
        self.write_out().await?;
        let _turn = self.turn.lock().await;
        let (mut entries, old) = {
            let l1 = self.l1.read().unwrap_or_else(PoisonError::into_inner);
            let first = l1.at >> bits;
            let len = super::bytes::u64_of(l1.entries.len() * 8).div_ceil(self.shape.cluster());
            (l1.entries.clone(), first..first + len)
        };
        entries.resize(us(needed), 0);
        let mut bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        bytes.resize(us((place.end - place.start) << bits), 0);
        let at = place.start << bits;
        self.file.raise(BlkdebugEvent::L1GrowWriteTable);
        self.file.write(at, &IoBuf::copy_of(&bytes), WriteFlags::NONE).await?;
        self.file.flush().await?;
        self.file.raise(BlkdebugEvent::L1GrowActivateTable);
        let count = u32::try_from(needed).map_err(|_| Errno::EFBIG)?;
        self.set_header(|header| {
            header.l1_at = at;
            header.l1_entries = count;
        })
        .await?;
        {
            let mut l1 = self.l1.write().unwrap_or_else(PoisonError::into_inner);
            l1.entries = entries;
            l1.at = at;
        }
        lock(&self.unlinked).push(Free { clusters: old, discard: self.discards().other, table: false });
        // It has been done; this only serves other checks.
        let _ = self.guard_anew().await;
        Ok(())
    }

    async fn set_size(&self, size: u64) -> IoResult {
        let _turn = self.turn.lock().await;
        self.set_header(|header| header.size = size).await?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }
}
