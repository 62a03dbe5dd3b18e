//! `blkdebug` [drop-in A.7]: which requests fail, after which events, in which state; limits; the file with rules.

use serde_json::{Value, json};
use tests::nbd::{Headers, cmd};
use tests::{Daemon, Setup, on_reference, tools};

use crate::MIB;

const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;

fn idle() -> Daemon {
    Setup::new().qmp().nbd_server().start()
}

fn blkdebug(more: Value) -> Value {
    let mut json = json!({
        "driver": "blkdebug", "node-name": "d", "discard": "unmap", "image": { "driver": "null-co", "size": MIB, "read-zeroes": true }
    });
    json.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    json
}

/// A daemon that exports a `raw` node over a `blkdebug` node with these options.
fn serving(more: Value) -> Daemon {
    let daemon = idle();
    let mut qmp = daemon.qmp();
    qmp.ok("blockdev-add", blkdebug(more));
    qmp.ok("blockdev-add", json!({ "driver": "raw", "node-name": "top", "file": "d", "discard": "unmap" }));
    qmp.ok("block-export-add", json!({ "type": "nbd", "id": "e", "node-name": "top", "writable": true }));
    daemon
}

/// The errors of requests, each on a connection of its own, for the reference ends some of those on which a read fails.
fn errors(daemon: &Daemon, requests: &[(u16, u64)]) -> Vec<u32> {
    let one = |&(command, at): &(u16, u64)| {
        let (mut client, _) = daemon.nbd().open("top", Headers::Simple);
        match command {
            cmd::WRITE => client.write(at, 0, &[7; 512]),
            cmd::FLUSH => client.simple(cmd::FLUSH, 0, 0, 0),
            _ => client.simple(command, 0, at, 512),
        }
    };
    requests.iter().map(one).collect()
}

const READ: (u16, u64) = (cmd::READ, 0);
const WRITE: (u16, u64) = (cmd::WRITE, 0);
const ZERO: (u16, u64) = (cmd::WRITE_ZEROES, 0);
const TRIM: (u16, u64) = (cmd::TRIM, 0);
const FLUSH: (u16, u64) = (cmd::FLUSH, 0);

#[test]
fn rules_from_the_start() {
    let all = [READ, WRITE, ZERO, TRIM, FLUSH];
    for (rule, want) in [
        (json!({ "event": "none" }), [EIO; 5]),
        (json!({ "event": "none", "errno": 28 }), [ENOSPC; 5]),
        (json!({ "event": "none", "errno": 0 }), [0; 5]),
        (json!({ "event": "none", "state": 2 }), [0; 5]),
        (json!({ "event": "none", "state": 1, "iotype": "read" }), [EIO, 0, 0, 0, 0]),
        (json!({ "event": "none", "iotype": "write" }), [0, EIO, 0, 0, 0]),
        (json!({ "event": "none", "iotype": "write-zeroes" }), [0, 0, EIO, 0, 0]),
        (json!({ "event": "none", "iotype": "discard", "immediately": true }), [0, 0, 0, EIO, 0]),
        (json!({ "event": "none", "iotype": "flush" }), [0, 0, 0, 0, EIO]),
        (json!({ "event": "none", "once": true }), [EIO, 0, 0, 0, 0]),
        (json!({ "event": "none", "sector": 0, "iotype": "write" }), [0, EIO, 0, 0, 0]),
        (json!({ "event": "none", "sector": 1 }), [0; 5]),
    ] {
        let daemon = serving(json!({ "inject-error": [rule] }));
        assert_eq!(errors(&daemon, &all), want, "{rule}");
    }
}

