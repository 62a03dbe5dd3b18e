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
