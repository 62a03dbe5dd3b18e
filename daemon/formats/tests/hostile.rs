//! Mutated images, opened and worked on in memory: an error or not, but no panic, no endless loop, no huge memory.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "a test")]

mod common;

use block::testing::CrashDriver;
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
