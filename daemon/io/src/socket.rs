//! Sockets from their QAPI addresses: listening and connecting, for exports and character devices alike.
//!
//! Name resolution and connecting can block and run on a thread of their own. The texts of errors are those that users of QEMU know.
//! `[QAPI §SocketAddress]`

mod resolve;

use crate::pool::connecting;
use crate::stream::Listener;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrLike, SockaddrStorage, UnixAddr, VsockAddr, bind,
    connect as connect_socket, getsockopt, listen as listen_on, setsockopt, socket, sockopt,
};
use qapi::types::sockets::{
    InetSocketAddress, SocketAddress, SocketAddressVariant, UnixSocketAddress, VsockSocketAddress,
};
use qapi::{Error, Result};
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Sockets that listen on all that `address` means; at least one.
///
/// # Errors
/// The address cannot be resolved, or none of what it means can be listened on.
pub async fn listen(address: &SocketAddress) -> Result<Vec<Listener>> {
    let address = address.addr.clone();
    let opened = run(move || match &address {
        SocketAddressVariant::Inet(inet) => listen_inet(inet),
        SocketAddressVariant::Unix(unix) => listen_unix(unix).map(|one| vec![one]),
        SocketAddressVariant::Vsock(vsock) => listen_vsock(vsock).map(|one| vec![one]),
        SocketAddressVariant::Fd(fd) => {
            passed_numbers(&fd.str)?.into_iter().map(|n| Ok(Opened { fd: passed_socket(n)?, path: None })).collect()
        }
    })
    .await?;
    opened
        .into_iter()
        .map(|one| {
            let listener = Listener::new(one.fd).map_err(|error| Error::io("Failed to listen on socket", error))?;
            Ok(listener.unlink_at_end(one.path))
        })
        .collect()
}

/// A socket that is connected to `address`; for a passed descriptor, the descriptor itself.
///
/// # Errors
/// The address cannot be resolved, or nobody answers there.
pub async fn connect(address: &SocketAddress) -> Result<OwnedFd> {
    let address = address.addr.clone();
    run(move || match &address {
        SocketAddressVariant::Inet(inet) => connect_inet(inet),
        SocketAddressVariant::Unix(unix) => {
            let fd = new_socket(AddressFamily::Unix)?;
            finish_connect(fd, &unix_address(unix)?, &unix.path)
        }
        SocketAddressVariant::Vsock(vsock) => {
            let fd = new_socket(AddressFamily::Vsock)?;
            finish_connect(fd, &vsock_address(vsock)?, &format!("{}:{}", vsock.cid, vsock.port))
        }
        SocketAddressVariant::Fd(fd) => match passed_numbers(&fd.str)?.as_slice() {
            [number] => passed_socket(*number),
            _ => Err(Error::generic(format!("More than one file descriptor is called '{}'", fd.str))),
        },
    })
    .await
}

/// A socket for datagrams to and from `remote`, received at `local` or wherever the system likes; for a passed descriptor,
/// the descriptor itself, which is connected and has its own place to receive at.
///
/// # Errors
/// An address cannot be resolved or used, or is of another kind; there is nothing like that for those. The descriptor is
/// none for datagrams.
pub async fn datagram(remote: &SocketAddress, local: Option<&SocketAddress>) -> Result<OwnedFd> {
    if let (SocketAddressVariant::Fd(fd), None) = (&remote.addr, local) {
        let [number] = passed_numbers(&fd.str)?[..] else {
            return Err(Error::generic(format!("More than one file descriptor is called '{}'", fd.str)));
        };
        let socket = passed_socket(number)?;
        return match getsockopt(&socket, sockopt::SockType) {
            Ok(SockType::Datagram) => Ok(socket),
            _ => Err(Error::generic(format!("File descriptor '{}' is not a socket for datagrams", fd.str))),
        };
    }
    let inet = |address: &SocketAddress| match &address.addr {
        SocketAddressVariant::Inet(inet) => Ok(inet.clone()),
        _ => Err(Error::generic("socket type unsupported for datagram")),
    };
    let (remote, local) = (inet(remote)?, local.map(inet).transpose()?);
    run(move || datagram_inet(&remote, local.as_ref())).await
}

