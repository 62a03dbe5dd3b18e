//! The refcounts of another state of all metadata: the blocks that change, a piece of them at a time.
//!
//! However large an image is, or says that it is, no more than [`PIECE`] bytes of its refcount blocks are in memory. Each piece
//! is written to its new place before the next one is loaded; whoever changes counts goes over everything for each piece, and
//! L2 tables know which pieces they are for.

use super::super::refcount::Width;
use block::{Errno, IoResult, Span};
use std::collections::BTreeMap;
use std::ops::Range;

/// Most bytes of refcount blocks in memory: a walk over all L2 tables for every 8 TiB, with clusters of 64 KiB. Where assertions
/// are checked it is so little that small images have several pieces.
const PIECE: u64 = if cfg!(debug_assertions) { 16 << 10 } else { 256 << 20 };

/// Most runs of clusters that are noted to be discarded.
const MAX_FREED: usize = 1 << 20;

/// How many blocks of `cluster` bytes make a piece.
pub(super) fn blocks_of_a_piece(cluster: u64) -> usize {
    usize::try_from((PIECE / cluster).max(1)).unwrap_or(1)
}

/// A piece.
pub(super) struct Counts {
    /// How wide a count is.
    pub width: Width,
    /// Counts of a block.
    pub per_block: u64,
    /// The blocks by their indices.
    pub blocks: BTreeMap<u64, Vec<u8>>,
}

impl Counts {
    /// The indices of the first and the last block.
    pub fn reach(&self) -> (u64, u64) {
        let first = self.blocks.first_key_value().map_or(1, |(index, _)| *index);
        let last = self.blocks.last_key_value().map_or(0, |(index, _)| *index);
        (first, last)
    }

    /// The count of a cluster, if this piece has it.
    pub fn get(&self, cluster: u64) -> Option<u64> {
        let block = self.blocks.get(&(cluster / self.per_block))?;
        Some(self.width.read(block, cluster % self.per_block))
    }

    /// One user more or less of those clusters that this piece has; those that have none then are noted in `freed`.
    ///
    /// # Errors
    /// `EINVAL` where the count is too narrow, `EUCLEAN` where it is wrong.
    pub fn add(&mut self, clusters: Range<u64>, more: bool, freed: &mut Freed) -> IoResult {
        let (per_block, width) = (self.per_block, self.width);
        for cluster in clusters {
            let Some(bytes) = self.blocks.get_mut(&(cluster / per_block)) else { continue };
            let count = width.read(bytes, cluster % per_block);
            // What has one more user had one before.
            let new = match (count, more) {
                (0, _) => return Err(Errno::EUCLEAN),
                (_, true) if count >= width.most() => return Err(Errno::EINVAL),
                (_, true) => count + 1,
                (_, false) => count - 1,
            };
            width.write(bytes, cluster % per_block, new);
            if new == 0 {
                freed.note(cluster);
            }
        }
        Ok(())
    }
}

/// Clusters that nobody uses any more, as runs. Beyond a number of runs they are free, but not discarded.
#[derive(Default)]
pub(super) struct Freed(Vec<Range<u64>>);

impl Freed {
    fn note(&mut self, cluster: u64) {
        let room = self.0.len() < MAX_FREED;
        match self.0.last_mut() {
            Some(last) if last.end == cluster => last.end += 1,
            _ if room => self.0.push(cluster..cluster + 1),
            _ => {}
        }
    }

    /// What to discard, in the order of the file.
    pub fn spans(mut self, cluster_bits: u32) -> Vec<Span> {
        self.0.sort_unstable_by_key(|run| run.start);
        let mut spans: Vec<Span> = Vec::new();
        for run in self.0 {
            let (at, len) = (run.start << cluster_bits, (run.end - run.start) << cluster_bits);
            match spans.last_mut() {
                Some(last) if last.end() == at => last.len += len,
                _ => spans.push(Span::new(at, len)),
            }
        }
        spans
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts() -> Counts {
        let width = Width(1);
        let mut block = vec![0; 512];
        (0..4).for_each(|i| width.write(&mut block, i, i));
        Counts { width, per_block: 2048, blocks: [(3, block)].into() }
    }

    #[test]
    fn counts_that_cannot_be_are_refused() {
        let (mut counts, mut freed, first) = (counts(), Freed::default(), 3 * 2048);
        assert_eq!(counts.add(first..first + 1, true, &mut freed), Err(Errno::EUCLEAN));
        assert_eq!(counts.add(first..first + 1, false, &mut freed), Err(Errno::EUCLEAN));
        assert_eq!(counts.add(first + 3..first + 4, true, &mut freed), Err(Errno::EINVAL));
        assert_eq!(counts.add(0..2048, false, &mut freed), Ok(()), "another piece's");
        assert_eq!(counts.add(first + 1..first + 3, false, &mut freed), Ok(()));
        assert_eq!((counts.get(first + 1), counts.get(first + 2), counts.get(0)), (Some(0), Some(1), None));
        assert_eq!(counts.reach(), (3, 3));
        assert_eq!(freed.spans(9), [Span::new((first + 1) << 9, 512)]);
    }

    #[test]
    fn what_is_noted_to_be_discarded_has_a_limit() {
        let mut freed = Freed::default();
        for cluster in [8, 9, 10, 3, 4, 5, 6, 7] {
            freed.note(cluster);
        }
        (0..3 << 20).for_each(|i| freed.note(100 + 2 * i));
        assert_eq!(freed.0.len(), MAX_FREED);
        assert_eq!(freed.spans(16).first(), Some(&Span::new(3 << 16, 8 << 16)));
    }
}
