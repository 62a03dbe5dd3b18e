//! How exports come and go.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, umount2};
use nix::sys::signal::Signal;
use serde_json::json;
use tests::qmp::Client;
use tests::{Setup, known_defect, on_reference, skip};

use crate::{MIB, Mounted, is_mounted, raw, says_gone};

fn is_empty_file(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|found| found.is_file() && found.len() == 0)
}

#[test]
fn every_orderly_end_unmounts() {
    for signal in [Some(Signal::SIGTERM), Some(Signal::SIGINT), Some(Signal::SIGHUP), None] {
        let Some(mut mounted) = Mounted::start(raw(MIB), ",writable=on") else { skip!("no FUSE here") };
        assert!(is_mounted(&mounted.path()));
        // Somebody still has it open.
        let file = mounted.open();
        file.write_all_at(b"kept", 4096).unwrap();
        match signal {
            Some(signal) => mounted.daemon.signal(signal),
            None => drop(mounted.daemon.qmp().execute("quit", json!({}))),
        }
        assert!(mounted.daemon.wait().success());
        assert!(!is_mounted(&mounted.path()) && is_empty_file(&mounted.path()));
        let error = file.read_at(&mut [0; 10], 0).unwrap_err();
        assert!(says_gone(&error), "{error}");
        assert!(fs::read(mounted.daemon.path("a.img")).unwrap()[4096..].starts_with(b"kept"));
    }
}

#[test]
fn an_export_is_deleted_while_it_is_open() {
    for mode in ["safe", "hard"] {
        let Some(mounted) = Mounted::start(raw(MIB), ",writable=on") else { skip!("no FUSE here") };
        let file = mounted.open();
        let mut qmp = mounted.daemon.qmp();
        qmp.execute("block-export-del", json!({"id": "e", "mode": mode})).unwrap();
        assert_eq!(qmp.event("BLOCK_EXPORT_DELETED")["id"], "e");
        assert!(!is_mounted(&mounted.path()), "with the reply it is gone");
        let error = file.read_at(&mut [0; 10], 0).unwrap_err();
        assert!(says_gone(&error), "{error}");
        assert_eq!(qmp.execute("query-block-exports", json!({})).unwrap(), json!([]));
        // The place and the node are free again.
        let again = json!({"type": "fuse", "id": "e", "node-name": "f", "mountpoint": "mnt"});
        qmp.execute("block-export-add", again).unwrap();
        assert_eq!(fs::metadata(mounted.path()).unwrap().len(), MIB);
        qmp.execute("block-export-del", json!({"id": "e"})).unwrap();
        qmp.execute("blockdev-del", json!({"node-name": "f"})).unwrap();
    }
}

#[test]
fn a_killed_daemon_leaves_a_mount_that_says_so() {
    let Some(mut mounted) = Mounted::start(raw(MIB), "") else { skip!("no FUSE here") };
    let mut file = File::open(mounted.path()).unwrap();
    mounted.daemon.crash();
    for error in [file.read(&mut [0; 10]).unwrap_err(), File::open(mounted.path()).unwrap_err()] {
        let aborted = error.raw_os_error() == Some(Errno::ECONNABORTED as i32);
        assert!(says_gone(&error) || aborted, "{error}");
    }
    // A daemon that comes after it finds that it cannot use the place, and leaves it to whoever knows what it was.
    let args = format!("--export fuse,id=e,node-name=f,mountpoint={}", mounted.name());
    let ended = raw(MIB).line(&args).run();
    assert!(!ended.status.success());
    let expected = format!("Failed to stat '{}': ", mounted.name());
    assert!(ended.stderr.contains(&expected), "{}", ended.stderr);
    umount2(&mounted.path(), MntFlags::MNT_DETACH).unwrap();
    assert!(is_empty_file(&mounted.path()));
    let mut next = raw(MIB).line(&args).start();
    assert_eq!(fs::metadata(mounted.path()).unwrap().len(), MIB);
    next.stop();
    assert!(!is_mounted(&mounted.path()));
}

/// An export whose reads wait until [`let_go`]; none where there is no FUSE.
fn holding() -> Option<Mounted> {
    let setup = Setup::new()
        .image("a.img", MIB)
        .line("--object throttle-group,id=g,x-iops-total=1")
        .line("--blockdev file,node-name=p,filename=a.img")
        .line("--blockdev throttle,node-name=f,file=p,throttle-group=g");
    Mounted::start(setup, "")
}

