//! What happens to the bytes: zero detection, discard, resize, block devices.

use serde_json::json;
use tests::image::allocated;
use tests::nbd::{Headers, cmd};
use tests::{skip, tools};

use crate::{MIB, export, idle, node};

#[test]
fn detect_zeroes() {
    for (mode, discard, sparse) in [("off", "unmap", false), ("on", "unmap", false), ("unmap", "unmap", true)] {
        let daemon = idle();
        let mut qmp = daemon.qmp();
        qmp.ok(
            "blockdev-add",
            json!({"driver": "file", "node-name": "f", "filename": "a.img", "discard": discard, "detect-zeroes": mode}),
        );
        export(&mut qmp, "f");
        let (mut client, _) = daemon.nbd().open("f", Headers::Structured);
        assert_eq!(client.write(0, 0, &vec![1; 1 << 20]), 0);
        assert_eq!(client.write(0, 0, &vec![0; 1 << 20]), 0);
        assert!(client.read(0, MIB).iter().all(|byte| *byte == 0));
        let left = allocated(&daemon.path("a.img"));
        assert_eq!(left < MIB / 2, sparse, "detect-zeroes={mode}: {left} bytes allocated");
    }
    let daemon = idle();
    let text = daemon.qmp().refused(
        "blockdev-add",
        json!({"driver": "file", "node-name": "f", "filename": "a.img", "detect-zeroes": "unmap"}),
    );
    assert_eq!(text, "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap");
}

#[test]
fn resize() {
    let daemon = idle();
    let mut qmp = daemon.qmp();
    qmp.ok("blockdev-add", json!({"driver": "file", "node-name": "f", "filename": "a.img"}));
    let length = || std::fs::metadata(daemon.path("a.img")).unwrap().len();
    for size in [2 * MIB, 512, 0, 1000, 3 * MIB] {
        qmp.ok("block_resize", json!({"node-name": "f", "size": size}));
        // Whole sectors, as the reference has it, or to the byte.
        assert!([size, size.next_multiple_of(512)].contains(&length()), "{size}: {}", length());
        assert_eq!(node(&mut qmp, "f")["image"]["virtual-size"], length().next_multiple_of(512));
    }
    let mut refused = |arguments| qmp.refused("block_resize", arguments);
    assert_eq!(refused(json!({"node-name": "f", "size": -1})), "Parameter 'size' expects a >0 size");
    assert_eq!(refused(json!({"node-name": "zz", "size": 1})), "Cannot find device='' nor node-name='zz'");
    assert_eq!(refused(json!({"size": 1})), "Cannot find device='' nor node-name=''");
    let huge = refused(json!({"node-name": "f", "size": i64::MAX}));
    assert!(!huge.is_empty());
    assert_eq!(length(), 3 * MIB);
}

#[test]
fn resize_through_a_stack_and_where_it_cannot_be() {
    let daemon = idle();
    let mut qmp = daemon.qmp();
    qmp.ok("blockdev-add", json!({"driver": "file", "node-name": "f", "filename": "a.img"}));
    qmp.ok("blockdev-add", json!({"driver": "raw", "node-name": "r", "file": "f"}));
    qmp.ok("block_resize", json!({"node-name": "r", "size": 2 * MIB}));
    assert_eq!(std::fs::metadata(daemon.path("a.img")).unwrap().len(), 2 * MIB);
    assert_eq!(node(&mut qmp, "r")["image"]["virtual-size"], 2 * MIB);
    qmp.ok("blockdev-add", json!({"driver": "raw", "node-name": "w", "file": "f", "size": MIB}));
    assert_eq!(
        qmp.refused("block_resize", json!({"node-name": "w", "size": 4096})),
        "Cannot resize fixed-size raw disks"
    );
    qmp.ok("blockdev-add", json!({"driver": "null-co", "node-name": "n", "size": MIB}));
    let text = qmp.refused("block_resize", json!({"node-name": "n", "size": 4096}));
    assert_eq!(text, "Image format driver does not support resize");
    qmp.ok("blockdev-add", json!({"driver": "file", "node-name": "ro", "filename": "a.img", "read-only": true}));
    qmp.refused("block_resize", json!({"node-name": "ro", "size": 4096}));
}

#[test]
fn unmap_goes_through_a_stack_only_when_every_node_allows_it() {
    for (below, above, freed) in [("unmap", "unmap", true), ("ignore", "unmap", false), ("unmap", "ignore", false)] {
        let daemon = idle();
        let mut qmp = daemon.qmp();
        let file = json!({"driver": "file", "node-name": "f", "filename": "a.img", "discard": below});
        qmp.ok("blockdev-add", file);
        qmp.ok("blockdev-add", json!({"driver": "raw", "node-name": "r", "file": "f", "discard": above}));
        export(&mut qmp, "r");
        let (mut client, _) = daemon.nbd().open("r", Headers::Structured);
        assert_eq!(client.write(0, 0, &vec![1; 1 << 20]), 0);
        assert_eq!(client.simple(cmd::TRIM, 0, 0, MIB), 0);
        let left = allocated(&daemon.path("a.img"));
        assert_eq!(left < MIB / 2, freed, "{below} below, {above} above: {left} bytes allocated");
    }
}

/// A loop device over a file, freed when it goes out of scope.
struct Loop(String);

impl Loop {
    fn over(path: &std::path::Path) -> Option<Self> {
        let found = tools::run("losetup", ["--find", "--show", &path.to_string_lossy()]);
        found.status.success().then(|| Self(found.stdout.trim().to_owned()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        tools::run("losetup", ["--detach", &self.0]);
    }
}

#[test]
fn a_block_device() {
    let daemon = idle();
    let Some(device) = Loop::over(&daemon.path("a.img")) else {
        skip!("no loop devices here (not root?)");
    };
    let mut qmp = daemon.qmp();
    for direct in [false, true] {
        qmp.ok(
            "blockdev-add",
            json!({"driver": "host_device", "node-name": "d", "filename": device.0, "discard": "unmap", "cache": {"direct": direct}}),
        );
        assert_eq!(node(&mut qmp, "d")["image"]["virtual-size"], MIB);
        export(&mut qmp, "d");
        tools::qemu_io(
            &daemon.uri("d"),
            &[
                "write -P 3 0 1M",
                "write -P 4 1000 100",
                "write -z 64k 64k",
                "discard 128k 128k",
                "write -z -u 512k 64k",
                "flush",
            ],
        );
        let out = tools::qemu_io(
            &daemon.uri("d"),
            &[
                "read -P 3 0 1000",
                "read -P 4 1000 100",
                "read -P 0 64k 192k",
                "read -P 3 256k 256k",
                "read -P 0 512k 64k",
            ],
        );
        assert!(!out.contains("verification failed"), "{out}");
        // A block device has the size that it has; the same or a smaller one is granted without a change.
        let text = qmp.refused("block_resize", json!({"node-name": "d", "size": 2 * MIB}));
        assert!(!text.is_empty());
        qmp.ok("block-export-del", json!({"id": "exp-d", "mode": "hard"}));
        qmp.event("BLOCK_EXPORT_DELETED");
        qmp.ok("blockdev-del", json!({"node-name": "d"}));
    }
}
