//! Host and port to addresses, by the system's resolver.

use nix::sys::socket::{SockaddrIn, SockaddrIn6, SockaddrLike, SockaddrStorage};
use qapi::types::sockets::InetSocketAddress;
use qapi::{Error, Result};
use std::ffi::{CStr, CString};
use std::ptr;

/// Frees the resolver's list.
struct List(*mut libc::addrinfo);

impl Drop for List {
    fn drop(&mut self) {
        // SAFETY: the list came from getaddrinfo and is freed once.
        unsafe { libc::freeaddrinfo(self.0) };
    }
}

/// All addresses of `inet`, in the system's order; never an empty list. `passive` for listening, where no host is any.
///
/// # Errors
/// The name is not known, or has no address of the families asked for.
pub(super) fn resolve(inet: &InetSocketAddress, passive: bool) -> Result<Vec<SockaddrStorage>> {
    let refused =
        |why: &str| Error::generic(format!("address resolution failed for {}:{}: {why}", inet.host, inet.port));
    let text = |text: &str| CString::new(text).map_err(|_| refused("a name has a zero byte"));
    let (host, port) = (text(&inet.host)?, text(&inet.port)?);
    // SAFETY: all-zero is the documented start of a hints structure.
    let mut hints: libc::addrinfo = unsafe { std::mem::zeroed() };
    hints.ai_family = family(inet)?;
    hints.ai_socktype = libc::SOCK_STREAM;
    hints.ai_flags = if passive { libc::AI_PASSIVE } else { libc::AI_ADDRCONFIG | libc::AI_V4MAPPED };
    if inet.numeric {
        hints.ai_flags |= libc::AI_NUMERICHOST | libc::AI_NUMERICSERV;
    }
    let node = if inet.host.is_empty() { ptr::null() } else { host.as_ptr() };
    let mut list = ptr::null_mut();
    // SAFETY: the strings and the hints live across the call, and `list` has room for the result.
    let code = unsafe { libc::getaddrinfo(node, port.as_ptr(), &raw const hints, &raw mut list) };
    if code != 0 {
        // SAFETY: gai_strerror returns a static string for every code.
        let why = unsafe { CStr::from_ptr(libc::gai_strerror(code)) };
        return Err(refused(&why.to_string_lossy()));
    }
    let list = List(list);
    let mut found = Vec::new();
    let mut at = list.0.cast_const();
    // SAFETY: the list is linked by valid pointers up to the null one, and alive until `list` is dropped.
    while let Some(entry) = unsafe { at.as_ref() } {
        // SAFETY: the address is valid for its length.
        found.extend(unsafe { SockaddrStorage::from_raw(entry.ai_addr, Some(entry.ai_addrlen)) });
        at = entry.ai_next;
    }
    if found.is_empty() { Err(refused("no address")) } else { Ok(found) }
}

/// The family that `ipv4` and `ipv6` leave: what is not said is on, unless only the other one was asked for.
fn family(inet: &InetSocketAddress) -> Result<i32> {
    match (inet.ipv4, inet.ipv6) {
        (Some(false), Some(false)) => Err(Error::generic("Cannot disable IPv4 and IPv6 at same time")),
        (Some(true), Some(true)) | (None, None) => Ok(libc::AF_UNSPEC),
        (Some(true), _) | (None, Some(false)) => Ok(libc::AF_INET),
        (_, Some(true)) | (Some(false), None) => Ok(libc::AF_INET6),
    }
}

/// The port of an IP address, 0 of any other.
pub(super) fn port(address: &SockaddrStorage) -> u16 {
    let v4 = address.as_sockaddr_in().map(SockaddrIn::port);
    v4.or_else(|| address.as_sockaddr_in6().map(SockaddrIn6::port)).unwrap_or(0)
}

/// The same address with another port.
pub(super) fn set_port(address: &mut SockaddrStorage, port: u16) {
    if let Some(v4) = address.as_sockaddr_in() {
        *address = std::net::SocketAddrV4::new(v4.ip(), port).into();
    } else if let Some(v6) = address.as_sockaddr_in6() {
        *address = std::net::SocketAddrV6::new(v6.ip(), port, v6.flowinfo(), v6.scope_id()).into();
    }
}
