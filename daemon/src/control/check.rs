//! `x-blockdev-check`.

use super::Control;
use super::query::filename;
use block::check::{Fix, Found};
use block::disk::DiskOptions;
use block::perm::Bits;
use block::{Node, Perms};
use qapi::Result;
use qapi::types::block_check::*;
use std::sync::Arc;

impl Control {
    pub(super) async fn x_blockdev_check(&mut self, args: XBlockdevCheck) -> Result<ImageCheck> {
        let node = self.graph.find(None, Some(&args.node_name))?;
        let fix = match args.fix {
            XCheckFix::None => Fix::Nothing,
            XCheckFix::Leaks => Fix::Leaks,
            XCheckFix::All => Fix::All,
        };
        let found = match node.driver().check_control() {
            Some(image) => {
                let _drained = self.graph.drain(&node).await;
                image.check(fix).await?
            }
            None => self.check_unused(&node, fix).await?,
        };
        Ok(report(filename(&node), found))
    }

    /// Checks the image in `node`, which nobody else may write to, nor use while it is repaired.
    async fn check_unused(&mut self, node: &Arc<Node>, fix: Fix) -> Result<Found> {
        let perms = match fix {
            Fix::Nothing => {
                Perms { need: Bits::CONSISTENT_READ, shared: Bits::CONSISTENT_READ | Bits::WRITE_UNCHANGED }
            }
            _ => Perms { need: Bits::CONSISTENT_READ | Bits::WRITE | Bits::RESIZE, shared: Bits::NONE },
        };
        let options = DiskOptions { label: "a check".into(), perms, writethrough: false };
        let disk = self.graph.attach(node, &options).await?;
        let found = formats::qcow2::check::check(Arc::clone(node), fix).await;
        self.graph.detach(disk).await;
        found
    }
}

fn report(filename: String, found: Found) -> ImageCheck {
    let signed = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
    let some = |count: u64| (count > 0).then(|| signed(count));
    ImageCheck {
        filename,
        format: "qcow2".into(),
        check_errors: signed(found.check_errors),
        image_end_offset: some(found.image_end_offset),
        corruptions: some(found.corruptions),
        leaks: some(found.leaks),
        corruptions_fixed: some(found.corruptions_fixed),
        leaks_fixed: some(found.leaks_fixed),
        total_clusters: some(found.total_clusters),
        allocated_clusters: some(found.allocated_clusters),
        fragmented_clusters: some(found.fragmented_clusters),
        compressed_clusters: some(found.compressed_clusters),
    }
}
