//! The transmission phase of one client: one task on one IOThread, `[NBD Transmission]`.
//!
//! The task receives as much as there is, starts each request where it finds it, gathers all replies that are ready into one
//! send, and only then waits. What bounds its memory: the number of requests in flight ([`MAX_SLOTS`]), and
//! the bytes of requests and replies together ([`MAX_BYTES`]). A client that does not read its replies is not read from.
//!
//! It ends when the client leaves, breaks the protocol or is sent away. Whatever the reason, it stops reading, waits for the
//! requests that were started, sends what can be sent, and closes.

use super::export::Client;
use super::input::Input;
use super::negotiate::Session;
use super::reply::{self, Origin};
use super::request::{self, Command, EXTENDED_HEADER, Header, Limits, MAX_STATUS_PAYLOAD, Verdict};
use super::serve::{Outcome, serve};
use super::wire::{MAX_EXTENTS, error};
use crate::Export;
use crate::patience::Patience;
use crate::slots::Slots;
use block::Disk;
use buf::IoBuf;
use io::{SendQueue, Stream};
use std::pin::pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

#[cfg(doc)]
use crate::slots::MAX_SLOTS;

/// The bytes that the requests and replies of one connection may hold: as much as the largest single request.
const MAX_BYTES: usize = 32 << 20;
/// Replies of this many bytes are sent before more requests are started.
const SEND_FROM: usize = 256 << 10;
/// How long the last replies may take to be sent when the connection is to end.
const GRACE: Duration = Duration::from_secs(2);
/// What to ask of the kernel as buffer of a unix socket, in bytes.
const SOCKET_BUFFER: usize = 1 << 20;

/// What the next bytes of the client are.
#[derive(Debug)]
enum Expect {
    Header,
    /// The data of a write.
    Data(Origin, Command, usize),
    /// The payload of a block status.
    Status(Origin, Header, usize),
    /// A payload that nobody wants, and what the client is told after it.
    Skip(Origin, u64, String),
}

/// A request, ready to be served.
struct Job {
    origin: Origin,
    command: Command,
    payload: Option<IoBuf>,
    /// The bytes that it may hold.
    cost: usize,
}

/// A request that was served.
struct Done {
    origin: Origin,
    command: Command,
    cost: usize,
    outcome: Outcome,
}

/// Why no more requests are started for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pause {
    /// More bytes of the client are needed.
    Input,
    /// Others have to end, or replies to be sent, first.
    Room,
}

/// Serves `client` until it leaves. `early` are the bytes that came in with the handshake.
///
/// With `patience` it is this task that looks for the next request before it sleeps. An IOThread does so itself, as its
/// properties say.
pub(crate) async fn run(stream: Stream, client: Client, session: Session, early: Vec<u8>, patience: Option<Patience>) {
    stream.raise_buffers(SOCKET_BUFFER);
    let disk = client.export().disk().clone();
    let start = |job: Job| {
        let disk = &disk;
        async move {
            let Job { origin, command, payload, cost } = job;
            let outcome = serve(disk, command, payload).await;
            Done { origin, command, cost, outcome }
        }
    };
    let mut connection = Connection {
        stream: &stream,
        disk: &disk,
        client: &client,
        session: &session,
        input: Input::new(&early),
        expect: Expect::Header,
        slots: Slots::new(),
        out: SendQueue::new(),
        bytes: 0,
        patience,
        reading: true,
        start,
    };
    drop(early);
    let mut closing = pin!(client.closing());
    let closing_waker = connection.slots.extra_waker();
    let mut watching = true;
    // It is looked at once now, and then only when it woke.
    closing_waker.wake_by_ref();
    std::future::poll_fn(|cx| {
        connection.slots.register(cx.waker());
        if watching
            && connection.slots.extra_woken()
            && closing.as_mut().poll(&mut Context::from_waker(&closing_waker)).is_ready()
        {
            watching = false;
            connection.reading = false;
        }
        connection.poll(cx)
    })
    .await;
    let Connection { mut out, .. } = connection;
    if !out.is_empty() {
        // A client that does not take them has had its time.
        let _ = tokio::time::timeout(GRACE, stream.send(&mut out)).await;
    }
    let _ = stream.shutdown_send();
    tracing::debug!(target: "nbd_trip", export = session.export, "client left");
}

struct Connection<'a, F, S> {
    stream: &'a Stream,
    disk: &'a Disk,
    client: &'a Client,
    session: &'a Session,
    input: Input,
    expect: Expect,
    slots: Slots<F>,
    /// Replies that wait to be sent.
    out: SendQueue,
    /// Bytes that requests in flight may hold.
    bytes: usize,
    patience: Option<Patience>,
    /// Whether more requests are taken in.
    reading: bool,
    start: S,
}

