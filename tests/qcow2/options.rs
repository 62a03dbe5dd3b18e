//! Options of images, at the beginning and by `blockdev-reopen`.

use crate::{node, peek, poke, qemu_img, qemu_io, serve};
use serde_json::{Value, json};
use tests::nbd::Headers;
use tests::{Daemon, Setup, on_reference, qmp};

fn with_image(args: &[&str]) -> Daemon {
    let setup = Setup::new().qmp().nbd_server();
    let mut all = vec!["create", "-q", "-f", "qcow2"];
    all.extend(args);
    qemu_img(&setup.path("."), &all);
    setup.start()
}

fn with(extra: &Value) -> Value {
    let mut node = json!({"driver": "qcow2", "node-name": "q", "file": {"driver": "file", "filename": "i.qcow2"}});
    node.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    node
}

#[test]
fn what_contradicts_is_refused() {
    let daemon = with_image(&["-o", "compat=0.10", "i.qcow2", "64M"]);
    let mut qmp = daemon.qmp();
    for (extra, expected) in [
        (
            json!({"cache-size": 1 << 20, "l2-cache-size": 1 << 20, "refcount-cache-size": 1 << 20}),
            "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time",
        ),
        (json!({"cache-size": 1 << 16, "l2-cache-size": 1 << 20}), "l2-cache-size may not exceed cache-size"),
        (
            json!({"cache-size": 1 << 16, "refcount-cache-size": 1 << 20}),
            "refcount-cache-size may not exceed cache-size",
        ),
        (
            json!({"l2-cache-entry-size": 1000}),
            "L2 cache entry size must be a power of two between 512 and the cluster size (65536)",
        ),
        (json!({"cache-clean-interval": 5_000_000_000u64}), "Cache clean interval too big"),
        (
            json!({"lazy-refcounts": true}),
            "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level",
        ),
        (json!({"discard-no-unref": true}), "discard-no-unref is only supported since qcow2 version 3"),
        (json!({"refcount-cache-size": i64::MAX}), "Refcount cache size too big"),
        (json!({"l2-cache-size": -1}), "Value '-1' is out of range for parameter 'l2-cache-size'"),
        (json!({"backing": "none"}), "Could not open backing file: Cannot find device='none' nor node-name='none'"),
    ] {
        assert_eq!(qmp.refused("blockdev-add", with(&extra)), expected);
    }
}

/// Zeroes would go to guest offsets of the image itself.
#[test]
fn a_raw_data_file_that_is_not_there() {
    let daemon = with_image(&["i.qcow2", "64M"]);
    poke(&daemon.path("i.qcow2"), 95, &[2]);
    let mut qmp = daemon.qmp();
    for read_only in [false, true] {
        let refused = qmp.refused("blockdev-add", with(&json!({"read-only": read_only})));
        assert_eq!(refused, "data-file-raw requires a data file");
    }
}

fn reopen(qmp: &mut qmp::Client, extra: &Value) {
    let mut options = with(extra);
    options["file"] =
        json!(node(qmp, "q")["children"].as_array().map_or(json!("f"), |list| list[0]["node-name"].clone()));
    qmp.ok("blockdev-reopen", json!({"options": [options]}));
}

#[test]
fn options_change_under_a_client() {
    let daemon = with_image(&["i.qcow2", "64M"]);
    let path = daemon.path("i.qcow2");
    let mut qmp = daemon.qmp();
    qmp.ok("blockdev-add", json!({"driver": "file", "node-name": "f", "filename": "i.qcow2"}));
    qmp.ok("blockdev-add", {
        let mut options = with(&json!({}));
        options["file"] = json!("f");
        options
    });
    qmp.ok("block-export-add", json!({"type": "nbd", "id": "e", "node-name": "q", "name": "q", "writable": true}));
    let (mut nbd, _) = daemon.nbd().open("q", Headers::Structured);
    let mut byte = 0;
    for extra in [
        json!({"l2-cache-size": 4096, "l2-cache-entry-size": 512, "cache-clean-interval": 1}),
        json!({"l2-cache-size": 1 << 20, "refcount-cache-size": 1 << 18, "overlap-check": "all"}),
        json!({"lazy-refcounts": true}),
        json!({"cache-size": 1 << 20, "cache-clean-interval": 0, "overlap-check": {"template": "none"}}),
        json!({"discard-no-unref": true, "pass-discard-request": false, "pass-discard-other": true}),
        json!({}),
    ] {
        byte += 1;
        reopen(&mut qmp, &extra);
        assert_eq!(nbd.write(u64::from(byte) << 20, 0, &[byte; 4096]), 0, "{extra}");
        assert_eq!(nbd.simple(tests::nbd::cmd::FLUSH, 0, 0, 0), 0);
        let dirty = peek(&path, 72) & 1 != 0;
        assert_eq!(dirty, extra["lazy-refcounts"] == true, "the dirty bit with {extra}");
        for byte in 1..=byte {
            assert_eq!(nbd.read(u64::from(byte) << 20, 4096), [byte; 4096]);
        }
    }
}

