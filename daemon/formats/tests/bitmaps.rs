//! Bitmaps of images: enabled ones record what is written and are stored at the end; a crash leaves them marked; nothing
//! happens to the others. The reference reads them.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "a test")]

mod common;

use block::{Span, WriteFlags, ZeroFlags};
use buf::IoBuf;
use common::{attach, create, folder, graph, has_qemu, on_thread, options, qemu_io, run};
use serde_json::{Value, json};
use std::path::Path;

/// The dirty runs of a bitmap as the reference's NBD server tells them.
fn dirty(dir: &Path, image: &str, bitmap: &str) -> Vec<(u64, u64)> {
    let map = format!("--map=qemu:dirty-bitmap:{bitmap}");
    let args = [&map, "--json", "--", "[", "qemu-nbd", "-r", "-f", "qcow2", "-B", bitmap, image, "]"];
    let runs: Value = serde_json::from_str(&run(dir, "nbdinfo", &args)).unwrap();
    let mut found: Vec<(u64, u64)> = Vec::new();
    for run in runs.as_array().unwrap().iter().filter(|run| run["type"] == 1) {
        let (at, len) = (run["offset"].as_u64().unwrap(), run["length"].as_u64().unwrap());
        match found.last_mut() {
            Some(last) if last.0 + last.1 == at => last.1 += len,
            _ => found.push((at, len)),
        }
    }
    found
}

/// The bitmaps with their flags.
fn flags(dir: &Path, image: &str) -> Vec<(String, Vec<String>)> {
    let info: Value = serde_json::from_str(&run(dir, "qemu-img", &["info", "--output=json", image])).unwrap();
    let texts = |list: &Value| list.as_array().unwrap().iter().map(|flag| flag.as_str().unwrap().to_owned()).collect();
    let bitmaps = info["format-specific"]["data"]["bitmaps"].as_array().unwrap();
    bitmaps.iter().map(|bitmap| (bitmap["name"].as_str().unwrap().to_owned(), texts(&bitmap["flags"]))).collect()
}

/// Writes, zeroes and discards in an image; `crashed` is a copy of it before it is closed.
fn work(dir: &Path, image: &'static str) {
    let path = dir.to_owned();
    on_thread(move || async move {
        let file = json!({ "driver": "file", "filename": path.join(image).to_str().unwrap(), "locking": "off" });
        let node = json!({ "driver": "qcow2", "node-name": "q", "file": file, "discard": "unmap" });
        let mut graph = graph();
        graph.add(&options(&node)).await.unwrap();
        let disk = attach(&mut graph, "q", true).await;
        let buf = IoBuf::alloc(70 << 10);
        buf.fill(9);
        disk.write(1 << 20, &buf, WriteFlags::NONE).await.unwrap();
        disk.zero(Span::new(3 << 20, 1 << 20), ZeroFlags::default()).await.unwrap();
        disk.discard(Span::new(6 << 20, 2 << 20)).await.unwrap();
        disk.write((16 << 20) - 512, &buf.slice(0, 512), WriteFlags::NONE).await.unwrap();
        disk.flush().await.unwrap();
        std::fs::copy(path.join(image), path.join("crashed")).unwrap();
        graph.detach(disk).await;
        graph.close_all().await;
    });
}

#[test]
fn enabled_bitmaps_record() {
    if !has_qemu() {
        return;
    }
    const K: u64 = 1 << 10;
    const M: u64 = 1 << 20;
    let dir = folder();
    let path = dir.path();
    for (image, cluster) in [("small", "512"), ("usual", "65536"), ("large", "2097152")] {
        create(path, &format!("-o cluster_size={cluster} {image} 16M"));
        run(path, "qemu-img", &["bitmap", "--add", "-g", "65536", image, "recording"]);
        run(path, "qemu-img", &["bitmap", "--add", "-g", "512", image, "fine"]);
        qemu_io(path, image, &["write 9M 64k"]);
        run(path, "qemu-img", &["bitmap", "--add", "--disable", image, "resting"]);
        let before = dirty(path, image, "recording");
        assert_eq!(before, [(9 * M, 64 * K)]);
        // Twice: what the first run has stored is kept by the second.
        for _ in 0..2 {
            work(path, image);
            run(path, "qemu-img", &["check", "-q", "-f", "qcow2", image]);
            let expected = [(M, 128 * K), (3 * M, M), (6 * M, 2 * M), (9 * M, 64 * K), (16 * M - 64 * K, 64 * K)];
            assert_eq!(dirty(path, image, "recording"), expected, "{image}");
            let expected = [(M, 70 * K), (3 * M, M), (6 * M, 2 * M), (9 * M, 64 * K), (16 * M - 512, 512)];
            assert_eq!(dirty(path, image, "fine"), expected, "{image}");
            assert_eq!(dirty(path, image, "resting"), []);
            let auto = vec!["auto".to_owned()];
            let stored = [("recording".into(), auto.clone()), ("fine".into(), auto), ("resting".into(), vec![])];
            assert_eq!(flags(path, image), stored);
            let auto = vec!["in-use".to_owned(), "auto".to_owned()];
            let crashed = [("recording".into(), auto.clone()), ("fine".into(), auto), ("resting".into(), vec![])];
            assert_eq!(flags(path, "crashed"), crashed);
        }
        // Nothing is written, so nothing is marked, and an image that has marks opens.
        std::fs::rename(path.join("crashed"), path.join("marked")).unwrap();
        work(path, "marked");
        let auto = vec!["in-use".to_owned(), "auto".to_owned()];
        assert_eq!(flags(path, "marked").first(), Some(&("recording".to_owned(), auto)));
        run(path, "qemu-img", &["check", "-q", "-f", "qcow2", "marked"]);
    }
}

