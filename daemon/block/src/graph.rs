//! [`Graph`]: all nodes, and the only place that changes how they hang together.
//!
//! Owned by the control task. Every change has the same three steps: *plan* what would be (new nodes are opened aside,
//! permissions are computed on paper), *prepare* what can fail (locks, descriptors; undone if a later one fails), *commit*,
//! which cannot fail. Where edges or lengths change under requests, the gates of all disks above are closed in between.

mod activity;
mod change;
mod hold;
mod open;
mod permissions;
mod reopen;

pub use change::Change;
pub use hold::{CreateContext, Held};
pub use open::{OpenContext, Opener};
use permissions::Overlay;

use crate::disk::{self, Disk, DiskOptions};
use crate::driver::Prealloc;
use crate::edge::{Edge, Parent};
use crate::node::{Node, whole_sectors};
use crate::perm::{Bits, Perms};
use crate::report::Reporter;
use crate::resource::Resources;
use qapi::{Error, Result};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

struct Entry {
    node: Arc<Node>,
    /// Added by a command of its own, as opposed to as the child of another.
    owned: bool,
}

/// The block graph.
pub struct Graph {
    opener: Arc<dyn Opener>,
    /// In the order of their making.
    nodes: BTreeMap<u64, Entry>,
    names: HashMap<String, u64>,
    next: u64,
    next_auto_name: u64,
    resources: Resources,
    /// Where nodes and their users report to.
    reporter: Reporter,
    /// Files that images name are opened.
    implicit_opens: bool,
}

impl std::fmt::Debug for Graph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.nodes()).finish()
    }
}

/// While this lives, no request is inside the disks that it was taken for.
#[derive(Debug)]
pub struct Drained {
    disks: Vec<Arc<disk::Inner>>,
    /// All nodes below them: their drivers hold nothing back.
    nodes: Vec<Arc<Node>>,
}

impl Drained {
    /// Closes the gates of `disks` and waits until nothing is inside.
    async fn new(disks: Vec<Arc<disk::Inner>>) -> Self {
        for disk in &disks {
            disk.gate.close();
        }
        let drained = Self { nodes: nodes_below(&disks), disks };
        for node in &drained.nodes {
            node.driver().drain_begin();
        }
        for disk in &drained.disks {
            disk.gate.empty().await;
        }
        drained
    }
}

impl Drop for Drained {
    fn drop(&mut self) {
        self.nodes.iter().for_each(|node| node.driver().drain_end());
        self.disks.iter().for_each(|disk| disk.gate.open());
    }
}

impl Graph {
    /// An empty graph whose drivers come from `opener`.
    pub fn new(opener: Arc<dyn Opener>) -> Self {
        Self {
            opener,
            nodes: BTreeMap::new(),
            names: HashMap::new(),
            next: 0,
            next_auto_name: 0,
            resources: Resources::default(),
            reporter: Reporter::default(),
            implicit_opens: true,
        }
    }

    /// Where nodes and their users report what clients are to be told; the daemon fetches from it.
    pub fn reporter(&self) -> &Reporter {
        &self.reporter
    }

    /// The objects that nodes can name.
    pub fn resources(&self) -> &Resources {
        &self.resources
    }

    /// The same, to add and remove.
    pub fn resources_mut(&mut self) -> &mut Resources {
        &mut self.resources
    }

    /// All nodes, oldest first.
    pub fn nodes(&self) -> impl DoubleEndedIterator<Item = &Arc<Node>> {
        self.nodes.values().map(|entry| &entry.node)
    }

    /// The node of that name.
    pub fn get(&self, name: &str) -> Option<&Arc<Node>> {
        self.names.get(name).and_then(|id| self.nodes.get(id)).map(|entry| &entry.node)
    }

    /// The node of that name, with the message of the commands that take a device or a node.
    ///
    /// # Errors
    /// There is no such node.
    pub fn find(&self, device: Option<&str>, name: Option<&str>) -> Result<Arc<Node>> {
        let found = name.or(device).and_then(|name| self.get(name)).cloned();
        found.ok_or_else(|| {
            let (device, name) = (device.unwrap_or_default(), name.unwrap_or_default());
            Error::generic(format!("Cannot find device='{device}' nor node-name='{name}'"))
        })
    }

    fn insert(&mut self, node: Arc<Node>, owned: bool) {
        self.names.insert(node.name().to_owned(), self.next);
        self.nodes.insert(self.next, Entry { node, owned });
        self.next += 1;
    }

