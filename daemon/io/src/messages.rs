//! [`MessageSocket`]: a unix stream socket on which descriptors come and go with the bytes.
//!
//! What comes is the peer's, and so is what nobody received: neither is closed here, but on the peer's [`Lane`]. Nor does the
//! kernel close it here: see [`ipc::fds`].

use crate::foreign::{Foreign, Lane};
use crate::polling::note_event;
use ipc::fds::{self, Passed};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{AddressFamily, Shutdown, SockaddrLike, SockaddrStorage, getsockname, shutdown};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use tokio::io::unix::AsyncFd;
use tokio::io::{Interest, Ready};

/// Descriptors that come with one receive at most.
const MAX_FDS: usize = 16;

/// See the module. It belongs to the event loop of the thread that made it.
#[derive(Debug)]
pub struct MessageSocket {
    fd: AsyncFd<Foreign>,
    lane: Lane,
}

impl MessageSocket {
    /// Takes a connection, or a socket that its peer sent, into the event loop of the calling thread, and makes it non-blocking.
    ///
    /// # Errors
    /// It is no unix socket, or no event loop runs here.
    pub fn new(fd: OwnedFd, lane: &Lane) -> io::Result<Self> {
        Self::of(Foreign::new(fd, lane), lane)
    }

    /// The same of one that is in such hands already.
    ///
    /// # Errors
    /// As of [`new`](Self::new).
    pub fn of(fd: Foreign, lane: &Lane) -> io::Result<Self> {
        // Before the event loop asks it anything: a file that is no socket could keep it waiting for the answer.
        let name = getsockname::<SockaddrStorage>(fd.as_raw_fd()).ok();
        if name.and_then(|name| name.family()) != Some(AddressFamily::Unix) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the descriptor is no unix socket"));
        }
        if tokio::runtime::Handle::try_current().is_err() {
            return Err(io::Error::other("no event loop runs on this thread"));
        }
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        let interest = Interest::READABLE | Interest::WRITABLE;
        // SAFETY: the AsyncFd owns the descriptor, and nothing replaces it.
        Ok(Self { fd: unsafe { AsyncFd::register_with_interest(fd, interest) }?, lane: lane.clone() })
    }

    /// Receives what is there, at most as much as fits, and adds the descriptors that come with it to `fds`. 0 is the end of
    /// the stream. May be dropped while it waits; nothing is lost then. Waits while much of the peer's is not closed yet.
    ///
    /// # Errors
    /// The connection is broken, or more than 16 descriptors came at once.
    pub async fn recv(&self, buf: &mut [u8], fds: &mut Vec<Foreign>) -> io::Result<usize> {
        tokio::select! {
            biased;
            () = self.lane.room() => {}
            () = self.gone() => return Ok(0),
        }
        loop {
            let mut passed = Passed::up_to(MAX_FDS);
            let result = fds::receive(&self.fd, buf, &mut passed);
            if result.is_ok() {
                fds.extend(passed.take_came().into_iter().map(|fd| Foreign::new(fd, &self.lane)));
            }
            let rest = passed.take_all();
            if !rest.is_empty() {
                self.lane.dispose(rest);
            }
            match result {
                Ok(count) => {
                    note_event();
                    return Ok(count);
                }
                // What comes from here on is reported anew.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.fd.readable().await?.clear_ready(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Waits until the peer has closed its end, whatever there is to be received.
    pub async fn gone(&self) {
        while let Ok(mut ready) = self.fd.readable().await {
            if ready.ready().is_read_closed() {
                return;
            }
            // Who receives does not depend on it.
            ready.clear_ready_matching(Ready::READABLE);
        }
    }

    /// Sends all of `bytes`, and the descriptor with the first of them.
    ///
    /// # Errors
    /// The connection is broken. No SIGPIPE is raised.
    pub async fn send(&self, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let (mut rest, mut fd) = (bytes, fd);
        while !rest.is_empty() {
            let mut ready = self.fd.writable().await?;
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let fds = fd.map(|fd| [fd]);
            if let Some(fds) = &fds
                && !control.push(SendAncillaryMessage::ScmRights(fds))
            {
                return Err(io::Error::other("no room for a descriptor"));
            }
            // Whether it blocks may be the peer's to say.
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match sendmsg(&self.fd, &[IoSlice::new(rest)], &mut control, flags) {
                Ok(sent) => {
                    fd = None;
                    rest = rest.get(sent..).unwrap_or_default();
                }
                Err(rustix::io::Errno::AGAIN) => ready.clear_ready(),
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }
}

impl Drop for MessageSocket {
    fn drop(&mut self) {
        // The peer sees the end now, whenever the lane comes to it. It fails only if that has come already.
        let _ = shutdown(self.fd.get_ref().as_raw_fd(), Shutdown::Both);
    }
}

impl AsFd for MessageSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.get_ref().as_fd()
    }
}
