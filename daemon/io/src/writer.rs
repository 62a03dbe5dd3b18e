//! Writes into the page cache: many requests for one hand-over.
//!
//! Some file systems (ext4 among them) cannot say whether a cached write would wait, so the kernel gives each one that
//! comes through a ring to a worker of its own, one hand-over a request; and as they all take the file's lock, they gain
//! nothing by being many. Here one pool thread at a time takes everything that has queued up for a file, does it in order,
//! and tells the IOThreads once a batch.
//!
//! A job owns its buffer and the descriptor; if its future is dropped it is done all the same and the result is discarded.

use crate::fd::Fd;
use crate::polling::note_event;
use crate::ring::Request;
use crate::thread;
use nix::errno::Errno;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

/// Results that are told together at most: the first of them waits for the last.
const BATCH: usize = 16;
/// Bytes after which results are told: to write them takes longer than to tell, and whoever waits can bring the next ones
/// meanwhile.
const BATCH_BYTES: usize = 128 << 10;

/// The queue of one file.
#[derive(Default)]
pub(crate) struct Writer {
    /// Held to push or to take, never across a write or an await.
    queue: Mutex<Queue>,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    /// A pool thread is at work and looks at the queue again before it ends.
    busy: bool,
}

struct Job {
    request: Request,
    slot: Arc<Slot>,
    mailbox: Option<Arc<Mailbox>>,
}

/// Where a job's result arrives.
#[derive(Default)]
struct Slot {
    state: Mutex<SlotState>,
}

#[derive(Default)]
struct SlotState {
    result: Option<Result<usize, Errno>>,
    waiting: Option<Waker>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Writer {
    /// Queues a write and waits for its result.
    pub(crate) async fn write(self: &Arc<Self>, fd: &Arc<Fd>, request: Request) -> Result<usize, Errno> {
        let slot = Arc::new(Slot::default());
        let job = Job { request, slot: Arc::clone(&slot), mailbox: thread::current_mailbox() };
        let idle = {
            let mut queue = lock(&self.queue);
            queue.jobs.push_back(job);
            !std::mem::replace(&mut queue.busy, true)
        };
        if idle {
            let (this, fd) = (Arc::clone(self), Arc::clone(fd));
            if let Err(error) = thread::current_pool().execute(Box::new(move || this.work(&fd))) {
                // No thread: nobody is at work, so all that has queued up fails now.
                let errno = error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
                let jobs = {
                    let mut queue = lock(&self.queue);
                    queue.busy = false;
                    std::mem::take(&mut queue.jobs)
                };
                tell(jobs.into_iter().map(|job| (job.slot, job.mailbox, Err(errno))));
            }
        }
        poll_fn(|cx| slot.poll(cx)).await
    }

    /// Writes until the queue is empty.
    fn work(&self, fd: &Fd) {
        let mut done = Vec::with_capacity(BATCH);
        let mut bytes = 0;
        loop {
            let next = {
                let mut queue = lock(&self.queue);
                let next = queue.jobs.pop_front();
                // With results still to tell, the end is decided after they have been told.
                queue.busy = next.is_some() || !done.is_empty();
                next
            };
            let last = next.is_none();
            if let Some(Job { request, slot, mailbox }) = next {
                let result = request.run(fd);
                bytes += result.unwrap_or(0);
                done.push((slot, mailbox, result));
            }
            if done.len() >= BATCH || bytes >= BATCH_BYTES || last {
                if done.is_empty() {
                    return;
                }
                tell(done.drain(..));
                bytes = 0;
            }
        }
    }
}

impl Slot {
    fn poll(&self, cx: &mut Context<'_>) -> Poll<Result<usize, Errno>> {
        let mut state = lock(&self.state);
        match state.result {
            Some(result) => Poll::Ready(result),
            None => {
                state.waiting = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

/// Delivers results; each IOThread is woken once.
fn tell(results: impl Iterator<Item = (Arc<Slot>, Option<Arc<Mailbox>>, Result<usize, Errno>)>) {
    let mut boxes: Vec<Arc<Mailbox>> = Vec::new();
    for (slot, mailbox, result) in results {
        let waiting = {
            let mut state = lock(&slot.state);
            state.result = Some(result);
            state.waiting.take()
        };
        match (waiting, mailbox) {
            (Some(waker), Some(mailbox)) => {
                lock(&mailbox.state).letters.push(waker);
                if !boxes.iter().any(|other| Arc::ptr_eq(other, &mailbox)) {
                    boxes.push(mailbox);
                }
            }
            (Some(waker), None) => waker.wake(),
            // Not waited for yet, or not any more.
            (None, _) => {}
        }
    }
    for mailbox in boxes {
        mailbox.ring();
    }
}

/// Wake-ups from other threads for the tasks of one IOThread: one signal for all that have gathered.
#[derive(Default)]
pub(crate) struct Mailbox {
    /// Held to push or to take, never across a wake-up or an await.
    state: Mutex<Letters>,
}

#[derive(Default)]
struct Letters {
    letters: Vec<Waker>,
    owner: Option<Waker>,
}

impl Mailbox {
    fn ring(&self) {
        // Taken, so that the owner is woken once until it has looked.
        let owner = lock(&self.state).owner.take();
        if let Some(owner) = owner {
            owner.wake();
        }
    }

    /// Passes the wake-ups on, on the IOThread that owns the box; for ever.
    pub(crate) async fn deliver(&self) {
        let mut letters = Vec::new();
        poll_fn(|cx| {
            {
                let mut state = lock(&self.state);
                state.owner = Some(cx.waker().clone());
                std::mem::swap(&mut letters, &mut state.letters);
            }
            if !letters.is_empty() {
                note_event();
            }
            letters.drain(..).for_each(Waker::wake);
            Poll::<()>::Pending
        })
        .await;
    }
}
