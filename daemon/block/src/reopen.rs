//! What a driver does about a change of its options or of its children: three facets of [`Driver`](crate::Driver).
//!
//! The graph changes in one transaction (see [`Change`](crate::graph::Change)): every driver prepares, permissions are
//! computed and prepared, the disks above are drained, and only when nothing can fail any more is all of it committed. A
//! driver never sees a change of which it has not been asked before.

use crate::driver::LocalFuture;
use crate::edge::{Edge, Role};
use crate::node::{Node, NodeOptions};
use crate::perm::Perms;
use crate::resource::Resources;
use qapi::Result;
use qapi::types::block::BlockdevDriverOptions;
use std::sync::Arc;

/// The options that a node is to get.
pub struct NewOptions<'a> {
    /// The common options in force.
    pub before: &'a NodeOptions,
    /// The common options that are to be in force.
    pub after: &'a NodeOptions,
    /// The driver's own options, all of them: what is not given has its default. References to children are not to be read
    /// here, but with [`NewOptions::child`].
    pub driver: &'a BlockdevDriverOptions,
    pub(crate) children: &'a [(Arc<Edge>, Arc<Node>)],
    /// The objects that options can name.
    pub resources: &'a Resources,
}

impl NewOptions<'_> {
    /// The node that the child of that name will be; none if there will be no such child.
    pub fn child(&self, name: &str) -> Option<&Arc<Node>> {
        self.children.iter().find(|(edge, _)| edge.name() == name).map(|(_, node)| node)
    }
}

/// The facet of a driver some of whose own options can change, or that has something to do when common options do
/// (`read-only`, `cache.direct`). Drivers without it keep their own options; common options change all the same.
pub trait Reopen: Send + Sync {
    /// The names of the driver's options that can change, such as `offset`. For all others the core makes sure that they
    /// stay as they are. Children are the core's affair.
    fn mutable(&self) -> &'static [&'static str];

    /// Gets everything that the new options need. Requests run meanwhile, and see nothing of it.
    ///
    /// What follows when all drivers are prepared: [`Driver::prepare_perms`](crate::Driver::prepare_perms) of this driver (in
    /// any case, even with unchanged permissions), [`Prepared::drained`], and then
    /// [`Driver::commit_perms`](crate::Driver::commit_perms) and [`Prepared::commit`] in this order. When one of them fails,
    /// `abort_perms`, if `prepare_perms` succeeded; and the result is dropped.
    fn prepare<'a>(&'a self, new: &'a NewOptions<'_>) -> LocalFuture<'a, Result<Box<dyn Prepared + 'a>>>;
}

/// Options that are ready to be put in force. Dropping it takes everything back.
pub trait Prepared {
    /// [`Driver::child_perms`](crate::Driver::child_perms) as it will be with the new options, where that makes a difference.
    fn child_perms(&self, child: &Edge, of_node: Perms) -> Option<Perms> {
        let _ = (child, of_node);
        None
    }

    /// Nothing is in flight above the node any more, and its writes have been flushed: the last chance to fail.
    fn drained(&mut self) -> LocalFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    /// The new options hold. Cannot fail; nothing is in flight.
    fn commit(self: Box<Self>);
}

/// The facet of a format whose images can have a backing file.
pub trait Backing: Send + Sync {
    /// The name that the image has for it, as it stands there; none if it names none.
    fn named(&self) -> Option<String>;

    /// Whether `node` (none: nothing) can be what backs the image from now on.
    ///
    /// # Errors
    /// Why it cannot.
    fn check(&self, node: Option<&Arc<Node>>) -> Result<()> {
        let _ = node;
        Ok(())
    }

    /// The image names another backing file from now on; nothing is opened or moved. Nothing is in flight.
    ///
    /// The name or the format does not fit into the image, or it cannot be written; it is as it was then.
    fn rename<'a>(&'a self, name: &'a str, format: &'a str) -> LocalFuture<'a, Result<()>>;

    /// This is the edge to the backing file from now on. Cannot fail; nothing is in flight.
    fn set(&self, edge: Option<Arc<Edge>>);
}

/// The facet of a driver whose children can be added and removed one by one (`x-blockdev-change`).
pub trait ChildList: Send + Sync {
    /// The name and the role of one more child.
    ///
    /// # Errors
    /// There can be no more.
    fn next(&self) -> Result<(String, Role)>;

    /// Whether this child can go.
    ///
    /// # Errors
    /// It is needed.
    fn may_remove(&self, child: &Edge) -> Result<()>;

    /// These are the children from now on. Cannot fail; nothing is in flight.
    fn set(&self, children: &[Arc<Edge>]);
}
