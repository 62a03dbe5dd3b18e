//! Image locks: the exact bytes, and this daemon and qemu-img and qemu-io keeping each other out [drop-in A.5].

use std::collections::BTreeSet;

use serde_json::{Value, json};
use tests::locks::read_locked_bytes;
use tests::tools::{qemu_io_try, run};

use crate::{export, idle};

/// The bytes on which the daemon holds locks after these commands.
fn locked(commands: &[(&str, Value)]) -> BTreeSet<u64> {
    let daemon = idle();
    let mut qmp = daemon.qmp();
    for (command, arguments) in commands {
        qmp.ok(command, arguments.clone());
    }
    read_locked_bytes(&daemon.path("a.img"))
}

fn file(options: Value) -> (&'static str, Value) {
    let mut arguments = json!({"driver": "file", "node-name": "f", "filename": "a.img"});
    arguments.as_object_mut().unwrap().extend(options.as_object().unwrap().clone());
    ("blockdev-add", arguments)
}

fn raw() -> (&'static str, Value) {
    ("blockdev-add", json!({"driver": "raw", "node-name": "r", "file": "f"}))
}

fn exported(node: &str, writable: bool) -> (&'static str, Value) {
    ("block-export-add", json!({"type": "nbd", "id": "e", "node-name": node, "writable": writable}))
}

#[test]
fn the_bytes() {
    assert_eq!(locked(&[file(json!({}))]), [].into(), "a node that nobody uses");
    assert_eq!(locked(&[file(json!({})), exported("f", false)]), [100, 203].into(), "read by an export");
    assert_eq!(locked(&[file(json!({})), exported("f", true)]), [100, 101, 203].into(), "written by an export");
    assert_eq!(locked(&[file(json!({"read-only": true})), exported("f", false)]), [100, 203].into(), "read-only");
    let off = json!({"locking": "off"});
    assert_eq!(locked(&[file(off), exported("f", true)]), [].into(), "locking=off");
    let on = json!({"locking": "on"});
    assert_eq!(locked(&[file(on), exported("f", true)]), [100, 101, 203].into(), "locking=on");
}

#[test]
fn the_bytes_below_raw() {
    assert_eq!(locked(&[file(json!({})), raw()]), [].into(), "a stack that nobody uses");
    assert_eq!(locked(&[file(json!({})), raw(), exported("r", false)]), [100, 203].into(), "read by an export");
    assert_eq!(locked(&[file(json!({})), raw(), exported("r", true)]), [100, 101, 203].into(), "written by an export");
    let shared = json!({"driver": "raw", "node-name": "r", "read-only": true, "force-share": true,
        "file": {"driver": "file", "filename": "a.img"}});
    assert_eq!(locked(&[("blockdev-add", shared), exported("r", false)]), [100].into(), "force-share");
}

#[test]
fn locks_go_with_the_export_and_the_node() {
    let daemon = idle();
    let mut qmp = daemon.qmp();
    let (command, arguments) = file(json!({}));
    qmp.ok(command, arguments);
    export(&mut qmp, "f");
    assert_eq!(read_locked_bytes(&daemon.path("a.img")), [100, 101, 203].into());
    qmp.ok("block-export-del", json!({"id": "exp-f"}));
    qmp.event("BLOCK_EXPORT_DELETED");
    assert_eq!(read_locked_bytes(&daemon.path("a.img")), [].into());
    qmp.ok("blockdev-del", json!({"node-name": "f"}));
    assert_eq!(read_locked_bytes(&daemon.path("a.img")), [].into());
}

#[test]
fn others_are_kept_out_of_an_image_in_use() {
    let daemon = idle();
    let mut qmp = daemon.qmp();
    let (command, arguments) = file(json!({}));
    qmp.ok(command, arguments);
    export(&mut qmp, "f");
    let image = daemon.path("a.img").to_string_lossy().into_owned();
    // A raw image may have several writers, so a writer with a format is what must stay out: it shares nothing.
    let blocked = run("qemu-img", ["resize", "-f", "raw", &image, "2M"]);
    assert!(!blocked.status.success(), "{}", blocked.stdout);
    assert!(blocked.stderr.contains("Failed to get \"resize\" lock"), "{}", blocked.stderr);
    let reads = run("qemu-img", ["info", "-U", &image]);
    assert!(reads.status.success(), "{}", reads.stderr);
    let writes = qemu_io_try(&image, &["write 0 512"]);
    // qemu-io shares writes with others, as the export does.
    let reader = run("qemu-io", ["-r", "-f", "raw", "-c", "read 0 512", &image]);
    let text = format!("{} {}", writes.stderr, reader.stderr);
    assert!(writes.status.success() == reader.status.success(), "{text}");
}

#[test]
fn an_image_in_use_by_others_is_refused() {
    let daemon = idle();
    let mut qmp = daemon.qmp();
    // A qemu-nbd with a qcow2 in the file shares nothing: the strictest other user there is.
    let image = daemon.path("q.qcow2").to_string_lossy().into_owned();
    tests::tools::ok("qemu-img", ["create", "-q", "-f", "qcow2", &image, "1M"]);
    let Some(reference) = tests::program::reference() else {
        tests::skip!("no reference program is installed");
    };
    let other = tests::Setup::of(&reference)
        .arg("--blockdev")
        .arg(format!("qcow2,node-name=q,file.driver=file,file.filename={image}"))
        .nbd_server()
        .line("--export nbd,id=e,node-name=q,writable=on")
        .start();
    assert_eq!(read_locked_bytes(&daemon.path("q.qcow2")), [100, 101, 103, 201, 203].into());
    qmp.ok("blockdev-add", json!({"driver": "file", "node-name": "f", "filename": image}));
    let (command, arguments) = exported("f", true);
    let text = qmp.refused(command, arguments);
    assert_eq!(text, "Failed to get \"write\" lock");
    // Nothing of the failed export is left.
    assert_eq!(read_locked_bytes(&daemon.path("q.qcow2")), [100, 101, 103, 201, 203].into());
    assert_eq!(qmp.ok("query-block-exports", json!({})), json!([]));
    drop(other);
    let (command, arguments) = exported("f", true);
    qmp.ok(command, arguments);
}

#[test]
fn two_daemons_on_one_image() {
    let daemon = idle();
    let mut qmp = daemon.qmp();
    let (command, arguments) = file(json!({}));
    qmp.ok(command, arguments);
    export(&mut qmp, "f");
    let second = idle();
    let mut other = second.qmp();
    other.ok("blockdev-add", json!({"driver": "file", "node-name": "f", "filename": daemon.path("a.img")}));
    // Both share reading and writing of raw images; neither shares a resize.
    export(&mut other, "f");
    let text = other.refused("block_resize", json!({"node-name": "f", "size": 4096}));
    assert!(text.contains("resize"), "{text}");
    assert_eq!(std::fs::metadata(daemon.path("a.img")).unwrap().len(), crate::MIB);
}