fn let_go(qmp: &mut Client) {
    qmp.ok("qom-set", json!({"path": "/objects/g", "property": "limits", "value": {"iops-total": 0}}));
}

/// A program that reads the file, and waits for the second of its requests.
fn held_reader(mounted: &Mounted, qmp: &mut Client) -> std::process::Child {
    let command = ["if=".to_owned() + &mounted.name(), "of=/dev/null".to_owned(), "bs=4k".to_owned()];
    let reader = std::process::Command::new("dd").args(command).stderr(std::process::Stdio::null()).spawn().unwrap();
    tests::wait_for("a request to wait for its turn", || {
        let stats = qmp.ok("query-blockstats", json!({"query-nodes": true}));
        stats
            .as_array()
            .unwrap()
            .iter()
            .any(|one| one["node-name"] == "p" && one["stats"]["rd_operations"] == 1)
            .then_some(())
    });
    reader
}

/// A program is killed while it waits for the image: it goes when its request is done, and nothing of it stays behind.
#[test]
fn a_reader_that_is_killed_holds_nobody_up() {
    if on_reference() {
        skip!("its nodes do not tell how many requests they have");
    }
    let Some(mounted) = holding() else { skip!("no FUSE here") };
    let mut qmp = mounted.daemon.qmp();
    let mut reader = held_reader(&mounted, &mut qmp);
    reader.kill().unwrap();
    let_go(&mut qmp);
    assert!(!reader.wait().unwrap().success());
    assert_eq!(fs::read(mounted.path()).unwrap().len(), usize::try_from(MIB).unwrap());
    umount2(&mounted.path(), MntFlags::empty()).unwrap_or_else(|error| panic!("something still uses it: {error}"));
}

/// A signal that a program handles, while it waits: the kernel asks for the request to be interrupted, which goes on to its end.
#[test]
fn a_signal_leaves_a_request_whole() {
    if on_reference() {
        skip!("its nodes do not tell how many requests they have");
    }
    let Some(mounted) = holding() else { skip!("no FUSE here") };
    let mut qmp = mounted.daemon.qmp();
    let mut reader = held_reader(&mounted, &mut qmp);
    let pid = nix::unistd::Pid::from_raw(i32::try_from(reader.id()).unwrap());
    for _ in 0..3 {
        nix::sys::signal::kill(pid, Signal::SIGUSR1).unwrap();
    }
    let_go(&mut qmp);
    assert!(reader.wait().unwrap().success(), "all was read");
}

/// The connection is cut by force while a request is in the daemon, and nobody wants its reply any more.
#[test]
fn an_export_whose_connection_is_cut_ends() {
    if on_reference() {
        skip!("an export whose mount has gone stays there, and its nodes do not tell how many requests they have");
    }
    let Some(mut mounted) = holding() else { skip!("no FUSE here") };
    let mut qmp = mounted.daemon.qmp();
    let mut reader = held_reader(&mounted, &mut qmp);
    // It is in use, but that is known only after what waits was sent away.
    let cut = umount2(&mounted.path(), MntFlags::MNT_FORCE);
    assert!(matches!(cut, Ok(()) | Err(Errno::EBUSY)), "{cut:?}");
    assert!(!reader.wait().unwrap().success());
    let_go(&mut qmp);
    assert_eq!(qmp.event("BLOCK_EXPORT_DELETED")["id"], "e");
    assert!(!is_mounted(&mounted.path()));
    assert_eq!(qmp.ok("query-block-exports", json!({})), json!([]));
    drop(qmp);
    mounted.daemon.stop();
}

/// An administrator forbids writing for a while.
#[test]
fn a_mount_is_changed_while_it_is_served() {
    let Some(mut mounted) = Mounted::start(raw(MIB), ",writable=on") else { skip!("no FUSE here") };
    let remount = |flags: MsFlags| {
        let none: Option<&str> = None;
        nix::mount::mount(none, &mounted.path(), none, MsFlags::MS_REMOUNT | MsFlags::MS_BIND | flags, none)
    };
    if remount(MsFlags::MS_RDONLY) == Err(Errno::EPERM) {
        skip!("only root changes mounts");
    }
    let error = fs::OpenOptions::new().write(true).open(mounted.path()).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(Errno::EROFS as i32));
    assert_eq!(fs::read(mounted.path()).unwrap().len(), 1 << 20);
    remount(MsFlags::empty()).unwrap();
    mounted.open().write_all_at(b"again", 0).unwrap();
    mounted.daemon.stop();
    assert!(!is_mounted(&mounted.path()));
    assert!(fs::read(mounted.daemon.path("a.img")).unwrap().starts_with(b"again"));
}

