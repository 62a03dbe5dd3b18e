//! Exports on IOThreads, one or several, with several clients, while the graph changes.

use serde_json::json;
use tests::image::Noise;
use tests::nbd::{Headers, cmd, flag};
use tests::{Daemon, Setup, known_defect, on_reference, skip};

const MIB: u64 = 1 << 20;

/// A daemon with two IOThreads and the export `disk` on what `iothread` says.
fn serving(iothread: serde_json::Value) -> Daemon {
    let export =
        json!({"type": "nbd", "id": "e", "node-name": "f", "name": "disk", "writable": true, "iothread": iothread});
    Setup::new()
        .qmp()
        .image("a.img", 8 * MIB)
        .line("--object iothread,id=t0 --object iothread,id=t1 --blockdev file,node-name=f,filename=a.img")
        .nbd_server()
        .arg("--export")
        .arg(export.to_string())
        .start()
}

/// Four clients, each in its own part of the image, each checking what it wrote.
fn work(daemon: &Daemon, rounds: u64) {
    std::thread::scope(|scope| {
        for part in 0..4_u64 {
            scope.spawn(move || {
                let (mut client, _) = daemon.nbd().open("disk", Headers::Structured);
                let mut noise = Noise::new(part + 77);
                for _ in 0..rounds {
                    let offset = part * 2 * MIB + noise.below(2 * MIB - 65536);
                    let len = usize::try_from(1 + noise.below(65536)).unwrap();
                    let data = noise.bytes(len);
                    assert_eq!(client.write(offset, flag::FUA, &data), 0);
                    assert!(client.read(offset, len as u64) == data, "{offset}+{len}");
                }
                assert_eq!(client.simple(cmd::FLUSH, 0, 0, 0), 0);
            });
        }
    });
}

#[test]
fn one_thread_serves_many_clients() {
    let daemon = serving(json!("t0"));
    work(&daemon, 100);
}

#[test]
fn a_list_of_threads_serves_many_clients() {
    if on_reference() {
        skip!("lists of threads are newer than this reference");
    }
    let daemon = serving(json!(["t0", "t1"]));
    work(&daemon, 100);
}

#[test]
fn the_graph_changes_under_load_on_a_thread() {
    if known_defect("X4") {
        return;
    }
    let daemon = serving(json!("t0"));
    std::thread::scope(|scope| {
        let load = scope.spawn(|| work(&daemon, 150));
        let mut qmp = daemon.qmp();
        while !load.is_finished() {
            qmp.ok("blockdev-add", json!({"driver": "raw", "node-name": "r", "file": "f", "read-only": true}));
            let export = json!({"type": "nbd", "id": "e2", "node-name": "r", "name": "second", "iothread": "t0"});
            qmp.ok("block-export-add", export);
            let (mut client, _) = daemon.nbd().open("second", Headers::Simple);
            client.read(0, 4096);
            qmp.ok("block-export-del", json!({"id": "e2", "mode": "hard"}));
            qmp.event("BLOCK_EXPORT_DELETED");
            qmp.ok("blockdev-del", json!({"node-name": "r"}));
        }
    });
    let stats = daemon.qmp().ok("query-blockstats", json!({"query-nodes": true}));
    assert_eq!(stats.as_array().unwrap().len(), 1);
}

#[test]
fn an_export_stays_on_its_thread_when_it_must() {
    let daemon = serving(json!("t0"));
    let mut qmp = daemon.qmp();
    let export =
        json!({"type": "nbd", "id": "e2", "node-name": "f", "name": "e2", "iothread": "t1", "fixed-iothread": true});
    // Nodes have no home thread here, so there is nothing that could keep it from t1.
    qmp.ok("block-export-add", export);
    let (mut client, _) = daemon.nbd().open("e2", Headers::Simple);
    client.read(0, 4096);
}

#[test]
fn the_daemon_ends_under_load() {
    let mut daemon = serving(json!("t0"));
    let clients: Vec<_> = (0..4).map(|_| daemon.nbd().open("disk", Headers::Structured).0).collect();
    let load: Vec<_> = clients
        .into_iter()
        .map(|mut client| {
            std::thread::spawn(move || {
                // Up to the end of the connection, which fails a write or a read: expected here.
                let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                    loop {
                        assert_eq!(client.write(0, 0, &[1; 65536]), 0);
                    }
                }));
            })
        })
        .collect();
    daemon.qmp().ok("query-block-exports", json!({}));
    daemon.stop();
    for load in load {
        load.join().unwrap();
    }
}
