//! Power loss at any point: what was flushed is there, the image opens, and the reference finds no errors in it, leaks at
//! most. The medium remembers every write and flush; an image after a crash has all that was flushed and any part, in any
//! order, of what was not.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "a test")]

mod common;

use block::snapshot::SnapshotFacts;
use block::testing::{CrashDriver, History};
use block::{Disk, Graph, NodeOptions, Span, WriteFlags, ZeroFlags};
use buf::IoBuf;
use common::{Random, attach, create, folder, graph, has_qemu, on_thread, options, qemu_io, run};
use serde_json::json;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

/// Bytes of the blocks whose content is tracked.
const BLOCK: usize = 2048;

/// A change of a block: the byte that fills it, and when the change was asked for and acknowledged, in steps.
struct Change {
    byte: u8,
    asked: usize,
    done: usize,
}

/// What happened, as the client saw it.
struct Client {
    blocks: Vec<Vec<Change>>,
    /// Flushes: asked for and acknowledged.
    flushes: Vec<(usize, usize)>,
    /// Lengths of the disk: asked for, acknowledged, in blocks.
    sizes: Vec<(usize, usize, usize)>,
    /// Snapshots come and go meanwhile.
    snapshots: bool,
    /// The disk gets other lengths meanwhile.
    resizes: bool,
}

impl Client {
    /// Blocks of the disk as it is.
    fn size(&self) -> usize {
        self.sizes.last().unwrap().2
    }
}

async fn one(disk: &Disk, history: &History, first: usize, count: usize, kind: usize, byte: u8) -> (usize, usize) {
    let asked = history.mark(0);
    let at = u64::try_from(first * BLOCK).unwrap();
    let span = Span::new(at, u64::try_from(count * BLOCK).unwrap());
    match kind {
        0 => disk.zero(span, ZeroFlags { may_unmap: byte.is_multiple_of(2), ..ZeroFlags::default() }).await.unwrap(),
        1 => disk.discard(span).await.unwrap(),
        _ => {
            let buf = IoBuf::alloc(count * BLOCK);
            buf.fill(byte);
            disk.write(at, &buf, WriteFlags::NONE).await.unwrap();
        }
    }
    (asked, history.mark(0))
}

/// Makes a snapshot inside the image, or deletes one. What completed before is as durable as after a flush.
async fn snapshot(disk: &Disk, history: &Arc<History>, client: &mut Client, random: &mut Random) {
    let node = disk.node();
    let snapshots = node.driver().snapshots().unwrap();
    let list = snapshots.list().await.unwrap();
    let asked = history.mark(2);
    if list.len() < 3 && random.next(3) > 0 {
        let id = list.iter().map(|one| one.id.parse::<u64>().unwrap()).max().unwrap_or(0) + 1;
        let facts = SnapshotFacts { id: id.to_string(), name: format!("s{id}"), ..SnapshotFacts::default() };
        snapshots.create(&facts).await.unwrap();
    } else if !list.is_empty() {
        snapshots.delete(&list[random.next(list.len())].id).await.unwrap();
    } else {
        return;
    }
    client.flushes.push((asked, history.mark(2)));
}

/// Gives the disk another length. What completed before is as durable as after a flush; what is cut off does not come back.
async fn resize(graph: &mut Graph, disk: &Disk, history: &Arc<History>, client: &mut Client, random: &mut Random) {
    let blocks = 64 + random.next(1536);
    let asked = history.mark(3);
    graph.resize(&disk.node(), u64::try_from(blocks * BLOCK).unwrap()).await.unwrap();
    let done = history.mark(3);
    for block in client.blocks.iter_mut().skip(blocks) {
        block.push(Change { byte: 0, asked, done });
    }
    while client.blocks.len() < blocks {
        client.blocks.push(vec![Change { byte: 0, asked: 0, done: 0 }]);
    }
    client.sizes.push((asked, done, blocks));
    client.flushes.push((asked, done));
}

