//! Reads down a chain of overlays: the core goes down without the drivers where nothing but the backing file is to be read.
//! What else happens at a layer must happen all the same.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::print_stdout, reason = "a test")]

mod common;

use block::stats::Op;
use block::{Errno, Graph, Span, WriteFlags};
use buf::IoBuf;
use common::{attach, create, folder, graph, has_qemu, on_thread, options, qemu_io};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// A base full of data with three overlays, `one` of which is made with more options.
fn images(one: usize, more: &str) -> tempfile::TempDir {
    let dir = folder();
    create(dir.path(), "0.qcow2 4M");
    qemu_io(dir.path(), "0.qcow2", &["write -P 1 0 4M"]);
    for i in 1..4 {
        create(dir.path(), &format!("-b {}.qcow2 -F qcow2 {} {i}.qcow2 8M", i - 1, if i == one { more } else { "" }));
        // So that there is an L2 table, and what is behind the end of the base is in part this image's.
        qemu_io(dir.path(), &format!("{i}.qcow2"), &[&format!("write -P {} {}k 64k", i + 1, 1024 * i)]);
    }
    dir
}

/// The chain, its nodes `q0` to `q3` over `f0` to `f3`. `change` may make something else of a node's options.
async fn open(dir: &Path, change: impl Fn(usize, &mut Value)) -> Graph {
    let mut graph = graph();
    for i in 0..4 {
        let mut node = json!({
            "driver": "qcow2", "node-name": format!("q{i}"), "read-only": i != 3,
            "file": { "driver": "file", "node-name": format!("f{i}"), "filename": dir.join(format!("{i}.qcow2")) },
        });
        if i > 0 {
            node["backing"] = json!(format!("q{}", i - 1));
        }
        change(i, &mut node);
        graph.add(&options(&node)).await.unwrap();
    }
    graph
}

/// Operations, bytes and failures of a node's reads.
fn counted(graph: &Graph, name: &str) -> (u64, u64, u64) {
    let read = graph.get(name).unwrap().stats().read(Op::Read);
    (read.operations, read.bytes, read.failed)
}

/// Runs with the folder of a chain.
fn with_chain<F: Future<Output = ()> + 'static>(
    one: usize,
    more: &str,
    test: impl FnOnce(PathBuf) -> F + Send + 'static,
) {
    if !has_qemu() {
        return;
    }
    let dir = images(one, more);
    let path = dir.path().to_owned();
    on_thread(move || test(path));
}

#[test]
fn each_layer_is_counted_and_tables_are_read_once() {
    with_chain(0, "", |dir| async move {
        let mut graph = open(&dir, |_, _| {}).await;
        let disk = attach(&mut graph, "q3", false).await;
        let before: Vec<_> = (0..4).map(|i| counted(&graph, &format!("f{i}")).0).collect();
        let buf = IoBuf::alloc(4096);
        for round in 1..4 {
            buf.fill(0xEE);
            disk.read(12_288, &buf).await.unwrap();
            assert!(buf.to_vec().iter().all(|byte| *byte == 1));
            for (i, before) in before.iter().enumerate() {
                assert_eq!(counted(&graph, &format!("q{i}")), (round, 4096 * round, 0), "q{i}");
                // The table with the first read, and the data of the base with each.
                let file = counted(&graph, &format!("f{i}")).0 - before;
                assert_eq!(file, 1 + if i == 0 { round } else { 0 }, "f{i}");
            }
        }
        graph.detach(disk).await;
    });
}

#[test]
fn a_read_of_several_layers_and_beyond_the_end_of_some() {
    for top in ["", "-o extended_l2=on", "-o cluster_size=512"] {
        with_chain(3, top, |dir| async move {
            let mut graph = open(&dir, |_, _| {}).await;
            let disk = attach(&mut graph, "q3", true).await;
            let mut model = vec![0; 8 << 20];
            model[..4 << 20].fill(1);
            for i in 1..4 {
                model[1024 * 1024 * i..][..65536].fill(u8::try_from(i + 1).unwrap());
            }
            // Twice, for the second time all tables are in memory; then with what has been written and zeroed meanwhile.
            for round in 0..3 {
                for at in (0..model.len()).step_by(100_000) {
                    let len = 150_000.min(model.len() - at);
                    let buf = IoBuf::alloc(len);
                    buf.fill(0xEE);
                    disk.read(at.try_into().unwrap(), &buf).await.unwrap();
                    assert!(buf.to_vec() == model[at..at + len], "round {round}, bytes from {at}");
                }
                if round == 1 {
                    let data = IoBuf::copy_of(&[9; 3000]);
                    disk.write(1_500_000, &data, WriteFlags::NONE).await.unwrap();
                    model[1_500_000..1_503_000].fill(9);
                    disk.zero(Span::new(1024 * 1024, 65_536), Default::default()).await.unwrap();
                    model[1024 * 1024..][..65_536].fill(0);
                }
            }
            graph.detach(disk).await;
        });
    }
}

