//! [`Node`]: a driver in the graph, and the one place where requests are checked, aligned, split, emulated, serialised and
//! counted. Drivers do none of that.
//!
//! The fast path is a request that already fits the driver's facts: it is handed on as it is. The rest is in
//! [`request`](self): what does not fit is cut at the alignment; ends are bounced, and written by read-modify-write under
//! a reservation of the touched units.

mod request;

use crate::driver::{DynDriver, Facts, Prealloc};
use crate::edge::Edge;
use crate::overlap::Overlap;
use crate::perm::{Bits, Perms};
use crate::report::{Report, Reporter};
use crate::stats::Stats;
use arc_swap::ArcSwap;
use qapi::types::block::BlockdevOptions;
use qapi::types::block_event::BlockWriteThreshold;
use qapi::types::block_filters::BlkdebugEvent;
use qapi::{Error, Result};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// What to do with writes of nothing but zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum DetectZeroes {
    /// Write them like others.
    #[default]
    Off,
    /// Turn them into zero requests.
    On,
    /// The same, and let space be given back.
    Unmap,
}

/// Options that every node has, as in force.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct NodeOptions {
    /// Never written to.
    pub read_only: bool,
    /// Falls back to read-only where writing is not possible.
    pub auto_read_only: bool,
    /// Others may do with the image what they like, also write to it.
    pub force_share: bool,
    /// `cache.direct`: past the host's page cache.
    pub direct: bool,
    /// `cache.no-flush`: flushes are not passed on.
    pub no_flush: bool,
    /// `discard=unmap`: discards are passed on, and zeroes may give space back.
    pub discard: bool,
    /// `detect-zeroes`.
    pub detect_zeroes: DetectZeroes,
    /// `active=off`: the image may be another process's at the moment. It is not written to, and not locked.
    pub inactive: bool,
}

/// The links of a node, changed by the control task alone.
#[derive(Default)]
pub(crate) struct Links {
    pub parents: Vec<Weak<Edge>>,
    pub children: Vec<Arc<Edge>>,
    /// Those of all parents together, as the driver has been told.
    pub perms: Perms,
    /// The options that the node was made from, or reopened with last; none if its driver came ready.
    pub given: Option<Arc<BlockdevOptions>>,
    /// The node inside whose options this one was made: it inherits options from there while it is its child.
    pub owner: Weak<Node>,
    /// It was opened because its owner's image names it.
    pub implicit: bool,
}

/// A driver in the graph.
pub struct Node {
    name: String,
    driver: Box<dyn DynDriver>,
    /// Whether the driver wants to hear of events.
    hears: bool,
    options: ArcSwap<NodeOptions>,
    facts: ArcSwap<Facts>,
    /// Transfers below this many bytes fit the facts, wherever they are; 0 where alignment matters.
    fitting: AtomicU64,
    /// Length in bytes, a multiple of 512 (a shorter last sector reads as zero after its end).
    size: AtomicU64,
    /// The `need` bits of all users together.
    needed: AtomicU8,
    /// Some user stays when this process dies, see [`crate::Driver::outlived`].
    outlived: AtomicBool,
    /// Writes that have completed, starting at 1 so that the first flush always reaches the medium: what an earlier
    /// process wrote and did not flush becomes durable with it.
    written: AtomicU64,
    /// The value of `written` at the start of the last flush that succeeded.
    flushed: AtomicU64,
    corrupt: AtomicBool,
    write_threshold: AtomicU64,
    reporter: Reporter,
    overlap: Overlap,
    stats: Stats,
    /// Guards the links. Control task only, never across an await.
    links: Mutex<Links>,
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Node({} {})", self.name, self.driver.name())
    }
}

/// The greatest length in bytes: the largest offset of a file, in whole gibibytes below the sign.
pub const MAX_LENGTH: u64 = (1 << 63) - (1 << 30);

/// Lengths are shown in whole sectors, as every user of the format knows them.
pub(crate) fn whole_sectors(len: u64) -> u64 {
    len.checked_next_multiple_of(512).unwrap_or(u64::MAX - 511)
}

impl Node {
    /// A node that is in no graph yet. `length` is the driver's, in bytes.
    pub(crate) fn new(
        name: String,
        driver: Box<dyn DynDriver>,
        options: NodeOptions,
        length: u64,
        children: Vec<Arc<Edge>>,
        reporter: Reporter,
    ) -> Self {
        let facts = driver.facts();
        Self {
            name,
            hears: driver.hears_events(),
            driver,
            options: ArcSwap::from_pointee(options),
            fitting: AtomicU64::new(request::fitting(&facts)),
            facts: ArcSwap::from_pointee(facts),
            size: AtomicU64::new(whole_sectors(length)),
            needed: AtomicU8::new(0),
            outlived: AtomicBool::new(false),
            written: AtomicU64::new(1),
            flushed: AtomicU64::new(0),
            corrupt: AtomicBool::new(false),
            write_threshold: AtomicU64::new(0),
            reporter,
            overlap: Overlap::default(),
            stats: Stats::default(),
            links: Mutex::new(Links { children, ..Links::default() }),
        }
    }

    /// The node name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The driver.
    pub fn driver(&self) -> &dyn DynDriver {
        &*self.driver
    }

    /// Tells the driver of something that is done to this node, if it wants to hear.
    #[inline]
    pub fn raise(&self, event: BlkdebugEvent) {
        if self.hears {
            self.driver.event(event);
        }
    }

    /// Whether the driver wants to hear of events.
    pub(crate) fn hears_events(&self) -> bool {
        self.hears
    }

