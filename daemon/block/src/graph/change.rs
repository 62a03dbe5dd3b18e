//! [`Change`]: what is to be different in the graph, done as a whole or not at all.
//!
//! The steps are those of every change: a plan on paper, over the graph as it would be ([`Overlay`]); what can fail is
//! prepared while requests go on; the gates above are closed; what was written is flushed, so that nobody's flush is told
//! to a node that no longer leads to its data; then the commit, of which no part can fail.

use super::permissions::{self, Overlay};
use super::{Drained, Graph, above, children_first_upwards, link, refresh, unlink};
use crate::disk;
use crate::edge::{Edge, Parent, Role};
use crate::node::{Node, NodeOptions};
use crate::reopen::{NewOptions, Prepared};
use nix::errno::Errno;
use qapi::types::block::BlockdevOptions;
use qapi::{Error, Result};
use std::sync::{Arc, OnceLock};

/// Options that a node is to get.
pub(super) struct NewNode {
    pub node: Arc<Node>,
    pub given: Arc<BlockdevOptions>,
    pub options: NodeOptions,
}

/// A change of the graph, put together by its methods and carried out by [`Graph::change`].
#[derive(Default)]
pub struct Change {
    pub(super) reopened: Vec<NewNode>,
    pub(super) moved: Vec<(Arc<Edge>, Arc<Node>)>,
    pub(super) added: Vec<(Arc<Node>, Arc<Edge>)>,
    pub(super) removed: Vec<(Arc<Node>, Arc<Edge>)>,
}

impl std::fmt::Debug for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Change")
            .field("reopened", &self.reopened.iter().map(|new| &new.node).collect::<Vec<_>>())
            .field("moved", &self.moved)
            .field("added", &self.added)
            .field("removed", &self.removed)
            .finish()
    }
}

impl Change {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// `edge` leads to `node` from now on: a child of a node, or the root of an export or a job.
    pub fn move_edge(&mut self, edge: &Arc<Edge>, node: &Arc<Node>) {
        self.moved.retain(|(other, _)| !Arc::ptr_eq(other, edge));
        self.moved.push((Arc::clone(edge), Arc::clone(node)));
    }

    /// All parents of `from` that `which` chooses are parents of `to` from now on: how a node takes the place of another, or
    /// is inserted above it (all but its own edge, which must exist or be added in the same change).
    pub fn move_parents(&mut self, from: &Arc<Node>, to: &Arc<Node>, which: impl Fn(&Edge) -> bool) {
        let own = |edge: &Edge| edge.parent_node().is_some_and(|parent| Arc::ptr_eq(&parent, to));
        for edge in from.parents().iter().filter(|edge| !own(edge) && which(edge)) {
            self.move_edge(edge, to);
        }
    }

    /// `node` is backed by `backing` from now on, or by nothing.
    ///
    /// # Errors
    /// The driver knows no backing files, or not this one.
    pub fn set_backing(&mut self, node: &Arc<Node>, backing: Option<&Arc<Node>>) -> Result<()> {
        let Some(facet) = node.driver().backing() else {
            let (driver, name) = (node.driver().name(), node.name());
            return Err(Error::generic(format!("Driver '{driver}' of node '{name}' does not support backing files")));
        };
        facet.check(backing)?;
        // What was asked for last holds.
        let is_backing = |edge: &Arc<Edge>| edge.role() == Role::Backing;
        self.added.retain(|(parent, edge)| !(Arc::ptr_eq(parent, node) && is_backing(edge)));
        self.removed.retain(|(parent, edge)| !(Arc::ptr_eq(parent, node) && is_backing(edge)));
        self.moved.retain(|(edge, _)| !(is_backing(edge) && edge.parent_node().is_some_and(|p| Arc::ptr_eq(&p, node))));
        let current = node.children().into_iter().find(|edge| edge.role() == Role::Backing);
        match (current, backing) {
            (Some(edge), Some(backing)) => self.moved.push((edge, Arc::clone(backing))),
            (Some(edge), None) => self.removed.push((Arc::clone(node), edge)),
            (None, Some(backing)) => self.add_edge(node, "backing", Role::Backing, backing),
            (None, None) => {}
        }
        Ok(())
    }

