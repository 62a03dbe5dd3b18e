//! The sockets: connections, their limits, and the life of a request between its bytes and its answer.
//!
//! All of this runs on one thread, which cannot touch a device: its seccomp filter has no ioctl. It owns the counts of
//! connections and requests; [`crate::pool`] owns the devices' part. What a client can do wrong ends its connection and
//! nobody else's.

use crate::device::Device;
use crate::foreign::{Arrival, Claim, Closer, Foreign, Owner, Socket};
use crate::log::{Entry, Log};
use crate::policy::{Peer, Policy, Question};
use crate::pool::Pool;
use crate::shares::{Share, Shares};
use crate::trace::Event;
use crate::{classic, frames, peer};
use ipc::classic::{FEATURES, Protocol, Reply};
use ipc::fds;
use ipc::scsi::{Action, Cdb, Parameters, Sense};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::Interest;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

/// How long a client may take for the negotiation, for the rest of a request that it began, and to take its answer.
const PATIENCE: Duration = Duration::from_secs(10);

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
    pub closer: Arc<Closer>,
    /// How much a process and a user may use.
    pub shares: Shares,
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
    owner: Owner,
    share: Share,
    socket: Socket,
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
        let peer = peer::of(&stream, self.policy.asks_for_units());
        let owner = peer.as_ref().map_or(Owner { pid: 0, uid: u32::MAX }, |p| Owner { pid: p.pid, uid: p.uid });
        let mut socket = Socket::new(stream, Claim::new(owner, self.closer.clone()));
        let peer = match peer {
            Ok(peer) => peer,
            Err(e) => return self.log.message(&format!("cannot tell who a client is: {e}")),
        };
        let share = self.shares.of(owner);
        let places = [
            (&self.connections, String::new()),
            (&share.process.connections, format!(" of process {}", peer.pid)),
            (&share.user.connections, format!(" of user {}", peer.uid)),
        ];
        for (places, whose) in places {
            let Ok(place) = places.clone().try_acquire_owned() else {
                return self.log.message(&format!("too many connections{whose}, closing one"));
            };
            socket.keep([place]);
        }
        self.log.verbose(|| format!("process {} of user {} connected", peer.pid, peer.uid));
        let (log, pid) = (self.log.clone(), peer.pid);
        log.trace(Event::Connect, || format!("pid {pid} uid {}", peer.uid));
        let end = Connection { server: self, peer, owner, share, socket, stop }.run().await;
        log.trace(Event::Disconnect, || format!("pid {pid} {end}"));
        match end {
            End::Done => log.verbose(|| format!("process {pid} disconnected")),
            other => log.message(&format!("process {pid}: {other}, closing socket.")),
        }
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

    /// A place for the descriptors of a message; waits while too many of this process or user are not
    /// closed yet.
    pub async fn arrival(&self) -> Result<Arrival, End> {
        let mut claim = Claim::new(self.owner, self.server.closer.clone());
        for share in [&self.share.process.descriptors, &self.share.user.descriptors] {
            claim = claim.with(share.clone().acquire_owned().await);
        }
        Ok(Arrival::new(claim))
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
        self.socket.hang_up();
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
            Ok(device) => match self.share.process.requests.acquire().await {
                Ok(_one) => self.server.pool.execute(&self.share.user.threads, device, cdb, parameters).await,
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

    fn stream(&self) -> Result<&UnixStream, End> {
        self.socket.stream().ok_or(End::Done)
    }

    async fn receive(&self, buf: &mut [u8], arrival: &mut Arrival) -> Result<usize, End> {
        let (stream, passed) = (self.stream()?, &mut arrival.passed);
        Ok(stream.async_io(Interest::READABLE, || fds::receive(stream, buf, passed)).await?)
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
            let stream = self.stream()?;
            let sent = stream.async_io(Interest::WRITABLE, || fds::send(stream, bytes, None)).await?;
            bytes = bytes.get(sent..).unwrap_or_default();
        }
        Ok(())
    }
}

/// The work's result, or the end of the connection if it takes longer than a client may take.
pub async fn in_time<T>(what: &'static str, work: impl Future<Output = Result<T, End>>) -> Result<T, End> {
    tokio::time::timeout(PATIENCE, work).await.unwrap_or(Err(End::Late(what)))
}
