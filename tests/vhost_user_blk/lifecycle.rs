//! Exports and front-ends that come and go, and graphs that change below.

use super::{MIB, byte, client, serving, socket};
use serde_json::json;
use std::os::fd::AsFd;
use tests::vhost::{self, FrontEnd, GUEST, MEMORY, MONITOR, msg, protocol, req};
use tests::{Setup, known_defect, wait_for};

#[test]
fn one_front_end_after_the_other() {
    let daemon = serving("writable=on");
    for turn in 0..20_u8 {
        let mut front = client(&daemon);
        front.write(u64::from(turn), &[turn; 512]);
    }
    let mut front = client(&daemon);
    for turn in 0..20_u8 {
        assert_eq!(front.read(u64::from(turn), 512), [turn; 512]);
    }
}

#[test]
fn a_second_front_end_waits_for_the_first() {
    let daemon = serving("writable=on");
    let mut first = client(&daemon);
    let second = FrontEnd::connect(&socket(&daemon));
    second.send(msg::GET_FEATURES, 0, &[], &[]);
    first.write(0, &[1; 512]);
    drop(first);
    assert_eq!(second.receive().unwrap().request, msg::GET_FEATURES);
}

#[test]
fn an_export_in_use_is_removed_hard_only() {
    let daemon = serving("writable=on");
    let mut qmp = daemon.qmp();
    let mut front = client(&daemon);
    let mut export = qmp.ok("query-block-exports", json!({}))[0].take();
    // Not in the reference.
    export.as_object_mut().unwrap().remove("x-statistics");
    assert_eq!(export, json!({"id": "e", "node-name": "disk", "type": "vhost-user-blk", "shutting-down": false}));
    assert_eq!(front.read(0, 512), [0; 512]);
    if known_defect("the safe mode disconnects") {
        return;
    }
    assert_eq!(qmp.refused("block-export-del", json!({"id": "e"})), "export 'e' still in use");
    qmp.ok("block-export-del", json!({"id": "e", "mode": "hard"}));
    assert_eq!(qmp.event("BLOCK_EXPORT_DELETED"), json!({"id": "e"}));
    assert!(front.closed());
    assert_eq!(qmp.ok("query-block-exports", json!({})), json!([]));
    qmp.ok("blockdev-del", json!({"node-name": "disk"}));
    assert!(!socket(&daemon).exists() || known_defect("the socket's path stays"));
}

#[test]
fn an_export_out_of_use_is_removed_and_made_again() {
    let daemon = serving("writable=on");
    let mut qmp = daemon.qmp();
    drop(client(&daemon));
    wait_for("the export to be out of use", || qmp.execute("block-export-del", json!({"id": "e"})).ok());
    qmp.event("BLOCK_EXPORT_DELETED");
    let addr = json!({"type": "unix", "path": socket(&daemon)});
    let export = json!({"type": "vhost-user-blk", "id": "e", "node-name": "disk", "addr": addr, "writable": true});
    qmp.ok("block-export-add", export);
    client(&daemon).write(0, &[1; 512]);
}

#[test]
fn an_end_while_a_guest_is_there() {
    let mut daemon = serving("writable=on");
    let mut front = client(&daemon);
    for slot in 0..40 {
        front.submit(0, slot, req::OUT, u64::from(slot), &[1; 512], 0);
    }
    assert_eq!(daemon.stop(), "");
    assert!(front.closed());
}

#[test]
fn a_guest_learns_of_a_resize() {
    let daemon = serving("writable=on");
    let mut qmp = daemon.qmp();
    let mut front = client(&daemon);
    let channel = front.backend_channel();
    assert_eq!(front.request(0, req::IN, 16384, &[], 512).0, 1);
    if let Err(refusal) = qmp.execute("block_resize", json!({"node-name": "disk", "size": 9 * MIB})) {
        assert!(known_defect("X7"), "{refusal:?}");
        return;
    }
    let message = vhost::receive(&channel).unwrap();
    assert_eq!((message.request, message.payload.len()), (2, 0), "CONFIG_CHANGE");
    assert_eq!(front.config(8), (9 * 2048_u64).to_le_bytes());
    assert_eq!(front.read(16384, 512), [0; 512]);
}

