//! Bit 63 of the entries of the active tables: the cluster has a refcount of exactly one.

use super::super::bytes::{be64, put64, u64_of, us};
use super::super::entry::{COPIED, OFFSET, PACKED, ZERO};
use super::{Image, read, write};
use block::IoResult;
use block::check::{Fix, Found};
use std::collections::HashMap;

/// Refcount blocks that are kept in memory.
const KEPT: usize = 64;

/// Refcounts as the image has them.
#[derive(Default)]
struct Blocks(HashMap<u64, Vec<u8>>);

impl Blocks {
    async fn count(&mut self, image: &Image, cluster: u64) -> IoResult<u64> {
        let (index, within) = (cluster / image.per_block(), cluster % image.per_block());
        let Some(at) = image.block_at(index) else { return Ok(0) };
        if !self.0.contains_key(&index) {
            if self.0.len() >= KEPT {
                self.0.clear();
            }
            self.0.insert(index, read(&image.file, at, image.cluster()).await?);
        }
        Ok(self.0.get(&index).map_or(0, |block| image.width().read(block, within)))
    }
}

impl Image {
    /// Compares the bits with the refcounts, and corrects them.
    pub(super) async fn check_copied(&mut self, found: &mut Found, fix: Fix) -> IoResult {
        let repair = fix == Fix::All;
        let mut counts = Blocks::default();
        // What is wrong in each table: only a damaged image names one twice.
        let mut seen: HashMap<u64, u64> = HashMap::new();
        for index in 0..self.l1.len() {
            let entry = self.l1.get(index).copied().unwrap_or(0);
            let at = entry & OFFSET;
            if at == 0 {
                continue;
            }
            let single = counts.count(self, at >> self.header.cluster_bits).await? == 1;
            if single != (entry & COPIED != 0) {
                self.note(found, 1, repair);
                if repair {
                    let entry = if single { entry | COPIED } else { entry & !COPIED };
                    if let Some(place) = self.l1.get_mut(index) {
                        *place = entry;
                    }
                    write(&self.file, self.header.l1_at + u64_of(index) * 8, &entry.to_be_bytes()).await?;
                }
            }
            if at < self.file.size() {
                let wrong = match seen.get(&at) {
                    Some(_) if repair => 0,
                    Some(wrong) => *wrong,
                    None => self.check_table(&mut counts, at, repair).await?,
                };
                seen.insert(at, wrong);
                self.note(found, wrong, repair);
            }
        }
        Ok(())
    }

    fn note(&self, found: &mut Found, count: u64, repaired: bool) {
        if repaired { found.corruptions_fixed += count } else { found.corruptions += count }
    }

    /// How many entries of an L2 table are wrong.
    async fn check_table(&self, counts: &mut Blocks, at: u64, repair: bool) -> IoResult<u64> {
        let mut table = read(&self.file, at, self.cluster()).await?;
        let wide = us(self.header.l2_entry_size());
        let mut wrong = 0;
        for entry in table.chunks_exact_mut(wide) {
            let word = be64(entry, 0);
            let host = word & OFFSET;
            let external = self.header.has_data_file();
            let plain_zero = wide == 8 && word & ZERO != 0;
            let there = host != 0 || (external && word & COPIED != 0 && !plain_zero);
            if word & PACKED != 0 || !there {
                continue;
            }
            let single = external || counts.count(self, host >> self.header.cluster_bits).await? == 1;
            if single != (word & COPIED != 0) {
                wrong += 1;
                put64(entry, 0, if single { word | COPIED } else { word & !COPIED });
            }
        }
        if wrong > 0 && repair {
            write(&self.file, at, &table).await?;
        }
        Ok(wrong)
    }
}
