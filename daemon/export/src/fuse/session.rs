//! [`run`]: one thread of an export, its requests in flight and their replies.
//!
//! The task takes requests until there are none, starts each where it found it, replies to those that need not wait at once,
//! and only then sleeps. A request that was taken is always served and replied to, so memory is bounded by taking only while
//! those in flight hold less than [`MAX_BYTES`] and are fewer than [`MAX_SLOTS`]. Where requests come from is a [`Source`].
//! Before it sleeps it looks for the next one for a moment where that was worth it before, unless the properties of its thread say for
//! how long that one looks.

use super::file::File;
use super::reply::Reply;
use super::request::{Init, Operation, Request};
use crate::patience::Patience;
use crate::slots::Slots;
use block::{Errno, IoResult};
use buf::IoBuf;
use std::fmt;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio::sync::watch;

#[cfg(doc)]
use crate::slots::MAX_SLOTS;

/// The bytes that the requests in flight of one thread may hold, beyond that of the last one.
const MAX_BYTES: usize = 32 << 20;
/// Requests that are taken before others on the thread have a turn.
const BUDGET: usize = 64;
/// How long a thread looks for the next request: the kernel has to wake up the program that waits for a reply before that can ask
/// for more.
const PATIENCE: Duration = Duration::from_micros(50);

/// Why a thread takes no more requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// It was told to stop.
    Stopped,
    /// Somebody has unmounted the file system.
    Unmounted,
    /// The kernel has ended the connection, as an administrator can ask it to. The mount is still there.
    Aborted,
}

/// A request as it came.
pub(crate) struct Incoming<T> {
    pub request: Request,
    /// The data of a write; where those of a read are to be put, if not anywhere.
    pub room: Option<IoBuf>,
    /// Bytes of memory that it holds of those that the thread may have.
    pub cost: usize,
    /// What the source knows it by.
    pub ticket: T,
}

/// What comes next; none if it was no request.
pub(crate) type Next<T> = Result<Option<Incoming<T>>, End>;

/// Where requests come from and replies go to.
pub(crate) trait Source {
    type Ticket;

    /// The next request; none if what came was none.
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Next<Self::Ticket>>;

    /// As [`poll_next`](Self::poll_next) right after it had none, without being woken before: there may be one now.
    fn look(&mut self, cx: &mut Context<'_>) -> Poll<Next<Self::Ticket>>;

    /// Replies to a request, at the latest with the next [`flush`](Self::flush) or when there are no more requests.
    fn reply(&mut self, ticket: Self::Ticket, unique: u64, answer: IoResult<Answer>);

    /// Gives the kernel what it has not been given yet.
    fn flush(&mut self);
}

/// What a request brought.
pub(crate) enum Answer {
    Reply(Reply),
    Data(IoBuf),
    /// The kernel wants to hear nothing.
    Nothing,
    /// A reply, and what is to be done when the kernel has taken it.
    Then(Reply, Box<dyn FnOnce()>),
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reply(reply) | Self::Then(reply, _) => reply.fmt(f),
            Self::Data(data) => write!(f, "{} bytes", data.len()),
            Self::Nothing => f.write_str("nothing"),
        }
    }
}

/// Answers the kernel's first request, with which it is agreed on how further ones come.
pub(crate) trait Greet {
    async fn greet(&self, unique: u64, offered: &Init) -> Answer;
}

/// What goes to the kernel, and the bytes that are free with it.
struct Done<T> {
    unique: u64,
    answer: IoResult<Answer>,
    cost: usize,
    ticket: T,
}

/// Serves `file` on `source` until `stop` is true or the source ends. Requests that were taken are replied to before
/// it ends. `ours` says that the thread is no IOThread of the user's.
pub(crate) async fn run<S: Source>(
    source: S,
    file: Arc<File>,
    greet: &impl Greet,
    mut stop: watch::Receiver<bool>,
    ours: bool,
) -> End {
    let start = |incoming: Incoming<S::Ticket>| {
        let file = &file;
        async move {
            let Incoming { request: Request { unique, operation }, room, cost, ticket } = incoming;
            let answer = match operation {
                Ok(operation) => serve(file, greet, unique, operation, room).await,
                Err(errno) => Err(errno),
            };
            if let Err(errno) = &answer {
                tracing::debug!(target: "fuse_error", unique, %errno);
            }
            Done { unique, answer, cost, ticket }
        }
    };
    let patience = Patience::new(PATIENCE);
    let mut session = Session { source, slots: Slots::new(), bytes: 0, end: None, ours, patience, start };
    let mut stopped = pin!(async move {
        // An error says that the export is gone.
        let _ = stop.wait_for(|stop| *stop).await;
    });
    let stop_waker = session.slots.extra_waker();
    // It is looked at once now, and then only when it woke.
    stop_waker.wake_by_ref();
    std::future::poll_fn(|cx| {
        session.slots.register(cx.waker());
        if session.end.is_none()
            && session.slots.extra_woken()
            && stopped.as_mut().poll(&mut Context::from_waker(&stop_waker)).is_ready()
        {
            session.end = Some(End::Stopped);
        }
        let polled = session.poll(cx);
        session.source.flush();
        polled
    })
    .await
}

