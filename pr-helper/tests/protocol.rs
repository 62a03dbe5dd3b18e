//! Both protocols from a client's side, against this helper and, where it is installed, against the reference.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs, reason = "a test fails by panicking")]
#![allow(dead_code, reason = "the support module serves several tests")]

mod support;

use ipc::client::{Classic, Frames};
use ipc::frame::{self, Hello, Request, Welcome};
use ipc::scsi::{Action, Cdb, Command as Pr, Key, Kind, Sense, status};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::process::Command;
use support::{Client, Helper, OURS, connect, read, reference};

const FRAMES: u32 = 1 << 30;

fn null() -> File {
    OpenOptions::new().read(true).write(true).open("/dev/null").unwrap()
}

/// Everything that is no device, with a name.
fn not_devices() -> Vec<(&'static str, OwnedFd)> {
    let file = tempfile::NamedTempFile::new().unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    let path = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(file.path()).unwrap();
    vec![
        ("file, read only", file.reopen_read_only()),
        ("file", file.as_file().try_clone().unwrap().into()),
        ("file, write only", OpenOptions::new().write(true).open(file.path()).unwrap().into()),
        ("/dev/null", null().into()),
        ("/dev/null, read only", File::open("/dev/null").unwrap().into()),
        ("folder", File::open("/").unwrap().into()),
        ("pipe, reading end", reader.into()),
        ("pipe, writing end", writer.into()),
        ("socket", UnixStream::pair().unwrap().0.into()),
        ("O_PATH", path.into()),
        ("terminal master", OpenOptions::new().read(true).write(true).open("/dev/ptmx").unwrap().into()),
    ]
}

trait ReopenReadOnly {
    fn reopen_read_only(&self) -> OwnedFd;
}

impl ReopenReadOnly for tempfile::NamedTempFile {
    fn reopen_read_only(&self) -> OwnedFd {
        File::open(self.path()).unwrap().into()
    }
}

/// CDBs with the parameter lists that they announce.
fn requests() -> Vec<([u8; 16], Vec<u8>)> {
    let mut all = Vec::new();
    for code in 0..32 {
        for length in [0u16, 8, 8192] {
            let mut cdb = [0; 16];
            cdb[..2].copy_from_slice(&[0x5e, code]);
            cdb[7..9].copy_from_slice(&length.to_be_bytes());
            all.push((cdb, Vec::new()));
            cdb[0] = 0x5f;
            all.push((cdb, vec![0xa5; usize::from(length)]));
        }
    }
    all
}

/// The replies of a helper to every request on everything that is no device.
fn replies(socket: &std::path::Path) -> Vec<(String, Vec<u8>)> {
    let mut stream = connect(socket);
    read(&mut stream, 4);
    stream.write_all(&[0; 4]).unwrap();
    let mut client = Client(stream);
    let mut all = Vec::new();
    for (name, fd) in not_devices() {
        for (cdb, list) in requests() {
            client.send(&cdb, Some(fd.as_fd()));
            client.0.write_all(&list).unwrap();
            all.push((format!("{name}: {cdb:x?}"), client.reply()));
        }
    }
    all
}

#[test]
fn what_is_no_device_is_answered_as_the_reference_does() {
    let ours = Helper::start(&["--audit=off"]);
    let got = replies(&ours.socket);
    let Some(reference) = reference() else { return };
    let folder = tempfile::tempdir().unwrap();
    // By socket activation: the socket is there from the start.
    let socket = folder.path().join("s");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let script = "LISTEN_FDS=1 LISTEN_PID=$$ exec \"$0\" 3<&0 0</dev/null";
    let mut child = Command::new("sh").args(["-c", script, reference]).stdin(OwnedFd::from(listener)).spawn().unwrap();
    let want = replies(&socket);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(got.len(), want.len());
    for (got, want) in got.into_iter().zip(want) {
        assert_eq!(got, want);
    }
}

