//! Sockets as character devices: listening for clients one at a time, or connecting and trying again.

use std::future::{pending, poll_fn};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use ::io::{Channel, Listener};
use nix::sys::socket::{SockaddrLike, SockaddrStorage, getpeername, getsockname, setsockopt, sockopt};
use qapi::types::chardev::ChardevSocket;
use qapi::types::sockets::{SocketAddress, SocketAddressVariant};
use qapi::{Error, Result};

use super::framed::Framed;
use super::telnet::{self, Telnet};
use super::{Common, Connection, websocket};

/// How long to wait when the system has no descriptor for a client.
const SHORTAGE: Duration = Duration::from_secs(1);

/// A source of clients.
pub(super) struct Socket {
    id: String,
    address: SocketAddress,
    way: Way,
    nodelay: bool,
    protocol: Protocol,
    common: Common,
    /// A client that was there before somebody asked for it.
    first: Option<OwnedFd>,
}

/// What is spoken around the bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Protocol {
    None,
    Telnet,
    Tn3270,
    WebSocket,
}

impl Protocol {
    fn of(options: &ChardevSocket) -> Result<Protocol> {
        Ok(match options {
            ChardevSocket { websocket: true, server: false, .. } => {
                return Err(Error::generic("Websocket client is not implemented"));
            }
            ChardevSocket { websocket: true, telnet: false, tn3270: false, .. } => Protocol::WebSocket,
            ChardevSocket { websocket: true, .. } => {
                return Err(Error::generic("'websocket' cannot be used together with 'telnet' or 'tn3270'"));
            }
            ChardevSocket { tn3270: true, .. } => Protocol::Tn3270,
            ChardevSocket { telnet: true, .. } => Protocol::Telnet,
            _ => Protocol::None,
        })
    }

    /// What addresses of the Internet are called.
    fn name(self) -> &'static str {
        match self {
            Protocol::None | Protocol::Tn3270 => "tcp",
            Protocol::Telnet => "telnet",
            Protocol::WebSocket => "websocket",
        }
    }
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
    pub(super) async fn open(id: &str, options: &ChardevSocket, common: &Common) -> Result<Socket> {
        if let Some(credentials) = &options.tls_creds {
            // There is no type of object yet that could be one.
            return Err(Error::generic(format!("No TLS credentials with id '{credentials}'"))
                .with_hint("TLS is not supported on character devices yet"));
        }
        if options.tls_authz.is_some() {
            return Err(Error::generic("'tls_authz' option requires 'tls_creds' option"));
        }
        let reconnect = reconnect(options)?;
        let address = SocketAddress::from(options.addr.clone());
        let mut socket = Socket {
            id: id.to_owned(),
            address,
            way: Way::Connect(reconnect),
            nodelay: options.nodelay,
            protocol: Protocol::of(options)?,
            common: common.clone(),
            first: None,
        };
        if options.server {
            socket.way = Way::Listen(::io::socket::listen(&socket.address).await?);
            common.label.set(socket.name_without_client());
            if options.wait.unwrap_or(false) {
                // Whoever started us has to know that this is not a hang.
                let line = format!("qemu-storage-daemon: info: waiting for connection on: {}\n", common.label.get());
                let _ = std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes());
                socket.first = Some(socket.accept().await);
            }
        } else {
            common.label.set(socket.name_without_client());
            if reconnect.is_none() {
                let fd = ::io::socket::connect(&socket.address).await?;
                common.label.connected(socket.name_with_client(&fd));
                socket.first = Some(fd);
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
            match self.begin(fd, now).await {
                Ok(connection) => return Some(connection),
                Err(error) => {
                    tracing::warn!(target: "chardev_client_lost", "Character device {} lost a client: {error}", self.id);
                    if error.raw_os_error().is_some() {
                        tokio::time::sleep(SHORTAGE).await;
                    }
                }
            }
        }
    }

    /// Agrees with a client on the protocol.
    async fn begin(&self, fd: OwnedFd, name: String) -> std::io::Result<Connection> {
        let channel = Channel::single(fd)?;
        let after = self.name_without_client();
        let greeting = match self.protocol {
            Protocol::None => return Ok(Connection::new(channel, &self.common, name, after)),
            Protocol::WebSocket => {
                let framed = websocket::accept(channel).await?;
                return Ok(Connection::new(framed, &self.common, name, after));
            }
            Protocol::Telnet => telnet::GREETING,
            Protocol::Tn3270 => telnet::GREETING_TN3270,
        };
        let framed = Framed::new(channel, Telnet::default(), greeting.to_vec());
        Ok(Connection::new(framed, &self.common, name, after))
    }

    /// The address that is listened on or connected to.
    pub(super) fn address(&self) -> &SocketAddress {
        &self.address
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
            match ::io::socket::connect(&self.address).await {
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
                format!("disconnected:{},server=on", self.name(bound))
            }
            Way::Connect(_) => format!("disconnected:{}", self.name(None)),
        }
    }

    fn name_with_client(&self, fd: &OwnedFd) -> String {
        let local: Option<SockaddrStorage> = getsockname(fd.as_raw_fd()).ok();
        let server = if matches!(self.way, Way::Listen(_)) { ",server=on" } else { "" };
        let peer = if is_tcp(fd) { getpeername::<SockaddrStorage>(fd.as_raw_fd()).ok() } else { None };
        let peer = peer.map(|peer| format!(" <-> {peer}")).unwrap_or_default();
        format!("{}{server}{peer}", self.name(local))
    }

    /// The address for people. `actual` is what the system made of it, such as the port that it chose.
    fn name(&self, actual: Option<SockaddrStorage>) -> String {
        let protocol = self.protocol.name();
        match (&self.address.addr, actual) {
            (SocketAddressVariant::Inet(_), Some(actual)) => format!("{protocol}:{actual}"),
            (SocketAddressVariant::Inet(inet), None) => format!("{protocol}:{}:{}", inet.host, inet.port),
            (SocketAddressVariant::Unix(unix), _) => {
                let tight = if unix.tight { ",tight=on" } else { "" };
                let form = if unix.is_abstract { format!(",abstract=on{tight}") } else { String::new() };
                format!("unix:{}{form}", unix.path)
            }
            (SocketAddressVariant::Vsock(vsock), _) => format!("vsock:{}:{}", vsock.cid, vsock.port),
            // A passed socket is called by what it is.
            (SocketAddressVariant::Fd(_), Some(actual)) if is_inet(&actual) => format!("{protocol}:{actual}"),
            (SocketAddressVariant::Fd(_), Some(actual)) if actual.as_unix_addr().is_some() => {
                let path = actual.as_unix_addr().and_then(|unix| unix.path());
                format!("unix:{}", path.map(|path| path.to_string_lossy()).unwrap_or_default())
            }
            (SocketAddressVariant::Fd(fd), _) => format!("fd:{}", fd.str),
        }
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
    getsockname::<SockaddrStorage>(fd.as_raw_fd()).is_ok_and(|address| is_inet(&address))
}

fn is_inet(address: &SockaddrStorage) -> bool {
    use nix::sys::socket::AddressFamily::{Inet, Inet6};
    matches!(address.family(), Some(Inet | Inet6))
}
