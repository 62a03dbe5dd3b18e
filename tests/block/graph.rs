//! Nodes that come, go, stack, and are refused.

use serde_json::json;

use crate::{MIB, export, idle, names, node};

#[test]
fn nodes_are_added_and_deleted() {
    let daemon = idle();
    let mut qmp = daemon.qmp();
    assert_eq!(qmp.ok("blockdev-add", json!({"driver": "file", "node-name": "f", "filename": "a.img"})), json!({}));
    qmp.ok("blockdev-add", json!({"driver": "raw", "node-name": "r", "file": "f"}));
    assert_eq!(names(&mut qmp), ["f", "r"]);
    assert_eq!(qmp.refused("blockdev-del", json!({"node-name": "f"})), "Block device f is in use");
    qmp.ok("blockdev-del", json!({"node-name": "r"}));
    qmp.ok("blockdev-del", json!({"node-name": "f"}));
    assert_eq!(names(&mut qmp), [""; 0]);
    assert_eq!(qmp.refused("blockdev-del", json!({"node-name": "f"})), "Failed to find node with node-name='f'");
}

#[test]
fn a_child_given_with_its_parent_goes_with_it() {
    let daemon = idle();
    let mut qmp = daemon.qmp();
    let both = json!({"driver": "raw", "node-name": "r", "file": {"driver": "file", "filename": "a.img"}});
    qmp.ok("blockdev-add", both);
    let all = names(&mut qmp);
    assert_eq!(all.len(), 2, "{all:?}");
    assert!(all[0].starts_with('#'), "a made-up name starts with #: {all:?}");
    qmp.ok("blockdev-del", json!({"node-name": "r"}));
    assert_eq!(names(&mut qmp), [""; 0]);
}

#[test]
fn a_named_child_stays_no_longer_than_its_parent_either() {
    let daemon = idle();
    let mut qmp = daemon.qmp();
    let child = json!({"driver": "file", "node-name": "f", "filename": "a.img"});
    qmp.ok("blockdev-add", json!({"driver": "raw", "node-name": "r", "file": child}));
    let text = qmp.refused("blockdev-del", json!({"node-name": "f"}));
    assert!(text.contains('f') && (text.contains("in use") || text.contains("not owned")), "{text}");
    qmp.ok("blockdev-del", json!({"node-name": "r"}));
    assert_eq!(names(&mut qmp), [""; 0]);
}

#[test]
fn names_that_are_refused() {
    let daemon = idle();
    let mut qmp = daemon.qmp();
    let mut add = |name: &str| {
        qmp.execute("blockdev-add", json!({"driver": "null-co", "node-name": name})).map_err(|refusal| refusal.desc)
    };
    add("n").unwrap();
    assert_eq!(add("n").unwrap_err(), "Duplicate nodes with node-name='n'");
    assert_eq!(add("").unwrap_err(), "Invalid node-name: ''");
    assert_eq!(add("1x").unwrap_err(), "Invalid node-name: '1x'");
    assert_eq!(add("a b").unwrap_err(), "Invalid node-name: 'a b'");
    assert_eq!(add("#block1").unwrap_err(), "Invalid node-name: '#block1'");
    add(&"x".repeat(31)).unwrap();
    assert_eq!(add(&"x".repeat(32)).unwrap_err(), "Node name too long");
    assert_eq!(
        qmp.refused("blockdev-add", json!({"driver": "null-co"})),
        "'node-name' must be specified for the root node"
    );
}

#[test]
fn nodes_do_not_stand_on_themselves() {
    let daemon = idle();
    let mut qmp = daemon.qmp();
    let text = qmp.refused("blockdev-add", json!({"driver": "raw", "node-name": "r", "file": "r"}));
    assert_eq!(text, "Cannot find device='r' nor node-name='r'");
    assert_eq!(names(&mut qmp), [""; 0]);
}

#[test]
fn a_failed_add_leaves_nothing() {
    let daemon = idle();
    let mut qmp = daemon.qmp();
    let before = daemon.open_fds();
    for arguments in [
        json!({"driver": "raw", "node-name": "r", "offset": 2 * MIB, "file": {"driver": "file", "filename": "a.img", "node-name": "f"}}),
        json!({"driver": "raw", "node-name": "r", "size": 2 * MIB, "file": {"driver": "file", "filename": "a.img"}}),
        json!({"driver": "raw", "node-name": "1", "file": {"driver": "file", "filename": "a.img", "node-name": "f"}}),
        json!({"driver": "file", "node-name": "f", "filename": "nosuch"}),
        json!({"driver": "file", "node-name": "f", "filename": ""}),
        json!({"driver": "host_device", "node-name": "f", "filename": "a.img"}),
        json!({"driver": "file", "node-name": "f", "filename": "a.img", "aio": "nosuch"}),
        json!({"driver": "file", "node-name": "f", "filename": "a.img", "force-share": true}),
        json!({"driver": "file", "node-name": "f", "filename": "a.img", "aio": "native"}),
    ] {
        qmp.refused("blockdev-add", arguments);
        assert_eq!(names(&mut qmp), [""; 0]);
    }
    assert_eq!(daemon.open_fds(), before);
    assert_eq!(tests::locks::read_locked_bytes(&daemon.path("a.img")), [].into());
}