#[test]
fn one_helper_serves_both_protocols() {
    let helper = Helper::start(&["--audit=off"]);
    let mut classic = Classic::new(helper.connect()).unwrap();
    let frames = Frames::new(helper.connect()).unwrap();
    let device = null();
    let reply = classic.execute(device.as_fd(), &Cdb::build(Action::ReadKeys, 0, 64), &[]).unwrap();
    assert_eq!(Sense::decode(&reply.sense), Some(Sense::IO_PROCESS_TERMINATED));
    for id in 10..14 {
        frames.send(id, device.as_fd(), Pr::Reserve { key: Key(1), kind: Kind::WriteExclusive }).unwrap();
    }
    let mut ids = Vec::new();
    for _ in 10..14 {
        let response = frames.receive().unwrap();
        let failure = response.result.unwrap_err();
        assert_eq!((failure.status, failure.sense()), (status::CHECK_CONDITION, Some(Sense::IO_PROCESS_TERMINATED)));
        ids.push(response.id);
    }
    ids.sort_unstable();
    assert_eq!(ids, [10, 11, 12, 13]);
    let (status, text) = helper.end();
    assert!(status.success(), "{text}");
    assert_eq!(text, "");
}

#[test]
fn what_breaks_the_classic_protocol_ends_that_connection_and_leaks_nothing() {
    let helper = Helper::start(&["--audit=off"]);
    let mut good = helper.negotiated(0);
    let before = helper.open_files();
    let device = null();
    let fd = || Some(device.as_fd());
    let read_keys = *Cdb::build(Action::ReadKeys, 0, 64).bytes();
    let register = *Cdb::build(Action::Register, 0, 24).bytes();
    let with = |at: usize, value: u8, mut cdb: [u8; 16]| {
        cdb[at] = value;
        cdb
    };
    type Break<'a> = (&'a str, Box<dyn Fn(&Client) + 'a>);
    let breaks: Vec<Break<'_>> = vec![
        ("no descriptor", Box::new(|c| c.send(&read_keys, None))),
        ("INQUIRY", Box::new(|c| c.send(&with(0, 0x12, read_keys), fd()))),
        ("allocation length", Box::new(|c| c.send(&with(7, 0x20, with(8, 1, read_keys)), fd()))),
        ("parameter list length, bytes 5 and 6", Box::new(|c| c.send(&with(6, 1, register), fd()))),
        ("parameter list length", Box::new(|c| c.send(&with(7, 0x21, register), fd()))),
        (
            "two descriptors",
            Box::new(|c| {
                c.send(&read_keys[..8], fd());
                c.send(&read_keys[8..], fd());
            }),
        ),
        (
            "descriptor with the list",
            Box::new(|c| {
                c.send(&register, fd());
                c.send(&[0; 24], fd());
            }),
        ),
        (
            "half a CDB",
            Box::new(|c| {
                c.send(&read_keys[..7], fd());
                c.0.shutdown(std::net::Shutdown::Write).unwrap();
            }),
        ),
        (
            "half a list",
            Box::new(|c| {
                c.send(&register, fd());
                c.send(&[0; 23], None);
                c.0.shutdown(std::net::Shutdown::Write).unwrap();
            }),
        ),
    ];
    for (name, breaks) in breaks {
        let mut client = helper.negotiated(0);
        breaks(&client);
        assert!(client.is_closed(), "{name}");
    }
    for (name, word) in [("an unknown feature", 1), ("a known and an unknown one", FRAMES | 1)] {
        assert!(helper.negotiated(word).is_closed(), "{name}");
    }
    let mut client = Client(helper.connect());
    read(&mut client.0, 4);
    client.send(&[0; 4], fd());
    assert!(client.is_closed(), "descriptor in the negotiation");
    good.send(&read_keys, fd());
    assert_eq!(good.reply()[..4], [0, 0, 0, 2]);
    // A thread of its own closes them.
    helper.wait_until("all are closed", |h| h.open_files() == before);
}

