//! [`NbdServer`]: listening sockets, the handshakes of new clients, and the exports that they can choose from.
//!
//! Everything here runs on the thread that started the server. When a client has chosen an export its connection moves to
//! one of that export's IOThreads, along with the bytes that came in already. Connections that are in their handshake
//! belong to the server, the others to their export.

use super::connection;
use super::export::{NbdExport, NbdExportOptions};
use super::negotiate::{self, Exports, Negotiation, Offer, Session, Step};
use super::wire::MAX_STRING;
use crate::Export;
use crate::patience::Patience;
use buf::IoBuf;
use io::{Listener, SendQueue, Stream};
use nix::errno::Errno;
use qapi::{Error, Result};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

/// How long accepting pauses when the system is short of descriptors or memory.
const SHORTAGE_PAUSE: Duration = Duration::from_millis(100);
/// What one receive of a handshake takes at most, in bytes.
const RECEIVE: usize = 4 << 10;
/// How long a connection on this thread looks for its next request: the longest that QEMU's IOThreads poll.
const PATIENCE: Duration = Duration::from_micros(32);

/// How a server treats its clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NbdServerParams {
    /// How long a handshake may take; none for as long as it likes.
    pub handshake_limit: Option<Duration>,
    /// Clients at a time; 0 is no limit. More wait to be accepted.
    pub max_connections: u32,
}

impl Default for NbdServerParams {
    fn default() -> Self {
        Self { handshake_limit: Some(Duration::from_secs(10)), max_connections: 100 }
    }
}

/// A running NBD server. It stops with [`stop`](Self::stop).
#[derive(Debug)]
pub struct NbdServer {
    inner: Arc<Inner>,
    /// Where nobody is accepted yet.
    listeners: Vec<Listener>,
}

#[derive(Debug)]
struct Inner {
    params: NbdServerParams,
    /// The exports in the order in which they were made. Never held across an await.
    exports: Mutex<Vec<Arc<NbdExport>>>,
    /// One permit for each client that may still be accepted; none without a limit.
    permits: Option<Arc<Semaphore>>,
    stopping: watch::Sender<bool>,
    /// Counts the tasks of listeners and handshakes.
    tasks: watch::Sender<usize>,
}

/// Counts a task of the server for as long as it lives.
struct Task(Arc<Inner>);

impl Task {
    fn new(inner: &Arc<Inner>) -> Self {
        inner.tasks.send_modify(|n| *n += 1);
        Self(Arc::clone(inner))
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.0.tasks.send_modify(|n| *n = n.saturating_sub(1));
    }
}

