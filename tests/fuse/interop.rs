//! Programs that use files use it as one.

use std::fs;
use std::path::Path;

use tests::image::{Noise, allocated, contents};
use tests::tools::{installed, ok, run};
use tests::{Daemon, known_defect, skip};

use crate::{MIB, Mounted, qcow2, raw};

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// A file with data and holes in the daemon's directory.
fn sparse(daemon: &Daemon, name: &str, size: u64) -> String {
    let path = daemon.path(name);
    let file = fs::File::create(&path).unwrap();
    file.set_len(size).unwrap();
    let mut noise = Noise::new(9);
    for at in [0, 1 << 20, (3 << 20) + 4096, size - 8192] {
        std::os::unix::fs::FileExt::write_all_at(&file, &noise.bytes(8192), at).unwrap();
    }
    text(&path)
}

#[test]
fn qemu_img_converts_onto_it_and_from_it() {
    for setup in [raw(8 * MIB), qcow2(8 * MIB)] {
        let Some(mounted) = Mounted::start(setup, ",writable=on,growable=on") else { skip!("no FUSE here") };
        let source = sparse(&mounted.daemon, "source", 6 * MIB + 512);
        ok("qemu-img", ["convert", "-n", "-f", "raw", "-O", "raw", &source, &mounted.name()]);
        let back = text(&mounted.daemon.path("back"));
        ok("qemu-img", ["convert", "-f", "raw", "-O", "qcow2", &mounted.name(), &back]);
        ok("qemu-img", ["resize", "-f", "raw", "--shrink", &mounted.name(), &(6 * MIB + 512).to_string()]);
        ok("qemu-img", ["compare", "-f", "raw", "-F", "raw", &source, &mounted.name()]);
        ok("qemu-img", ["check", &back]);
        let map = ok("qemu-img", ["map", "-f", "raw", "--output=json", &mounted.name()]);
        assert!(map.contains("\"data\": false"), "holes are seen: {map}");
        if known_defect("a qcow2 image as the export does not grow by less than a sector") {
            return;
        }
        // A format on the file: its metadata grow the image.
        ok("qemu-img", ["create", "-q", "-f", "qcow2", &mounted.name(), "64M"]);
        ok("qemu-io", ["-f", "qcow2", "-c", "write -P 7 1M 3M", "-c", "flush", &mounted.name()]);
        ok("qemu-io", ["-f", "qcow2", "-c", "read -P 7 1M 3M", "-c", "read -P 0 0 1M", &mounted.name()]);
        ok("qemu-img", ["check", "-f", "qcow2", &mounted.name()]);
    }
}

#[test]
fn coreutils_copy_it_sparsely() {
    let Some(mounted) = Mounted::start(raw(8 * MIB), ",writable=on") else { skip!("no FUSE here") };
    let source = sparse(&mounted.daemon, "source", 8 * MIB);
    ok("dd", [&format!("if={source}"), &format!("of={}", mounted.name()), "bs=64k", "conv=notrunc,fsync"]);
    let all = contents(Path::new(&source));
    assert!(contents(&mounted.path()) == all);
    ok("dd", [&format!("if={source}"), &format!("of={}", mounted.name()), "bs=4k", "oflag=direct", "conv=notrunc"]);
    let copy = mounted.daemon.path("copy");
    ok("fallocate", ["--dig-holes", &mounted.name()]);
    ok("cp", ["--sparse=auto", &mounted.name(), &text(&copy)]);
    assert!(contents(&copy) == all);
    assert!(allocated(&copy) < 2 * MIB, "{} bytes are allocated", allocated(&copy));
    assert!(allocated(&mounted.daemon.path("a.img")) < 2 * MIB, "the holes reached the image");
    ok("cmp", [&mounted.name(), &source]);
    ok("sha256sum", [mounted.name()]);
}

#[test]
fn a_file_system_is_made_and_checked_on_it() {
    if !installed("mkfs.ext4") {
        skip!("no mkfs.ext4");
    }
    for setup in [raw(32 * MIB), qcow2(32 * MIB)] {
        let Some(mounted) = Mounted::start(setup, ",writable=on") else { skip!("no FUSE here") };
        let tree = mounted.daemon.path("tree");
        fs::create_dir(&tree).unwrap();
        fs::write(tree.join("file"), Noise::new(4).bytes(3 << 20)).unwrap();
        ok("mkfs.ext4", ["-q", "-F", "-d", &text(&tree), &mounted.name()]);
        ok("e2fsck", ["-f", "-n", &mounted.name()]);
        let dumped = mounted.daemon.path("dumped");
        ok("debugfs", ["-R", &format!("dump file {}", text(&dumped)), &mounted.name()]);
        assert!(contents(&dumped) == contents(&tree.join("file")));
    }
}

#[test]
fn a_loop_device_carries_a_mounted_file_system() {
    let Some(mounted) = Mounted::start(raw(32 * MIB), ",writable=on") else { skip!("no FUSE here") };
    if !installed("mkfs.ext4") {
        skip!("no mkfs.ext4");
    }
    ok("mkfs.ext4", ["-q", "-F", &mounted.name()]);
    let place = mounted.daemon.path("fs");
    fs::create_dir(&place).unwrap();
    let attached = run("mount", ["-o", "loop", &mounted.name(), &text(&place)]);
    if !attached.status.success() {
        skip!("no loop mounts here: {}", attached.stderr.trim());
    }
    let data = Noise::new(5).bytes(5 << 20);
    fs::write(place.join("file"), &data).unwrap();
    let read = fs::read(place.join("file")).unwrap();
    ok("umount", [text(&place)]);
    assert!(read == data);
    ok("e2fsck", ["-f", "-n", &mounted.name()]);
    ok("e2fsck", ["-f", "-n", &text(&mounted.daemon.path("a.img"))]);
}

#[test]
fn fio_verifies_what_it_wrote() {
    if !installed("fio") {
        skip!("no fio");
    }
    for (engine, direct) in [("psync", "0"), ("libaio", "1"), ("io_uring", "1"), ("mmap", "0")] {
        if direct == "1" && known_defect("what is written at once past the page cache gets mixed up") {
            continue;
        }
        if engine == "mmap" && known_defect("what is written at once through a mapping gets mixed up") {
            continue;
        }
        let Some(mounted) = Mounted::start(raw(8 * MIB), ",writable=on") else { skip!("no FUSE here") };
        let args = [
            "--name=v".to_owned(),
            format!("--filename={}", mounted.name()),
            format!("--ioengine={engine}"),
            format!("--direct={direct}"),
            "--rw=randrw".to_owned(),
            "--bsrange=4k-64k".to_owned(),
            "--size=8m".to_owned(),
            "--iodepth=16".to_owned(),
            "--verify=crc32c".to_owned(),
            "--verify_fatal=1".to_owned(),
            "--allow_file_create=0".to_owned(),
        ];
        ok("fio", args);
    }
}