#[test]
fn requests_may_come_in_pieces_and_ahead() {
    let helper = Helper::start(&["--audit=off"]);
    let mut client = helper.negotiated(0);
    let device = null();
    let register = *Cdb::build(Action::Register, 0, 24).bytes();
    for fd_with in 0..16 {
        for (i, byte) in register.iter().enumerate() {
            client.send(&[*byte], (i == fd_with).then_some(device.as_fd()));
        }
        client.send(&[0; 10], None);
        client.send(&[0; 14], None);
    }
    for _ in 0..16 {
        assert_eq!(client.reply()[..4], [0, 0, 0, 2]);
    }
}

#[test]
fn what_breaks_the_frames_protocol_ends_that_connection() {
    let helper = Helper::start(&["--audit=off"]);
    let before = helper.open_files();
    let device = null();
    let hello = || {
        let mut client = helper.negotiated(FRAMES);
        client.send(&frame::encode(&Hello::OURS).unwrap(), None);
        let header = read(&mut client.0, 4).try_into().unwrap();
        let welcome: Welcome = frame::decode(&read(&mut client.0, frame::message_length(header).unwrap())).unwrap();
        assert_eq!(welcome.version, frame::VERSION);
        client
    };
    let request = frame::encode(&Request { id: 1, command: Pr::ReadKeys }).unwrap();
    let fd = || Some(device.as_fd());
    for (name, bytes, fd) in [
        ("no descriptor", request.clone(), None),
        ("length", vec![0xff; 8], fd()),
        ("empty", vec![0; 4], fd()),
        ("left over", [&[13, 0, 0, 0][..], &request[4..], &[0]].concat(), fd()),
        ("no such command", [&[12, 0, 0, 0][..], &[0; 8], &[99, 0, 0, 0]].concat(), fd()),
    ] {
        let mut client = hello();
        client.send(&bytes, fd);
        assert!(client.is_closed(), "{name}");
    }
    let mut client = hello();
    client.send(&request[..4], Some(device.as_fd()));
    client.send(&request[4..], Some(device.as_fd()));
    assert!(client.is_closed(), "two descriptors");
    // A version of the future is told that there is none in common.
    let mut client = helper.negotiated(FRAMES);
    client.send(&frame::encode(&Hello { min_version: 7, max_version: 9 }).unwrap(), None);
    let header = read(&mut client.0, 4).try_into().unwrap();
    let welcome: Welcome = frame::decode(&read(&mut client.0, frame::message_length(header).unwrap())).unwrap();
    assert_eq!(welcome.version, 0);
    assert!(client.is_closed());
    drop(client);
    helper.wait_until("all are closed", |h| h.open_files() == before);
}

#[test]
fn connections_are_bounded() {
    let helper = Helper::start(&["--audit=off", "--max-connections=3"]);
    let mut open: Vec<_> = (0..3).map(|_| helper.negotiated(0)).collect();
    assert!(Client(helper.connect()).is_closed());
    open.pop();
    // The place is free when the helper has noticed; until then it closes what comes.
    while Client(helper.connect()).is_closed_at_once() {}
    for client in &mut open {
        client.send(Cdb::build(Action::ReadKeys, 0, 8).bytes(), Some(null().as_fd()));
        assert_eq!(client.reply()[..4], [0, 0, 0, 2]);
    }
}

#[test]
fn clients_that_do_not_go_on_are_closed() {
    let helper = Helper::start(&["--audit=off", "--idle-timeout=1"]);
    let mut silent = Client(helper.connect());
    read(&mut silent.0, 4);
    let mut idle = helper.negotiated(0);
    let mut halfway = helper.negotiated(0);
    halfway.send(&[0x5e; 7], Some(null().as_fd()));
    assert!(idle.is_closed(), "silent between requests for the idle time");
    assert!(halfway.is_closed(), "silent within a request");
    assert!(silent.is_closed(), "silent in the negotiation");
    // Who goes on is not affected by another's silence.
    let mut good = helper.negotiated(0);
    good.send(Cdb::build(Action::ReadKeys, 0, 8).bytes(), Some(null().as_fd()));
    assert_eq!(good.reply()[..4], [0, 0, 0, 2]);
    assert!(helper.end().1.contains("the client did not negotiate in time"));
}

