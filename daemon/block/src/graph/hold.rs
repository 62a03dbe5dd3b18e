//! Nodes for a while: what makes an image, or works on one, gets its nodes here.
//!
//! A node that is only defined where it is used is opened for it and closed again afterwards.

use super::{Graph, refresh_above};
use crate::disk::{Disk, DiskOptions};
use crate::driver::LocalFuture;
use crate::node::NodeOptions;
use crate::perm::{Bits, Perms};
use qapi::Result;
use qapi::types::block::BlockdevRef;
use qapi::types::create::BlockdevCreateOptions;
use std::sync::Arc;

/// What the code that makes an image gets its nodes from.
pub trait CreateContext {
    /// Finds or opens the node, for writing and for changes of its length. It is let go when the image has been made.
    fn open<'a>(&'a mut self, node: &'a BlockdevRef) -> LocalFuture<'a, Result<Disk>>;
}

/// A node that is held, until [`Graph::release`].
#[derive(Debug)]
#[must_use = "a node that is held has to be released"]
pub struct Held {
    disk: Disk,
    /// It was opened for this use.
    temporary: bool,
}

impl Held {
    /// The use of the node.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }
}

/// Makes images on the control task.
struct Direct<'g> {
    graph: &'g mut Graph,
    held: Vec<Held>,
}

impl CreateContext for Direct<'_> {
    fn open<'a>(&'a mut self, node: &'a BlockdevRef) -> LocalFuture<'a, Result<Disk>> {
        Box::pin(async move {
            let held = self.graph.hold(node).await?;
            let disk = held.disk().clone();
            self.held.push(held);
            Ok(disk)
        })
    }
}

impl Graph {
    /// Finds or opens a node that an image is to be made in.
    ///
    /// # Errors
    /// No such node, the errors of its driver, a conflict of permissions. Nothing has changed then.
    pub async fn hold(&mut self, node: &BlockdevRef) -> Result<Held> {
        let (node, temporary) = match node {
            BlockdevRef::Reference(name) => (self.find(Some(name), Some(name))?, false),
            BlockdevRef::Definition(options) => {
                let mut cx = self.open_context(NodeOptions::default());
                let root = cx.open_node(options, &NodeOptions::default(), false).await;
                (cx.take_in(root).await?, true)
            }
        };
        let perms = Perms { need: Bits::WRITE | Bits::RESIZE, shared: Bits::ALL };
        let label = "an unnamed block device".to_owned();
        let attached = self.attach(&node, &DiskOptions { label, perms, writethrough: false }).await;
        if attached.is_err() && temporary {
            self.remove(node).await;
        }
        attached.map(|disk| Held { disk, temporary })
    }

    /// Ends the use of a node; others learn what length it has now.
    pub async fn release(&mut self, held: Held) {
        let node = held.disk.node();
        let drained = self.drain(&node).await;
        refresh_above(&node).await;
        drop(drained);
        self.detach(held.disk).await;
        if held.temporary && node.parents().is_empty() {
            self.remove(node).await;
        }
    }

    /// Makes an image while the caller waits.
    ///
    /// # Errors
    /// Those of the driver and of its nodes.
    pub async fn create_image(&mut self, options: &BlockdevCreateOptions) -> Result<()> {
        let opener = Arc::clone(&self.opener);
        let mut direct = Direct { graph: self, held: Vec::new() };
        let created = opener.create(&mut direct, options).await;
        let Direct { graph, held } = direct;
        for one in held {
            graph.release(one).await;
        }
        created
    }

    /// The table of drivers.
    pub fn opener(&self) -> Arc<dyn super::Opener> {
        Arc::clone(&self.opener)
    }
}
