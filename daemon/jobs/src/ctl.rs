//! [`JobCtl`]: what the work of a job sees of the rest.
//!
//! Wishes of the control task (rest, end, complete) are flags that the work looks at, and a notification that wakes it; what
//! the work has to say goes to the control task in messages. Usable from any thread.

use crate::Job;
use block::driver::LocalFuture;
use block::{Errno, Graph};
use qapi::{Error, Result};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{Notify, oneshot};

type Work = dyn for<'g> FnOnce(&'g mut Graph) -> LocalFuture<'g, ()> + Send;

/// Work on the graph, for the control task to carry out.
pub struct GraphWork(Box<Work>);

impl GraphWork {
    /// Does it.
    pub async fn carry_out(self, graph: &mut Graph) {
        (self.0)(graph).await;
    }
}

impl std::fmt::Debug for GraphWork {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("GraphWork")
    }
}

/// The way to the control task.
pub trait Owner: Send + Sync {
    /// Has the work done between two commands; dropped when the daemon has ended.
    fn work(&self, work: GraphWork);

    /// Hands a report to [`Jobs::report`](crate::Jobs::report).
    fn report(&self, serial: u64, report: Report);
}

/// What the work of a job has to say.
pub enum Report {
    /// It rests.
    Paused,
    /// It goes on.
    Resumed,
    /// It is ready to be completed.
    Ready,
    /// It is over.
    Ended(Box<dyn Job>, Result<()>),
}

impl std::fmt::Debug for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Paused => "Paused",
            Self::Resumed => "Resumed",
            Self::Ready => "Ready",
            Self::Ended(..) => "Ended",
        })
    }
}

/// Wishes of the control task and progress of the work.
#[derive(Debug, Default)]
pub(crate) struct State {
    pub pause: bool,
    pub cancel: bool,
    pub complete: bool,
    /// Bytes a second; 0 is no limit.
    pub speed: u64,
    pub done: u64,
    pub total: u64,
}

/// The part that the list of jobs and the work share.
pub(crate) struct Shared {
    pub serial: u64,
    owner: Arc<dyn Owner>,
    /// Never held across an await.
    state: Mutex<State>,
    changed: Notify,
}

impl Shared {
    pub fn new(serial: u64, owner: Arc<dyn Owner>, speed: u64) -> Self {
        let state = State { speed, ..State::default() };
        Self { serial, owner, state: Mutex::new(state), changed: Notify::new() }
    }

    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes a wish and wakes the work.
    pub fn wish(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_waiters();
    }

    /// Waits until `state` gives something.
    async fn until<T>(&self, state: impl Fn(&State) -> Option<T>) -> T {
        loop {
            let changed = self.changed.notified();
            if let Some(value) = state(&self.lock()) {
                return value;
            }
            changed.await;
        }
    }
}

/// See the module.
pub struct JobCtl {
    pub(crate) shared: Arc<Shared>,
}

/// What a job that was cancelled ends with.
pub(crate) fn cancelled() -> Error {
    Error::generic(qapi::error::errno_text(&Errno::ECANCELED.into()))
}

impl JobCtl {
    /// Whether the job is to end as soon as possible.
    pub fn is_cancelled(&self) -> bool {
        self.shared.lock().cancel
    }

    /// Rests here for as long as it is wanted. The work holds nothing that others wait for.
    ///
    /// # Errors
    /// The job has been cancelled.
    pub async fn pause_point(&self) -> Result<()> {
        let wanted = |state: &State| (state.pause && !state.cancel, state.cancel);
        let (pause, cancel) = wanted(&self.shared.lock());
        if cancel {
            return Err(cancelled());
        }
        if !pause {
            return Ok(());
        }
        self.shared.owner.report(self.shared.serial, Report::Paused);
        let goes_on = self.shared.until(|state| (!wanted(state).0).then_some(!state.cancel)).await;
        self.shared.owner.report(self.shared.serial, Report::Resumed);
        if goes_on { Ok(()) } else { Err(cancelled()) }
    }

    /// The work can be completed whenever it is asked for.
    pub fn ready(&self) {
        self.shared.owner.report(self.shared.serial, Report::Ready);
    }

    /// Waits until the job is told to complete, to rest or to end; true if it is to complete now.
    pub async fn told(&self) -> bool {
        self.shared.until(|state| (state.complete || state.cancel || state.pause).then_some(state.complete)).await
    }

    /// Bytes a second at most; 0 is no limit.
    pub fn speed(&self) -> u64 {
        self.shared.lock().speed
    }

    /// There is so much to do in addition, in the job's own units.
    pub fn add_total(&self, units: u64) {
        let mut state = self.shared.lock();
        state.total = state.total.saturating_add(units);
    }

    /// So much more is done.
    pub fn add_done(&self, units: u64) {
        let mut state = self.shared.lock();
        state.done = state.done.saturating_add(units);
    }

    /// Has the control task do something with the graph, and waits for its result.
    ///
    /// # Errors
    /// Those of the work; the daemon has ended.
    pub async fn graph<R, F>(&self, work: F) -> Result<R>
    where
        R: Send + 'static,
        F: for<'g> FnOnce(&'g mut Graph) -> LocalFuture<'g, Result<R>> + Send + 'static,
    {
        let (reply, result) = oneshot::channel();
        self.shared.owner.work(GraphWork(Box::new(move |graph| {
            Box::pin(async move {
                // The job is there as long as its work waits.
                let _ = reply.send(work(graph).await);
            })
        })));
        result.await.map_err(|_| Error::generic("The daemon is shutting down"))?
    }
}
