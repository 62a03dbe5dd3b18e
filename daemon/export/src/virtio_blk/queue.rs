//! A running ring: one task on one IOThread that takes requests from it, has them served, and shows the guest what is done.
//!
//! The task drains the available ring, starts each request where it finds it, and publishes what is done in batches with one
//! interrupt each, if the guest wants any. While there is something to do the guest is asked for no kicks. When there is
//! nothing, the task asks for kicks and sleeps; on a thread that polls it leaves that to the thread ([`io::Look`]).
//!
//! It ends when it is told to stop and nothing is in flight any more, or when the guest breaks the rules: then it takes nothing
//! more, waits for what was started, and says so. The device that started it does the rest.

use super::inflight::Inflight;
use super::log::DirtyLog;
use super::request::{self, Command, ID_LEN, Limits, Request, Status};
use super::ring::{Broken, Chain, Ring, RingAddresses, Taken};
use crate::slots::Slots;
use block::Disk;
use buf::{GuestMemory, IoBuf};
use io::{Bell, Doorbell, Foreign, Look, Watched};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};
use tokio::sync::{mpsc, oneshot};

/// Requests that are shown to the guest at once at most, so that it has something to do while others are served.
const BATCH: u16 = 16;
/// Requests after which others on the thread have their turn.
const TURN: usize = 128;

/// What all rings of a device share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub disk: Disk,
    pub limits: Limits,
    pub serial: [u8; ID_LEN],
    /// Whether each write has to be on stable storage before it is done: the guest has no cache to flush, or wants none.
    pub through: AtomicBool,
}

/// How the guest is told that requests were published.
pub(crate) trait Interrupt: Send + std::fmt::Debug {
    /// Tells it. Must not wait.
    fn raise(&self);
}

impl Interrupt for Bell {
    fn raise(&self) {
        self.ring();
    }
}

/// Where memory comes from that the guest has made known to somebody else, who is asked when it is needed.
pub(crate) trait MemorySource: Send + Sync + std::fmt::Debug {
    /// The memory as it is now, if there is more of it than in `known`. Must not wait.
    fn more(&self, known: &Arc<GuestMemory>) -> Option<Arc<GuestMemory>>;
}

/// What a ring is started with.
pub(crate) struct Setup {
    pub ring: Ring,
    /// Where the ring lies.
    pub at: RingAddresses,
    pub memory: Arc<GuestMemory>,
    pub source: Option<Arc<dyn MemorySource>>,
    pub inflight: Option<Inflight>,
    /// Requests that a former daemon left unfinished.
    pub left: Vec<Taken>,
    pub log: Option<Arc<DirtyLog>>,
    pub enabled: bool,
    pub kick: Option<Foreign>,
    pub call: Option<Box<dyn Interrupt>>,
    pub shared: Arc<Shared>,
}

/// A change to a running ring.
pub(crate) enum Change {
    Enable(bool),
    Kick(Option<Foreign>),
    Call(Option<Box<dyn Interrupt>>),
    /// The guest's memory, and where the ring lies, are these from now on.
    Memory(Arc<GuestMemory>, RingAddresses),
    Log(Option<Arc<DirtyLog>>),
    /// None: tell where the ring is.
    Where(oneshot::Sender<u32>),
    /// Take nothing more, and end when all is done.
    Stop,
}

/// A change, and whom to tell when it holds.
pub(crate) type Order = (Change, oneshot::Sender<()>);

/// How a ring ended: where another one would go on, and why if it was not told to.
pub(crate) type Ended = (u32, Option<Broken>);

struct Done {
    chain: Chain,
    status: Status,
    status_at: IoBuf,
    /// What was written for the guest.
    filled: Option<IoBuf>,
}

/// The ring, for its task and for looks between its turns.
struct Place {
    ring: RefCell<Ring>,
    /// Whether the task waits for the guest.
    idle: Cell<bool>,
}

impl Look for Place {
    fn look(&self) -> bool {
        self.idle.get() && self.ring.try_borrow().is_ok_and(|ring| !ring.is_listening() && ring.peek_available())
    }

    fn sleep(&self) -> bool {
        if !self.idle.get() {
            return false;
        }
        let Ok(mut ring) = self.ring.try_borrow_mut() else { return false };
        if ring.is_listening() {
            return false;
        }
        ring.listen();
        ring.peek_available()
    }
}

