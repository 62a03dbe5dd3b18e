//! Nodes: made, resized, deleted.

use super::Control;
use block::Node;
use block::graph::Change;
use qapi::types::block::{
    BlockResize, BlockSetWriteThreshold, BlockdevDel, BlockdevOptions, BlockdevReopen, BlockdevSetActive, StrOrNull,
    XBlockdevChange, XBlockdevSetIothread,
};
use qapi::{Error, Result};
use std::sync::Arc;

impl Control {
    /// `blockdev-add` and `--blockdev`.
    pub async fn blockdev_add(&mut self, options: BlockdevOptions) -> Result<()> {
        self.graph.add(&options).await.map(|_| ())
    }

    pub(super) async fn blockdev_reopen(&mut self, args: BlockdevReopen) -> Result<()> {
        self.graph.reopen(args.options).await
    }

    pub(super) async fn blockdev_del(&mut self, args: BlockdevDel) -> Result<()> {
        self.graph.delete(&args.node_name).await
    }

    pub(super) async fn blockdev_set_active(&mut self, args: BlockdevSetActive) -> Result<()> {
        let Some(name) = args.node_name else {
            return match args.active {
                true => self.graph.activate_everything().await,
                false => self.graph.deactivate_everything().await,
            };
        };
        let node = self.node(&name)?;
        match args.active {
            true => self.graph.activate(&node).await,
            false => self.graph.deactivate(&node).await,
        }
    }

    /// The node of that name, with the message of the commands that take nothing but a node.
    fn node(&self, name: &str) -> Result<Arc<Node>> {
        let missing = || Error::generic(format!("Failed to find node with node-name='{name}'"));
        self.graph.get(name).cloned().ok_or_else(missing)
    }

    pub(super) async fn block_set_write_threshold(&mut self, args: BlockSetWriteThreshold) -> Result<()> {
        let missing = || Error::generic(format!("Device '{}' not found", args.node_name));
        self.graph.get(&args.node_name).ok_or_else(missing)?.set_write_threshold(args.write_threshold);
        Ok(())
    }

    pub(super) async fn x_blockdev_change(&mut self, args: XBlockdevChange) -> Result<()> {
        let parent = self.graph.find(Some(&args.parent), Some(&args.parent))?;
        let mut change = Change::new();
        match (args.child, args.node) {
            (Some(_), Some(_)) => return Err(Error::generic("The parameters child and node are in conflict")),
            (None, None) => return Err(Error::generic("Either child or node must be specified")),
            (Some(child), None) => {
                let edge = parent.children().into_iter().find(|edge| edge.name() == child);
                let missing = || Error::generic(format!("Node '{}' does not have child '{child}'", args.parent));
                change.remove_child(&parent, &edge.ok_or_else(missing)?)?;
            }
            (None, Some(node)) => {
                let missing = || Error::generic(format!("Node '{node}' not found"));
                change.add_child(&parent, self.graph.get(&node).ok_or_else(missing)?)?;
            }
        }
        self.graph.change(change).await
    }

    /// Nodes have no home thread (a request runs on the thread that issued it), so there is nothing to set.
    pub(super) async fn x_blockdev_set_iothread(&mut self, args: XBlockdevSetIothread) -> Result<()> {
        let node = self.node(&args.node_name)?;
        if !args.force.unwrap_or(false) && self.graph.has_users(&node) {
            return Err(Error::generic(format!(
                "Node {} is associated with a BlockBackend and could be in use (use force=true to override this check)",
                args.node_name
            )));
        }
        match &args.iothread {
            StrOrNull::N(_) => Ok(()),
            StrOrNull::S(id) => match self.objects.iothread(id) {
                Ok(_) => Ok(()),
                Err(_) => Err(Error::generic(format!("Cannot find iothread {id}"))),
            },
        }
    }

    pub(super) async fn block_resize(&mut self, args: BlockResize) -> Result<()> {
        let node = self.graph.find(args.device.as_deref(), args.node_name.as_deref())?;
        let size = u64::try_from(args.size).map_err(|_| Error::generic("Parameter 'size' expects a >0 size"))?;
        self.graph.resize(&node, size).await
    }
}
