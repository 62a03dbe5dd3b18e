//! Opens the nodes of a `blockdev-add`, aside of the graph, and takes them in when all of them stand.

use super::permissions::Overlay;
use super::{CreateContext, Graph, link, permissions, unlink_children};
use crate::driver::{DynDriver, LocalFuture};
use crate::edge::{Edge, Parent, Role};
use crate::node::{DetectZeroes, Node, NodeOptions};
use crate::report::Reporter;
use crate::reservation::ManagerUse;
use crate::throttle;
use nix::errno::Errno;
use qapi::opts::is_identifier;
use qapi::types::block::{BlockdevDetectZeroesOptions, BlockdevDiscardOptions, BlockdevOptions, BlockdevRef};
use qapi::types::create::BlockdevCreateOptions;
use qapi::{Error, Result};
use std::sync::{Arc, OnceLock};

/// The longest node name in bytes; QEMU's limit.
const MAX_NAME: usize = 31;
/// Nodes inside each other's options, or named by each other's images, at most: ends chains of images that loop.
const MAX_NESTING: u32 = 120;

/// The table of drivers: turns the options of a node into a driver.
pub trait Opener: Send + Sync {
    /// Opens the driver that `options` name, and its children through `cx`.
    ///
    /// The errors are the driver's; what was opened is released when they are returned.
    fn open<'a>(
        &'a self,
        cx: &'a mut OpenContext<'_>,
        options: &'a BlockdevOptions,
    ) -> LocalFuture<'a, Result<Box<dyn DynDriver>>>;

    /// Makes the image that `options` describe, in nodes that it gets through `cx`.
    ///
    /// The errors are the driver's. An image that is not complete is not one: what is left of it cannot be opened.
    fn create<'a>(
        &'a self,
        cx: &'a mut dyn CreateContext,
        options: &'a BlockdevCreateOptions,
    ) -> LocalFuture<'a, Result<()>>;
}

/// What a driver gets to open itself with.
pub struct OpenContext<'g> {
    graph: &'g mut Graph,
    /// The name that the node being opened will have.
    name: Arc<str>,
    /// Common options of the node being opened, as in force: given, inherited or default.
    pub options: NodeOptions,
    children: Vec<Arc<Edge>>,
    /// Those children that are defined inside the node being opened.
    own: Vec<Arc<Node>>,
    nesting: u32,
    /// All nodes opened so far for this command, children before parents.
    opened: Vec<Arc<Node>>,
}

impl std::fmt::Debug for OpenContext<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OpenContext").field("options", &self.options).field("children", &self.children).finish()
    }
}

