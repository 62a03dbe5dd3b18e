//! Users that stay when the process dies: who is told of them, and what it costs. That it keeps what it promises is in `crash.rs`.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "a test")]

mod common;

use block::graph::Change;
use block::testing::{CrashDriver, History, Step};
use block::{Disk, Graph, NodeOptions, Span, WriteFlags, ZeroFlags};
use buf::IoBuf;
use common::{attach, create, folder, graph, has_qemu, on_thread, options, qemu_io, run};
use serde_json::json;
use std::path::Path;
use std::process::Command;

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
