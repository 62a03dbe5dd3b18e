//! Random changes to images of all shapes, against a flat model; afterwards the reference checks the image and compares.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "a test")]

mod common;

use block::snapshot::SnapshotFacts;
use block::{Disk, Span, WriteFlags, ZeroFlags};
use buf::IoBuf;
use common::{Random, attach, create, folder, graph, has_qemu, on_thread, options, qemu_io, run};
use serde_json::json;
use std::path::Path;

enum Change {
    Write(u8, bool),
    Zero(bool),
    Discard,
    Read,
}

async fn carry_out(disk: &Disk, at: usize, len: usize, change: &Change) -> Option<Vec<u8>> {
    let at64 = u64::try_from(at).unwrap();
    let span = Span::new(at64, u64::try_from(len).unwrap());
    match change {
        Change::Write(byte, fua) => {
            let buf = IoBuf::alloc(len);
            buf.fill(*byte);
            disk.write(at64, &buf, WriteFlags { fua: *fua }).await.unwrap();
        }
        Change::Zero(may_unmap) => {
            let flags = ZeroFlags { may_unmap: *may_unmap, ..ZeroFlags::default() };
            disk.zero(span, flags).await.unwrap();
        }
        Change::Discard => disk.discard(span).await.unwrap(),
        Change::Read => {
            let buf = IoBuf::alloc(len);
            disk.read(at64, &buf).await.unwrap();
            return Some(buf.to_vec());
        }
    }
    None
}

/// `rounds` batches of up to eight requests that do not overlap but share clusters. Returns what the disk must hold; none
/// for bytes that were discarded.
async fn change_at_random(disk: &Disk, model: &mut [Option<u8>], random: &mut Random, rounds: usize) {
    for round in 0..rounds {
        let parts = 1 + random.next(8);
        // Sometimes all over the disk, sometimes within a few clusters.
        let window = if random.next(2) == 0 { model.len() } else { (256 << 10).min(model.len()) };
        let base = random.next(model.len() - window + 1);
        let part = window / parts;
        let requests: Vec<_> = (0..parts)
            .map(|i| {
                let from = random.next(part);
                let mut len = 1 + random.next((part - from).min(200_000));
                let mut at = base + i * part + from;
                if random.next(2) == 0 {
                    // Half of them on sectors.
                    at = at.next_multiple_of(512).min(base + (i + 1) * part - 1);
                    len = len.min(base + (i + 1) * part - at);
                }
                let change = match random.next(8) {
                    0..4 => Change::Write(u8::try_from(1 + random.next(255)).unwrap(), random.next(8) == 0),
                    4 => Change::Zero(random.next(2) == 0),
                    5 => Change::Discard,
                    _ => Change::Read,
                };
                (at, len, change)
            })
            .collect();
        let mut running = tokio::task::JoinSet::new();
        for (i, (at, len, change)) in requests.into_iter().enumerate() {
            let disk = disk.clone();
            running.spawn_local(async move {
                let read = carry_out(&disk, at, len, &change).await;
                (i, at, len, change, read)
            });
        }
        while let Some(done) = running.join_next().await {
            let (_, at, len, change, read) = done.unwrap();
            let place = &mut model[at..at + len];
            match change {
                Change::Write(byte, _) => place.fill(Some(byte)),
                Change::Zero(_) => place.fill(Some(0)),
                Change::Discard => place.fill(None),
                Change::Read => {
                    let read = read.unwrap();
                    let differs = place.iter().zip(&read).position(|(model, read)| model.is_some_and(|m| m != *read));
                    assert_eq!(differs, None, "round {round}: read {at}+{len}");
                }
            }
        }
        if random.next(6) == 0 {
            disk.flush().await.unwrap();
        }
    }
}

fn check_whole(dir: &Path, image: &str, model: &[Option<u8>]) {
    println!("{}", run(dir, "qemu-img", &["check", "-f", "qcow2", image]));
    run(dir, "qemu-img", &["convert", "-f", "qcow2", "-O", "raw", image, "after"]);
    let after = std::fs::read(dir.join("after")).unwrap();
    assert_eq!(after.len(), model.len(), "{image}");
    let differs = model.iter().zip(&after).position(|(model, read)| model.is_some_and(|m| m != *read));
    assert_eq!(differs, None, "{image}: the first byte that differs");
}

fn random_changes(name: &str, prepare: impl Fn(&Path, &str), seed: u64, rounds: usize, extra: &serde_json::Value) {
    let top = json!({ "driver": "raw", "node-name": "top", "file": "q", "discard": "unmap" });
    random_changes_through(top, name, prepare, seed, rounds, extra);
}

