//! Active and inactive nodes, and write thresholds [drop-in A.3].

use serde_json::{Value, json};
use tests::locks::read_locked_bytes;
use tests::nbd::{Headers, cmd};
use tests::{Daemon, Setup, qmp, tools};

use crate::{MIB, export, idle, node};

const EPERM: u32 = 1;

fn set_active(qmp: &mut qmp::Client, node: &str, active: bool) {
    qmp.ok("blockdev-set-active", json!({"node-name": node, "active": active}));
}

fn is_active(qmp: &mut qmp::Client, name: &str) -> Value {
    node(qmp, name)["active"].clone()
}

#[test]
fn nodes_become_active_with_what_is_below_them() {
    let daemon = idle();
    let mut qmp = daemon.qmp();
    qmp.ok("blockdev-add", json!({"driver": "file", "node-name": "f", "filename": "a.img", "active": false}));
    assert_eq!(
        qmp.refused("blockdev-add", json!({"driver": "raw", "node-name": "r", "file": "f"})),
        "Inactive 'f' can't be a file child of active 'r'"
    );
    qmp.ok("blockdev-add", json!({"driver": "raw", "node-name": "r", "file": "f", "active": false}));
    set_active(&mut qmp, "r", true);
    assert_eq!((is_active(&mut qmp, "r"), is_active(&mut qmp, "f")), (json!(true), json!(true)));
    let text = qmp.refused("blockdev-set-active", json!({"node-name": "f", "active": false}));
    assert_eq!(text, "Node has active parent node");
    set_active(&mut qmp, "r", false);
    assert_eq!((is_active(&mut qmp, "r"), is_active(&mut qmp, "f")), (json!(false), json!(false)));
    let text = qmp.refused("block_resize", json!({"node-name": "r", "size": MIB}));
    assert_eq!(text, "Permission 'resize' unavailable on inactive node");
    export(&mut qmp, "r");
    assert_eq!(is_active(&mut qmp, "f"), true, "an export makes its node active");
    for arguments in [json!({"node-name": "r", "active": false}), json!({"active": false})] {
        let text = qmp.refused("blockdev-set-active", arguments);
        assert!(text.ends_with(": Operation not permitted"), "{text}");
    }
    let text = qmp.refused("blockdev-set-active", json!({"node-name": "nobody", "active": false}));
    assert_eq!(text, "Failed to find node with node-name='nobody'");
}

#[test]
fn an_inactive_node_is_read_but_not_written_and_not_locked() {
    let daemon = idle();
    let mut qmp = daemon.qmp();
    qmp.ok("blockdev-add", json!({"driver": "file", "node-name": "f", "filename": "a.img", "active": false}));
    qmp.ok(
        "block-export-add",
        json!({"type": "nbd", "id": "e", "node-name": "f", "writable": true, "allow-inactive": true}),
    );
    let locks = || read_locked_bytes(&daemon.path("a.img"));
    assert_eq!(is_active(&mut qmp, "f"), false);
    assert!(locks().is_empty());
    let (mut client, _) = daemon.nbd().open("f", Headers::Structured);
    assert_eq!(client.write(0, 0, &[1; 512]), EPERM);
    assert_eq!(client.read(0, 512), [0; 512]);
    set_active(&mut qmp, "f", true);
    assert!(locks().contains(&101), "it may write now, and others must know");
    assert_eq!(client.write(0, 0, &[1; 512]), 0);
    qmp.ok("blockdev-set-active", json!({"active": false}));
    assert!(locks().is_empty());
    assert_eq!(client.write(0, 0, &[2; 512]), EPERM);
    assert_eq!(client.read(0, 512), [1; 512]);
}

/// A daemon with the image at `path`, not active yet, and an export of it.
fn host(path: &str) -> Daemon {
    let daemon = Setup::new().qmp().nbd_server().start();
    let mut qmp = daemon.qmp();
    let file = json!({"driver": "file", "node-name": "f", "filename": path, "active": false});
    qmp.ok("blockdev-add", file);
    qmp.ok("blockdev-add", json!({"driver": "qcow2", "node-name": "q", "file": "f", "active": false}));
    let export = json!({"type": "nbd", "id": "e", "node-name": "q", "writable": true, "allow-inactive": true});
    qmp.ok("block-export-add", export);
    daemon
}

#[test]
fn an_image_passes_from_one_daemon_to_another_and_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let path = path.to_str().unwrap();
    tools::ok("qemu-img", ["create", "-q", "-f", "qcow2", path, "4M"]);
    let hosts = [host(path), host(path)];
    let mut written = Vec::new();
    for turn in 0..6_u8 {
        let daemon = &hosts[usize::from(turn % 2)];
        let mut qmp = daemon.qmp();
        set_active(&mut qmp, "q", true);
        let (mut client, _) = daemon.nbd().open("q", Headers::Structured);
        // What the other one wrote, in clusters that were not there when this one opened the image.
        for (at, byte) in &written {
            assert_eq!(client.read(*at, 512), [*byte; 512], "turn {turn}, at {at}");
        }
        let at = u64::from(turn) * (MIB / 2);
        assert_eq!(client.write(at, 0, &[turn + 1; 512]), 0);
        written.push((at, turn + 1));
        let text = hosts[usize::from((turn + 1) % 2)]
            .qmp()
            .refused("blockdev-set-active", json!({"node-name": "q", "active": true}));
        assert!(text.contains("lock"), "{text}");
        set_active(&mut qmp, "q", false);
    }
    drop(hosts);
    let check = tools::ok("qemu-img", ["check", "-f", "qcow2", path]);
    assert!(check.contains("No errors were found"), "{check}");
}

