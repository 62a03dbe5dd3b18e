//! Writing: in place where the data already is, else into clusters that are claimed for it.
//!
//! A claimed cluster is the request's own until its data, and what has to be copied around it, has been written; only then
//! the L2 entry names it, in memory. When that reaches the image is the business of `flush`. A request that fails gives
//! its clusters back; nobody has seen them.

use super::bytes::{u64_of, us};
use super::entry::{COPIED, Entry, OFFSET, Place};
use super::guard::Kinds;
use super::image::{Free, Qcow2, Where, lock};
use super::join::join_all;
use block::{BlkdebugEvent, Errno, IoResult, Span, WriteFlags, status};
use buf::IoBuf;
use std::ops::Range;
use std::sync::atomic::Ordering;

/// What is written as one buffer although some of it had to be read first, in bytes at most.
const GATHER: u64 = 512 << 10;
/// Most bytes that are allocated as one step.
const STEP: u64 = 4 << 20;

/// Entries of unlinked clusters that wait for the guest's next flush, before one is made for them: until then their space
/// cannot be used.
const UNLINKED: usize = 4096;

/// How a run of clusters can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// The data is there and nobody else's: over it, at this host offset.
    InPlace(u64),
    /// The cluster is there and nobody else's, but does not hold all that is written to: at this host offset.
    Reuse(u64),
    /// Into a new cluster.
    Fresh,
}

/// Who is asked whether zeroes show through.
#[derive(Clone, Copy, Debug)]
enum Asked {
    /// Nobody: there are some behind the backing file's end.
    Nobody,
    /// The backing files, which may be at the other end of a connection.
    Layers,
    /// They, and the host about holes in files.
    Host,
}

/// A run of guest clusters that is written to in one way.
#[derive(Debug)]
struct Run {
    way: Way,
    /// Guest bytes that are written.
    bytes: Range<u64>,
    /// Entries as they are, one for each cluster.
    entries: Vec<Entry>,
}

impl Qcow2 {
    /// Writes `buf` at `at`. With FUA what goes over data that is there already is stable afterwards; the rest is not.
    pub(super) async fn write_guest(&self, at: u64, buf: &IoBuf, flags: WriteFlags) -> IoResult {
        self.prepare().await?;
        self.record(Span::new(at, u64_of(buf.len()))).await?;
        let inside = self.epochs.enter();
        let mut done = 0;
        while done < buf.len() {
            let rest = buf.slice(done, buf.len());
            done += self.write_some(at + u64_of(done), &rest, flags).await?;
        }
        drop(inside);
        self.make_room().await
    }

    /// Writes as much of the beginning of `buf` as goes in one way; returns the number of bytes.
    async fn write_some(&self, at: u64, buf: &IoBuf, flags: WriteFlags) -> IoResult<usize> {
        let reach = self.slice_reach();
        let len = u64_of(buf.len()).min(reach - at % reach);
        loop {
            if let Some(run) = self.run_of(at, at + len).await?
                && let Way::InPlace(host) = run.way
            {
                self.check_host(host, run.bytes.end - at)?;
                let part = buf.slice(0, us(run.bytes.end - at));
                self.file.raise(BlkdebugEvent::WriteAio);
                self.data().write(host, &part, flags).await?;
                return Ok(part.len());
            }
            // Clusters whose mapping changes are ours from here on, also those that others are just allocating.
            let cluster = self.shape.cluster();
            let end = (at + len.min(STEP)).next_multiple_of(cluster);
            let start = at - at % cluster;
            let held = self.busy.reserve(Span::new(start, end - start), true).await;
            self.own_table(at).await?;
            let Some(run) = self.run_of(at, at + len.min(STEP)).await? else { continue };
            if matches!(run.way, Way::InPlace(_)) {
                continue;
            }
            let written = self.allocate(run, buf).await;
            drop(held);
            return written;
        }
    }