fn datagram_inet(remote: &InetSocketAddress, local: Option<&InetSocketAddress>) -> Result<OwnedFd> {
    let mut last = Error::generic(format!("address resolution failed for {}:{}: no address", remote.host, remote.port));
    for address in resolve::resolve(remote, false)? {
        let family = address.family().unwrap_or(AddressFamily::Inet);
        let made = socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None);
        let fd = made.map_err(failed("Failed to create datagram socket"))?;
        setsockopt(&fd, sockopt::ReuseAddr, &true).map_err(failed("Failed to set up socket"))?;
        if let Some(local) = local {
            let fits = |at: &SockaddrStorage| at.family() == Some(family);
            let Some(at) = resolve::resolve(local, true)?.into_iter().find(fits) else {
                last = Error::generic("the local and the remote address are of different families");
                continue;
            };
            bind(std::os::fd::AsRawFd::as_raw_fd(&fd), &at).map_err(failed("Failed to bind socket"))?;
        }
        match connect_socket(std::os::fd::AsRawFd::as_raw_fd(&fd), &address) {
            Ok(()) => return Ok(fd),
            Err(errno) => last = failed("Failed to connect socket")(errno),
        }
    }
    Err(last)
}

async fn run<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    connecting(work).await.map_err(|error| Error::io("cannot start a thread", error))?
}

/// A socket that listens, and the path that it made.
struct Opened {
    fd: OwnedFd,
    path: Option<BoundPath>,
}

