//! Sockets as character devices: listening for clients one at a time, or connecting and trying again.

use std::future::{pending, poll_fn};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use io::{Channel, Listener};
use nix::sys::socket::{SockaddrLike, SockaddrStorage, getpeername, getsockname, setsockopt, sockopt};
use qapi::types::chardev::ChardevSocket;
use qapi::types::sockets::{SocketAddress, SocketAddressVariant};
use qapi::{Error, Result};

use super::{Connection, Label};

/// How long to wait when the system has no descriptor for a client.
const SHORTAGE: Duration = Duration::from_secs(1);

/// A source of clients.
pub(super) struct Socket {
    id: String,
    address: SocketAddress,
    way: Way,
    nodelay: bool,
    label: Rc<Label>,
    /// A client that was there before somebody asked for it.
    first: Option<OwnedFd>,
}

enum Way {
    Listen(Vec<Listener>),
    /// Time between two tries; `None`: there is no second one.
    Connect(Option<Duration>),
}

impl Socket {
    /// Listens, or connects where nothing says to try again later.
    ///
    /// # Errors
    /// Options contradict each other, or the system refuses.
    pub(super) async fn open(id: &str, options: &ChardevSocket, label: &Rc<Label>) -> Result<Socket> {
        let reconnect = reconnect(options)?;
        let address = SocketAddress::from(options.addr.clone());
        let mut socket = Socket {
            id: id.to_owned(),
            address,
            way: Way::Connect(reconnect),
            nodelay: options.nodelay,
            label: label.clone(),
            first: None,
        };
        if options.server {
            socket.way = Way::Listen(io::socket::listen(&socket.address).await?);
            label.set(socket.name_without_client());
            if options.wait.unwrap_or(false) {
                // Whoever started us has to know that this is not a hang.
                let line = format!("qemu-storage-daemon: info: waiting for connection on: {}\n", label.get());
                let _ = std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes());
                socket.first = Some(socket.accept().await);
            }
        } else {
            label.set(socket.name_without_client());
            if reconnect.is_none() {
                socket.first = Some(io::socket::connect(&socket.address).await?);
            }
        }
        Ok(socket)
    }

    /// The next client.
    pub(super) async fn connection(&mut self) -> Option<Connection> {
        loop {
            let fd = match (self.first.take(), &self.way) {
                (Some(fd), _) => fd,
                (None, Way::Listen(_)) => self.accept().await,
                (None, Way::Connect(Some(period))) => self.connect(*period).await,
                (None, Way::Connect(None)) => return None,
            };
            if self.nodelay && is_tcp(&fd) {
                // It only costs time.
                let _ = setsockopt(&fd, sockopt::TcpNoDelay, &true);
            }
            let now = self.name_with_client(&fd);
            match Channel::socket(fd) {
                Ok(channel) => {
                    return Some(Connection::new(channel, &self.label, now, self.name_without_client()));
                }
                Err(error) => {
                    tracing::warn!(target: "chardev_client_lost", "Character device {} lost a client: {error}", self.id);
                    tokio::time::sleep(SHORTAGE).await;
                }
            }
        }
    }

    async fn accept(&self) -> OwnedFd {
        let Way::Listen(listeners) = &self.way else { return pending().await };
        let mut warned = false;
        loop {
            let mut accepts: Vec<_> = listeners.iter().map(|listener| Box::pin(listener.accept())).collect();
            let accepted = poll_fn(|context| {
                let first = accepts.iter_mut().find_map(|accept| match accept.as_mut().poll(context) {
                    Poll::Ready(result) => Some(result),
                    Poll::Pending => None,
                });
                first.map_or(Poll::Pending, Poll::Ready)
            })
            .await;
            match accepted {
                Ok(fd) => return fd,
                Err(error) => {
                    if !warned {
                        tracing::warn!(target: "chardev_client_lost", "Character device {} lost a client: {error}", self.id);
                        warned = true;
                    }
                    tokio::time::sleep(SHORTAGE).await;
                }
            }
        }
    }

    /// Tries until there is a connection. Says once why there is none.
    async fn connect(&self, period: Duration) -> OwnedFd {
        let mut warned = false;
        loop {
            // The two are not raced: a try takes what it takes.
            let mut pause = pin!(tokio::time::sleep(period));
            match io::socket::connect(&self.address).await {
                Ok(fd) => return fd,
                Err(error) => {
                    if !warned {
                        tracing::warn!(target: "chardev_unable_to_connect", "Unable to connect character device {}: {error}", self.id);
                        warned = true;
                    }
                    pause.as_mut().await;
                }
            }
        }
    }

    fn name_without_client(&self) -> String {
        match &self.way {
            Way::Listen(listeners) => {
                let bound = listeners.first().and_then(|listener| getsockname(listener.as_fd().as_raw_fd()).ok());
                format!("disconnected:{},server=on", name(&self.address, bound))
            }
            Way::Connect(_) => format!("disconnected:{}", name(&self.address, None)),
        }
    }

    fn name_with_client(&self, fd: &OwnedFd) -> String {
        let local: Option<SockaddrStorage> = getsockname(fd.as_raw_fd()).ok();
        let server = if matches!(self.way, Way::Listen(_)) { ",server=on" } else { "" };
        let peer = if is_tcp(fd) { getpeername::<SockaddrStorage>(fd.as_raw_fd()).ok() } else { None };
        let peer = peer.map(|peer| format!(" <-> {peer}")).unwrap_or_default();
        format!("{}{server}{peer}", name(&self.address, local))
    }
}

