//! Bytes on their way between two tasks, and clients that exist in memory alone: those of multiplexers and hubs.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use tokio::sync::Notify;

use super::Connection;

/// How many bytes may wait before the writer has to.
const CAPACITY: usize = 64 * 1024;

/// Bytes in order. Lives on one thread; no call waits.
#[derive(Default)]
pub(super) struct Queue(RefCell<State>);

#[derive(Default)]
struct State {
    bytes: VecDeque<u8>,
    is_closed: bool,
    reader: Option<Waker>,
    /// Who waits for room, or until the queue is empty.
    writers: Vec<Waker>,
}

impl Queue {
    /// Room that a writer may use. None once the queue is closed.
    pub(super) fn room(&self) -> Option<usize> {
        let state = self.0.borrow();
        (!state.is_closed).then(|| CAPACITY.saturating_sub(state.bytes.len()))
    }

    /// Adds bytes, more than there is room for if need be.
    pub(super) fn push(&self, bytes: &[u8]) {
        let mut state = self.0.borrow_mut();
        state.bytes.extend(bytes);
        if let Some(reader) = state.reader.take() {
            reader.wake();
        }
    }

    /// Nothing is written any more. What is there can be read.
    pub(super) fn close(&self) {
        let mut state = self.0.borrow_mut();
        state.is_closed = true;
        state.reader.take().into_iter().chain(std::mem::take(&mut state.writers)).for_each(Waker::wake);
    }

    pub(super) fn is_closed(&self) -> bool {
        self.0.borrow().is_closed
    }

    /// Ready when there is room, or none will ever be needed.
    pub(super) fn poll_room(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.poll_writer(cx, |state| state.bytes.len() < CAPACITY)
    }

    /// Ready when everything was taken, or nobody takes it any more.
    pub(super) fn poll_empty(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.poll_writer(cx, |state| state.bytes.is_empty())
    }

    fn poll_writer(&self, cx: &mut Context<'_>, is_ready: fn(&State) -> bool) -> Poll<()> {
        let mut state = self.0.borrow_mut();
        if state.is_closed || is_ready(&state) {
            return Poll::Ready(());
        }
        if !state.writers.iter().any(|waker| waker.will_wake(cx.waker())) {
            state.writers.push(cx.waker().clone());
        }
        Poll::Pending
    }

    /// Takes bytes; 0 says that there will never be more.
    pub(super) fn poll_read(&self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let mut state = self.0.borrow_mut();
        if state.bytes.is_empty() && !state.is_closed {
            state.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let count = io::Read::read(&mut state.bytes, buffer)?;
        std::mem::take(&mut state.writers).into_iter().for_each(Waker::wake);
        Poll::Ready(Ok(count))
    }

    /// Hands the front of the queue to `write`, which says how much of it it took. Pending when the queue is empty.
    fn poll_take(
        &self,
        cx: &mut Context<'_>,
        write: impl FnOnce(&[u8]) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        let mut state = self.0.borrow_mut();
        if state.bytes.is_empty() {
            state.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let count = write(state.bytes.as_slices().0)?;
        state.bytes.drain(..count);
        if count > 0 {
            std::mem::take(&mut state.writers).into_iter().for_each(Waker::wake);
        }
        Poll::Ready(Ok(count))
    }
}

/// What takes the bytes that come from a device below.
pub(super) trait Sink {
    /// Ready when there is room for bytes.
    fn poll_room(&self, cx: &mut Context<'_>) -> Poll<()>;

    /// Takes bytes.
    fn take(&self, bytes: &[u8]);

    /// No more bytes will come. Those above may still answer.
    fn end(&self);

    /// Whether those above have all let go of the client. When that changes, something is pushed to the client's queue.
    fn is_idle(&self) -> bool;
}

/// Moves bytes between the client of a device and those above, until the client has gone.
pub(super) async fn shuttle(connection: &Connection, out: &Queue, sink: &dyn Sink) -> io::Result<()> {
    let mut at_end = false;
    std::future::poll_fn(|cx| poll_shuttle(cx, connection, out, sink, &mut at_end)).await
}

fn poll_shuttle(
    cx: &mut Context<'_>,
    connection: &Connection,
    out: &Queue,
    sink: &dyn Sink,
    at_end: &mut bool,
) -> Poll<io::Result<()>> {
    while !*at_end && sink.poll_room(cx).is_ready() {
        let mut buffer = [0; 4096];
        // Descriptors have no way through here; they are closed.
        match connection.poll_read(cx, &mut buffer, &mut Vec::new())? {
            Poll::Pending => break,
            Poll::Ready(0) => {
                *at_end = true;
                sink.end();
            }
            Poll::Ready(count) => sink.take(buffer.get(..count).unwrap_or_default()),
        }
    }
    if *at_end && connection.is_gone() {
        return Poll::Ready(Ok(()));
    }
    while connection.poll_writable(cx)?.is_ready() {
        if out.poll_take(cx, |bytes| connection.try_write(bytes))?.is_pending() {
            // The queue is empty. The answers to the last bytes are still to be sent.
            if *at_end && sink.is_idle() {
                return Poll::Ready(Ok(()));
            }
            break;
        }
    }
    Poll::Pending
}

/// Where somebody waits for the clients that exist in memory.
#[derive(Default)]
pub(super) struct Slot {
    next: RefCell<Option<Connection>>,
    /// Nobody will come any more.
    ended: std::cell::Cell<bool>,
    changed: Notify,
}

impl Slot {
    /// The next client, or none for ever.
    pub(super) async fn connection(&self) -> Option<Connection> {
        loop {
            let next = self.next.borrow_mut().take();
            if next.is_some() || self.ended.get() {
                return next;
            }
            self.changed.notified().await;
        }
    }

    pub(super) fn offer(&self, connection: Connection) {
        let before = self.next.borrow_mut().replace(connection);
        drop(before);
        self.changed.notify_one();
    }

    /// Takes an offer back that nobody took.
    pub(super) fn withdraw(&self) {
        let before = self.next.borrow_mut().take();
        drop(before);
    }

    pub(super) fn end(&self) {
        self.ended.set(true);
        self.changed.notify_one();
    }
}

/// The input of a client that exists in memory, closed with it.
pub(super) struct Input(pub(super) Rc<Queue>);

impl Drop for Input {
    fn drop(&mut self) {
        self.0.close();
    }
}