/// A path that a listening socket made, to be removed with it if it is still the same.
#[derive(Debug)]
pub(crate) struct BoundPath {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl BoundPath {
    fn of(path: &Path) -> Option<Self> {
        let found = fs::symlink_metadata(path).ok()?;
        // A process that goes to the background goes to another folder.
        let path = std::path::absolute(path).ok()?;
        Some(Self { path, device: found.dev(), inode: found.ino() })
    }
}

impl Drop for BoundPath {
    fn drop(&mut self) {
        let same = fs::symlink_metadata(&self.path)
            .is_ok_and(|now| (now.dev(), now.ino()) == (self.device, self.inode) && now.file_type().is_socket());
        if same {
            // If somebody was faster, it is gone all the same.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn failed(what: &str) -> impl Fn(Errno) -> Error {
    move |errno| Error::io(what, errno.into())
}

fn new_socket(family: AddressFamily) -> Result<OwnedFd> {
    socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).map_err(failed("Failed to create a socket"))
}

/// A socket of multipath TCP. `[Linux networking/mptcp §Creating MPTCP sockets]`
fn multipath_socket(family: AddressFamily) -> Result<OwnedFd> {
    // SAFETY: socket(2) takes numbers and touches no memory of ours.
    let result = unsafe { libc::socket(family as i32, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, libc::IPPROTO_MPTCP) };
    let fd = Errno::result(result).map_err(failed("Failed to create a multipath socket"))?;
    // SAFETY: the descriptor was just made for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn start_listening(fd: &OwnedFd) -> Result<()> {
    listen_on(fd, Backlog::MAXCONN).map_err(failed("Failed to listen on socket"))
}

/// An IP socket of the family of `address`, with the options of `inet`.
fn inet_socket(inet: &InetSocketAddress, address: &SockaddrStorage) -> Result<OwnedFd> {
    let family = address.family().unwrap_or(AddressFamily::Inet);
    let fd = if inet.mptcp.unwrap_or(false) { multipath_socket(family)? } else { new_socket(family)? };
    keep_alive(fd.as_fd(), inet).map_err(failed("Unable to set keep-alive option on socket"))?;
    Ok(fd)
}

fn keep_alive(fd: BorrowedFd<'_>, inet: &InetSocketAddress) -> nix::Result<()> {
    if !inet.keep_alive.unwrap_or(false) {
        return Ok(());
    }
    setsockopt(&fd, sockopt::KeepAlive, &true)?;
    if let Some(count) = inet.keep_alive_count.filter(|n| *n > 0) {
        setsockopt(&fd, sockopt::TcpKeepCount, &count)?;
    }
    if let Some(idle) = inet.keep_alive_idle.filter(|n| *n > 0) {
        setsockopt(&fd, sockopt::TcpKeepIdle, &idle)?;
    }
    if let Some(interval) = inet.keep_alive_interval.filter(|n| *n > 0) {
        setsockopt(&fd, sockopt::TcpKeepInterval, &interval)?;
    }
    Ok(())
}

fn listen_inet(inet: &InetSocketAddress) -> Result<Vec<Opened>> {
    let mut open = Vec::new();
    let mut first_error = None;
    for address in resolve::resolve(inet, true)? {
        match listen_on_some_port(inet, address) {
            Ok(fd) => open.push(Opened { fd, path: None }),
            Err(error) => first_error = first_error.or(Some(error)),
        }
    }
    // A host without IPv6 still serves a name that has both kinds of addresses.
    match first_error {
        Some(error) if open.is_empty() => Err(error),
        _ => Ok(open),
    }
}

/// Tries the port, and those after it up to `to`.
fn listen_on_some_port(inet: &InetSocketAddress, mut address: SockaddrStorage) -> Result<OwnedFd> {
    let first = resolve::port(&address);
    for port in first..=inet.to.unwrap_or(first).max(first) {
        resolve::set_port(&mut address, port);
        let fd = inet_socket(inet, &address)?;
        setsockopt(&fd, sockopt::ReuseAddr, &true).map_err(failed("Failed to set up socket"))?;
        if address.family() == Some(AddressFamily::Inet6) {
            // IPv4 has a socket of its own.
            setsockopt(&fd, sockopt::Ipv6V6Only, &true).map_err(failed("Failed to set up socket"))?;
        }
        match bind(std::os::fd::AsRawFd::as_raw_fd(&fd), &address) {
            Ok(()) => match listen_on(&fd, Backlog::MAXCONN) {
                Ok(()) => return Ok(fd),
                Err(Errno::EADDRINUSE) => {}
                Err(errno) => return Err(failed("Failed to listen on socket")(errno)),
            },
            Err(Errno::EADDRINUSE) => {}
            Err(errno) => return Err(failed("Failed to bind socket")(errno)),
        }
    }
    Err(failed("Failed to find an available port")(Errno::EADDRINUSE))
}

fn connect_inet(inet: &InetSocketAddress) -> Result<OwnedFd> {
    let name = format!("{}:{}", inet.host, inet.port);
    let mut last = Error::generic(format!("address resolution failed for {name}: no address"));
    for address in resolve::resolve(inet, false)? {
        let fd = inet_socket(inet, &address)?;
        match finish_connect(fd, &address, &name) {
            Ok(fd) => return Ok(fd),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn finish_connect(fd: OwnedFd, address: &dyn SockaddrLike, name: &str) -> Result<OwnedFd> {
    loop {
        match connect_socket(std::os::fd::AsRawFd::as_raw_fd(&fd), address) {
            Ok(()) => return Ok(fd),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(Error::io(format!("Failed to connect to '{name}'"), errno.into())),
        }
    }
}

fn unix_address(unix: &UnixSocketAddress) -> Result<UnixAddr> {
    let too_long = |_| {
        Error::generic(format!("UNIX socket path '{}' is too long", unix.path))
            .with_hint("Path must be less than 108 bytes")
    };
    let path = Path::new(&unix.path);
    if !unix.is_abstract {
        return UnixAddr::new(path).map_err(too_long);
    }
    let mut name = path.as_os_str().as_bytes().to_vec();
    if !unix.tight {
        // The older form fills the whole field with zeroes; one byte of it is the leading zero.
        name.resize(name.len().max(107), 0);
    }
    UnixAddr::new_abstract(&name).map_err(too_long)
}

fn listen_unix(unix: &UnixSocketAddress) -> Result<Opened> {
    let address = unix_address(unix)?;
    let fd = new_socket(AddressFamily::Unix)?;
    if !unix.is_abstract {
        // A socket that a former process left is in the way of the new one.
        match fs::remove_file(&unix.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound && is_there(&unix.path) => {
                return Err(Error::io(format!("Failed to unlink socket {}", unix.path), error));
            }
            _ => {}
        }
    }
    bind(std::os::fd::AsRawFd::as_raw_fd(&fd), &address)
        .map_err(|errno| Error::io(format!("Failed to bind socket to {}", unix.path), errno.into()))?;
    let path = if unix.is_abstract { None } else { BoundPath::of(Path::new(&unix.path)) };
    start_listening(&fd)?;
    Ok(Opened { fd, path })
}

fn is_there(path: &str) -> bool {
    fs::symlink_metadata(path).is_ok()
}

fn vsock_address(vsock: &VsockSocketAddress) -> Result<VsockAddr> {
    let cid = vsock.cid.parse().map_err(|_| Error::generic(format!("Failed to parse cid '{}'", vsock.cid)))?;
    let port = vsock.port.parse().map_err(|_| Error::generic(format!("Failed to parse port '{}'", vsock.port)))?;
    Ok(VsockAddr::new(cid, port))
}

fn listen_vsock(vsock: &VsockSocketAddress) -> Result<Opened> {
    let address = vsock_address(vsock)?;
    let fd = new_socket(AddressFamily::Vsock)?;
    bind(std::os::fd::AsRawFd::as_raw_fd(&fd), &address).map_err(failed("Failed to bind socket"))?;
    start_listening(&fd)?;
    Ok(Opened { fd, path: None })
}

/// The descriptors that a text means: one by its number, or all that the service manager passed under this name.
fn passed_numbers(text: &str) -> Result<Vec<RawFd>> {
    if let Ok(number) = text.parse() {
        return Ok(vec![number]);
    }
    let named: Vec<RawFd> = match sd_notify::listen_fds_with_names() {
        Ok(passed) => passed.filter(|(_, name)| name == text).map(|(number, _)| number).collect(),
        Err(error) => return Err(Error::io("Cannot read which file descriptors were passed", error)),
    };
    if named.is_empty() {
        return Err(Error::generic(format!("Unable to parse FD number {text}")));
    }
    Ok(named)
}

/// Whether the service manager passed something under this name.
pub fn was_passed(name: &str) -> bool {
    passed_numbers(name).is_ok()
}

/// Whether it is a socket.
pub fn is_socket(fd: &OwnedFd) -> bool {
    getsockopt(fd, sockopt::SockType).is_ok()
}

/// A socket that the process was started with, by its number. It belongs to the caller from now on.
fn passed_socket(number: RawFd) -> Result<OwnedFd> {
    let not_a_socket = || Error::generic(format!("File descriptor '{number}' is not a socket"));
    if number < 0 {
        return Err(not_a_socket());
    }
    // SAFETY: only looked at; that it is open and a socket is what the call finds out.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    getsockopt(&borrowed, sockopt::SockType).map_err(|_| not_a_socket())?;
    // A duplicate, so that the number is not freed under something else that the process has there, and closed on exec.
    let own = nix::fcntl::fcntl(borrowed, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(3))
        .map_err(failed("Failed to duplicate socket"))?;
    // SAFETY: the descriptor was just made for us.
    Ok(unsafe { OwnedFd::from_raw_fd(own) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use qapi::Qapi;

    fn address(json: &str) -> SocketAddress {
        SocketAddress::from_value(&serde_json::from_str(json).unwrap()).unwrap()
    }

    fn in_loop<T>(work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
    }

    #[test]
    fn a_path_is_made_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        in_loop(async {
            let at = address(&format!(r#"{{"type": "unix", "path": "{}"}}"#, path.display()));
            let first = listen(&at).await.unwrap();
            let second = listen(&at).await.unwrap();
            connect(&at).await.unwrap();
            drop(first);
            assert!(path.exists(), "the first one's end leaves the second one's path alone");
            drop(second);
            assert!(!path.exists());
        });
    }

    #[test]
    fn abstract_names_work_in_both_lengths() {
        in_loop(async {
            for tight in [true, false] {
                let name = format!("qsd-test-{}-{tight}", std::process::id());
                let at =
                    address(&format!(r#"{{"type": "unix", "path": "{name}", "abstract": true, "tight": {tight}}}"#));
                let listeners = listen(&at).await.unwrap();
                let (accepted, connected) = tokio::join!(listeners[0].accept(), connect(&at));
                accepted.unwrap();
                connected.unwrap();
            }
        });
    }

    #[test]
    fn ports_are_searched_in_their_range() {
        in_loop(async {
            let any = listen(&address(r#"{"type": "inet", "host": "127.0.0.1", "port": "0"}"#)).await.unwrap();
            let bound: SockaddrStorage =
                nix::sys::socket::getsockname(std::os::fd::AsRawFd::as_raw_fd(&any[0].as_fd())).unwrap();
            let port = resolve::port(&bound);
            let at =
                |to: u16| address(&format!(r#"{{"type": "inet", "host": "127.0.0.1", "port": "{port}", "to": {to}}}"#));
            let text = listen(&at(port)).await.unwrap_err().to_string();
            assert_eq!(text, "Failed to find an available port: Address already in use");
            assert_eq!(listen(&at(port.saturating_add(50))).await.unwrap().len(), 1);
        });
    }

    #[test]
    fn refusals_name_the_address() {
        in_loop(async {
            let refusal = async |json: &str| listen(&address(json)).await.unwrap_err().to_string();
            assert_eq!(refusal(r#"{"type": "fd", "str": "x"}"#).await, "Unable to parse FD number x");
            assert_eq!(refusal(r#"{"type": "fd", "str": "999"}"#).await, "File descriptor '999' is not a socket");
            assert_eq!(refusal(r#"{"type": "vsock", "cid": "x", "port": "1"}"#).await, "Failed to parse cid 'x'");
            let nowhere = refusal(r#"{"type": "unix", "path": "/nonexistent/s"}"#).await;
            assert_eq!(nowhere, "Failed to bind socket to /nonexistent/s: No such file or directory");
            let none = refusal(r#"{"type": "inet", "host": "::1", "port": "0", "ipv6": false, "ipv4": false}"#).await;
            assert_eq!(none, "Cannot disable IPv4 and IPv6 at same time");
            let at = address(r#"{"type": "unix", "path": "/nonexistent/s"}"#);
            let text = connect(&at).await.unwrap_err().to_string();
            assert_eq!(text, "Failed to connect to '/nonexistent/s': No such file or directory");
        });
    }
}
