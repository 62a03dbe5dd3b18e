//! The sockets: connections, their limits, and the life of a request between its bytes and its answer.
//!
//! All of this runs on one thread, which cannot touch a device: its seccomp filter has no ioctl. It owns the counts of
//! connections and requests; [`crate::pool`] owns the devices' part. What a client can do wrong ends its connection and
//! nobody else's.

use crate::device::Device;
use crate::foreign::{Arrival, Closing, Foreign};
use crate::log::{Entry, Log};
use crate::policy::{Peer, Policy, Question};
use crate::pool::Pool;
use crate::trace::Event;
use crate::{classic, frames, peer};
use ipc::classic::{FEATURES, Protocol, Reply};
use ipc::fds;
use ipc::scsi::{Action, Cdb, Parameters, Sense};
use std::collections::HashMap;
use std::io;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};
use tokio::io::Interest;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

/// How long a client may take for the negotiation, for the rest of a request that it began, and to take its answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Connections of one process.
const CONNECTIONS_PER_PEER: usize = 32;

/// Requests of one process that are on their way; more wait, so that others get their share of the threads.
pub const REQUESTS_PER_PEER: usize = 8;

/// Messages of one process whose descriptors are not closed yet, those included that it has not begun to send.
const DESCRIPTORS_PER_PEER: usize = 4 * CONNECTIONS_PER_PEER;

/// Wait after the system refused a connection for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What all connections share.
pub struct Server {
    /// Messages and audit lines.
    pub log: Log,
    /// Who may do what.
    pub policy: Policy,
    /// The devices.
    pub pool: Pool,
    /// How long a connection may be silent between requests; `None`: for ever, as clients of the reference are.
    pub idle: Option<Duration>,
    /// The most connections.
    pub connections: Arc<Semaphore>,
    /// Closes what clients sent.
    pub closer: Sender<Closing>,
    /// The processes that are connected.
    pub peers: Mutex<HashMap<i32, Weak<Share>>>,
}

