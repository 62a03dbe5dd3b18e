//! Addresses of sockets: unix, abstract, inet, passed descriptors, old spellings.

use std::net::TcpListener;
use std::os::unix::net::{UnixListener, UnixStream};

use serde_json::json;
use tests::daemon::number;
use tests::nbd::{Client, Headers};
use tests::{Setup, nbd, qmp, skip, wait_for};

fn serves(setup: Setup) -> Setup {
    setup.line("--blockdev null-co,node-name=n,size=1048576,read-zeroes=on")
}

#[test]
fn old_short_booleans_of_a_chardev() {
    let daemon = Setup::new().line("--chardev socket,path=qmp.sock,server,nowait,id=c --monitor c").start();
    daemon.qmp().ok("query-version", json!({}));
}

#[test]
fn a_monitor_on_tcp() {
    let port = free_port();
    let line = format!("--chardev socket,host=127.0.0.1,port={port},server=on,wait=off,id=c --monitor c");
    let daemon = Setup::new().line(&line).start();
    let stream = wait_for("the monitor's port", || std::net::TcpStream::connect(("127.0.0.1", port)).ok());
    let mut qmp = qmp::Client::over(std::os::fd::OwnedFd::from(stream).into());
    qmp.negotiate();
    drop(daemon);
}

#[test]
fn a_monitor_as_client() {
    let setup = Setup::new();
    let listener = UnixListener::bind(setup.path("us.sock")).unwrap();
    listener.set_nonblocking(true).unwrap();
    let mut daemon = setup.line("--chardev socket,path=us.sock,id=c --monitor c").spawn();
    let (stream, _) = wait_for("the monitor to connect", || listener.accept().ok());
    stream.set_nonblocking(false).unwrap();
    let mut qmp = qmp::Client::over(stream);
    qmp.negotiate();
    qmp.ok("quit", json!({}));
    assert_eq!(daemon.wait().code(), Some(0));
}

#[test]
fn a_passed_listening_socket_for_a_monitor() {
    let setup = Setup::new();
    let fd = UnixListener::bind(setup.path("qmp.sock")).unwrap().into();
    let line = format!("--chardev socket,fd={},server=on,wait=off,id=c --monitor c", number(&fd));
    let daemon = setup.line(&line).inherit(fd).start();
    daemon.qmp().ok("query-version", json!({}));
    daemon.qmp().ok("query-version", json!({}));
}

#[test]
fn a_passed_connected_socket_for_a_monitor() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let fd = theirs.into();
    let line = format!("--chardev socket,fd={},id=c --monitor c", number(&fd));
    let mut daemon = Setup::new().line(&line).inherit(fd).spawn();
    let mut qmp = qmp::Client::over(ours);
    qmp.negotiate();
    qmp.ok("quit", json!({}));
    assert_eq!(daemon.wait().code(), Some(0));
}

#[test]
fn a_passed_listening_socket_for_nbd() {
    let setup = serves(Setup::new());
    let fd = UnixListener::bind(setup.path("nbd.sock")).unwrap().into();
    let line = format!("--nbd-server addr.type=fd,addr.str={} --export nbd,id=e,node-name=n", number(&fd));
    let daemon = setup.line(&line).inherit(fd).start();
    for _ in 0..2 {
        let (mut client, export) = daemon.nbd().open("n", Headers::Simple);
        assert_eq!(export.size, 1 << 20);
        assert_eq!(client.read(0, 512), [0; 512]);
    }
}

#[test]
fn wrong_descriptors() {
    let file = tempfile::tempfile().unwrap().into();
    let line = format!("--nbd-server addr.type=fd,addr.str={}", number(&file));
    let ended = Setup::new().line(&line).inherit(file).run();
    assert_eq!(ended.status.code(), Some(1));
    assert!(ended.stderr.contains("socket"), "{}", ended.stderr);
    let ended = Setup::new().line("--nbd-server addr.type=fd,addr.str=999").run();
    assert_eq!(ended.status.code(), Some(1));
    let ended = Setup::new().line("--chardev socket,fd=999,server=on,wait=off,id=c").run();
    assert_eq!(ended.status.code(), Some(1));
}

#[test]
fn nbd_on_tcp() {
    for host in ["127.0.0.1", "::1"] {
        if TcpListener::bind((host, 0)).is_err() {
            skip!("no {host} on this machine");
        }
        let port = free_port();
        let line =
            format!("--nbd-server addr.type=inet,addr.host={host},addr.port={port} --export nbd,id=e,node-name=n");
        let _daemon = serves(Setup::new()).line(&line).start();
        let (mut client, _) = Client::connect_tcp((host, port)).open("n", Headers::Structured);
        assert_eq!(client.read(0, 512), [0; 512]);
    }
}

#[test]
fn nbd_on_a_range_of_ports() {
    let taken = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = taken.local_addr().unwrap().port();
    let last = port.saturating_add(20);
    let line = format!(
        "--nbd-server addr.type=inet,addr.host=127.0.0.1,addr.port={port},addr.to={last} --export nbd,id=e,node-name=n"
    );
    let _daemon = serves(Setup::new()).line(&line).start();
    let served = (port + 1..=last).any(|port| std::net::TcpStream::connect(("127.0.0.1", port)).is_ok());
    assert!(served, "no port of {}..={last} serves", port + 1);
}

#[test]
fn nbd_on_an_abstract_socket() {
    use std::os::linux::net::SocketAddrExt;
    let name = format!("qsd-test-{}", std::process::id());
    let line = format!("--nbd-server addr.type=unix,addr.path={name},addr.abstract=on --export nbd,id=e,node-name=n");
    let setup = serves(Setup::new());
    let _daemon = setup.line(&line).start();
    let addr = std::os::unix::net::SocketAddr::from_abstract_name(name).unwrap();
    let stream = UnixStream::connect_addr(&addr).unwrap();
    let (mut client, _) = Client::over_unix(stream).open("n", Headers::Structured);
    assert_eq!(client.read(0, 512), [0; 512]);
}

#[test]
fn nbd_on_vsock() {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, VsockAddr, connect, socket};
    use std::os::fd::AsRawFd;
    // The kernel connects a machine to itself only with vsock_loopback.
    let port = 0x5000_0000 + std::process::id();
    let line = format!("--nbd-server addr.type=vsock,addr.cid=1,addr.port={port} --export nbd,id=e,node-name=n");
    let probe = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None);
    let bindable = probe.is_ok_and(|fd| nix::sys::socket::bind(fd.as_raw_fd(), &VsockAddr::new(1, port)).is_ok());
    if !bindable {
        skip!("no loopback vsock in this kernel");
    }
    let _daemon = serves(Setup::new()).line(&line).start();
    let fd = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
    connect(fd.as_raw_fd(), &VsockAddr::new(1, port)).unwrap();
    let (mut client, _) = nbd::Client::over(Box::new(std::fs::File::from(fd))).open("n", Headers::Structured);
    assert_eq!(client.read(0, 512), [0; 512]);
}

#[test]
fn a_socket_file_left_by_a_crash_is_replaced() {
    let setup = serves(Setup::new());
    drop(UnixListener::bind(setup.path("nbd.sock")).unwrap());
    let daemon = setup.nbd_server().line("--export nbd,id=e,node-name=n").start();
    let (mut client, _) = daemon.nbd().open("n", Headers::Simple);
    assert_eq!(client.read(0, 1), [0]);
}

/// A port that was free a moment ago.
fn free_port() -> u16 {
    TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port()
}
