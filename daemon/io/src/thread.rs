//! IOThreads: one OS thread, one event loop, one io_uring, one bounded pool for calls that block.
//!
//! An [`IoThread`] is a handle; the thread owns its runtime, its ring and its tasks. The process's first thread can become
//! one as well ([`run_main`]). Nothing in here blocks the loop.

use crate::polling::{Poller, Polling, SharedPolling, note_event};
use crate::pool::Pool;
use crate::ring::Ring;
use crate::threads::{self, Role};
use crate::writer::Mailbox;
use std::cell::{Cell, RefCell};
use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use tokio::runtime::{Builder, LocalOptions, LocalRuntime};
use tokio::sync::{Notify, mpsc, oneshot, watch};

/// How an IOThread is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Params {
    /// Threads for blocking calls that stay when idle (`thread-pool-min`).
    pub thread_pool_min: usize,
    /// The most threads for blocking calls, at least 1 (`thread-pool-max`).
    pub thread_pool_max: usize,
    /// How long to look for events before sleeping.
    pub polling: Polling,
    /// Operations that gather before they are given to the kernel, at most (`aio-max-batch`); 0 is no limit but the ring's.
    pub max_batch: u32,
    /// Whether to try io_uring.
    pub ring: RingUse,
}

impl Default for Params {
    fn default() -> Self {
        Self { thread_pool_min: 0, thread_pool_max: 64, polling: Polling::default(), max_batch: 0, ring: RingUse::Auto }
    }
}

/// Whether an IOThread tries to set up an io_uring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingUse {
    /// Use it where the kernel offers it, blocking calls on the pool elsewhere.
    Auto,
    /// Always use the pool.
    Off,
}

/// The IOThread was stopped and takes no more tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stopped;

impl fmt::Display for Stopped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the iothread is stopped")
    }
}

impl std::error::Error for Stopped {}

type Start = Box<dyn FnOnce() -> Pin<Box<dyn Future<Output = ()>>> + Send>;

/// A handle to an IOThread. The thread ends when the last handle is dropped or [`stop`](Self::stop) was called, and its
/// tasks have ended.
pub struct IoThread {
    name: String,
    pool: Pool,
    tuning: Tuning,
    ring_error: Option<io::Error>,
    /// Takes new tasks; none once stopped. Held for a push, never across an await.
    tasks: Mutex<Option<mpsc::UnboundedSender<Start>>>,
    /// Closed when the thread's tasks ended and its ring is gone.
    ended: watch::Receiver<()>,
}

impl fmt::Debug for IoThread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoThread")
            .field("name", &self.name)
            .field("ring_error", &self.ring_error)
            .finish_non_exhaustive()
    }
}

/// What can be changed while the thread runs; clones are handles to the same.
#[derive(Clone, Debug)]
struct Tuning {
    polling: Arc<SharedPolling>,
    max_batch: Arc<AtomicU32>,
}

impl Tuning {
    fn new(params: Params) -> Self {
        let polling = Arc::<SharedPolling>::default();
        polling.set(params.polling);
        Self { polling, max_batch: Arc::new(AtomicU32::new(params.max_batch)) }
    }
}

/// What the thread itself knows.
struct Local {
    ring: Option<Rc<Ring>>,
    poller: Rc<Poller>,
    pool: Pool,
    mailbox: Arc<Mailbox>,
    handle: Weak<IoThread>,
}

/// Bytes of address space for the stack: a request nests once for each node of a chain of backing files.
const STACK: usize = 16 << 20;

thread_local! {
    static LOCAL: RefCell<Option<Local>> = const { RefCell::new(None) };
}

fn with_local<T>(f: impl FnOnce(&Local) -> T) -> Option<T> {
    LOCAL.try_with(|local| local.try_borrow().ok()?.as_ref().map(f)).ok()?
}

/// The ring of the calling thread.
pub(crate) fn current_ring() -> Option<Rc<Ring>> {
    with_local(|local| local.ring.clone())?
}

/// The pool of the calling thread, the process's common one if it is no IOThread.
pub(crate) fn current_pool() -> Pool {
    with_local(|local| local.pool.clone()).unwrap_or_else(Pool::shared)
}

/// The mailbox of the calling thread, none if it is no IOThread.
pub(crate) fn current_mailbox() -> Option<Arc<Mailbox>> {
    with_local(|local| Arc::clone(&local.mailbox))
}

/// The poller of the calling thread.
pub(crate) fn current_poller() -> Option<Rc<Poller>> {
    with_local(|local| Rc::clone(&local.poller))
}

fn before_park() {
    if let Some(ring) = current_ring() {
        ring.turn();
    }
    crate::fuse_ring::before_park();
    // After the rings, which may have found something.
    if let Some(poller) = current_poller() {
        poller.before_park();
    }
}