/// What happens to an image, one after the other.
#[derive(Clone, Copy)]
enum Step {
    Resize(u64),
    Write(u64, usize),
}

/// The steps by ours, while the image is open all the time.
fn ours(dir: &Path, image: &'static str, steps: &'static [Step]) {
    let path = dir.to_owned();
    on_thread(move || async move {
        let file = json!({ "driver": "file", "filename": path.join(image).to_str().unwrap() });
        let mut graph = graph();
        graph.add(&options(&json!({ "driver": "qcow2", "node-name": "q", "file": file }))).await.unwrap();
        let disk = attach(&mut graph, "q", true).await;
        let node = disk.node();
        for step in steps {
            match *step {
                Step::Resize(size) => graph.resize(&node, size).await.unwrap(),
                Step::Write(at, len) => {
                    let buf = IoBuf::alloc(len);
                    buf.fill(9);
                    disk.write(at, &buf, WriteFlags::NONE).await.unwrap();
                }
            }
        }
        graph.detach(disk).await;
        graph.close_all().await;
    });
}

/// The same by the reference.
fn theirs(dir: &Path, image: &str, steps: &[Step]) {
    for step in steps {
        match *step {
            Step::Resize(size) => {
                run(dir, "qemu-img", &["resize", "-q", "--shrink", "-f", "qcow2", image, &size.to_string()]);
            }
            Step::Write(at, len) => qemu_io(dir, image, &[&format!("write -P 9 {at} {len}")]),
        }
    }
}

#[test]
fn bitmaps_are_resized_with_the_disk() {
    if !has_qemu() {
        return;
    }
    const M: u64 = 1 << 20;
    const STEPS: &[Step] = &[
        Step::Write(15 * M, 100 << 10),
        Step::Resize(24 * M),
        Step::Write(23 * M, 70_000),
        // A table of the small clusters takes more than one now.
        Step::Resize(200 * M),
        Step::Write(199 * M + 512, 4096),
        Step::Resize(23 * M + 1536),
        Step::Resize(150 * M),
        Step::Write(140 * M, 512),
        Step::Resize(15 * M + 3 * 4096),
        Step::Resize(16 * M),
        Step::Write(16 * M - 512, 512),
    ];
    // In memory: both programs flush after each step.
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = dir.path();
    for (image, options) in [
        ("small", "cluster_size=512"),
        ("usual", "cluster_size=65536"),
        ("large", "cluster_size=2097152,lazy_refcounts=on"),
        ("snapshot", "cluster_size=512"),
        ("data", "cluster_size=4096,data_file=data.raw"),
    ] {
        create(path, &format!("-o {options} {image} 16M"));
        for granularity in ["512", "65536"] {
            run(path, "qemu-img", &["bitmap", "--add", "-g", granularity, image, granularity]);
        }
        qemu_io(path, image, &["write -P 3 0 64k", "write -P 3 9M 64k", "write -P 3 15500k 300k"]);
        run(path, "qemu-img", &["bitmap", "--add", "--disable", "-g", "512", image, "resting"]);
        run(path, "qemu-img", &["bitmap", "--merge", "512", image, "resting"]);
        if image == "snapshot" {
            run(path, "qemu-img", &["snapshot", "-c", "one", image]);
        }
        if image == "data" {
            // Both would be written to: one after the other.
            std::fs::copy(path.join("data.raw"), path.join("data.copy")).unwrap();
        }
        std::fs::copy(path.join(image), path.join("theirs")).unwrap();
        theirs(path, "theirs", STEPS);
        let expected: Vec<_> = ["512", "65536", "resting"].map(|name| dirty(path, "theirs", name)).into();
        if image == "data" {
            std::fs::rename(path.join("data.copy"), path.join("data.raw")).unwrap();
        }
        ours(path, image, STEPS);
        run(path, "qemu-img", &["check", "-q", "-f", "qcow2", image]);
        let found: Vec<_> = ["512", "65536", "resting"].map(|name| dirty(path, image, name)).into();
        assert_eq!(found, expected, "{image}");
        let all = ["512", "65536", "resting"];
        assert!(
            flags(path, image)
                .iter()
                .all(|(name, flags)| { all.contains(&name.as_str()) && flags.iter().all(|flag| flag == "auto") })
        );
    }
    let size = std::fs::metadata(path.join("data.raw")).unwrap().len();
    assert_eq!(size, 16 * M, "the data file follows");
}

