//! What clients sent, and who closes it: descriptors, and connections with what nobody received from them.
//!
//! Closing can hang for as long as its sender likes: a file of a client's own FUSE file system is flushed by a request to
//! the client, a TCP socket lingers until its peer has read everything, a hung disk is synced when its last user goes. So
//! the thread of the sockets never closes what it was sent. What reaches a worker is closed by it; everything else goes to
//! a few threads that do nothing else, of which no process gets more than one, nor a user all. How many one may have
//! unclosed is limited where they are received, [`crate::shares`].

use ipc::fds::Passed;
use rustix::net::{RecvFlags, Shutdown, recv, shutdown};
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use tokio::net::UnixStream;
use tokio::sync::OwnedSemaphorePermit;

/// How many threads close.
pub const THREADS: usize = 4;

/// Who sent it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// Process.
    pub pid: i32,
    /// User.
    pub uid: u32,
}

/// What waits for being closed, with what it takes from its owner's share until then.
#[derive(Debug)]
struct Closing {
    fds: Vec<OwnedFd>,
    owner: Owner,
    _permits: Vec<OwnedSemaphorePermit>,
}

/// Closes what clients sent; [`THREADS`] threads run [`Closer::run`].
#[derive(Debug, Default)]
pub struct Closer {
    /// Held for a moment, never while closing.
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Closing>,
    /// Whose are being closed.
    busy: Vec<Owner>,
}

impl State {
    /// The next whose owner does not hold its share of the threads already.
    fn next(&mut self) -> Option<Closing> {
        let of = |test: &dyn Fn(&Owner) -> bool| self.busy.iter().filter(|owner| test(owner)).count();
        let free = |closing: &Closing| {
            let Owner { pid, uid } = closing.owner;
            of(&|owner| owner.pid == pid) == 0 && of(&|owner| owner.uid == uid) < THREADS - 1
        };
        let at = self.waiting.iter().position(free)?;
        let closing = self.waiting.remove(at)?;
        self.busy.push(closing.owner);
        Some(closing)
    }
}

impl Closer {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn put(&self, closing: Closing) {
        self.state().waiting.push_back(closing);
        self.changed.notify_one();
    }

    /// Closes for ever.
    pub fn run(&self) {
        loop {
            self.close_one();
        }
    }

    /// Waits for something to close and closes it.
    fn close_one(&self) {
        let mut state = self.state();
        let closing = loop {
            match state.next() {
                Some(closing) => break closing,
                None => state = self.changed.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner()),
            }
        };
        drop(state);
        let Closing { fds, owner, _permits } = closing;
        drop(fds);
        let mut state = self.state();
        if let Some(at) = state.busy.iter().position(|busy| *busy == owner) {
            state.busy.swap_remove(at);
        }
        drop(state);
        // The owner's next may have been passed over by those that wait now.
        self.changed.notify_one();
    }
}

/// What something of a client's takes from its owner's share, and where it goes in the end.
#[derive(Debug)]
pub struct Claim {
    owner: Owner,
    permits: Vec<OwnedSemaphorePermit>,
    closer: Arc<Closer>,
}

impl Claim {
    /// Takes nothing yet.
    pub fn new(owner: Owner, closer: Arc<Closer>) -> Self {
        Self { owner, permits: Vec::new(), closer }
    }

    /// Keeps these until it is closed.
    pub fn with(mut self, permits: impl IntoIterator<Item = OwnedSemaphorePermit>) -> Self {
        self.permits.extend(permits);
        self
    }

    fn close(self, fds: Vec<OwnedFd>) {
        let Self { owner, permits, closer } = self;
        closer.put(Closing { fds, owner, _permits: permits });
    }
}

/// Where a request's descriptors arrive; they go to the closing threads unless a worker takes them.
#[derive(Debug)]
pub struct Arrival {
    /// What came so far.
    pub passed: Passed,
    claim: Option<Claim>,
}

/// The one descriptor of a request.
#[derive(Debug)]
pub struct Foreign {
    fd: Option<OwnedFd>,
    /// To be closed with it.
    others: Vec<OwnedFd>,
    claim: Option<Claim>,
}

/// A client's end of a connection, told that it is over when this is dropped.
#[derive(Debug)]
pub struct Socket {
    stream: Option<UnixStream>,
    claim: Option<Claim>,
}

impl Arrival {
    /// Nothing came yet.
    pub fn new(claim: Claim) -> Self {
        Self { passed: Passed::default(), claim: Some(claim) }
    }

    /// The one that came, if it is one.
    pub fn take_one(mut self) -> Option<Foreign> {
        let fd = self.passed.take_one()?;
        Some(Foreign { fd: Some(fd), others: self.passed.take_all(), claim: self.claim.take() })
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        let fds = self.passed.take_all();
        if let (false, Some(claim)) = (fds.is_empty(), self.claim.take()) {
            claim.close(fds);
        }
    }
}

