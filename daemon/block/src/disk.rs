//! [`Disk`]: what an export or a job holds of the graph.
//!
//! It is the root edge of a node with the things that belong to a user and not to the node: the gate that a drain closes,
//! permissions, statistics of this user, whether its writes are cached. Made and taken back by
//! [`Graph`](crate::Graph); its requests may come from any thread.

use crate::driver::{Span, WriteFlags, ZeroFlags};
use crate::edge::{Edge, Parent, Role};
use crate::gate::{Entered, Gate};
use crate::halt::{Halt, OnError};
use crate::node::Node;
use crate::perm::Perms;
use crate::report::Reporter;
use crate::stats::{Op, Stats};
use crate::status::{self, Status};
use crate::{Facts, IoResult};
use buf::IoBuf;
use nix::errno::Errno;
use std::fmt;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// Called with the new length in bytes after a resize. On the control task, while nothing is in flight: it only notes.
pub type OnResize = Box<dyn Fn(u64) + Send + Sync>;

/// What a user wants of its node.
#[derive(Debug, Clone)]
pub struct DiskOptions {
    /// Who, as messages have it: `block export 'e'`.
    pub label: String,
    /// What it needs and shares.
    pub perms: Perms,
    /// Each write is on stable storage before it completes.
    pub writethrough: bool,
}

/// The part that the graph and the user share.
pub(crate) struct Inner {
    pub edge: Arc<Edge>,
    pub gate: Gate,
    pub label: String,
    writethrough: bool,
    /// What the user needs and shares while its node is active.
    pub wanted: Perms,
    /// The user can do with a node that is not active, though it wants to write.
    pub allow_inactive: bool,
    /// The user stays when this process dies.
    pub outlives: AtomicBool,
    reporter: Reporter,
    stats: Stats,
    halt: Halt,
    /// Guards the listeners. Control task and set-up only, never across an await.
    on_resize: Mutex<Vec<OnResize>>,
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Disk({} on {})", self.label, self.edge.node().name())
    }
}

impl Inner {
    pub fn resized(&self, size: u64) {
        for listener in self.on_resize.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            listener(size);
        }
    }
}

/// A user's handle; clones are the same user.
#[derive(Clone, Debug)]
pub struct Disk {
    pub(crate) inner: Arc<Inner>,
}

impl Disk {
    pub(crate) fn new(node: Arc<Node>, options: &DiskOptions, allow_inactive: bool, reporter: Reporter) -> Self {
        let inner = Arc::new_cyclic(|me| Inner {
            edge: Arc::new(Edge::new("root", Role::Root, node, Parent::Disk(me.clone()))),
            gate: Gate::default(),
            label: options.label.clone(),
            writethrough: options.writethrough,
            wanted: options.perms,
            allow_inactive,
            outlives: AtomicBool::new(false),
            reporter,
            stats: Stats::default(),
            halt: Halt::default(),
            on_resize: Mutex::default(),
        });
        Self { inner }
    }

    /// The node at the root.
    pub fn node(&self) -> Arc<Node> {
        self.inner.edge.node()
    }

    /// Facts of the root node.
    pub fn facts(&self) -> Arc<Facts> {
        self.inner.edge.facts()
    }

    /// Length in bytes.
    pub fn size(&self) -> u64 {
        self.inner.edge.size()
    }

    /// What this user needs and shares.
    pub fn perms(&self) -> Perms {
        self.inner.edge.perms()
    }

    /// Where the user reports what clients are to be told, such as requests that failed.
    pub fn reporter(&self) -> &Reporter {
        &self.inner.reporter
    }

    /// Whether each write is on stable storage before it completes.
    pub fn is_writethrough(&self) -> bool {
        self.inner.writethrough
    }

    /// Counters of this user's requests.
    pub fn stats(&self) -> &Stats {
        &self.inner.stats
    }

    /// Says what becomes of requests that fail; without it the user gets each error. Every error is reported as an event then,
    /// with `name` as the device.
    pub fn handle_errors(&self, name: String, policy: OnError) {
        self.inner.halt.set(name, policy);
    }

    /// Requests that wait after an error.
    pub fn waiting(&self) -> usize {
        self.inner.halt.waiting()
    }

    /// Lets requests that wait after an error try again.
    pub fn resume(&self) {
        self.inner.halt.resume();
    }

    /// The user is about to go: requests that wait after an error fail, and none waits from now on.
    pub fn give_up(&self) {
        self.inner.halt.end();
    }

