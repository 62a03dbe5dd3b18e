//! A manager of persistent reservations: hands commands of nodes to a helper process and brings its answers back.
//!
//! Each manager has a thread of its own, which connects, tries again when the helper has gone, sends, receives and watches
//! the time. Nobody else ever waits for the helper: a node's request is put into a queue and waits for its own answer. The
//! thread owns the connection; the queue is shared, under a lock that is held for a few instructions.
//!
//! Time limits: a request that finds no helper waits up to [`Limits::patience`] for one; a helper that does not answer a
//! request within [`Limits::answer`] fails that request. Only requests that a lost connection was carrying fail with it;
//! those still in the queue go to the next connection. None is sent twice.

mod connection;
mod retry;
#[cfg(test)]
mod tests;

use block::reservation::{Executed, Problem, ReservationManager};
use connection::Ended;
use ipc::client::Connection;
use ipc::scsi::{Command, Data, Sense};
use qapi::{Error, Result, error::errno_text};
use retry::Retry;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// A request waits so long for a helper to be there; as long as QEMU tries.
    pub patience: Duration,
    /// A helper answers a request within this time. Above its own limit for a device.
    pub answer: Duration,
    /// A helper agrees on the protocol, and takes or sends the rest of a message, within this time.
    pub message: Duration,
    /// Between two attempts to connect while requests wait.
    pub retry: Duration,
    /// Between two attempts while none wait, after many that failed.
    pub longest_retry: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            patience: Duration::from_secs(5),
            answer: Duration::from_secs(60),
            message: Duration::from_secs(5),
            retry: Duration::from_millis(250),
            longest_retry: Duration::from_secs(2),
        }
    }
}

/// Told of each change: connected, or not any more.
pub type OnStatus = Box<dyn Fn(bool) + Send + Sync>;

/// A request of a node.
struct Job {
    device: OwnedFd,
    command: Command,
    reply: oneshot::Sender<Result<Data, Problem>>,
    queued: Instant,
}

struct State {
    path: PathBuf,
    queue: VecDeque<Job>,
    connected: bool,
    stopping: bool,
    /// The connection's socket, to wake the thread that reads from it.
    socket: Option<UnixStream>,
}

/// What the thread and the others share.
struct Shared {
    limits: Limits,
    on_status: OnStatus,
    /// Never across a system call that can wait.
    state: Mutex<State>,
    /// Counts what the thread has to look at.
    wake: OwnedFd,
}

/// A manager; the owner stops it.
pub struct PrManager {
    shared: Arc<Shared>,
}

impl PrManager {
    /// Starts a manager whose helper listens at `path`, now or later.
    ///
    /// # Errors
    /// The system has no thread or no descriptor left.
    pub fn start(id: &str, path: &Path, limits: Limits, on_status: OnStatus) -> Result<Self> {
        let failed = |error| Error::io(format!("Could not start pr-manager '{id}'"), error);
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|e| failed(e.into()))?;
        let state =
            State { path: path.to_owned(), queue: VecDeque::new(), connected: false, stopping: false, socket: None };
        let shared = Arc::new(Shared { limits, on_status, state: Mutex::new(state), wake });
        let thread = Arc::clone(&shared);
        let name = format!("PR {id}");
        ::io::threads::spawn(::io::threads::Role::Reservations, &name, move || thread.run()).map_err(failed)?;
        Ok(Self { shared })
    }

    /// Whether the helper is there.
    pub fn is_connected(&self) -> bool {
        self.shared.lock().connected
    }

    /// Where the helper listens.
    pub fn path(&self) -> PathBuf {
        self.shared.lock().path.clone()
    }

    /// The helper listens somewhere else from the next connection on.
    pub fn set_path(&self, path: &Path) {
        self.shared.lock().path = path.to_owned();
    }

    /// Ends the manager: requests that wait fail, and nothing is reported any more. Does not wait for the thread.
    pub fn stop(&self) {
        let mut state = self.shared.lock();
        state.stopping = true;
        state.connected = false;
        if let Some(socket) = &state.socket {
            // A socket that is shut down already is as good.
            let _ = socket.shutdown(Shutdown::Both);
        }
        drop(state);
        self.shared.wake();
    }
}

impl Drop for PrManager {
    fn drop(&mut self) {
        self.stop();
    }
}

impl ReservationManager for PrManager {
    fn execute(&self, device: OwnedFd, command: Command) -> Executed {
        let (reply, answer) = oneshot::channel();
        let job = Job { device, command, reply, queued: Instant::now() };
        let mut state = self.shared.lock();
        if !state.stopping {
            state.queue.push_back(job);
        }
        drop(state);
        self.shared.wake();
        Box::pin(async move {
            // A request that is dropped has met a manager that stops.
            answer.await.unwrap_or_else(|_| Err(lost("the pr-manager has been deleted")))
        })
    }
}