impl Foreign {
    /// The descriptor; always there until [`Foreign::close_here`].
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.fd.as_ref().map(AsFd::as_fd)
    }

    /// Closes it on this thread.
    pub fn close_here(mut self) {
        drop((self.fd.take(), std::mem::take(&mut self.others)));
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        if let (Some(fd), Some(claim)) = (self.fd.take(), self.claim.take()) {
            let mut fds = std::mem::take(&mut self.others);
            fds.push(fd);
            claim.close(fds);
        }
    }
}

impl Socket {
    /// A connection that was accepted.
    pub fn new(stream: UnixStream, claim: Claim) -> Self {
        Self { stream: Some(stream), claim: Some(claim) }
    }

    /// It takes these of its owner's share until it is closed.
    pub fn keep(&mut self, permits: impl IntoIterator<Item = OwnedSemaphorePermit>) {
        self.claim = self.claim.take().map(|claim| claim.with(permits));
    }

    /// The stream; always there until the end.
    pub fn stream(&self) -> Option<&UnixStream> {
        self.stream.as_ref()
    }

    /// Ends the connection in both directions, for all who use it.
    pub fn hang_up(&self) {
        if let Some(stream) = &self.stream {
            // It fails only if the connection has ended already.
            let _ = shutdown(stream, Shutdown::Both);
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.hang_up();
        let Some(Ok(stream)) = self.stream.take().map(UnixStream::into_std) else { return };
        // Nothing can come any more. What is there may have descriptors, which are closed with the socket.
        let empty = matches!(recv(&stream, &mut [0; 1][..], RecvFlags::PEEK | RecvFlags::DONTWAIT), Ok((_, 0)));
        if let (false, Some(claim)) = (empty, self.claim.take()) {
            claim.close(vec![stream.into()]);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::io::{PipeReader, Read};
    use tokio::sync::Semaphore;

    /// A descriptor as a request brings it, with its closer and its share of one.
    pub fn foreign(fd: OwnedFd) -> (Foreign, Arc<Closer>, Arc<Semaphore>) {
        let closer = Arc::new(Closer::default());
        let share = Arc::new(Semaphore::new(1));
        let claim = Claim::new(Owner { pid: 1, uid: 1 }, closer.clone()).with(share.clone().try_acquire_owned());
        (Foreign { fd: Some(fd), others: Vec::new(), claim: Some(claim) }, closer, share)
    }

    #[test]
    fn dropping_hands_it_on_with_its_permit() {
        let file = || tempfile::tempfile().unwrap().into();
        let (fd, closer, share) = foreign(file());
        drop(fd);
        assert_eq!(share.available_permits(), 0);
        closer.close_one();
        assert_eq!(share.available_permits(), 1);
        let (fd, closer, share) = foreign(file());
        fd.close_here();
        assert_eq!((closer.state().waiting.len(), share.available_permits()), (0, 1));
    }

    /// Something to close, and what sees that it was closed.
    fn closing(pid: i32, uid: u32) -> (Closing, PipeReader) {
        let (reader, writer) = std::io::pipe().unwrap();
        (Closing { fds: vec![writer.into()], owner: Owner { pid, uid }, _permits: Vec::new() }, reader)
    }

    #[test]
    fn who_holds_up_a_thread_gets_no_second_one_and_a_user_not_all() {
        let mut state = State::default();
        let queue = [(1, 7), (1, 7), (2, 7), (3, 7), (4, 7), (5, 8)];
        let (waiting, _readers): (VecDeque<_>, Vec<_>) = queue.iter().map(|(pid, uid)| closing(*pid, *uid)).unzip();
        state.waiting = waiting;
        // None of these is ever done.
        let pids: Vec<i32> = std::iter::from_fn(|| state.next()).map(|c| c.owner.pid).collect();
        assert_eq!(pids, [1, 2, 3, 5]);
        state.busy.retain(|owner| owner.pid != 1);
        assert_eq!(state.next().map(|c| c.owner.pid), Some(1));
    }

    #[test]
    fn everything_is_closed_in_the_end() {
        let closer = Arc::new(Closer::default());
        for _ in 0..THREADS {
            let closer = closer.clone();
            std::thread::spawn(move || closer.run());
        }
        let mut readers = Vec::new();
        for i in 0..64 {
            let (closing, reader) = closing(i % 3, u32::try_from(i % 2).unwrap());
            closer.put(closing);
            readers.push(reader);
        }
        for mut reader in readers {
            assert_eq!(reader.read(&mut [0]).unwrap(), 0);
        }
    }

    #[tokio::test]
    async fn a_socket_with_contents_is_closed_elsewhere() {
        for contents in [&b""[..], b"x"] {
            let (mut client, stream) = std::os::unix::net::UnixStream::pair().unwrap();
            std::io::Write::write_all(&mut client, contents).unwrap();
            stream.set_nonblocking(true).unwrap();
            let closer = Arc::new(Closer::default());
            let claim = Claim::new(Owner { pid: 1, uid: 1 }, closer.clone());
            drop(Socket::new(UnixStream::from_std(stream).unwrap(), claim));
            // The client sees the end at once.
            assert_eq!(client.read(&mut [0]).unwrap(), 0);
            assert_eq!(closer.state().waiting.len(), contents.len());
        }
    }
}