    fn add_edge(&mut self, parent: &Arc<Node>, name: &str, role: Role, child: &Arc<Node>) {
        let holder = Parent::Node(OnceLock::from(Arc::downgrade(parent)));
        let edge = Arc::new(Edge::new(name, role, Arc::clone(child), holder));
        self.added.push((Arc::clone(parent), edge));
    }

    /// `child` is one more child of `parent`.
    ///
    /// # Errors
    /// The driver takes no more, or none at all.
    pub fn add_child(&mut self, parent: &Arc<Node>, child: &Arc<Node>) -> Result<()> {
        let Some(list) = parent.driver().child_list() else {
            return Err(Error::generic(format!("The node {} does not support adding a child", parent.name())));
        };
        if !child.parents().is_empty() {
            return Err(Error::generic(format!("The node {} already has a parent", child.name())));
        }
        let (name, role) = list.next()?;
        self.add_edge(parent, &name, role, child);
        Ok(())
    }

    /// `edge` is no child of `parent` any more.
    ///
    /// # Errors
    /// The driver needs it, or never lets one go.
    pub fn remove_child(&mut self, parent: &Arc<Node>, edge: &Arc<Edge>) -> Result<()> {
        let Some(list) = parent.driver().child_list() else {
            return Err(Error::generic(format!("The node {} does not support removing a child", parent.name())));
        };
        list.may_remove(edge)?;
        self.removed.push((Arc::clone(parent), Arc::clone(edge)));
        Ok(())
    }

    /// Every node that the change touches, those that lose a parent included.
    fn touched(&self) -> Vec<Arc<Node>> {
        let mut nodes: Vec<_> = self.reopened.iter().map(|new| Arc::clone(&new.node)).collect();
        for (edge, to) in &self.moved {
            nodes.extend(edge.parent_node());
            nodes.extend([edge.node(), Arc::clone(to)]);
        }
        for (parent, edge) in self.added.iter().chain(&self.removed) {
            nodes.extend([Arc::clone(parent), edge.node()]);
        }
        nodes
    }

    /// The disks whose requests must not be inside while it is committed.
    fn disks(&self) -> Vec<Arc<disk::Inner>> {
        let changed =
            self.reopened.iter().map(|new| &new.node).chain(self.added.iter().chain(&self.removed).map(|e| &e.0));
        let mut nodes: Vec<_> = changed.cloned().collect();
        let mut disks = Vec::new();
        for (edge, _) in &self.moved {
            match &edge.parent {
                Parent::Disk(disk) => disks.extend(disk.upgrade()),
                Parent::Node(_) => nodes.extend(edge.parent_node()),
            }
        }
        above(nodes, disks)
    }

    /// Puts what was written on stable storage where whoever flushes afterwards may no longer reach it.
    async fn flush(&self) -> Result<()> {
        let could_not =
            |node: &Node, errno: Errno| Error::io(format!("Could not flush node '{}'", node.name()), errno.into());
        for edge in self.moved.iter().map(|(edge, _)| edge).chain(self.removed.iter().map(|(_, edge)| edge)) {
            edge.flush().await.map_err(|errno| could_not(&edge.node(), errno))?;
        }
        for NewNode { node, options, .. } in &self.reopened {
            let before = node.options();
            let how = |options: &NodeOptions| (options.read_only, options.direct, options.no_flush);
            if !before.read_only && how(options) != how(&before) {
                node.flush().await.map_err(|errno| could_not(node, errno))?;
            }
        }
        Ok(())
    }

    fn check_not_frozen(&self) -> Result<()> {
        for edge in self.moved.iter().map(|(edge, _)| edge).chain(self.removed.iter().map(|(_, edge)| edge)) {
            if edge.is_frozen() {
                let parent = edge.parent_node().map_or_else(String::new, |parent| parent.name().to_owned());
                return Err(Error::generic(format!(
                    "Cannot change frozen '{}' link from '{parent}' to '{}'",
                    edge.name(),
                    edge.node().name()
                )));
            }
        }
        Ok(())
    }

