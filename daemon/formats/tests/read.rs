//! Images made by qemu-img, read by ours: the same bytes and the same block status.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "a test")]

mod common;

use block::{Disk, Span};
use buf::IoBuf;
use common::{attach, create, folder, graph, has_qemu, on_thread, options, qemu_io, run};
use serde_json::{Value, json};
use std::path::Path;

/// Merged runs of (start, length, zero, data, layer).
type Runs = Vec<(u64, u64, bool, bool, u64)>;

fn push(runs: &mut Runs, run: (u64, u64, bool, bool, u64)) {
    match runs.last_mut() {
        Some(last) if last.0 + last.1 == run.0 && (last.2, last.3, last.4) == (run.2, run.3, run.4) => last.1 += run.1,
        _ => runs.push(run),
    }
}

/// What the reference says. Layers count from 1, 0 is none.
fn reference_map(dir: &Path, image: &str) -> Runs {
    let text = run(dir, "qemu-img", &["map", "--output=json", "-f", "qcow2", image]);
    let mut runs = Runs::new();
    for entry in serde_json::from_str::<Vec<Value>>(&text).unwrap() {
        let depth = if entry["present"] == json!(true) { entry["depth"].as_u64().unwrap() + 1 } else { 0 };
        let of = |name: &str| entry[name].as_u64().unwrap();
        let is = |name: &str| entry[name].as_bool().unwrap();
        push(&mut runs, (of("start"), of("length"), is("zero"), is("data"), depth));
    }
    runs
}

async fn our_map(disk: &Disk) -> Runs {
    let mut runs = Runs::new();
    let mut at = 0;
    while at < disk.size() {
        let found = disk.status(Span::new(at, disk.size() - at)).await.unwrap();
        push(&mut runs, (at, found.len, found.zero, found.data, found.depth.into()));
        at += found.len;
    }
    runs
}

fn same(dir: &Path, image: &str) {
    same_with(dir, image, &json!({}));
}

fn same_with(dir: &Path, image: &str, extra: &Value) {
    run(dir, "qemu-img", &["convert", "-f", "qcow2", "-O", "raw", image, "flat"]);
    let expected = std::fs::read(dir.join("flat")).unwrap();
    let map = reference_map(dir, image);
    let mut node = json!({
        "driver": "qcow2", "node-name": "q", "read-only": true,
        "file": { "driver": "file", "filename": dir.join(image).to_str().unwrap() }
    });
    node.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    let image = image.to_owned();
    on_thread(move || async move {
        let mut graph = graph();
        graph.add(&options(&node)).await.unwrap_or_else(|error| panic!("{image}: {error}"));
        let disk = attach(&mut graph, "q", false).await;
        assert_eq!(disk.size(), u64::try_from(expected.len()).unwrap(), "{image}");
        assert_eq!(our_map(&disk).await, map, "{image}");
        // In steps that do not fit clusters, some of them at the same time.
        let mut at = 0;
        for step in [1, 511, 4096, 70_000, 200_000, 3 << 20].into_iter().cycle() {
            if at == expected.len() {
                break;
            }
            let len = step.min(expected.len() - at);
            let (a, b) = (IoBuf::alloc(len), IoBuf::alloc(len));
            let at64 = u64::try_from(at).unwrap();
            let (one, two) = tokio::join!(disk.read(at64, &a), disk.read(at64, &b));
            one.unwrap();
            two.unwrap();
            assert!(a.to_vec() == expected[at..at + len], "{image}: bytes {at}+{len} differ");
            assert!(b.to_vec() == a.to_vec(), "{image}: bytes {at}+{len} differ when read twice");
            at += len;
        }
        graph.detach(disk).await;
        graph.close_all().await;
    });
}

/// Data, zeroes, discards and compressed clusters all over an image of 8 MiB and a little more.
const PATTERN: &[&str] = &[
    "write -P 1 0 100k",
    "write -P 2 1M 1M",
    "write -P 3 3145k 3k",
    "write -z 1200k 200k",
    "write -P 4 8380k 8k",
    "write -z -u 5M 300k",
    "discard 1600k 128k",
];