    /// Deletes a node that was added by name and is not used, and the children that only it used.
    ///
    /// # Errors
    /// No such node; in use; not added by name. Nothing has changed then.
    pub async fn delete(&mut self, name: &str) -> Result<()> {
        let entry = self.names.get(name).and_then(|id| self.nodes.get(id));
        let Some(Entry { node, owned }) = entry else {
            return Err(Error::generic(format!("Failed to find node with node-name='{name}'")));
        };
        let parents = node.parents();
        if parents.iter().any(|edge| matches!(edge.parent, Parent::Disk(_))) {
            return Err(Error::generic(format!("Node {name} is in use")));
        }
        if !owned {
            return Err(Error::generic(format!("Node {name} is not owned by the monitor")));
        }
        if !parents.is_empty() {
            return Err(Error::generic(format!("Block device {name} is in use")));
        }
        let node = Arc::clone(node);
        self.remove(node).await;
        Ok(())
    }

    /// Takes an unused node out and closes it, then its children that nobody else uses.
    async fn remove(&mut self, first: Arc<Node>) {
        let mut doomed = vec![first];
        while let Some(node) = doomed.pop() {
            if let Some(id) = self.names.remove(node.name()) {
                self.nodes.remove(&id);
            }
            // A failed flush cannot undo the deletion; the driver keeps the error for whoever flushes the same file next.
            let _ = node.flush().await;
            node.driver().close().await;
            for child in unlink_children(&node) {
                let owned = self.names.get(child.name()).and_then(|id| self.nodes.get(id)).is_some_and(|e| e.owned);
                if !owned && child.parents().is_empty() {
                    doomed.push(child);
                } else {
                    permissions::loosen(&child).await;
                }
            }
        }
    }

    /// Closes all nodes, users first. For the end of the process, when no disk is left.
    pub async fn close_all(&mut self) {
        loop {
            let unused = self.nodes().rev().find(|node| node.parents().is_empty()).cloned();
            match unused {
                Some(node) => self.remove(node).await,
                None => return,
            }
        }
    }

    /// Makes a user of `node`.
    ///
    /// # Errors
    /// Its permissions conflict with those of others, a driver cannot get what they need, or the node is not active and the
    /// user would change it. Nothing has changed then.
    pub async fn attach(&mut self, node: &Arc<Node>, options: &DiskOptions) -> Result<Disk> {
        let changes = Bits::WRITE | Bits::WRITE_UNCHANGED | Bits::RESIZE;
        if !node.is_active() && options.perms.need.intersects(changes) {
            let bits = options.perms.need & changes;
            return Err(Error::generic(format!("Permission '{bits}' unavailable on inactive node")));
        }
        self.attach_even_inactive(node, options, false).await
    }

    /// The same for a user that can do without what it needs while the node is not active.
    ///
    /// # Errors
    /// Those of [`Graph::attach`] but the last.
    pub async fn attach_inactive(&mut self, node: &Arc<Node>, options: &DiskOptions) -> Result<Disk> {
        self.attach_even_inactive(node, options, true).await
    }

    async fn attach_even_inactive(&mut self, node: &Arc<Node>, options: &DiskOptions, allow: bool) -> Result<Disk> {
        let disk = Disk::new(Arc::clone(node), options, allow, self.reporter.clone());
        link(&disk.inner.edge);
        let plan = permissions::plan(std::slice::from_ref(node), &[], &Overlay::default(), &[]);
        let done = match plan {
            Ok(plan) => plan.carry_out().await,
            Err(error) => Err(error),
        };
        match done {
            Ok(()) => Ok(disk),
            Err(error) => {
                unlink(&disk.inner.edge);
                Err(error)
            }
        }
    }

    /// The user of `disk` stays when this process dies, and goes on with its successor: what completes from now on is where that
    /// will find it, see [`Driver::outlived`](crate::Driver::outlived).
    pub fn outlive(&mut self, disk: &Disk) {
        disk.inner.outlives.store(true, Ordering::Relaxed);
        permissions::look_up_below(&disk.node());
    }

    /// Ends the use. Requests that are inside are waited for.
    pub async fn detach(&mut self, disk: Disk) {
        let drained = Drained::new(vec![Arc::clone(&disk.inner)]).await;
        let node = disk.node();
        unlink(&disk.inner.edge);
        permissions::loosen(&node).await;
        // Its gate stays closed for whoever still has a clone of the disk.
        disk.inner.gate.close();
        drop(drained);
    }

    /// The process is about to end: from now on drivers hold no request back, so that exports can close at once.
    pub fn release_all(&self) {
        for node in self.nodes() {
            node.driver().drain_begin();
            // What a drain waits for like for a disk that hangs.
            if let Some(fault) = node.driver().fault_control() {
                fault.let_all_go();
            }
        }
    }

    /// Whether an export or a job uses `node` itself.
    pub fn has_users(&self, node: &Arc<Node>) -> bool {
        node.parents().iter().any(|edge| matches!(edge.parent, Parent::Disk(_)))
    }

    /// Waits until no request is inside any disk above `node`, and keeps new ones out while the result lives.
    pub async fn drain(&self, node: &Arc<Node>) -> Drained {
        Drained::new(disks_above(node)).await
    }

