//! Snapshots: overlays under a running client, snapshots inside images, transactions of both.

use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use tests::nbd::Headers;
use tests::qmp::Client;
use tests::tools::{installed, ok, run_in};
use tests::{Daemon, on_reference, skip};

use crate::{MIB, create, idle};

/// A daemon with an image of 4 MiB as node `a`, exported as `disk`.
fn serving() -> (Daemon, Client) {
    let daemon = idle();
    let mut qmp = daemon.qmp();
    node(&daemon, &mut qmp, "a");
    qmp.ok("block-export-add", json!({"type": "nbd", "id": "e", "node-name": "a", "name": "disk", "writable": true}));
    (daemon, qmp)
}

/// A new image as a node.
fn node(daemon: &Daemon, qmp: &mut Client, name: &str) {
    let path = daemon.path(&format!("{name}.img"));
    let path = path.to_str().unwrap();
    assert_eq!(create(qmp, &json!({"driver": "file", "filename": path, "size": 0})), None);
    let file = json!({"driver": "file", "filename": path});
    assert_eq!(create(qmp, &json!({"driver": "qcow2", "file": file, "size": 4 * MIB})), None);
    qmp.ok("blockdev-add", json!({"driver": "qcow2", "node-name": name, "file": file}));
}

fn check(daemon: &Daemon, image: &str) {
    let ended = run_in(&daemon.path(""), "qemu-img", ["check", image]);
    assert_eq!(ended.status.code(), Some(0), "{image}: {}{}", ended.stdout, ended.stderr);
}

#[test]
fn overlays_under_a_client_that_writes() {
    if !installed("qemu-img") {
        skip!("qemu-img is not installed");
    }
    let (mut daemon, mut qmp) = serving();
    let (mut client, _) = daemon.nbd().open("disk", Headers::Structured);
    let stop = Arc::new(AtomicBool::new(false));
    let done = Arc::new(AtomicU64::new(0));
    let writer = {
        let (stop, done) = (Arc::clone(&stop), Arc::clone(&done));
        std::thread::spawn(move || {
            let mut round = 0_u64;
            while !stop.load(Ordering::SeqCst) {
                let byte = u8::try_from(1 + round % 250).unwrap();
                assert_eq!(client.write(round % 64 * 65536, 0, &[byte; 65536]), 0);
                round += 1;
                done.store(round, Ordering::SeqCst);
            }
            // Each of the last 64 writes can be read.
            for last in round.saturating_sub(64)..round {
                let byte = u8::try_from(1 + last % 250).unwrap();
                assert_eq!(client.read(last % 64 * 65536, 65536), [byte; 65536], "round {last} of {round}");
            }
        })
    };
    let mut top = "a".to_owned();
    for i in 0..8 {
        let before = done.load(Ordering::SeqCst);
        tests::wait_for("the client to write on", || (done.load(Ordering::SeqCst) > before + 8).then_some(()));
        let name = format!("o{i}");
        if i % 2 == 0 {
            let path = daemon.path(&format!("{name}.img"));
            qmp.ok(
                "blockdev-snapshot-sync",
                json!({"node-name": top, "snapshot-file": path.to_str().unwrap(), "snapshot-node-name": name}),
            );
        } else {
            node(&daemon, &mut qmp, &name);
            qmp.ok("blockdev-snapshot", json!({"node": top, "overlay": name}));
        }
        assert_eq!(qmp.ok("query-block-exports", json!({}))[0]["node-name"], name.as_str());
        top = name;
    }
    let before = done.load(Ordering::SeqCst);
    tests::wait_for("the client to write on", || (done.load(Ordering::SeqCst) > before + 100).then_some(()));
    stop.store(true, Ordering::SeqCst);
    writer.join().unwrap();
    daemon.stop();
    for i in (0..8).step_by(2) {
        check(&daemon, &format!("o{i}.img"));
    }
}

