//! Permissions of a part of the graph, on paper first, then for real.

use super::change::Change;
use crate::edge::{Edge, Parent, Role};
use crate::node::{Node, NodeOptions};
use crate::perm::{Bits, Claim, Perms, conflict};
use crate::reopen::Prepared;
use qapi::{Error, Result};
use std::collections::{HashMap, HashSet};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

/// Identity of an edge or a node.
fn id<T>(of: &Arc<T>) -> usize {
    Arc::as_ptr(of).addr()
}

/// New permissions that do not conflict: of the edges, and of all users of each node together.
pub(super) struct Plan {
    edges: Vec<(Arc<Edge>, Perms)>,
    nodes: Vec<(Arc<Node>, Perms)>,
}

/// The graph as it will be after a change that has not been made.
#[derive(Default)]
pub(super) struct Overlay {
    /// Where edges will lead, by edge.
    moved: HashMap<usize, Arc<Node>>,
    /// Edges that will be gone.
    removed: HashSet<usize>,
    /// Edges that nodes will have in addition, as children, by node.
    new_children: HashMap<usize, Vec<Arc<Edge>>>,
    /// Edges that will lead to nodes in addition, by node.
    new_parents: HashMap<usize, Vec<Arc<Edge>>>,
    /// Options that nodes will have.
    options: HashMap<usize, Arc<NodeOptions>>,
}

impl Overlay {
    pub fn new(change: &Change) -> Self {
        let mut overlay = Self::default();
        for (edge, to) in &change.moved {
            overlay.moved.insert(id(edge), Arc::clone(to));
            if id(&edge.node()) != id(to) {
                overlay.new_parents.entry(id(to)).or_default().push(Arc::clone(edge));
            }
        }
        overlay.removed.extend(change.removed.iter().map(|(_, edge)| id(edge)));
        for (parent, edge) in &change.added {
            overlay.new_children.entry(id(parent)).or_default().push(Arc::clone(edge));
            overlay.new_parents.entry(id(&edge.node())).or_default().push(Arc::clone(edge));
        }
        let options = |new: &super::change::NewNode| (id(&new.node), Arc::new(new.options.clone()));
        overlay.options.extend(change.reopened.iter().map(options));
        overlay
    }

    /// The graph with these nodes active, or not.
    pub fn with_active(nodes: &[Arc<Node>], active: bool) -> Self {
        let options = |node: &Arc<Node>| {
            let options = NodeOptions { inactive: !active, ..(*node.options()).clone() };
            (id(node), Arc::new(options))
        };
        Self { options: nodes.iter().map(options).collect(), ..Self::default() }
    }

    fn child(&self, edge: &Arc<Edge>) -> Arc<Node> {
        self.moved.get(&id(edge)).cloned().unwrap_or_else(|| edge.node())
    }

    /// The edges to the children, and the nodes that they will lead to.
    pub fn children(&self, node: &Arc<Node>) -> Vec<(Arc<Edge>, Arc<Node>)> {
        let mut edges = node.children();
        edges.retain(|edge| !self.removed.contains(&id(edge)));
        edges.extend(self.new_children.get(&id(node)).into_iter().flatten().cloned());
        edges.into_iter().map(|edge| (Arc::clone(&edge), self.child(&edge))).collect()
    }

    fn parents(&self, node: &Arc<Node>) -> Vec<Arc<Edge>> {
        let mut edges = node.parents();
        edges.retain(|edge| !self.removed.contains(&id(edge)) && id(&self.child(edge)) == id(node));
        edges.extend(self.new_parents.get(&id(node)).into_iter().flatten().cloned());
        edges
    }

    fn options(&self, node: &Arc<Node>) -> Arc<NodeOptions> {
        self.options.get(&id(node)).cloned().unwrap_or_else(|| node.options())
    }

    /// Whether the node gets options.
    pub fn is_reopened(&self, node: &Arc<Node>) -> bool {
        self.options.contains_key(&id(node))
    }

