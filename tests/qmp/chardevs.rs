//! Character devices under monitors: waiting, connecting again, addresses, passed sockets [drop-in A.8].

use std::fs;
use std::io::Read;
use std::net::{Shutdown, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tests::daemon::number;
use tests::{Setup, on_reference, qmp, skip, wait_for};

/// What `query-chardev` says of a device.
fn device(qmp: &mut qmp::Client, label: &str) -> Value {
    let listed = qmp.ok("query-chardev", json!({}));
    listed.as_array().unwrap().iter().find(|dev| dev["label"] == label).unwrap().clone()
}

#[test]
fn a_device_waits_for_its_first_client() {
    let mut daemon = Setup::new().line("--chardev socket,path=w.sock,server=on,id=c --monitor c --pidfile pid").spawn();
    let stream = wait_for("the socket", || UnixStream::connect(daemon.path("w.sock")).ok());
    wait_for("its message", || daemon.stderr().contains("waiting for connection on").then_some(()));
    let mut qmp = qmp::Client::over(stream);
    qmp.negotiate();
    qmp.ok("query-version", json!({}));
    wait_for("the pid file", || daemon.path("pid").exists().then_some(()));
    qmp.ok("quit", json!({}));
    assert_eq!(daemon.wait().code(), Some(0));
}

#[test]
fn a_signal_ends_the_wait() {
    if on_reference() {
        skip!("the reference waits on");
    }
    let mut daemon = Setup::new().line("--chardev socket,path=w.sock,server=on,id=c --monitor c").spawn();
    wait_for("the socket", || daemon.path("w.sock").exists().then_some(()));
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait().code(), Some(0), "{}", daemon.stderr());
    assert!(!daemon.path("w.sock").exists());
}

#[test]
fn a_client_connects_again() {
    let mut daemon = Setup::new().line("--chardev socket,path=r.sock,reconnect-ms=20,id=c --monitor c").spawn();
    wait_for("the first failure", || daemon.stderr().contains("Unable to connect character device").then_some(()));
    let listener = UnixListener::bind(daemon.path("r.sock")).unwrap();
    for _ in 0..3 {
        let (stream, _) = listener.accept().unwrap();
        let mut qmp = qmp::Client::over(stream);
        qmp.negotiate();
        // The reference shows the path that the other side bound.
        let name = device(&mut qmp, "c")["filename"].as_str().unwrap().to_owned();
        assert!(name.starts_with("unix:") && name.ends_with("r.sock"), "{name}");
        qmp.send_raw(b"{'execute'");
        qmp.stream().shutdown(Shutdown::Both).unwrap();
    }
    let (stream, _) = listener.accept().unwrap();
    let mut qmp = qmp::Client::over(stream);
    qmp.negotiate();
    qmp.ok("quit", json!({}));
    assert_eq!(daemon.wait().code(), Some(0));
    assert_eq!(daemon.stderr().matches("Unable to connect").count(), 1, "{}", daemon.stderr());
}

#[test]
fn devices_say_what_they_are_connected_to() {
    let daemon = Setup::new()
        .qmp()
        .line("--chardev socket,host=127.0.0.1,port=0,server=on,wait=off,nodelay=on,id=t --monitor t,pretty=on")
        .line("--chardev socket,path=free.sock,server=on,wait=off,id=free")
        .start();
    let mut qmp = daemon.qmp();
    let free = json!({"label": "free", "filename": "disconnected:unix:free.sock,server=on", "frontend-open": false});
    assert_eq!(device(&mut qmp, "free"), free);
    let name = device(&mut qmp, "t")["filename"].as_str().unwrap().to_owned();
    let address = name.strip_prefix("disconnected:tcp:").and_then(|n| n.strip_suffix(",server=on")).unwrap().to_owned();
    let mut client = TcpStream::connect(&address).unwrap();
    client.read_exact(&mut [0]).unwrap();
    let expected = format!("tcp:{address},server=on <-> {}", client.local_addr().unwrap());
    assert_eq!(device(&mut qmp, "t")["filename"], expected);
    client.shutdown(Shutdown::Both).unwrap();
    wait_for("the client to be gone", || (device(&mut qmp, "t")["filename"] == name).then_some(()));
}

#[test]
fn options_that_contradict_each_other() {
    let daemon = super::monitored();
    let mut qmp = daemon.qmp();
    let mut refused = |data: Value| {
        qmp.refused("chardev-add", json!({"id": "x", "backend": {"type": "socket", "data": data}}))
            .trim_start_matches("Failed to add chardev 'x': ")
            .to_owned()
    };
    let addr = json!({"type": "unix", "data": {"path": "x.sock"}});
    assert_eq!(
        refused(json!({"addr": addr, "server": true, "reconnect": 1})),
        "'reconnect' option is incompatible with socket in server listen mode"
    );
    assert_eq!(
        refused(json!({"addr": addr, "server": false, "wait": true})),
        "'wait' option is incompatible with socket in client connect mode"
    );
    assert_eq!(
        refused(json!({"addr": addr, "server": false})),
        "Failed to connect to 'x.sock': No such file or directory"
    );
    let nowhere = json!({"type": "unix", "data": {"path": "/nonexistent/x.sock"}});
    assert_eq!(
        refused(json!({"addr": nowhere})),
        "Failed to bind socket to /nonexistent/x.sock: No such file or directory"
    );
}

#[test]
fn a_device_that_waits_cannot_be_added_while_others_are_served() {
    if on_reference() {
        skip!("the reference stops serving");
    }
    let daemon = super::monitored();
    let data = json!({"addr": {"type": "unix", "data": {"path": "x.sock"}}, "wait": true});
    let backend = json!({"type": "socket", "data": data});
    let text = daemon.qmp().refused("chardev-add", json!({"id": "x", "backend": backend}));
    assert!(text.contains("'wait'"), "{text}");
}

#[test]
fn the_end_of_a_passed_connection_is_seen() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let fd: OwnedFd = theirs.into();
    let line = format!("--chardev socket,fd={},id=c --monitor c", number(&fd));
    let daemon = Setup::new().qmp().line(&line).inherit(fd).start();
    let mut passed = qmp::Client::over(ours);
    passed.negotiate();
    passed.stream().shutdown(Shutdown::Write).unwrap();
    assert_eq!(passed.recv_or_end(), None);
    daemon.qmp().ok("query-version", json!({}));
}

#[test]
fn a_monitor_on_files() {
    let setup = Setup::new();
    let commands = setup.path("commands");
    fs::write(&commands, "{'execute':'qmp_capabilities'}{'execute':'query-version','id':1}{'execute':'quit'}").unwrap();
    let output = setup.path("replies");
    let files = (fs::File::open(&commands).unwrap(), fs::File::create(&output).unwrap());
    let mut daemon = setup.stdio(files.0.into(), files.1.into()).line("--chardev stdio,id=c --monitor c").spawn();
    assert_eq!(daemon.wait().code(), Some(0), "{}", daemon.stderr());
    let replies = fs::read_to_string(output).unwrap();
    assert_eq!(replies.lines().count(), 4, "{replies}");
}
