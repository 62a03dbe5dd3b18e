//! New refcount structures in clusters that nothing refers to. The header names them last, so the old ones hold until then.

use super::super::bytes::us;
use super::super::header::MAX_REFTABLE_BYTES;
use super::counts::Counts;
use super::walk::Walked;
use super::{Image, write};
use block::{Errno, IoResult};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

impl Image {
    /// Writes blocks and a table that say what has been counted.
    pub(super) async fn rebuild(&mut self, walked: &mut Walked) -> IoResult {
        let (blocks, table) = self.place_structures(walked)?;
        let bits = self.header.cluster_bits;
        let per_block = self.per_block();
        let mut entries = vec![0u64; us((table.end - table.start) << (bits - 3))];
        for (index, cluster) in &blocks {
            let mut bytes = vec![0; us(self.cluster())];
            for i in 0..per_block {
                self.width().write(&mut bytes, i, walked.counts.get(index * per_block + i));
            }
            write(&self.file, cluster << bits, &bytes).await?;
            if let Some(entry) = entries.get_mut(us(*index)) {
                *entry = cluster << bits;
            }
        }
        let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        write(&self.file, table.start << bits, &bytes).await?;
        self.file.flush().await?;
        self.header.reftable_at = table.start << bits;
        self.header.reftable_clusters = u32::try_from(table.end - table.start).map_err(|_| Errno::EFBIG)?;
        self.write_header().await?;
        self.reftable = entries;
        Ok(())
    }

    /// Finds clusters for the blocks, by their indices, and the table; they are counted themselves.
    fn place_structures(&self, walked: &mut Walked) -> IoResult<(BTreeMap<u64, u64>, Range<u64>)> {
        let counts = &mut walked.counts;
        let (bits, per_block) = (self.header.cluster_bits, self.per_block());
        let mut blocks = BTreeMap::new();
        let mut table = 0..0;
        let mut from = 1;
        loop {
            let needed = counts.blocks(per_block);
            let missing: Vec<u64> = needed.iter().filter(|index| !blocks.contains_key(*index)).copied().collect();
            let entries = needed.last().map_or(1, |last| last + 1);
            let clusters = (entries * 8).div_ceil(self.cluster());
            if clusters << bits > MAX_REFTABLE_BYTES {
                return Err(Errno::EFBIG);
            }
            if missing.is_empty() && clusters <= table.end - table.start {
                return Ok((blocks, table));
            }
            for index in missing {
                from = unnamed_run(counts, &walked.dangling, from, 1);
                counts.set(from, 1)?;
                blocks.insert(index, from);
            }
            if clusters > table.end - table.start {
                for cluster in table {
                    counts.set(cluster, 0)?;
                }
                let start = unnamed_run(counts, &walked.dangling, 1, clusters);
                table = start..start + clusters;
                for cluster in table.clone() {
                    counts.set(cluster, 1)?;
                }
            }
        }
    }
}

/// The first cluster from `from` on that begins `count` of them that nothing names, not even by mistake.
fn unnamed_run(counts: &Counts, dangling: &BTreeSet<u64>, from: u64, count: u64) -> u64 {
    let mut start = from;
    loop {
        start = counts.free_run(start, count);
        match dangling.range(start..start + count).next_back() {
            Some(named) => start = named + 1,
            None => return start,
        }
    }
}