async fn work(
    graph: &mut Graph,
    disk: &Disk,
    history: &Arc<History>,
    client: &mut Client,
    random: &mut Random,
    rounds: usize,
) {
    let mut next = 1u8;
    for _ in 0..rounds {
        let total = client.size();
        // Up to six requests on different blocks, and perhaps a flush among them.
        let mut running = tokio::task::JoinSet::new();
        let parts = 1 + random.next(6);
        let window = if random.next(2) == 0 { total } else { total.min(96) };
        let base = random.next(total - window + 1);
        for i in 0..parts {
            let part = window / parts;
            let from = random.next(part);
            let count = 1 + random.next((part - from).min(24));
            let kind = random.next(10);
            next = next.checked_add(1).unwrap_or(1);
            let (disk, history, byte, first) = (disk.clone(), Arc::clone(history), next, base + i * part + from);
            running.spawn_local(async move {
                let (asked, done) = one(&disk, &history, first, count, kind, byte).await;
                (
                    first,
                    count,
                    if kind == 0 {
                        Some(0)
                    } else if kind == 1 {
                        None
                    } else {
                        Some(byte)
                    },
                    asked,
                    done,
                )
            });
        }
        if random.next(3) == 0 {
            let asked = history.mark(1);
            disk.flush().await.unwrap();
            client.flushes.push((asked, history.mark(1)));
        }
        while let Some(result) = running.join_next().await {
            let (first, count, byte, asked, done) = result.unwrap();
            for block in &mut client.blocks[first..first + count] {
                // A discard leaves the old bytes or zeroes.
                match byte {
                    Some(byte) => block.push(Change { byte, asked, done }),
                    None => {
                        let old = block.last().unwrap().byte;
                        block.push(Change { byte: old, asked, done });
                        block.push(Change { byte: 0, asked, done });
                        // Undecided for good, so it has to be decided: the tracker reads it back below.
                    }
                }
            }
        }
        if client.snapshots && random.next(4) == 0 {
            snapshot(disk, history, client, random).await;
        }
        if client.resizes && random.next(4) == 0 {
            resize(graph, disk, history, client, random).await;
        }
        // What discards made of their blocks.
        let size = client.size();
        for (i, block) in client.blocks.iter_mut().take(size).enumerate() {
            let [.., old, zero] = &block[..] else { continue };
            if old.asked == zero.asked && old.done == zero.done {
                let buf = IoBuf::alloc(BLOCK);
                disk.read(u64::try_from(i * BLOCK).unwrap(), &buf).await.unwrap();
                let byte = buf.to_vec()[0];
                let (asked, done) = (zero.asked, zero.done);
                if byte != 0 {
                    block.push(Change { byte, asked, done });
                }
            }
        }
    }
}

/// The bytes that a block may have after a crash before step `crash`.
fn allowed(block: &[Change], flushes: &[(usize, usize)], crash: usize) -> Vec<u8> {
    let flushed = flushes.iter().filter(|(_, done)| *done < crash).map(|(asked, _)| *asked).max().unwrap_or(0);
    let durable = block.iter().rposition(|change| change.done <= flushed).unwrap_or(0);
    // A discard is several entries of one time; each of them is as durable as the others.
    let time = (block[durable].asked, block[durable].done);
    let first = block.iter().position(|change| (change.asked, change.done) == time).unwrap_or(durable);
    block[first..].iter().filter(|change| change.asked <= crash).map(|change| change.byte).collect()
}