impl OpenContext<'_> {
    /// Finds or opens the child that a driver's options name.
    ///
    /// # Errors
    /// No such node, or the errors of the child's driver.
    pub async fn child(&mut self, name: &str, role: Role, child: &BlockdevRef) -> Result<Arc<Edge>> {
        let node = match child {
            BlockdevRef::Reference(name) => match self.opened.iter().find(|node| node.name() == name) {
                Some(node) => Arc::clone(node),
                None => self.graph.find(Some(name), Some(name))?,
            },
            BlockdevRef::Definition(options) => {
                let inherited = inherit(&self.options, role);
                if self.nesting == MAX_NESTING {
                    return Err(Error::generic(format!("More than {MAX_NESTING} nodes below each other")));
                }
                self.nesting += 1;
                let outer_name = Arc::clone(&self.name);
                let outer_options = std::mem::take(&mut self.options);
                let outer_children = std::mem::take(&mut self.children);
                let outer_own = std::mem::take(&mut self.own);
                let node = Box::pin(self.open_node(options, &inherited, false)).await;
                self.name = outer_name;
                self.options = outer_options;
                self.children = outer_children;
                self.own = outer_own;
                self.nesting -= 1;
                let node = node?;
                self.own.push(Arc::clone(&node));
                node
            }
        };
        let edge = Arc::new(Edge::new(name, role, node, Parent::Node(OnceLock::new())));
        self.children.push(Arc::clone(&edge));
        Ok(edge)
    }

    /// The name of the node that is being opened, for its reports.
    pub fn node_name(&self) -> Arc<str> {
        Arc::clone(&self.name)
    }

    /// Where the driver reports what clients are to be told, from any thread.
    pub fn reporter(&self) -> Reporter {
        self.graph.reporter.clone()
    }

    /// The manager of persistent reservations of that id.
    ///
    /// # Errors
    /// There is no such object, or it is of another type.
    pub fn reservation_manager(&self, id: &str) -> Result<ManagerUse> {
        self.graph.resources().reservation_manager(id)
    }

    /// The throttle group of that id.
    ///
    /// # Errors
    /// There is none.
    pub fn throttle_group(&self, id: &str) -> Result<Arc<throttle::Group>> {
        self.graph.resources().throttle_group(id)
    }

    /// A node that exists or has been opened for the same command.
    pub fn find(&self, name: &str) -> Option<Arc<Node>> {
        let opened = self.opened.iter().find(|node| node.name() == name);
        opened.or_else(|| self.graph.get(name)).cloned()
    }

    /// Opens a child that no option names, but the content of an image: the one gate for such openings.
    ///
    /// # Errors
    /// Policy does not allow it (see [`Graph::allow_implicit_opens`]), or the errors of the child's driver.
    pub async fn implicit_child(&mut self, name: &str, role: Role, child: BlockdevOptions) -> Result<Arc<Edge>> {
        if !self.graph.implicit_opens {
            return Err(Error::generic(format!(
                "Files that an image names are not opened here: give '{name}' as an option"
            )));
        }
        let edge = self.child(name, role, &BlockdevRef::Definition(Box::new(child))).await?;
        edge.node().links().implicit = true;
        Ok(edge)
    }

    pub(super) async fn open_node(
        &mut self,
        options: &BlockdevOptions,
        inherited: &NodeOptions,
        root: bool,
    ) -> Result<Arc<Node>> {
        let name = self.choose_name(options.node_name.as_deref(), root)?;
        self.name = name.as_str().into();
        self.options = effective(options, inherited)?;
        let opener = Arc::clone(&self.graph.opener);
        let driver = opener.open(self, options).await?;
        self.make_node(name, driver, Some(Arc::new(options.clone()))).await
    }

    /// A node of an open driver, linked to its children but not in the graph yet.
    async fn make_node(
        &mut self,
        name: String,
        driver: Box<dyn DynDriver>,
        given: Option<Arc<BlockdevOptions>>,
    ) -> Result<Arc<Node>> {
        let length = match driver.length().await {
            Ok(length) => length,
            Err(errno) => {
                driver.close().await;
                return Err(cannot_tell_length(&name, errno));
            }
        };
        let children = std::mem::take(&mut self.children);
        let node = Arc::new(Node::new(name, driver, self.options.clone(), length, children, self.reporter()));
        node.links().given = given;
        for edge in node.children() {
            if let Parent::Node(parent) = &edge.parent {
                let _ = parent.set(Arc::downgrade(&node));
            }
            link(&edge);
        }
        for child in self.own.drain(..) {
            child.links().owner = Arc::downgrade(&node);
        }
        self.opened.push(Arc::clone(&node));
        Ok(node)
    }

    fn choose_name(&mut self, given: Option<&str>, root: bool) -> Result<String> {
        let Some(name) = given else {
            if root {
                return Err(Error::generic("'node-name' must be specified for the root node"));
            }
            loop {
                let name = format!("#block{:03}", self.graph.next_auto_name);
                self.graph.next_auto_name += 1;
                if self.graph.get(&name).is_none() {
                    return Ok(name);
                }
            }
        };
        if !is_identifier(name) {
            return Err(Error::generic(format!("Invalid node-name: '{name}'")));
        }
        if self.graph.get(name).is_some() || self.opened.iter().any(|node| node.name() == name) {
            return Err(Error::generic(format!("Duplicate nodes with node-name='{name}'")));
        }
        if name.len() > MAX_NAME {
            return Err(Error::generic("Node name too long"));
        }
        Ok(name.to_owned())
    }

    /// The commit of an addition: permissions, then names.
    pub(super) async fn take_in(mut self, root: Result<Arc<Node>>) -> Result<Arc<Node>> {
        let done = match root {
            Ok(root) => match permissions::plan(std::slice::from_ref(&root), &[], &Overlay::default(), &[]) {
                Ok(plan) => plan.carry_out().await.map(|()| root),
                Err(error) => Err(error),
            },
            Err(error) => Err(error),
        };
        let done = match done {
            Ok(root) => self.start().await.map(|()| root),
            Err(error) => Err(error),
        };
        match done {
            Ok(root) => {
                for node in std::mem::take(&mut self.opened) {
                    let owned = Arc::ptr_eq(&node, &root);
                    self.graph.insert(node, owned);
                }
                Ok(root)
            }
            Err(error) => {
                self.give_up().await;
                Err(error)
            }
        }
    }

    /// Lets the drivers write what they have to, children first.
    async fn start(&self) -> Result<()> {
        for node in self.opened.iter().filter(|node| node.is_active()) {
            node.driver().start().await?;
        }
        Ok(())
    }

    /// Closes what was opened, parents first; nobody has seen it.
    async fn give_up(self) {
        for node in self.opened.iter().rev() {
            node.driver().close().await;
            for child in unlink_children(node) {
                permissions::loosen(&child).await;
            }
        }
    }
}