#[test]
fn rules_from_an_event_on() {
    for (options, requests, want) in [
        // The read itself raises the event and fails with it; the rule stays in force.
        (json!({ "inject-error": [{ "event": "read_aio" }] }), vec![WRITE, READ, WRITE], vec![0, EIO, EIO]),
        (
            json!({ "inject-error": [{ "event": "pwritev", "once": true }] }),
            vec![READ, WRITE, WRITE, READ],
            vec![0, EIO, 0, 0],
        ),
        (
            json!({ "inject-error": [{ "event": "pwritev_zero", "iotype": "write-zeroes" }] }),
            vec![WRITE, ZERO, WRITE, READ],
            vec![0, EIO, 0, 0],
        ),
        (
            json!({ "inject-error": [{ "event": "flush_to_disk", "once": true }] }),
            vec![WRITE, FLUSH, WRITE],
            vec![0, EIO, 0],
        ),
        (
            json!({
                "set-state": [{ "event": "write_aio", "new_state": 2 }, { "event": "flush_to_os", "state": 2, "new_state": 3 }],
                "inject-error": [{ "event": "read_aio", "state": 3, "iotype": "read" }],
            }),
            vec![READ, WRITE, READ, FLUSH, READ, WRITE],
            vec![0, 0, 0, 0, EIO, 0],
        ),
        // A rule that comes into force takes the place of those before.
        (
            json!({ "inject-error": [{ "event": "none", "iotype": "read" }, { "event": "write_aio", "iotype": "flush" }] }),
            vec![READ, WRITE, READ, FLUSH],
            vec![EIO, 0, 0, EIO],
        ),
    ] {
        let daemon = serving(options.clone());
        assert_eq!(errors(&daemon, &requests), want, "{options}");
    }
}

#[test]
fn rules_from_a_file() {
    let daemon = idle();
    let config = daemon.path("rules");
    let mut qmp = daemon.qmp();
    for (text, want) in [
        ("[inject-error]\nevent = \"foo\"\n", "invalid parameter value: foo"),
        ("[inject-error]\nerrno = \"5\"\n", "Missing event name for rule"),
        ("[nix]\n", "There is no option group 'nix'"),
        ("garbage\n", "no group defined"),
        ("[set-state]\nevent=\"none\"\n", "Invalid parameter 'event=\"none\"'"),
        ("[inject-error]\nevent = \"none\"\nfoo = \"5\"\n", "Invalid parameter 'foo'"),
        ("[inject-error]\nevent = \"none\"\nerrno = \"x\"\n", "Parameter 'errno' expects a number"),
        ("[inject-error]\nevent = \"none\"\nonce = \"x\"\n", "Parameter 'once' expects 'on' or 'off'"),
    ] {
        std::fs::write(&config, text).unwrap();
        assert_eq!(qmp.refused("blockdev-add", blkdebug(json!({ "config": config }))), want);
    }
    let missing = blkdebug(json!({ "config": daemon.path("missing") }));
    let text = "Could not read blkdebug config file: No such file or directory";
    assert_eq!(qmp.refused("blockdev-add", missing), text);
    let text = "# comment\n\n[inject-error]\n  event = \"read_aio\"\nstate = \"1\"\nerrno = \"28\"\nonce = \"on\"\n\
                [set-state \"x\"]\nevent = \"write_aio\"\nnew_state = \"7\"\n";
    let daemon = idle();
    std::fs::write(daemon.path("rules"), text).unwrap();
    let mut qmp = daemon.qmp();
    qmp.ok("blockdev-add", blkdebug(json!({ "config": daemon.path("rules") })));
    qmp.ok("blockdev-add", json!({ "driver": "raw", "node-name": "top", "file": "d" }));
    qmp.ok("block-export-add", json!({ "type": "nbd", "id": "e", "node-name": "top", "writable": true }));
    assert_eq!(errors(&daemon, &[READ, READ, WRITE, READ]), [ENOSPC, 0, 0, 0]);
}

