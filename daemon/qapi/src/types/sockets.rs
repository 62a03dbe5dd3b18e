//! Addresses of sockets, in the flat form of newer commands and in the wrapped form of older ones.

use crate::Qapi;

/// An Internet address to listen on or to connect to.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct InetSocketAddress {
    /// A host name, or an address of IPv4 or IPv6.
    pub host: String,
    /// A port number or the name of a service.
    pub port: String,
    /// Neither host nor port needs a name service; names are refused.
    #[qapi(default, since = "2.9")]
    pub numeric: bool,
    /// When listening: the last port to try, starting with `port`.
    pub to: Option<u16>,
    /// Use IPv4: `false` leaves it out, `true` without `ipv6` uses it alone.
    pub ipv4: Option<bool>,
    /// Use IPv6: `false` leaves it out, `true` without `ipv4` uses it alone.
    pub ipv6: Option<bool>,
    /// Send TCP keep-alive probes on idle connections.
    #[qapi(since = "4.2")]
    pub keep_alive: Option<bool>,
    /// Probes that go unanswered before the connection is dropped; 0 for the system's number.
    #[qapi(since = "10.1")]
    pub keep_alive_count: Option<u32>,
    /// Seconds of silence before the first probe; 0 for the system's number.
    #[qapi(since = "10.1")]
    pub keep_alive_idle: Option<u32>,
    /// Seconds between probes; 0 for the system's number.
    #[qapi(since = "10.1")]
    pub keep_alive_interval: Option<u32>,
    /// Use multi-path TCP.
    #[qapi(since = "6.1")]
    pub mptcp: Option<bool>,
}

/// A socket in the file system, or a name without a file.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct UnixSocketAddress {
    /// The path, or the abstract name.
    pub path: String,
    /// The name is abstract: it has no file and vanishes with its socket.
    #[qapi(rename = "abstract", default, since = "5.1")]
    pub is_abstract: bool,
    /// An abstract name ends where the text ends; otherwise it is filled up with zero bytes.
    #[qapi(default = true, since = "5.1")]
    pub tight: bool,
}

/// A socket between a virtual machine and its host.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct VsockSocketAddress {
    /// The number of the machine.
    pub cid: String,
    /// The number of the port.
    pub port: String,
}

/// A socket that the daemon was given.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct FdSocketAddress {
    /// The number of the file descriptor, or the name it was passed under.
    pub str: String,
}

/// An address of a socket.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(since = "2.9")]
pub struct SocketAddress {
    /// The sort of address.
    #[qapi(variants, tag = "type")]
    pub addr: SocketAddressVariant,
}

/// The sorts of addresses.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(variants, tag_enum = "SocketAddressType")]
pub enum SocketAddressVariant {
    /// Internet.
    Inet(InetSocketAddress),
    /// Unix domain.
    Unix(UnixSocketAddress),
    /// Between a virtual machine and its host.
    Vsock(VsockSocketAddress),
    /// A file descriptor.
    Fd(FdSocketAddress),
}

/// An address of a socket, its members wrapped in `data`.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct SocketAddressLegacy {
    /// The sort of address.
    #[qapi(variants, tag = "type")]
    pub addr: SocketAddressLegacyVariant,
}

/// The sorts of addresses, wrapped.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(variants, tag_type = "SocketAddressType")]
pub enum SocketAddressLegacyVariant {
    /// Internet.
    Inet(InetSocketAddressWrapper),
    /// Unix domain.
    Unix(UnixSocketAddressWrapper),
    /// Between a virtual machine and its host.
    Vsock(VsockSocketAddressWrapper),
    /// A file descriptor.
    Fd(FdSocketAddressWrapper),
}

/// A wrapped Internet address.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct InetSocketAddressWrapper {
    /// The address.
    pub data: InetSocketAddress,
}

/// A wrapped Unix domain address.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct UnixSocketAddressWrapper {
    /// The address.
    pub data: UnixSocketAddress,
}

/// A wrapped address between a virtual machine and its host.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct VsockSocketAddressWrapper {
    /// The address.
    pub data: VsockSocketAddress,
}

/// A wrapped file descriptor.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct FdSocketAddressWrapper {
    /// The file descriptor.
    pub data: FdSocketAddress,
}

impl From<SocketAddressLegacy> for SocketAddress {
    fn from(legacy: SocketAddressLegacy) -> SocketAddress {
        let addr = match legacy.addr {
            SocketAddressLegacyVariant::Inet(wrapper) => SocketAddressVariant::Inet(wrapper.data),
            SocketAddressLegacyVariant::Unix(wrapper) => SocketAddressVariant::Unix(wrapper.data),
            SocketAddressLegacyVariant::Vsock(wrapper) => SocketAddressVariant::Vsock(wrapper.data),
            SocketAddressLegacyVariant::Fd(wrapper) => SocketAddressVariant::Fd(wrapper.data),
        };
        SocketAddress { addr }
    }
}

impl From<SocketAddress> for SocketAddressLegacy {
    fn from(flat: SocketAddress) -> SocketAddressLegacy {
        let addr = match flat.addr {
            SocketAddressVariant::Inet(data) => SocketAddressLegacyVariant::Inet(InetSocketAddressWrapper { data }),
            SocketAddressVariant::Unix(data) => SocketAddressLegacyVariant::Unix(UnixSocketAddressWrapper { data }),
            SocketAddressVariant::Vsock(data) => SocketAddressLegacyVariant::Vsock(VsockSocketAddressWrapper { data }),
            SocketAddressVariant::Fd(data) => SocketAddressLegacyVariant::Fd(FdSocketAddressWrapper { data }),
        };
        SocketAddressLegacy { addr }
    }
}
