//! Polling: an IOThread that looks for events a little while before it sleeps (`poll-max-ns`, `poll-grow`, `poll-shrink`).
//!
//! To sleep and to be woken costs more than most requests need, so a thread whose next event will come at once does better to
//! stay awake. How long it does adapts: a sleep that was over within `poll-max-ns` says that a longer look would have
//! caught the event, so the window grows; a longer one says that looking was in vain, so it shrinks. [QEMU
//! devel/multiple-iothreads]
//!
//! The runtime's park hook decides. To stay awake it wakes the poller, a task that does nothing: the runtime then looks at
//! epoll without waiting, runs what is ready, and comes back to the hook. No wake-up can be lost, as nothing is held
//! back: polling only adds a task that can run. State is owned by the thread but for the settings. With
//! `poll-max-ns` 0 the hooks read that one number and no clock.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Poll, Waker};
use std::time::Instant;

/// The window after the first sleep that was short enough, in nanoseconds: about what a sleep and a wake-up cost.
const FIRST_WINDOW: u64 = 4000;
/// Looks at what is registered before the descriptors have their turn: as long as asking for those takes.
const LOOKS: u32 = 16;
/// The factor if none is given.
const DEFAULT_GROW: u64 = 2;
/// The divisor if none is given. One wait too long among short ones says little: a peer that was itself asleep took its time. To forget
/// the window then would send the thread to sleep several times more, and its peer with it. A thread that keeps waiting long has
/// forgotten it after a few waits all the same.
const DEFAULT_SHRINK: u64 = 2;

/// How long an IOThread looks for events before it sleeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Polling {
    /// Nanoseconds at most (`poll-max-ns`); 0 sleeps at once.
    pub max_ns: u64,
    /// The factor by which the time grows (`poll-grow`); 0 is the default, 2.
    pub grow: u64,
    /// The divisor by which the time shrinks (`poll-shrink`); 0 is the default, 2, where a time that is not worth it is none.
    pub shrink: u64,
    /// Only while there is a queue in shared memory to look at ([`Watched`]). To look for what descriptors report takes a system call
    /// each time.
    pub for_queues: bool,
}

/// [`Polling`] that any thread may change. The three numbers are independent: who reads old and new ones together adjusts
/// one window a little differently.
#[derive(Debug, Default)]
pub(crate) struct SharedPolling {
    max_ns: AtomicU64,
    grow: AtomicU64,
    shrink: AtomicU64,
    for_queues: AtomicBool,
}

impl SharedPolling {
    pub(crate) fn set(&self, new: Polling) {
        self.grow.store(new.grow, Ordering::Relaxed);
        self.shrink.store(new.shrink, Ordering::Relaxed);
        self.for_queues.store(new.for_queues, Ordering::Relaxed);
        self.max_ns.store(new.max_ns, Ordering::Relaxed);
    }

    /// The settings, none if there is no polling on the calling thread.
    fn get(&self) -> Option<Polling> {
        let max_ns = self.max_ns.load(Ordering::Relaxed);
        if max_ns == 0 {
            return None;
        }
        let for_queues = self.for_queues.load(Ordering::Relaxed);
        (!for_queues || has_lookers()).then(|| Polling {
            max_ns,
            grow: self.grow.load(Ordering::Relaxed),
            shrink: self.shrink.load(Ordering::Relaxed),
            for_queues,
        })
    }
}

thread_local! {
    /// Counts what happened on this thread that it may have waited for.
    static EVENTS: Cell<u64> = const { Cell::new(0) };
}

/// Something happened that the calling thread may have waited for: the time to look for the next event starts anew.
pub(crate) fn note_event() {
    // Only a thread that is ending has none, and it waits for nothing.
    let events = EVENTS.try_with(|events| events.replace(events.get().wrapping_add(1))).unwrap_or(1);
    // A thread with so much to do that it never gets to sleep still has to look now and then.
    if events.is_multiple_of(32) {
        look_around();
    }
}

/// Something that no descriptor reports unless it is asked for: a queue in shared memory.
///
/// Called on the thread that registered it, outside of its task, at times when the thread has nothing else to do.
pub trait Look {
    /// Whether there is something to do. Must be cheap, and change nothing.
    fn look(&self) -> bool;

    /// The thread may sleep from now on, so ask for a report. True if there is something to do after all.
    fn sleep(&self) -> bool;
}

struct Looker {
    look: Rc<dyn Look>,
    task: Waker,
}

thread_local! {
    /// What this thread looks at, if it polls.
    static LOOKERS: RefCell<Vec<Looker>> = const { RefCell::new(Vec::new()) };
}