#[test]
fn limits_are_checked() {
    let daemon = idle();
    let mut qmp = daemon.qmp();
    for (options, text) in [
        (json!({ "align": 3 }), "Cannot meet constraints with align 3"),
        (json!({ "align": 1_u64 << 31 }), "Cannot meet constraints with align 2147483648"),
        (json!({ "align": -1 }), "Value '-1' is out of range for parameter 'align'"),
        (json!({ "align": 512, "max-transfer": 1000 }), "Cannot meet constraints with max-transfer 1000"),
        (json!({ "max-transfer": -1 }), "Value '-1' is out of range for parameter 'max-transfer'"),
        (json!({ "max-transfer": 1_u64 << 31 }), "Parameter 'max-transfer' expects int32_t"),
        (json!({ "align": 512, "opt-write-zero": 100 }), "Cannot meet constraints with opt-write-zero 100"),
        (json!({ "opt-write-zero": 4096, "max-write-zero": 1024 }), "Cannot meet constraints with max-write-zero 1024"),
        (json!({ "align": 512, "opt-discard": 100 }), "Cannot meet constraints with opt-discard 100"),
        (json!({ "opt-discard": 4096, "max-discard": 1024 }), "Cannot meet constraints with max-discard 1024"),
        (
            json!({ "inject-error": [{ "event": "foo" }] }),
            if on_reference() {
                "Parameter 'event' does not accept value 'foo'"
            } else {
                "Parameter 'inject-error[0].event' does not accept value 'foo'"
            },
        ),
    ] {
        assert_eq!(qmp.refused("blockdev-add", blkdebug(options.clone())), text, "{options}");
    }
    qmp.ok("blockdev-add", json!({ "driver": "null-co", "node-name": "ro", "read-only": true }));
    let takes = json!({ "image": "ro", "take-child-perms": ["write"] });
    assert_eq!(qmp.refused("blockdev-add", blkdebug(takes)), "Block node is read-only");
    // What one unshares nobody else gets.
    qmp.ok("blockdev-add", json!({ "driver": "null-co", "node-name": "n", "size": MIB }));
    qmp.ok("blockdev-add", blkdebug(json!({ "image": "n", "unshare-child-perms": ["write"] })));
    let export = json!({ "type": "nbd", "id": "e", "node-name": "n", "writable": true });
    let text = qmp.refused("block-export-add", export);
    assert!(text.contains("permissions 'write' are both required by"), "{text}");
}

/// Requests that do not fit are made to fit: the data are right whatever the limits.
#[test]
fn data_survive_narrow_limits() {
    let daemon = Setup::new().qmp().nbd_server().image("a.img", MIB).start();
    let mut qmp = daemon.qmp();
    let options = json!({
        "align": 4096, "max-transfer": 8192, "opt-write-zero": 16384, "max-write-zero": 32768, "opt-discard": 8192,
        "max-discard": 16384,
        "image": { "driver": "file", "filename": daemon.path("a.img") }
    });
    qmp.ok("blockdev-add", blkdebug(options));
    qmp.ok("blockdev-add", json!({ "driver": "raw", "node-name": "top", "file": "d", "discard": "unmap" }));
    qmp.ok("block-export-add", json!({ "type": "nbd", "id": "e", "node-name": "top", "writable": true }));
    let uri = daemon.uri("top");
    tests::tools::qemu_io(
        &uri,
        &[
            "write -P 1 0 1M",
            "write -P 2 4096 100000",
            "write -z 20480 60000",
            "read -P 0 20480 60000",
            "read -P 2 4096 16384",
            "read -P 2 80480 23616",
            "read -P 1 104096 900000",
            "read -P 1 0 4096",
        ],
    );
    let (mut client, _) = daemon.nbd().open("top", Headers::Simple);
    assert!([0, EINVAL].contains(&client.write(100, 0, &[9; 100])));
}

/// How many of the `commands` fail when requests fail from `event` on, of a new image with clusters of 512 bytes.
fn failures(event: &str, compressed: bool, commands: &[&str], resize: Option<u64>) -> usize {
    let mut daemon = idle();
    let path = daemon.path("image").display().to_string();
    tools::ok("qemu-img", ["create", "-q", "-f", "qcow2", "-o", "cluster_size=512", &path, "64M"]);
    let mut qmp = daemon.qmp();
    let file = json!({ "driver": "file", "filename": path });
    let rule = json!({ "event": event, "errno": 28 });
    let debug = json!({ "driver": "blkdebug", "image": file, "inject-error": [rule] });
    let image = json!({ "driver": "qcow2", "node-name": "image", "file": debug });
    let driver = if compressed { "compress" } else { "raw" };
    qmp.ok("blockdev-add", image);
    qmp.ok("blockdev-add", json!({ "driver": driver, "node-name": "top", "file": "image" }));
    qmp.ok("block-export-add", json!({ "type": "nbd", "id": "e", "node-name": "top", "writable": true }));
    let failed = commands.iter().filter(|command| {
        let ended = tools::qemu_io_try(&daemon.uri("top"), &[**command]);
        !ended.status.success() || ended.stdout.contains("failed")
    });
    let mut failed = failed.count();
    if let Some(size) = resize {
        qmp.ok("block-export-del", json!({ "id": "e", "mode": "hard" }));
        qmp.event("BLOCK_EXPORT_DELETED");
        failed += usize::from(qmp.execute("block_resize", json!({ "node-name": "image", "size": size })).is_err());
    }
    daemon.stop();
    failed
}

