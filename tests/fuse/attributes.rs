//! What stat(2) shows, and what can be changed of it.

use std::fs::{self, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown};

use nix::errno::Errno;
use nix::sys::stat::utimes;
use nix::sys::time::TimeVal;
use tests::skip;

use crate::{MIB, Mounted, raw};

fn errno(result: std::io::Result<()>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

#[test]
fn it_is_a_regular_file_of_the_daemons_user() {
    for (options, mode) in [("", 0o100_400), (",writable=on", 0o100_600)] {
        let Some(mounted) = Mounted::start(raw(MIB), options) else { skip!("no FUSE here") };
        let image = mounted.daemon.path("a.img");
        fs::OpenOptions::new().write(true).open(&image).unwrap().write_all_at(b"x", 0).unwrap();
        let shown = fs::metadata(mounted.path()).unwrap();
        assert_eq!((shown.mode(), shown.ino(), shown.nlink(), shown.len()), (mode, 1, 1, MIB));
        assert_eq!(shown.uid(), nix::unistd::getuid().as_raw());
        assert_eq!(shown.blocks() * 512, tests::image::allocated(&image));
        assert_eq!(errno(fs::metadata(mounted.path().join("x")).map(drop)), Some(Errno::ENOTDIR as i32));
        let size = nix::sys::statvfs::statvfs(&mounted.path()).unwrap();
        assert_eq!(size.name_max(), 255);
    }
}

#[test]
fn mode_and_owner_can_be_changed_where_others_have_access() {
    let Some(mounted) = Mounted::start(raw(MIB), ",writable=on") else { skip!("no FUSE here") };
    let path = mounted.path();
    for mode in [0o644, 0o4755, 0o000, 0o600] {
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode(), 0o100_000 | mode);
    }
    if nix::unistd::getuid().is_root() {
        chown(&path, Some(5), Some(6)).unwrap();
        let shown = fs::metadata(&path).unwrap();
        assert_eq!((shown.uid(), shown.gid()), (5, 6));
    }
    let now = TimeVal::new(1, 0);
    assert_eq!(utimes(&path, &now, &now), Err(Errno::ENOTSUP));
}

#[test]
fn without_others_nothing_can_be_given_to_them() {
    let Some(mounted) = Mounted::start(raw(MIB), ",writable=on,allow-other=off") else { skip!("no FUSE here") };
    let path = mounted.path();
    assert_eq!(errno(fs::set_permissions(&path, Permissions::from_mode(0o644))), Some(Errno::EPERM as i32));
    fs::set_permissions(&path, Permissions::from_mode(0o400)).unwrap();
    if nix::unistd::getuid().is_root() {
        assert_eq!(errno(chown(&path, Some(5), None)), Some(Errno::ENOTSUP as i32));
    }
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let ours = mounts.lines().find(|line| line.contains(&mounted.name())).unwrap();
    assert!(!ours.contains("allow_other"), "{ours}");
}

#[test]
fn a_read_only_export_stays_as_it_is() {
    let Some(mounted) = Mounted::start(raw(MIB), "") else { skip!("no FUSE here") };
    let path = mounted.path();
    assert_eq!(errno(fs::set_permissions(&path, Permissions::from_mode(0o600))), Some(Errno::EROFS as i32));
    let shorter = nix::unistd::truncate(&path, 0).unwrap_err();
    assert!([Errno::EROFS, Errno::EACCES].contains(&shorter), "{shorter}");
    assert_eq!(fs::metadata(&path).unwrap().mode(), 0o100_400);
    assert_eq!(fs::read(&path).unwrap().len(), 1 << 20);
}