#[test]
fn the_first_write_beyond_the_threshold_is_reported() {
    let daemon = idle();
    let mut qmp = daemon.qmp();
    qmp.ok("blockdev-add", json!({"driver": "file", "node-name": "f", "filename": "a.img"}));
    qmp.ok("blockdev-add", json!({"driver": "raw", "node-name": "r", "file": "f"}));
    export(&mut qmp, "r");
    let (mut client, _) = daemon.nbd().open("r", Headers::Structured);
    let set = |qmp: &mut qmp::Client, threshold: u64| {
        qmp.ok("block-set-write-threshold", json!({"node-name": "f", "write-threshold": threshold}));
    };
    set(&mut qmp, 4096);
    assert_eq!(node(&mut qmp, "f")["write_threshold"], 4096);
    assert_eq!(client.write(3584, 0, &[1; 512]), 0);
    assert_eq!(client.simple(cmd::TRIM, 0, 8192, 4096), 0);
    assert_eq!(node(&mut qmp, "f")["write_threshold"], 4096, "up to it, and what is no write");
    assert_eq!(client.write(4096, 0, &[1; 1024]), 0);
    let event = qmp.event("BLOCK_WRITE_THRESHOLD");
    assert_eq!(event, json!({"node-name": "f", "amount-exceeded": 1024, "write-threshold": 4096}));
    assert_eq!(node(&mut qmp, "f")["write_threshold"], 0, "it is reported once");
    set(&mut qmp, 4096);
    assert_eq!(client.simple(cmd::WRITE_ZEROES, 0, 8192, 4096), 0);
    assert_eq!(qmp.event("BLOCK_WRITE_THRESHOLD")["amount-exceeded"], 8192);
    let text = qmp.refused("block-set-write-threshold", json!({"node-name": "nobody", "write-threshold": 1}));
    assert_eq!(text, "Device 'nobody' not found");
}

#[test]
fn children_and_threads_of_nodes() {
    let daemon = idle();
    let mut qmp = daemon.qmp();
    qmp.ok("object-add", json!({"qom-type": "iothread", "id": "t"}));
    qmp.ok("blockdev-add", json!({"driver": "file", "node-name": "f", "filename": "a.img"}));
    qmp.ok("blockdev-add", json!({"driver": "null-co", "node-name": "n"}));
    for (arguments, text) in [
        (json!({"parent": "nobody"}), "Cannot find device='nobody' nor node-name='nobody'"),
        (json!({"parent": "f"}), "Either child or node must be specified"),
        (json!({"parent": "f", "child": "c", "node": "n"}), "The parameters child and node are in conflict"),
        (json!({"parent": "f", "child": "c"}), "Node 'f' does not have child 'c'"),
        (json!({"parent": "f", "node": "nobody"}), "Node 'nobody' not found"),
        (json!({"parent": "f", "node": "n"}), "The node f does not support adding a child"),
    ] {
        assert_eq!(qmp.refused("x-blockdev-change", arguments.clone()), text, "{arguments}");
    }
    qmp.ok("x-blockdev-set-iothread", json!({"node-name": "f", "iothread": "t"}));
    let text = qmp.refused("x-blockdev-set-iothread", json!({"node-name": "f", "iothread": "nobody"}));
    assert_eq!(text, "Cannot find iothread nobody");
    export(&mut qmp, "f");
    let text = qmp.refused("x-blockdev-set-iothread", json!({"node-name": "f", "iothread": Value::Null}));
    assert!(text.starts_with("Node f is associated with a BlockBackend"), "{text}");
    qmp.ok("x-blockdev-set-iothread", json!({"node-name": "f", "iothread": Value::Null, "force": true}));
}

/// A file in memory stays in memory, whatever it is asked to do.
#[test]
fn what_stays_in_the_page_cache_is_told_where_it_is_asked_for() {
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    let lasting = memory.path().join("lasting.img").display().to_string();
    std::fs::write(&lasting, vec![1; 1 << 20]).unwrap();
    let daemon = idle();
    let image = std::fs::OpenOptions::new().write(true).open(daemon.path("a.img")).unwrap();
    std::io::Write::write_all(&mut &image, &vec![1; 1 << 20]).unwrap();
    image.sync_all().unwrap();
    let mut qmp = daemon.qmp();
    let checked = |name: &str, path: &str, check: bool| json!({"driver": "file", "node-name": name, "filename": path, "x-check-cache-dropped": check});
    qmp.ok("blockdev-add", checked("f", "a.img", true));
    qmp.ok("blockdev-add", checked("m", &lasting, true));
    for name in ["f", "m"] {
        set_active(&mut qmp, name, false);
    }
    set_active(&mut qmp, "f", true);
    let text = qmp.refused("blockdev-set-active", json!({"node-name": "m", "active": true}));
    assert_eq!(text, "page cache still in use!");
    assert_eq!(is_active(&mut qmp, "m"), false);
    qmp.ok("blockdev-reopen", json!({"options": [checked("m", &lasting, false)]}));
    set_active(&mut qmp, "m", true);
}