    /// Refuses to write guest data where a damaged L2 entry would have it: over metadata, or far behind the end.
    fn check_host(&self, host: u64, len: u64) -> IoResult {
        if self.data_file.is_some() {
            return Ok(());
        }
        if host - host % self.shape.cluster() >= self.file.size() {
            return Err(self.damage(&format!("Data cluster offset {host:#x} is behind the end of the image file")));
        }
        self.check_overlap(Kinds::NONE, host, len)
    }

    /// How the clusters from the one at `at` can be written; none if there is no L2 table that may be changed.
    async fn run_of(&self, at: u64, end: u64) -> IoResult<Option<Run>> {
        if !self.is_own_table(at) {
            return Ok(None);
        }
        let Some(slice) = self.slice(at).await? else { return Ok(None) };
        let cluster = self.shape.cluster();
        let found = slice.look(|bytes| {
            let mut run: Option<Run> = None;
            let mut pos = at;
            while pos < end {
                let next = (pos - pos % cluster + cluster).min(end);
                let entry = self.entry(bytes, pos)?;
                let way = self.way_of(entry, &(pos..next));
                match &mut run {
                    None => run = Some(Run { way, bytes: pos..next, entries: vec![entry] }),
                    Some(run) => {
                        let len = pos - run.bytes.start;
                        let goes_on = match (run.way, way) {
                            (Way::InPlace(a), Way::InPlace(b)) | (Way::Reuse(a), Way::Reuse(b)) => a + len == b,
                            (Way::Fresh, Way::Fresh) => true,
                            _ => false,
                        };
                        if !goes_on {
                            break;
                        }
                        run.bytes.end = next;
                        run.entries.push(entry);
                    }
                }
                pos = next;
            }
            Ok(run)
        });
        found.map_err(|why| self.malformed(at, why, true))
    }

    fn way_of(&self, entry: Entry, bytes: &Range<u64>) -> Way {
        let touched = self.touched(bytes);
        let within = bytes.start % self.shape.cluster();
        match entry.place {
            Place::Plain { at, copied: true } if entry.stored & touched == touched => Way::InPlace(at + within),
            Place::Plain { at, copied: true } => Way::Reuse(at + within),
            _ => Way::Fresh,
        }
    }

    /// The subclusters of the cluster of `bytes` that `bytes` touches.
    pub(super) fn touched(&self, bytes: &Range<u64>) -> u32 {
        let (cluster, unit) = (self.shape.cluster(), self.shape.subcluster());
        let start = bytes.start - bytes.start % cluster;
        self.shape.mask((bytes.start - start) / unit, (bytes.end - start).div_ceil(unit))
    }

    /// Sees to it that `at` has an L2 table that may be changed in place. The caller has reserved a cluster that it maps.
    pub(super) async fn own_table(&self, at: u64) -> IoResult {
        if self.is_own_table(at) {
            return Ok(());
        }
        let index = at / self.l2_reach();
        let _held = self.tables.reserve(Span::new(index, 1), true).await;
        if self.is_own_table(at) {
            return Ok(());
        }
        let old = self.l1_entry(at);
        let cluster = self.shape.cluster();
        let content = if old & OFFSET == 0 {
            IoBuf::zeroed(us(cluster))
        } else {
            // A table that others share has been written when it was shared, and has not changed since.
            let buf = IoBuf::alloc(us(cluster));
            if !(old & OFFSET).is_multiple_of(cluster) {
                return Err(self.unaligned_table(at, old & OFFSET));
            }
            self.file.raise(BlkdebugEvent::L2AllocCowRead);
            self.file.read(old & OFFSET, &buf).await?;
            buf
        };
        let claimed = self.claim(1, None).await?;
        let table = claimed.start << self.shape.cluster_bits;
        self.file.raise(BlkdebugEvent::L2AllocWrite);
        if let Err(errno) = self.file.write(table, &content, WriteFlags::NONE).await {
            self.unclaim(claimed.clone()).await;
            return Err(errno);
        }
        self.guard.add(Kinds::ACTIVE_L2, claimed);
        self.set_l1_entry(index, table | COPIED);
        if old & OFFSET != 0 {
            let first = (old & OFFSET) >> self.shape.cluster_bits;
            self.guard.remove(Kinds::ACTIVE_L2, first..first + 1);
            lock(&self.unlinked).push(Free { clusters: first..first + 1, discard: self.discards().other, table: true });
        }
        Ok(())
    }