#[test]
fn texts_of_failed_opens() {
    let daemon = idle();
    let mut qmp = daemon.qmp();
    let mut refused = |arguments| qmp.refused("blockdev-add", arguments);
    assert_eq!(
        refused(json!({"driver": "file", "node-name": "f", "filename": "nosuch"})),
        "Could not open 'nosuch': No such file or directory"
    );
    assert_eq!(
        refused(json!({"driver": "file", "node-name": "f", "filename": "a.img", "force-share": true})),
        "force-share=on can only be used with read-only images"
    );
    assert_eq!(
        refused(json!({"driver": "file", "node-name": "f", "filename": "a.img", "aio": "native"})),
        "aio=native was specified, but it requires cache.direct=on, which was not specified."
    );
    assert_eq!(
        refused(json!({"driver": "host_device", "node-name": "f", "filename": "a.img"})),
        "'host_device' driver requires 'a.img' to be either a character or block device"
    );
}

#[test]
fn common_options_are_shown() {
    let daemon = idle();
    let mut qmp = daemon.qmp();
    qmp.ok(
        "blockdev-add",
        json!({"driver": "file", "node-name": "f", "filename": "a.img", "read-only": true, "force-share": true,
            "cache": {"direct": true, "no-flush": true}, "discard": "unmap", "detect-zeroes": "on",
            "locking": "auto", "aio": "threads"}),
    );
    let shown = node(&mut qmp, "f");
    assert_eq!(shown["ro"], true);
    assert_eq!(shown["drv"], "file");
    assert_eq!(shown["cache"], json!({"direct": true, "no-flush": true, "writeback": true}));
    assert_eq!(shown["detect_zeroes"], "on");
    assert_eq!(shown["image"]["virtual-size"], MIB);
    assert_eq!(shown["image"]["format"], "file");
    assert_eq!(shown["file"], "a.img");
}

#[test]
fn options_reach_the_child_given_with_its_parent() {
    let daemon = idle();
    let mut qmp = daemon.qmp();
    qmp.ok(
        "blockdev-add",
        json!({"driver": "raw", "node-name": "r", "read-only": true, "cache": {"direct": true},
            "file": {"driver": "file", "node-name": "f", "filename": "a.img"}}),
    );
    let child = node(&mut qmp, "f");
    assert_eq!(child["ro"], true);
    assert_eq!(child["cache"]["direct"], true);
}

#[test]
fn every_engine_reads_and_writes() {
    for options in [
        json!({"aio": "threads"}),
        json!({"aio": "io_uring"}),
        json!({"aio": "threads", "cache": {"direct": true}}),
        json!({"aio": "native", "cache": {"direct": true}}),
        json!({"aio": "io_uring", "cache": {"direct": true}}),
    ] {
        let daemon = idle();
        let mut qmp = daemon.qmp();
        let mut arguments = json!({"driver": "file", "node-name": "f", "filename": "a.img"});
        arguments.as_object_mut().unwrap().extend(options.as_object().unwrap().clone());
        qmp.ok("blockdev-add", arguments);
        export(&mut qmp, "f");
        tests::tools::qemu_io(
            &daemon.uri("f"),
            &["write -P 9 4096 128k", "write -P 8 700 99", "flush", "discard 64k 64k"],
        );
        let out = tests::tools::qemu_io(&daemon.uri("f"), &["read -P 9 4k 60k", "read -P 8 700 99", "read -P 0 0 700"]);
        assert!(!out.contains("verification failed"), "{options}: {out}");
    }
}

#[test]
fn read_only_and_auto_read_only() {
    let daemon = idle();
    let mut qmp = daemon.qmp();
    qmp.ok("blockdev-add", json!({"driver": "file", "node-name": "ro", "filename": "a.img", "read-only": true}));
    let writable = json!({"type": "nbd", "id": "e", "node-name": "ro", "writable": true});
    assert_eq!(qmp.refused("block-export-add", writable), "Cannot export read-only node as writable");
    qmp.ok("blockdev-del", json!({"node-name": "ro"}));
    // The file itself cannot be written: by default an error, with auto-read-only a node that reads.
    let path = daemon.path("a.img");
    let immutable = tests::tools::run("chattr", ["+i", &path.to_string_lossy()]).status.success();
    if !immutable {
        tests::skip!("cannot make a file that root may not write (chattr +i)");
    }
    let plain = qmp.execute("blockdev-add", json!({"driver": "file", "node-name": "f", "filename": "a.img"}));
    let auto = qmp.execute(
        "blockdev-add",
        json!({"driver": "file", "node-name": "g", "filename": "a.img", "auto-read-only": true}),
    );
    tests::tools::ok("chattr", ["-i", &path.to_string_lossy()]);
    assert!(plain.unwrap_err().desc.starts_with("Could not open 'a.img': "));
    auto.unwrap();
    let writable = json!({"type": "nbd", "id": "e", "node-name": "g", "writable": true});
    // The file can be written again by now; the node decides when the export asks, so both answers are possible.
    let _ = qmp.execute("block-export-add", writable);
}

