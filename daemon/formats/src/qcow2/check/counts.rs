//! How often each cluster is referred to. Only the neighbourhood of clusters that are takes memory.

use super::super::bytes::u64_of;
use block::{Errno, IoResult};
use std::collections::{BTreeMap, BTreeSet};

/// Clusters that are counted together.
const PAGE: u64 = 4096;
/// Most pages: a gibibyte, enough for 32 TiB in clusters of 64 KiB.
const MAX_PAGES: usize = (1 << 30) / 8192;
/// Most counts that do not fit into a page, some 250 MiB: as many as snapshots of one cluster, in a few images only.
const MAX_HIGH: usize = 4 << 20;

/// See the module.
#[derive(Debug, Default)]
pub struct Counts {
    pages: BTreeMap<u64, Box<[u16]>>,
    /// Counts that do not fit into a page, where `u16::MAX` stands for them.
    high: BTreeMap<u64, u64>,
}

impl Counts {
    /// References to `cluster`.
    pub fn get(&self, cluster: u64) -> u64 {
        let count = self.pages.get(&(cluster / PAGE)).and_then(|page| page.get(within(cluster))).copied().unwrap_or(0);
        if count == u16::MAX { self.high.get(&cluster).copied().unwrap_or(u64::from(count)) } else { count.into() }
    }

    /// Sets the references to `cluster`.
    ///
    /// # Errors
    /// `ENOMEM` if the limit of memory is reached.
    pub fn set(&mut self, cluster: u64, count: u64) -> IoResult {
        let full = self.pages.len() >= MAX_PAGES;
        if count >= u64::from(u16::MAX) && self.high.len() >= MAX_HIGH && !self.high.contains_key(&cluster) {
            return Err(Errno::ENOMEM);
        }
        let page = match self.pages.entry(cluster / PAGE) {
            std::collections::btree_map::Entry::Vacant(_) if full => return Err(Errno::ENOMEM),
            entry => entry.or_insert_with(|| vec![0; within(PAGE - 1) + 1].into()),
        };
        if let Some(place) = page.get_mut(within(cluster)) {
            *place = u16::try_from(count).unwrap_or(u16::MAX);
        }
        if count >= u64::from(u16::MAX) {
            self.high.insert(cluster, count);
        }
        Ok(())
    }

    /// The cluster behind the last one that is referred to.
    pub fn end(&self) -> u64 {
        self.pages
            .iter()
            .rev()
            .find_map(|(page, counts)| {
                let last = counts.iter().rposition(|count| *count > 0)?;
                Some(page * PAGE + u64_of(last) + 1)
            })
            .unwrap_or(0)
    }

    /// The indices of blocks of `per_block` clusters in which something is counted.
    pub fn blocks(&self, per_block: u64) -> BTreeSet<u64> {
        let mut blocks = BTreeSet::new();
        for (page, counts) in &self.pages {
            let used = (page * PAGE..).zip(counts).filter(|(_, count)| **count > 0);
            let mut last = None;
            for block in used.map(|(cluster, _)| cluster / per_block) {
                if last != Some(block) {
                    blocks.insert(block);
                    last = Some(block);
                }
            }
        }
        blocks
    }

    /// The first cluster from `from` on that begins `count` of them to which nothing refers.
    pub fn free_run(&self, from: u64, count: u64) -> u64 {
        let mut start = from;
        let mut at = from;
        while at < start + count {
            if self.get(at) > 0 {
                start = at + 1;
            }
            at += 1;
        }
        start
    }
}

fn within(cluster: u64) -> usize {
    usize::try_from(cluster % PAGE).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_any_size_and_place_are_kept() {
        let mut counts = Counts::default();
        for (cluster, count) in [(0, 1), (4095, 65534), (4096, 65535), (1 << 40, 1 << 33), (7, 65536)] {
            counts.set(cluster, count).unwrap();
            assert_eq!(counts.get(cluster), count);
        }
        counts.set(7, 2).unwrap();
        assert_eq!((counts.get(7), counts.get(8), counts.get(1 << 50)), (2, 0, 0));
        assert_eq!(counts.pages.len(), 3);
        assert_eq!(counts.blocks(4096).into_iter().collect::<Vec<_>>(), [0, 1, 1 << 28]);
        assert_eq!((counts.free_run(0, 1), counts.free_run(6, 3), counts.free_run(4094, 2)), (1, 8, 4097));
    }
}
