//! `quorum` [drop-in A.7], its events and `x-blockdev-change`.

use serde_json::{Value, json};
use std::os::unix::fs::FileExt;
use tests::nbd::{Headers, Request, cmd};
use tests::{Daemon, Setup, tools};

use crate::MIB;

fn three(daemon: &Daemon, more: Value) -> Value {
    let child = |name: &str| json!({ "driver": "file", "node-name": name, "filename": daemon.path(name) });
    let mut json = json!({
        "driver": "quorum", "node-name": "q", "vote-threshold": 2, "children": [child("a"), child("b"), child("c")]
    });
    json.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    json
}

fn serving(more: Value) -> Daemon {
    let daemon = Setup::new().qmp().nbd_server().image("a", MIB).image("b", MIB).image("c", MIB).start();
    let mut qmp = daemon.qmp();
    qmp.ok("blockdev-add", three(&daemon, more));
    qmp.ok("block-export-add", json!({ "type": "nbd", "id": "e", "node-name": "q", "writable": true }));
    tools::qemu_io(&daemon.uri("q"), &["write -P 1 0 64k", "flush", "read -P 1 0 64k", "read -P 0 64k 64k"]);
    daemon
}

fn damage(daemon: &Daemon, name: &str, byte: u8) {
    let file = std::fs::OpenOptions::new().write(true).open(daemon.path(name)).unwrap();
    file.write_all_at(&[byte; 4096], 8192).unwrap();
}

#[test]
fn a_damaged_child_is_outvoted_and_reported() {
    for rewrite in [false, true] {
        let daemon = serving(json!({ "rewrite-corrupted": rewrite }));
        let mut qmp = daemon.qmp();
        damage(&daemon, "b", 2);
        tools::qemu_io(&daemon.uri("q"), &["read -P 1 0 64k"]);
        let event = qmp.event("QUORUM_REPORT_BAD");
        let want = json!({ "type": "read", "node-name": "b", "sector-num": 0, "sectors-count": 128 });
        assert_eq!(event, want);
        let bytes = std::fs::read(daemon.path("b")).unwrap();
        assert_eq!(bytes[8192] == 1, rewrite);
        if !rewrite {
            damage(&daemon, "c", 3);
            let (mut client, _) = daemon.nbd().open("q", Headers::Simple);
            client.send(&Request { cmd: cmd::READ, offset: 8192, len: 512, ..Request::default() });
            let event = qmp.event("QUORUM_FAILURE");
            assert_eq!(event, json!({ "reference": "q", "sector-num": 16, "sectors-count": 1 }));
        }
    }
}

/// One child asks for larger blocks than those in which another one is sparse.
#[test]
fn block_status_of_children_with_other_blocks() {
    if !tools::installed("qemu-img") {
        tests::skip!("qemu-img is not installed");
    }
    let daemon = Setup::new().qmp().nbd_server().image("a", MIB).image("b", MIB).start();
    let file = std::fs::OpenOptions::new().write(true).open(daemon.path("b")).unwrap();
    file.write_all_at(&[1; 4096], 73728).unwrap();
    let mut qmp = daemon.qmp();
    let child = |name: &str| json!({ "driver": "file", "filename": daemon.path(name) });
    let coarse = json!({ "driver": "blkdebug", "align": 65536, "image": child("a") });
    qmp.ok(
        "blockdev-add",
        json!({ "driver": "quorum", "node-name": "q", "vote-threshold": 1, "children": [coarse, child("b")] }),
    );
    qmp.ok("block-export-add", json!({ "type": "nbd", "id": "e", "node-name": "q" }));
    let map = tools::ok("qemu-img", ["map", "--output=json", "-f", "raw", &daemon.uri("q")]);
    let map: Vec<Value> = serde_json::from_str(&map).unwrap();
    let mut end = 0;
    for run in &map {
        let (start, len) = (run["start"].as_u64().unwrap(), run["length"].as_u64().unwrap());
        assert_eq!(start, end, "{map:?}");
        end = start + len;
        let written = start < 73728 + 4096 && end > 73728;
        assert!(!(written && run["zero"] == json!(true)), "{run}");
    }
    assert_eq!(end, MIB);
    assert!(map.iter().any(|run| run["zero"] == json!(true)), "{map:?}");
}

#[test]
fn children_come_and_go_under_io() {
    let daemon = serving(json!({}));
    let mut qmp = daemon.qmp();
    qmp.ok("blockdev-add", json!({ "driver": "null-co", "node-name": "n", "size": MIB, "read-zeroes": true }));
    qmp.ok("blockdev-add", json!({ "driver": "null-co", "node-name": "m", "size": MIB, "read-zeroes": true }));
    for (arguments, text) in [
        (json!({ "parent": "q", "child": "children.9" }), "Node 'q' does not have child 'children.9'"),
        (json!({ "parent": "q" }), "Either child or node must be specified"),
        (json!({ "parent": "q", "child": "children.0", "node": "n" }), "The parameters child and node are in conflict"),
        (json!({ "parent": "n", "node": "m" }), "The node n does not support adding a child"),
        (json!({ "parent": "q", "node": "nope" }), "Node 'nope' not found"),
        (json!({ "parent": "nope", "node": "n" }), "Cannot find device='nope' nor node-name='nope'"),
        (json!({ "parent": "q", "node": "a" }), "The node a already has a parent"),
    ] {
        assert_eq!(qmp.refused("x-blockdev-change", arguments), text);
    }
    let (mut client, _) = daemon.nbd().open("q", Headers::Simple);
    for round in 0..20 {
        assert_eq!(client.write(0, 0, &[round; 4096]), 0);
        qmp.ok("x-blockdev-change", json!({ "parent": "q", "node": "n" }));
        assert_eq!(client.write(65536, 0, &[round; 4096]), 0);
        qmp.ok("x-blockdev-change", json!({ "parent": "q", "child": "children.3" }));
        assert_eq!(client.read(0, 4096), [round; 4096]);
    }
    qmp.ok("x-blockdev-change", json!({ "parent": "q", "child": "children.1" }));
    let text = qmp.refused("x-blockdev-change", json!({ "parent": "q", "child": "children.0" }));
    assert_eq!(text, "The number of children cannot be lower than the vote threshold 2");
}