#[test]
fn queues_are_stopped_and_started_again() {
    let daemon = serving("writable=on,num-queues=2");
    let mut front = FrontEnd::start(&socket(&daemon), 2, 0);
    for turn in 0..10 {
        for _ in 0..turn {
            front.write(turn, &[3; 512]);
        }
        let base = front.stop_queue(0);
        // While it is stopped nothing is taken from it, and the other one runs.
        front.submit(0, 5, req::IN, turn, &[], 512);
        front.submit(1, 0, req::IN, 0, &[], 512);
        front.wait_used(1);
        assert_eq!(front.poll_used(0), None);
        front.start_queue(0, base);
        front.kick(0);
        assert_eq!(front.wait_used(0).0, 15);
        // Disabled, it takes nothing either.
        if known_defect("a queue that is disabled is served") {
            continue;
        }
        let (index, off, on) = ([0; 4], [0; 4], [1, 0, 0, 0]);
        front.tell(msg::SET_VRING_ENABLE, &[index, off].concat(), &[]);
        front.submit(0, 6, req::IN, turn, &[], 512);
        front.submit(1, 0, req::IN, 0, &[], 512);
        front.wait_used(1);
        assert_eq!(front.poll_used(0), None);
        front.tell(msg::SET_VRING_ENABLE, &[index, on].concat(), &[]);
        assert_eq!(front.wait_used(0).0, 18);
    }
}

/// A disk that does one request a second, so that others wait.
pub(crate) fn slow() -> tests::Daemon {
    Setup::new()
        .qmp()
        .image("disk.img", 8 * MIB)
        .line("--object throttle-group,id=g,x-iops-total=1")
        .line("--blockdev driver=file,node-name=f,filename=disk.img")
        .line("--blockdev driver=throttle,node-name=disk,file=f,throttle-group=g")
        .line(&super::export("writable=on"))
        .start()
}

/// It does as many as it can from now on.
pub(crate) fn fast(qmp: &mut tests::qmp::Client) {
    qmp.ok("qom-set", json!({"path": "/objects/g", "property": "limits", "value": {"iops-total": 0}}));
}

#[test]
fn memory_that_is_replaced_while_requests_run() {
    if known_defect("it writes to memory that was replaced") {
        return;
    }
    let daemon = slow();
    let mut front = client(&daemon);
    for slot in 0..20 {
        front.submit(0, slot, req::OUT, u64::from(slot), &[byte(slot + 1); 512], 0);
    }
    // The same memory in two regions instead of one, several times, while most of these wait.
    for _ in 0..5 {
        let half = MEMORY / 2;
        let mut table = [2u32, 0].iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<u8>>();
        let regions = [GUEST, half, MONITOR, 0, GUEST + half, half, MONITOR + half, half];
        table.extend(regions.iter().flat_map(|n: &u64| n.to_le_bytes()));
        front.tell(msg::SET_MEM_TABLE, &table, &[front.memory.as_fd(), front.memory.as_fd()]);
        front.share_memory();
    }
    fast(&mut daemon.qmp());
    let mut heads: Vec<u32> = (0..20).map(|_| front.wait_used(0).0).collect();
    heads.sort_unstable();
    assert_eq!(heads, (0..20).map(|slot| slot * 3).collect::<Vec<u32>>());
    for slot in 0..20 {
        assert_eq!(front.status(0, slot), 0);
        assert_eq!(front.read(u64::from(slot), 512), [byte(slot + 1); 512]);
    }
}

