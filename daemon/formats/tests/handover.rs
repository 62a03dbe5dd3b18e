//! Users that stay when the process dies: who is told of them, and what it costs. That it keeps what it promises is in `crash.rs`.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "a test")]

mod common;

use block::driver::Prealloc;
use block::graph::Change;
use block::testing::{CrashDriver, History, Step};
use block::{Disk, Driver, Errno, Facts, Graph, IoResult, Mapping, NodeOptions, Span, WriteFlags, ZeroFlags};
use buf::IoBuf;
use common::{attach, create, folder, graph, has_qemu, on_thread, options, qemu_io, run};
use serde_json::json;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

const CLUSTER: u64 = 64 << 10;

#[test]
fn who_is_told() {
    if !has_qemu() {
        return;
    }
    let dir = folder();
    create(dir.path(), "base 1M");
    create(dir.path(), "-b base -F qcow2 image 1M");
    create(dir.path(), "other 1M");
    let path = dir.path().to_owned();
    on_thread(move || async move {
        let qcow2 = |name: &str| {
            let file = json!({ "driver": "file", "node-name": format!("{name}-file"), "filename": path.join(name) });
            json!({ "driver": "qcow2", "node-name": name, "file": file })
        };
        let mut image = qcow2("image");
        image["backing"] = qcow2("base");
        let mut graph = graph();
        let filter = json!({ "driver": "copy-on-read", "node-name": "top", "file": image });
        graph.add(&options(&filter)).await.unwrap();
        graph.add(&options(&qcow2("other"))).await.unwrap();
        let told = |graph: &Graph| {
            let names = ["top", "image", "image-file", "base", "base-file", "other", "other-file"];
            names.into_iter().filter(|name| graph.get(name).unwrap().is_outlived()).collect::<Vec<_>>()
        };
        let disk = attach(&mut graph, "top", true).await;
        assert_eq!(told(&graph), [""; 0]);
        graph.outlive(&disk);
        // What only shows through is not written to.
        assert_eq!(told(&graph), ["top", "image", "image-file"]);
        let beside = attach(&mut graph, "image", false).await;
        let mut change = Change::new();
        change.move_edge(&graph.get("top").unwrap().parents()[0], graph.get("other").unwrap());
        graph.change(change).await.unwrap();
        assert_eq!(told(&graph), ["other", "other-file"]);
        graph.detach(disk).await;
        assert_eq!(told(&graph), [""; 0]);
        graph.detach(beside).await;
        graph.close_all().await;
    });
}

/// Writes and flushes of the medium since `from`.
fn since(history: &History, from: usize) -> (usize, usize) {
    let steps = history.steps();
    let count = |which: fn(&Step) -> bool| steps[from..].iter().filter(|step| which(step)).count();
    (count(|step| matches!(step, Step::Write { .. })), count(|step| matches!(step, Step::Flush)))
}

/// Writes a sector to each of these clusters, at once.
async fn write(disk: &Disk, clusters: std::ops::Range<u64>) {
    let mut running = tokio::task::JoinSet::new();
    for cluster in clusters {
        let disk = disk.clone();
        running.spawn_local(async move {
            let buf = IoBuf::alloc(512);
            buf.fill(7);
            disk.write(cluster * CLUSTER, &buf, WriteFlags::NONE).await.unwrap();
        });
    }
    running.join_all().await;
}

/// Runs `test` on the image in `dir`, whose user stays.
fn on_image(dir: &Path, test: impl AsyncFn(&mut Graph, &Disk, &History) + Send + 'static) {
    let content = std::fs::read(dir.join("image")).unwrap();
    let path = dir.to_owned();
    on_thread(move || async move {
        let work = async {
            let mut graph = graph();
            let (driver, history) = CrashDriver::open(content);
            graph.adopt("medium", driver, NodeOptions::default()).await.unwrap();
            let node = json!({ "driver": "qcow2", "node-name": "q", "discard": "unmap", "file": "medium" });
            graph.add(&options(&node)).await.unwrap();
            let disk = attach(&mut graph, "q", true).await;
            graph.outlive(&disk);
            test(&mut graph, &disk, &history).await;
            graph.detach(disk).await;
            graph.close_all().await;
            // Nothing that was set aside is left.
            std::fs::write(path.join("closed"), history.image_if_killed(usize::MAX, || false)).unwrap();
        };
        tokio::task::LocalSet::new().run_until(work).await;
    });
    run(dir, "qemu-img", &["check", "-q", "-f", "qcow2", "closed"]);
}