    /// Claims up to `most` clusters of the image file in a row.
    pub(super) async fn claim(&self, most: u64, from: Option<u64>) -> IoResult<Range<u64>> {
        self.file.raise(BlkdebugEvent::ClusterAlloc);
        let claimed = match self.refs.claim(most, from, &self.file).await {
            Err(Errno::EUCLEAN) => return Err(self.damage("The refcount structures are damaged")),
            other => other?,
        };
        // A damaged image may count metadata as free.
        let bits = self.shape.cluster_bits;
        let len = (claimed.end - claimed.start) << bits;
        match self.check_overlap(Kinds::NONE, claimed.start << bits, len) {
            Ok(()) => Ok(claimed),
            Err(errno) => {
                self.unclaim(claimed).await;
                Err(errno)
            }
        }
    }

    /// Gives back clusters that nothing has ever referred to.
    pub(super) async fn unclaim(&self, clusters: Range<u64>) {
        for cluster in clusters {
            // What cannot be given back is leaked.
            let _ = self.refs.release(cluster, &self.file).await;
        }
    }

    /// Writes the beginning of `buf` to clusters that are reserved and do not hold the data yet.
    async fn allocate(&self, mut run: Run, buf: &IoBuf) -> IoResult<usize> {
        let cluster = self.shape.cluster();
        let start = run.bytes.start - run.bytes.start % cluster;
        let count = u64_of(run.entries.len());
        let mut claimed = None;
        // Bytes of the host from here on have never been written.
        let mut virgin = u64::MAX;
        let mut spare = false;
        let host = match run.way {
            Way::InPlace(host) | Way::Reuse(host) => {
                self.check_host(host, run.bytes.end - run.bytes.start)?;
                host - (run.bytes.start - start)
            }
            Way::Fresh if self.data_file.is_some() => start,
            Way::Fresh => {
                virgin = self.file.size();
                let (clusters, from_spare) = self.claim_for_data(count).await?;
                if from_spare {
                    spare = true;
                    virgin = clusters.start << self.shape.cluster_bits;
                }
                let got = clusters.end - clusters.start;
                run.bytes.end = run.bytes.end.min(start + got * cluster);
                run.entries.truncate(us(got));
                let host = clusters.start << self.shape.cluster_bits;
                claimed = Some(clusters);
                host
            }
        };
        let part = buf.slice(0, us(run.bytes.end - run.bytes.start));
        let written = async {
            let all = start..run.bytes.end.next_multiple_of(cluster);
            let was_zero = spare && self.reads_zero(&all, Asked::Host).await?;
            self.fill_clusters(&run, &part, start, host, virgin, spare.then_some(was_zero)).await?;
            if !spare && host >= virgin {
                self.handover.grew();
            }
            // Zeroes in the place of zeroes: whatever of the data a power failure leaves is right.
            if !was_zero {
                self.handover.expose();
            }
            self.link(&run, start, host).await
        };
        let linked: IoResult = written.await;
        match linked {
            Ok(()) => Ok(part.len()),
            Err(errno) => {
                if let Some(clusters) = claimed {
                    self.unclaim(clusters).await;
                }
                Err(errno)
            }
        }
    }

