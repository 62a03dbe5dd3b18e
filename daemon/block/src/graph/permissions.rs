//! Permissions of a part of the graph, on paper first, then for real.

use crate::edge::{Edge, Parent};
use crate::node::Node;
use crate::perm::{Bits, Claim, Perms, conflict};
use qapi::{Error, Result};
use std::collections::HashMap;
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

/// Computes the permissions of everything below `roots`, with those of the edges in `set` as given.
///
/// # Errors
/// A conflict, or a node that cannot be written to; the message names it.
pub(super) fn plan(roots: &[Arc<Node>], set: &[(Arc<Edge>, Perms)]) -> Result<Plan> {
    let mut perms: HashMap<usize, Perms> = set.iter().map(|(edge, perms)| (id(edge), *perms)).collect();
    let mut edges = set.to_vec();
    let mut nodes = Vec::new();
    for node in parents_first(roots) {
        let users = node.parents();
        let claims: Vec<_> = users
            .iter()
            .map(|edge| {
                let perms = perms.get(&id(edge)).copied().unwrap_or_else(|| edge.perms());
                Claim { who: edge.parent_label(), child: edge.name(), perms }
            })
            .collect();
        if let Some(text) = conflict(node.name(), &claims) {
            return Err(Error::generic(text));
        }
        let all = claims.iter().fold(Perms::default(), |all, claim| all.with(claim.perms));
        check_writable(&node, all)?;
        for edge in node.children() {
            let mut child = node.driver().child_perms(&edge, all);
            if edge.node().options().force_share {
                child.shared = Bits::ALL;
            }
            perms.insert(id(&edge), child);
            edges.push((edge, child));
        }
        nodes.push((node, all));
    }
    Ok(Plan { edges, nodes })
}

fn check_writable(node: &Node, all: Perms) -> Result<()> {
    if !all.writes() {
        return Ok(());
    }
    if node.options().read_only {
        return Err(Error::generic("Block node is read-only"));
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
fn parents_first(roots: &[Arc<Node>]) -> Vec<Arc<Node>> {
    enum Step {
        Enter(Arc<Node>),
        Leave(Arc<Node>),
    }
    let mut seen = std::collections::HashSet::new();
    let mut order = Vec::new();
    let mut todo: Vec<Step> = roots.iter().cloned().map(Step::Enter).collect();
    while let Some(step) = todo.pop() {
        match step {
            Step::Enter(node) => {
                if seen.insert(id(&node)) {
                    let children = node.children();
                    todo.push(Step::Leave(node));
                    todo.extend(children.iter().map(|edge| Step::Enter(edge.node())));
                }
            }
            Step::Leave(node) => order.push(node),
        }
    }
    order.reverse();
    order
}

impl Plan {
    /// Gets what the new permissions need, then puts them in force.
    ///
    /// # Errors
    /// A driver could not get what it needs; nothing has changed then.
    pub async fn carry_out(self) -> Result<()> {
        let changed: Vec<_> = self.nodes.iter().filter(|(node, all)| node.user_perms() != *all).collect();
        for (i, (node, all)) in changed.iter().enumerate() {
            if let Err(error) = node.driver().prepare_perms(*all).await {
                for (node, _) in changed.iter().take(i) {
                    node.driver().abort_perms();
                }
                return Err(error);
            }
        }
        for (edge, perms) in &self.edges {
            edge.set_perms(*perms);
        }
        for (node, all) in &changed {
            node.driver().commit_perms();
            node.set_user_perms(*all);
        }
        // Facts flow upwards: a descriptor that was opened again may ask for another alignment.
        for (node, _) in self.nodes.iter().rev() {
            node.refresh_facts();
        }
        Ok(())
    }
}

/// Recomputes after a user of `node` has gone: there is less to hold, so a failure only means that a lock stays.
pub(super) async fn loosen(node: &Arc<Node>) {
    if let Ok(plan) = plan(std::slice::from_ref(node), &[]) {
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