/// Where the directory of bitmaps is, and the table of the first bitmap.
fn places(image: &[u8]) -> (usize, usize) {
    let number = |at: usize| usize::try_from(u64::from_be_bytes(image[at..at + 8].try_into().unwrap())).unwrap();
    let at = image.windows(4).position(|bytes| bytes == 0x2385_2875_u32.to_be_bytes()).unwrap();
    let directory = number(at + 24);
    (directory, number(directory))
}

#[test]
fn an_entry_for_set_bits_only_ends_with_the_disk() {
    if !has_qemu() {
        return;
    }
    const M: u64 = 1 << 20;
    let dir = folder();
    let path = dir.path();
    for (steps, expected) in [
        (&[Step::Resize(64 * M)][..], (16 * M, 4 * M)),
        (&[Step::Resize(18 * M), Step::Resize(20 * M)], (16 * M, 2 * M)),
        (&[Step::Resize(16 * M), Step::Resize(32 * M), Step::Write(20 * M, 4096)], (20 * M, 4096)),
    ] {
        create(path, "-o cluster_size=4096 image 20M");
        run(path, "qemu-img", &["bitmap", "--add", "-g", "512", "image", "b"]);
        let mut image = std::fs::read(path.join("image")).unwrap();
        let (_, table) = places(&image);
        // The second entry, of bits from 16 MiB on.
        image[table + 8..table + 16].copy_from_slice(&1u64.to_be_bytes());
        std::fs::write(path.join("image"), &image).unwrap();
        ours(path, "image", steps);
        run(path, "qemu-img", &["check", "-q", "-f", "qcow2", "image"]);
        assert_eq!(dirty(path, "image", "b"), [expected]);
    }
}

#[test]
fn inconsistent_bitmaps_forbid_a_resize() {
    if !has_qemu() {
        return;
    }
    let dir = folder();
    create(dir.path(), "image 4M");
    run(dir.path(), "qemu-img", &["bitmap", "--add", "image", "b"]);
    let mut image = std::fs::read(dir.path().join("image")).unwrap();
    let (directory, _) = places(&image);
    image[directory + 15] |= 1;
    std::fs::write(dir.path().join("image"), &image).unwrap();
    let path = dir.path().to_owned();
    on_thread(move || async move {
        let file = json!({ "driver": "file", "filename": path.join("image").to_str().unwrap() });
        let mut graph = graph();
        graph.add(&options(&json!({ "driver": "qcow2", "node-name": "q", "file": file }))).await.unwrap();
        let node = std::sync::Arc::clone(graph.get("q").unwrap());
        for size in [8 << 20, 1 << 20] {
            let refused = graph.resize(&node, size).await.unwrap_err();
            assert_eq!(refused.desc, "Bitmap 'b' is inconsistent and cannot be used");
        }
        graph.close_all().await;
    });
}

#[test]
fn bitmaps_go_with_an_image_that_is_handed_over() {
    if !has_qemu() {
        return;
    }
    const M: u64 = 1 << 20;
    let dir = folder();
    let path = dir.path().to_owned();
    create(&path, "image 16M");
    run(&path, "qemu-img", &["bitmap", "--add", "-g", "65536", "image", "one"]);
    let there = path.clone();
    on_thread(move || async move {
        let file = json!({ "driver": "file", "filename": path.join("image").to_str().unwrap(), "locking": "off" });
        let node = json!({ "driver": "qcow2", "node-name": "q", "file": file });
        let mut graph = graph();
        graph.add(&options(&node)).await.unwrap();
        let buf = IoBuf::zeroed(65536);
        let disk = attach(&mut graph, "q", true).await;
        disk.write(M, &buf, WriteFlags::NONE).await.unwrap();
        graph.detach(disk).await;
        let node = std::sync::Arc::clone(graph.get("q").unwrap());
        graph.deactivate(&node).await.unwrap();
        // The other process has the bitmap as it should be, and makes a second one, for which the directory moves.
        assert_eq!(flags(&path, "image"), [("one".to_owned(), vec!["auto".to_owned()])]);
        qemu_io(&path, "image", &["write 2M 64k"]);
        run(&path, "qemu-img", &["bitmap", "--add", "-g", "65536", "image", "two"]);
        graph.activate(&node).await.unwrap();
        let disk = attach(&mut graph, "q", true).await;
        disk.write(3 * M, &buf, WriteFlags::NONE).await.unwrap();
        graph.detach(disk).await;
        graph.close_all().await;
    });
    run(&there, "qemu-img", &["check", "-q", "-f", "qcow2", "image"]);
    assert_eq!(dirty(&there, "image", "one"), [(M, 65536), (2 * M, 65536), (3 * M, 65536)]);
    assert_eq!(dirty(&there, "image", "two"), [(3 * M, 65536)]);
}