/// Through the node `top`, which stands above the image's node `q`.
fn random_changes_through(
    top: serde_json::Value,
    name: &str,
    prepare: impl Fn(&Path, &str),
    seed: u64,
    rounds: usize,
    extra: &serde_json::Value,
) {
    let dir = folder();
    let image = "image.qcow2";
    prepare(dir.path(), image);
    run(dir.path(), "qemu-img", &["convert", "-f", "qcow2", "-O", "raw", image, "before"]);
    let mut model: Vec<_> = std::fs::read(dir.path().join("before")).unwrap().into_iter().map(Some).collect();
    let mut node = json!({
        "driver": "qcow2", "node-name": "q", "discard": "unmap",
        "file": { "driver": "file", "filename": dir.path().join(image).to_str().unwrap() }
    });
    node.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    let (sender, receiver) = std::sync::mpsc::channel();
    println!("{name}");
    on_thread(move || async move {
        let local = tokio::task::LocalSet::new();
        local
            .run_until(async {
                let mut graph = graph();
                graph.add(&options(&node)).await.unwrap();
                graph.add(&options(&top)).await.unwrap();
                let disk = attach(&mut graph, "top", true).await;
                change_at_random(&disk, &mut model, &mut Random(seed), rounds).await;
                graph.detach(disk).await;
                graph.close_all().await;
                sender.send(model).unwrap();
            })
            .await;
    });
    check_whole(dir.path(), image, &receiver.recv().unwrap());
}

fn shape(options: &'static str, size: &'static str) -> impl Fn(&Path, &str) {
    move |dir, image| create(dir, &format!("-o {options} {image} {size}"))
}

/// Rounds of a run; more with `QCOW2_ROUNDS`.
fn rounds() -> usize {
    std::env::var("QCOW2_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(60)
}

#[test]
fn fresh_images_of_every_shape() {
    if !has_qemu() {
        return;
    }
    let shapes = [
        ("compat=1.1", "5000k"),
        ("compat=0.10", "5000k"),
        ("cluster_size=512", "3M"),
        // The refcount table grows every 2 MiB.
        ("cluster_size=512,refcount_bits=64", "5M"),
        ("cluster_size=4k,refcount_bits=1", "9M"),
        ("cluster_size=4k,refcount_bits=64", "9M"),
        ("cluster_size=2M", "20M"),
        ("extended_l2=on", "9M"),
        ("extended_l2=on,cluster_size=16k", "9M"),
        ("preallocation=metadata", "9M"),
        ("data_file=other.data", "9M"),
        ("data_file=raw.data,data_file_raw=on", "9M"),
    ];
    let tight = json!({ "l2-cache-size": 1024, "refcount-cache-size": 512, "l2-cache-entry-size": 512 });
    for (i, (options, size)) in shapes.into_iter().enumerate() {
        let seed = 77 + u64::try_from(i).unwrap();
        random_changes(options, shape(options, size), seed, rounds(), &json!({}));
        random_changes(options, shape(options, size), seed + 100, rounds(), &tight);
    }
}

#[test]
fn images_with_snapshots_backing_files_and_compressed_clusters() {
    if !has_qemu() {
        return;
    }
    let with_snapshot = |dir: &Path, image: &str| {
        create(dir, &format!("-o cluster_size=4k {image} 9M"));
        qemu_io(dir, image, &["write -P 1 0 5M"]);
        run(dir, "qemu-img", &["snapshot", "-c", "one", image]);
        qemu_io(dir, image, &["write -P 2 1M 3M"]);
    };
    let with_backing = |options: &'static str| {
        move |dir: &Path, image: &str| {
            create(dir, "base 4M");
            qemu_io(dir, "base", &["write -P 5 100k 3M"]);
            create(dir, &format!("-b base -F qcow2 -o {options} {image} 7M"));
        }
    };
    let compressed = |options: &'static str| {
        move |dir: &Path, image: &str| {
            create(dir, "source 7M");
            qemu_io(dir, "source", &["write -P 5 100k 3M"]);
            run(dir, "qemu-img", &["convert", "-c", "-O", "qcow2", "-o", options, "source", image]);
        }
    };
    let none = json!({});
    random_changes("snapshot", with_snapshot, 1, rounds(), &none);
    random_changes("backing", with_backing("compat=1.1"), 2, rounds(), &none);
    random_changes("backing v2", with_backing("compat=0.10"), 3, rounds(), &none);
    random_changes("backing ext", with_backing("extended_l2=on"), 4, rounds(), &none);
    random_changes("compressed", compressed("compression_type=zlib"), 5, rounds(), &none);
    random_changes("compressed zstd ext", compressed("compression_type=zstd,extended_l2=on"), 6, rounds(), &none);
    random_changes("no-unref", with_backing("cluster_size=4k"), 7, rounds(), &json!({ "discard-no-unref": true }));
}

