//! Mutated images, opened and worked on in memory: an error or not, but no panic, no endless loop, no huge memory.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "a test")]

mod common;

use block::testing::{CrashDriver, Step};
use block::{NodeOptions, Span, WriteFlags, ZeroFlags};
use buf::IoBuf;
use common::{attach, create, folder, graph, has_qemu, on_thread, options, qemu_io, run};
use serde_json::json;

/// Opens an image and works on it. Errors are fine.
async fn work(content: Vec<u8>, read_only: bool) -> bool {
    let mut graph = graph();
    let (driver, _) = CrashDriver::open(content);
    graph.adopt("medium", driver, NodeOptions::default()).await.unwrap();
    let node = json!({
        "driver": "qcow2", "node-name": "q", "file": "medium", "backing": null, "discard": "unmap",
        "read-only": read_only
    });
    let opened = graph.add(&options(&node)).await.is_ok();
    if opened {
        let disk = attach(&mut graph, "q", !read_only).await;
        let size = disk.size().min(4 << 20);
        for at in (0..size).step_by(300 << 10) {
            let len = (size - at).min(100 << 10);
            let span = Span::new(at, len);
            let buf = IoBuf::zeroed(usize::try_from(len).unwrap());
            let _ = disk.read(at, &buf).await;
            let _ = disk.status(span).await;
            if !read_only {
                let _ = disk.write(at, &buf, WriteFlags::NONE).await;
                let _ = disk.zero(span, ZeroFlags { may_unmap: true, ..ZeroFlags::default() }).await;
                let _ = disk.discard(span).await;
                let _ = disk.flush().await;
            }
        }
        graph.detach(disk).await;
    }
    graph.close_all().await;
    opened
}

#[test]
fn mutated_images() {
    if !has_qemu() {
        return;
    }
    let dir = folder();
    create(dir.path(), "-o cluster_size=4k,extended_l2=off plain 3M");
    qemu_io(dir.path(), "plain", &["write -P 1 0 300k", "write -z 1M 100k"]);
    run(dir.path(), "qemu-img", &["snapshot", "-c", "one", "plain"]);
    run(dir.path(), "qemu-img", &["convert", "-c", "-O", "qcow2", "plain", "packed"]);
    create(dir.path(), "-o extended_l2=on,cluster_size=16k extended 3M");
    qemu_io(dir.path(), "extended", &["write -P 1 0 300k", "write -z 1M 4k"]);
    let images: Vec<_> =
        ["plain", "packed", "extended"].iter().map(|name| std::fs::read(dir.path().join(name)).unwrap()).collect();
    let (sender, receiver) = std::sync::mpsc::channel();
    on_thread(move || async move {
        let mut state = 4711u64;
        let mut random = |below: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            usize::try_from(state >> 16).unwrap() % below
        };
        let mut opened = 0;
        for round in 0..600 {
            let mut image = images[round % images.len()].clone();
            // The header more often than its length deserves; else bytes that are not zero: tables and their entries.
            for _ in 0..1 + random(6) {
                let at = if random(4) == 0 { random(112) } else { random(image.len().min(200 << 10)) };
                let at = (at..image.len()).find(|i| at < 112 || image[*i] != 0).unwrap_or(at);
                image[at] = u8::try_from(random(256)).unwrap();
            }
            if random(10) == 0 {
                image.truncate(random(image.len()));
            }
            opened += usize::from(work(image, random(3) == 0).await);
        }
        sender.send(opened).unwrap();
    });
    let opened = receiver.recv().unwrap();
    println!("{opened} of 600 opened");
    assert!(opened > 100, "too few are worth anything: {opened}");
}