    /// Guest bytes around those written that have to be in the clusters as well.
    fn around(&self, run: &Run, start: u64) -> Vec<Range<u64>> {
        let (cluster, unit) = (self.shape.cluster(), self.shape.subcluster());
        let mut around: Vec<Range<u64>> = Vec::new();
        let mut add = |part: Range<u64>| match around.last_mut() {
            _ if part.is_empty() => {}
            Some(last) if last.end == part.start => last.end = part.end,
            _ => around.push(part),
        };
        for (i, entry) in run.entries.iter().enumerate() {
            let base = start + u64_of(i) * cluster;
            if run.bytes.start <= base && base + cluster <= run.bytes.end {
                continue;
            }
            for bit in 0..self.shape.subclusters {
                let sub = base + u64::from(bit) * unit..base + u64::from(bit + 1) * unit;
                let overlaps = run.bytes.start < sub.end && sub.start < run.bytes.end;
                if overlaps {
                    add(sub.start..run.bytes.start.max(sub.start));
                    add(run.bytes.end.min(sub.end)..sub.end);
                } else if run.way == Way::Fresh && entry.stored & (1 << bit) != 0 {
                    add(sub);
                }
            }
        }
        around
    }

    /// Writes the data, and what belongs around it, to the clusters from `host` on, which map `start` on. `was_zero` says whether
    /// all of that was zeroes, if it has been found out.
    async fn fill_clusters(
        &self,
        run: &Run,
        data: &IoBuf,
        start: u64,
        host: u64,
        virgin: u64,
        was_zero: Option<bool>,
    ) -> IoResult {
        let to_host = |guest: u64| host + (guest - start);
        let mut around = Vec::new();
        let mut asked = if was_zero.is_none() { Asked::Layers } else { Asked::Nobody };
        for part in self.around(run, start) {
            // Nothing needs to be written where the file has never been and zeroes belong.
            if to_host(part.start) < virgin {
                around.push(part);
            } else if was_zero != Some(true) && !self.reads_zero(&part, asked).await? {
                // What is read anyway need not be asked about.
                asked = Asked::Nobody;
                around.push(part);
            }
        }
        let data_file = self.data();
        if around.is_empty() {
            self.file.raise(BlkdebugEvent::WriteAio);
            return data_file.write(to_host(run.bytes.start), data, WriteFlags::NONE).await;
        }
        let first = around.first().map_or(run.bytes.start, |part| part.start.min(run.bytes.start));
        let last = around.last().map_or(run.bytes.end, |part| part.end.max(run.bytes.end));
        let total: u64 = around.iter().map(|part| part.end - part.start).sum();
        if total + u64_of(data.len()) == last - first && last - first <= GATHER {
            let all = IoBuf::alloc(us(last - first));
            let reads = around.iter().map(|part| {
                let into = all.slice(us(part.start - first), us(part.end - part.start));
                async move { self.read_guest(part.start, &into).await }
            });
            self.file.raise(BlkdebugEvent::CowRead);
            join_all(reads.collect()).await?;
            self.file.raise(BlkdebugEvent::WriteAio);
            all.copy_from(us(run.bytes.start - first), data);
            return data_file.write(to_host(first), &all, WriteFlags::NONE).await;
        }
        let copies = around.iter().map(|part| {
            let to = to_host(part.start);
            async move { self.copy_out(part.clone(), to).await }
        });
        let mut all: Vec<block::driver::LocalFuture<'_, IoResult>> = Vec::new();
        for copy in copies {
            all.push(Box::pin(copy));
        }
        self.file.raise(BlkdebugEvent::WriteAio);
        all.push(Box::pin(data_file.write(to_host(run.bytes.start), data, WriteFlags::NONE)));
        join_all(all).await
    }

    async fn copy_out(&self, part: Range<u64>, to: u64) -> IoResult {
        let mut at = part.start;
        while at < part.end {
            let buf = IoBuf::alloc(us((part.end - at).min(GATHER)));
            self.file.raise(BlkdebugEvent::CowRead);
            self.read_guest(at, &buf).await?;
            self.file.raise(BlkdebugEvent::CowWrite);
            self.data().write(to + (at - part.start), &buf, WriteFlags::NONE).await?;
            at += u64_of(buf.len());
        }
        Ok(())
    }

