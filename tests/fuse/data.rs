//! Bytes: reads, writes, the end of the file, holes.

use std::fs;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek};
use tests::image::{Noise, contents};
use tests::{known_defect, on_reference, skip};

use crate::{MIB, Mounted, qcow2, raw};

#[test]
fn what_is_written_is_in_the_image_and_what_is_in_the_image_is_read() {
    let Some(mounted) = Mounted::start(raw(4 * MIB), ",writable=on") else { skip!("no FUSE here") };
    let file = mounted.open();
    let mut noise = Noise::new(1);
    let all = noise.bytes(3 << 20);
    file.write_all_at(&all, 512).unwrap();
    file.write_all_at(b"odd", 12345).unwrap();
    file.sync_all().unwrap();
    let image = contents(&mounted.daemon.path("a.img"));
    assert_eq!(image.len(), 4 << 20);
    assert!(image[12345..].starts_with(b"odd"));
    assert!(image[512..12345] == all[..12345 - 512]);
    assert!(image[12348..512 + all.len()] == all[12348 - 512..]);
    assert!(fs::read(mounted.path()).unwrap() == image);
    let mut piece = [0; 1000];
    file.read_exact_at(&mut piece, 12000).unwrap();
    assert!(piece[..] == image[12000..13000]);
}

#[test]
fn a_file_that_does_not_grow_ends_where_it_ends() {
    for setup in [raw(MIB), qcow2(MIB)] {
        let Some(mounted) = Mounted::start(setup, ",writable=on") else { skip!("no FUSE here") };
        let file = mounted.open();
        assert_eq!(file.write_at(&[7; 4096], MIB - 100).unwrap(), 100, "what there is room for");
        let error = file.write_at(&[7; 512], MIB).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::EIO as i32));
        assert_eq!(file.read_at(&mut [0; 4096], MIB - 100).unwrap(), 100);
        assert_eq!(file.read_at(&mut [0; 512], MIB).unwrap(), 0);
        assert_eq!(file.read_at(&mut [0; 512], MIB + 12345).unwrap(), 0);
        assert_eq!(fs::metadata(mounted.path()).unwrap().len(), MIB);
    }
}

#[test]
fn a_growable_file_grows() {
    for setup in [raw(MIB), qcow2(MIB)] {
        let Some(mounted) = Mounted::start(setup, ",writable=on,growable=on") else { skip!("no FUSE here") };
        let file = mounted.open();
        file.write_all_at(&[7; 8192], MIB - 4096).unwrap();
        assert_eq!(file.metadata().unwrap().len(), MIB + 4096);
        file.write_all_at(&[8; 512], 3 * MIB).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 3 * MIB + 512);
        let mut gap = vec![1; 4096];
        file.read_exact_at(&mut gap, 2 * MIB).unwrap();
        assert!(gap.iter().all(|byte| *byte == 0));
        file.set_len(MIB / 2).unwrap();
        assert_eq!(file.metadata().unwrap().len(), MIB / 2);
        file.set_len(MIB).unwrap();
        file.read_exact_at(&mut gap, MIB - 4096).unwrap();
        assert!(gap.iter().all(|byte| *byte == 0), "what was cut off does not come back");
    }
}

#[test]
fn a_length_that_the_format_cannot_have_is_refused_and_nothing_changes() {
    let Some(mounted) = Mounted::start(qcow2(MIB), ",writable=on,growable=on") else { skip!("no FUSE here") };
    let file = mounted.open();
    assert_eq!(file.set_len(1000).unwrap_err().raw_os_error(), Some(Errno::EINVAL as i32));
    assert_eq!(file.metadata().unwrap().len(), MIB);
    if on_reference() {
        return;
    }
    // Growing by a write goes on to the end of the sector.
    file.write_all_at(&[1; 100], MIB + 512).unwrap();
    assert_eq!(file.metadata().unwrap().len(), MIB + 1024);
}