struct Session<S, F, B> {
    source: S,
    slots: Slots<F>,
    /// Bytes that requests in flight hold.
    bytes: usize,
    end: Option<End>,
    ours: bool,
    patience: Patience,
    start: B,
}

impl<S, F, B> Session<S, F, B>
where
    S: Source,
    F: Future<Output = Done<S::Ticket>>,
    B: Fn(Incoming<S::Ticket>) -> F,
{
    /// Does what can be done now. Ready when nothing more is taken and all requests have ended.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        let Self { slots, bytes, source, .. } = self;
        slots.poll_woken(|done| {
            *bytes = bytes.saturating_sub(done.cost);
            source.reply(done.ticket, done.unique, done.answer);
        });
        for _ in 0..BUDGET {
            if let Some(end) = self.end {
                return if self.slots.busy() == 0 { Poll::Ready(end) } else { Poll::Pending };
            }
            // Whatever ends wakes this task.
            if self.slots.is_full() || self.bytes >= MAX_BYTES {
                return Poll::Pending;
            }
            let next = match self.source.poll_next(cx) {
                Poll::Pending => std::task::ready!(self.look(cx)),
                Poll::Ready(next) => next,
            };
            self.patience.found(Instant::now);
            match next {
                Ok(Some(incoming)) => self.take(incoming),
                Ok(None) => {}
                Err(end) => self.end = Some(end),
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// With nothing else to wait for, looks for a request that is about to come; and then again after others had their turn.
    fn look(&mut self, cx: &mut Context<'_>) -> Poll<Next<S::Ticket>> {
        let allowed = self.ours || io::is_polling_for_queues();
        if !allowed || self.slots.busy() > 0 || !self.patience.look_again(Instant::now()) {
            return Poll::Pending;
        }
        let next = self.source.look(cx);
        if next.is_pending() {
            cx.waker().wake_by_ref();
        }
        next
    }

    fn take(&mut self, incoming: Incoming<S::Ticket>) {
        let Request { unique, operation } = &incoming.request;
        tracing::trace!(target: "fuse_request", unique, ?operation);
        let cost = incoming.cost;
        match self.slots.start((self.start)(incoming)) {
            Some(done) => self.source.reply(done.ticket, done.unique, done.answer),
            None => self.bytes += cost,
        }
    }
}

/// Serves one request. Reads and writes are the hot path and wait in place; the rest is boxed, so that the future of
/// a request stays small.
async fn serve(
    file: &File,
    greet: &impl Greet,
    unique: u64,
    operation: Operation,
    room: Option<IoBuf>,
) -> IoResult<Answer> {
    match operation {
        Operation::Read { at, len } => file.read(at, len, room).await.map(Answer::Data),
        Operation::Write { at, .. } => {
            let data = room.ok_or(Errno::EINVAL)?;
            file.write(at, data).await.map(|len| Answer::Reply(Reply::written(unique, len)))
        }
        Operation::Init(offered) => Ok(Box::pin(greet.greet(unique, &offered)).await),
        other => Box::pin(rare(file, unique, other)).await,
    }
}

async fn rare(file: &File, unique: u64, operation: Operation) -> IoResult<Answer> {
    let reply = match operation {
        // There are no names in a file.
        Operation::Lookup => return Err(Errno::ENOENT),
        Operation::Forget | Operation::Destroy => return Ok(Answer::Nothing),
        Operation::GetAttributes => Reply::attributes(unique, &file.shown().await),
        Operation::SetAttributes(wanted) => {
            file.set(&wanted).await?;
            Reply::attributes(unique, &file.shown().await)
        }
        Operation::Open => Reply::opened(unique),
        Operation::StatFs => Reply::file_system(unique, file.size()),
        Operation::Release => Reply::done(unique),
        Operation::Sync => {
            file.sync().await?;
            Reply::done(unique)
        }
        Operation::Allocate { at, len, mode } => {
            file.allocate(at, len, mode).await?;
            Reply::done(unique)
        }
        Operation::Seek { at, whence } => Reply::found(unique, file.seek(at, whence).await?),
        Operation::Init(_) | Operation::Read { .. } | Operation::Write { .. } => return Err(Errno::EIO),
    };
    Ok(Answer::Reply(reply))
}
