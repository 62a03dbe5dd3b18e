//! Filters that decide how much space is used: `compress` and `preallocate` [drop-in A.7].

use serde_json::{Value, json};
use tests::{Daemon, Setup, on_reference, tools};

use crate::MIB;

fn qcow2(daemon: &Daemon, name: &str, size: &str) -> Value {
    let path = daemon.path(name).display().to_string();
    tools::ok("qemu-img", ["create", "-q", "-f", "qcow2", &path, size]);
    json!({ "driver": "qcow2", "node-name": name, "discard": "unmap", "file": { "driver": "file", "filename": path } })
}

#[test]
fn compress_needs_a_format_that_can() {
    let daemon = Setup::new().qmp().start();
    let mut qmp = daemon.qmp();
    qmp.ok("object-add", json!({ "qom-type": "throttle-group", "id": "g" }));
    qmp.ok("blockdev-add", qcow2(&daemon, "q", "1M"));
    let device = json!({ "driver": "null-co", "size": MIB });
    let over = |file: Value| json!({ "driver": "compress", "node-name": "c", "file": file });
    for (file, format) in [
        (device.clone(), "null-co"),
        (json!({ "driver": "raw", "file": device }), "raw"),
        (json!({ "driver": "preallocate", "file": "q" }), "preallocate"),
        (json!({ "driver": "blkdebug", "image": "q" }), "blkdebug"),
        (json!({ "driver": "blkverify", "test": "q", "raw": { "driver": "null-co", "size": MIB } }), "blkverify"),
        (json!({ "driver": "compress", "file": "q" }), "compress"),
    ] {
        let text = qmp.refused("blockdev-add", over(file));
        assert_eq!(text, format!("Compression is not supported for underlying format: {format}"));
    }
    for file in [
        json!({ "driver": "throttle", "throttle-group": "g", "file": "q" }),
        json!({ "driver": "copy-on-read", "file": "q" }),
        json!("q"),
    ] {
        qmp.ok("blockdev-add", over(file));
        qmp.ok("blockdev-del", json!({ "node-name": "c" }));
    }
}

#[test]
fn what_is_written_through_compress_is_small_and_right() {
    let mut daemon = Setup::new().qmp().nbd_server().start();
    let mut qmp = daemon.qmp();
    qmp.ok("blockdev-add", qcow2(&daemon, "q", "8M"));
    qmp.ok("blockdev-add", json!({ "driver": "compress", "node-name": "c", "file": "q", "discard": "unmap" }));
    qmp.ok("block-export-add", json!({ "type": "nbd", "id": "e", "node-name": "c", "writable": true }));
    let uri = daemon.uri("c");
    tools::qemu_io(
        &uri,
        &[
            "write -P 1 0 4M",
            // Clusters that are touched for the first time, in part.
            "write -P 2 4500k 100k",
            "write -z 5M 128k",
            "read -P 1 0 4M",
            "read -P 0 4M 404k",
            "read -P 2 4500k 100k",
            "read -P 0 5M 3M",
        ],
    );
    if !on_reference() {
        // The reference refuses to write a second time to what is not compressed; here it goes to another place.
        tools::qemu_io(&uri, &["write -P 3 1M 64k", "write -P 4 1000000 5000", "read -P 4 1000000 5000"]);
    }
    daemon.stop();
    let path = daemon.path("q").display().to_string();
    tools::ok("qemu-img", ["check", "-q", &path]);
    let map: Vec<Value> = serde_json::from_str(&tools::ok("qemu-img", ["map", "--output=json", &path])).unwrap();
    let compressed = |part: &&Value| part["compressed"] == true;
    let len: u64 = map.iter().filter(compressed).map(|part| part["length"].as_u64().unwrap()).sum();
    assert!(len >= 4 * MIB, "{map:?}");
    assert!(std::fs::metadata(&path).unwrap().len() < MIB);
}

#[test]
fn preallocate_checks_its_numbers() {
    let daemon = Setup::new().qmp().start();
    let mut qmp = daemon.qmp();
    for (more, text) in [
        (json!({ "prealloc-align": 3 }), "prealloc-align parameter of preallocate filter is not aligned to 512"),
        (json!({ "prealloc-align": 513 }), "prealloc-align parameter of preallocate filter is not aligned to 512"),
        (json!({ "prealloc-align": -512 }), "Value '-512' is out of range for parameter 'prealloc-align'"),
        (json!({ "prealloc-size": -5 }), "Value '-5' is out of range for parameter 'prealloc-size'"),
    ] {
        let mut json = json!({ "driver": "preallocate", "node-name": "p", "file": { "driver": "null-co" } });
        json.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        assert_eq!(qmp.refused("blockdev-add", json), text);
    }
    for align in [0, 512, 1536] {
        let json = json!({ "driver": "preallocate", "node-name": "p", "prealloc-align": align, "file": { "driver": "null-co" } });
        qmp.ok("blockdev-add", json);
        qmp.ok("blockdev-del", json!({ "node-name": "p" }));
    }
}

