//! Nodes that are active and nodes that are not: an image that two processes have open belongs to one of them at a time.
//!
//! An inactive node has its file open, holds no lock and writes nothing. It can stand below inactive nodes only. When it
//! becomes active, its locks are taken and all that was known of the image is read anew.

use super::permissions::{self, Overlay};
use super::{Drained, Graph, above, children_first_upwards, refresh};
use crate::edge::Parent;
use crate::node::Node;
use crate::perm::Bits;
use nix::errno::Errno;
use qapi::{Error, Result};
use std::collections::HashSet;
use std::sync::Arc;

fn id(node: &Arc<Node>) -> usize {
    Arc::as_ptr(node).addr()
}

impl Graph {
    /// Makes `node` active, and all inactive nodes below it.
    ///
    /// # Errors
    /// Somebody else has the image, or it cannot be read. All nodes are as they were then.
    pub async fn activate(&mut self, node: &Arc<Node>) -> Result<()> {
        let nodes = inactive_below(node);
        self.activate_all(nodes).await
    }

    /// Makes all nodes active.
    ///
    /// # Errors
    /// Those of [`Graph::activate`].
    pub async fn activate_everything(&mut self) -> Result<()> {
        let nodes = self.nodes().filter(|node| !node.is_active()).cloned().collect();
        self.activate_all(nodes).await
    }

    async fn activate_all(&mut self, nodes: Vec<Arc<Node>>) -> Result<()> {
        if nodes.is_empty() {
            return Ok(());
        }
        let plan = permissions::plan(&nodes, &[], &Overlay::with_active(&nodes, true), &[])?;
        let plan = plan.prepare(|_| false).await?;
        let drained = Drained::new(above(nodes.clone(), Vec::new())).await;
        plan.commit();
        nodes.iter().for_each(|node| node.set_active(true));
        let mut result = Ok(());
        for node in only(&nodes, children_first_upwards(&nodes)) {
            let read = match node.driver().activate().await {
                Ok(()) => node.driver().start().await,
                Err(error) => Err(error),
            };
            if let Err(error) = read {
                result = Err(error);
                break;
            }
            refresh(std::slice::from_ref(&node)).await;
        }
        if result.is_err() {
            nodes.iter().for_each(|node| node.set_active(false));
            // There is only less to hold.
            if let Ok(plan) = permissions::plan(&nodes, &[], &Overlay::default(), &[]) {
                let _ = plan.carry_out().await;
            }
        }
        drop(drained);
        result
    }

    /// Makes `node` inactive, and those below it that nothing active needs.
    ///
    /// # Errors
    /// An active node stands on it, a user writes and cannot do without, or what is left cannot be written. All nodes are as
    /// they were then.
    pub async fn deactivate(&mut self, node: &Arc<Node>) -> Result<()> {
        if !node.is_active() {
            return Ok(());
        }
        let active_parent = |edge: &Arc<crate::Edge>| edge.parent_node().is_some_and(|parent| parent.is_active());
        if node.parents().iter().any(active_parent) {
            return Err(Error::generic("Node has active parent node"));
        }
        self.deactivate_all(vec![Arc::clone(node)], "node").await
    }

    /// Makes all nodes inactive.
    ///
    /// # Errors
    /// Those of [`Graph::deactivate`].
    pub async fn deactivate_everything(&mut self) -> Result<()> {
        let tops = self.nodes().filter(|node| node.parents().iter().all(|edge| edge.parent_node().is_none()));
        let tops = tops.filter(|node| node.is_active()).cloned().collect();
        self.deactivate_all(tops, "all nodes").await
    }

    async fn deactivate_all(&mut self, tops: Vec<Arc<Node>>, what: &str) -> Result<()> {
        let failed = |errno: Errno| Error::io(format!("Failed to inactivate {what}"), errno.into());
        let nodes = needless_below(&tops);
        if nodes.iter().any(has_writer) {
            return Err(failed(Errno::EPERM));
        }
        let drained = Drained::new(above(nodes.clone(), Vec::new())).await;
        for node in &nodes {
            node.flush().await.map_err(failed)?;
            node.driver().deactivate().await?;
        }
        let plan = permissions::plan(&nodes, &[], &Overlay::with_active(&nodes, false), &[])?;
        let plan = plan.prepare(|_| false).await?;
        plan.commit();
        nodes.iter().for_each(|node| node.set_active(false));
        drop(drained);
        Ok(())
    }
}

/// Those of `list` that are among `nodes`.
fn only(nodes: &[Arc<Node>], list: Vec<Arc<Node>>) -> Vec<Arc<Node>> {
    let wanted: HashSet<usize> = nodes.iter().map(id).collect();
    list.into_iter().filter(|node| wanted.contains(&id(node))).collect()
}

/// `node` and everything below it that is not active.
fn inactive_below(node: &Arc<Node>) -> Vec<Arc<Node>> {
    let mut seen = HashSet::new();
    let mut found = Vec::new();
    let mut todo = vec![Arc::clone(node)];
    while let Some(node) = todo.pop() {
        if !node.is_active() && seen.insert(id(&node)) {
            todo.extend(node.children().iter().map(|edge| edge.node()));
            found.push(node);
        }
    }
    found
}

/// `tops` and everything below them that has no other active parent; parents first.
fn needless_below(tops: &[Arc<Node>]) -> Vec<Arc<Node>> {
    let mut going: HashSet<usize> = tops.iter().map(id).collect();
    let mut found = tops.to_vec();
    let mut at = 0;
    while let Some(node) = found.get(at).cloned() {
        at += 1;
        for child in node.children().iter().map(|edge| edge.node()) {
            let needed = child
                .parents()
                .iter()
                .filter_map(|edge| edge.parent_node())
                .any(|parent| parent.is_active() && !going.contains(&id(&parent)));
            if child.is_active() && !needed && going.insert(id(&child)) {
                found.push(child);
            }
        }
    }
    found
}

/// Whether a user would change the node, and does not agree to stop.
fn has_writer(node: &Arc<Node>) -> bool {
    node.parents().iter().any(|edge| match &edge.parent {
        Parent::Disk(disk) => disk.upgrade().is_some_and(|disk| {
            !disk.allow_inactive && disk.wanted.need.intersects(Bits::WRITE | Bits::WRITE_UNCHANGED)
        }),
        Parent::Node(_) => false,
    })
}
