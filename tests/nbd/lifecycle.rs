//! Exports and servers that come and go while clients are there; resize under a live export; accounting.

use serde_json::json;
use tests::nbd::{Headers, Request, cmd, opt, rep};
use tests::{Daemon, Setup, known_defect, wait_for};

const MIB: u64 = 1 << 20;

fn serving() -> Daemon {
    Setup::new().qmp().serving("disk", MIB).start()
}

#[test]
fn an_export_in_use_is_removed_hard_only() {
    let daemon = serving();
    let mut qmp = daemon.qmp();
    let (mut client, _) = daemon.nbd().open("disk", Headers::Simple);
    for mode in [json!({"id": "exp-disk"}), json!({"id": "exp-disk", "mode": "safe"})] {
        assert_eq!(qmp.refused("block-export-del", mode), "export 'exp-disk' still in use");
    }
    assert_eq!(client.read(0, 4), [0; 4]);
    qmp.ok("block-export-del", json!({"id": "exp-disk", "mode": "hard"}));
    assert_eq!(qmp.event("BLOCK_EXPORT_DELETED"), json!({"id": "exp-disk"}));
    assert!(client.closed());
    assert_eq!(qmp.ok("query-block-exports", json!({})), json!([]));
    assert_eq!(qmp.refused("block-export-del", json!({"id": "exp-disk"})), "Export 'exp-disk' is not found");
    let mut client = daemon.nbd();
    client.greet();
    assert_eq!(client.go("disk").unwrap_err().kind, rep::ERR_UNKNOWN);
}

#[test]
fn an_export_out_of_use_is_removed() {
    let daemon = serving();
    let mut qmp = daemon.qmp();
    drop(daemon.nbd().open("disk", Headers::Simple));
    wait_for("the export to be out of use", || qmp.execute("block-export-del", json!({"id": "exp-disk"})).ok());
    assert_eq!(qmp.event("BLOCK_EXPORT_DELETED"), json!({"id": "exp-disk"}));
    qmp.ok("blockdev-del", json!({"node-name": "disk"}));
}

#[test]
fn an_export_is_listed_with_its_parts() {
    let daemon = serving();
    let mut exports = daemon.qmp().ok("query-block-exports", json!({}));
    // Not in the reference.
    exports[0].as_object_mut().unwrap().remove("x-statistics");
    assert_eq!(exports, json!([{"id": "exp-disk", "node-name": "disk", "type": "nbd", "shutting-down": false}]));
}

#[test]
fn a_server_stops_and_starts_again() {
    let daemon = serving();
    let mut qmp = daemon.qmp();
    let (mut client, _) = daemon.nbd().open("disk", Headers::Simple);
    qmp.ok("nbd-server-stop", json!({}));
    assert!(client.closed());
    assert_eq!(qmp.event("BLOCK_EXPORT_DELETED"), json!({"id": "exp-disk"}));
    assert_eq!(qmp.refused("nbd-server-stop", json!({})), "NBD server not running");
    let export = json!({"type": "nbd", "id": "again", "node-name": "disk", "name": "disk", "writable": true});
    assert_eq!(qmp.refused("block-export-add", export.clone()), "NBD server not running");
    let addr = json!({"addr": {"type": "unix", "data": {"path": daemon.path("again.sock")}}});
    qmp.ok("nbd-server-start", addr.clone());
    assert_eq!(qmp.refused("nbd-server-start", addr), "NBD server already running");
    qmp.ok("block-export-add", export);
    let (mut client, _) = tests::nbd::Client::connect_unix(&daemon.path("again.sock")).open("disk", Headers::Simple);
    assert_eq!(client.write(0, 0, b"x"), 0);
}