    /// Sets the length of a node, in bytes; its users learn of it.
    ///
    /// # Errors
    /// Somebody needs the length to stay; the driver cannot. The length has not changed then.
    pub async fn resize(&mut self, node: &Arc<Node>, size: u64) -> Result<()> {
        let perms = Perms { need: Bits::RESIZE, shared: Bits::ALL };
        let label = "an unnamed block device".to_owned();
        let disk = self.attach(node, &DiskOptions { label, perms, writethrough: false }).await?;
        let drained = self.drain(node).await;
        let result = node.truncate(size, false, Prealloc::Off).await;
        // Also after a failure: it may have come half-way.
        refresh_above(node).await;
        drop(drained);
        self.detach(disk).await;
        result
    }
}

/// The parent's end is set, the child now knows the edge.
fn link(edge: &Arc<Edge>) {
    edge.node().links().parents.push(Arc::downgrade(edge));
}

fn unlink(edge: &Arc<Edge>) {
    let node = edge.node();
    node.links().parents.retain(|parent| parent.upgrade().is_some_and(|other| !Arc::ptr_eq(&other, edge)));
}

/// Takes the children off a node that is going; returns them.
fn unlink_children(node: &Arc<Node>) -> Vec<Arc<Node>> {
    let edges = std::mem::take(&mut node.links().children);
    edges
        .iter()
        .map(|edge| {
            unlink(edge);
            edge.node()
        })
        .collect()
}

/// Every node that requests of these disks can reach.
fn nodes_below(disks: &[Arc<disk::Inner>]) -> Vec<Arc<Node>> {
    let mut seen = HashSet::new();
    let mut nodes = Vec::new();
    let mut todo: Vec<_> = disks.iter().map(|disk| disk.edge.node()).collect();
    while let Some(node) = todo.pop() {
        if seen.insert(Arc::as_ptr(&node).addr()) {
            todo.extend(node.children().iter().map(|edge| edge.node()));
            nodes.push(node);
        }
    }
    nodes
}

fn disks_above(node: &Arc<Node>) -> Vec<Arc<disk::Inner>> {
    above(vec![Arc::clone(node)], Vec::new())
}

/// `disks`, and those whose requests can reach one of `nodes`.
fn above(nodes: Vec<Arc<Node>>, mut disks: Vec<Arc<disk::Inner>>) -> Vec<Arc<disk::Inner>> {
    let mut seen = HashSet::new();
    let mut todo = nodes;
    while let Some(node) = todo.pop() {
        if !seen.insert(Arc::as_ptr(&node).addr()) {
            continue;
        }
        for edge in node.parents() {
            match &edge.parent {
                Parent::Disk(disk) => disks.extend(disk.upgrade()),
                Parent::Node(parent) => todo.extend(parent.get().and_then(Weak::upgrade)),
            }
        }
    }
    let mut known = HashSet::new();
    disks.retain(|disk| known.insert(Arc::as_ptr(disk).addr()));
    disks
}

/// Tells everybody above `node` about its length.
async fn refresh_above(node: &Arc<Node>) {
    refresh(&node.parents().iter().filter_map(|edge| edge.parent_node()).collect::<Vec<_>>()).await;
    tell_disks(node);
}

/// Takes new lengths and facts from `nodes` and everybody above them, children first.
async fn refresh(nodes: &[Arc<Node>]) {
    for node in children_first_upwards(nodes) {
        node.refresh_facts();
        if let Ok(length) = node.driver().length().await
            && whole_sectors(length) != node.size()
        {
            node.set_length(length);
        }
        tell_disks(&node);
    }
}

/// Tells the users that are no nodes of the length.
fn tell_disks(node: &Arc<Node>) {
    for edge in node.parents() {
        if let Parent::Disk(disk) = &edge.parent
            && let Some(disk) = disk.upgrade()
        {
            disk.resized(node.size());
        }
    }
}

/// `nodes` and all above them, each after its children among them.
fn children_first_upwards(nodes: &[Arc<Node>]) -> Vec<Arc<Node>> {
    enum Step {
        Enter(Arc<Node>),
        Leave(Arc<Node>),
    }
    let mut seen = HashSet::new();
    let mut order = Vec::new();
    let mut todo: Vec<Step> = nodes.iter().cloned().map(Step::Enter).collect();
    while let Some(step) = todo.pop() {
        match step {
            Step::Enter(node) => {
                if seen.insert(Arc::as_ptr(&node).addr()) {
                    let parents = node.parents();
                    todo.push(Step::Leave(node));
                    todo.extend(parents.iter().filter_map(|edge| edge.parent_node()).map(Step::Enter));
                }
            }
            Step::Leave(node) => order.push(node),
        }
    }
    order.reverse();
    order
}
