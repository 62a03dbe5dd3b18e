//! `x-blockdev-check`. It goes on beside the control task, which meanwhile answers commands that only look: nothing may change
//! the node that is checked, nor what it is used for.

use super::query::filename;
use super::{Control, Message};
use block::check::{Fix, Found};
use block::disk::DiskOptions;
use block::driver::LocalFuture;
use block::perm::Bits;
use block::{Disk, Node, Perms};
use qapi::types::block_check::*;
use qapi::{Error, Result};
use std::sync::Arc;
use tokio::sync::oneshot;

impl Control {
    /// Begins a check.
    pub(super) async fn x_blockdev_check(
        &mut self,
        args: XBlockdevCheck,
    ) -> Result<LocalFuture<'static, Result<ImageCheck>>> {
        let node = self.graph.find(None, Some(&args.node_name))?;
        let fix = match args.fix {
            XCheckFix::None => Fix::Nothing,
            XCheckFix::Leaks => Fix::Leaks,
            XCheckFix::All => Fix::All,
        };
        let user = match node.driver().check_control() {
            Some(_) => None,
            None => Some(self.attach_check(&node, fix).await?),
        };
        let drained = match user {
            Some(_) => None,
            None => Some(self.graph.drain(&node).await),
        };
        self.alone = true;
        let handle = self.handle();
        Ok(Box::pin(async move {
            let found = match node.driver().check_control() {
                Some(image) => image.check(fix).await,
                None => formats::qcow2::check::check(Arc::clone(&node), fix).await,
            };
            drop(drained);
            // Who hears of the result may use the node at once.
            let (over, ended) = oneshot::channel();
            handle.send(Message::CheckEnded { user, over });
            ended.await.map_err(|_| Error::generic("The daemon is shutting down"))?;
            Ok(report(filename(&node), found?))
        }))
    }

    /// Uses a node with an image in it, which nobody else may write to, nor use while it is repaired.
    async fn attach_check(&mut self, node: &Arc<Node>, fix: Fix) -> Result<Disk> {
        let perms = match fix {
            Fix::Nothing => {
                Perms { need: Bits::CONSISTENT_READ, shared: Bits::CONSISTENT_READ | Bits::WRITE_UNCHANGED }
            }
            _ => Perms { need: Bits::CONSISTENT_READ | Bits::WRITE | Bits::RESIZE, shared: Bits::NONE },
        };
        let options = DiskOptions { label: "a check".into(), perms, writethrough: false };
        self.graph.attach(node, &options).await
    }

    pub(super) async fn check_ended(&mut self, user: Option<Disk>, over: oneshot::Sender<()>) {
        if let Some(disk) = user {
            self.graph.detach(disk).await;
        }
        self.alone = false;
        // The client may have gone.
        let _ = over.send(());
    }

    /// For the end of the process: waits for a check, which may be writing.
    pub(super) async fn end_check(&mut self) {
        while self.alone {
            match self.inbox.recv().await {
                Some(Message::CheckEnded { user, over }) => self.check_ended(user, over).await,
                Some(other) => self.waiting.push_back(other),
                None => return,
            }
        }
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