    /// The common options in force.
    pub fn options(&self) -> Arc<NodeOptions> {
        self.options.load_full()
    }

    /// The driver's facts, as of the last change.
    pub fn facts(&self) -> Arc<Facts> {
        self.facts.load_full()
    }

    /// [`Facts::complete`], for the path of a request.
    #[inline]
    pub fn is_complete(&self) -> bool {
        self.facts.load().complete
    }

    /// Length in bytes.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Counters of the requests that reached this node.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Whether damage has been found in the image; set for good by [`Node::mark_corrupt`].
    pub fn is_corrupt(&self) -> bool {
        self.corrupt.load(Ordering::Acquire)
    }

    /// Marks the image as damaged.
    pub fn mark_corrupt(&self) {
        self.corrupt.store(true, Ordering::Release);
    }

    /// The edges to the children, in the order in which they were opened.
    pub fn children(&self) -> Vec<Arc<Edge>> {
        self.links().children.clone()
    }

    /// The edges of all users.
    pub fn parents(&self) -> Vec<Arc<Edge>> {
        self.links().parents.iter().filter_map(Weak::upgrade).collect()
    }

    /// What all users together need and share, as the driver has been told.
    pub fn user_perms(&self) -> Perms {
        self.links().perms
    }

    /// The options that the node was made from, or reopened with last; none if its driver came ready.
    pub fn given(&self) -> Option<Arc<BlockdevOptions>> {
        self.links().given.clone()
    }

    /// The node inside whose options this one was made.
    pub(crate) fn owner(&self) -> Option<Arc<Node>> {
        self.links().owner.upgrade()
    }

    /// Whether `child` was opened for this node because its image names it, and no option did.
    pub fn opened_implicitly(self: &Arc<Self>, child: &Arc<Node>) -> bool {
        let links = child.links();
        links.implicit && links.owner.upgrade().is_some_and(|owner| Arc::ptr_eq(&owner, self))
    }

    /// Whether the image is this process's to use.
    pub fn is_active(&self) -> bool {
        !self.options.load().inactive
    }

    pub(crate) fn set_active(&self, active: bool) {
        let options = NodeOptions { inactive: !active, ..(*self.options()).clone() };
        self.options.store(Arc::new(options));
    }

    /// The offset in bytes beyond which a write is reported, once; 0 is none.
    pub fn write_threshold(&self) -> u64 {
        self.write_threshold.load(Ordering::Relaxed)
    }

    /// Has the next write that goes beyond `threshold` bytes reported; 0 has none.
    pub fn set_write_threshold(&self, threshold: u64) {
        self.write_threshold.store(threshold, Ordering::Relaxed);
    }

    /// Reports a write up to `end` if it goes beyond the threshold, which is gone with it.
    pub(crate) fn check_threshold(&self, end: u64) {
        let threshold = self.write_threshold.load(Ordering::Relaxed);
        let first =
            || self.write_threshold.compare_exchange(threshold, 0, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        if threshold > 0 && end > threshold && first() {
            self.reporter.report(Report::WriteThreshold(BlockWriteThreshold {
                node_name: self.name.clone(),
                amount_exceeded: end - threshold,
                write_threshold: threshold,
            }));
        }
    }

    /// The next flush reaches the medium even if nothing is written until then: what is below has changed.
    pub(crate) fn must_flush(&self) {
        self.written.fetch_add(1, Ordering::AcqRel);
    }

    /// Puts options in force. Control task, with nothing in flight.
    pub(crate) fn set_options(&self, options: NodeOptions, given: Arc<BlockdevOptions>) {
        self.options.store(Arc::new(options));
        self.links().given = Some(given);
    }

    pub(crate) fn links(&self) -> MutexGuard<'_, Links> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set_user_perms(&self, perms: Perms) {
        self.links().perms = perms;
        self.needed.store(perms.need.bits(), Ordering::Release);
    }

    /// Whether some user stays when this process dies.
    pub fn is_outlived(&self) -> bool {
        self.outlived.load(Ordering::Acquire)
    }

    /// Control task.
    pub(crate) fn set_outlived(&self, outlived: bool) {
        if self.outlived.swap(outlived, Ordering::AcqRel) != outlived {
            self.driver.outlived(outlived);
        }
    }

    pub(crate) fn needed(&self) -> Bits {
        Bits::from_bits(self.needed.load(Ordering::Acquire))
    }

    /// Takes a new length from the driver, in bytes. Control task, with nothing in flight.
    pub(crate) fn set_length(&self, length: u64) {
        self.size.store(whole_sectors(length), Ordering::Release);
    }

    /// Takes new facts from the driver. Control task.
    pub(crate) fn refresh_facts(&self) {
        let facts = self.driver.facts();
        self.fitting.store(request::fitting(&facts), Ordering::Release);
        self.facts.store(Arc::new(facts));
    }

    /// Sets the length, in bytes. The graph has drained all users and tells them afterwards.
    ///
    /// # Errors
    /// The node is read-only, `size` is out of range, or the driver's error.
    pub async fn truncate(&self, size: u64, exact: bool, prealloc: Prealloc) -> Result<()> {
        if self.options.load().read_only {
            return Err(Error::generic("Image is read-only"));
        }
        if size > MAX_LENGTH {
            return Err(Error::generic(format!(
                "Required too big image size, it must be not greater than {MAX_LENGTH}"
            )));
        }
        let result = self.driver.truncate(size, exact, prealloc).await;
        // Also after a failure: it may have come half-way.
        if let Ok(length) = self.driver.length().await {
            self.set_length(length);
        }
        self.written.fetch_add(1, Ordering::AcqRel);
        result
    }
}