/// Runs a ring until it ends.
pub(crate) async fn run(setup: Setup, orders: mpsc::UnboundedReceiver<Order>) -> Ended {
    let Setup { ring, at, memory, source, inflight, left, log, enabled, kick, call, shared } = setup;
    let kick = kick.and_then(|fd| Doorbell::new(fd).ok());
    let place = Rc::new(Place { ring: RefCell::new(ring), idle: Cell::new(false) });
    let start = |request: Request| {
        let shared = Arc::clone(&shared);
        async move {
            let Request { chain, command, status } = request;
            let through = shared.through.load(Ordering::Relaxed);
            let result = request::serve(&shared.disk, &command, through, &shared.serial).await;
            let filled = match command {
                Command::Read { buf, .. } | Command::Id(buf) => Some(buf),
                _ => None,
            };
            Done { chain, status: result, status_at: status, filled }
        }
    };
    let slots = Slots::new();
    let orders_waker = slots.extra_waker();
    orders_waker.wake_by_ref();
    let mut queue = Queue {
        place: Rc::clone(&place),
        at,
        memory,
        source,
        inflight,
        left: left.into(),
        log,
        enabled,
        kick,
        call,
        shared: Arc::clone(&shared),
        slots,
        orders,
        orders_waker,
        batch: Vec::new(),
        former: Vec::new(),
        results: Vec::new(),
        running: true,
        broken: None,
        watched: None,
        start,
    };
    let broken = std::future::poll_fn(|cx| queue.poll(cx)).await;
    let base = place.ring.borrow().base();
    (base, broken)
}

struct Queue<F, S> {
    place: Rc<Place>,
    at: RingAddresses,
    memory: Arc<GuestMemory>,
    source: Option<Arc<dyn MemorySource>>,
    inflight: Option<Inflight>,
    left: std::collections::VecDeque<Taken>,
    log: Option<Arc<DirtyLog>>,
    enabled: bool,
    kick: Option<Doorbell>,
    call: Option<Box<dyn Interrupt>>,
    shared: Arc<Shared>,
    slots: Slots<F>,
    orders: mpsc::UnboundedReceiver<Order>,
    orders_waker: Waker,
    /// Requests that are done and that the guest was not shown.
    batch: Vec<u16>,
    /// The guest's memory before it changed, while requests may still point into it.
    former: Vec<Arc<GuestMemory>>,
    /// Empty between uses.
    results: Vec<Done>,
    /// Whether requests are taken.
    running: bool,
    broken: Option<Broken>,
    watched: Option<Watched>,
    start: S,
}