#[test]
fn the_old_commands() {
    let daemon = serving();
    let mut qmp = daemon.qmp();
    qmp.ok("blockdev-add", json!({"driver": "null-co", "node-name": "n", "size": MIB, "read-only": true}));
    // The old command makes an export of a read-only node read-only and says nothing.
    qmp.ok("nbd-server-add", json!({"device": "n", "name": "old", "writable": true, "description": "text"}));
    let (client, export) = daemon.nbd().open("old", Headers::Simple);
    assert_eq!(export.flags & 2, 2);
    drop(client);
    wait_for("the export to be out of use", || qmp.execute("nbd-server-remove", json!({"name": "old"})).ok());
    assert_eq!(qmp.event("BLOCK_EXPORT_DELETED"), json!({"id": "old"}));
    assert_eq!(qmp.refused("nbd-server-remove", json!({"name": "old"})), "Export 'old' is not found");
    let addr = json!({"type": "unix", "path": daemon.path("guest.sock")});
    qmp.ok("block-export-add", json!({"type": "vhost-user-blk", "id": "g", "node-name": "disk", "addr": addr}));
    assert_eq!(qmp.refused("nbd-server-remove", json!({"name": "g"})), "Block export 'g' is not an NBD export");
}

#[test]
fn a_node_under_an_export_stays() {
    let daemon = serving();
    let mut qmp = daemon.qmp();
    assert_eq!(qmp.refused("blockdev-del", json!({"node-name": "disk"})), "Node disk is in use");
}

#[test]
fn resize_under_a_live_export() {
    let daemon = serving();
    let mut qmp = daemon.qmp();
    let (mut client, _) = daemon.nbd().open("disk", Headers::Structured);
    assert_eq!(client.write(0, 0, b"stays"), 0);
    let resized = qmp.execute("block_resize", json!({"node-name": "disk", "size": 2 * MIB}));
    if known_defect("X7") {
        assert!(resized.unwrap_err().desc.starts_with("Permission conflict on node 'disk': permissions 'resize'"));
        return;
    }
    resized.unwrap();
    assert_eq!(std::fs::metadata(daemon.path("disk.img")).unwrap().len(), 2 * MIB);
    // The client that is there may use the new end, and a new one is told of it.
    assert_eq!(client.write(2 * MIB - 3, 0, b"end"), 0);
    let (mut second, export) = daemon.nbd().open("disk", Headers::Structured);
    assert_eq!(export.size, 2 * MIB);
    assert_eq!(second.read(2 * MIB - 3, 3), b"end");
    assert_eq!(second.read(0, 5), b"stays");
    // Smaller again: what is beyond is an error, not a crash.
    qmp.ok("block_resize", json!({"node-name": "disk", "size": MIB}));
    assert_ne!(client.write(2 * MIB - 3, 0, b"end"), 0);
    assert_eq!(client.read(0, 5), b"stays");
}

#[test]
fn resize_while_a_request_is_half_received() {
    let daemon = serving();
    let mut qmp = daemon.qmp();
    let (mut client, _) = daemon.nbd().open("disk", Headers::Structured);
    if known_defect("X4") {
        return;
    }
    let mut size = MIB;
    let request = Request { cmd: cmd::WRITE, offset: 0, len: 1000, payload: vec![0x5A; 1000], flags: 0 };
    for cut in [1, 3, 4, 16, 27, 28, 29, 500, 1027] {
        let cookie = client.expect(&request);
        let bytes = client.encode(cookie, &request);
        client.send_raw(&bytes[..cut]);
        size += 4096;
        qmp.ok("block_resize", json!({"node-name": "disk", "size": size}));
        client.send_raw(&bytes[cut..]);
        let reply = client.reply();
        assert_eq!((reply.cookie, reply.error), (cookie, 0), "cut at {cut}");
        assert_eq!(client.read(0, 1000), vec![0x5A; 1000], "cut at {cut}");
    }
}

#[test]
fn resize_under_load() {
    let daemon = serving();
    if known_defect("X7") {
        return;
    }
    let (mut client, _) = daemon.nbd().open("disk", Headers::Structured);
    let load = std::thread::spawn(move || {
        for round in 0..2000_u32 {
            let word = round.to_be_bytes();
            assert_eq!(client.write(u64::from(round % 256) * 4096, 0, &word), 0);
            assert_eq!(client.read(u64::from(round % 256) * 4096, 4), word);
        }
    });
    let mut qmp = daemon.qmp();
    let mut size = MIB;
    while !load.is_finished() {
        size = if size == MIB { 2 * MIB } else { MIB };
        qmp.ok("block_resize", json!({"node-name": "disk", "size": size}));
    }
    load.join().unwrap();
}