fn after_park() {
    if let Some(poller) = current_poller() {
        poller.after_park();
    }
}

/// Runtime, ring and pool of the calling thread; taken down in the right order when dropped.
struct Loop {
    /// Dropped by hand, before the ring.
    runtime: Option<LocalRuntime>,
    pool: Pool,
}

impl Loop {
    fn new(name: &str, params: Params, tuning: &Tuning) -> io::Result<(Self, Option<io::Error>)> {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .thread_name(name)
            .on_thread_park(before_park)
            .on_thread_unpark(after_park)
            .build_local(LocalOptions::default())?;
        let pool = Pool::new(name, params.thread_pool_min, params.thread_pool_max);
        let (ring, error) = match params.ring {
            RingUse::Off => (None, Some(io::Error::new(io::ErrorKind::Unsupported, "switched off"))),
            RingUse::Auto => match Ring::new(Arc::clone(&tuning.max_batch)) {
                Ok(ring) => (Some(ring), None),
                Err(e) => (None, Some(e)),
            },
        };
        let poller = Rc::new(Poller::new(Arc::clone(&tuning.polling)));
        let local = Local { ring, poller, pool: pool.clone(), mailbox: Arc::default(), handle: Weak::new() };
        LOCAL.with(|place| place.replace(Some(local)));
        Ok((Self { runtime: Some(runtime), pool }, error))
    }

    fn run<T>(&self, main: impl Future<Output = T>) -> io::Result<T> {
        let runtime = self.runtime.as_ref().ok_or_else(|| io::Error::other("the loop has ended"))?;
        runtime.block_on(async {
            if let Some(mailbox) = current_mailbox() {
                tokio::task::spawn_local(async move { mailbox.deliver().await });
            }
            if let Some(poller) = current_poller() {
                tokio::task::spawn_local(async move { poller.serve().await });
            }
            if let Some(ring) = current_ring() {
                tokio::task::spawn_local(async move {
                    // It only ends if epoll refuses the descriptor; then the park hook alone serves the ring, which can
                    // sleep through a completion, so the ring is taken out of use before the first operation.
                    if ring.serve().await.is_err() {
                        LOCAL.with(|place| place.borrow_mut().as_mut().map(|local| local.ring.take()));
                    }
                });
                tokio::task::yield_now().await;
            }
            Ok(main.await)
        })
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        // Tasks first: they may hold operations, which the ring then waits for.
        drop(self.runtime.take());
        let local = LOCAL.with(|place| place.take());
        drop(local);
        self.pool.close();
    }
}

/// Counts tasks, so that the thread can wait for the last one.
#[derive(Default)]
struct Live {
    count: Cell<usize>,
    none: Notify,
}

struct LiveGuard(Rc<Live>);

impl LiveGuard {
    fn new(live: &Rc<Live>) -> Self {
        live.count.set(live.count.get() + 1);
        Self(Rc::clone(live))
    }
}

impl Drop for LiveGuard {
    fn drop(&mut self) {
        let left = self.0.count.get().saturating_sub(1);
        self.0.count.set(left);
        if left == 0 {
            self.0.none.notify_one();
        }
    }
}

/// Starts the tasks that arrive, until no more can; then waits until all have ended.
async fn take_tasks(mut tasks: mpsc::UnboundedReceiver<Start>) {
    let live = Rc::new(Live::default());
    while let Some(start) = tasks.recv().await {
        note_event();
        let guard = LiveGuard::new(&live);
        let task = start();
        tokio::task::spawn_local(async move {
            task.await;
            drop(guard);
        });
    }
    while live.count.get() > 0 {
        live.none.notified().await;
    }
}

impl IoThread {
    /// Starts a thread that carries `name` (the system shows its first 15 bytes).
    ///
    /// # Errors
    /// The system has no thread or descriptors for it. A missing io_uring is not an error, see
    /// [`ring_error`](Self::ring_error).
    pub fn start(name: &str, params: Params) -> io::Result<Arc<Self>> {
        let (tell, told) = std::sync::mpsc::channel();
        let (tasks, new_tasks) = mpsc::unbounded_channel();
        let (alive, ended) = watch::channel(());
        let thread_name = name.to_owned();
        let tuning = Tuning::new(params);
        let its_tuning = tuning.clone();
        threads::spawn_unlimited(name, Some(STACK), move || {
            // Dropped last, when runtime, ring and tasks are gone.
            let _alive = alive;
            let made = Loop::new(&thread_name, params, &its_tuning);
            // The ring was the last thing that needs more than the role has.
            match threads::enter(Role::IoThread).and(made) {
                Ok((this, ring_error)) => {
                    let (hand_over, handle) = std::sync::mpsc::channel();
                    if tell.send(Ok((this.pool.clone(), ring_error, hand_over))).is_err() {
                        return;
                    }
                    if let Ok(handle) = handle.recv() {
                        set_handle(handle);
                    }
                    // The loop was just made, so it runs.
                    let _ = this.run(take_tasks(new_tasks));
                }
                Err(e) => {
                    // Nobody waits only if the starting thread is gone.
                    let _ = tell.send(Err(e));
                }
            }
        })?;
        let (pool, ring_error, hand_over) =
            told.recv().map_err(|_| io::Error::other("the iothread ended while it started"))??;
        let this =
            Arc::new(Self { name: name.to_owned(), pool, tuning, ring_error, tasks: Mutex::new(Some(tasks)), ended });
        hand_over.send(Arc::downgrade(&this)).map_err(|_| io::Error::other("the iothread ended while it started"))?;
        Ok(this)
    }

