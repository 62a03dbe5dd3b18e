//! Datagrams as a character device. They get lost, and a peer that is not there is none of an error.

use std::io;
use std::net::UdpSocket;
use std::os::fd::OwnedFd;
use std::task::{Context, Poll};

use qapi::types::chardev::ChardevUdp;
use qapi::types::sockets::SocketAddress;
use qapi::{Error, Result};
use tokio::io::ReadBuf;

use super::permanent::Permanent;
use super::transport::Transport;
use super::{Common, Connection};

/// Bytes of a datagram that is sent.
const MAX_SENT: usize = 16 * 1024;

/// A socket for datagrams to and from one peer.
///
/// # Errors
/// The addresses cannot be resolved or used.
pub(super) async fn open(options: &ChardevUdp, common: &Common) -> Result<Permanent> {
    let remote = SocketAddress::from(options.remote.clone());
    let local = options.local.clone().map(SocketAddress::from);
    let socket: UdpSocket = ::io::socket::datagram(&remote, local.as_ref()).await?.into();
    socket.set_nonblocking(true).map_err(|error| Error::io("Failed to set up socket", error))?;
    let common = common.clone();
    Ok(Permanent::new(move || {
        let socket = tokio::net::UdpSocket::from_std(socket.try_clone()?)?;
        Ok(Connection::plain(Datagrams(socket), &common))
    }))
}

struct Datagrams(tokio::net::UdpSocket);

impl Transport for Datagrams {
    fn poll_read(&self, cx: &mut Context<'_>, buffer: &mut [u8], _: &mut Vec<OwnedFd>) -> Poll<io::Result<usize>> {
        loop {
            let mut into = ReadBuf::new(buffer);
            match self.0.poll_recv(cx, &mut into) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(())) if !into.filled().is_empty() => return Poll::Ready(Ok(into.filled().len())),
                // An empty datagram is no end, and that the peer was not there the last time is none either.
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) if is_absence(&error) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
            }
        }
    }

    fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.poll_send_ready(cx)
    }

    fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        let datagram = bytes.get(..bytes.len().min(MAX_SENT)).unwrap_or_default();
        match self.0.try_send(datagram) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            Err(error) if is_absence(&error) => Ok(datagram.len()),
            other => other,
        }
    }
}

/// Whether it only says that an earlier datagram did not arrive.
fn is_absence(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionRefused, HostUnreachable, NetworkUnreachable};
    matches!(error.kind(), ConnectionRefused | HostUnreachable | NetworkUnreachable)
}