impl NbdServer {
    /// A server for `listeners`. Clients can connect there, and wait until [`accept`](Self::accept).
    pub fn new(listeners: Vec<Listener>, params: NbdServerParams) -> Self {
        let permits = usize::try_from(params.max_connections).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS);
        let inner = Arc::new(Inner {
            params,
            exports: Mutex::default(),
            permits: (params.max_connections > 0).then(|| Arc::new(Semaphore::new(permits))),
            stopping: watch::Sender::new(false),
            tasks: watch::Sender::new(0),
        });
        Self { inner, listeners }
    }

    /// Serves clients from now on, from tasks of the calling thread, which must run an event loop with local tasks.
    pub fn accept(&mut self) {
        for listener in std::mem::take(&mut self.listeners) {
            let task = Task::new(&self.inner);
            tokio::task::spawn_local(async move {
                let mut stopping = task.0.stopping.subscribe();
                tokio::select! {
                    () = accept_clients(&listener, &task.0) => {}
                    _ = stopping.wait_for(|stopping| *stopping) => {}
                }
            });
        }
    }

    /// Makes an export.
    ///
    /// # Errors
    /// The name or the description is too long, or there is an export of that name.
    pub fn add(&self, options: NbdExportOptions) -> Result<Arc<NbdExport>> {
        if options.name.len() > MAX_STRING {
            return Err(Error::generic(format!("export name '{}' too long", options.name)));
        }
        if let Some(description) = options.description.as_ref().filter(|text| text.len() > MAX_STRING) {
            return Err(Error::generic(format!("description '{description}' too long")));
        }
        let mut exports = self.inner.exports();
        if exports.iter().any(|other| other.name() == options.name) {
            return Err(Error::generic(format!("NBD server already has export named '{}'", options.name)));
        }
        let export = Arc::new(NbdExport::new(options));
        exports.push(Arc::clone(&export));
        Ok(export)
    }

    /// The export of that name, for `nbd-server-remove`.
    pub fn find(&self, name: &str) -> Option<Arc<NbdExport>> {
        self.inner.find(name.as_bytes())
    }

    /// The exports, in the order in which they were made.
    pub fn exports(&self) -> Vec<Arc<NbdExport>> {
        self.inner.exports().clone()
    }

    /// Takes an export out of the server, sends its clients away and waits until the last has gone. Requests that were
    /// started end and are replied to. The disk is the caller's to detach.
    pub async fn remove(&self, export: &NbdExport) {
        self.forget(export);
        export.closed().await;
    }

    /// As [`remove`](Self::remove), without waiting.
    pub fn forget(&self, export: &NbdExport) {
        self.inner.exports().retain(|other| !std::ptr::eq(&**other, export));
        export.request_shutdown();
    }

    /// Stops listening, ends handshakes, removes all exports and waits for their clients to be gone. Returns the
    /// exports, whose disks are the caller's to detach.
    pub async fn stop(&self) -> Vec<Arc<NbdExport>> {
        self.inner.stopping.send_replace(true);
        let exports = std::mem::take(&mut *self.inner.exports());
        exports.iter().for_each(|export| export.request_shutdown());
        let mut tasks = self.inner.tasks.subscribe();
        let _ = tasks.wait_for(|n| *n == 0).await;
        for export in &exports {
            export.closed().await;
        }
        exports
    }
}

impl Inner {
    fn exports(&self) -> MutexGuard<'_, Vec<Arc<NbdExport>>> {
        self.exports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, name: &[u8]) -> Option<Arc<NbdExport>> {
        self.exports().iter().find(|export| export.name().as_bytes() == name && !export.is_shutting_down()).cloned()
    }
}

impl Exports for Inner {
    fn find(&self, name: &[u8]) -> Option<Offer> {
        Inner::find(self, name).map(|export| export.offer())
    }

    fn list(&self) -> Vec<(String, Option<String>)> {
        let shown = |export: &Arc<NbdExport>| (export.name().to_owned(), export.description().map(str::to_owned));
        self.exports().iter().filter(|export| !export.is_shutting_down()).map(shown).collect()
    }

    fn is_shutting_down(&self) -> bool {
        *self.stopping.borrow()
    }
}

/// Accepts clients for as long as the server runs.
async fn accept_clients(listener: &Listener, inner: &Arc<Inner>) {
    let mut short = false;
    loop {
        // Nobody is accepted while the server is full; but a place is only taken for a client that is there, so that one
        // listener does not keep it from another.
        drop(place(inner).await);
        match listener.accept().await {
            Ok(socket) => {
                if std::mem::take(&mut short) {
                    tracing::info!(target: "nbd_server_accept", "the NBD server accepts connections again");
                }
                new_client(socket, place(inner).await, inner);
            }
            Err(error) => {
                let errno = error.raw_os_error().map(Errno::from_raw);
                if matches!(errno, Some(Errno::EBADF | Errno::EINVAL | Errno::ENOTSOCK)) {
                    tracing::error!(target: "nbd_server_accept", %error, "the NBD server cannot accept connections any more");
                    return;
                }
                if !std::mem::replace(&mut short, true) {
                    tracing::warn!(target: "nbd_server_accept", %error, "the NBD server cannot accept a connection, and keeps trying");
                }
                tokio::time::sleep(SHORTAGE_PAUSE).await;
            }
        }
    }
}

