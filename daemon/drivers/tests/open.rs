//! Opening: what is refused, and with which text; permissions, locks and reopening.
#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::cast_possible_truncation, reason = "test code")]

mod common;

use block::driver::Prealloc;
use block::perm::Bits;
use block::{Errno, Perms, WriteFlags};
use buf::IoBuf;
use common::{READER, attach, descriptors, graph, has_direct, have, image, on_thread, options, refused, until, writer};
use io::RingUse;
use serde_json::json;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};

#[test]
fn texts_are_the_references() {
    let file = image(10 << 20);
    let path = file.path().to_str().unwrap().to_owned();
    let fifo = file.path().with_extension("fifo");
    let _keep = file.into_temp_path();
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let fifo_name = fifo.to_str().unwrap().to_owned();
    on_thread(RingUse::Off, move || async move {
        let mut g = graph();
        let raw = |more: serde_json::Value| {
            let mut json = json!({ "driver": "raw", "node-name": "r", "file": { "driver": "file", "filename": path } });
            json.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            json
        };
        let cases = [
            (json!({ "driver": "file", "filename": "" }), "The 'file' block driver requires a file name".to_owned()),
            (
                json!({ "driver": "file", "filename": "/nonexistent/x" }),
                "Could not open '/nonexistent/x': No such file or directory".into(),
            ),
            (json!({ "driver": "file", "filename": "/" }), "Could not open '/': Is a directory".into()),
            (
                json!({ "driver": "file", "filename": "/dev/null" }),
                "'file' driver requires '/dev/null' to be a regular file".into(),
            ),
            (
                json!({ "driver": "file", "filename": fifo_name, "read-only": true }),
                format!("'file' driver requires '{fifo_name}' to be a regular file"),
            ),
            (
                json!({ "driver": "host_device", "filename": path }),
                format!("'host_device' driver requires '{path}' to be either a character or block device"),
            ),
            (
                json!({ "driver": "file", "filename": path, "aio": "native" }),
                "aio=native was specified, but it requires cache.direct=on, which was not specified.".into(),
            ),
            (
                json!({ "driver": "file", "filename": path, "aio": "io_uring" }),
                "Unable to use linux io_uring: switched off".into(),
            ),
            (
                json!({ "driver": "file", "filename": "/proc/version", "read-only": true, "cache": { "direct": true } }),
                "Could not open '/proc/version': filesystem does not support O_DIRECT".into(),
            ),
            (
                raw(json!({ "offset": 99_999_999 })),
                "Offset (99999999) cannot be greater than size of the containing file (10485760)".into(),
            ),
            (
                raw(json!({ "offset": 512, "size": 99_999_999 })),
                "The sum of offset (512) and size (99999999) has to be smaller or equal to the  actual size of the \
                 containing file (10485760)"
                    .into(),
            ),
            (raw(json!({ "size": 1000 })), "Specified size is not multiple of 512".into()),
            (raw(json!({ "offset": -1 })), "Value '-1' is out of range for parameter 'offset'".into()),
            (json!({ "driver": "null-co", "latency-ns": u64::MAX }), "latency-ns is invalid".into()),
            (json!({ "driver": "null-co", "size": -1 }), "size is invalid".into()),
        ];
        for (mut json, want) in cases {
            json["node-name"] = "n".into();
            assert_eq!(refused(&mut g, &json).await, want);
        }
        assert_eq!(g.nodes().count(), 0);
        until(path.as_ref(), (0, 0)).await;
        let text = {
            g.add(&options(&raw(json!({ "size": 1024 })))).await.unwrap();
            let node = Arc::clone(g.get("r").unwrap());
            g.resize(&node, 2048).await.unwrap_err().to_string()
        };
        assert_eq!(text, "Cannot resize fixed-size raw disks");
    });
    std::fs::remove_file(fifo).unwrap();
}

#[test]
fn file_names_are_shown_as_the_reference_shows_them() {
    let file = image(4096);
    let path = file.path().to_str().unwrap().to_owned();
    on_thread(RingUse::Auto, move || async move {
        let mut g = graph();
        let mut shown = async |json: serde_json::Value| {
            let mut json = json;
            json["node-name"] = "n".into();
            let name = g.add(&options(&json)).await.unwrap().driver().filename();
            g.delete("n").await.unwrap();
            name
        };
        assert_eq!(shown(json!({ "driver": "null-co" })).await, "null-co://");
        let json = shown(json!({ "driver": "null-aio", "size": 1000, "read-zeroes": true })).await;
        let json: serde_json::Value = serde_json::from_str(json.strip_prefix("json:").unwrap()).unwrap();
        assert_eq!(json, json!({ "driver": "null-aio", "size": 1000, "read-zeroes": true }));
        let file = json!({ "driver": "file", "filename": path });
        assert_eq!(shown(file.clone()).await, path);
        assert_eq!(shown(json!({ "driver": "raw", "file": file })).await, path);
        let json = shown(json!({ "driver": "raw", "offset": 512, "size": 1024, "file": file })).await;
        let json: serde_json::Value = serde_json::from_str(json.strip_prefix("json:").unwrap()).unwrap();
        assert_eq!(json, json!({ "driver": "raw", "offset": 512, "size": 1024, "file": file }));
    });
}