#[test]
fn snapshots_inside_an_image() {
    if !installed("qemu-img") {
        skip!("qemu-img is not installed");
    }
    let (mut daemon, mut qmp) = serving();
    let (mut client, _) = daemon.nbd().open("disk", Headers::Structured);
    for round in 1..=3_u8 {
        assert_eq!(client.write(0, 0, &vec![round; 3 << 20]), 0);
        let name = format!("s{round}");
        qmp.ok("blockdev-snapshot-internal-sync", json!({"device": "a", "name": name}));
    }
    assert_eq!(client.write(65536, 0, &vec![4; 1 << 20]), 0);
    let gone = qmp.ok("blockdev-snapshot-delete-internal-sync", json!({"device": "a", "name": "s2"}));
    assert_eq!((&gone["id"], &gone["name"], &gone["vm-state-size"]), (&json!("2"), &json!("s2"), &json!(0)));
    // The disk grows and shrinks under its snapshots.
    for size in [8 * MIB, 2 * MIB, 4 * MIB] {
        if on_reference() {
            // Its exports share no resize.
            break;
        }
        qmp.ok("block_resize", json!({"node-name": "a", "size": size}));
    }
    daemon.stop();
    check(&daemon, "a.img");
    let path = |name: &str| daemon.path(name).to_str().unwrap().to_owned();
    for (name, byte) in [("s1", 1), ("s3", 3)] {
        ok("qemu-img", ["convert", "-l", name, "-f", "qcow2", "-O", "raw", &path("a.img"), &path(name)]);
        let bytes = std::fs::read(daemon.path(name)).unwrap();
        assert_eq!(bytes.len(), 4 << 20);
        assert!(bytes[..3 << 20].iter().all(|b| *b == byte) && bytes[3 << 20..].iter().all(|b| *b == 0), "{name}");
    }
    ok("qemu-img", ["snapshot", "-a", "s1", &path("a.img")]);
    ok("qemu-img", ["snapshot", "-d", "s3", &path("a.img")]);
    check(&daemon, "a.img");
}

/// What shows another node's image takes snapshots for it, and shows its clusters and snapshots.
#[test]
fn snapshots_through_what_stands_above_an_image() {
    if !installed("qemu-img") {
        skip!("qemu-img is not installed");
    }
    let mut daemon = idle();
    let mut qmp = daemon.qmp();
    node(&daemon, &mut qmp, "a");
    qmp.ok("object-add", json!({"qom-type": "throttle-group", "id": "g"}));
    qmp.ok("blockdev-add", json!({"driver": "raw", "node-name": "r", "file": "a"}));
    qmp.ok("blockdev-add", json!({"driver": "throttle", "node-name": "t", "throttle-group": "g", "file": "r"}));
    qmp.ok("blockdev-add", json!({"driver": "copy-on-read", "node-name": "top", "file": "t"}));
    qmp.ok("block-export-add", json!({"type": "nbd", "id": "e", "node-name": "top", "name": "disk", "writable": true}));
    let (mut client, _) = daemon.nbd().open("disk", Headers::Structured);
    for (round, name) in [(1, "s1"), (2, "s2")] {
        assert_eq!(client.write(0, 0, &vec![round; 1 << 20]), 0);
        qmp.ok("blockdev-snapshot-internal-sync", json!({"device": "top", "name": name}));
    }
    assert_eq!(client.write(0, 0, &[3; 1 << 20]), 0);
    let nodes = qmp.ok("query-named-block-nodes", json!({}));
    for name in ["t", "r", "top"] {
        let image = &nodes.as_array().unwrap().iter().find(|node| node["node-name"] == name).unwrap()["image"];
        assert_eq!((&image["cluster-size"], &image["dirty-flag"]), (&json!(65536), &json!(false)), "{name}");
        let names: Vec<_> = image["snapshots"].as_array().unwrap().iter().map(|one| one["name"].clone()).collect();
        assert_eq!(names, ["s1", "s2"], "{name}");
    }
    let gone = qmp.ok("blockdev-snapshot-delete-internal-sync", json!({"device": "top", "name": "s2"}));
    assert_eq!(gone["id"], "2");
    // Two nodes below: which of them is meant nobody knows.
    qmp.ok("blockdev-add", json!({"driver": "null-co", "node-name": "n", "size": 4 * MIB}));
    node(&daemon, &mut qmp, "b");
    qmp.ok("blockdev-add", json!({"driver": "blkverify", "node-name": "v", "test": "n", "raw": "b"}));
    let text = "Block format 'blkverify' used by device 'v' does not support internal snapshots";
    assert_eq!(qmp.refused("blockdev-snapshot-internal-sync", json!({"device": "v", "name": "s"})), text);
    daemon.stop();
    check(&daemon, "a.img");
    let path = |name: &str| daemon.path(name).to_str().unwrap().to_owned();
    ok("qemu-img", ["convert", "-l", "s1", "-f", "qcow2", "-O", "raw", &path("a.img"), &path("s1")]);
    assert!(std::fs::read(daemon.path("s1")).unwrap()[..1 << 20].iter().all(|byte| *byte == 1));
}