/// The steps of a refcount table that outgrows its place, and those of compressed writes.
#[test]
fn qcow2_tells_how_it_grows() {
    let growth = ["write 0 200k", "flush", "write 1M 9M", "flush"];
    for event in [
        "refblock_update_part",
        "refblock_alloc",
        "refblock_alloc_write",
        "refblock_alloc_hookup",
        "reftable_grow",
        "refblock_alloc_write_blocks",
        "refblock_alloc_write_table",
        "refblock_alloc_switch_table",
    ] {
        assert!(failures(event, false, &growth, None) > 0, "{event}: nothing failed");
    }
    for event in ["cluster_alloc_bytes", "write_compressed", "l2_update_compressed"] {
        assert!(failures(event, true, &["write -P 1 0 8k", "flush"], None) > 0, "{event}: nothing failed");
    }
}

/// Steps that there are none of here: see differences.md.
#[test]
fn steps_that_only_the_reference_takes() {
    for (event, reference) in [
        ("vmstate_load", false),
        ("vmstate_save", false),
        ("empty_image_prepare", false),
        ("cluster_alloc_space", true),
        ("l1_shrink_write_table", true),
        ("l1_shrink_free_l2_clusters", true),
    ] {
        let failed = failures(event, false, &["write 100 300", "write 0 200k", "flush"], Some(MIB));
        assert_eq!(failed > 0, reference && on_reference(), "{event}: {failed}");
    }
}

/// An error at each step that qcow2 names: the request fails or is made good later, and the image is never damaged.
#[test]
fn qcow2_tells_what_it_does() {
    // On the way of these operations; the events of a load need an image that is opened with data in it.
    let write = ["write -P 1 0 200k", "write -P 2 1M 1k", "flush"];
    let events = [
        "l2_load",
        "l2_update",
        "l2_alloc_write",
        "l1_update",
        "refblock_load",
        "refblock_update",
        "cluster_alloc",
        "write_aio",
        "cow_read",
        "read_aio",
    ];
    for event in events {
        let mut daemon = idle();
        let path = daemon.path("image").display().to_string();
        tools::ok("qemu-img", ["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", &path, "8M"]);
        tools::ok("qemu-io", ["-f", "qcow2", "-c", "write -P 9 0 6M", &path]);
        // Written again: a snapshot makes all tables and clusters to be copied.
        tools::ok("qemu-img", ["snapshot", "-c", "one", &path]);
        let mut qmp = daemon.qmp();
        let rule = json!({ "event": event, "once": true });
        let file = json!({ "driver": "file", "filename": path });
        let debug = json!({ "driver": "blkdebug", "image": file, "inject-error": [rule] });
        qmp.ok("blockdev-add", json!({ "driver": "qcow2", "node-name": "top", "file": debug }));
        qmp.ok("block-export-add", json!({ "type": "nbd", "id": "e", "node-name": "top", "writable": true }));
        let failed = write.iter().chain(&["read -P 9 4M 1M"]).filter(|command| {
            let ended = tools::qemu_io_try(&daemon.uri("top"), &[**command]);
            !ended.status.success() || ended.stdout.contains("failed")
        });
        let failed = failed.count();
        // The reference keeps more in memory until its end than this daemon does.
        assert!(failed > 0 || on_reference(), "{event}: nothing failed");
        daemon.stop();
        let check = tools::run("qemu-img", ["check", "-f", "qcow2", &path]);
        let code = check.status.code();
        assert!(matches!(code, Some(0 | 3)), "{event}: {code:?} {}{}", check.stdout, check.stderr);
    }
}