#[test]
fn auto_read_only_opens_for_writing_while_there_is_a_writer() {
    let file = image(1 << 20);
    let path = file.path().to_owned();
    // The test's own handle is not one of the daemon's.
    let _keep = file.into_temp_path();
    on_thread(RingUse::Auto, move || async move {
        let mut g = graph();
        let json = json!({ "driver": "file", "node-name": "f", "filename": path, "auto-read-only": true });
        g.add(&options(&json)).await.unwrap();
        assert_eq!(descriptors(&path), (1, 0));
        let disk = attach(&mut g, "f", READER).await.unwrap();
        assert_eq!(descriptors(&path), (1, 0));
        let second = attach(&mut g, "f", writer()).await.unwrap();
        assert_eq!(descriptors(&path).1, 1);
        second.write(0, &IoBuf::copy_of(&[7; 512]), WriteFlags::NONE).await.unwrap();
        g.detach(second).await;
        until(&path, (1, 0)).await;
        let buf = IoBuf::alloc(512);
        disk.read(0, &buf).await.unwrap();
        assert_eq!(buf.to_vec(), [7; 512]);
        // A resize needs a writable file too, for as long as it takes.
        g.resize(&disk.node(), 4096).await.unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 4096);
        until(&path, (1, 0)).await;
        g.detach(disk).await;
        g.delete("f").await.unwrap();
        until(&path, (0, 0)).await;
    });
}

/// A child that is about to exec has copies of all descriptors, and with them of the locks: not both tests at a time.
static LOCKS: Mutex<()> = Mutex::new(());

#[test]
fn two_of_us_exclude_each_other_and_a_refused_user_leaves_nothing() {
    let _alone = LOCKS.lock().unwrap_or_else(PoisonError::into_inner);
    let file = image(1 << 20);
    let path = file.path().to_str().unwrap().to_owned();
    on_thread(RingUse::Auto, move || async move {
        let (mut a, mut b) = (graph(), graph());
        for g in [&mut a, &mut b] {
            let json = json!({ "driver": "file", "node-name": "f", "filename": path, "auto-read-only": true });
            g.add(&options(&json)).await.unwrap();
        }
        let exclusive = Perms { need: Bits::CONSISTENT_READ | Bits::WRITE, shared: !(Bits::WRITE | Bits::RESIZE) };
        let first = attach(&mut a, "f", exclusive).await.unwrap();
        let error = attach(&mut b, "f", exclusive).await.unwrap_err();
        assert_eq!(error.to_string(), "Failed to get \"write\" lock");
        assert_eq!(error.hint.unwrap(), format!("Is another process using the image [{path}]?"));
        let alone = Perms { need: Bits::CONSISTENT_READ, shared: !Bits::WRITE };
        let error = attach(&mut b, "f", alone).await.unwrap_err();
        assert_eq!(error.to_string(), "Failed to get shared \"write\" lock");
        let reader = attach(&mut b, "f", READER).await.unwrap();
        a.detach(first).await;
        let second = attach(&mut b, "f", exclusive).await.unwrap();
        b.detach(second).await;
        b.detach(reader).await;
        // Nothing stays locked: the other one may do what it likes.
        let nobody = Perms { need: Bits::CONSISTENT_READ | Bits::WRITE, shared: Bits::NONE };
        let all = attach(&mut a, "f", nobody).await.unwrap();
        a.detach(all).await;
    });
}

#[test]
fn locks_keep_qemu_out_unless_switched_off() {
    let _alone = LOCKS.lock().unwrap_or_else(PoisonError::into_inner);
    if !have("qemu-io") {
        return;
    }
    let file = image(1 << 20);
    let path = file.path().to_str().unwrap().to_owned();
    on_thread(RingUse::Auto, move || async move {
        let qemu_can_write = || {
            let out = Command::new("qemu-io").args(["-f", "raw", "-c", "write 0 512", &path]).output().unwrap();
            let text = String::from_utf8_lossy(&out.stderr).into_owned();
            assert!(out.status.success() || text.contains("Failed to get \"write\" lock"), "{text}");
            out.status.success()
        };
        let alone = Perms { need: Bits::CONSISTENT_READ | Bits::WRITE, shared: Bits::CONSISTENT_READ };
        for (locking, excluded) in [("on", true), ("auto", true), ("off", false)] {
            let mut g = graph();
            let json = json!({ "driver": "file", "node-name": "f", "filename": path, "locking": locking });
            g.add(&options(&json)).await.unwrap();
            assert!(qemu_can_write(), "an unused node locks nothing");
            let disk = attach(&mut g, "f", alone).await.unwrap();
            assert_eq!(qemu_can_write(), !excluded, "{locking}");
            g.detach(disk).await;
            assert!(qemu_can_write());
            g.close_all().await;
        }
    });
}

