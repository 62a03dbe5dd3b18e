//! Faults that the reference had: a discard in the middle of a write that copies (its commit b8bfb1478d), and data that is lost
//! when zeroes are detected and unmapped beside it (1d47eb6898).
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "a test")]

mod common;

use block::{Disk, Span, WriteFlags};
use buf::IoBuf;
use common::{attach, create, folder, graph, has_qemu, on_thread, options, qemu_io, run};
use serde_json::json;
use std::path::Path;

const CLUSTER: usize = 64 << 10;

/// A buffer of one byte.
fn filled(len: usize, byte: u8) -> IoBuf {
    let buf = IoBuf::alloc(len);
    buf.fill(byte);
    buf
}

async fn read(disk: &Disk, at: u64, len: usize) -> Vec<u8> {
    let buf = IoBuf::alloc(len);
    disk.read(at, &buf).await.unwrap();
    buf.to_vec()
}

/// An image that backs another one or has a snapshot, or whose clusters are compressed: what is written to is copied.
fn image(dir: &Path, kind: &str) {
    create(dir, "base 4M");
    qemu_io(dir, "base", &["write -P 1 0 4M"]);
    match kind {
        "backing" => create(dir, "-b base -F qcow2 image 4M"),
        "snapshot" => {
            std::fs::copy(dir.join("base"), dir.join("image")).unwrap();
            run(dir, "qemu-img", &["snapshot", "-c", "one", "image"]);
        }
        _ => drop(run(dir, "qemu-img", &["convert", "-c", "-O", "qcow2", "base", "image"])),
    }
}

/// The copy's read is held; meanwhile the cluster, its neighbours and all of them are discarded.
#[test]
fn a_discard_during_a_copy() {
    if !has_qemu() {
        return;
    }
    for kind in ["backing", "snapshot", "compressed"] {
        for (at, len) in [(0, 1), (0, 2), (1, 1), (0, 64)] {
            let dir = folder();
            image(dir.path(), kind);
            let path = dir.path().to_owned();
            on_thread(move || async move {
                let file = |name: &str| json!({ "driver": "file", "filename": path.join(name).to_str().unwrap() });
                let held =
                    |name: &str, node: &str| json!({ "driver": "x-fault", "node-name": node, "file": file(name) });
                let mut node = json!({
                    "driver": "qcow2", "node-name": "q", "discard": "unmap", "file": held("image", "image")
                });
                if kind == "backing" {
                    node["backing"] = json!({ "driver": "qcow2", "file": held("base", "base") });
                }
                let mut graph = graph();
                graph.add(&options(&node)).await.unwrap();
                let disk = attach(&mut graph, "q", true).await;
                let slow = std::sync::Arc::clone(graph.get(if kind == "backing" { "base" } else { "image" }).unwrap());
                // Tables are in memory from here on, so that what is held is the copy.
                read(&disk, 3 << 20, 512).await;
                let rule = json!({ "action": "hold", "iotype": "read" });
                let rules = [qapi::Qapi::from_value(&rule).unwrap()];
                slow.driver().fault_control().unwrap().set_rules(&rules).unwrap();
                let local = tokio::task::LocalSet::new();
                let span = Span::new(at * u64::try_from(CLUSTER).unwrap(), len * u64::try_from(CLUSTER).unwrap());
                local
                    .run_until(async {
                        let writer = disk.clone();
                        let write = tokio::task::spawn_local(async move {
                            writer.write(4096, &filled(4096, 7), WriteFlags::NONE).await
                        });
                        while slow.driver().fault_control().unwrap().info().held == 0 {
                            tokio::task::yield_now().await;
                        }
                        let discarder = disk.clone();
                        let discard = tokio::task::spawn_local(async move { discarder.discard(span).await });
                        for _ in 0..100 {
                            tokio::task::yield_now().await;
                        }
                        slow.driver().fault_control().unwrap().set_rules(&[]).unwrap();
                        slow.driver().fault_control().unwrap().release();
                        write.await.unwrap().unwrap();
                        discard.await.unwrap().unwrap();
                        // New data takes whatever clusters were given up.
                        for i in 20..40 {
                            let at = i * u64::try_from(CLUSTER).unwrap();
                            disk.write(at, &filled(CLUSTER, 9), WriteFlags::NONE).await.unwrap();
                        }
                        disk.flush().await.unwrap();
                    })
                    .await;
                let first = read(&disk, 0, CLUSTER).await;
                for (i, byte) in first.iter().enumerate() {
                    let old = if (4096..8192).contains(&i) { 7 } else { 1 };
                    assert!(*byte == old || (at == 0 && *byte == 0), "{kind} {span:?}: {byte} at {i}");
                }
                let second = read(&disk, u64::try_from(CLUSTER).unwrap(), CLUSTER).await;
                assert!(second.iter().all(|byte| *byte <= 1), "{kind} {span:?}");
                graph.detach(disk).await;
                graph.close_all().await;
            });
            run(dir.path(), "qemu-img", &["check", "-q", "-f", "qcow2", "image"]);
        }
    }
}

/// Zeroes and data to the same clusters at the same time: the zeroes become unmapping zero requests.
#[test]
fn detected_zeroes_beside_data() {
    if !has_qemu() {
        return;
    }
    for (shape, kind) in [("", "fresh"), ("-o extended_l2=on", "subclusters"), ("-b base -F qcow2", "backing")] {
        let dir = folder();
        create(dir.path(), "base 4M");
        qemu_io(dir.path(), "base", &["write -P 1 0 4M"]);
        create(dir.path(), &format!("{shape} image 4M"));
        let path = dir.path().to_owned();
        on_thread(move || async move {
            let file = json!({ "driver": "file", "filename": path.join("image").to_str().unwrap() });
            let node = json!({
                "driver": "qcow2", "node-name": "q", "discard": "unmap", "detect-zeroes": "unmap", "file": file
            });
            let mut graph = graph();
            graph.add(&options(&node)).await.unwrap();
            let disk = attach(&mut graph, "q", true).await;
            let local = tokio::task::LocalSet::new();
            local
                .run_until(async {
                    let mut state = 99u64;
                    for round in 0u8..40 {
                        // Each block of a few clusters is written once, in any order, some with zeroes.
                        let mut running = tokio::task::JoinSet::new();
                        let mut expected = Vec::new();
                        for block in 0..64u64 {
                            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                            let byte = if state >> 62 < 2 { 0 } else { round + 1 };
                            let (disk, at) = (disk.clone(), (1 << 20) + block * 4096);
                            running.spawn_local(
                                async move { disk.write(at, &filled(4096, byte), WriteFlags::NONE).await },
                            );
                            expected.extend([byte; 4096]);
                        }
                        while let Some(done) = running.join_next().await {
                            done.unwrap().unwrap();
                        }
                        assert!(read(&disk, 1 << 20, 64 * 4096).await == expected, "{kind}, round {round}");
                    }
                })
                .await;
            graph.detach(disk).await;
            graph.close_all().await;
        });
        run(dir.path(), "qemu-img", &["check", "-q", "-f", "qcow2", "image"]);
    }
}
