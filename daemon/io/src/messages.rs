//! [`MessageSocket`]: a unix stream socket on which descriptors come and go with the bytes.

use crate::polling::note_event;
use crate::stream::register;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Descriptors that come with one receive at most.
const MAX_FDS: usize = 16;

/// See the module. It belongs to the event loop of the thread that made it.
#[derive(Debug)]
pub struct MessageSocket(AsyncFd<OwnedFd>);

impl MessageSocket {
    /// Takes a connected socket into the event loop of the calling thread, and makes it non-blocking.
    ///
    /// # Errors
    /// The descriptor cannot be polled, or no event loop runs here.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        Ok(Self(register(fd, Interest::READABLE | Interest::WRITABLE)?))
    }

    /// Receives what is there, at most as much as fits, and adds the descriptors that come with it to `fds`. 0 is the end of
    /// the stream. May be dropped while it waits; nothing is lost then.
    ///
    /// # Errors
    /// The connection is broken, or more than 16 descriptors came at once.
    pub async fn recv(&self, buf: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
        loop {
            let mut ready = self.0.readable().await?;
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            match recvmsg(&self.0, &mut [IoSliceMut::new(buf)], &mut control, RecvFlags::CMSG_CLOEXEC) {
                Ok(received) => {
                    note_event();
                    for message in control.drain() {
                        if let RecvAncillaryMessage::ScmRights(passed) = message {
                            fds.extend(passed);
                        }
                    }
                    if received.flags.contains(ReturnFlags::CTRUNC) {
                        return Err(io::Error::new(io::ErrorKind::InvalidData, "too many descriptors"));
                    }
                    return Ok(received.bytes);
                }
                Err(rustix::io::Errno::AGAIN) => ready.clear_ready(),
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Sends all of `bytes`, and the descriptor with the first of them.
    ///
    /// # Errors
    /// The connection is broken. No SIGPIPE is raised.
    pub async fn send(&self, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let (mut rest, mut fd) = (bytes, fd);
        while !rest.is_empty() {
            let mut ready = self.0.writable().await?;
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let fds = fd.map(|fd| [fd]);
            if let Some(fds) = &fds
                && !control.push(SendAncillaryMessage::ScmRights(fds))
            {
                return Err(io::Error::other("no room for a descriptor"));
            }
            match sendmsg(&self.0, &[IoSlice::new(rest)], &mut control, SendFlags::NOSIGNAL) {
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

impl AsFd for MessageSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