fn survives_crashes(name: &'static str, prepare: impl Fn(&Path, &str), seed: u64, extra: &serde_json::Value) {
    let dir = folder();
    prepare(dir.path(), "image");
    let content = std::fs::read(dir.path().join("image")).unwrap();
    run(dir.path(), "qemu-img", &["convert", "-f", "qcow2", "-O", "raw", "image", "flat"]);
    let before = std::fs::read(dir.path().join("flat")).unwrap();
    let rounds = std::env::var("QCOW2_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(25);
    let mut node = json!({ "driver": "qcow2", "node-name": "q", "discard": "unmap", "file": "medium" });
    node.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    let path = dir.path().to_owned();
    on_thread(move || async move {
        let local = tokio::task::LocalSet::new();
        local
            .run_until(async {
                let mut graph = graph();
                let (driver, history) = CrashDriver::open(content);
                graph.adopt("medium", driver, NodeOptions::default()).await.unwrap();
                graph.add(&options(&node)).await.unwrap();
                let disk = attach(&mut graph, "q", true).await;
                let stays = name.contains("stays");
                if stays {
                    graph.outlive(&disk);
                }
                let start = |block: &[u8]| vec![Change { byte: block[0], asked: 0, done: 0 }];
                let mut client = Client {
                    blocks: before.chunks(BLOCK).map(start).collect(),
                    flushes: Vec::new(),
                    sizes: vec![(0, 0, before.len() / BLOCK)],
                    snapshots: name.contains("snapshots"),
                    resizes: name.contains("resized"),
                };
                let mut random = Random(seed);
                work(&mut graph, &disk, &history, &mut client, &mut random, rounds).await;
                graph.detach(disk).await;
                graph.close_all().await;
                let steps = history.steps().len();
                println!("{name}: {steps} steps, {} flushes", client.flushes.len());
                // Each point is looked at twice where the client stays.
                let points = if stays { 20 } else { 40 };
                for i in 0..points {
                    let crash = steps * (i + 1) / points;
                    // All, nothing, or some of what was not flushed.
                    let share = random.next(5);
                    let mut dice = Random(random.0);
                    let image = history.image_at(crash, || dice.next(4) < share);
                    verify(&path, name, &image, &client, crash, &node, false).await;
                    if stays {
                        let image = history.image_if_killed(crash, || dice.next(2) == 0);
                        verify(&path, name, &image, &client, crash, &node, true).await;
                    }
                }
            })
            .await;
    });
}

/// What a power failure left, or a process that was killed.
async fn verify(
    dir: &Path,
    name: &str,
    image: &[u8],
    client: &Client,
    crash: usize,
    node: &serde_json::Value,
    killed: bool,
) {
    std::fs::write(dir.join("crashed"), image).unwrap();
    // With lazy refcounts an image is dirty after a crash, and repaired by who opens it for writing.
    let dirty = image.get(79).is_some_and(|bits| bits & 1 != 0);
    if dirty {
        run(dir, "qemu-img", &["check", "-q", "-r", "all", "-f", "qcow2", "crashed"]);
    }
    let check =
        Command::new("qemu-img").args(["check", "-q", "-f", "qcow2", "crashed"]).current_dir(dir).output().unwrap();
    // 3 is leaks and nothing else.
    assert!(
        matches!(check.status.code(), Some(0 | 3)),
        "{name} at {crash}: {}{}",
        String::from_utf8_lossy(&check.stdout),
        String::from_utf8_lossy(&check.stderr)
    );
    let mut graph = graph();
    let (driver, _) = CrashDriver::open(image.to_vec());
    graph.adopt("medium", driver, NodeOptions { read_only: !dirty, ..NodeOptions::default() }).await.unwrap();
    let mut node = node.clone();
    node["read-only"] = json!(!dirty);
    node["discard"] = json!("ignore");
    graph.add(&options(&node)).await.unwrap();
    let disk = attach(&mut graph, "q", false).await;
    let size = usize::try_from(disk.size()).unwrap() / BLOCK;
    let known = client.sizes.iter().rposition(|(_, done, _)| *done < crash).unwrap_or(0);
    let mut sizes = client.sizes[known..].iter().filter(|(asked, ..)| *asked <= crash).map(|(.., blocks)| *blocks);
    assert!(sizes.any(|blocks| blocks == size), "{name}: crash at {crash}: {size} blocks");
    if name.contains("bitmaps") {
        verify_bitmap(dir, name, client, crash, size);
    }
    for (i, block) in client.blocks.iter().take(size).enumerate() {
        let buf = IoBuf::alloc(BLOCK);
        disk.read(u64::try_from(i * BLOCK).unwrap(), &buf).await.unwrap();
        // To those who stay what completed is as good as flushed, but for the host's power.
        let here = [(crash, crash - 1)];
        let allowed = allowed(block, if killed { &here } else { &client.flushes }, crash);
        for (j, byte) in buf.to_vec().into_iter().enumerate() {
            assert!(
                allowed.contains(&byte),
                "{name}: {} at {crash}: block {i} byte {j} is {byte}, and may be {allowed:?}; {:?}",
                if killed { "kill" } else { "crash" },
                block.iter().map(|c| (c.byte, c.asked, c.done)).collect::<Vec<_>>()
            );
        }
    }
    graph.detach(disk).await;
    graph.close_all().await;
}

/// A bitmap that counts as consistent after a crash has all that was changed before.
fn verify_bitmap(dir: &Path, name: &str, client: &Client, crash: usize, size: usize) {
    let info = run(dir, "qemu-img", &["info", "-f", "qcow2", "--output=json", "crashed"]);
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    let bitmap = &info["format-specific"]["data"]["bitmaps"][0];
    if bitmap["flags"].as_array().unwrap().iter().any(|flag| flag == "in-use") {
        return;
    }
    let map = ["--map=qemu:dirty-bitmap:b", "--json", "--"];
    let server = ["[", "qemu-nbd", "-r", "-f", "qcow2", "-B", "b", "crashed", "]"];
    let runs = run(dir, "nbdinfo", &[&map[..], &server[..]].concat());
    let runs: serde_json::Value = serde_json::from_str(&runs).unwrap();
    let runs: Vec<(u64, u64)> = runs
        .as_array()
        .unwrap()
        .iter()
        .filter(|run| run["type"] == 1)
        .map(|run| (run["offset"].as_u64().unwrap(), run["offset"].as_u64().unwrap() + run["length"].as_u64().unwrap()))
        .collect();
    for (i, block) in client.blocks.iter().take(size).enumerate() {
        let at = u64::try_from(i * BLOCK).unwrap();
        let cut = client.sizes.iter().filter(|(_, done, blocks)| *done < crash && *blocks <= i).map(|cut| cut.0).max();
        // What the client has written there since the disk last ended before it. A discard, which is several entries of one
        // time, may have been passed over.
        let once = |change: &&Change| block.iter().filter(|other| other.asked == change.asked).count() == 1;
        let since = |change: &&Change| change.asked > cut.unwrap_or(0) && change.done < crash;
        let mut changed = block.iter().filter(since).filter(once);
        let known = runs.iter().any(|(from, to)| (*from..*to).contains(&at));
        assert!(known || changed.next().is_none(), "{name}: crash at {crash}: block {i} is not in the bitmap");
    }
}

fn shape(options: &'static str) -> impl Fn(&Path, &str) {
    move |dir, image| create(dir, &format!("-o {options} {image} 2M"))
}

#[test]
fn fresh_images() {
    if !has_qemu() {
        return;
    }
    let none = json!({});
    let lazy = json!({
        "l2-cache-size": 1024, "refcount-cache-size": 512, "l2-cache-entry-size": 512, "lazy-refcounts": true
    });
    let tight = json!({ "l2-cache-size": 1024, "refcount-cache-size": 512, "l2-cache-entry-size": 512 });
    survives_crashes("64k", shape("compat=1.1"), 11, &none);
    survives_crashes("v2", shape("compat=0.10,cluster_size=4k"), 12, &none);
    survives_crashes("4k", shape("cluster_size=4k"), 13, &none);
    // The refcount table grows.
    survives_crashes("512, small caches", shape("cluster_size=512,refcount_bits=64"), 14, &tight);
    survives_crashes("lazy", shape("cluster_size=4k,lazy_refcounts=on"), 16, &none);
    survives_crashes("lazy by option, small caches", shape("cluster_size=512"), 17, &lazy);
    survives_crashes("extended", shape("extended_l2=on,cluster_size=16k"), 15, &none);
}

#[test]
fn images_with_a_past() {
    if !has_qemu() {
        return;
    }
    let none = json!({});
    let snapshot = |dir: &Path, image: &str| {
        create(dir, &format!("-o cluster_size=4k {image} 2M"));
        qemu_io(dir, image, &["write -P 201 0 1M"]);
        run(dir, "qemu-img", &["snapshot", "-c", "one", image]);
    };
    survives_crashes("snapshot", snapshot, 21, &none);
    let compressed = |dir: &Path, image: &str| {
        create(dir, "source 2M");
        qemu_io(dir, "source", &["write -P 202 0 2M"]);
        run(dir, "qemu-img", &["convert", "-c", "-O", "qcow2", "source", image]);
    };
    survives_crashes("compressed", compressed, 22, &none);
}

#[test]
fn clients_that_stay() {
    if !has_qemu() {
        return;
    }
    let none = json!({});
    let tight = json!({ "l2-cache-size": 1024, "refcount-cache-size": 512, "l2-cache-entry-size": 512 });
    survives_crashes("stays, 64k", shape("compat=1.1"), 51, &none);
    survives_crashes("stays, v2, 4k", shape("compat=0.10,cluster_size=4k"), 52, &none);
    survives_crashes("stays, 512, small caches", shape("cluster_size=512,refcount_bits=64"), 53, &tight);
    survives_crashes("stays, lazy", shape("cluster_size=4k,lazy_refcounts=on"), 54, &none);
    survives_crashes("stays, extended", shape("extended_l2=on,cluster_size=16k"), 55, &none);
    survives_crashes("stays, snapshots", shape("cluster_size=4k"), 56, &none);
    survives_crashes("stays, resized", shape("cluster_size=1k"), 57, &none);
    let full = |dir: &Path, image: &str| {
        create(dir, "-o cluster_size=4k source 2M");
        qemu_io(dir, "source", &["write -P 202 0 2M"]);
        run(dir, "qemu-img", &["convert", "-c", "-O", "qcow2", "source", image]);
        run(dir, "qemu-img", &["snapshot", "-c", "one", image]);
    };
    survives_crashes("stays, compressed, with a past", full, 58, &none);
}

/// Clusters that show through, and such that nothing shows through in, of a format and of a file with a hole.
#[test]
fn clients_that_stay_on_overlays() {
    if !has_qemu() {
        return;
    }
    let below = folder();
    create(below.path(), "-o cluster_size=4k base 2M");
    qemu_io(below.path(), "base", &["write -P 203 0 300k", "write -z 300k 200k", "write -P 204 1M 512k"]);
    run(below.path(), "qemu-img", &["convert", "-f", "qcow2", "-O", "raw", "base", "flat"]);
    let (base, flat) = (below.path().join("base"), below.path().join("flat"));
    let overlay = |dir: &Path, image: &str| {
        create(dir, &format!("-o cluster_size=16k -b {} -F qcow2 {image}", base.display()));
    };
    let file = json!({ "driver": "file", "filename": base, "locking": "off" });
    let backing = json!({ "backing": { "driver": "qcow2", "file": file } });
    survives_crashes("stays, overlay", overlay, 59, &backing);
    let overlay = |dir: &Path, image: &str| {
        create(dir, &format!("-o cluster_size=64k,extended_l2=on -b {} -F raw {image}", flat.display()));
    };
    let backing = json!({ "backing": { "driver": "file", "filename": flat, "locking": "off" } });
    survives_crashes("stays, overlay of a file", overlay, 60, &backing);
}

#[test]
fn snapshots_come_and_go() {
    if !has_qemu() {
        return;
    }
    let none = json!({});
    survives_crashes("snapshots, 64k", shape("compat=1.1"), 31, &none);
    survives_crashes("snapshots, v2, 4k", shape("compat=0.10,cluster_size=4k"), 32, &none);
    survives_crashes("snapshots, 512", shape("cluster_size=512,refcount_bits=64"), 33, &none);
    survives_crashes("snapshots, extended", shape("extended_l2=on,cluster_size=16k"), 34, &none);
    survives_crashes("snapshots, 32 bits", shape("cluster_size=1k,refcount_bits=32"), 35, &none);
}

#[test]
fn disks_are_resized() {
    if !has_qemu() {
        return;
    }
    let none = json!({});
    survives_crashes("resized, 64k", shape("compat=1.1"), 41, &none);
    survives_crashes("resized, 512", shape("cluster_size=512"), 42, &none);
    survives_crashes("resized, v2, 4k", shape("compat=0.10,cluster_size=4k"), 43, &none);
    survives_crashes("resized, lazy, 1k", shape("cluster_size=1k,lazy_refcounts=on"), 44, &none);
    survives_crashes("resized, extended", shape("extended_l2=on,cluster_size=16k"), 45, &none);
    survives_crashes("resized, with snapshots", shape("cluster_size=1k"), 46, &none);
    let bitmap = |options: &'static str| {
        move |dir: &Path, image: &str| {
            create(dir, &format!("-o {options} {image} 2M"));
            // So fine that its table grows beyond a cluster.
            run(dir, "qemu-img", &["bitmap", "--add", "-g", "512", image, "b"]);
        }
    };
    survives_crashes("resized, with bitmaps, 512", bitmap("cluster_size=512"), 47, &none);
    survives_crashes("resized, with bitmaps and snapshots, 4k", bitmap("cluster_size=4k"), 48, &none);
}