#[test]
fn the_space_of_a_deleted_snapshot() {
    let left = [true, false].map(|discard| {
        let mut daemon = idle();
        let mut qmp = daemon.qmp();
        node(&daemon, &mut qmp, "a");
        qmp.ok("blockdev-del", json!({"node-name": "a"}));
        let path = daemon.path("a.img");
        let file = json!({"driver": "file", "filename": path, "discard": "unmap"});
        let node = json!({"driver": "qcow2", "node-name": "a", "file": file, "discard": "unmap",
            "pass-discard-snapshot": discard});
        qmp.ok("blockdev-add", node);
        qmp.ok(
            "block-export-add",
            json!({"type": "nbd", "id": "e", "node-name": "a", "name": "disk", "writable": true}),
        );
        let (mut client, _) = daemon.nbd().open("disk", Headers::Structured);
        assert_eq!(client.write(0, 0, &[1; 2 << 20]), 0);
        qmp.ok("blockdev-snapshot-internal-sync", json!({"device": "a", "name": "s"}));
        assert_eq!(client.write(0, 0, &[2; 2 << 20]), 0);
        assert_eq!(client.simple(tests::nbd::cmd::FLUSH, 0, 0, 0), 0);
        qmp.ok("blockdev-snapshot-delete-internal-sync", json!({"device": "a", "name": "s"}));
        assert_eq!(client.simple(tests::nbd::cmd::FLUSH, 0, 0, 0), 0);
        drop(client);
        daemon.stop();
        tests::image::allocated(&path)
    });
    assert!(left[0] + (2 << 20) <= left[1], "{left:?} bytes are allocated, with discards and without");
}

