//! A daemon without privilege, for which `fusermount3` mounts.
//!
//! It runs in a mount namespace of its own, with its own `/etc/fuse.conf` and a `/dev/fuse` that everybody may open, as systems have it:
//! so the machine's do not matter, and nothing is left behind.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use nix::errno::Errno;
use nix::unistd::{Gid, Uid, chown};
use serde_json::json;
use tests::tools::{installed, ok, run};
use tests::{Daemon, Setup, skip};

use crate::{MIB, raw};

/// Whom nothing belongs to.
const NOBODY: u32 = 65534;

/// Why the tests cannot run here.
fn missing() -> Option<&'static str> {
    if !nix::unistd::getuid().is_root() {
        return Some("needs root, to become somebody without privilege");
    }
    if File::open("/dev/fuse").is_err() {
        return Some("no FUSE here");
    }
    let programs = ["fusermount3", "setpriv", "unshare", "nsenter"];
    if !programs.iter().all(|name| installed(name)) {
        return Some("needs fusermount3, setpriv, unshare and nsenter");
    }
    let namespaces = run("unshare", ["-m", "mount", "--bind", "/dev/null", "/etc/fuse.conf"]);
    (!namespaces.status.success()).then_some("no mount namespaces, or no /etc/fuse.conf")
}

/// A daemon of nobody with the export `e`, whose `/etc/fuse.conf` says `conf`.
fn setup(conf: &str, options: &str) -> Setup {
    let setup = raw(MIB).image("mnt", 0);
    fs::write(setup.path("fuse.conf"), conf).unwrap();
    for name in [".", "a.img", "mnt"] {
        chown(&setup.path(name), Some(Uid::from_raw(NOBODY)), Some(Gid::from_raw(NOBODY))).unwrap();
    }
    let inner = format!(
        "mount --bind fuse.conf /etc/fuse.conf && mkdir dev && mount -t tmpfs none dev && \
         mknod -m 666 dev/fuse c 10 229 && mount --bind dev/fuse /dev/fuse && \
         exec setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups -- \"$@\""
    );
    setup
        .limit(&format!("exec unshare -m /bin/sh -c '{inner}' sh \"$@\""))
        .qmp()
        .line(&format!("--export fuse,id=e,node-name=f,mountpoint=mnt,writable=on{options}"))
}

/// The line of the mount in the daemon's namespace.
fn mount_of(daemon: &Daemon) -> Option<String> {
    let wanted = daemon.path("mnt").display().to_string();
    let mounts = fs::read_to_string(format!("/proc/{}/mounts", daemon.pid())).unwrap();
    mounts.lines().find(|line| line.split(' ').nth(1) == Some(&wanted)).map(str::to_owned)
}

/// The file as it is seen there.
fn path(daemon: &Daemon) -> PathBuf {
    let inside = daemon.path("mnt");
    PathBuf::from(format!("/proc/{}/root", daemon.pid())).join(inside.strip_prefix("/").unwrap())
}

/// Writes as the daemon's user, and finds it in the image.
fn its_user_can(daemon: &Daemon) {
    let script =
        format!("printf mine | dd of={} bs=512 seek=1 conv=notrunc,fsync status=none", daemon.path("mnt").display());
    let (pid, id) = (daemon.pid(), NOBODY);
    ok(
        "nsenter",
        [
            &format!("-t{pid}"),
            "-m",
            "setpriv",
            &format!("--reuid={id}"),
            &format!("--regid={id}"),
            "--clear-groups",
            "sh",
            "-c",
            &script,
        ],
    );
    assert!(fs::read(daemon.path("a.img")).unwrap()[512..].starts_with(b"mine"));
}

#[test]
fn fusermount_mounts_for_its_user_alone() {
    if let Some(why) = missing() {
        skip!("{why}");
    }
    for options in ["", ",allow-other=auto", ",allow-other=off"] {
        let mut daemon = setup("# nothing is allowed\n", options).start();
        let mount = mount_of(&daemon).expect("it is mounted");
        assert!(!mount.contains("allow_other") && mount.contains(&format!("user_id={NOBODY}")), "{mount}");
        assert_eq!(
            File::open(path(&daemon)).unwrap_err().raw_os_error(),
            Some(Errno::EACCES as i32),
            "not even for root"
        );
        its_user_can(&daemon);
        let mut qmp = daemon.qmp();
        qmp.ok("block-export-del", json!({"id": "e"}));
        qmp.event("BLOCK_EXPORT_DELETED");
        assert_eq!(mount_of(&daemon), None, "with the event it is gone");
        // The place is free, and the end of the daemon unmounts too.
        qmp.ok("block-export-add", json!({"type": "fuse", "id": "e", "node-name": "f", "mountpoint": "mnt"}));
        assert!(mount_of(&daemon).is_some());
        drop(qmp);
        daemon.stop();
    }
}

#[test]
fn others_are_let_in_where_the_machine_allows_it() {
    if let Some(why) = missing() {
        skip!("{why}");
    }
    for options in ["", ",allow-other=on"] {
        let mut daemon = setup("user_allow_other\n", options).start();
        let mount = mount_of(&daemon).expect("it is mounted");
        assert!(mount.contains("allow_other"), "{mount}");
        let file = File::options().read(true).write(true).open(path(&daemon)).unwrap();
        file.write_all_at(b"other", 100).unwrap();
        its_user_can(&daemon);
        drop(file);
        daemon.stop();
    }
    let ended = setup("# nothing is allowed\n", ",allow-other=on").run();
    assert!(!ended.status.success());
    let text = "Failed to mount FUSE session to export";
    assert!(ended.stderr.contains(text) && ended.stderr.contains("user_allow_other"), "{}", ended.stderr);
}

#[test]
fn what_is_not_its_users_is_not_mounted_on() {
    if let Some(why) = missing() {
        skip!("{why}");
    }
    let setup = setup("", "");
    chown(&setup.path("mnt"), Some(Uid::from_raw(0)), None).unwrap();
    let ended = setup.run();
    assert!(!ended.status.success());
    assert!(ended.stderr.contains("Failed to mount FUSE session to export"), "{}", ended.stderr);
}