#[test]
fn compressed_writes() {
    if !has_qemu() {
        return;
    }
    let backed = |dir: &Path, image: &str| {
        create(dir, "base 4M");
        qemu_io(dir, "base", &["write -P 5 100k 3M"]);
        create(dir, &format!("-b base -F qcow2 {image} 8M"));
        qemu_io(dir, image, &["write -P 6 1M 1M", "write -P 7 -c 2M 1M"]);
        run(dir, "qemu-img", &["snapshot", "-c", "one", image]);
    };
    let top = || json!({ "driver": "compress", "node-name": "top", "file": "q", "discard": "unmap" });
    let other = json!({ "pass-discard-other": true, "l2-cache-size": 1024, "l2-cache-entry-size": 512 });
    for (i, (shape_options, extra)) in [
        ("compression_type=zlib", json!({})),
        ("compression_type=zstd", other.clone()),
        ("cluster_size=4k", other.clone()),
        ("cluster_size=4k,refcount_bits=1", json!({})),
        ("cluster_size=2M", json!({})),
        ("extended_l2=on,compression_type=zstd", json!({})),
    ]
    .into_iter()
    .enumerate()
    {
        let seed = 300 + u64::try_from(i).unwrap();
        random_changes_through(top(), shape_options, shape(shape_options, "8M"), seed, rounds() / 5, &extra);
    }
    random_changes_through(top(), "backed, with a snapshot", backed, 400, rounds() / 3, &other);
}

#[test]
fn growing_and_shrinking() {
    if !has_qemu() {
        return;
    }
    let dir = folder();
    create(dir.path(), "base 4M");
    qemu_io(dir.path(), "base", &["write -P 5 0 4M"]);
    create(dir.path(), "-b base -F qcow2 -o cluster_size=512 image.qcow2 1000k");
    let node = json!({
        "driver": "qcow2", "node-name": "q",
        "file": { "driver": "file", "filename": dir.path().join("image.qcow2").to_str().unwrap() }
    });
    let (sender, receiver) = std::sync::mpsc::channel();
    on_thread(move || async move {
        let local = tokio::task::LocalSet::new();
        local
            .run_until(async {
                let mut graph = graph();
                graph.add(&options(&node)).await.unwrap();
                let mut model = vec![Some(5); 1000 << 10];
                let mut random = Random(9);
                for kib in [1001, 3000, 20_000, 700, 70_000, 69_999, 9000] {
                    let q = graph.get("q").unwrap().clone();
                    graph.resize(&q, kib << 10).await.unwrap();
                    model.resize(usize::try_from(kib << 10).unwrap(), Some(0));
                    let disk = attach(&mut graph, "q", true).await;
                    change_at_random(&disk, &mut model, &mut random, 30).await;
                    graph.detach(disk).await;
                }
                graph.close_all().await;
                sender.send(model).unwrap();
            })
            .await;
    });
    check_whole(dir.path(), "image.qcow2", &receiver.recv().unwrap());
}

/// A row of clusters that is longer than what one refcount block counts: an L1 table's, for a larger disk and a snapshot.
#[test]
fn tables_that_need_several_refcount_blocks() {
    if !has_qemu() {
        return;
    }
    for shape in ["cluster_size=512,refcount_bits=64", "cluster_size=512,refcount_bits=64,lazy_refcounts=on"] {
        let dir = folder();
        create(dir.path(), &format!("-o {shape} image 1M"));
        qemu_io(dir.path(), "image", &["write -P 1 0 64k"]);
        let path = dir.path().join("image");
        on_thread(move || async move {
            let mut graph = graph();
            let file = json!({ "driver": "file", "filename": path });
            graph.add(&options(&json!({ "driver": "qcow2", "node-name": "q", "file": file }))).await.unwrap();
            let node = std::sync::Arc::clone(graph.get("q").unwrap());
            graph.resize(&node, 512 << 20).await.unwrap();
            let disk = attach(&mut graph, "q", true).await;
            let buf = IoBuf::alloc(64 << 10);
            buf.fill(2);
            disk.write(500 << 20, &buf, WriteFlags::NONE).await.unwrap();
            let snapshots = node.driver().snapshots().unwrap();
            for id in ["1", "2"] {
                let facts = SnapshotFacts { id: id.into(), name: id.into(), ..SnapshotFacts::default() };
                snapshots.create(&facts).await.unwrap();
            }
            disk.write(0, &buf, WriteFlags::NONE).await.unwrap();
            snapshots.delete("1").await.unwrap();
            graph.detach(disk).await;
            graph.close_all().await;
        });
        run(dir.path(), "qemu-img", &["check", "-q", "-f", "qcow2", "image"]);
        qemu_io(dir.path(), "image", &["read -P 2 0 64k", "read -P 2 500M 64k"]);
        run(dir.path(), "qemu-img", &["snapshot", "-a", "2", "image"]);
        qemu_io(dir.path(), "image", &["read -P 1 0 64k", "read -P 2 500M 64k"]);
    }
}
