//! `blockdev-reopen`: options of existing nodes, turned into a [`Change`].
//!
//! All options are given anew: what is left out goes back to its default. Children are named, defined again (those that
//! were made inside their parent only) or, as a backing file, `null`.

use super::Graph;
use super::change::{Change, NewNode};
use super::open::{effective, inherit};
use crate::edge::{Edge, Role};
use crate::node::{Node, NodeOptions};
use qapi::types::block::BlockdevOptions;
use qapi::{Error, Qapi, Result, Value};
use std::collections::HashMap;
use std::sync::Arc;

/// Options that all drivers have, and that can change with every driver.
const COMMON: [&str; 7] =
    ["read-only", "auto-read-only", "force-share", "discard", "detect-zeroes", "cache.direct", "cache.no-flush"];

/// One call of the command.
struct Batch<'g> {
    graph: &'g Graph,
    /// What the user gave, by identity of the node.
    explicit: HashMap<usize, (Arc<Node>, Arc<BlockdevOptions>)>,
    /// Nodes that have their new options, and where they are in `change`.
    done: HashMap<usize, usize>,
    change: Change,
}

fn id(node: &Arc<Node>) -> usize {
    Arc::as_ptr(node).addr()
}

impl Graph {
    /// Gives the nodes that `list` names new options, all or none.
    ///
    /// # Errors
    /// No such node, an option that cannot change, and those of [`Graph::change`]. Nothing has changed then.
    pub async fn reopen(&mut self, list: Vec<BlockdevOptions>) -> Result<()> {
        let mut batch =
            Batch { graph: self, explicit: HashMap::new(), done: HashMap::new(), change: Change::default() };
        let mut nodes = Vec::with_capacity(list.len());
        for options in list {
            let name = options.node_name.as_deref().ok_or_else(|| Error::generic("node-name not specified"))?;
            let missing = || Error::generic(format!("Failed to find node with node-name='{name}'"));
            let node = Arc::clone(batch.graph.get(name).ok_or_else(missing)?);
            batch.explicit.insert(id(&node), (Arc::clone(&node), Arc::new(options)));
            nodes.push(node);
        }
        for node in nodes {
            batch.reopen_named(&node)?;
        }
        let change = batch.change;
        self.change(change).await
    }
}

impl Graph {
    /// Makes a node read-only, or writable again, and what was made inside it likewise. Nothing happens to a node that is so.
    ///
    /// # Errors
    /// Those of [`Graph::change`]. Nothing has changed then.
    pub async fn set_read_only(&mut self, node: &Arc<Node>, read_only: bool) -> Result<()> {
        let Some(given) = node.given().filter(|_| node.options().read_only != read_only) else { return Ok(()) };
        let given = Arc::new(BlockdevOptions { read_only: Some(read_only), ..(*given).clone() });
        let inherited = owner(node).map_or_else(NodeOptions::default, |(owner, role)| inherit(&owner.options(), role));
        let mut batch =
            Batch { graph: self, explicit: HashMap::new(), done: HashMap::new(), change: Change::default() };
        batch.keep(node, &given, &inherited)?;
        let change = batch.change;
        self.change(change).await
    }
}

/// What the new options say of a child.
enum Child {
    /// Nothing.
    Unsaid,
    /// Nothing is to be there.
    Null,
    /// A node by name.
    Named(String),
    /// Options.
    Defined(Box<BlockdevOptions>),
}

/// `options` as members of one level, `file.filename` for a member of a member, in their order.
fn flatten(options: &BlockdevOptions) -> Vec<(String, Value)> {
    fn walk(prefix: &str, value: Value, out: &mut Vec<(String, Value)>) {
        let key = |name: &str| if prefix.is_empty() { name.to_owned() } else { format!("{prefix}.{name}") };
        match value {
            Value::Object(members) => members.into_iter().for_each(|(name, value)| walk(&key(&name), value, out)),
            Value::Array(list) => {
                list.into_iter().enumerate().for_each(|(n, value)| walk(&key(&n.to_string()), value, out));
            }
            value => out.push((prefix.to_owned(), value)),
        }
    }
    let mut out = Vec::new();
    walk("", options.to_value(), &mut out);
    out
}