fn cannot_tell_length(name: &str, errno: Errno) -> Error {
    Error::io(format!("Could not get the length of node '{name}'"), errno.into())
}

/// What a child that is defined inside its parent's options takes from it, where it says nothing itself.
pub(super) fn inherit(parent: &NodeOptions, role: Role) -> NodeOptions {
    NodeOptions {
        read_only: parent.read_only || role == Role::Backing,
        auto_read_only: parent.auto_read_only && role != Role::Backing,
        force_share: parent.force_share,
        direct: parent.direct,
        no_flush: parent.no_flush,
        // Whether discards come down is decided above.
        discard: role != Role::Backing,
        detect_zeroes: DetectZeroes::Off,
        inactive: parent.inactive,
    }
}

pub(super) fn effective(given: &BlockdevOptions, inherited: &NodeOptions) -> Result<NodeOptions> {
    let cache = given.cache.as_ref();
    let options = NodeOptions {
        read_only: given.read_only.unwrap_or(inherited.read_only),
        auto_read_only: given.auto_read_only.unwrap_or(inherited.auto_read_only),
        force_share: given.force_share.unwrap_or(inherited.force_share),
        direct: cache.and_then(|c| c.direct).unwrap_or(inherited.direct),
        no_flush: cache.and_then(|c| c.no_flush).unwrap_or(inherited.no_flush),
        discard: given.discard.map_or(inherited.discard, |d| d == BlockdevDiscardOptions::Unmap),
        detect_zeroes: given.detect_zeroes.map_or(inherited.detect_zeroes, |d| match d {
            BlockdevDetectZeroesOptions::Off => DetectZeroes::Off,
            BlockdevDetectZeroesOptions::On => DetectZeroes::On,
            BlockdevDetectZeroesOptions::Unmap => DetectZeroes::Unmap,
        }),
        inactive: given.active.map_or(inherited.inactive, |active| !active),
    };
    if options.detect_zeroes == DetectZeroes::Unmap && !options.discard {
        return Err(Error::generic(
            "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
        ));
    }
    if options.force_share && !options.read_only {
        return Err(Error::generic("force-share=on can only be used with read-only images"));
    }
    Ok(options)
}

impl Graph {
    /// Opens a node and its inline children and takes them in.
    ///
    /// # Errors
    /// A bad or taken name, the errors of the drivers, a conflict of permissions. Nothing has changed then.
    pub async fn add(&mut self, options: &BlockdevOptions) -> Result<Arc<Node>> {
        let mut cx = self.open_context(NodeOptions::default());
        let root = cx.open_node(options, &NodeOptions::default(), true).await;
        cx.take_in(root).await
    }

    /// Takes in a node without children whose driver is already open.
    ///
    /// # Errors
    /// A bad or taken name, a driver that cannot tell its length. The driver is closed then.
    pub async fn adopt(&mut self, name: &str, driver: Box<dyn DynDriver>, options: NodeOptions) -> Result<Arc<Node>> {
        let mut cx = self.open_context(options);
        let root = match cx.choose_name(Some(name), true) {
            Ok(name) => cx.make_node(name, driver, None).await,
            Err(error) => {
                driver.close().await;
                Err(error)
            }
        };
        cx.take_in(root).await
    }

    /// Whether files that only an image names (a backing file, a data file) are opened. They are unless this is called.
    pub fn allow_implicit_opens(&mut self, allow: bool) {
        self.implicit_opens = allow;
    }

    pub(super) fn open_context(&mut self, options: NodeOptions) -> OpenContext<'_> {
        OpenContext {
            graph: self,
            name: "".into(),
            options,
            children: Vec::new(),
            own: Vec::new(),
            nesting: 0,
            opened: Vec::new(),
        }
    }
}