/// Waits for a place for one more client; none if there is no limit.
async fn place(inner: &Inner) -> Option<OwnedSemaphorePermit> {
    // The semaphore is never closed, so this cannot fail.
    Arc::clone(inner.permits.as_ref()?).acquire_owned().await.ok()
}

/// Runs the handshake of a new client, and hands it over to its export.
fn new_client(socket: OwnedFd, permit: Option<OwnedSemaphorePermit>, inner: &Arc<Inner>) {
    let task = Task::new(inner);
    tokio::task::spawn_local(async move {
        let inner = Arc::clone(&task.0);
        let handshake = async {
            let stream = Stream::new(socket)?;
            stream.set_nodelay();
            handshake(stream, &inner).await
        };
        let limited = async {
            match inner.params.handshake_limit {
                Some(limit) => tokio::time::timeout(limit, handshake).await.unwrap_or_else(|_| {
                    Err(std::io::Error::new(std::io::ErrorKind::TimedOut, "the handshake took too long"))
                }),
                None => handshake.await,
            }
        };
        let mut stopping = inner.stopping.subscribe();
        let result = tokio::select! {
            result = limited => result,
            _ = stopping.wait_for(|stopping| *stopping) => return,
        };
        match result {
            Ok(Some(agreed)) => hand_over(agreed, permit, &inner),
            Ok(None) => {}
            Err(error) => tracing::debug!(target: "nbd_negotiate_failed", %error, "option negotiation failed"),
        }
    });
}

/// A connection at the start of its transmission phase.
struct Agreed {
    stream: Stream,
    session: Session,
    early: Vec<u8>,
}

/// Negotiates until the client has chosen an export, or goes away.
async fn handshake(stream: Stream, inner: &Inner) -> std::io::Result<Option<Agreed>> {
    let mut out = SendQueue::new();
    out.push_bytes(&negotiate::greeting());
    stream.send(&mut out).await?;
    let mut negotiation = Negotiation::new();
    let mut input: Vec<u8> = Vec::new();
    let mut replies = Vec::new();
    let place = IoBuf::alloc(RECEIVE);
    loop {
        let mut used = 0;
        loop {
            let (taken, step) = negotiation.step(input.get(used..).unwrap_or_default(), inner, &mut replies);
            used += taken;
            out.push_bytes(&replies);
            replies.clear();
            stream.send(&mut out).await?;
            match step {
                Step::Starved => break,
                Step::Advanced => {}
                Step::Transmission(session) => {
                    tracing::debug!(target: "nbd_negotiate_success", ?session);
                    let early = input.split_off(used);
                    return Ok(Some(Agreed { stream, session, early }));
                }
                Step::End(end) => {
                    tracing::debug!(target: "nbd_negotiate_failed", %end, "option negotiation ended");
                    return Ok(None);
                }
            }
        }
        input.drain(..used);
        let count = stream.recv(&place).await?;
        if count == 0 {
            return Ok(None);
        }
        let old = input.len();
        input.resize(old + count, 0);
        place.read_at(0, input.get_mut(old..).unwrap_or_default());
    }
}

/// Moves a connection to a thread of its export.
fn hand_over(agreed: Agreed, permit: Option<OwnedSemaphorePermit>, inner: &Inner) {
    let Agreed { stream, session, early } = agreed;
    // It may have been removed while the last reply was sent.
    let Some(export) = inner.find(session.export.as_bytes()) else { return };
    let Some(client) = export.enter(permit) else { return };
    match export.next_thread() {
        None => {
            tokio::task::spawn_local(connection::run(stream, client, session, early, Some(Patience::new(PATIENCE))));
        }
        Some(thread) => {
            let socket = stream.into_fd();
            let started = thread.spawn(move || async move {
                match Stream::new(socket) {
                    Ok(stream) => connection::run(stream, client, session, early, None).await,
                    Err(error) => tracing::warn!(target: "nbd_server_accept", %error, "cannot serve an NBD client"),
                }
            });
            if let Err(stopped) = started {
                tracing::warn!(target: "nbd_server_accept", %stopped, "cannot serve an NBD client");
            }
        }
    }
}
