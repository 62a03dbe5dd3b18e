//! Options, and what is wrong with them.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use serde_json::{Value, json};
use tests::{known_defect, on_reference, skip};

use crate::{MIB, Mounted, raw};

#[test]
fn what_is_no_regular_file_is_no_mount_point() {
    let Some(mounted) = Mounted::start(raw(MIB), "") else { skip!("no FUSE here") };
    fs::create_dir(mounted.daemon.path("dir")).unwrap();
    File::create(mounted.daemon.path("other")).unwrap();
    let mut qmp = mounted.daemon.qmp();
    let mut refused = |more: Value| {
        let mut args = json!({"type": "fuse", "id": "x", "node-name": "f", "mountpoint": "other"});
        args.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        qmp.execute("block-export-add", args).unwrap_err().desc
    };
    assert_eq!(refused(json!({"mountpoint": "none"})), "Failed to stat 'none': No such file or directory");
    assert_eq!(refused(json!({"mountpoint": ""})), "Failed to stat '': No such file or directory");
    assert_eq!(refused(json!({"mountpoint": "dir"})), "'dir' is not a regular file");
    assert_eq!(refused(json!({"mountpoint": "/dev/null"})), "'/dev/null' is not a regular file");
    assert_eq!(refused(json!({"mountpoint": "mnt"})), "There already is a FUSE export on 'mnt'");
    assert_eq!(refused(json!({"id": "e"})), "Block export id 'e' is already in use");
    assert_eq!(refused(json!({"iothread": "t"})), "iothread \"t\" not found");
    if known_defect("the same file under another name: the reference waits for itself, for ever") {
        return;
    }
    let other = mounted.daemon.path(".").join("mnt").display().to_string();
    assert_eq!(refused(json!({"mountpoint": other})), format!("There already is a FUSE export on '{other}'"));
    std::os::unix::fs::symlink("mnt", mounted.daemon.path("link")).unwrap();
    assert_eq!(refused(json!({"mountpoint": "link"})), "There already is a FUSE export on 'link'");
    let passed = refused(json!({"mountpoint": "/dev/fd/1"}));
    assert!(passed.starts_with("Cannot use '/dev/fd/1' for a FUSE export: "), "{passed}");
    let exports = qmp.execute("query-block-exports", json!({})).unwrap();
    assert_eq!(exports.as_array().unwrap().len(), 1);
}

#[test]
fn a_read_only_node_is_not_exported_as_writable() {
    let setup = raw(MIB).line("--blockdev raw,node-name=r,file=f,read-only=on");
    let Some(mounted) = Mounted::start(setup, "") else { skip!("no FUSE here") };
    File::create(mounted.daemon.path("other")).unwrap();
    let mut qmp = mounted.daemon.qmp();
    let args = json!({"type": "fuse", "id": "x", "node-name": "r", "mountpoint": "other", "writable": true});
    let error = qmp.execute("block-export-add", args).unwrap_err();
    assert_eq!(error.desc, "Cannot export read-only node as writable");
}

#[test]
fn the_kernel_is_told_what_the_export_can() {
    for (options, access) in [("", "ro"), (",writable=on", "rw")] {
        let Some(mounted) = Mounted::start(raw(MIB), options) else { skip!("no FUSE here") };
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let ours = mounts.lines().find(|line| line.contains(&mounted.name())).unwrap();
        for option in ["nosuid", "nodev", "default_permissions", "allow_other"] {
            assert!(ours.contains(option), "{ours}");
        }
        if !on_reference() {
            let list = ours.split(' ').nth(3).unwrap();
            assert!(list.split(',').any(|option| option == access), "{ours}");
            assert!(ours.contains("noatime") && ours.contains("max_read=1048576"), "{ours}");
        }
    }
}

#[test]
fn an_export_runs_on_the_threads_that_it_is_given() {
    if on_reference() {
        skip!("the reference has no lists of threads");
    }
    let setup = raw(MIB).line("--object iothread,id=t0 --object iothread,id=t1");
    let Some(mut mounted) = Mounted::start(setup, ",writable=on,iothread.0=t0,iothread.1=t1") else {
        skip!("no FUSE here")
    };
    let file = mounted.open();
    file.write_all_at(b"x", 0).unwrap();
    let mut qmp = mounted.daemon.qmp();
    // A thread lives as long as it is used, whatever becomes of the object.
    qmp.execute("object-del", json!({"id": "t0"})).unwrap();
    file.write_all_at(b"y", 1).unwrap();
    qmp.execute("block-export-del", json!({"id": "e"})).unwrap();
    qmp.execute("object-del", json!({"id": "t1"})).unwrap();
    drop(qmp);
    mounted.daemon.stop();
}

/// Whoever starts the daemon mounts, and the daemon needs no privilege for it.
#[test]
fn a_device_that_was_passed_is_used() {
    if on_reference() || !nix::unistd::getuid().is_root() {
        skip!("needs our daemon, and root to mount");
    }
    let Ok(device) = File::options().read(true).write(true).open("/dev/fuse") else { skip!("no FUSE here") };
    let number = std::os::fd::AsRawFd::as_raw_fd(&device);
    let setup = raw(MIB).image("mnt", 0);
    let place = setup.path("mnt");
    let data = format!("fd={number},rootmode=100000,user_id=0,group_id=0,default_permissions,allow_other");
    let flags = nix::mount::MsFlags::empty();
    nix::mount::mount(Some("/dev/fuse"), &place, Some("fuse"), flags, Some(data.as_str())).unwrap();
    let mut daemon = setup
        .inherit(device.into())
        .qmp()
        .line(&format!("--export fuse,id=e,node-name=f,writable=on,mountpoint=/dev/fd/{number}"))
        .start();
    let file = File::options().read(true).write(true).open(&place).unwrap();
    file.write_all_at(b"passed", 512).unwrap();
    let mut qmp = daemon.qmp();
    let twice = json!({"type": "fuse", "id": "x", "node-name": "f", "mountpoint": format!("/dev/fd/{number}")});
    let refused = qmp.execute("block-export-add", twice).unwrap_err();
    assert!(refused.desc.contains("was not passed to this process, or is in use already"), "{refused:?}");
    qmp.execute("block-export-del", json!({"id": "e"})).unwrap();
    assert!(file.read_at(&mut [0; 10], 0).is_err(), "the connection has ended");
    nix::mount::umount2(&place, nix::mount::MntFlags::MNT_DETACH).unwrap();
    drop(qmp);
    daemon.stop();
    assert!(fs::read(daemon.path("a.img")).unwrap()[512..].starts_with(b"passed"));
}