impl<F, S> Queue<F, S>
where
    F: Future<Output = Done>,
    S: Fn(Request) -> F,
{
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Broken>> {
        self.slots.register(cx.waker());
        self.place.idle.set(false);
        if self.watched.is_none() {
            let look: Rc<dyn Look> = Rc::<Place>::clone(&self.place);
            self.watched = Watched::new(look, cx.waker().clone());
        }
        if self.slots.extra_woken() {
            self.take_orders();
        }
        let mut turn = 0;
        loop {
            self.take_results();
            let taken = if self.running && self.enabled { self.take_requests(&mut turn) } else { Ok(()) };
            if let Err(broken) = taken.and_then(|()| self.check_memory()) {
                self.running = false;
                self.broken.get_or_insert(broken);
            }
            self.publish();
            if !self.running {
                return if self.slots.busy() == 0 { Poll::Ready(self.broken) } else { Poll::Pending };
            }
            if turn >= TURN {
                io::look_around();
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            if self.poll_kick(cx) {
                continue;
            }
            if self.slots.is_full() || !self.enabled {
                return Poll::Pending;
            }
            let mut ring = self.place.ring.borrow_mut();
            if io::is_polling() && self.watched.is_some() {
                ring.mute();
                if !ring.peek_available() {
                    self.place.idle.set(true);
                    return Poll::Pending;
                }
            } else {
                ring.listen();
                if !ring.peek_available() {
                    return Poll::Pending;
                }
            }
        }
    }

    /// Whether the guest has rung since the last look.
    fn poll_kick(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(kick) = &self.kick else { return false };
        match kick.poll_rung(cx) {
            Poll::Ready(Ok(())) => true,
            // It never rings again; the guest can still be polled, and can be told to stop.
            Poll::Ready(Err(_)) => {
                self.kick = None;
                false
            }
            Poll::Pending => false,
        }
    }

    fn check_memory(&self) -> Result<(), Broken> {
        let log_torn = self.log.as_ref().is_some_and(|log| log.is_torn());
        let torn = self.place.ring.borrow().is_torn()
            || log_torn
            || self.inflight.as_ref().is_some_and(Inflight::is_torn)
            || self.memory.is_torn();
        if torn { Err(Broken("the front-end took memory away that it had shared")) } else { Ok(()) }
    }

    fn take_orders(&mut self) {
        let waker = self.orders_waker.clone();
        while let Poll::Ready(order) = self.orders.poll_recv(&mut Context::from_waker(&waker)) {
            let Some((change, done)) = order else {
                // Nobody is left who could stop it.
                self.running = false;
                return;
            };
            match change {
                Change::Enable(enabled) => self.enabled = enabled,
                Change::Kick(kick) => self.kick = kick.and_then(|fd| Doorbell::new(fd).ok()),
                Change::Call(call) => self.call = call,
                Change::Memory(memory, at) => {
                    self.at = at;
                    if let Err(broken) = self.relocate(memory) {
                        self.running = false;
                        self.broken.get_or_insert(broken);
                    }
                }
                Change::Log(log) => self.log = log,
                Change::Where(tell) => {
                    let _ = tell.send(self.place.ring.borrow().base());
                }
                Change::Stop => self.running = false,
            }
            // Who asked may have gone.
            let _ = done.send(());
        }
    }

    /// Goes on in another memory, while requests may still point into this one.
    fn relocate(&mut self, memory: Arc<GuestMemory>) -> Result<(), Broken> {
        let result = self.place.ring.borrow_mut().relocate(&memory, &self.at);
        let former = std::mem::replace(&mut self.memory, memory);
        self.former.push(former);
        result
    }

    /// Takes the chain of a request; where it leads out of the memory, of which there may be more by now, once more.
    fn collect(&mut self, taken: &Taken) -> Result<Chain, Broken> {
        let result = self.place.ring.borrow_mut().collect(taken);
        let more = match (&result, &self.source) {
            (Err(Broken::OUTSIDE), Some(source)) => source.more(&self.memory),
            _ => None,
        };
        let Some(more) = more else { return result };
        self.relocate(more)?;
        self.place.ring.borrow_mut().collect(taken)
    }

    fn take_requests(&mut self, turn: &mut usize) -> Result<(), Broken> {
        self.place.ring.borrow_mut().mute();
        while !self.slots.is_full() && *turn < TURN {
            let taken = match self.left.pop_front() {
                Some(taken) => taken,
                None => match self.place.ring.borrow_mut().pop()? {
                    Some(taken) => taken,
                    None => return Ok(()),
                },
            };
            let mut chain = self.collect(&taken)?;
            let request = {
                let buffers = &mut self.place.ring.borrow_mut().buffers;
                if let (Some(inflight), Taken::Fresh(_)) = (&mut self.inflight, &taken) {
                    chain.entry = inflight.started(&chain, &buffers.descriptors).map_err(Broken)?;
                }
                request::parse(buffers, chain, self.shared.limits)?
            };
            *turn += 1;
            if let Some(done) = self.slots.start((self.start)(request)) {
                self.done(done);
            }
        }
        Ok(())
    }

    fn take_results(&mut self) {
        // The set hands results to a closure while it is borrowed itself.
        let mut results = std::mem::take(&mut self.results);
        self.slots.poll_woken(|done| results.push(done));
        results.drain(..).for_each(|done| self.done(done));
        self.results = results;
        if self.slots.busy() == 0 {
            self.former.clear();
        }
    }

    fn done(&mut self, done: Done) {
        let Done { chain, status, status_at, filled } = done;
        status_at.write_at(0, &[status as u8]);
        if let Some(log) = &self.log {
            for memory in self.former.iter().chain([&self.memory]) {
                log.mark_buffer(memory, &status_at);
                if let Some(filled) = &filled {
                    log.mark_buffer(memory, filled);
                }
            }
        }
        let unpublished = {
            let mut ring = self.place.ring.borrow_mut();
            ring.push(&chain);
            ring.unpublished()
        };
        if let Some(inflight) = &mut self.inflight {
            inflight.done(chain.entry);
            self.batch.push(chain.entry);
        }
        if unpublished >= BATCH {
            self.publish();
        }
    }

    fn publish(&mut self) {
        let mut ring = self.place.ring.borrow_mut();
        if ring.unpublished() == 0 {
            return;
        }
        if let Some(log) = &self.log {
            ring.unpublished_ranges(|at, len| log.mark(at, len));
        }
        if let Some(inflight) = &mut self.inflight {
            inflight.publishing(&self.batch, ring.to_be_published());
        }
        let interrupt = ring.publish();
        if let Some(inflight) = &mut self.inflight {
            inflight.published(&self.batch, ring.published());
            self.batch.clear();
        }
        if interrupt && let Some(call) = &self.call {
            call.raise();
        }
    }
}