/// Requests that are under way when damage is found end without writing metadata.
#[test]
fn a_damaged_image_gets_no_more_metadata() {
    if !has_qemu() {
        return;
    }
    let dir = folder();
    create(dir.path(), "-o cluster_size=512,refcount_bits=64 image 8M");
    qemu_io(dir.path(), "image", &["write -P 1 0 512"]);
    let mut image = std::fs::read(dir.path().join("image")).unwrap();
    let number = |image: &[u8], at: usize| {
        let bytes = image[at..at + 8].try_into().unwrap();
        usize::try_from(u64::from_be_bytes(bytes) & 0x00ff_ffff_ffff_fe00).unwrap()
    };
    // The first cluster of the disk is that of the refcount table, by its L2 entry.
    let (l1, table) = (number(&image, 40), number(&image, 48));
    let l2 = number(&image, l1);
    image[l2..l2 + 8].copy_from_slice(&(u64::try_from(table).unwrap() | 1 << 63).to_be_bytes());
    on_thread(move || async move {
        let local = tokio::task::LocalSet::new();
        let work = async {
            let mut graph = graph();
            let (driver, history) = CrashDriver::open(image);
            graph.adopt("medium", driver, NodeOptions::default()).await.unwrap();
            let node = json!({ "driver": "qcow2", "node-name": "q", "file": "medium", "refcount-cache-size": 1024 });
            graph.add(&options(&node)).await.unwrap();
            let disk = attach(&mut graph, "q", true).await;
            let write = |at: u64, len: usize| {
                let disk = disk.clone();
                async move {
                    let buf = IoBuf::zeroed(len);
                    buf.fill(2);
                    disk.write(at, &buf, WriteFlags::NONE).await
                }
            };
            let others: Vec<_> = (1..60).map(|i| tokio::task::spawn_local(write(i * (128 << 10), 64 << 10))).collect();
            let damaged = tokio::task::spawn_local(write(0, 512));
            damaged.await.unwrap().unwrap_err();
            let told = history.mark(1);
            for other in others {
                let _ = other.await.unwrap();
            }
            graph.detach(disk).await;
            graph.close_all().await;
            let steps = history.steps();
            let written = |step: &Step| match step {
                // Not data, and not a table that is new and that nothing names.
                Step::Write { bytes, .. } => bytes.iter().any(|byte| ![0, 2].contains(byte)),
                _ => false,
            };
            let before = steps[..told].iter().filter(|step| written(step)).count();
            let after: Vec<_> = steps[told..].iter().filter(|step| written(step)).collect();
            println!("{before} writes of metadata before, {} after", after.len());
            assert!(before > 0 && after.is_empty());
        };
        local.run_until(work).await;
    });
}

/// An L1 entry that says that its table is nobody else's, and has none.
#[test]
fn a_table_that_is_its_own_and_not_there() {
    if !has_qemu() {
        return;
    }
    let dir = folder();
    create(dir.path(), "-o cluster_size=4k image 1M");
    let mut image = std::fs::read(dir.path().join("image")).unwrap();
    let l1 = usize::try_from(u64::from_be_bytes(image[40..48].try_into().unwrap())).unwrap();
    image[l1] = 0x80;
    on_thread(move || async move {
        let mut graph = graph();
        let (driver, history) = CrashDriver::open(image);
        graph.adopt("medium", driver, NodeOptions::default()).await.unwrap();
        graph.add(&options(&json!({ "driver": "qcow2", "node-name": "q", "file": "medium" }))).await.unwrap();
        let disk = attach(&mut graph, "q", true).await;
        let buf = IoBuf::alloc(8192);
        buf.fill(7);
        disk.write(0, &buf, WriteFlags::NONE).await.unwrap();
        disk.zero(Span::new(0, 4096), ZeroFlags::default()).await.unwrap();
        disk.read(0, &buf).await.unwrap();
        assert!(buf.to_vec().iter().enumerate().all(|(i, byte)| *byte == if i < 4096 { 0 } else { 7 }));
        graph.detach(disk).await;
        graph.close_all().await;
        assert!(!history.steps().is_empty());
    });
}
