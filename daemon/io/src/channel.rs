//! A conversation's bytes on the control path: a socket of any family, or a pair such as the two standard streams.
//!
//! It owns its descriptors and gives their flags back. Unlike [`crate::Stream`] it reads into plain memory and takes any sort
//! of file, for a monitor may be talked to through a pipe, a terminal or the null device.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::task::{Context, Poll};

use ipc::fds::{self, Passed};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{getsockopt, sockopt};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Descriptors that are taken out of one message; a client has no reason to send more.
pub const MAX_PASSED: usize = 16;

/// One conversation. Only one task may read and one write at a time.
#[derive(Debug)]
pub struct Channel {
    input: End,
    /// Where it differs from the input.
    output: Option<End>,
}

/// A descriptor in the event loop. Its former flags are given back at the end, for others may share it.
#[derive(Debug)]
struct End {
    fd: Polled,
    flags: OFlag,
    is_socket: bool,
}

#[derive(Debug)]
enum Polled {
    Ready(AsyncFd<OwnedFd>),
    /// A regular file or the null device: never has to wait, and cannot be waited for.
    Always(OwnedFd),
}

impl Channel {
    /// One descriptor for both directions: a connected socket, or a terminal.
    ///
    /// # Errors
    /// The descriptor cannot be polled, or no event loop runs here.
    pub fn single(fd: OwnedFd) -> io::Result<Channel> {
        Ok(Channel { input: End::new(fd, Interest::READABLE | Interest::WRITABLE)?, output: None })
    }

    /// Two descriptors that may be anything.
    ///
    /// # Errors
    /// No event loop runs here, or it has no room.
    pub fn pair(input: OwnedFd, output: OwnedFd) -> io::Result<Channel> {
        let input = End::new(input, Interest::READABLE)?;
        let output = End::new(output, Interest::WRITABLE)?;
        Ok(Channel { input, output: Some(output) })
    }

    fn output(&self) -> &End {
        self.output.as_ref().unwrap_or(&self.input)
    }

    /// Reads bytes that are there; 0 is the end. Descriptors that came with them are added to `passed`, closed on exec;
    /// what is beyond [`MAX_PASSED`] of one message is closed. Nothing is lost if the caller loses interest.
    ///
    /// # Errors
    /// What read(2) says.
    pub fn poll_read(
        &self,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
        passed: &mut Vec<OwnedFd>,
    ) -> Poll<io::Result<usize>> {
        let mut once = |fd: &OwnedFd| match self.input.is_socket {
            true => receive(fd, buffer, passed),
            false => retry(|| nix::unistd::read(fd, &mut *buffer)),
        };
        match &self.input.fd {
            Polled::Always(fd) => Poll::Ready(once(fd)),
            Polled::Ready(fd) => loop {
                let mut ready = std::task::ready!(fd.poll_read_ready(cx))?;
                match ready.try_io(|fd| once(fd.get_ref())) {
                    Ok(result) => return Poll::Ready(result),
                    Err(_would_block) => {}
                }
            },
        }
    }

    /// Whether [`Channel::try_write`] may have something to do.
    ///
    /// # Errors
    /// The event loop has ended.
    pub fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &self.output().fd {
            Polled::Always(_) => Poll::Ready(Ok(())),
            Polled::Ready(fd) => fd.poll_write_ready(cx).map_ok(drop),
        }
    }

    /// Writes what can be written without waiting, perhaps nothing.
    ///
    /// # Errors
    /// What write(2) says, but for `EAGAIN`.
    pub fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        let result = match &self.output().fd {
            Polled::Always(fd) => retry(|| nix::unistd::write(fd, bytes)),
            Polled::Ready(fd) => fd.try_io(Interest::WRITABLE, |fd| retry(|| nix::unistd::write(fd, bytes))),
        };
        match result {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            other => other,
        }
    }

    /// Whether the client has closed both directions, and not just said that it will send nothing more. A TCP peer
    /// that closes cannot be told from one that only stops sending.
    pub fn is_gone(&self) -> bool {
        match &self.output().fd {
            Polled::Always(_) => false,
            Polled::Ready(fd) => {
                let mut ready = std::pin::pin!(fd.ready(Interest::READABLE | Interest::WRITABLE));
                match ready.as_mut().poll(&mut Context::from_waker(std::task::Waker::noop())) {
                    Poll::Ready(ready) => ready.is_ok_and(|ready| ready.ready().is_write_closed()),
                    Poll::Pending => false,
                }
            }
        }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // A socket that was passed to the process stays open under its number there, so closing ours would not be seen by
        // the peer. What was written still arrives. If the peer has gone already, there is nobody to tell.
        if let (None, Polled::Ready(fd)) = (&self.output, &self.input.fd) {
            let _ = nix::sys::socket::shutdown(fd.as_raw_fd(), nix::sys::socket::Shutdown::Both);
        }
    }
}

impl End {
    fn new(fd: OwnedFd, interest: Interest) -> io::Result<End> {
        if tokio::runtime::Handle::try_current().is_err() {
            return Err(io::Error::other("no event loop runs on this thread"));
        }
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        let is_socket = getsockopt(&fd, sockopt::SockType).is_ok();
        // SAFETY: the AsyncFd owns the descriptor, and nothing replaces it.
        let fd = match unsafe { AsyncFd::register_with_interest(fd, interest) } {
            Ok(fd) => Polled::Ready(fd),
            Err(error) => {
                let (fd, error) = error.into_parts();
                if error.raw_os_error() != Some(libc::EPERM) {
                    return Err(error);
                }
                Polled::Always(fd)
            }
        };
        Ok(End { fd, flags, is_socket })
    }
}

impl Drop for End {
    fn drop(&mut self) {
        // The flags belong to the open file, which a shell may share with us. If it is closed already, nobody minds.
        let _ = match &self.fd {
            Polled::Ready(fd) => fcntl(fd, FcntlArg::F_SETFL(self.flags)),
            Polled::Always(fd) => fcntl(fd, FcntlArg::F_SETFL(self.flags)),
        };
    }
}

fn retry<T>(mut call: impl FnMut() -> nix::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            other => return other.map_err(io::Error::from),
        }
    }
}

/// Bytes and descriptors of a socket. What is more than may come is closed, but not here.
fn receive(fd: &OwnedFd, buffer: &mut [u8], passed: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut came = Passed::up_to(usize::MAX);
    let received = loop {
        match fds::receive(fd, buffer, &mut came) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => break other,
        }
    };
    let mut some = came.take_came();
    let mut rest = some.split_off(some.len().min(MAX_PASSED));
    rest.append(&mut came.take_all());
    if !rest.is_empty() {
        crate::foreign::dispose(rest);
    }
    passed.extend(some);
    received
}