#[test]
fn preallocation() {
    let file = image(1000);
    let path = file.path().to_owned();
    on_thread(RingUse::Auto, move || async move {
        let mut g = graph();
        let direct = has_direct();
        let json = json!({ "driver": "file", "node-name": "f", "filename": path, "cache": { "direct": direct } });
        let node = g.add(&options(&json)).await.unwrap();
        let driver = node.driver();
        driver.truncate(1 << 20, true, Prealloc::Falloc).await.unwrap();
        assert!(driver.allocated_size().await.unwrap() >= (1 << 20) - 4096);
        driver.truncate((2 << 20) + 100, true, Prealloc::Full).await.unwrap();
        assert!(driver.allocated_size().await.unwrap() >= 2 << 20);
        assert_eq!(std::fs::read(&path).unwrap(), vec![0; (2 << 20) + 100]);
        for (size, prealloc, want) in [
            (512, Prealloc::Falloc, "Preallocation can't be used for shrinking files"),
            (512, Prealloc::Metadata, "Unsupported preallocation mode 'metadata'"),
            (1 << 62, Prealloc::Falloc, "Could not preallocate data: File too large"),
        ] {
            assert_eq!(driver.truncate(size, true, prealloc).await.unwrap_err().to_string(), want);
            assert_eq!(driver.length().await, Ok((2 << 20) + 100), "as it was");
        }
        driver.truncate(512, true, Prealloc::Off).await.unwrap();
        assert_eq!(driver.length().await, Ok(512));
    });
}

#[test]
fn a_full_disk_and_a_vanished_file_are_errors() {
    on_thread(RingUse::Auto, || async {
        let mut g = graph();
        // /dev/full has no length and takes no byte; the driver is asked directly.
        let json = json!({ "driver": "host_device", "node-name": "full", "filename": "/dev/full" });
        let node = g.add(&options(&json)).await.unwrap();
        let written = node.driver().write(0, &IoBuf::copy_of(&[1; 512]), WriteFlags::NONE).await;
        assert_eq!(written, Err(Errno::ENOSPC));
        node.driver().flush().await.unwrap();
        let text = g.resize(&node, 512).await.unwrap_err().to_string();
        assert_eq!(text, "Cannot grow device files");

        let file = image(4096);
        let json = json!({ "driver": "file", "node-name": "f", "filename": file.path() });
        g.add(&options(&json)).await.unwrap();
        let disk = attach(&mut g, "f", writer()).await.unwrap();
        std::fs::OpenOptions::new().write(true).open(file.path()).unwrap().set_len(1024).unwrap();
        let buf = IoBuf::alloc(4096);
        disk.read(0, &buf).await.unwrap();
        assert!(buf.is_zero(), "what somebody else cut off reads as zeroes");
        file.close().unwrap();
        disk.write(0, &buf, WriteFlags::FUA).await.unwrap();
        disk.flush().await.unwrap();
        g.detach(disk).await;
        g.close_all().await;
        assert_eq!(node.driver().read(0, &buf).await, Err(Errno::ENOMEDIUM), "closed");
    });
}

#[test]
fn auto_read_only_survives_a_renamed_file() {
    let file = image(4096);
    let path = file.path().to_owned();
    let moved = path.with_extension("moved");
    let _keep = file.into_temp_path();
    on_thread(RingUse::Auto, move || async move {
        let mut g = graph();
        let json = json!({ "driver": "file", "node-name": "f", "filename": path, "auto-read-only": true });
        g.add(&options(&json)).await.unwrap();
        std::fs::rename(&path, &moved).unwrap();
        std::fs::write(&path, b"somebody else's").unwrap();
        let disk = attach(&mut g, "f", writer()).await.unwrap();
        disk.write(0, &IoBuf::copy_of(&[9; 512]), WriteFlags::NONE).await.unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"somebody else's");
        assert_eq!(std::fs::read(&moved).unwrap()[..512], [9; 512]);
        std::fs::remove_file(&moved).unwrap();
    });
}