/// The helper cannot be asked, or its answer will not come.
fn lost(why: impl Into<String>) -> Problem {
    Problem::new(Sense::COMMUNICATION_FAILURE, why)
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the thread look at the queue.
    fn wake(&self) {
        // It fails when the counter is full, and then the thread is awake for certain.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Waits for something to do, for `socket` to be readable, or for `limit` to pass (none: for ever). True if the socket
    /// is readable.
    fn wait(&self, socket: Option<BorrowedFd<'_>>, limit: Option<Duration>) -> bool {
        let limit = limit.map(|limit| Timespec {
            tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: limit.subsec_nanos().into(),
        });
        let wake = PollFd::new(&self.wake, PollFlags::IN);
        let readable = match &socket {
            Some(socket) => {
                let mut fds = [wake, PollFd::new(socket, PollFlags::IN)];
                // Errors are signals and shortage of memory: the caller looks again at what there is.
                poll(&mut fds, limit.as_ref()).is_ok() && !fds[1].revents().is_empty()
            }
            None => {
                let _ = poll(&mut [wake], limit.as_ref());
                false
            }
        };
        // What is counted is in the queue, which the caller looks at next.
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        readable
    }

    /// The next request that somebody still waits for.
    fn next_job(&self) -> Option<Job> {
        let mut state = self.lock();
        loop {
            let job = state.queue.pop_front()?;
            if !job.reply.is_closed() {
                return Some(job);
            }
        }
    }

    /// Sets the status and reports it if it is a change. False if the manager stops.
    fn set_connected(&self, socket: Option<UnixStream>) -> bool {
        let connected = socket.is_some();
        let changed = {
            let mut state = self.lock();
            if state.stopping {
                return false;
            }
            state.socket = socket;
            std::mem::replace(&mut state.connected, connected) != connected
        };
        if changed {
            (self.on_status)(connected);
        }
        true
    }

    /// The life of the thread.
    fn run(&self) {
        let mut retry = Retry::new(self.limits);
        while !self.lock().stopping {
            let started = Instant::now();
            let why = match self.connect() {
                Ok((connection, socket)) => {
                    let Ok(shared_socket) = socket.try_clone() else { continue };
                    if !self.set_connected(Some(shared_socket)) {
                        break;
                    }
                    let Ended(why) = self.serve(connection, &socket);
                    self.set_connected(None);
                    why
                }
                Err(why) => why,
            };
            tracing::trace!(target: "pr_manager_disconnected", why);
            self.rest(retry.after(started), &why);
        }
        let queue = std::mem::take(&mut self.lock().queue);
        drop(queue);
    }

    /// Connects and agrees on the protocol. Also gives the socket, for time limits and to wait on.
    fn connect(&self) -> Result<(Connection, UnixStream), String> {
        let path = self.lock().path.clone();
        let failed = |e: io::Error| format!("Failed to connect to '{}': {}", path.display(), errno_text(&e));
        let connect = || {
            // Not blocking: whoever listens with a full queue is as good as nobody.
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
            rustix::net::connect(&socket, &SocketAddrUnix::new(&path)?)?;
            let socket = UnixStream::from(socket);
            socket.set_nonblocking(false)?;
            socket.set_read_timeout(Some(self.limits.message))?;
            socket.set_write_timeout(Some(self.limits.message))?;
            let copy = socket.try_clone()?;
            Ok((Connection::new(socket)?, copy))
        };
        connect().map_err(failed)
    }

    /// Waits for the time of the next attempt, and fails the requests whose patience ends.
    fn rest(&self, retry: retry::Next, why: &str) {
        loop {
            let waiting = {
                let mut state = self.lock();
                if state.stopping {
                    return;
                }
                let now = Instant::now();
                state.queue.retain(|job| !job.reply.is_closed());
                while let Some(job) = state.queue.pop_front_if(|job| now - job.queued >= self.limits.patience) {
                    let _ = job.reply.send(Err(lost(why)));
                }
                !state.queue.is_empty()
            };
            match retry.left(waiting) {
                None => return,
                Some(left) => self.wait(None, Some(left)),
            };
        }
    }

    fn serve(&self, connection: Connection, socket: &UnixStream) -> Ended {
        match connection {
            Connection::Classic(classic) => connection::classic(self, classic, socket),
            Connection::Frames(frames) => connection::frames(self, &frames, socket.as_fd()),
        }
    }
}