/// What one process may use.
pub struct Share {
    connections: Arc<Semaphore>,
    requests: Semaphore,
    descriptors: Arc<Semaphore>,
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum End {
    /// The client closed it between two requests, or was silent for the idle time, or the helper ends.
    #[error("closed")]
    Done,
    /// The client broke the protocol.
    #[error("{0}")]
    Protocol(String),
    /// It did not go on in time.
    #[error("the client did not {0} in time")]
    Late(&'static str),
    /// The socket failed.
    #[error("{0}")]
    Io(#[from] io::Error),
}

impl End {
    /// A request needs a descriptor.
    pub fn no_descriptor() -> Self {
        Self::Protocol("No file descriptor in request".into())
    }
}

/// One client.
pub struct Connection {
    /// Shared state.
    pub server: Arc<Server>,
    /// Who.
    pub peer: Peer,
    share: Arc<Share>,
    stream: UnixStream,
    stop: watch::Receiver<bool>,
}

impl Server {
    /// Serves until `stop` becomes true and the requests in progress are answered.
    pub async fn run(self: Arc<Self>, listener: UnixListener, mut stop: watch::Receiver<bool>) {
        let mut connections = JoinSet::new();
        let mut refused = false;
        loop {
            // Both are safe to drop: accept takes a connection only when it is ready with it.
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                _ = stop.wait_for(|stop| *stop) => break,
            };
            while connections.try_join_next().is_some() {}
            match accepted {
                Ok((stream, _)) => {
                    refused = false;
                    connections.spawn(self.clone().serve(stream, stop.clone()));
                }
                Err(e) => {
                    if !refused {
                        self.log.message(&format!("cannot accept a connection: {e}"));
                    }
                    refused = true;
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        drop(listener);
        while connections.join_next().await.is_some() {}
    }

    async fn serve(self: Arc<Self>, stream: UnixStream, stop: watch::Receiver<bool>) {
        let Ok(_slot) = self.connections.clone().try_acquire_owned() else {
            return self.log.message("too many connections, closing one");
        };
        let peer = match peer::of(&stream, self.policy.asks_for_units()) {
            Ok(peer) => peer,
            Err(e) => return self.log.message(&format!("cannot tell who a client is: {e}")),
        };
        let share = self.share(peer.pid);
        let Ok(_of_peer) = share.connections.clone().try_acquire_owned() else {
            return self.log.message(&format!("too many connections of process {}, closing one", peer.pid));
        };
        self.log.verbose(|| format!("process {} of user {} connected", peer.pid, peer.uid));
        let (log, pid) = (self.log.clone(), peer.pid);
        log.trace(Event::Connect, || format!("pid {pid} uid {}", peer.uid));
        let end = Connection { server: self, peer, share, stream, stop }.run().await;
        log.trace(Event::Disconnect, || format!("pid {pid} {end}"));
        match end {
            End::Done => log.verbose(|| format!("process {pid} disconnected")),
            other => log.message(&format!("process {pid}: {other}, closing socket.")),
        }
    }

    fn share(&self, pid: i32) -> Arc<Share> {
        let mut peers = match self.peers.lock() {
            Ok(peers) => peers,
            Err(poisoned) => poisoned.into_inner(),
        };
        if let Some(share) = peers.get(&pid).and_then(Weak::upgrade) {
            return share;
        }
        peers.retain(|_, share| share.strong_count() != 0);
        let share = Arc::new(Share {
            connections: Arc::new(Semaphore::new(CONNECTIONS_PER_PEER)),
            requests: Semaphore::new(REQUESTS_PER_PEER),
            descriptors: Arc::new(Semaphore::new(DESCRIPTORS_PER_PEER)),
        });
        peers.insert(pid, Arc::downgrade(&share));
        share
    }
}

impl Connection {
    async fn run(mut self) -> End {
        let negotiated = async {
            self.write(&FEATURES.to_be_bytes()).await?;
            let mut wanted = [0; 4];
            let mut arrival = self.arrival().await?;
            self.read(&mut wanted, &mut arrival).await?;
            match Protocol::from_requested(wanted, FEATURES) {
                Some(protocol) if arrival.passed.is_none() => Ok(protocol),
                Some(_) => Err(End::Protocol("File descriptor in the negotiation".into())),
                None => Err(End::Protocol(format!("Unknown features {:#x}", u32::from_be_bytes(wanted)))),
            }
        };
        let mut stop = self.stop.clone();
        let negotiated = tokio::select! {
            result = in_time("negotiate", negotiated) => result,
            _ = stop.wait_for(|stop| *stop) => Err(End::Done),
        };
        let result = match negotiated {
            Ok(Protocol::Classic) => classic::run(&mut self).await,
            Ok(Protocol::Frames) => frames::run(self).await,
            Err(end) => Err(end),
        };
        result.err().unwrap_or(End::Done)
    }

    /// A place for the descriptors of a message; waits while too many of this process are not closed yet.
    pub async fn arrival(&self) -> Result<Arrival, End> {
        let permit = self.share.descriptors.clone().acquire_owned().await.map_err(|_| End::Done)?;
        Ok(Arrival::new(permit, self.server.closer.clone()))
    }

    /// Receives the first bytes of a request, as many as `buf` holds at most; waits as long as a client may be idle.
    ///
    /// Ends with [`End::Done`] when the client or the helper ends.
    pub async fn first(&self, buf: &mut [u8], arrival: &mut Arrival) -> Result<usize, End> {
        let mut stop = self.stop.clone();
        let idle = async {
            match self.server.idle {
                Some(time) => tokio::time::sleep(time).await,
                None => std::future::pending().await,
            }
        };
        // The receiving future holds nothing between its polls: dropping it loses no byte.
        tokio::select! {
            received = self.receive(buf, arrival) => match received? {
                0 => Err(End::Done),
                n => Ok(n),
            },
            () = idle => Err(End::Done),
            _ = stop.wait_for(|stop| *stop) => Err(End::Done),
        }
    }

    /// Receives the rest of a request, in time.
    pub async fn rest(&self, buf: &mut [u8], arrival: &mut Arrival) -> Result<(), End> {
        in_time("send the rest of a request", self.read(buf, arrival)).await
    }

    /// Sends an answer, in time.
    pub async fn answer(&self, bytes: &[u8]) -> Result<(), End> {
        in_time("take an answer", self.write(bytes)).await
    }

    /// Ends the connection in both directions, for all who use it.
    pub fn hang_up(&self) {
        // It fails only if the connection has ended already.
        let _ = rustix::net::shutdown(&self.stream, rustix::net::Shutdown::Both);
    }

    /// Answers a request: checks, asks the policy, has a thread execute it, writes the audit line.
    pub async fn execute(&self, fd: Foreign, cdb: Cdb, parameters: Vec<u8>) -> Reply {
        let started = Instant::now();
        let keys = if cdb.is_out() { Parameters::keys(&parameters) } else { None };
        let device = Device::new(fd, &cdb);
        let number = device.as_ref().ok().map(Device::number);
        let (pid, action) = (self.peer.pid, cdb.action().map_or("unknown", Action::name));
        self.server.log.trace(Event::Request, || format!("pid {pid} action {action} device {number:?}"));
        let question = |device| Question { peer: &self.peer, device, action: cdb.action(), keys };
        let denied = number.is_some_and(|n| !self.server.policy.allows(&question(n)));
        let reply = match device {
            Err(reply) => *reply,
            Ok(_) if denied => Reply::check(Sense::ACCESS_DENIED),
            Ok(device) => match self.share.requests.acquire().await {
                Ok(_one) => self.server.pool.execute(device, cdb, parameters).await,
                Err(_) => Reply::check(Sense::TARGET_FAILURE),
            },
        };
        self.server.log.trace(Event::Reply, || format!("pid {pid} action {action} status {:#x}", reply.status));
        self.server.log.command(&Entry {
            peer: &self.peer,
            device: number,
            is_out: cdb.is_out(),
            action: cdb.action(),
            keys,
            denied,
            reply: &reply,
            duration: started.elapsed(),
        });
        reply
    }

    async fn receive(&self, buf: &mut [u8], arrival: &mut Arrival) -> Result<usize, End> {
        let passed = &mut arrival.passed;
        let received = self.stream.async_io(Interest::READABLE, || fds::receive(&self.stream, buf, passed)).await?;
        if passed.is_too_many() {
            return Err(End::Protocol("More than one file descriptor in request".into()));
        }
        Ok(received)
    }

    async fn read(&self, mut buf: &mut [u8], arrival: &mut Arrival) -> Result<(), End> {
        while !buf.is_empty() {
            match self.receive(buf, arrival).await? {
                0 => return Err(End::Protocol("The client closed the connection within a request".into())),
                n => buf = buf.get_mut(n..).unwrap_or_default(),
            }
        }
        Ok(())
    }

    async fn write(&self, mut bytes: &[u8]) -> Result<(), End> {
        while !bytes.is_empty() {
            let sent = self.stream.async_io(Interest::WRITABLE, || fds::send(&self.stream, bytes, None)).await?;
            bytes = bytes.get(sent..).unwrap_or_default();
        }
        Ok(())
    }
}

/// The work's result, or the end of the connection if it takes longer than a client may take.
pub async fn in_time<T>(what: &'static str, work: impl Future<Output = Result<T, End>>) -> Result<T, End> {
    tokio::time::timeout(PATIENCE, work).await.unwrap_or(Err(End::Late(what)))
}