#[test]
fn a_crash_with_lazy_refcounts_is_repaired() {
    let mut daemon = with_image(&["-o", "lazy_refcounts=on", "i.qcow2", "64M"]);
    let dir = daemon.path(".");
    let qmp = serve(&daemon, "i.qcow2", &json!({}));
    let (mut nbd, _) = daemon.nbd().open("q", Headers::Structured);
    assert_eq!(nbd.write(7 << 20, 0, &[7; 300_000]), 0);
    assert_eq!(nbd.simple(tests::nbd::cmd::FLUSH, 0, 0, 0), 0);
    drop(qmp);
    daemon.crash();
    let image = dir.join("i.qcow2");
    assert_eq!(peek(&image, 72) & 1, 1);
    let copy = tempfile::tempdir().unwrap();
    std::fs::copy(&image, copy.path().join("i.qcow2")).unwrap();
    let next = Setup::new().qmp().nbd_server();
    std::fs::copy(&image, next.path("i.qcow2")).unwrap();
    let mut next = next.start();
    let mut qmp = serve(&next, "i.qcow2", &json!({}));
    assert_eq!(node(&mut qmp, "q")["image"]["dirty-flag"], false, "repaired when it was opened");
    let (mut nbd, _) = next.nbd().open("q", Headers::Structured);
    assert_eq!(nbd.read(7 << 20, 300_000), vec![7; 300_000]);
    drop((nbd, qmp));
    next.stop();
    qemu_img(&next.path("."), &["check", "-q", "i.qcow2"]);
    qemu_io(&next.path("."), "i.qcow2", &["read -P 7 7M 300000"]);
}

#[test]
fn the_check_command() {
    if on_reference() {
        tests::skip!("a command of this project");
    }
    let daemon = with_image(&["i.qcow2", "64M"]);
    let path = daemon.path("i.qcow2");
    let mut qmp = daemon.qmp();
    qmp.ok("blockdev-add", json!({"driver": "file", "node-name": "f", "filename": "i.qcow2"}));
    let clean = qmp.ok("x-blockdev-check", json!({"node-name": "f"}));
    let expected: Value =
        serde_json::from_str(&qemu_img(&daemon.path("."), &["check", "--output=json", "i.qcow2"])).unwrap();
    assert_eq!(clean, expected);
    // A reference too many to the L1 table, and the mark of a damaged image.
    crate::poke(&path, peek(&path, peek(&path, 48)) + 6, &[0, 2]);
    crate::poke(&path, 79, &[2]);
    let refused = qmp.refused("blockdev-add", {
        let mut options = with(&json!({}));
        options["file"] = json!("f");
        options
    });
    assert!(refused.contains("Image is corrupt; cannot be opened read/write"), "{refused}");
    let found = qmp.ok("x-blockdev-check", json!({"node-name": "f", "fix": "all"}));
    assert_eq!((&found["leaks-fixed"], &found["leaks"]), (&json!(1), &Value::Null));
    assert_eq!(peek(&path, 72), 0, "the mark is taken off");
    qmp.ok("blockdev-add", {
        let mut options = with(&json!({}));
        options["file"] = json!("f");
        options
    });
    let found = qmp.ok("x-blockdev-check", json!({"node-name": "q", "fix": "leaks"}));
    assert_eq!((&found["check-errors"], &found["leaks"]), (&json!(0), &Value::Null));
}

fn with_two_monitors() -> Daemon {
    let setup = Setup::new().qmp().line("--chardev socket,path=two.sock,server=on,wait=off,id=two --monitor two");
    qemu_img(&setup.path("."), &["create", "-q", "-f", "qcow2", "i.qcow2", "64M"]);
    setup.start()
}

fn second(daemon: &Daemon) -> qmp::Client {
    let mut second = qmp::Client::connect(&daemon.path("two.sock"));
    second.negotiate();
    second
}

#[test]
fn a_check_does_not_hold_queries_up() {
    if on_reference() {
        tests::skip!("a command of this project");
    }
    let daemon = with_two_monitors();
    let mut qmp = daemon.qmp();
    let mut other = second(&daemon);
    let file = json!({"driver": "file", "filename": "i.qcow2"});
    let rule = json!({"action": "hold", "iotype": "read"});
    qmp.ok("blockdev-add", json!({"driver": "x-fault", "node-name": "d", "file": file, "rules": [rule]}));
    qmp.send(r#"{"execute": "x-blockdev-check", "arguments": {"node-name": "d"}, "id": 1}"#);
    tests::wait_for("the check to be held", || {
        (other.ok("x-query-fault", json!({"node-name": "d"}))["held"] == 1).then_some(())
    });
    assert!(other.ok("query-commands", json!({})).is_array());
    // This would take the node away: it waits.
    other.send(r#"{"execute": "blockdev-del", "arguments": {"node-name": "d"}}"#);
    drop(other);
    let mut other = second(&daemon);
    assert_eq!(node(&mut other, "d")["drv"], "x-fault");
    other.ok("x-fault-set-rules", json!({"node-name": "d", "rules": []}));
    other.ok("x-fault-release", json!({"node-name": "d"}));
    let answer = qmp.answer();
    assert_eq!((&answer["id"], &answer["return"]["check-errors"]), (&json!(1), &json!(0)));
    tests::wait_for("the node to go", || {
        qmp.ok("query-named-block-nodes", json!({})).as_array().unwrap().is_empty().then_some(())
    });
}

/// A read a second is what the check gets, until the daemon ends and holds nothing back.
#[test]
fn the_end_of_the_daemon_waits_for_a_check() {
    if on_reference() {
        tests::skip!("a command of this project");
    }
    let mut daemon = with_two_monitors();
    let mut qmp = daemon.qmp();
    let limits = json!({"iops-total": 1, "iops-size": 0});
    qmp.ok("object-add", json!({"qom-type": "throttle-group", "id": "g", "limits": limits}));
    let file = json!({"driver": "file", "filename": "i.qcow2"});
    qmp.ok("blockdev-add", json!({"driver": "throttle", "node-name": "t", "throttle-group": "g", "file": file}));
    qmp.send(r#"{"execute": "x-blockdev-check", "arguments": {"node-name": "t"}}"#);
    second(&daemon).ok("quit", json!({}));
    assert!(daemon.wait().success());
}
