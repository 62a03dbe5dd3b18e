//! Event descriptors that another process gave: one that it rings, one that it listens to.
//!
//! The descriptors are foreign. What is no event counter could keep the thread waiting, so anything that is a file, a device,
//! a pipe or a socket is refused, and they are made non-blocking. `[eventfd(2)]`

use crate::polling::note_event;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::{SFlag, fstat};
use std::io;
use std::os::fd::OwnedFd;
use std::task::{Context, Poll, ready};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Checks that it is an anonymous object of the kernel, as event counters are, and makes it non-blocking.
fn check(fd: &OwnedFd) -> io::Result<()> {
    let kind = SFlag::from_bits_truncate(fstat(fd)?.st_mode & SFlag::S_IFMT.bits());
    if !kind.is_empty() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the descriptor is no event counter"));
    }
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    if !flags.contains(OFlag::O_NONBLOCK) {
        fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    }
    Ok(())
}

/// What the other side rings. It belongs to the event loop of the thread that made it.
#[derive(Debug)]
pub struct Doorbell(AsyncFd<OwnedFd>);

impl Doorbell {
    /// Listens to `fd` from now on.
    ///
    /// # Errors
    /// It is no event counter, or no event loop runs here.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        check(&fd)?;
        Ok(Self(crate::stream::register(fd, Interest::READABLE)?))
    }

    /// Ready when it was rung since the last time; any number of rings count as one.
    ///
    /// # Errors
    /// It cannot be read, so it will never ring again.
    pub fn poll_rung(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut ready = ready!(self.0.poll_read_ready(cx))?;
        let mut count = [0; 8];
        let result = nix::unistd::read(&self.0, &mut count);
        // It is empty now, whatever it was; a ring after the read is reported anew.
        ready.clear_ready();
        match result {
            Ok(_) | Err(Errno::EAGAIN | Errno::EINTR) => {
                note_event();
                Poll::Ready(Ok(()))
            }
            Err(errno) => Poll::Ready(Err(errno.into())),
        }
    }
}

/// What the other side listens to.
#[derive(Debug)]
pub struct Bell(OwnedFd);

impl Bell {
    /// Will ring `fd`.
    ///
    /// # Errors
    /// It is no event counter.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        check(&fd)?;
        Ok(Self(fd))
    }

    /// Rings. A counter that is full has rung already, and one that takes nothing has nobody who listens.
    pub fn ring(&self) {
        let _ = nix::unistd::write(&self.0, &1u64.to_ne_bytes());
    }
}