    /// The IOThread that the caller runs on.
    pub fn current() -> Option<Arc<Self>> {
        with_local(|local| local.handle.upgrade())?
    }

    /// The name it was started with.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Why this thread works without an io_uring, none if it has one.
    pub fn ring_error(&self) -> Option<&io::Error> {
        self.ring_error.as_ref()
    }

    /// Changes `thread-pool-min` and `thread-pool-max`; surplus threads end when idle.
    pub fn set_thread_pool(&self, min: usize, max: usize) {
        self.pool.set_limits(min, max);
    }

    /// Changes how long the thread looks for events before it sleeps. It holds from the thread's next look on.
    pub fn set_polling(&self, polling: Polling) {
        self.tuning.polling.set(polling);
    }

    /// Changes how many operations gather before they are given to the kernel, at most; 0 is no limit but the ring's.
    pub fn set_max_batch(&self, max: u32) {
        self.tuning.max_batch.store(max, Ordering::Relaxed);
    }

    /// Runs the future that `start` makes on this thread. `start` itself runs there too, so the future need not be `Send`.
    ///
    /// [`stop`](Self::stop) waits for it; a task that it spawns by itself with `spawn_local` is dropped when the thread ends,
    /// so it has to wait for such tasks before it ends.
    ///
    /// # Errors
    /// The thread was stopped; `start` did not run.
    pub fn spawn<F, Fut>(&self, start: F) -> Result<(), Stopped>
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = ()> + 'static,
    {
        let tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        let start: Start = Box::new(move || Box::pin(start()));
        tasks.as_ref().ok_or(Stopped)?.send(start).map_err(|_| Stopped)
    }

    /// Runs the future that `start` makes on this thread and waits for its result.
    ///
    /// If the caller stops waiting, the future still runs to its end.
    ///
    /// # Errors
    /// The thread was stopped.
    pub async fn run<F, Fut, T>(&self, start: F) -> Result<T, Stopped>
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = T> + 'static,
        T: Send + 'static,
    {
        let (done, result) = oneshot::channel();
        self.spawn(move || async move {
            // The caller may have gone; then nobody wants the result.
            let _ = done.send(start().await);
        })?;
        result.await.map_err(|_| Stopped)
    }

    /// Takes no more tasks, and waits until those it has have ended and the thread's ring is gone.
    ///
    /// Must not be awaited on the thread itself: it would wait for itself.
    pub async fn stop(&self) {
        let tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(tasks);
        let mut ended = self.ended.clone();
        // An error says that the sender is gone, which is what is waited for.
        while ended.changed().await.is_ok() {}
    }
}

fn set_handle(handle: Weak<IoThread>) {
    LOCAL.with(|place| {
        if let Some(local) = place.borrow_mut().as_mut() {
            local.handle = handle;
        }
    });
}

/// Makes the calling thread an IOThread until the future that `main` makes has ended.
///
/// Tasks that are left then are dropped; `main` stops what has to end in order.
///
/// # Errors
/// The system has no descriptors for the event loop.
pub fn run_main<F, Fut, T>(name: &str, params: Params, main: F) -> io::Result<T>
where
    F: FnOnce(Arc<IoThread>) -> Fut,
    Fut: Future<Output = T>,
{
    let tuning = Tuning::new(params);
    let (this, ring_error) = Loop::new(name, params, &tuning)?;
    let (tasks, new_tasks) = mpsc::unbounded_channel();
    let (alive, ended) = watch::channel(());
    let handle = Arc::new(IoThread {
        name: name.to_owned(),
        pool: this.pool.clone(),
        tuning,
        ring_error,
        tasks: Mutex::new(Some(tasks)),
        ended,
    });
    set_handle(Arc::downgrade(&handle));
    this.run(async move {
        tokio::task::spawn_local(async move {
            let _alive = alive;
            take_tasks(new_tasks).await;
        });
        // Kept for those who ask for the current thread while `main` runs, whatever it does with its own.
        let _kept = Arc::clone(&handle);
        main(handle).await
    })
}