#[test]
fn clusters_that_are_set_aside_cost_one_barrier() {
    if !has_qemu() {
        return;
    }
    let dir = folder();
    create(dir.path(), "image 64M");
    on_image(dir.path(), async |_, disk, history| {
        write(disk, 0..32).await;
        // One turn for the first, in whose time the others come, and one for these.
        let (writes, flushes) = since(history, 0);
        assert!(flushes <= 2 && writes < 50, "{flushes} flushes, {writes} writes");
        let before = history.steps().len();
        for round in 1..6 {
            write(disk, round * 32..round * 32 + 32).await;
        }
        let (writes, flushes) = since(history, before);
        assert_eq!(flushes, 0, "nothing of this waits for the disk");
        assert!(writes <= 5 * 36, "{writes} writes");
        let before = history.steps().len();
        write(disk, 0..32).await;
        assert_eq!(since(history, before), (32, 0), "in place");
        let before = history.steps().len();
        disk.zero(Span::new(0, 4 * CLUSTER), ZeroFlags { may_unmap: true, ..ZeroFlags::default() }).await.unwrap();
        disk.discard(Span::new(4 * CLUSTER, 4 * CLUSTER)).await.unwrap();
        assert_eq!(since(history, before), (2, 0), "the entries alone");
    });
}

#[test]
fn copies_and_used_clusters_cost_a_barrier_for_all_that_wait() {
    if !has_qemu() {
        return;
    }
    let dir = folder();
    create(dir.path(), "image 64M");
    qemu_io(dir.path(), "image", &["write -P 1 0 4M"]);
    run(dir.path(), "qemu-img", &["snapshot", "-c", "one", "image"]);
    on_image(dir.path(), async |_, disk, history| {
        write(disk, 0..1).await;
        let before = history.steps().len();
        write(disk, 1..33).await;
        let (_, flushes) = since(history, before);
        assert!((1..4).contains(&flushes), "{flushes} flushes for 32 copies");
        // Space that was freed is used again before the file grows.
        disk.discard(Span::new(0, 64 * CLUSTER)).await.unwrap();
        disk.flush().await.unwrap();
        disk.flush().await.unwrap();
        let (before, length) = (history.steps().len(), disk.node().children()[0].size());
        write(disk, 0..32).await;
        assert!((1..4).contains(&since(history, before).1));
        assert_eq!(disk.node().children()[0].size(), length);
    });
}

/// Who dies leaks what was set aside, and the next one goes on.
#[test]
fn a_kill_leaks_what_was_set_aside() {
    if !has_qemu() {
        return;
    }
    let dir = folder();
    create(dir.path(), "image 64M");
    let path = dir.path().to_owned();
    on_image(dir.path(), async move |_, disk, history| {
        write(disk, 0..40).await;
        std::fs::write(path.join("killed"), history.image_if_killed(usize::MAX, || false)).unwrap();
    });
    let check = ["check", "--output=json", "-f", "qcow2", "killed"];
    let check = Command::new("qemu-img").args(check).current_dir(dir.path()).output().unwrap();
    let found: serde_json::Value = serde_json::from_slice(&check.stdout).unwrap();
    assert_eq!((check.status.code(), &found["corruptions"]), (Some(3), &json!(null)), "{found}");
    assert!(found["leaks"].as_u64().unwrap() <= 256, "{found}");
    run(dir.path(), "qemu-img", &["check", "-q", "-r", "leaks", "-f", "qcow2", "killed"]);
    qemu_io(dir.path(), "killed", &["read -P 7 2555904 512", "read -P 0 2556416 65024"]);
}