#[test]
fn every_shape_of_image() {
    if !has_qemu() {
        return;
    }
    let shapes = [
        "compat=0.10",
        "compat=1.1",
        "cluster_size=512",
        "cluster_size=4k,refcount_bits=1",
        "cluster_size=2M",
        "refcount_bits=64",
        "refcount_bits=8,lazy_refcounts=on",
        "extended_l2=on",
        "extended_l2=on,cluster_size=16k",
        "compression_type=zstd",
        "preallocation=metadata",
        "preallocation=falloc",
        "preallocation=full,extended_l2=on",
    ];
    for (i, shape) in shapes.iter().enumerate() {
        let dir = folder();
        let image = format!("{i}.qcow2");
        create(dir.path(), &format!("-o {shape} {image} 8388k"));
        same(dir.path(), &image);
        qemu_io(dir.path(), &image, PATTERN);
        same(dir.path(), &image);
        let small = json!({ "l2-cache-size": 1024, "refcount-cache-size": 0, "l2-cache-entry-size": 512 });
        same_with(dir.path(), &image, &small);
    }
}

#[test]
fn compressed_images() {
    if !has_qemu() {
        return;
    }
    let dir = folder();
    create(dir.path(), "source.qcow2 5000k");
    qemu_io(dir.path(), "source.qcow2", &["write -P 7 64k 1M", "write -P 9 3M 77k", "write -P 1 4999k 1k"]);
    let shapes =
        ["compression_type=zlib", "compression_type=zstd", "extended_l2=on", "cluster_size=512", "cluster_size=2M"];
    for (i, shape) in shapes.iter().enumerate() {
        let image = format!("{i}.qcow2");
        run(dir.path(), "qemu-img", &["convert", "-c", "-O", "qcow2", "-o", shape, "source.qcow2", &image]);
        same(dir.path(), &image);
    }
}

#[test]
fn backing_chains_with_relative_and_json_names() {
    if !has_qemu() {
        return;
    }
    let dir = folder();
    create(dir.path(), "base.qcow2 3M");
    qemu_io(dir.path(), "base.qcow2", &["write -P 1 0 3M"]);
    create(dir.path(), "-b base.qcow2 -F qcow2 middle.qcow2 6M");
    qemu_io(dir.path(), "middle.qcow2", &["write -P 2 1M 64k", "write -z 2M 64k"]);
    create(dir.path(), "-b middle.qcow2 -F qcow2 -o extended_l2=on top.qcow2 8M");
    qemu_io(dir.path(), "top.qcow2", &["write -P 3 1030k 6k", "write -P 3 5M 64k", "write -z 100k 8k"]);
    same(dir.path(), "top.qcow2");
    std::fs::write(dir.path().join("raw"), vec![5; 1 << 20]).unwrap();
    create(dir.path(), "-b raw -F raw -o compat=0.10 old.qcow2 2M");
    qemu_io(dir.path(), "old.qcow2", &["write -P 6 64k 1k"]);
    same(dir.path(), "old.qcow2");
    let base = dir.path().join("base.qcow2");
    let name =
        format!("json:{{\"driver\":\"qcow2\",\"file.driver\":\"file\",\"file.filename\":\"{}\"}}", base.display());
    run(dir.path(), "qemu-img", &["create", "-q", "-f", "qcow2", "-b", &name, "-F", "qcow2", "json.qcow2", "4M"]);
    same(dir.path(), "json.qcow2");
}

#[test]
fn a_chain_of_a_hundred() {
    if !has_qemu() {
        return;
    }
    let dir = folder();
    create(dir.path(), "0.qcow2 1M");
    qemu_io(dir.path(), "0.qcow2", &["write -P 1 0 64k"]);
    for i in 1..100 {
        create(dir.path(), &format!("-b {}.qcow2 -F qcow2 -u {i}.qcow2 1M", i - 1));
    }
    qemu_io(dir.path(), "50.qcow2", &["write -P 2 256k 64k"]);
    same(dir.path(), "99.qcow2");
}

