//! A conversation's bytes on the control path: a socket of any family, or a pair such as the two standard streams.
//!
//! It owns its descriptors and gives their flags back. Unlike [`crate::Stream`] it reads into plain memory and takes any sort
//! of file, for a monitor may be talked to through a pipe, a terminal or the null device.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::unix::AsyncFd;
use tokio::io::{Interest, Ready};

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
}

#[derive(Debug)]
enum Polled {
    Ready(AsyncFd<OwnedFd>),
    /// A regular file or the null device: never has to wait, and cannot be waited for.
    Always(OwnedFd),
}

impl Channel {
    /// A connected socket.
    ///
    /// # Errors
    /// The descriptor cannot be polled, or no event loop runs here.
    pub fn socket(fd: OwnedFd) -> io::Result<Channel> {
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

    /// Waits for bytes and reads them; 0 is the end. Nothing is lost if this is dropped before it completes.
    ///
    /// # Errors
    /// What read(2) says.
    pub async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match &self.input.fd {
            Polled::Always(fd) => retry(|| nix::unistd::read(fd, buffer)),
            Polled::Ready(fd) => loop {
                let mut ready = fd.readable().await?;
                match ready.try_io(|fd| retry(|| nix::unistd::read(fd, buffer))) {
                    Ok(result) => return result,
                    Err(_would_block) => {}
                }
            },
        }
    }

    /// Waits until [`Channel::try_write`] may have something to do.
    ///
    /// # Errors
    /// The event loop has ended.
    pub async fn writable(&self) -> io::Result<()> {
        match &self.output().fd {
            Polled::Always(_) => Ok(()),
            Polled::Ready(fd) => fd.writable().await.map(drop),
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
    pub async fn is_gone(&self) -> bool {
        match &self.output().fd {
            Polled::Always(_) => false,
            Polled::Ready(fd) => {
                let ready = tokio::select! {
                    biased;
                    ready = fd.ready(Interest::READABLE | Interest::WRITABLE) => ready.map(|guard| guard.ready()),
                    () = std::future::ready(()) => Ok(Ready::EMPTY),
                };
                ready.is_ok_and(|ready| ready.is_write_closed())
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
        Ok(End { fd, flags })
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