impl<F, S> Connection<'_, F, S>
where
    F: Future<Output = Done>,
    S: Fn(Job) -> F,
{
    /// Does what can be done now. Ready when there is nothing more to read and all requests have ended.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut looked = false;
        loop {
            self.take_results();
            let pause = if self.reading { self.start_requests() } else { Pause::Room };
            let mut moved = false;
            if !self.out.is_empty() {
                let before = self.out.len();
                let sent = pin!(self.stream.send(&mut self.out)).poll(cx);
                if let Poll::Ready(Err(_)) = sent {
                    self.broken();
                }
                moved = self.out.len() < before;
            }
            if !self.reading {
                return if self.slots.busy() == 0 { Poll::Ready(()) } else { Poll::Pending };
            }
            match pause {
                Pause::Input => {
                    if self.poll_receive(cx).is_pending() {
                        if !self.is_patient() {
                            return Poll::Pending;
                        }
                        // Once, then it is the turn of others.
                        if looked || !self.look() {
                            cx.waker().wake_by_ref();
                            return Poll::Pending;
                        }
                        looked = true;
                    }
                }
                Pause::Room if moved => {}
                Pause::Room => return Poll::Pending,
            }
        }
    }

    /// The client cannot be reached any more.
    fn broken(&mut self) {
        self.reading = false;
        self.out.clear();
    }

    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let (own, rest) = self.input.room(self.wanted());
        let received = match &own {
            Some(own) => pin!(self.stream.recv_scattered(&[own, &rest])).poll(cx),
            None => pin!(self.stream.recv(&rest)).poll(cx),
        };
        let received = std::task::ready!(received);
        self.received(received);
        Poll::Ready(())
    }

    fn received(&mut self, received: std::io::Result<usize>) {
        if let Some(patience) = &mut self.patience {
            patience.found(Instant::now);
        }
        match received {
            Ok(0) => self.reading = false,
            Ok(count) => self.input.received(count),
            Err(_) => self.broken(),
        }
    }

    /// With nothing else to wait for, looks for a request that is about to come; true if one has.
    fn look(&mut self) -> bool {
        let (own, rest) = self.input.room(self.wanted());
        let received = match &own {
            Some(own) => self.stream.try_recv(&[own, &rest]),
            None => self.stream.try_recv(&[&rest]),
        };
        if received.as_ref().is_err_and(|e| e.kind() == std::io::ErrorKind::WouldBlock) {
            return false;
        }
        self.received(received);
        true
    }

    /// Whether to look for more rather than to sleep.
    fn is_patient(&mut self) -> bool {
        let Some(patience) = &mut self.patience else { return false };
        self.slots.busy() == 0 && self.out.is_empty() && patience.look_again(Instant::now())
    }

    /// The bytes that have to fit into the buffer at once.
    fn wanted(&self) -> usize {
        match self.expect {
            Expect::Header => request::header_len(self.session.mode),
            Expect::Data(..) | Expect::Status(..) | Expect::Skip(..) => 1,
        }
    }

    fn take_results(&mut self) {
        let Self { slots, out, bytes, .. } = self;
        slots.poll_woken(|done| {
            *bytes = bytes.saturating_sub(done.cost);
            finish(out, done);
        });
    }

    /// Starts requests until something is missing.
    fn start_requests(&mut self) -> Pause {
        while self.reading {
            if self.out.len() >= SEND_FROM {
                return Pause::Room;
            }
            let next = match std::mem::replace(&mut self.expect, Expect::Header) {
                Expect::Header => self.header(),
                Expect::Data(origin, command, len) => self.data(origin, command, len),
                Expect::Status(origin, header, len) => self.status(origin, &header, len),
                Expect::Skip(origin, left, text) => self.skip(origin, left, text),
            };
            if let Err(pause) = next {
                return pause;
            }
        }
        Pause::Room
    }

    fn limits(&self) -> Limits {
        Limits {
            mode: self.session.mode,
            contexts: self.session.contexts,
            writable: self.client.export().is_writable(),
            size: self.disk.size(),
        }
    }

    fn header(&mut self) -> Result<(), Pause> {
        let mode = self.session.mode;
        let mut raw = [0; EXTENDED_HEADER];
        let len = request::header_len(mode);
        let Some(raw) = raw.get_mut(..len) else { return Err(Pause::Input) };
        if !self.input.peek(raw) {
            return Err(Pause::Input);
        }
        let Some(header) = Header::parse(mode, raw) else { return Err(Pause::Input) };
        let verdict = request::check(&header, &self.limits());
        if let Verdict::Serve(command) = &verdict {
            self.admit(command)?;
        }
        self.input.skip(len);
        let Header { flags, command, cookie, offset, length, .. } = header;
        tracing::trace!(target: "nbd_request", cookie, command, flags, offset, length, name = super::wire::command_name(command));
        let origin = Origin { mode, cookie, offset };
        let payload = header.payload(mode);
        match verdict {
            Verdict::Serve(command @ Command::Write { len, .. }) => {
                self.expect = Expect::Data(origin, command, usize::try_from(len).unwrap_or(usize::MAX));
            }
            Verdict::Serve(command) => self.serve(origin, command, None),
            Verdict::NeedsPayload if payload <= u64::try_from(MAX_STATUS_PAYLOAD).unwrap_or(0) => {
                self.expect = Expect::Status(origin, header, usize::try_from(payload).unwrap_or(0));
            }
            Verdict::NeedsPayload => {
                let text = request::status_request(&header, &[], &self.limits()).err().unwrap_or_default();
                self.expect = Expect::Skip(origin, payload, text);
            }
            Verdict::Refuse(text) => self.expect = Expect::Skip(origin, payload, text),
            Verdict::Disconnect => self.reading = false,
            Verdict::Fatal(text) => {
                self.refuse(origin, &text);
                self.reading = false;
            }
        }
        Ok(())
    }

    /// Whether there is room for one more request. The first one always has it.
    fn admit(&self, command: &Command) -> Result<(), Pause> {
        let held = self.bytes + self.out.len();
        let fits = held == 0 || held + self.cost(command) <= MAX_BYTES;
        if self.slots.is_full() || !fits { Err(Pause::Room) } else { Ok(()) }
    }

    /// The bytes that a request may hold while it is served.
    fn cost(&self, command: &Command) -> usize {
        const EXTENT: usize = 32;
        const PIECE: u32 = 1 << 20;
        match command {
            Command::Read { len, .. } | Command::Write { len, .. } => usize::try_from(*len).unwrap_or(usize::MAX),
            Command::Cache { len, .. } => usize::try_from((*len).min(PIECE)).unwrap_or(usize::MAX),
            Command::BlockStatus { one: true, .. } | Command::Flush | Command::Trim { .. } => 0,
            Command::BlockStatus { len, contexts, .. } => {
                // Extents are rarely shorter than a sector.
                let most = usize::try_from(len / 512 + 2).unwrap_or(usize::MAX).min(MAX_EXTENTS);
                most * EXTENT * contexts.len()
            }
            Command::WriteZeroes { .. } => 0,
        }
    }

    fn data(&mut self, origin: Origin, command: Command, len: usize) -> Result<(), Pause> {
        let align = usize::try_from(self.disk.facts().mem_align).unwrap_or(1);
        let payload = if len == 0 { None } else { self.input.payload(len, align) };
        if payload.is_none() && len > 0 {
            self.expect = Expect::Data(origin, command, len);
            return Err(Pause::Input);
        }
        self.serve(origin, command, payload);
        Ok(())
    }

    fn status(&mut self, origin: Origin, header: &Header, len: usize) -> Result<(), Pause> {
        let mut raw = [0; MAX_STATUS_PAYLOAD];
        let raw = raw.get_mut(..len).unwrap_or_default();
        if !self.input.peek(raw) {
            self.expect = Expect::Status(origin, *header, len);
            return Err(Pause::Input);
        }
        match request::status_request(header, raw, &self.limits()) {
            Ok(command) => {
                if let Err(pause) = self.admit(&command) {
                    self.expect = Expect::Status(origin, *header, len);
                    return Err(pause);
                }
                self.input.skip(len);
                self.serve(origin, command, None);
            }
            Err(text) => {
                self.input.skip(len);
                self.refuse(origin, &text);
            }
        }
        Ok(())
    }

    fn skip(&mut self, origin: Origin, left: u64, text: String) -> Result<(), Pause> {
        let skipped = self.input.skip(usize::try_from(left).unwrap_or(usize::MAX));
        let left = left.saturating_sub(u64::try_from(skipped).unwrap_or(u64::MAX));
        if left > 0 {
            self.expect = Expect::Skip(origin, left, text);
            return Err(Pause::Input);
        }
        self.refuse(origin, &text);
        Ok(())
    }

    fn refuse(&mut self, origin: Origin, text: &str) {
        origin.failed(&mut self.out, error::INVAL, text);
    }

    fn serve(&mut self, origin: Origin, command: Command, payload: Option<IoBuf>) {
        let cost = self.cost(&command);
        let future = (self.start)(Job { origin, command, payload, cost });
        match self.slots.start(future) {
            Some(done) => finish(&mut self.out, done),
            None => self.bytes += cost,
        }
    }
}

/// Turns an outcome into a reply.
fn finish(out: &mut SendQueue, done: Done) {
    let Done { origin, command, outcome, .. } = done;
    match (outcome, command) {
        (Outcome::Done, _) => origin.done(out),
        (Outcome::Data(data), Command::Read { at, fragment, .. }) => origin.data(out, at, data, fragment),
        (Outcome::Data(_), _) => origin.failed(out, error::IO, "data without a read"),
        (Outcome::Extents(found), _) => origin.status(out, &found),
        (Outcome::Failed(errno, what), _) => {
            tracing::debug!(target: "nbd_error", cookie = origin.cookie, %errno, what);
            origin.failed(out, reply::error_number(errno), what);
        }
    }
}