#[test]
fn events_of_a_layer_in_the_middle_are_raised() {
    with_chain(0, "", |dir| async move {
        let mut graph = open(&dir, |i, node| {
            if i == 2 {
                // What reads from the file after it has been read past the image to the backing file fails, once.
                let file = node["file"].take();
                node["file"] = json!({
                    "driver": "blkdebug", "image": file,
                    "inject-error": [{ "event": "read_backing_aio", "errno": 28, "once": true, "iotype": "read" }],
                });
            }
        })
        .await;
        let disk = attach(&mut graph, "q3", false).await;
        let buf = IoBuf::alloc(4096);
        let own = 2 << 20;
        disk.read(own, &buf).await.unwrap();
        disk.read(own, &buf).await.unwrap();
        // Its table is in memory by now: this goes past it.
        disk.read(12_288, &buf).await.unwrap();
        assert_eq!(disk.read(own, &buf).await, Err(Errno::ENOSPC), "the event has been raised");
        assert_eq!(disk.read(own, &buf).await, Ok(()));
        graph.detach(disk).await;
    });
}

#[test]
fn a_failure_at_the_bottom_is_counted_at_each_layer() {
    with_chain(0, "", |dir| async move {
        let mut graph = open(&dir, |i, node| {
            if i == 0 {
                let file = node["file"].take();
                node["file"] = json!({
                    "driver": "blkdebug", "image": file, "inject-error": [{ "event": "read_aio", "errno": 5, "once": true }],
                });
            }
        })
        .await;
        let disk = attach(&mut graph, "q3", false).await;
        let buf = IoBuf::alloc(4096);
        assert_eq!(disk.read(8192, &buf).await, Err(Errno::EIO));
        assert_eq!(disk.read(8192, &buf).await, Ok(()));
        for name in ["q3", "q2", "q1", "q0"] {
            assert_eq!(counted(&graph, name), (1, 4096, 1), "{name}");
        }
        graph.detach(disk).await;
    });
}

#[test]
fn a_filter_between_layers_is_not_left_out() {
    with_chain(0, "", |dir| async move {
        let mut graph = open(&dir, |i, node| {
            if i == 2 {
                node["backing"] = json!({
                    "driver": "blkdebug", "node-name": "between", "image": "q1",
                    "inject-error": [{ "event": "none", "errno": 28, "sector": 16, "iotype": "read" }],
                });
            }
        })
        .await;
        let disk = attach(&mut graph, "q3", false).await;
        let buf = IoBuf::alloc(4096);
        disk.read(0, &buf).await.unwrap();
        disk.read(0, &buf).await.unwrap();
        assert_eq!(disk.read(8192, &buf).await, Err(Errno::ENOSPC));
        assert_eq!(counted(&graph, "between"), (2, 8192, 1));
        assert_eq!(counted(&graph, "q1"), (2, 8192, 0));
        graph.detach(disk).await;
    });
}

#[test]
fn damage_of_a_layer_in_the_middle_is_found() {
    with_chain(2, "-o cluster_size=4k", |dir| async move {
        // The second entry of an L1 table names the second slice of the first one's table.
        let mut bytes = std::fs::read(dir.join("2.qcow2")).unwrap();
        let be = |bytes: &[u8], at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
        let l1 = usize::try_from(be(&bytes, 40)).unwrap();
        let table = be(&bytes, l1 + 8);
        bytes[l1..l1 + 8].copy_from_slice(&table.to_be_bytes());
        bytes[l1 + 8..l1 + 16].copy_from_slice(&(table + 512).to_be_bytes());
        std::fs::write(dir.join("2.qcow2"), bytes).unwrap();
        let mut graph = open(&dir, |i, node| {
            if i == 2 {
                node["l2-cache-entry-size"] = json!(512);
            }
        })
        .await;
        let disk = attach(&mut graph, "q3", false).await;
        let buf = IoBuf::alloc(4096);
        // Now that slice is in memory.
        disk.read(300 << 10, &buf).await.unwrap();
        for failed in 1..3 {
            assert_eq!(disk.read(2 << 20, &buf).await, Err(Errno::EIO));
            assert_eq!(counted(&graph, "q2"), (1, 4096, failed));
            assert_eq!(counted(&graph, "q1"), (1, 4096, 0));
        }
        graph.detach(disk).await;
    });
}