/// The time between two tries, if the options ask for more than one.
fn reconnect(options: &ChardevSocket) -> Result<Option<Duration>> {
    let milliseconds = match (options.reconnect, options.reconnect_ms) {
        (Some(_), Some(_)) => {
            return Err(Error::generic("'reconnect' and 'reconnect-ms' are mutually exclusive"));
        }
        (Some(seconds), None) => Some(("reconnect", seconds.saturating_mul(1000))),
        (None, milliseconds) => milliseconds.map(|m| ("reconnect-ms", m)),
    };
    if options.server && milliseconds.is_some() {
        return Err(Error::generic("'reconnect' option is incompatible with socket in server listen mode"));
    }
    if !options.server && options.wait.is_some() {
        return Err(Error::generic("'wait' option is incompatible with socket in client connect mode"));
    }
    match milliseconds {
        None | Some((_, 0)) => Ok(None),
        Some((name, value)) => match u64::try_from(value) {
            Ok(value) => Ok(Some(Duration::from_millis(value))),
            Err(_) => Err(Error::generic(format!("Parameter '{name}' must not be negative"))),
        },
    }
}

fn is_tcp(fd: &OwnedFd) -> bool {
    use nix::sys::socket::AddressFamily::{Inet, Inet6};
    getsockname::<SockaddrStorage>(fd.as_raw_fd()).is_ok_and(|a| matches!(a.family(), Some(Inet | Inet6)))
}

/// An address for people. `actual` is what the system made of it, such as the port that it chose.
fn name(address: &SocketAddress, actual: Option<SockaddrStorage>) -> String {
    match &address.addr {
        SocketAddressVariant::Inet(inet) => match actual {
            Some(actual) => format!("tcp:{actual}"),
            None => format!("tcp:{}:{}", inet.host, inet.port),
        },
        SocketAddressVariant::Unix(unix) => {
            let tight = if unix.tight { ",tight=on" } else { "" };
            let form = if unix.is_abstract { format!(",abstract=on{tight}") } else { String::new() };
            format!("unix:{}{form}", unix.path)
        }
        SocketAddressVariant::Vsock(vsock) => format!("vsock:{}:{}", vsock.cid, vsock.port),
        SocketAddressVariant::Fd(fd) => format!("fd:{}", fd.str),
    }
}
