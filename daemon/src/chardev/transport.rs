//! What a connection moves its bytes through, and the two transports that need no file of their own.

use std::io;
use std::os::fd::OwnedFd;
use std::task::{Context, Poll};

use ::io::Channel;

/// Both directions of one client's bytes. One task reads and one writes at a time; none of the calls waits.
pub(super) trait Transport {
    /// Reads bytes that are there; 0 is the end. Descriptors that came with them go to `passed`.
    fn poll_read(&self, cx: &mut Context<'_>, buffer: &mut [u8], passed: &mut Vec<OwnedFd>) -> Poll<io::Result<usize>>;

    /// Whether [`Transport::try_write`] may have something to do.
    fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;

    /// Writes what can be written without waiting, perhaps nothing.
    fn try_write(&self, bytes: &[u8]) -> io::Result<usize>;

    /// Whether everything that was written has left the process.
    fn poll_flushed(&self, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// Whether the client has closed both directions, and not just said that it will send nothing more.
    fn is_gone(&self) -> bool {
        false
    }
}

impl Transport for Channel {
    fn poll_read(&self, cx: &mut Context<'_>, buffer: &mut [u8], passed: &mut Vec<OwnedFd>) -> Poll<io::Result<usize>> {
        Channel::poll_read(self, cx, buffer, passed)
    }

    fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Channel::poll_writable(self, cx)
    }

    fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        Channel::try_write(self, bytes)
    }

    fn is_gone(&self) -> bool {
        Channel::is_gone(self)
    }
}

/// A transport from which nothing is ever received.
pub(super) struct WriteOnly(pub(super) Channel);

impl Transport for WriteOnly {
    fn poll_read(&self, _: &mut Context<'_>, _: &mut [u8], _: &mut Vec<OwnedFd>) -> Poll<io::Result<usize>> {
        Poll::Pending
    }

    fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.poll_writable(cx)
    }

    fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        self.0.try_write(bytes)
    }
}