#[test]
fn texts() {
    let (daemon, mut qmp) = serving();
    for name in ["b", "c"] {
        node(&daemon, &mut qmp, name);
    }
    qmp.ok("blockdev-add", json!({"driver": "null-co", "node-name": "n", "size": MIB}));
    qmp.ok("blockdev-add", json!({"driver": "raw", "node-name": "r", "file": "n"}));
    let mut refused = |command: &str, arguments: Value, text: &str| {
        assert_eq!(qmp.refused(command, arguments.clone()), text, "{command} {arguments}");
    };
    let over = |node: &str, overlay: &str| json!({"node": node, "overlay": overlay});
    let none = "Cannot find device='x' nor node-name='x'";
    refused("blockdev-snapshot", over("x", "b"), none);
    refused("blockdev-snapshot", over("a", "x"), none);
    refused("blockdev-snapshot", over("a", "r"), "The overlay does not support backing images");
    refused("blockdev-snapshot", over("b", "a"), "The overlay is already in use");
    refused("blockdev-snapshot", over("b", "b"), "Making 'b' a backing child of 'b' would create a cycle");
    let sync = |more: Value| {
        let mut arguments = json!({"snapshot-file": "o.img"});
        arguments.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        arguments
    };
    let sync_none = "Cannot find device='' nor node-name='x'";
    refused("blockdev-snapshot-sync", sync(json!({"node-name": "x", "snapshot-node-name": "o"})), sync_none);
    refused("blockdev-snapshot-sync", sync(json!({"node-name": "a"})), "New overlay node-name missing");
    let taken = "New overlay node-name already in use";
    refused("blockdev-snapshot-sync", sync(json!({"node-name": "a", "snapshot-node-name": "b"})), taken);
    refused("blockdev-snapshot-sync", sync(json!({"device": "a"})), "Cannot find device='a' nor node-name=''");
    let internal = "blockdev-snapshot-internal-sync";
    let delete = "blockdev-snapshot-delete-internal-sync";
    refused(internal, json!({"device": "x", "name": "s"}), none);
    refused(internal, json!({"device": "n", "name": "s"}), "Need a root block node");
    let raw = "Block format 'raw' used by device 'r' does not support internal snapshots";
    refused(internal, json!({"device": "r", "name": "s"}), raw);
    refused(internal, json!({"device": "a", "name": ""}), "Name is empty");
    refused(delete, json!({"device": "a"}), "Name or id must be provided");
    let missing = "Snapshot with id 'null' and name 's' does not exist on device 'a'";
    refused(delete, json!({"device": "a", "name": "s"}), missing);
    let alone = "not allowing backing file change on an image without a backing file";
    refused("change-backing-file", json!({"device": "a", "image-node-name": "a", "backing-file": "f"}), alone);
}

#[test]
fn a_transaction_is_all_or_nothing() {
    let (daemon, mut qmp) = serving();
    let internal =
        |name: &str| json!({"type": "blockdev-snapshot-internal-sync", "data": {"device": "a", "name": name}});
    let path = daemon.path("o.img");
    let sync = json!({"type": "blockdev-snapshot-sync",
        "data": {"node-name": "a", "snapshot-file": path.to_str().unwrap(), "snapshot-node-name": "o"}});
    let abort = json!({"type": "abort", "data": {}});
    qmp.ok("transaction", json!({"actions": []}));
    for actions in
        [json!([abort]), json!([internal("s"), abort]), json!([sync, abort]), json!([internal("s"), sync, abort])]
    {
        let text = qmp.refused("transaction", json!({"actions": actions}));
        assert_eq!(text, "Transaction aborted using Abort action");
        assert_eq!(qmp.ok("query-block-exports", json!({}))[0]["node-name"], "a");
        let nodes = qmp.ok("query-named-block-nodes", json!({}));
        assert!(!nodes.as_array().unwrap().iter().any(|node| node["node-name"] == "o"));
        qmp.refused("blockdev-snapshot-delete-internal-sync", json!({"device": "a", "name": "s"}));
    }
    let grouped = json!({"actions": [internal("s")], "properties": {"completion-mode": "grouped"}});
    assert_eq!(
        qmp.refused("transaction", grouped),
        "Action 'blockdev-snapshot-internal-sync' does not support transaction property completion-mode = grouped"
    );
    qmp.ok("transaction", json!({"actions": [internal("s"), internal("t"), sync]}));
    assert_eq!(qmp.ok("query-block-exports", json!({}))[0]["node-name"], "o");
}

#[test]
fn another_name_of_the_backing_file() {
    let (daemon, mut qmp) = serving();
    let path = daemon.path("o.img");
    let path = path.to_str().unwrap();
    qmp.ok("blockdev-snapshot-sync", json!({"node-name": "a", "snapshot-file": path, "snapshot-node-name": "o"}));
    qmp.ok("change-backing-file", json!({"device": "o", "image-node-name": "o", "backing-file": "other.img"}));
    if installed("qemu-img") && !on_reference() {
        let info: Value = serde_json::from_str(&ok("qemu-img", ["info", "-U", "--output=json", path])).unwrap();
        assert_eq!(info["backing-filename"], "other.img");
        assert_eq!(info["backing-filename-format"], "qcow2");
    }
}