impl Client {
    /// Closed, instead of the feature word.
    fn is_closed_at_once(&mut self) -> bool {
        use std::io::Read;
        !matches!(self.0.read(&mut [0; 4]), Ok(4))
    }
}

#[test]
fn want_of_descriptors_is_survived() {
    let mut shell = Command::new("sh");
    shell.args(["-c", "ulimit -n 30; exec \"$0\" \"$@\"", OURS]);
    let helper = Helper::start_by(shell, &["--audit=off"]);
    let mut first = helper.negotiated(0);
    // More than it can take: the rest waits in the queue of the socket.
    let waiting: Vec<_> = (0..32).map(|_| helper.connect()).collect();
    let read_keys = *Cdb::build(Action::ReadKeys, 0, 8).bytes();
    // No descriptor is left for the device: the request cannot be taken, which ends this connection and no other.
    first.send(&read_keys, Some(null().as_fd()));
    let mut answer = [0; 1];
    let _ = std::io::Read::read(&mut first.0, &mut answer);
    drop((waiting, first));
    let mut later = helper.negotiated(0);
    later.send(&read_keys, Some(null().as_fd()));
    assert_eq!(later.reply()[..4], [0, 0, 0, 2]);
}

/// A TCP socket whose last close waits until its peer, which never reads, has read everything.
fn lingering() -> (OwnedFd, std::net::TcpStream) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut socket = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (peer, _) = listener.accept().unwrap();
    socket.set_nonblocking(true).unwrap();
    while socket.write(&[0; 65536]).is_ok() {}
    let linger = libc::linger { l_onoff: 1, l_linger: 10_000 };
    nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::Linger, &linger).unwrap();
    (socket.into(), peer)
}

#[test]
fn what_cannot_be_closed_holds_up_nobody_else() {
    let read_keys = *Cdb::build(Action::ReadKeys, 0, 8).bytes();
    let device = null();
    let (null, other) = (device.as_fd(), device.as_fd());
    type Way = (&'static str, fn(&Client, [std::os::fd::BorrowedFd<'_>; 3], &[u8]));
    let ways: [Way; 4] = [
        ("as the third of one message", |c, [n, o, l], cdb| c.send_all(cdb, &[n, o, l])),
        ("as the only one, which is no device", |c, [_, _, l], cdb| c.send_all(cdb, &[l])),
        ("behind a message that ends the connection", |c, [n, o, l], cdb| {
            c.send_all(cdb, &[n, o]);
            c.send_all(cdb, &[l]);
        }),
        ("with the second half of a request", |c, [n, _, l], cdb| {
            c.send_all(&cdb[..3], &[n]);
            c.send_all(&cdb[3..], &[l]);
        }),
    ];
    for (name, send) in ways {
        let helper = Helper::start(&["--audit=off"]);
        let (socket, _peer) = lingering();
        let bad = helper.negotiated(0);
        // While the helper stands still, so that the message holds the last reference.
        helper.signal("-STOP");
        send(&bad, [null, other, socket.as_fd()], &read_keys);
        drop(socket);
        helper.signal("-CONT");
        // On a second connection, so of the same process: its other descriptors wait, its requests do not.
        for _ in 0..3 {
            let mut good = helper.negotiated(0);
            good.send(&read_keys, Some(null));
            assert_eq!(good.reply()[..4], [0, 0, 0, 2], "{name}");
        }
        drop(bad);
        let mut good = helper.negotiated(0);
        good.send(&read_keys, Some(null));
        assert_eq!(good.reply()[..4], [0, 0, 0, 2], "{name}: after its connection's end");
    }
}