#[test]
fn exports_are_accounted() {
    let daemon = serving();
    let (mut client, _) = daemon.nbd().open("disk", Headers::Structured);
    assert_eq!(client.write(0, 0, &[1; 8192]), 0);
    client.read(0, 4096);
    client.read(4096, 4096);
    assert_eq!(client.simple(cmd::FLUSH, 0, 0, 0), 0);
    let stats = daemon.qmp().ok("query-blockstats", json!({"query-nodes": true}));
    let node = stats.as_array().unwrap().iter().find(|node| node["node-name"] == "disk").unwrap().clone();
    let count = |name: &str| node["stats"][name].as_u64().unwrap();
    if known_defect("X10") {
        assert_eq!(count("rd_operations"), 0);
        return;
    }
    assert_eq!((count("rd_operations"), count("rd_bytes")), (2, 8192));
    assert_eq!((count("wr_operations"), count("wr_bytes")), (1, 8192));
    assert_eq!(count("flush_operations"), 1);
    assert_eq!(count("failed_rd_operations"), 0);
    assert!(count("wr_highest_offset") >= 8192);
    assert!(count("rd_total_time_ns") > 0);
}

#[test]
fn an_iothread_serves() {
    let daemon = Setup::new()
        .qmp()
        .image("a.img", MIB)
        .line("--object iothread,id=t0 --blockdev file,node-name=f,filename=a.img")
        .nbd_server()
        .line("--export nbd,id=e,node-name=f,name=disk,writable=on,iothread=t0")
        .start();
    let (mut client, _) = daemon.nbd().open("disk", Headers::Structured);
    assert_eq!(client.write(0, 0, b"thread"), 0);
    assert_eq!(client.read(0, 6), b"thread");
    let mut qmp = daemon.qmp();
    let wrong = json!({"type": "nbd", "id": "e2", "node-name": "f", "name": "e2", "iothread": "nosuch"});
    assert_eq!(qmp.refused("block-export-add", wrong), "iothread \"nosuch\" not found");
    qmp.ok("block-export-del", json!({"id": "e", "mode": "hard"}));
    assert!(client.closed());
}

#[test]
fn writethrough_exports_serve() {
    let daemon = Setup::new()
        .image("a.img", MIB)
        .line("--blockdev file,node-name=f,filename=a.img")
        .nbd_server()
        .line("--export nbd,id=e,node-name=f,name=disk,writable=on,writethrough=on")
        .start();
    let (mut client, _) = daemon.nbd().open("disk", Headers::Structured);
    assert_eq!(client.write(0, 0, b"through"), 0);
    assert_eq!(client.read(0, 7), b"through");
}

#[test]
fn several_clients_see_each_other() {
    let daemon = serving();
    let (mut one, export) = daemon.nbd().open("disk", Headers::Structured);
    assert!(export.flags & 1 << 8 != 0, "MULTI_CONN");
    let (mut two, _) = daemon.nbd().open("disk", Headers::Simple);
    for round in 0..50_u8 {
        assert_eq!(one.write(u64::from(round) * 100, 0, &[round; 100]), 0);
        assert_eq!(two.read(u64::from(round) * 100, 100), [round; 100]);
        assert_eq!(two.write(u64::from(round) * 100, 0, &[!round; 50]), 0);
        assert_eq!(one.read(u64::from(round) * 100, 50), [!round; 50]);
    }
}

#[test]
fn the_daemon_ends_while_clients_are_there() {
    let mut daemon = serving();
    let (mut idle, _) = daemon.nbd().open("disk", Headers::Structured);
    let mut halfway = daemon.nbd();
    halfway.greet();
    halfway.send_raw(b"IHAVE");
    let (mut cut, _) = daemon.nbd().open("disk", Headers::Structured);
    cut.send_raw(&[0x25, 0x60]);
    daemon.stop();
    assert!(idle.closed() && halfway.closed() && cut.closed());
}

#[test]
fn an_abort_is_acknowledged() {
    let daemon = serving();
    let mut client = daemon.nbd();
    client.greet();
    assert_eq!(client.option(opt::ABORT, &[])[0].kind, rep::ACK);
    assert!(client.closed());
}