    fn check_acyclic(&self, overlay: &Overlay) -> Result<()> {
        let moved = self.moved.iter().filter_map(|(edge, to)| Some((edge.parent_node()?, edge, Arc::clone(to))));
        let added = self.added.iter().map(|(parent, edge)| (Arc::clone(parent), edge, edge.node()));
        for (parent, edge, to) in moved.chain(added) {
            if overlay.reaches(&to, &parent) {
                let (child, name, parent) = (to.name(), edge.name(), parent.name());
                return Err(Error::generic(format!(
                    "Making '{child}' a {name} child of '{parent}' would create a cycle"
                )));
            }
        }
        Ok(())
    }

    /// Puts everything but permissions and drivers' options in force.
    fn commit(&self) {
        for (edge, to) in &self.moved {
            unlink(edge);
            edge.set_node(Arc::clone(to));
            link(edge);
        }
        for (parent, edge) in &self.removed {
            unlink(edge);
            parent.links().children.retain(|other| !Arc::ptr_eq(other, edge));
        }
        for (parent, edge) in &self.added {
            link(edge);
            parent.links().children.push(Arc::clone(edge));
        }
        for (parent, _) in self.added.iter().chain(&self.removed) {
            let children = parent.children();
            if let Some(facet) = parent.driver().backing() {
                facet.set(children.iter().find(|edge| edge.role() == Role::Backing).cloned());
            }
            if let Some(facet) = parent.driver().child_list() {
                facet.set(&children);
            }
        }
        for new in &self.reopened {
            new.node.set_options(new.options.clone(), Arc::clone(&new.given));
        }
    }
}

impl Graph {
    /// Carries out `change` as a whole, under running requests.
    ///
    /// # Errors
    /// It would make a circle, somebody's permissions stand against it, a driver cannot. Nothing has changed then.
    pub async fn change(&mut self, change: Change) -> Result<()> {
        change.check_not_frozen()?;
        let touched = change.touched();
        let overlay = Overlay::new(&change);
        change.check_acyclic(&overlay)?;
        let drained;
        {
            let news: Vec<_> =
                change.reopened.iter().map(|new| (new.node.options(), overlay.children(&new.node))).collect();
            let news: Vec<_> = change
                .reopened
                .iter()
                .zip(&news)
                .map(|(new, (before, children))| NewOptions {
                    before,
                    after: &new.options,
                    driver: &new.given.driver,
                    children,
                    resources: &self.resources,
                })
                .collect();
            let mut prepared: Vec<(Arc<Node>, Box<dyn Prepared + '_>)> = Vec::new();
            for (new, options) in change.reopened.iter().zip(&news) {
                if let Some(facet) = new.node.driver().reopen() {
                    prepared.push((Arc::clone(&new.node), facet.prepare(options).await?));
                }
            }
            let plan = permissions::plan(&touched, &[], &overlay, &prepared)?;
            let plan = plan.prepare(|node| overlay.is_reopened(node)).await?;
            drained = Drained::new(change.disks()).await;
            let mut last_steps = change.flush().await;
            for (_, prepared) in &mut prepared {
                if last_steps.is_ok() {
                    last_steps = prepared.drained().await;
                }
            }
            if let Err(error) = last_steps {
                plan.abort();
                return Err(error);
            }
            change.commit();
            plan.commit();
            for (_, prepared) in prepared {
                prepared.commit();
            }
        }
        children_first_upwards(&touched).iter().for_each(|node| node.must_flush());
        refresh(&touched).await;
        drop(drained);
        if !change.moved.is_empty() || !change.removed.is_empty() {
            self.remove_orphans(touched).await;
        }
        Ok(())
    }

    /// Closes those of `nodes` that came as somebody's child and are nobody's any more.
    async fn remove_orphans(&mut self, nodes: Vec<Arc<Node>>) {
        for node in nodes {
            let id = self.names.get(node.name()).copied();
            let entry = id.and_then(|id| self.nodes.get(&id));
            if entry.is_some_and(|entry| !entry.owned && Arc::ptr_eq(&entry.node, &node)) && node.parents().is_empty() {
                self.remove(node).await;
            }
        }
    }
}
