//! Objects, character devices and exports come and go while a client reads and writes; afterwards the process has the memory, the
//! descriptors and the threads that it had. Nodes: `tests/filters/leaks.rs`, which also says how to make a long run of it.

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};
use tests::nbd::{Headers, cmd};
use tests::{Daemon, RaisedAtEnd, Setup, on_reference, qmp, skip, wait_for};

fn chardev(qmp: &mut qmp::Client, id: &str, kind: &str, data: Value) {
    qmp.ok("chardev-add", json!({"id": id, "backend": {"type": kind, "data": data}}));
}

/// An export on a thread of its own in a throttle group of its own, with a client that stays until it is thrown out.
fn exports(daemon: &Daemon, qmp: &mut qmp::Client) {
    qmp.ok("object-add", json!({"qom-type": "thread-context", "id": "tc"}));
    qmp.ok("object-add", json!({"qom-type": "iothread", "id": "t"}));
    qmp.ok("object-add", json!({"qom-type": "throttle-group", "id": "g", "limits": {"iops-total": 100_000}}));
    qmp.ok("object-add", json!({"qom-type": "secret", "id": "s", "data": "x".repeat(1000)}));
    let node = json!({"driver": "throttle", "node-name": "x", "throttle-group": "g", "file": "disk"});
    qmp.ok("blockdev-add", node);
    let export = json!({"type": "nbd", "id": "x", "node-name": "x", "name": "x", "iothread": "t", "writable": true});
    qmp.ok("block-export-add", export);
    let (mut client, _) = daemon.nbd().open("x", Headers::Simple);
    assert_eq!(client.write(0, 0, &[0; 4096]), 0);
    assert_eq!(client.simple(cmd::FLUSH, 0, 0, 0), 0);
    qmp.refused("object-del", json!({"id": "g"}));
    qmp.ok("block-export-del", json!({"id": "x", "mode": "hard"}));
    qmp.event("BLOCK_EXPORT_DELETED");
    let vhost = json!({"type": "unix", "path": "v.sock"});
    qmp.ok(
        "block-export-add",
        json!({"type": "vhost-user-blk", "id": "v", "node-name": "x", "addr": vhost, "iothread": "t"}),
    );
    let front = UnixStream::connect(daemon.path("v.sock")).unwrap();
    // Its thread ends with the last export on it.
    qmp.ok("object-del", json!({"id": "t"}));
    qmp.ok("block-export-del", json!({"id": "v", "mode": "hard"}));
    qmp.event("BLOCK_EXPORT_DELETED");
    drop(front);
    qmp.ok("blockdev-del", json!({"node-name": "x"}));
    for id in ["tc", "g", "s"] {
        qmp.ok("object-del", json!({"id": id}));
    }
}

/// Devices whose other end comes, says something and goes, in every order; and circles, which are refused.
fn chardevs(daemon: &Daemon, qmp: &mut qmp::Client) {
    let unix = |path: &str| json!({"addr": {"type": "unix", "data": {"path": path}}, "server": true, "wait": false});
    chardev(qmp, "s", "socket", unix("s.sock"));
    chardev(qmp, "p", "pty", json!({"path": "link"}));
    chardev(qmp, "i", "pipe", json!({"device": "fifo"}));
    chardev(qmp, "r", "ringbuf", json!({"size": 1024}));
    chardev(qmp, "m", "mux", json!({"chardev": "s"}));
    chardev(qmp, "h", "hub", json!({"chardevs": ["p", "i", "r"]}));
    for (id, kind, data) in [
        ("m2", "mux", json!({"chardev": "m2"})),
        ("m2", "mux", json!({"chardev": "m"})),
        ("h2", "hub", json!({"chardevs": ["h2"]})),
        ("h2", "hub", json!({"chardevs": ["h"]})),
        ("h2", "hub", json!({"chardevs": ["m", "s"]})),
        ("m2", "mux", json!({"chardev": "nobody"})),
    ] {
        qmp.refused("chardev-add", json!({"id": id, "backend": {"type": kind, "data": data}}));
    }
    let mut socket = UnixStream::connect(daemon.path("s.sock")).unwrap();
    socket.write_all(b"nobody listens").unwrap();
    let open = |name: &str| {
        OpenOptions::new().read(true).write(true).custom_flags(nix::libc::O_NOCTTY).open(daemon.path(name)).unwrap()
    };
    let (mut terminal, mut pipe) = (open("link"), open("fifo"));
    terminal.write_all(b"nobody listens").unwrap();
    pipe.write_all(b"nobody listens").unwrap();
    drop((terminal, pipe));
    qmp.ok("ringbuf-write", json!({"device": "r", "data": "kept"}));
    assert_eq!(qmp.ok("ringbuf-read", json!({"device": "r", "size": 10})), "kept");
    qmp.refused("chardev-remove", json!({"id": "s"}));
    for id in ["m", "h", "s", "p", "i", "r"] {
        qmp.ok("chardev-remove", json!({"id": id}));
    }
    // The device has let go of its client.
    socket.set_read_timeout(Some(tests::DEADLINE)).unwrap();
    let _ = socket.read(&mut [0]);
}

#[test]
fn all_that_comes_and_goes_under_io_leaves_nothing() {
    if on_reference() {
        skip!("it is this daemon's memory that is measured");
    }
    let rounds: u64 = std::env::var("LEAK_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(100);
    let mut daemon = Setup::new()
        .qmp()
        .nbd_server()
        .line("--blockdev null-co,node-name=disk,size=1048576,read-zeroes=on")
        .line("--export nbd,id=busy,node-name=disk,name=busy,writable=on")
        .start();
    nix::unistd::mkfifo(&daemon.path("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let mut qmp = daemon.qmp();
    let stop = AtomicBool::new(false);
    let (mut client, _) = daemon.nbd().open("busy", Headers::Simple);
    std::thread::scope(|scope| {
        let stop = &stop;
        let _end = RaisedAtEnd(stop);
        scope.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                assert_eq!(client.write(0, 0, &[1; 65536]), 0);
                client.read(0, 65536);
            }
        });
        let mut cycle = |rounds: u64| {
            for _ in 0..rounds {
                exports(&daemon, &mut qmp);
                chardevs(&daemon, &mut qmp);
            }
        };
        // Pools and caches fill once.
        cycle(rounds.div_ceil(4));
        let before = daemon.usage();
        cycle(rounds);
        let after = wait_for("descriptors and threads to go", || {
            let now = daemon.usage();
            (now.descriptors <= before.descriptors && now.threads <= before.threads + 2).then_some(now)
        });
        // Fourteen things come and go in a round: a leak of a few hundred bytes of one of them would be seen in a long run.
        let allowed = before.memory_kib + 4096 + 2 * rounds;
        assert!(after.memory_kib <= allowed, "after {rounds} rounds: {before:?}, then {after:?}");
    });
    daemon.stop();
}