#[test]
fn an_export_that_somebody_else_unmounts_ends() {
    let Some(mut mounted) = Mounted::start(raw(MIB), "") else { skip!("no FUSE here") };
    if known_defect("an export whose mount has gone stays, and nobody can use it") {
        return;
    }
    let mut qmp = mounted.daemon.qmp();
    umount2(&mounted.path(), MntFlags::empty()).unwrap();
    assert_eq!(qmp.event("BLOCK_EXPORT_DELETED")["id"], "e");
    assert_eq!(qmp.execute("query-block-exports", json!({})).unwrap(), json!([]));
    assert!(mounted.daemon.alive());
    drop(qmp);
    mounted.daemon.stop();
}

/// Somebody unmounts a file that a program has open, so that the export goes on, and uses the place for something else.
#[test]
fn an_end_leaves_what_others_have_mounted_meanwhile() {
    let Some(mut mounted) = Mounted::start(raw(MIB), ",writable=on") else { skip!("no FUSE here") };
    if known_defect("the end of an export takes away what is mounted there, whatever it is") {
        return;
    }
    let file = mounted.open();
    umount2(&mounted.path(), MntFlags::MNT_DETACH).unwrap();
    file.write_all_at(b"still there", 0).unwrap();
    let args = format!("--export fuse,id=e,node-name=f,mountpoint={}", mounted.name());
    let mut next = raw(2 * MIB).line(&args).start();
    mounted.daemon.qmp().execute("block-export-del", json!({"id": "e"})).unwrap();
    assert!(says_gone(&file.read_at(&mut [0; 10], 0).unwrap_err()));
    assert_eq!(fs::read(mounted.path()).unwrap().len(), 2 << 20, "the other daemon's");
    next.stop();
    assert!(is_empty_file(&mounted.path()));
    mounted.daemon.stop();
}

#[test]
fn an_image_is_exported_over_itself() {
    let Some(mounted) = Mounted::start(raw(MIB), "") else { skip!("no FUSE here") };
    let mut qmp = mounted.daemon.qmp();
    let over = json!({"type": "fuse", "id": "o", "node-name": "f", "mountpoint": "a.img", "writable": true});
    qmp.execute("block-export-add", over).unwrap();
    let image = mounted.daemon.path("a.img");
    assert!(is_mounted(&image));
    let file = fs::OpenOptions::new().read(true).write(true).open(&image).unwrap();
    file.write_all_at(b"through", 100).unwrap();
    drop(file);
    assert!(fs::read(mounted.path()).unwrap()[100..].starts_with(b"through"));
    qmp.execute("block-export-del", json!({"id": "o"})).unwrap();
    assert!(!is_mounted(&image));
    assert!(fs::read(&image).unwrap()[100..].starts_with(b"through"));
}

#[test]
fn nodes_change_under_requests() {
    let Some(mounted) = Mounted::start(raw(MIB), ",writable=on") else { skip!("no FUSE here") };
    let file = mounted.open();
    let going = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(true));
    let worker = {
        let going = std::sync::Arc::clone(&going);
        std::thread::spawn(move || {
            let mut round = 0u64;
            while going.load(std::sync::atomic::Ordering::SeqCst) {
                let at = round % 200 * 4096;
                file.write_all_at(&round.to_le_bytes(), at).unwrap();
                let mut got = [0; 8];
                file.read_exact_at(&mut got, at).unwrap();
                assert_eq!(u64::from_le_bytes(got), round);
                round += 1;
            }
            round
        })
    };
    let mut qmp = mounted.daemon.qmp();
    for round in 0..50 {
        let size = MIB + (round % 7) * 65536;
        qmp.execute("block_resize", json!({"node-name": "f", "size": size})).unwrap();
    }
    going.store(false, std::sync::atomic::Ordering::SeqCst);
    assert!(worker.join().unwrap() > 0);
}