#[test]
fn holes_are_found_punched_and_filled() {
    let Some(mounted) = Mounted::start(raw(MIB), ",writable=on") else { skip!("no FUSE here") };
    let file = mounted.open();
    let seek = |at, whence| lseek(&file, at, whence).map_err(|errno| errno as i32);
    assert_eq!(seek(0, Whence::SeekData), Err(Errno::ENXIO as i32));
    assert_eq!(seek(4096, Whence::SeekHole), Ok(4096));
    file.write_all_at(&[1; 65536], 262_144).unwrap();
    assert_eq!(seek(0, Whence::SeekData), Ok(262_144));
    assert_eq!(seek(262_144, Whence::SeekHole), Ok(327_680));
    assert_eq!(seek(270_000, Whence::SeekData), Ok(270_000));
    let end = i64::try_from(MIB).unwrap();
    assert_eq!(seek(end, Whence::SeekHole), Ok(end));
    assert_eq!(seek(end + 1, Whence::SeekHole), Err(Errno::ENXIO as i32));
    assert_eq!(seek(end, Whence::SeekData), Err(Errno::ENXIO as i32));

    let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&file, hole, 262_144, 32768).unwrap();
    assert_eq!(seek(0, Whence::SeekData), Ok(294_912));
    fallocate(&file, hole, 262_144, 4 << 20).unwrap();
    assert_eq!(seek(0, Whence::SeekData), Err(Errno::ENXIO as i32), "up to the end of the file");
    assert_eq!(fallocate(&file, hole, end + 4096, 4096), Err(Errno::EIO));
    assert_eq!(file.metadata().unwrap().len(), MIB);

    file.write_all_at(&[1; 65536], 0).unwrap();
    fallocate(&file, FallocateFlags::FALLOC_FL_ZERO_RANGE, 100, 1000).unwrap();
    let mut start = [1; 1200];
    file.read_exact_at(&mut start, 0).unwrap();
    assert!(start[..100].iter().chain(&start[1100..]).all(|b| *b == 1) && start[100..1100].iter().all(|b| *b == 0));
    let keep = FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&file, keep, end - 4096, 8192).unwrap();
    assert_eq!(file.metadata().unwrap().len(), MIB);
    fallocate(&file, FallocateFlags::FALLOC_FL_ZERO_RANGE, end - 4096, 8192).unwrap();
    assert_eq!(file.metadata().unwrap().len(), MIB + 4096, "also of a file that does not grow by writing");
}

#[test]
fn space_can_only_be_had_behind_the_end() {
    let Some(mounted) = Mounted::start(raw(MIB), ",writable=on") else { skip!("no FUSE here") };
    let file = mounted.open();
    let end = i64::try_from(MIB).unwrap();
    let none = FallocateFlags::empty();
    assert_eq!(fallocate(&file, none, 0, 4096), Err(Errno::ENOTSUP));
    assert_eq!(fallocate(&file, none, end - 4096, 8192), Err(Errno::ENOTSUP));
    assert_eq!(fallocate(&file, FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, 4096), Err(Errno::ENOTSUP));
    assert_eq!(fallocate(&file, FallocateFlags::FALLOC_FL_COLLAPSE_RANGE, 0, 4096), Err(Errno::ENOTSUP));
    fallocate(&file, none, end, 65536).unwrap();
    assert_eq!(file.metadata().unwrap().len(), MIB + 65536);
    let image = mounted.daemon.path("a.img");
    assert!(tests::image::allocated(&image) >= 65536, "it is there, not only promised");
}

#[test]
fn a_shared_mapping_is_written_back() {
    let Some(mounted) = Mounted::start(raw(MIB), ",writable=on") else { skip!("no FUSE here") };
    let script = "
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
with mmap.mmap(fd, 65536, mmap.MAP_SHARED) as m:
    m[0:5] = b'hello'
    m[8000:8004] = b'page'
    m.flush()
    assert os.pread(fd, 5, 0) == b'hello'
    m[9000:9005] = b'later'
os.pwrite(fd, b'direct', 20000)
with mmap.mmap(fd, 65536, mmap.MAP_SHARED) as m:
    assert m[20000:20006] == b'direct' and m[8000:8004] == b'page'
os.fsync(fd)
";
    tests::tools::ok("python3", ["-c", script, &mounted.name()]);
    let image = contents(&mounted.daemon.path("a.img"));
    for (at, text) in [(0, "hello"), (8000, "page"), (9000, "later"), (20000, "direct")] {
        assert!(image[at..].starts_with(text.as_bytes()), "{text}");
    }
}

#[test]
fn a_resize_by_a_command_is_seen_at_once() {
    let Some(mounted) = Mounted::start(raw(MIB), ",writable=on") else { skip!("no FUSE here") };
    let file = mounted.open();
    assert_eq!(file.metadata().unwrap().len(), MIB);
    let mut qmp = mounted.daemon.qmp();
    qmp.execute("block_resize", serde_json::json!({"node-name": "f", "size": 2 * MIB})).unwrap();
    if known_defect("X7") {
        return;
    }
    // The kernel would show what it knows for a second; it is told that it knows no more.
    tests::wait_for("the new length", || (file.metadata().unwrap().len() == 2 * MIB).then_some(()));
    file.write_all_at(b"there", 2 * MIB - 5).unwrap();
}