    /// Whether `to` is `from` or below it.
    pub fn reaches(&self, from: &Arc<Node>, to: &Arc<Node>) -> bool {
        let mut seen = HashSet::new();
        let mut todo = vec![Arc::clone(from)];
        while let Some(node) = todo.pop() {
            if Arc::ptr_eq(&node, to) {
                return true;
            }
            if seen.insert(id(&node)) {
                todo.extend(self.children(&node).into_iter().map(|(_, child)| child));
            }
        }
        false
    }
}

/// Computes the permissions of everything below `roots`, with those of the edges in `set` as given, in the graph of
/// `overlay` and with what drivers have prepared.
///
/// # Errors
/// A conflict, or a node that cannot be written to; the message names it.
pub(super) fn plan(
    roots: &[Arc<Node>],
    set: &[(Arc<Edge>, Perms)],
    overlay: &Overlay,
    prepared: &[(Arc<Node>, Box<dyn Prepared + '_>)],
) -> Result<Plan> {
    let prepared: HashMap<usize, &dyn Prepared> = prepared.iter().map(|(node, new)| (id(node), &**new)).collect();
    let mut perms: HashMap<usize, Perms> = set.iter().map(|(edge, perms)| (id(edge), *perms)).collect();
    let mut edges = set.to_vec();
    let mut nodes = Vec::new();
    for node in parents_first(roots, overlay) {
        let users = overlay.parents(&node);
        let active = !overlay.options(&node).inactive;
        let claims: Vec<_> = users
            .iter()
            .map(|edge| {
                let perms = match (perms.get(&id(edge)), &edge.parent) {
                    (Some(perms), _) => *perms,
                    (None, Parent::Node(_)) => edge.perms(),
                    (None, Parent::Disk(disk)) => {
                        let wanted = disk.upgrade().map_or_else(|| edge.perms(), |disk| disk.wanted);
                        let perms = if active { wanted } else { Perms::default() };
                        edges.push((Arc::clone(edge), perms));
                        perms
                    }
                };
                Claim { who: edge.parent_label(), child: edge.name(), perms }
            })
            .collect();
        if let Some(text) = conflict(node.name(), &claims) {
            return Err(Error::generic(text));
        }
        let all = claims.iter().fold(Perms::default(), |all, claim| all.with(claim.perms));
        check_writable(&node, all, overlay)?;
        for (edge, to) in overlay.children(&node) {
            if active && overlay.options(&to).inactive {
                let (child, name, parent) = (to.name(), edge.name(), node.name());
                return Err(Error::generic(format!("Inactive '{child}' can't be a {name} child of active '{parent}'")));
            }
            let new = prepared.get(&id(&node)).and_then(|new| new.child_perms(&edge, all));
            let mut child = new.unwrap_or_else(|| node.driver().child_perms(&edge, all));
            if !active {
                child = Perms::default();
            }
            if overlay.options(&to).force_share {
                child.shared = Bits::ALL;
            }
            perms.insert(id(&edge), child);
            edges.push((edge, child));
        }
        nodes.push((node, all));
    }
    Ok(Plan { edges, nodes })
}

fn check_writable(node: &Arc<Node>, all: Perms, overlay: &Overlay) -> Result<()> {
    if !all.writes() {
        return Ok(());
    }
    if overlay.options(node).read_only {
        return Err(Error::generic(if node.options().read_only {
            "Block node is read-only".to_owned()
        } else {
            format!("Read-only block node '{}' cannot support read-write users", node.name())
        }));
    }
    let align = u64::from(node.facts().request_align);
    if !all.need.contains(Bits::RESIZE) && !node.size().is_multiple_of(align) {
        return Err(Error::generic(
            "Cannot get 'write' permission without 'resize': Image size is not a multiple of request alignment",
        ));
    }
    Ok(())
}

/// All nodes below and including `roots`, each after all its parents among them.
fn parents_first(roots: &[Arc<Node>], overlay: &Overlay) -> Vec<Arc<Node>> {
    enum Step {
        Enter(Arc<Node>),
        Leave(Arc<Node>),
    }
    let mut seen = HashSet::new();
    let mut order = Vec::new();
    let mut todo: Vec<Step> = roots.iter().cloned().map(Step::Enter).collect();
    while let Some(step) = todo.pop() {
        match step {
            Step::Enter(node) => {
                if seen.insert(id(&node)) {
                    let children = overlay.children(&node);
                    todo.push(Step::Leave(node));
                    todo.extend(children.into_iter().map(|(_, child)| Step::Enter(child)));
                }
            }
            Step::Leave(node) => order.push(node),
        }
    }
    order.reverse();
    order
}

impl Plan {
    /// Gets what the new permissions need of every node that they change for, and of those that `also` chooses.
    ///
    /// # Errors
    /// A driver could not get what it needs; nothing has changed then.
    pub async fn prepare(self, also: impl Fn(&Arc<Node>) -> bool) -> Result<PreparedPlan> {
        let Self { edges, nodes } = self;
        let changed: Vec<_> =
            nodes.iter().filter(|(node, all)| node.user_perms() != *all || also(node)).cloned().collect();
        for (i, (node, all)) in changed.iter().enumerate() {
            if let Err(error) = node.driver().prepare_perms(*all).await {
                for (node, _) in changed.iter().take(i) {
                    node.driver().abort_perms();
                }
                return Err(error);
            }
        }
        Ok(PreparedPlan { edges, nodes, changed })
    }

    /// Gets what the new permissions need, then puts them in force.
    ///
    /// # Errors
    /// A driver could not get what it needs; nothing has changed then.
    pub async fn carry_out(self) -> Result<()> {
        self.prepare(|_| false).await?.commit();
        Ok(())
    }
}

/// Permissions for which everything is there. One of the two methods must be called.
#[must_use = "prepared permissions are committed or aborted"]
pub(super) struct PreparedPlan {
    edges: Vec<(Arc<Edge>, Perms)>,
    nodes: Vec<(Arc<Node>, Perms)>,
    changed: Vec<(Arc<Node>, Perms)>,
}

impl PreparedPlan {
    /// Puts them in force.
    pub fn commit(self) {
        for (edge, perms) in &self.edges {
            edge.set_perms(*perms);
        }
        for (node, all) in &self.changed {
            node.driver().commit_perms();
            node.set_user_perms(*all);
        }
        self.nodes.iter().for_each(|(node, _)| look_up(node));
        // Facts flow upwards: a descriptor that was opened again may ask for another alignment.
        for (node, _) in self.nodes.iter().rev() {
            node.refresh_facts();
        }
    }

    /// Back to those before.
    pub fn abort(self) {
        for (node, _) in &self.changed {
            node.driver().abort_perms();
        }
    }
}

/// Finds out whether a user of `node` stays when this process dies. Its parents know already whether theirs do.
fn look_up(node: &Arc<Node>) {
    let outlives = |edge: &Arc<Edge>| match &edge.parent {
        Parent::Disk(disk) => disk.upgrade().is_some_and(|disk| disk.outlives.load(Ordering::Relaxed)),
        // What is only read through cannot lose anything.
        Parent::Node(_) => edge.role() != Role::Backing && edge.parent_node().is_some_and(|node| node.is_outlived()),
    };
    node.set_outlived(node.parents().iter().any(outlives));
}

/// Has everything below `node`, and `node`, find out whether its users stay when this process dies.
pub(super) fn look_up_below(node: &Arc<Node>) {
    parents_first(std::slice::from_ref(node), &Overlay::default()).iter().for_each(look_up);
}

/// Recomputes after a user of `node` has gone: there is less to hold, so a failure only means that a lock stays.
pub(super) async fn loosen(node: &Arc<Node>) {
    if let Ok(plan) = plan(std::slice::from_ref(node), &[], &Overlay::default(), &[]) {
        let _ = plan.carry_out().await;
    }
}

impl Edge {
    /// Who holds this edge, as messages name it.
    pub fn parent_label(&self) -> String {
        match &self.parent {
            Parent::Disk(disk) => disk.upgrade().map_or_else(String::new, |disk| disk.label.clone()),
            Parent::Node(node) => {
                let node = node.get().and_then(Weak::upgrade);
                node.map_or_else(String::new, |node| format!("node '{}'", node.name()))
            }
        }
    }

    /// The node that holds this edge; none if it is the root of an export or a job.
    pub fn parent_node(&self) -> Option<Arc<Node>> {
        match &self.parent {
            Parent::Disk(_) => None,
            Parent::Node(node) => node.get().and_then(Weak::upgrade),
        }
    }
}
