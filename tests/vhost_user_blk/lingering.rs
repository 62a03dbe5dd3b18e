//! Front-ends with descriptors that hang whoever closes them or asks them something: they hold up nobody but themselves.

use super::client;
use std::any::Any;
use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

use nix::sys::signal::Signal;
use serde_json::json;
use tests::vhost::{FrontEnd, GUEST, MEMORY, MONITOR, event, msg};
use tests::{Daemon, Setup};

/// Something that hangs whoever closes it or asks it something.
struct Hanging {
    fd: OwnedFd,
    /// The last reference has to be the daemon's, for it is the last close that hangs.
    give_up: bool,
    /// Lets it hang no longer when it is dropped.
    release: Box<dyn Any>,
}

fn longs(list: &[u64]) -> Vec<u8> {
    list.iter().flat_map(|n| n.to_le_bytes()).collect()
}

/// One region, the whole memory.
fn table() -> Vec<u8> {
    longs(&[1, GUEST, MEMORY, MONITOR, 0])
}

type Way = (&'static str, fn(&FrontEnd, &OwnedFd));

/// All that comes with a descriptor, and more descriptors than may come.
const WAYS: [Way; 12] = [
    ("as memory", |f, fd| f.send(msg::SET_MEM_TABLE, 1, &table(), &[fd.as_fd()])),
    ("as more memory", |f, fd| f.send(msg::ADD_MEM_REG, 1, &longs(&[0, GUEST, MEMORY, MONITOR, 0]), &[fd.as_fd()])),
    ("as a log", |f, fd| f.send(msg::SET_LOG_BASE, 1, &longs(&[4096, 0]), &[fd.as_fd()])),
    ("as the log's event", |f, fd| f.send(7, 1, &[], &[fd.as_fd()])),
    ("as a kick", |f, fd| f.send(msg::SET_VRING_KICK, 1, &longs(&[0]), &[fd.as_fd()])),
    ("as a call", |f, fd| f.send(msg::SET_VRING_CALL, 1, &longs(&[0]), &[fd.as_fd()])),
    ("as an error event", |f, fd| f.send(msg::SET_VRING_ERR, 1, &longs(&[0]), &[fd.as_fd()])),
    ("as a channel", |f, fd| f.send(msg::SET_BACKEND_REQ_FD, 1, &[], &[fd.as_fd()])),
    ("as requests in flight", |f, fd| {
        let mut payload = longs(&[1 << 20, 0]);
        payload.extend([1, 0, 128, 0]);
        f.send(msg::SET_INFLIGHT_FD, 1, &payload, &[fd.as_fd()]);
    }),
    ("where none belongs", |f, fd| f.send(msg::GET_FEATURES, 1, &[], &[fd.as_fd()])),
    ("with many others", |f, fd| {
        let (first, last) = (event(), fd.as_fd());
        let mut all = vec![first.as_fd(); 30];
        all.push(last);
        f.send(msg::SET_OWNER, 1, &[], &all);
    }),
    ("unread", |f, fd| {
        // The first ends the connection.
        f.send(9999, 1, &[], &[]);
        f.send(msg::SET_VRING_CALL, 1, &longs(&[0]), &[fd.as_fd()]);
    }),
];

/// Each way for itself, on an export that shares its thread with another one, which goes on, as do the monitor and the next
/// front-end of the same export.
fn hold_up_nobody(daemon: &Daemon, make: impl Fn() -> Hanging) {
    let mut other = FrontEnd::start(&daemon.path("other.sock"), 1, 0);
    let mut qmp = daemon.qmp();
    // So many may be left at a time.
    for ways in WAYS.chunks(6) {
        let (mut fds, mut releases) = (Vec::new(), Vec::new());
        for (name, send) in ways {
            let front = client(daemon);
            let Hanging { fd, give_up, release } = make();
            // While the daemon stands still, so that the message holds the last reference.
            daemon.signal(Signal::SIGSTOP);
            send(&front, &fd);
            if give_up {
                drop(fd);
            } else {
                fds.push(fd);
            }
            daemon.signal(Signal::SIGCONT);
            // Front-ends are served one after the other: what this one sent was read before the next one is answered.
            drop(front);
            let mut next = client(daemon);
            next.write(1, &[1; 512]);
            assert_eq!(next.read(1, 512), [1; 512], "{name}");
            other.write(2, &[2; 512]);
            assert_eq!(other.read(2, 512), [2; 512], "{name}");
            qmp.ok("query-block-exports", json!({}));
            releases.push(release);
        }
        drop(releases);
    }
}

fn two_exports() -> Daemon {
    Setup::new()
        .qmp()
        .line("--object iothread,id=t0")
        .image("disk.img", 8 * super::MIB)
        .line("--blockdev driver=file,node-name=disk,filename=disk.img")
        .line(&super::export("writable=on,iothread=t0"))
        .image("other.img", 8 * super::MIB)
        .line("--blockdev driver=file,node-name=other,filename=other.img")
        .line(
            "--export vhost-user-blk,id=o,node-name=other,writable=on,iothread=t0,addr.type=unix,addr.path=other.sock",
        )
        .start()
}

#[test]
fn a_socket_that_lingers() {
    if tests::on_reference() {
        return;
    }
    hold_up_nobody(&two_exports(), || {
        let (fd, peer) = tests::lingering::socket();
        Hanging { fd, give_up: true, release: Box::new(peer) }
    });
}

struct Standing(Rc<Daemon>);

impl Drop for Standing {
    fn drop(&mut self) {
        self.0.signal(Signal::SIGCONT);
    }
}

/// The file of a FUSE server that stands still: closed, it is to be flushed, and where it is depends on what it says.
#[test]
fn a_file_whose_server_does_not_answer() {
    if tests::on_reference() || File::open("/dev/fuse").is_err() {
        return;
    }
    let server = Setup::new()
        .image("mnt", 0)
        .line("--blockdev driver=null-co,node-name=f,size=1048576")
        .line("--export fuse,id=e,node-name=f,mountpoint=mnt,writable=on")
        .start();
    let file = OpenOptions::new().read(true).write(true).open(server.path("mnt")).unwrap();
    let server = Rc::new(server);
    hold_up_nobody(&two_exports(), || {
        server.signal(Signal::SIGSTOP);
        let fd = file.try_clone().unwrap().into();
        Hanging { fd, give_up: false, release: Box::new(Standing(Rc::clone(&server))) }
    });
    // A server that is killed, as this one will be, leaves its mount.
    nix::mount::umount2(&server.path("mnt"), nix::mount::MntFlags::MNT_DETACH).unwrap();
}