#[test]
fn external_data_files_and_snapshots() {
    if !has_qemu() {
        return;
    }
    let dir = folder();
    create(dir.path(), "-o data_file=plain.data plain.qcow2 4M");
    qemu_io(dir.path(), "plain.qcow2", &["write -P 1 0 64k", "write -P 2 3M 5k", "write -z 1M 64k"]);
    same(dir.path(), "plain.qcow2");
    create(dir.path(), "-o data_file=raw.data,data_file_raw=on raw.qcow2 4M");
    qemu_io(dir.path(), "raw.qcow2", &["write -P 1 0 64k", "write -P 2 3M 5k"]);
    same(dir.path(), "raw.qcow2");
    create(dir.path(), "snap.qcow2 4M");
    qemu_io(dir.path(), "snap.qcow2", &["write -P 1 0 1M"]);
    run(dir.path(), "qemu-img", &["snapshot", "-c", "one", "snap.qcow2"]);
    qemu_io(dir.path(), "snap.qcow2", &["write -P 2 10k 100k"]);
    run(dir.path(), "qemu-img", &["snapshot", "-c", "two", "snap.qcow2"]);
    run(dir.path(), "qemu-img", &["bitmap", "--add", "snap.qcow2", "b"]);
    same(dir.path(), "snap.qcow2");
}

#[test]
fn what_cannot_be_opened_is_refused_by_name() {
    if !has_qemu() {
        return;
    }
    let dir = folder();
    let path = dir.path().to_owned();
    create(&path, "good.qcow2 1M");
    create(&path, "loop.qcow2 1M");
    run(&path, "qemu-img", &["rebase", "-u", "-b", "loop.qcow2", "-F", "qcow2", "loop.qcow2"]);
    // The extension with the format of the backing file becomes one that nobody knows.
    create(&path, "-b good.qcow2 -F qcow2 unnamed.qcow2 1M");
    let mut unnamed = std::fs::read(path.join("unnamed.qcow2")).unwrap();
    let at = unnamed.windows(4).position(|four| four == 0xe279_2acau32.to_be_bytes()).unwrap();
    unnamed[at..at + 4].copy_from_slice(&0x1234_5678u32.to_be_bytes());
    std::fs::write(path.join("unnamed.qcow2"), unnamed).unwrap();
    let good = std::fs::read(path.join("good.qcow2")).unwrap();
    let broken = |name: &str, at: usize, bytes: &[u8]| {
        let mut image = good.clone();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        std::fs::write(path.join(name), image).unwrap();
    };
    broken("magic", 0, b"no");
    broken("version", 4, &9u32.to_be_bytes());
    broken("clusters", 20, &30u32.to_be_bytes());
    broken("feature", 72, &(1u64 << 40).to_be_bytes());
    broken("corrupt", 72, &2u64.to_be_bytes());
    broken("l1", 36, &u32::MAX.to_be_bytes());
    broken("size", 24, &(1u64 << 50).to_be_bytes());
    broken("snapshots", 60, &u32::MAX.to_be_bytes());
    broken("reftable", 56, &u32::MAX.to_be_bytes());
    broken("width", 96, &7u32.to_be_bytes());
    broken("crypt", 32, &2u32.to_be_bytes());
    on_thread(move || async move {
        for (name, expected) in [
            ("magic", "Image is not in qcow2 format"),
            ("version", "Unsupported qcow2 version 9"),
            ("clusters", "Unsupported cluster size: 2^30"),
            ("feature", "Unsupported qcow2 feature(s): Unknown incompatible feature: 10000000000"),
            ("corrupt", "qcow2: Image is corrupt; cannot be opened read/write"),
            ("l1", "Active L1 table too large"),
            ("size", "L1 table is too small"),
            ("snapshots", "Snapshot table too large"),
            ("reftable", "Reference count table too large"),
            ("width", "Reference count entry width too large; may not exceed 64 bits"),
            ("crypt", "The image is encrypted, which is not supported"),
            ("unnamed.qcow2", "The image names the backing file 'good.qcow2' without its format"),
            ("loop.qcow2", "nodes below each other"),
        ] {
            let mut graph = graph();
            let file = json!({ "driver": "file", "filename": path.join(name).to_str().unwrap() });
            let node = json!({ "driver": "qcow2", "node-name": "q", "file": file });
            let error = graph.add(&options(&node)).await.unwrap_err().to_string();
            assert!(error.contains(expected), "{name}: {error}");
            assert!(error.len() < 20_000, "{name}: {} bytes of message", error.len());
            assert_eq!(graph.nodes().count(), 0);
        }
    });
}
