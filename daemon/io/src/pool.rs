//! Threads for calls that can block: open, stat, close, ioctls, fsync without a ring.
//!
//! Each IOThread has a pool of its own, bounded by `thread-pool-max`, so that one slow disk cannot starve the others. A job
//! owns what it touches; if the future that waits for it is dropped, the job still runs to its end and its result is
//! discarded. A thread that finds nothing to do for a while ends, down to `thread-pool-min`.
//!
//! Unlike a general-purpose pool this one never panics when the system has no thread to give: the job is refused with
//! an error as long as the pool has no thread at all, and waits for one of the existing threads otherwise.

use crate::threads::{self, Role};
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;
use tokio::sync::oneshot;

/// How long a surplus thread waits for work before it ends.
const IDLE: Duration = Duration::from_secs(10);
/// Size limit of the pool that serves threads which are not IOThreads.
const SHARED_MAX: usize = 16;

type Job = Box<dyn FnOnce() + Send>;

/// A bounded set of threads; clones are handles to the same set.
#[derive(Clone)]
pub(crate) struct Pool(Arc<Shared>);

struct Shared {
    name: String,
    /// Guards the queue and the counts; held for a few instructions, never across a job or an await.
    state: Mutex<State>,
    work: Condvar,
}

struct State {
    queue: VecDeque<Job>,
    idle: usize,
    threads: usize,
    min: usize,
    max: usize,
    closing: bool,
}

impl Pool {
    /// A pool of at most `max` threads (at least one), of which `min` stay when idle.
    pub(crate) fn new(name: &str, min: usize, max: usize) -> Self {
        let max = max.max(1);
        let state = State { queue: VecDeque::new(), idle: 0, threads: 0, min: min.min(max), max, closing: false };
        Self(Arc::new(Shared { name: name.to_owned(), state: Mutex::new(state), work: Condvar::new() }))
    }

    /// The pool for threads that have none of their own.
    pub(crate) fn shared() -> Self {
        static SHARED: OnceLock<Pool> = OnceLock::new();
        SHARED.get_or_init(|| Pool::new("blocking", 0, SHARED_MAX)).clone()
    }

    /// Changes the limits; surplus threads end when they are idle.
    pub(crate) fn set_limits(&self, min: usize, max: usize) {
        let mut state = self.0.lock();
        state.max = max.max(1);
        state.min = min.min(state.max);
        drop(state);
        self.0.work.notify_all();
    }

    /// No thread stays once the queue is empty.
    pub(crate) fn close(&self) {
        self.0.lock().closing = true;
        self.0.work.notify_all();
    }

    /// Queues `job`, starting a thread if all are busy and the limit allows.
    ///
    /// # Errors
    /// The pool has no thread and the system refuses one; the job is dropped without having run.
    pub(crate) fn execute(&self, job: Job) -> io::Result<()> {
        let mut state = self.0.lock();
        state.queue.push_back(job);
        if state.idle >= state.queue.len() || state.threads >= state.max {
            drop(state);
            self.0.work.notify_one();
            return Ok(());
        }
        state.threads += 1;
        drop(state);
        let shared = Arc::clone(&self.0);
        let spawned = threads::spawn(Role::Worker, &self.0.name, move || shared.serve());
        let Err(err) = spawned else { return Ok(()) };
        let mut state = self.0.lock();
        state.threads -= 1;
        if state.threads > 0 {
            return Ok(());
        }
        // Nobody will ever take what waits in the queue: refuse all of it. Whoever waits for a job sees its channel close.
        let refused = std::mem::take(&mut state.queue);
        drop(state);
        drop(refused);
        Err(err)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self) {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.queue.pop_front() {
                drop(state);
                job();
                state = self.lock();
                continue;
            }
            if state.closing || state.threads > state.max {
                break;
            }
            state.idle += 1;
            let (next, wait) = self.work.wait_timeout(state, IDLE).unwrap_or_else(PoisonError::into_inner);
            state = next;
            state.idle -= 1;
            if wait.timed_out() && state.queue.is_empty() && state.threads > state.min {
                break;
            }
        }
        state.threads -= 1;
    }
}

/// Runs `f` on a thread of the current IOThread's pool (the process's common one elsewhere) and waits for its result.
///
/// Dropping the future does not stop `f`.
///
/// # Errors
/// The system has no thread for it, or `f` panicked.
pub async fn blocking<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    let (done, result) = oneshot::channel();
    let job = Box::new(move || {
        // Nobody waiting any more is fine: the result is then dropped on this thread.
        let _ = done.send(f());
    });
    crate::thread::current_pool().execute(job)?;
    ended(result).await
}

/// Runs `f` on a thread of its own, in the role of making connections, and waits for its result.
///
/// Dropping the future does not stop `f`.
///
/// # Errors
/// The system has no thread for it, or `f` panicked.
pub(crate) async fn connecting<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    let (done, result) = oneshot::channel();
    threads::spawn(Role::Connector, "connector", move || {
        let _ = done.send(f());
    })?;
    ended(result).await
}

async fn ended<T>(result: oneshot::Receiver<T>) -> io::Result<T> {
    let result = result.await.map_err(|_| io::Error::other("a blocking call was refused a thread or did not end"));
    crate::polling::note_event();
    result
}

/// Runs `f` on a thread of the current IOThread's pool (the process's common one elsewhere), without waiting for it. Drops it
/// if the system has no thread for it.
pub fn detach(f: impl FnOnce() + Send + 'static) {
    // A refused job is dropped, and with it what it owns: for a descriptor that is the very clean-up.
    let _ = crate::thread::current_pool().execute(Box::new(f));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn runs_in_parallel_up_to_the_limit() {
        let pool = Pool::new("test", 0, 3);
        let (started, starts) = mpsc::channel();
        let gate = Arc::new((Mutex::new(false), Condvar::new()));
        for i in 0..6 {
            let (started, gate) = (started.clone(), Arc::clone(&gate));
            pool.execute(Box::new(move || {
                started.send(i).unwrap();
                let mut open = gate.0.lock().unwrap();
                while !*open {
                    open = gate.1.wait(open).unwrap();
                }
            }))
            .unwrap();
        }
        let first: Vec<_> = (0..3).map(|_| starts.recv().unwrap()).collect();
        assert_eq!(first.len(), 3);
        assert_eq!(pool.0.lock().threads, 3, "the limit holds");
        assert!(starts.try_recv().is_err(), "the fourth waits");
        *gate.0.lock().unwrap() = true;
        gate.1.notify_all();
        let rest: Vec<_> = (0..3).map(|_| starts.recv().unwrap()).collect();
        assert_eq!(rest.len(), 3);
        pool.close();
    }

    #[test]
    fn a_dropped_future_leaves_the_job_running() {
        let (tell, told) = mpsc::channel();
        let rt = tokio::runtime::Builder::new_current_thread().build().unwrap();
        rt.block_on(async {
            let mut fut = Box::pin(blocking(move || tell.send(7).unwrap()));
            let polled = std::future::poll_fn(|cx| std::task::Poll::Ready(fut.as_mut().poll(cx))).await;
            drop(fut);
            let _ = polled;
        });
        assert_eq!(told.recv(), Ok(7));
    }
}
