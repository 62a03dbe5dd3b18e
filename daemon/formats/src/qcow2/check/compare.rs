//! The counted references against the image's refcounts, block by block.

use super::super::bytes::{u64_of, us};
use super::walk::{REFTABLE_RESERVED, Walked};
use super::{Image, read, write};
use block::IoResult;
use block::check::Fix;
use std::collections::BTreeSet;

impl Image {
    /// Compares all counts and repairs what `fix` allows.
    pub(super) async fn compare(&self, walked: &mut Walked, fix: Fix) -> IoResult {
        let per_block = self.per_block();
        let mut blocks: BTreeSet<u64> = walked.counts.blocks(per_block);
        blocks.extend(self.reftable.iter().enumerate().filter(|(_, at)| **at != 0).map(|(i, _)| u64_of(i)));
        // The last cluster that is in use may begin at the end of the file.
        let clusters = self.file.size().div_ceil(self.cluster()).max(walked.counts.end());
        let mut highest = 0;
        for index in blocks {
            let first = index * per_block;
            if first >= clusters {
                continue;
            }
            let at = self.block_at(index);
            let mut block = match at {
                Some(at) => read(&self.file, at, self.cluster()).await?,
                None => vec![0; us(self.cluster())],
            };
            let mut changed = false;
            for i in 0..per_block.min(clusters.saturating_sub(first)) {
                let stored = self.width().read(&block, i);
                let counted = walked.counts.get(first + i);
                if stored > 0 || counted > 0 {
                    highest = first + i + 1;
                }
                if stored == counted {
                    continue;
                }
                let fixed = match stored {
                    0 => {
                        walked.rebuild = true;
                        walked.beyond_repair |= at.is_none();
                        fix == Fix::All && at.is_some()
                    }
                    _ if stored > counted => fix >= Fix::Leaks,
                    _ => fix == Fix::All,
                };
                let found = &mut walked.found;
                if fixed {
                    self.width().write(&mut block, i, counted);
                    changed = true;
                }
                *match (stored > counted, fixed) {
                    (true, true) => &mut found.leaks_fixed,
                    (true, false) => &mut found.leaks,
                    (false, true) => &mut found.corruptions_fixed,
                    (false, false) => &mut found.corruptions,
                } += 1;
            }
            if let Some(at) = at.filter(|_| changed) {
                write(&self.file, at, &block).await?;
            }
        }
        walked.found.image_end_offset = highest << self.header.cluster_bits;
        Ok(())
    }

    pub(super) fn per_block(&self) -> u64 {
        1 << (self.header.cluster_bits + 3 - self.header.refcount_order)
    }

    /// Where the block with this index is, if it is where a block can be.
    pub(super) fn block_at(&self, index: u64) -> Option<u64> {
        let at = self.reftable.get(us(index)).map(|entry| entry & !REFTABLE_RESERVED).filter(|at| *at != 0)?;
        (at.is_multiple_of(self.cluster()) && at < self.file.size()).then_some(at)
    }
}
