//! Nodes of every driver come and go under I/O; afterwards the process has the memory, descriptors and threads that it had.
//!
//! `LEAK_ROUNDS=1000` makes a long run of it.

use serde_json::{Value, json};
use tests::nbd::{Client, Headers, cmd};
use tests::{Daemon, RaisedAtEnd, Setup, on_reference, qmp, skip, tools, wait_for};

use crate::MIB;

fn nodes(daemon: &Daemon) -> Vec<Value> {
    let file = |name: &str| json!({ "driver": "file", "filename": daemon.path(name) });
    let none = || json!({ "driver": "null-co", "size": MIB, "read-zeroes": true });
    let qcow2 = || json!({ "driver": "qcow2", "file": file("q.qcow2") });
    vec![
        file("a"),
        none(),
        json!({ "driver": "null-aio", "size": MIB }),
        json!({ "driver": "raw", "file": file("a"), "offset": 512, "size": 65536 }),
        qcow2(),
        json!({ "driver": "throttle", "throttle-group": "g", "file": file("a") }),
        json!({ "driver": "copy-on-read", "file": qcow2() }),
        json!({ "driver": "compress", "file": qcow2() }),
        json!({ "driver": "preallocate", "file": file("a") }),
        json!({ "driver": "blkdebug", "image": file("a"), "inject-error": [{ "event": "read_aio", "once": true }] }),
        json!({ "driver": "blkverify", "test": file("a"), "raw": file("b") }),
        json!({ "driver": "blklogwrites", "file": file("a"), "log": file("log") }),
        json!({ "driver": "quorum", "children": [none(), file("a"), none()], "vote-threshold": 1, "read-pattern": "fifo" }),
        json!({ "driver": "x-fault", "file": file("a") }),
    ]
}

/// Adds a node, uses it through an export of its own, and removes both.
fn round(daemon: &Daemon, qmp: &mut qmp::Client, node: &Value) {
    let mut node = node.clone();
    node["node-name"] = "n".into();
    qmp.ok("blockdev-add", node.clone());
    qmp.ok("block-export-add", json!({ "type": "nbd", "id": "n", "node-name": "n", "writable": true }));
    let (mut client, _) = daemon.nbd().open("n", Headers::Simple);
    assert_eq!(client.write(0, 0, &[0; 4096]), 0, "{node}");
    assert_eq!(client.simple(cmd::FLUSH, 0, 0, 0), 0, "{node}");
    assert_eq!(client.read(0, 4096), [0; 4096], "{node}");
    qmp.ok("block-export-del", json!({ "id": "n", "mode": "hard" }));
    qmp.event("BLOCK_EXPORT_DELETED");
    qmp.ok("blockdev-del", json!({ "node-name": "n" }));
    // What fails half-way leaves nothing either.
    node["node-name"] = "busy".into();
    qmp.refused("blockdev-add", node);
}

#[test]
fn nodes_that_come_and_go_leave_nothing() {
    if on_reference() {
        skip!("it is this daemon's memory that is measured");
    }
    let rounds: usize = std::env::var("LEAK_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(30);
    let setup = Setup::new().qmp().nbd_server().image("a", MIB).image("b", MIB);
    let mut daemon = setup.start();
    std::fs::write(daemon.path("log"), []).unwrap();
    let image = daemon.path("q.qcow2").display().to_string();
    tools::ok("qemu-img", ["create", "-q", "-f", "qcow2", &image, "1M"]);
    let mut qmp = daemon.qmp();
    qmp.ok("object-add", json!({ "qom-type": "throttle-group", "id": "g" }));
    qmp.ok("blockdev-add", json!({ "driver": "null-co", "node-name": "busy", "size": MIB, "read-zeroes": true }));
    qmp.ok("block-export-add", json!({ "type": "nbd", "id": "busy", "node-name": "busy", "writable": true }));
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (mut client, _): (Client, _) = daemon.nbd().open("busy", Headers::Simple);
        let stop = &stop;
        let _end = RaisedAtEnd(stop);
        scope.spawn(move || {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                assert_eq!(client.write(0, 0, &[1; 65536]), 0);
                client.read(0, 65536);
            }
        });
        let nodes = nodes(&daemon);
        let cycle = |qmp: &mut qmp::Client, rounds: usize| {
            for _ in 0..rounds {
                nodes.iter().for_each(|node| round(&daemon, qmp, node));
            }
        };
        // Pools and caches fill once.
        cycle(&mut qmp, rounds.div_ceil(4));
        let count = u64::try_from(rounds * nodes.len()).unwrap();
        // What the allocator keeps for a thread grows up to a bound, now or later; a leak goes on.
        for last in [false, false, true] {
            let before = daemon.usage();
            cycle(&mut qmp, rounds);
            let after = wait_for("descriptors and threads to go", || {
                let now = daemon.usage();
                (now.descriptors <= before.descriptors && now.threads <= before.threads + 2).then_some(now)
            });
            // A leak of half a kilobyte for each node would be seen in the long run, beyond what the allocator keeps.
            if after.memory_kib <= before.memory_kib + 2048 + count / 2 {
                break;
            }
            assert!(!last, "after {count} nodes: {before:?}, then {after:?}");
        }
    });
    daemon.stop();
}
