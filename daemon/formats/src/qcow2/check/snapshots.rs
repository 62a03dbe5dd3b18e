//! A new table of snapshots in clusters that nothing uses. The header names it before the old one is given up.

use super::super::bytes::{u64_of, us};
use super::super::snapshot::{clusters_for, encode_table};
use super::{Image, read, write};
use block::{Errno, IoResult};
use std::ops::Range;

impl Image {
    /// Writes the table as it was understood. All counts are right.
    pub(super) async fn write_snapshots(&mut self) -> IoResult {
        let size = self.header.size;
        if self.header.version >= 3 {
            self.snapshots.list.iter_mut().for_each(|snapshot| snapshot.complete(size));
        }
        let (bits, bytes) = (self.header.cluster_bits, encode_table(&self.snapshots.list));
        let count = clusters_for(bytes.len(), self.cluster());
        let mut place = 0..0;
        if count > 0 {
            place = self.free_run(count).await?;
            self.change_counts(place.clone(), true).await?;
            let mut whole = bytes;
            whole.resize(us(count << bits), 0);
            write(&self.file, place.start << bits, &whole).await?;
            self.file.flush().await?;
        }
        let old = self.header.snapshots_at >> bits;
        let old = old..old + self.snapshots.len.div_ceil(self.cluster());
        self.header.snapshots_at = place.start << bits;
        self.header.snapshots = u32::try_from(self.snapshots.list.len()).map_err(|_| Errno::EFBIG)?;
        self.write_header().await?;
        self.change_counts(old, false).await
    }

    /// `count` clusters in a row that have a place in a refcount block and no user.
    async fn free_run(&self, count: u64) -> IoResult<Range<u64>> {
        for index in 0..u64_of(self.reftable.len()) {
            let Some(at) = self.block_at(index) else { continue };
            let block = read(&self.file, at, self.cluster()).await?;
            let mut run = 0;
            for i in 0..self.per_block() {
                run = if self.width().read(&block, i) == 0 { run + 1 } else { 0 };
                if run == count {
                    let end = index * self.per_block() + i + 1;
                    return Ok(end - count..end);
                }
            }
        }
        Err(Errno::ENOSPC)
    }

    /// One user more or less of each of these clusters, which lie in blocks that are there.
    async fn change_counts(&self, clusters: Range<u64>, more: bool) -> IoResult {
        for cluster in clusters {
            let (index, within) = (cluster / self.per_block(), cluster % self.per_block());
            let Some(at) = self.block_at(index) else { continue };
            let mut block = read(&self.file, at, self.cluster()).await?;
            let count = self.width().read(&block, within);
            let new = if more { count.saturating_add(1) } else { count.saturating_sub(1) };
            self.width().write(&mut block, within, new);
            write(&self.file, at, &block).await?;
        }
        self.file.flush().await
    }
}