#[test]
fn memory_that_is_added_and_removed() {
    let daemon = serving("writable=on");
    let mut front = FrontEnd::connect(&socket(&daemon));
    front.negotiate(u64::MAX, u64::MAX);
    if front.protocol & protocol::CONFIGURE_MEM_SLOTS == 0 {
        panic!("no memory slots");
    }
    let region = |guest: u64, monitor: u64, offset: u64, size: u64| {
        [0, guest, size, monitor, offset].iter().flat_map(|n: &u64| n.to_le_bytes()).collect::<Vec<u8>>()
    };
    let half = MEMORY / 2;
    let (low, high) = (region(GUEST, MONITOR, 0, half), region(GUEST + half, MONITOR + half, half, half));
    front.tell(msg::ADD_MEM_REG, &low, &[front.memory.as_fd()]);
    front.add_queue(0, 128);
    front.write(0, &[1; 512]);
    front.tell(msg::ADD_MEM_REG, &high, &[front.memory.as_fd()]);
    // A transfer over the seam of the two.
    let at = half - 1024;
    front.poke(at, &[2; 2048]);
    front.prepare(0, 0, req::OUT, 8, &[], 0);
    front.descriptor(0, 0, GUEST + front.buffer(0, 0), 16, vhost::NEXT, 1);
    front.descriptor(0, 1, GUEST + at, 2048, vhost::NEXT, 2);
    front.offer(0, 0);
    front.kick(0);
    front.wait_used(0);
    assert_eq!(front.status(0, 0), 0);
    assert_eq!(front.read(8, 2048), [2; 2048]);
    front.tell(msg::REM_MEM_REG, &high, &[]);
    front.write(0, &[3; 512]);
    if front.protocol & protocol::REPLY_ACK != 0 && !tests::on_reference() {
        assert_ne!(front.try_tell(msg::REM_MEM_REG, &high, &[]), 0, "it is gone already");
    }
}

#[test]
fn an_export_that_is_removed_with_requests_in_flight() {
    let daemon = slow();
    let mut front = client(&daemon);
    for slot in 0..10 {
        front.submit(0, slot, req::OUT, u64::from(slot), &[byte(slot + 1); 512], 0);
    }
    let mut qmp = daemon.qmp();
    qmp.ok("block-export-del", json!({"id": "e", "mode": "hard"}));
    fast(&mut qmp);
    qmp.event("BLOCK_EXPORT_DELETED");
    // What was started is done, and nothing else.
    let mut done = 0;
    while front.poll_used(0).is_some() {
        done += 1;
    }
    let image = tests::image::contents(&daemon.path("disk.img"));
    let written = (0..10).filter(|slot| image[slot * 512] != 0).count();
    assert_eq!(done, written);
}

#[test]
fn a_graph_that_changes_below() {
    let daemon = serving("writable=on");
    let mut qmp = daemon.qmp();
    let mut front = client(&daemon);
    for turn in 0..20_u64 {
        for slot in 0..30 {
            front.submit(0, slot, req::OUT, u64::from(slot) * 8, &[byte(turn); 4096], 0);
        }
        // Each of these drains the export.
        if tests::on_reference() {
            qmp.ok("query-named-block-nodes", json!({}));
        } else {
            qmp.ok("block_resize", json!({"node-name": "disk", "size": (9 + turn) * MIB}));
        }
        for _ in 0..30 {
            front.wait_used(0);
        }
        assert!((0..30).all(|slot| front.status(0, slot) == 0));
    }
    assert_eq!(front.read(0, 4096), [19; 4096]);
}

#[test]
fn requests_are_counted() {
    let daemon = serving("writable=on");
    let mut front = client(&daemon);
    front.write(0, &[1; 4096]);
    front.read(0, 512);
    front.flush();
    let stats = daemon.qmp().ok("query-blockstats", json!({"query-nodes": true}));
    let node = stats.as_array().unwrap().iter().find(|node| node["node-name"] == "disk").unwrap();
    let count = |name: &str| node["stats"][name].as_u64().unwrap();
    let counts = [count("wr_bytes"), count("rd_bytes"), count("flush_operations")];
    assert!(counts == [4096, 512, 1] || known_defect("X10"), "{counts:?}");
}