#[test]
fn raw_cuts_a_window() {
    let daemon = idle();
    let mut qmp = daemon.qmp();
    let image: Vec<u8> = (0..MIB).map(|at| (at / 512 % 251) as u8).collect();
    std::fs::write(daemon.path("a.img"), &image).unwrap();
    qmp.ok("blockdev-add", json!({"driver": "file", "node-name": "f", "filename": "a.img"}));
    let window = json!({"driver": "raw", "node-name": "w", "file": "f", "offset": 1024, "size": 4096});
    qmp.ok("blockdev-add", window);
    assert_eq!(node(&mut qmp, "w")["image"]["virtual-size"], 4096);
    export(&mut qmp, "w");
    let (mut client, info) = daemon.nbd().open("w", tests::nbd::Headers::Structured);
    assert_eq!(info.size, 4096);
    assert_eq!(client.read(0, 4096), image[1024..1024 + 4096]);
    assert_eq!(client.write(4000, 0, &[1; 96]), 0);
    assert_ne!(client.write(4000, 0, &[1; 97]), 0, "a write beyond the window");
    drop(client);
    let now = std::fs::read(daemon.path("a.img")).unwrap();
    assert_eq!(now[1024 + 4000..1024 + 4096], [1; 96]);
    assert!(now[..1024 + 4000] == image[..1024 + 4000] && now[1024 + 4096..] == image[1024 + 4096..]);
    let text = qmp
        .refused("blockdev-add", json!({"driver": "raw", "node-name": "x", "file": "f", "offset": 512, "size": MIB}));
    assert!(text.contains("The sum of offset (512) and size (1048576) has to be smaller or equal to the"), "{text}");
    let text =
        qmp.refused("blockdev-add", json!({"driver": "raw", "node-name": "x", "file": "f", "offset": MIB + 512}));
    assert!(text.contains("Offset") || text.contains("offset"), "{text}");
}

#[test]
fn null_nodes() {
    let daemon = idle();
    let mut qmp = daemon.qmp();
    for driver in ["null-co", "null-aio"] {
        qmp.ok("blockdev-add", json!({"driver": driver, "node-name": driver, "read-zeroes": true}));
        assert_eq!(node(&mut qmp, driver)["image"]["virtual-size"], 1 << 30);
        export(&mut qmp, driver);
        let (mut client, _) = daemon.nbd().open(driver, tests::nbd::Headers::Structured);
        assert_eq!(client.write(0, 0, &[1; 4096]), 0);
        assert_eq!(client.read(0, 4096), [0; 4096]);
        assert_eq!(client.simple(tests::nbd::cmd::FLUSH, 0, 0, 0), 0);
    }
    let text = qmp.refused("blockdev-add", json!({"driver": "null-co", "node-name": "x", "latency-ns": -1}));
    assert!(text.contains("latency-ns"), "{text}");
}

#[test]
fn a_deep_stack_and_many_nodes() {
    let daemon = idle();
    let mut qmp = daemon.qmp();
    qmp.ok("blockdev-add", json!({"driver": "null-co", "node-name": "n0", "size": MIB, "read-zeroes": true}));
    for depth in 1..50 {
        let arguments = json!({"driver": "raw", "node-name": format!("n{depth}"), "file": format!("n{}", depth - 1)});
        qmp.ok("blockdev-add", arguments);
    }
    export(&mut qmp, "n49");
    let (mut client, _) = daemon.nbd().open("n49", tests::nbd::Headers::Simple);
    assert_eq!(client.read(0, 512), [0; 512]);
    drop(client);
    tests::wait_for("the export to be out of use", || qmp.execute("block-export-del", json!({"id": "exp-n49"})).ok());
    qmp.event("BLOCK_EXPORT_DELETED");
    for depth in (0..50).rev() {
        qmp.ok("blockdev-del", json!({"node-name": format!("n{depth}")}));
    }
    assert_eq!(names(&mut qmp), [""; 0]);
}

#[test]
fn the_same_device_under_a_link_and_as_a_device() {
    let daemon = idle();
    let mut qmp = daemon.qmp();
    std::os::unix::fs::symlink("a.img", daemon.path("link")).unwrap();
    qmp.ok("blockdev-add", json!({"driver": "file", "node-name": "f", "filename": "link"}));
    assert_eq!(node(&mut qmp, "f")["file"], "link");
    let text = qmp.refused("blockdev-add", json!({"driver": "file", "node-name": "d", "filename": "/dev/null"}));
    assert_eq!(text, "'file' driver requires '/dev/null' to be a regular file");
}