/// A [`Look`] is registered with the thread while this lives.
pub struct Watched(Rc<dyn Look>);

impl std::fmt::Debug for Watched {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Watched")
    }
}

impl Watched {
    /// Has `look` looked at while the calling thread waits, and `task` woken when there is something to do. None on a thread
    /// that is no IOThread.
    pub fn new(look: Rc<dyn Look>, task: Waker) -> Option<Self> {
        crate::thread::current_poller()?;
        LOOKERS.try_with(|all| all.borrow_mut().push(Looker { look: Rc::clone(&look), task })).ok()?;
        Some(Self(look))
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        // A thread that is ending has forgotten already.
        let _ = LOOKERS.try_with(|all| all.borrow_mut().retain(|one| !Rc::ptr_eq(&one.look, &self.0)));
    }
}

/// Whether the calling thread looks for events before it sleeps, as its settings are now.
pub fn is_polling() -> bool {
    crate::thread::current_poller().is_some_and(|poller| poller.settings.get().is_some())
}

/// Whether the calling thread looks for queues in shared memory alone: nobody has said how long it looks for other events.
pub fn is_polling_for_queues() -> bool {
    crate::thread::current_poller().is_some_and(|poller| poller.settings.for_queues.load(Ordering::Relaxed))
}

fn has_lookers() -> bool {
    LOOKERS.try_with(|all| all.try_borrow().is_ok_and(|all| !all.is_empty())).unwrap_or(false)
}

/// Wakes who has something to do, of those that `ask` says it of.
fn wake_lookers(ask: impl Fn(&dyn Look) -> bool) -> bool {
    let woken = LOOKERS.try_with(|all| {
        let all = all.try_borrow().ok()?;
        let found = all.iter().filter(|one| ask(&*one.look)).map(|one| one.task.wake_by_ref()).count();
        Some(found > 0)
    });
    woken.ok().flatten().unwrap_or(false)
}

/// Looks at everything that is registered with the calling thread once. For a task that is about to be busy for long.
pub fn look_around() {
    wake_lookers(|one| one.look());
}

/// What a thread with nothing to do does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Poll,
    Sleep,
}

/// The state of polling; times are nanoseconds of any one clock.
#[derive(Debug, Default)]
struct Idle {
    /// How long to look before the next sleep.
    window: u64,
    /// When the thread ran out of work; none while it has some.
    since: Option<u64>,
    /// The count of events then.
    events: u64,
    asleep: bool,
}

impl Idle {
    /// The thread has nothing to do.
    fn next(&mut self, now: u64, events: u64, polling: Polling) -> Next {
        if self.events != events {
            self.events = events;
            self.since = None;
        }
        let since = *self.since.get_or_insert(now);
        if now.saturating_sub(since) < self.window.min(polling.max_ns) {
            return Next::Poll;
        }
        self.asleep = true;
        Next::Sleep
    }

    /// The thread looked or slept, and goes on.
    fn woke(&mut self, now: u64, polling: Polling) {
        if !std::mem::take(&mut self.asleep) {
            return;
        }
        let Some(since) = self.since.take() else { return };
        let waited = now.saturating_sub(since);
        self.window = adjusted(self.window, waited, polling);
    }
}

/// The window after an event that came when the thread had waited so long, and slept at the end of it.
fn adjusted(window: u64, waited: u64, polling: Polling) -> u64 {
    let new = if waited > polling.max_ns {
        match window.checked_div(polling.shrink) {
            Some(shrunk) => shrunk,
            None => Some(window / DEFAULT_SHRINK).filter(|half| *half >= FIRST_WINDOW).unwrap_or(0),
        }
    } else if waited <= window {
        window
    } else if window == 0 {
        FIRST_WINDOW
    } else {
        window.saturating_mul(if polling.grow == 0 { DEFAULT_GROW } else { polling.grow })
    };
    new.min(polling.max_ns)
}

/// Keeps one thread awake.
#[derive(Debug)]
pub(crate) struct Poller {
    settings: Arc<SharedPolling>,
    idle: RefCell<Idle>,
    /// The task to wake; none before it started.
    task: RefCell<Option<Waker>>,
    start: Instant,
}

impl Poller {
    pub(crate) fn new(settings: Arc<SharedPolling>) -> Self {
        Self { settings, idle: RefCell::default(), task: RefCell::default(), start: Instant::now() }
    }

    /// The task that is woken to stay awake; for ever.
    pub(crate) async fn serve(&self) {
        poll_fn(|cx| {
            let mut task = self.task.borrow_mut();
            if !task.as_ref().is_some_and(|task| task.will_wake(cx.waker())) {
                *task = Some(cx.waker().clone());
            }
            Poll::<()>::Pending
        })
        .await;
    }

    fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// The thread would sleep now.
    pub(crate) fn before_park(&self) {
        let polls = self.settings.get().is_some_and(|polling| {
            let events = EVENTS.try_with(Cell::get).unwrap_or(0);
            self.idle.borrow_mut().next(self.now(), events, polling) == Next::Poll
        });
        if !polls {
            wake_lookers(|one| one.sleep());
            return;
        }
        for _ in 0..LOOKS {
            if wake_lookers(|one| one.look()) {
                note_event();
                return;
            }
            std::hint::spin_loop();
        }
        if let Some(task) = self.task.borrow().as_ref() {
            task.wake_by_ref();
        }
    }

    /// The thread has slept, or looked for events without sleeping.
    pub(crate) fn after_park(&self) {
        let Some(polling) = self.settings.get() else { return };
        let mut idle = self.idle.borrow_mut();
        if idle.asleep {
            idle.woke(self.now(), polling);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::thread::current_poller;
    use crate::{Access, Engine, File, IoThread, OpenHow, Params, RingUse};
    use buf::IoBuf;
    use std::future::Future;
    use tokio::runtime::Handle;

    const ON: Polling = Polling { max_ns: 32768, grow: 0, shrink: 0, for_queues: false };

    #[test]
    fn a_window_grows_while_a_longer_one_would_have_caught_the_event() {
        let mut window = 0;
        let mut seen = Vec::new();
        for _ in 0..6 {
            window = adjusted(window, 30000, ON);
            seen.push(window);
        }
        assert_eq!(seen, [4000, 8000, 16000, 32000, 32000, 32000], "until the event comes within the window");
        assert_eq!(adjusted(20000, 32768, ON), 32768, "never beyond the maximum");
        assert_eq!(adjusted(0, 10, Polling { max_ns: 100, ..ON }), 100);
        assert_eq!(adjusted(4000, 30000, Polling { grow: 3, ..ON }), 12000);
        assert_eq!(adjusted(4000, 30000, Polling { grow: 1, ..ON }), 4000);
        assert_eq!(adjusted(4000, 30000, Polling { grow: u64::MAX, ..ON }), 32768);
    }

    #[test]
    fn a_window_shrinks_when_no_window_would_have_caught_the_event() {
        let fading: Vec<u64> = (0..5)
            .scan(32000, |window, _| {
                *window = adjusted(*window, 32769, ON);
                Some(*window)
            })
            .collect();
        assert_eq!(fading, [16000, 8000, 4000, 0, 0], "what is too short to be worth it is none");
        assert_eq!(adjusted(32000, 32769, Polling { shrink: 2, ..ON }), 16000);
        assert_eq!(adjusted(32000, 32769, Polling { shrink: 4, ..ON }), 8000);
        assert_eq!(adjusted(32000, 32769, Polling { shrink: 1, ..ON }), 32000);
        assert_eq!(adjusted(1, 40000, Polling { shrink: u64::MAX, ..ON }), 0);
        assert_eq!(
            adjusted(32000, 32769, Polling { max_ns: 500, shrink: 2, ..ON }),
            500,
            "a maximum that was lowered holds"
        );
    }

    #[test]
    fn a_wait_too_long_among_short_ones_is_no_reason_to_stop_looking() {
        let slept_for_short_ones = |polling| {
            let mut window = 32000;
            let waits = (0..40).map(|turn| if turn % 8 == 7 { 50_000 } else { 12_000 });
            waits
                .filter(|wait| {
                    let slept = *wait > window && *wait < 50_000;
                    window = adjusted(window, *wait, polling);
                    slept
                })
                .count()
        };
        assert_eq!(slept_for_short_ones(ON), 3);
        assert_eq!(slept_for_short_ones(Polling { shrink: u64::MAX, ..ON }), 12, "as if it were forgotten at once");
    }

    #[test]
    fn a_thread_looks_for_the_length_of_the_window_and_then_sleeps() {
        let mut idle = Idle { window: 1000, ..Idle::default() };
        assert_eq!(idle.next(50, 0, ON), Next::Poll);
        idle.woke(60, ON);
        assert_eq!(idle.next(1049, 0, ON), Next::Poll);
        assert_eq!(idle.next(1050, 0, ON), Next::Sleep);
        idle.woke(5000, ON);
        assert_eq!(idle.window, 2000, "4950 would have been caught by a longer look");
        assert_eq!(idle.next(6000, 0, ON), Next::Poll, "the time starts anew after a sleep");
        assert_eq!(idle.next(7999, 0, ON), Next::Poll);
        assert_eq!(idle.next(8000, 0, ON), Next::Sleep);
    }

    #[test]
    fn an_event_starts_the_time_anew_and_leaves_the_window() {
        let mut idle = Idle { window: 1000, ..Idle::default() };
        assert_eq!(idle.next(0, 0, ON), Next::Poll);
        assert_eq!(idle.next(999, 1, ON), Next::Poll, "since 999");
        assert_eq!(idle.next(1998, 1, ON), Next::Poll);
        assert_eq!(idle.next(1999, 1, ON), Next::Sleep);
        assert_eq!(idle.window, 1000);
    }

    #[test]
    fn a_lowered_maximum_ends_the_look() {
        let mut idle = Idle { window: 30000, ..Idle::default() };
        assert_eq!(idle.next(0, 0, ON), Next::Poll);
        assert_eq!(idle.next(10, 0, Polling { max_ns: 10, ..ON }), Next::Sleep);
    }

    #[test]
    fn settings_of_zero_are_no_polling() {
        let shared = SharedPolling::default();
        assert_eq!(shared.get(), None);
        shared.set(ON);
        assert_eq!(shared.get(), Some(ON));
        shared.set(Polling { max_ns: 0, ..ON });
        assert_eq!(shared.get(), None);
    }

    /// Any sleep is short enough, and the second one makes the window the longest there is.
    const ALWAYS: Polling = Polling { max_ns: u64::MAX, grow: u64::MAX, shrink: 1, for_queues: false };
    const NEVER: Polling = Polling { max_ns: 0, ..ALWAYS };

    fn wait<T>(f: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(f)
    }

    fn sleeps(event_loop: &Handle) -> u64 {
        event_loop.metrics().worker_park_count(0)
    }

    /// A thread that has slept as often as it takes to stay awake from then on, and its event loop.
    async fn awake(ring: RingUse) -> (Arc<IoThread>, Handle) {
        let thread = IoThread::start("poll", Params { ring, ..Params::default() }).unwrap();
        let event_loop = thread.run(|| async { Handle::current() }).await.unwrap();
        thread.set_polling(ALWAYS);
        let window = || async { current_poller().unwrap().idle.borrow().window };
        while thread.run(window).await.unwrap() != u64::MAX {}
        (thread, event_loop)
    }

    #[test]
    fn a_thread_works_without_a_sleep_and_sleeps_when_told() {
        for ring in [RingUse::Auto, RingUse::Off] {
            wait(async {
                let (thread, event_loop) = awake(ring).await;
                let before = sleeps(&event_loop);
                let file = tempfile::NamedTempFile::new().unwrap();
                file.as_file().set_len(1 << 20).unwrap();
                let path = file.path().to_owned();
                let work = move || async move {
                    let how = OpenHow { access: Access::ReadWrite, direct: false, engine: Engine::Ring };
                    let file = File::open(&path, how).await.unwrap();
                    for i in 0..200u64 {
                        file.write_at(i * 512, &IoBuf::zeroed(512), i % 100 == 0).await.unwrap();
                    }
                    file.sync_data().await.unwrap();
                    tokio::time::sleep(std::time::Duration::from_millis(1)).await;
                };
                thread.run(work).await.unwrap();
                for _ in 0..100 {
                    thread.run(|| async {}).await.unwrap();
                }
                assert_eq!(sleeps(&event_loop), before, "all that was done without a sleep");
                thread.set_polling(NEVER);
                while sleeps(&event_loop) == before {
                    std::thread::yield_now();
                }
                thread.set_polling(ALWAYS);
                thread.run(|| async {}).await.unwrap();
                thread.stop().await;
            });
        }
    }

    struct Nothing;

    impl Look for Nothing {
        fn look(&self) -> bool {
            false
        }
        fn sleep(&self) -> bool {
            false
        }
    }

    #[test]
    fn a_thread_that_polls_for_queues_does_so_while_it_has_one() {
        wait(async {
            let thread = IoThread::start("queues", Params::default()).unwrap();
            thread.set_polling(Polling { for_queues: true, ..ON });
            let seen = thread.run(|| async {
                assert!(is_polling_for_queues());
                let before = is_polling();
                let watched = Watched::new(Rc::new(Nothing), Waker::noop().clone());
                let during = is_polling();
                drop(watched);
                [before, during, is_polling()]
            });
            assert_eq!(seen.await.unwrap(), [false, true, false]);
            thread.set_polling(ON);
            assert!(!thread.run(|| async { is_polling_for_queues() }).await.unwrap());
            thread.stop().await;
        });
    }

    #[test]
    fn a_thread_is_stopped_while_it_looks() {
        wait(async {
            let (thread, _) = awake(RingUse::Auto).await;
            thread.stop().await;
        });
    }
}
