//! [`Edge`]: the link from a parent to a child node.
//!
//! The child is read on every request and replaced only by the control task, while no request is in flight above the
//! edge. Requests take a counted snapshot of it, without a lock. Permissions are the control task's alone.

use crate::driver::{Mapping, Prealloc, Span, WriteFlags, ZeroFlags};
use crate::node::Node;
use crate::perm::Perms;
use crate::{Facts, IoResult};
use arc_swap::ArcSwap;
use buf::IoBuf;
use qapi::types::block_filters::BlkdebugEvent;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

/// What a child is to its parent: decides what it inherits and how status is walked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The node of an export or a job; its parent is no node.
    Root,
    /// The parent shows the child's bytes, perhaps shifted, and adds behaviour.
    Filtered,
    /// The parent stores a format of its own in the child (metadata and, unless there is a data file, data).
    Image,
    /// The parent keeps only guest data in the child.
    Data,
    /// What the parent does not store shows through from the child.
    Backing,
}

/// Who holds an edge.
#[derive(Debug)]
pub(crate) enum Parent {
    /// A node; set once the node is made, for children are opened before their parent exists.
    Node(OnceLock<Weak<Node>>),
    /// An export or a job.
    Disk(Weak<crate::disk::Inner>),
}

/// A parent's use of a node.
pub struct Edge {
    name: String,
    role: Role,
    child: ArcSwap<Node>,
    /// Whether the child wants to hear of events.
    hears: AtomicBool,
    pub(crate) parent: Parent,
    /// How many rely on it that the edge keeps leading to its child.
    frozen: AtomicU32,
    /// Guards the permissions that were committed last. Control task only, never across an await.
    perms: Mutex<Perms>,
}

impl fmt::Debug for Edge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Edge({} -> {})", self.name, self.child.load().name())
    }
}

impl Edge {
    pub(crate) fn new(name: &str, role: Role, child: Arc<Node>, parent: Parent) -> Self {
        Self {
            name: name.to_owned(),
            role,
            hears: AtomicBool::new(child.hears_events()),
            child: ArcSwap::new(child),
            parent,
            frozen: AtomicU32::new(0),
            perms: Mutex::new(Perms::default()),
        }
    }

    /// The parent's name of this child: `file`, `backing`, `root`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the child is to the parent.
    pub fn role(&self) -> Role {
        self.role
    }

    /// The node at the lower end, as of now. It cannot change under a request that is in flight.
    pub fn node(&self) -> Arc<Node> {
        self.child.load_full()
    }

    /// Leads to another node from now on. Control task, with nothing in flight above.
    pub(crate) fn set_node(&self, node: Arc<Node>) {
        self.hears.store(node.hears_events(), Ordering::Release);
        self.child.store(node);
    }

    /// The edge must lead where it leads, until [`Edge::thaw`]; nests. For jobs, on the control task.
    pub fn freeze(&self) {
        self.frozen.fetch_add(1, Ordering::Relaxed);
    }

    /// Takes one [`Edge::freeze`] back.
    pub fn thaw(&self) {
        self.frozen.fetch_sub(1, Ordering::Relaxed);
    }

    /// Whether it must not be moved.
    pub fn is_frozen(&self) -> bool {
        self.frozen.load(Ordering::Relaxed) > 0
    }

    /// What the parent needs and shares, as committed last.
    pub fn perms(&self) -> Perms {
        *self.perms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set_perms(&self, perms: Perms) {
        *self.perms.lock().unwrap_or_else(PoisonError::into_inner) = perms;
    }

    /// Facts of the child.
    pub fn facts(&self) -> Arc<Facts> {
        self.child.load().facts()
    }

    /// Length of the child in bytes.
    pub fn size(&self) -> u64 {
        self.child.load().size()
    }

    /// [`Node::is_complete`] of the child.
    #[inline]
    pub fn is_complete(&self) -> bool {
        self.child.load().is_complete()
    }

    /// [`Node::raise`] on the child.
    #[inline]
    pub fn raise(&self, event: BlkdebugEvent) {
        if self.hears.load(Ordering::Acquire) {
            self.child.load().raise(event);
        }
    }

    /// [`Node::read`] on the child. Over a backing link it goes down a chain of nodes at once, see
    /// [`Driver::read_through`](crate::Driver::read_through).
    ///
    /// # Errors
    /// The errno of the node.
    pub async fn read(&self, at: u64, buf: &IoBuf) -> IoResult {
        match self.role {
            Role::Backing => Node::read_down(self.node(), at, buf).await,
            _ => self.node().read(at, buf).await,
        }
    }

    /// [`Node::write`] on the child.
    ///
    /// # Errors
    /// The errno of the node.
    pub async fn write(&self, at: u64, buf: &IoBuf, flags: WriteFlags) -> IoResult {
        self.node().write(at, buf, flags).await
    }

    /// [`Node::write_compressed`] on the child.
    ///
    /// # Errors
    /// The errno of the node.
    pub async fn write_compressed(&self, at: u64, buf: &IoBuf) -> IoResult {
        self.node().write_compressed(at, buf).await
    }

    /// [`Node::zero`] on the child.
    ///
    /// # Errors
    /// The errno of the node.
    pub async fn zero(&self, span: Span, flags: ZeroFlags) -> IoResult {
        self.node().zero(span, flags).await
    }

    /// [`Node::discard`] on the child.
    ///
    /// # Errors
    /// The errno of the node.
    pub async fn discard(&self, span: Span) -> IoResult {
        self.node().discard(span).await
    }

    /// [`Node::flush`] on the child.
    ///
    /// # Errors
    /// The errno of the node.
    pub async fn flush(&self) -> IoResult {
        let node = self.node();
        node.raise(BlkdebugEvent::FlushToOs);
        node.raise(BlkdebugEvent::FlushToDisk);
        node.flush().await
    }

    /// [`Node::truncate`] on the child, for a driver whose own truncation it is.
    ///
    /// # Errors
    /// Those of the node.
    pub async fn truncate(&self, size: u64, exact: bool, prealloc: Prealloc) -> qapi::Result<()> {
        self.node().truncate(size, exact, prealloc).await
    }

    /// [`Node::map`] on the child.
    ///
    /// # Errors
    /// The errno of the node.
    pub async fn map(&self, span: Span, precise: bool) -> IoResult<Mapping> {
        self.node().map(span, precise).await
    }
}