    /// Has `listener` called after each resize, for as long as the disk lives.
    pub fn on_resize(&self, listener: OnResize) {
        self.inner.on_resize.lock().unwrap_or_else(PoisonError::into_inner).push(listener);
    }

    /// Passes the gate and checks the bounds behind it, where the length cannot change any more.
    async fn enter(&self, op: Op, span: Span) -> IoResult<Entered<'_>> {
        let entered = self.inner.gate.enter().await;
        match span.at.checked_add(span.len) {
            Some(end) if end <= self.size() => Ok(entered),
            _ => {
                self.inner.stats.refused(op);
                Err(Errno::EIO)
            }
        }
    }

    async fn request(&self, op: Op, span: Span, work: impl AsyncFn(&Node) -> IoResult) -> IoResult {
        loop {
            let started = Instant::now();
            let entered = self.enter(op, span).await?;
            let node = self.inner.edge.node();
            let result = work(&node).await;
            let ended = Instant::now();
            for stats in [&self.inner.stats, node.stats()] {
                stats.took(op, started, ended);
            }
            let bytes = if op == Op::Flush { 0 } else { span.len };
            self.inner.stats.done(op, bytes, result.is_ok());
            drop(entered);
            match result {
                Ok(()) => return Ok(()),
                Err(errno) if !self.failed(op, errno, &node).await => return Err(errno),
                Err(_) => {}
            }
        }
    }

    /// After an error, which is rare: whether to try again.
    async fn failed(&self, op: Op, errno: Errno, node: &Node) -> bool {
        Box::pin(self.inner.halt.try_again(op, errno, node.name(), &self.inner.reporter)).await
    }

    /// Fills `buf` with the bytes from `at`.
    ///
    /// # Errors
    /// `EIO` beyond the end; else the errno of the node.
    pub async fn read(&self, at: u64, buf: &IoBuf) -> IoResult {
        self.request(Op::Read, span(at, buf), async |node| node.read(at, buf).await).await
    }

    /// Writes `buf` at `at`.
    ///
    /// # Errors
    /// `EIO` beyond the end; else the errno of the node.
    pub async fn write(&self, at: u64, buf: &IoBuf, flags: WriteFlags) -> IoResult {
        let flags = WriteFlags { fua: flags.fua || self.inner.writethrough };
        self.request(Op::Write, span(at, buf), async |node| node.write(at, buf, flags).await).await
    }

    /// Writes `buf` at `at` in a form that takes less space, see [`Node::write_compressed`].
    ///
    /// # Errors
    /// `EIO` beyond the end; else the errno of the node.
    pub async fn write_compressed(&self, at: u64, buf: &IoBuf) -> IoResult {
        self.request(Op::Write, span(at, buf), async |node| {
            node.write_compressed(at, buf).await?;
            if self.inner.writethrough { node.flush().await } else { Ok(()) }
        })
        .await
    }

    /// Makes `span` read as zero.
    ///
    /// # Errors
    /// `EIO` beyond the end; `ENOTSUP` with `no_fallback` where it would be slow; else the errno of the node.
    pub async fn zero(&self, span: Span, flags: ZeroFlags) -> IoResult {
        let flags = ZeroFlags { fua: flags.fua || self.inner.writethrough, ..flags };
        self.request(Op::Write, span, async |node| node.zero(span, flags).await).await
    }

    /// The bytes of `span` are not needed any more.
    ///
    /// # Errors
    /// `EIO` beyond the end; else the errno of the node.
    pub async fn discard(&self, span: Span) -> IoResult {
        self.request(Op::Unmap, span, async |node| node.discard(span).await).await
    }

    /// All requests of this disk that completed before are on stable storage when it returns.
    ///
    /// # Errors
    /// The errno of the node.
    pub async fn flush(&self) -> IoResult {
        self.request(Op::Flush, Span::new(0, 0), async |node| node.flush().await).await
    }

    /// What lies at the start of `span`, over the whole chain below.
    ///
    /// # Errors
    /// `EIO` beyond the end; else the errno of a node.
    pub async fn status(&self, span: Span) -> IoResult<Status> {
        let _entered = self.enter(Op::Read, span).await?;
        status::of(&self.inner.edge.node(), span).await
    }
}

fn span(at: u64, buf: &IoBuf) -> Span {
    Span::new(at, u64::try_from(buf.len()).unwrap_or(u64::MAX))
}
