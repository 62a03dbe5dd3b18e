//! `blockdev-create`: makes an image beside other work.
//!
//! The driver writes the image (see [`block::Opener::create`]); the job finds and holds the nodes for it, and lets them go
//! again whatever happens.

use crate::{Job, JobCtl};
use block::disk::Disk;
use block::driver::LocalFuture;
use block::graph::{CreateContext, Held};
use block::{Graph, Opener};
use qapi::Result;
use qapi::types::block::BlockdevRef;
use qapi::types::create::BlockdevCreateOptions;
use std::sync::Arc;

/// See the module.
pub struct CreateJob {
    options: BlockdevCreateOptions,
    opener: Arc<dyn Opener>,
}

impl std::fmt::Debug for CreateJob {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CreateJob").field("options", &self.options).finish_non_exhaustive()
    }
}

impl CreateJob {
    /// A job that makes the image that `options` describe with a driver of `opener`.
    pub fn new(options: BlockdevCreateOptions, opener: Arc<dyn Opener>) -> Self {
        Self { options, opener }
    }
}

/// Nodes by way of the control task.
struct Context<'c> {
    ctl: &'c JobCtl,
    held: Vec<Held>,
}

impl CreateContext for Context<'_> {
    fn open<'a>(&'a mut self, node: &'a BlockdevRef) -> LocalFuture<'a, Result<Disk>> {
        let node = node.clone();
        Box::pin(async move {
            let held = self.ctl.graph(|graph| Box::pin(async move { graph.hold(&node).await })).await?;
            let disk = held.disk().clone();
            self.held.push(held);
            Ok(disk)
        })
    }
}

impl Job for CreateJob {
    fn run<'a>(&'a mut self, ctl: &'a JobCtl) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            ctl.add_total(1);
            let mut context = Context { ctl, held: Vec::new() };
            let created = self.opener.create(&mut context, &self.options).await;
            for held in context.held {
                ctl.graph(|graph| {
                    Box::pin(async move {
                        graph.release(held).await;
                        Ok(())
                    })
                })
                .await?;
            }
            ctl.add_done(1);
            created
        })
    }

    fn prepare<'a>(&'a mut self, _: &'a mut Graph) -> LocalFuture<'a, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn commit<'a>(self: Box<Self>, _: &'a mut Graph) -> LocalFuture<'a, ()> {
        Box::pin(async {})
    }

    fn abort<'a>(self: Box<Self>, _: &'a mut Graph) -> LocalFuture<'a, ()> {
        Box::pin(async {})
    }

    fn completes(&self) -> bool {
        false
    }
}