#[test]
fn an_image_in_a_device_has_no_end_to_set_aside() {
    if !has_qemu() {
        return;
    }
    let dir = folder();
    create(dir.path(), "image 4M");
    // As long as a device would be: what lies behind is free, and not at the end.
    let file = std::fs::OpenOptions::new().write(true).open(dir.path().join("image")).unwrap();
    file.set_len(8 << 20).unwrap();
    on_image(dir.path(), async |_, disk, history: &History| {
        write(disk, 0..8).await;
        assert!(since(history, 0).1 > 0);
        assert_eq!(disk.node().children()[0].size(), 8 << 20);
    });
}

/// A file on a file system with so much space.
#[derive(Default)]
struct Narrow {
    bytes: Mutex<Vec<u8>>,
    space: AtomicUsize,
    flushes: AtomicUsize,
}

struct NarrowDriver(Arc<Narrow>);

impl Driver for NarrowDriver {
    fn name(&self) -> &'static str {
        "narrow"
    }

    fn facts(&self) -> Facts {
        Facts::default()
    }

    async fn length(&self) -> IoResult<u64> {
        Ok(u64::try_from(self.0.bytes.lock().unwrap().len()).unwrap())
    }

    async fn read(&self, at: u64, buf: &IoBuf) -> IoResult {
        let (bytes, at) = (self.0.bytes.lock().unwrap(), usize::try_from(at).unwrap());
        buf.fill(0);
        buf.write_at(0, &bytes[at.min(bytes.len())..(at + buf.len()).min(bytes.len())]);
        Ok(())
    }

    async fn write(&self, at: u64, buf: &IoBuf, _: WriteFlags) -> IoResult {
        let (mut bytes, at) = (self.0.bytes.lock().unwrap(), usize::try_from(at).unwrap());
        let end = at + buf.len();
        if end > self.0.space.load(Ordering::Relaxed) {
            return Err(Errno::ENOSPC);
        }
        if end > bytes.len() {
            bytes.resize(end, 0);
        }
        buf.read_at(0, &mut bytes[at..end]);
        Ok(())
    }

    async fn flush(&self) -> IoResult {
        self.0.flushes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    async fn map(&self, span: Span, _: bool) -> IoResult<Mapping> {
        Ok(Mapping::data(span.len, span.at))
    }

    async fn truncate(&self, size: u64, _: bool, _: Prealloc) -> qapi::Result<()> {
        self.0.bytes.lock().unwrap().resize(usize::try_from(size).unwrap(), 0);
        Ok(())
    }
}

/// A full file system ends it, and space brings it back.
#[test]
fn clusters_are_set_aside_again_when_there_is_space() {
    if !has_qemu() {
        return;
    }
    let dir = folder();
    create(dir.path(), "image 64M");
    qemu_io(dir.path(), "image", &["write -P 1 32M 64k"]);
    let content = std::fs::read(dir.path().join("image")).unwrap();
    on_thread(move || async move {
        let work = async {
            let mut graph = graph();
            // Room for a few clusters, and not for what is set aside.
            let space = AtomicUsize::new(content.len() + 300_000);
            let narrow = Arc::new(Narrow { bytes: Mutex::new(content), space, ..Narrow::default() });
            graph.adopt("medium", Box::new(NarrowDriver(Arc::clone(&narrow))), NodeOptions::default()).await.unwrap();
            graph.add(&options(&json!({ "driver": "qcow2", "node-name": "q", "file": "medium" }))).await.unwrap();
            let disk = attach(&mut graph, "q", true).await;
            graph.outlive(&disk);
            let flushes = || narrow.flushes.load(Ordering::Relaxed);
            write(&disk, 0..1).await;
            let before = flushes();
            write(&disk, 1..2).await;
            assert!(flushes() > before, "none are set aside");
            narrow.space.store(1 << 30, Ordering::Relaxed);
            // What is set aside has to be counted, and the first place behind it found.
            write(&disk, 2..3).await;
            write(&disk, 3..5).await;
            let before = flushes();
            for cluster in 5..68 {
                write(&disk, cluster..cluster + 1).await;
            }
            assert_eq!(flushes(), before, "they are set aside again");
            graph.detach(disk).await;
            graph.close_all().await;
        };
        tokio::task::LocalSet::new().run_until(work).await;
    });
}