/// The pages that the device writes to while memory is logged, and no others, are in the log.
#[test]
fn a_migration_finds_what_was_written() {
    let daemon = serving("writable=on");
    let mut front = client(&daemon);
    front.write(0, &[1; 8192]);
    let log = vhost::memory(4096);
    let base = [4096_u64, 0].iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<u8>>();
    front.send(msg::SET_LOG_BASE, 0, &base, &[log.as_fd()]);
    assert_eq!(front.receive().unwrap().request, msg::SET_LOG_BASE);
    let logging = front.features | vhost::feature::LOG_ALL;
    front.tell(msg::SET_FEATURES, &logging.to_le_bytes(), &[]);
    // The used ring is logged at the guest's address of it.
    let used = GUEST + 0x8000;
    front.tell(msg::SET_VRING_ADDR, &FrontEnd::addresses(0, 1, used), &[]);
    let dirty = || -> Vec<u64> {
        let mut bits = [0; 4096];
        std::os::unix::fs::FileExt::read_exact_at(&log, &mut bits, 0).unwrap();
        (0..4096 * 8).filter(|page| bits[page / 8] & 1 << (page % 8) != 0).map(|page| page as u64).collect()
    };
    let page = |at: u64| (GUEST + at) / 4096;
    front.read(0, 8192);
    let buffer = front.buffer(0, 0);
    // Status, two pages of data; the ring.
    assert_eq!(dirty(), [used / 4096, page(buffer), page(buffer + 4096), page(buffer + 8192)]);
    log.set_len(0).unwrap();
    log.set_len(4096).unwrap();
    let logged = front.features;
    front.tell(msg::SET_FEATURES, &logged.to_le_bytes(), &[]);
    front.read(0, 8192);
    assert_eq!(dirty(), [0; 0], "no longer logged");
}

/// What a guest's live migration to another daemon does with the image: it is inactive there until the first one has let go of it.
#[test]
fn a_disk_that_passes_to_another_daemon() {
    if known_defect("vhost-user-blk exports cannot be inactive") {
        return;
    }
    let first = Setup::new().qmp().line("--blockdev driver=null-co,node-name=n").start();
    let image = first.path("disk.qcow2");
    tests::tools::ok("qemu-img", ["create", "-q", "-f", "qcow2", image.to_str().unwrap(), "8M"]);
    let file = json!({"driver": "file", "filename": image});
    let node = |active: bool| json!({"driver": "qcow2", "node-name": "disk", "file": file, "active": active});
    let export = |daemon: &tests::Daemon, inactive: bool| {
        let addr = json!({"type": "unix", "path": socket(daemon)});
        json!({"type": "vhost-user-blk", "id": "e", "node-name": "disk", "addr": addr, "writable": true,
            "allow-inactive": inactive})
    };
    let mut qmp = first.qmp();
    qmp.ok("blockdev-add", node(true));
    qmp.ok("block-export-add", export(&first, false));
    let mut old = client(&first);
    old.write(0, &[1; 4096]);

    let second = Setup::new().qmp().line("--blockdev driver=null-co,node-name=n").start();
    let mut other = second.qmp();
    other.ok("blockdev-add", node(false));
    other.ok("block-export-add", export(&second, true));
    let mut new = client(&second);
    assert_eq!(new.request(0, req::OUT, 0, &[9; 4096], 0).0, 1, "it may not write yet");
    other.refused("blockdev-set-active", json!({"node-name": "disk", "active": true}));

    // Room in the image that the second daemon has never seen.
    old.write(8000, &[2; 4096]);
    qmp.ok("block-export-del", json!({"id": "e", "mode": "hard"}));
    qmp.event("BLOCK_EXPORT_DELETED");
    qmp.ok("blockdev-set-active", json!({"node-name": "disk", "active": false}));
    other.ok("blockdev-set-active", json!({"node-name": "disk", "active": true}));
    assert_eq!(new.read(0, 4096), [1; 4096]);
    assert_eq!(new.read(8000, 4096), [2; 4096]);
    new.write(0, &[3; 4096]);
    assert_eq!(new.read(0, 4096), [3; 4096]);
}