/// A format grows its file in large steps; what it does not use goes when the nodes do, but not in a crash.
#[test]
fn space_is_reserved_for_a_format_and_given_back() {
    for crash in [false, true] {
        let mut daemon = Setup::new().qmp().nbd_server().start();
        let mut qmp = daemon.qmp();
        let mut image = qcow2(&daemon, "q", "64M");
        image["file"] = json!({ "driver": "preallocate", "prealloc-size": 16 * MIB, "file": image["file"] });
        qmp.ok("blockdev-add", image);
        qmp.ok("block-export-add", json!({ "type": "nbd", "id": "e", "node-name": "q", "writable": true }));
        tools::qemu_io(&daemon.uri("q"), &["write -P 1 0 1M", "flush"]);
        let path = daemon.path("q");
        let len = || std::fs::metadata(&path).unwrap().len();
        assert!(len() > 16 * MIB, "{}", len());
        if crash {
            daemon.crash();
            assert!(len() > 16 * MIB);
        } else {
            daemon.stop();
            assert!(len() < 3 * MIB, "{}", len());
        }
        let path = path.display().to_string();
        tools::ok("qemu-io", ["-f", "qcow2", "-c", "read -P 1 0 1M", "-c", "read -P 0 1M 1M", &path]);
        tools::ok("qemu-img", ["check", "-q", &path]);
    }
}

/// The reference does not let an option go back to its default, so the test gives both each time and takes them away at last.
#[test]
fn what_is_reserved_changes_while_a_client_writes() {
    let daemon = Setup::new().qmp().nbd_server().start();
    let mut qmp = daemon.qmp();
    let image = qcow2(&daemon, "q", "64M");
    let with = |size: u64, align: u64| {
        let mut node = json!({ "driver": "preallocate", "node-name": "p", "file": "f" });
        if size > 0 {
            node["prealloc-size"] = json!(size);
            node["prealloc-align"] = json!(align);
        }
        node
    };
    let mut file = image["file"].clone();
    file["node-name"] = json!("f");
    qmp.ok("blockdev-add", file);
    qmp.ok("blockdev-add", with(MIB, 512));
    qmp.ok("blockdev-add", json!({ "driver": "qcow2", "node-name": "q", "file": "p" }));
    qmp.ok("block-export-add", json!({ "type": "nbd", "id": "e", "node-name": "q", "writable": true }));
    let path = daemon.path("q");
    let len = || std::fs::metadata(&path).unwrap().len();
    let uri = daemon.uri("q");
    tools::qemu_io(&uri, &["write -P 1 0 64k"]);
    assert!((MIB..3 * MIB).contains(&len()), "{}", len());

    let text = qmp.refused("blockdev-reopen", json!({ "options": [with(16 * MIB, 3)] }));
    assert_eq!(text, "prealloc-align parameter of preallocate filter is not aligned to 512");
    let mut negative = with(MIB, 512);
    negative["prealloc-size"] = json!(-1);
    let text = qmp.refused("blockdev-reopen", json!({ "options": [negative] }));
    assert_eq!(text, "Value '-1' is out of range for parameter 'prealloc-size'");

    qmp.ok("blockdev-reopen", json!({ "options": [with(16 * MIB, 4 * MIB)] }));
    tools::qemu_io(&uri, &["write -P 2 64k 2M", "read -P 1 0 64k", "read -P 2 64k 2M"]);
    assert!(len() > 16 * MIB && len().is_multiple_of(4 * MIB), "{}", len());

    // What was reserved goes; then comes as much as by default.
    if !on_reference() {
        qmp.ok("blockdev-reopen", json!({ "options": [with(0, 0)] }));
        assert!(len() < 4 * MIB, "{}", len());
        tools::qemu_io(&uri, &["write -P 3 4M 1M", "read -P 2 64k 2M", "read -P 3 4M 1M"]);
        assert!(len() > 128 * MIB, "{}", len());
    }
}
