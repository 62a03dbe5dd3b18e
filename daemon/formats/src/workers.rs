//! Work that keeps a processor busy for long, such as unpacking a cluster: it goes to other threads, so that the event loop
//! serves other requests meanwhile and all processors take part.

use block::{Errno, IoResult};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::oneshot;

type Job = Box<dyn FnOnce() + Send>;

/// Runs a job on another thread, or drops it where there is none to be had.
type Start = dyn Fn(Job) + Send + Sync;

/// Where such work goes; clones are the same place. By default it is done at once, on the thread that asks for it.
#[derive(Clone, Default)]
pub struct Workers(Option<Arc<Place>>);

impl std::fmt::Debug for Workers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Workers").field(&self.0.is_some()).finish()
    }
}

/// The jobs of one image. No more threads than processors work on them at a time: others would only take turns with them, and
/// with the event loops.
struct Place {
    start: Arc<Start>,
    most: usize,
    /// Guards what waits; never across an await or a job.
    queue: Mutex<Queue>,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    /// Threads that work or have been asked for. While there are jobs there is one at least.
    threads: usize,
}

impl Place {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(self: &Arc<Self>, job: Job) {
        {
            let mut queue = self.lock();
            queue.jobs.push_back(job);
            if queue.threads >= self.most {
                return;
            }
            queue.threads += 1;
        }
        let worker = Worker { place: Arc::clone(self), ended: false };
        (self.start)(Box::new(move || worker.work()));
    }
}

/// One of the threads, as long as it is counted.
struct Worker {
    place: Arc<Place>,
    ended: bool,
}

impl Worker {
    fn work(mut self) {
        while let Some(job) = self.next() {
            job();
        }
    }

    /// The next job. Where there is none the thread is not counted any more, at the same moment.
    fn next(&mut self) -> Option<Job> {
        let mut queue = self.place.lock();
        let job = queue.jobs.pop_front();
        if job.is_none() {
            queue.threads -= 1;
            self.ended = true;
        }
        job
    }
}

impl Drop for Worker {
    /// Without its thread: the jobs are dropped too if there is no other one for them.
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        let mut queue = self.place.lock();
        queue.threads -= 1;
        let left = if queue.threads == 0 { std::mem::take(&mut queue.jobs) } else { VecDeque::new() };
        drop(queue);
        drop(left);
    }
}

impl Workers {
    /// Work goes to `start`, which runs it later on some thread, or drops it; for an image to as many threads at a time as the
    /// process has processors.
    pub fn new(start: impl Fn(Box<dyn FnOnce() + Send>) + Send + Sync + 'static) -> Self {
        // Asked once, on the thread that starts all: it looks into files.
        let most = std::thread::available_parallelism().map_or(1, usize::from);
        Self::with(Arc::new(start), most)
    }

    fn with(start: Arc<Start>, most: usize) -> Self {
        Self(Some(Arc::new(Place { start, most, queue: Mutex::default() })))
    }

    /// The same threads for another image, whose jobs do not wait for this one's.
    pub fn another(&self) -> Self {
        self.0.as_ref().map_or_else(Self::default, |place| Self::with(Arc::clone(&place.start), place.most))
    }

    /// The result of `work`, which runs to its end even if the future is dropped.
    ///
    /// # Errors
    /// `EIO` if the work did not end as it should have.
    pub async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> IoResult<T> + Send + 'static) -> IoResult<T> {
        let Some(place) = &self.0 else { return work() };
        let (done, result) = oneshot::channel();
        let work = Arc::new(Mutex::new(Some(work)));
        let job = Arc::clone(&work);
        place.put(Box::new(move || {
            // Nobody waiting any more is fine.
            if let Some(work) = take(&job) {
                let _ = done.send(work());
            }
        }));
        match result.await {
            Ok(result) => result,
            Err(_) => take(&work).map_or(Err(Errno::EIO), |work| work()),
        }
    }
}

fn take<W>(work: &Mutex<Option<W>>) -> Option<W> {
    work.lock().unwrap_or_else(PoisonError::into_inner).take()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    fn all(
        workers: &Workers,
        jobs: usize,
        work: impl Fn(usize) -> IoResult<usize> + Send + Sync + 'static,
    ) -> Vec<usize> {
        let work = Arc::new(work);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let one = |job| {
            let work = Arc::clone(&work);
            workers.run(move || work(job))
        };
        let all = tokio::task::LocalSet::new();
        runtime
            .block_on(all.run_until(block::join::each((0..jobs).map(one).collect())))
            .into_iter()
            .collect::<IoResult<_>>()
            .unwrap()
    }

    #[test]
    fn all_work_is_done_by_as_many_threads_as_there_are_processors() {
        let workers = Workers::new(|job| drop(std::thread::spawn(job)));
        let most = workers.0.as_ref().unwrap().most;
        let (now, peak) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let seen = Arc::clone(&peak);
        let done = all(&workers, 500, move |job| {
            seen.fetch_max(now.fetch_add(1, SeqCst) + 1, SeqCst);
            std::thread::yield_now();
            now.fetch_sub(1, SeqCst);
            Ok(job)
        });
        assert_eq!(done, (0..500).collect::<Vec<_>>());
        assert!((1..=most).contains(&peak.load(SeqCst)));
    }

    #[test]
    fn work_that_gets_no_thread_is_done_by_who_waits_for_it() {
        let given = Arc::new(AtomicUsize::new(0));
        // None at first, then some.
        let workers = Workers::new(move |job| match given.fetch_add(1, SeqCst) {
            0..3 => drop(job),
            _ => drop(std::thread::spawn(job)),
        });
        for _ in 0..3 {
            assert_eq!(all(&workers, 20, Ok), (0..20).collect::<Vec<_>>());
        }
    }
}
