//! [`run`]: one thread of an export, its requests in flight and their replies.
//!
//! The task reads requests until there are none, starts each where it found it, replies to those that need not wait at once,
//! and only then sleeps. A request that was read is always served and replied to, so memory is bounded by reading only while
//! those in flight hold less than [`MAX_BYTES`] and are fewer than [`MAX_SLOTS`].

use super::file::File;
use super::reply::Reply;
use super::request::{HEAD, Operation, Request, parse};
use super::wire::{IN_HEADER, MAX_TRANSFER, WRITE_IN};
use crate::slots::Slots;
use block::{Errno, IoResult};
use buf::IoBuf;
use io::FuseDevice;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::sync::watch;

#[cfg(doc)]
use crate::slots::MAX_SLOTS;

/// The bytes that the requests in flight of one thread may hold, beyond that of the last one.
const MAX_BYTES: usize = 32 << 20;
/// Data of a write up to this length are copied, so that the large buffer serves for the next request, and stays warm.
const COPY_UP_TO: usize = 16 << 10;
/// Requests that are read before others on the thread have a turn.
const BUDGET: usize = 64;

/// Why a thread does not read any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// It was told to stop.
    Stopped,
    /// Somebody has unmounted the file system.
    Unmounted,
    /// The kernel has ended the connection, as an administrator can ask it to. The mount is still there.
    Aborted,
}

/// What goes to the kernel, and the bytes that are free with it.
struct Done {
    unique: u64,
    answer: IoResult<Answer>,
    cost: usize,
}

/// What a request brought.
enum Answer {
    Reply(Reply),
    Data(IoBuf),
    /// The kernel wants to hear nothing.
    Nothing,
}

/// Serves `file` on `device` until `stop` is true or the mount has ended. Requests that were read are replied to before
/// it ends.
pub(crate) async fn run(device: FuseDevice, file: Arc<File>, mut stop: watch::Receiver<bool>) -> End {
    let start = |request: Request, data: Option<IoBuf>, cost: usize| {
        let file = &file;
        async move {
            let unique = request.unique;
            let answer = match request.operation {
                Ok(operation) => serve(file, unique, operation, data).await,
                Err(errno) => Err(errno),
            };
            Done { unique, answer, cost }
        }
    };
    let mut session = Session {
        device: &device,
        head: IoBuf::alloc(IN_HEADER + WRITE_IN),
        body: IoBuf::alloc(body_len()),
        slots: Slots::new(),
        bytes: 0,
        end: None,
        start,
    };
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
        session.poll(cx)
    })
    .await
}

/// The kernel wants room for the longest write whatever it sends.
fn body_len() -> usize {
    usize::try_from(MAX_TRANSFER).unwrap_or(usize::MAX)
}

struct Session<'a, F, S> {
    device: &'a FuseDevice,
    /// Where the fixed part of a write goes, so that its data are aligned in `body`; and the front of everything else.
    head: IoBuf,
    body: IoBuf,
    slots: Slots<F>,
    /// Bytes that requests in flight hold.
    bytes: usize,
    end: Option<End>,
    start: S,
}