    /// Whether `part` of the guest's disk is known to read as zero.
    async fn reads_zero(&self, part: &Range<u64>, asked: Asked) -> IoResult<bool> {
        let mut at = part.start;
        while at < part.end {
            let (place, len) = self.find(at, part.end - at).await?;
            let len = match place {
                Where::Zero(_) => len,
                Where::Backing => self.zeroes_behind(Span::new(at, len), asked).await,
                _ => 0,
            };
            if len == 0 {
                return Ok(false);
            }
            at += len;
        }
        Ok(true)
    }

    /// How many of the first bytes of `span` the backing file is known to show as zero.
    async fn zeroes_behind(&self, span: Span, asked: Asked) -> u64 {
        let Some(backing) = self.backing.load_full().filter(|backing| span.at < backing.size()) else {
            return span.len;
        };
        let node = backing.node();
        let found = match asked {
            Asked::Nobody => return 0,
            Asked::Layers => status::layer(&node, span).await,
            Asked::Host => status::of(&node, span).await,
        };
        found.ok().filter(|found| found.zero).map_or(0, |found| found.len)
    }

    /// Makes the L2 entries name the clusters from `host` on.
    async fn link(&self, run: &Run, start: u64, host: u64) -> IoResult {
        let cluster = self.shape.cluster();
        let change = |slice: &mut Vec<u8>| {
            for (i, old) in run.entries.iter().enumerate() {
                let base = start + u64_of(i) * cluster;
                let bytes = run.bytes.start.max(base)..run.bytes.end.min(base + cluster);
                let touched = self.touched(&bytes);
                let place = Place::Plain { at: host + u64_of(i) * cluster, copied: true };
                let entry = Entry { place, stored: old.stored | touched, zero: old.zero & !touched };
                self.put_entry(slice, base, entry);
            }
        };
        self.change_slice(run.bytes.clone(), change).await?;
        if run.way == Way::Fresh {
            self.unlink(&run.entries, self.discards().other);
        }
        Ok(())
    }

    /// Changes the entries for `range`, which one slice maps. It exists.
    pub(super) async fn change_slice<R>(
        &self,
        range: Range<u64>,
        mut change: impl FnMut(&mut Vec<u8>) -> R,
    ) -> IoResult<R> {
        let first = self.place_in_slice(range.start);
        let part = first..self.place_in_slice(range.end.saturating_sub(1)).max(first) + us(self.entry_size());
        loop {
            let Some(slice) = self.slice(range.start).await? else { return Err(Errno::EIO) };
            if let Some(result) = self.l2.change_part(&slice, part.clone(), &mut change) {
                return Ok(result);
            }
        }
    }

    /// The clusters of `entries` lose one reference each. Called after the L2 table has changed, never before.
    pub(super) fn unlink(&self, entries: &[Entry], discard: bool) {
        let bits = self.shape.cluster_bits;
        let mut unlinked = lock(&self.unlinked);
        for entry in entries {
            let clusters = match entry.place {
                Place::None => continue,
                Place::Plain { .. } if self.data_file.is_some() => continue,
                Place::Plain { at, .. } => at >> bits..(at >> bits) + 1,
                // Other compressed clusters may share the ends.
                Place::Packed { at, len } => at >> bits..((at + len - 1) >> bits) + 1,
            };
            unlinked.push(Free { clusters, discard, table: false });
        }
        if unlinked.len() > UNLINKED {
            self.much_unlinked.store(true, Ordering::Relaxed);
        }
    }

    /// Whether no refcount is waiting to be written.
    pub(super) fn refs_are_clean(&self) -> bool {
        self.refs.blocks.dirty() == 0 && !self.refs.is_table_dirty()
    }

    /// Whether nothing of the metadata is waiting to be written that a flush has to write.
    pub(super) fn is_clean(&self) -> bool {
        self.l2.dirty() == 0
            && (self.lazy.load(Ordering::Relaxed) || self.refs_are_clean())
            && self.l1.read().unwrap_or_else(std::sync::PoisonError::into_inner).dirty.is_empty()
    }
}