/// Whether the member `key` is `child` or one of its options.
fn is_of(key: &str, child: &str) -> bool {
    key.strip_prefix(child).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// What `options` say of the child of that name: a member, or an element of a list as `children.0`.
fn child_option(options: &Value, name: &str) -> Result<Child> {
    let mut value = options;
    for part in name.split('.') {
        let member = match value {
            Value::Array(list) => part.parse().ok().and_then(|n: usize| list.get(n)),
            value => value.get(part),
        };
        let Some(member) = member else { return Ok(Child::Unsaid) };
        value = member;
    }
    Ok(match value {
        Value::Null => Child::Null,
        Value::String(name) => Child::Named(name.clone()),
        value => Child::Defined(Box::new(BlockdevOptions::from_value(value)?)),
    })
}

impl Batch<'_> {
    /// A node that the user named: after the node whose options its own inherit, if that is reopened too.
    fn reopen_named(&mut self, node: &Arc<Node>) -> Result<()> {
        if self.done.contains_key(&id(node)) {
            return Ok(());
        }
        let Some((node, given)) = self.explicit.get(&id(node)).cloned() else { return Ok(()) };
        let mut inherited = NodeOptions::default();
        if let Some((owner, role)) = owner(&node) {
            self.reopen_named(&owner)?;
            // It may have been defined again with its owner.
            if self.done.contains_key(&id(&node)) {
                return Ok(());
            }
            inherited = inherit(&self.options_of(&owner), role);
        }
        self.reopen(&node, given, &inherited)
    }

    /// The options that a node has or will have.
    fn options_of(&self, node: &Arc<Node>) -> NodeOptions {
        let new = self.done.get(&id(node)).and_then(|at| self.change.reopened.get(*at));
        new.map_or_else(|| (*node.options()).clone(), |new| new.options.clone())
    }

    fn reopen(&mut self, node: &Arc<Node>, given: Arc<BlockdevOptions>, inherited: &NodeOptions) -> Result<()> {
        let Some(before) = node.given() else {
            return Err(Error::generic(format!("Node '{}' was not made from options", node.name())));
        };
        let options = renewed(node, &given, inherited)?;
        let json = given.to_value();
        let mut handled = Vec::new();
        if let Some(facet) = node.driver().backing() {
            let has = node.children().iter().any(|edge| edge.role() == Role::Backing);
            if (has || facet.named().is_some()) && matches!(child_option(&json, "backing")?, Child::Unsaid) {
                return Err(Error::generic(format!("backing is missing for '{}'", node.name())));
            }
        }
        let mut children = Vec::new();
        for edge in node.children() {
            let said = child_option(&json, edge.name())?;
            let own = owner(&edge.node()).is_some_and(|(owner, _)| Arc::ptr_eq(&owner, node));
            match &said {
                Child::Null if edge.role() == Role::Backing => self.change.set_backing(node, None)?,
                Child::Named(name) if name != edge.node().name() => {
                    let to = self.graph.find(None, Some(name))?;
                    if edge.role() == Role::Backing {
                        self.change.set_backing(node, Some(&to))?;
                    } else {
                        self.change.move_edge(&edge, &to);
                    }
                }
                // Nothing else can be said of such a child: the comparison below finds it.
                Child::Null | Child::Defined(_) if !own => continue,
                Child::Null => continue,
                Child::Named(_) | Child::Unsaid | Child::Defined(_) => {
                    if own {
                        children.push((Arc::clone(&edge), said));
                    }
                }
            }
            handled.push(edge.name().to_owned());
        }
        if !handled.iter().any(|name| name == "backing") && node.driver().backing().is_some() {
            match child_option(&json, "backing")? {
                Child::Null => handled.push("backing".to_owned()),
                Child::Named(name) => {
                    let to = self.graph.find(None, Some(&name))?;
                    self.change.set_backing(node, Some(&to))?;
                    handled.push("backing".to_owned());
                }
                Child::Unsaid => handled.push("backing".to_owned()),
                Child::Defined(_) => {}
            }
        }
        check_fixed(node, &before, &given, &handled)?;
        let new = NewNode { node: Arc::clone(node), given, options: options.clone() };
        match self.done.get(&id(node)).and_then(|at| self.change.reopened.get_mut(*at)) {
            Some(old) => *old = new,
            None => {
                self.done.insert(id(node), self.change.reopened.len());
                self.change.reopened.push(new);
            }
        }
        for (edge, said) in children {
            let child = edge.node();
            let inherited = inherit(&options, edge.role());
            match said {
                Child::Defined(given) => {
                    let named = BlockdevOptions {
                        node_name: given.node_name.clone().or(Some(child.name().to_owned())),
                        ..*given
                    };
                    self.reopen(&child, Arc::new(named), &inherited)?;
                }
                // As it was, but what it inherits may have changed.
                _ if self.explicit.contains_key(&id(&child)) => {}
                _ => {
                    if let Some(given) = child.given()
                        && renewed(&child, &given, &inherited)? != *child.options()
                    {
                        self.keep(&child, &given, &inherited)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// A child that stays as it is except for what it inherits, and its own children likewise.
    fn keep(&mut self, node: &Arc<Node>, given: &Arc<BlockdevOptions>, inherited: &NodeOptions) -> Result<()> {
        let options = renewed(node, given, inherited)?;
        self.done.insert(id(node), self.change.reopened.len());
        let new = NewNode { node: Arc::clone(node), given: Arc::clone(given), options: options.clone() };
        self.change.reopened.push(new);
        for edge in node.children() {
            let child = edge.node();
            let own = owner(&child).is_some_and(|(owner, _)| Arc::ptr_eq(&owner, node));
            if own
                && !self.explicit.contains_key(&id(&child))
                && let Some(given) = child.given()
            {
                let inherited = inherit(&options, edge.role());
                if renewed(&child, &given, &inherited)? != *child.options() {
                    self.keep(&child, &given, &inherited)?;
                }
            }
        }
        Ok(())
    }
}

/// The options that a node will have; whether it is active is no affair of options once it is there.
fn renewed(node: &Arc<Node>, given: &BlockdevOptions, inherited: &NodeOptions) -> Result<NodeOptions> {
    Ok(NodeOptions { inactive: node.options().inactive, ..effective(given, inherited)? })
}

/// The node inside whose options `node` was made, and what it is to it, as long as it is its child.
fn owner(node: &Arc<Node>) -> Option<(Arc<Node>, Role)> {
    let owner = node.owner()?;
    let edge = node.parents().into_iter().find(|edge| is_parent(edge, &owner))?;
    let role = edge.role();
    Some((owner, role))
}

fn is_parent(edge: &Edge, node: &Arc<Node>) -> bool {
    edge.parent_node().is_some_and(|parent| Arc::ptr_eq(&parent, node))
}

/// Makes sure that everything stays that cannot change.
fn check_fixed(node: &Arc<Node>, before: &BlockdevOptions, after: &BlockdevOptions, children: &[String]) -> Result<()> {
    let mutable = node.driver().reopen().map_or(&[] as &[_], |facet| facet.mutable());
    let may_change = |key: &str| {
        COMMON.contains(&key)
            || mutable.iter().any(|name| is_of(key, name))
            || children.iter().any(|child| is_of(key, child))
    };
    let (before, after) = (flatten(before), flatten(after));
    let find =
        |list: &[(String, Value)], key: &str| list.iter().find(|(name, _)| name == key).map(|(_, value)| value.clone());
    for (key, value) in after.iter().filter(|(key, _)| !may_change(key)) {
        let same = match key.as_str() {
            "node-name" => value.as_str() == Some(node.name()),
            // As it is now, whatever it was at first: `blockdev-set-active` changes it.
            "active" => value.as_bool() == Some(node.is_active()),
            key => find(&before, key).as_ref() == Some(value),
        };
        if !same {
            return Err(Error::generic(format!("Cannot change the option '{key}'")));
        }
    }
    let stays = |key: &str| may_change(key) || ["node-name", "active"].contains(&key);
    for (key, _) in before.iter().filter(|(key, _)| !stays(key)) {
        if find(&after, key).is_none() {
            return Err(Error::generic(format!("Option '{key}' cannot be reset to its default value")));
        }
    }
    Ok(())
}