impl<F, S> Session<'_, F, S>
where
    F: Future<Output = Done>,
    S: Fn(Request, Option<IoBuf>, usize) -> F,
{
    /// Does what can be done now. Ready when nothing more is read and all requests have ended.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        let Self { slots, bytes, device, .. } = self;
        slots.poll_woken(|done| {
            *bytes = bytes.saturating_sub(done.cost);
            send(device, done);
        });
        for _ in 0..BUDGET {
            if let Some(end) = self.end {
                return if self.slots.busy() == 0 { Poll::Ready(end) } else { Poll::Pending };
            }
            // Whatever ends wakes this task.
            if self.slots.is_full() || self.bytes >= MAX_BYTES {
                return Poll::Pending;
            }
            match std::task::ready!(self.device.poll_receive(cx, &[&self.head, &self.body])) {
                Ok(received) => self.take(received),
                // Its caller gave up meanwhile.
                Err(Errno::ENOENT) => {}
                Err(Errno::ECONNABORTED) => self.end = Some(End::Aborted),
                Err(_) => self.end = Some(End::Unmounted),
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Starts the request that lies in the buffers.
    fn take(&mut self, received: usize) {
        let mut raw = [0; HEAD];
        let front = self.head.read_at(0, &mut raw);
        self.body.read_at(0, raw.get_mut(front..).unwrap_or_default());
        let Some(request) = parse(raw.get(..received.min(HEAD)).unwrap_or_default(), received) else {
            tracing::warn!(target: "fuse_malformed", received, "a FUSE request makes no sense, and is left without a reply");
            return;
        };
        tracing::trace!(target: "fuse_request", unique = request.unique, operation = ?request.operation);
        let (data, cost) = match request.operation {
            Ok(Operation::Write { len, .. }) => {
                let len = usize::try_from(len).unwrap_or(usize::MAX);
                let (data, held) = self.data(len);
                (Some(data), held)
            }
            Ok(Operation::Read { len, .. }) => (None, usize::try_from(len).unwrap_or(usize::MAX)),
            _ => (None, 0),
        };
        match self.slots.start((self.start)(request, data, cost)) {
            Some(done) => send(self.device, done),
            None => self.bytes += cost,
        }
    }

    /// The data of a write, and the bytes of memory that they hold.
    fn data(&mut self, len: usize) -> (IoBuf, usize) {
        if len <= COPY_UP_TO {
            let copy = IoBuf::alloc(len);
            copy.copy_from(0, &self.body.slice(0, len));
            return (copy, len);
        }
        let mut whole = std::mem::replace(&mut self.body, IoBuf::alloc(body_len()));
        whole.truncate(len);
        (whole, body_len())
    }
}

/// Replies.
fn send(device: &FuseDevice, done: Done) {
    let Done { unique, answer, .. } = done;
    let sent = match answer {
        Ok(Answer::Reply(reply)) => device.reply(reply.bytes(), None),
        Ok(Answer::Data(data)) => device.reply(Reply::data(unique, data.len()).bytes(), Some(&data)),
        Ok(Answer::Nothing) => Ok(()),
        Err(errno) => {
            tracing::debug!(target: "fuse_error", unique, %errno);
            device.reply(Reply::failed(unique, errno).bytes(), None)
        }
    };
    match sent {
        // Nobody waits for it any more, or the mount is gone.
        Ok(()) | Err(Errno::ENOENT | Errno::ENODEV | Errno::ECONNABORTED | Errno::EPERM) => {}
        Err(errno) => {
            tracing::warn!(target: "fuse_reply_refused", unique, %errno, "the kernel refuses a FUSE reply");
            // Whoever waits shall not wait for ever.
            let _ = device.reply(Reply::failed(unique, Errno::EIO).bytes(), None);
        }
    }
}

/// Serves one request. Reads and writes are the hot path and wait in place; the rest is boxed, so that the future of
/// a request stays small.
async fn serve(file: &File, unique: u64, operation: Operation, data: Option<IoBuf>) -> IoResult<Answer> {
    match operation {
        Operation::Read { at, len } => file.read(at, len).await.map(Answer::Data),
        Operation::Write { at, .. } => {
            let data = data.ok_or(Errno::EINVAL)?;
            file.write(at, data).await.map(|len| Answer::Reply(Reply::written(unique, len)))
        }
        other => Box::pin(rare(file, unique, other)).await,
    }
}

async fn rare(file: &File, unique: u64, operation: Operation) -> IoResult<Answer> {
    let reply = match operation {
        Operation::Init(offered) => {
            tracing::debug!(target: "fuse_init", ?offered);
            Reply::init(unique, &offered)
        }
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
        Operation::Read { .. } | Operation::Write { .. } => return Err(Errno::EIO),
    };
    Ok(Answer::Reply(reply))
}
