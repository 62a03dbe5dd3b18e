//! Damaged images: what is told, and what is refused afterwards.

use crate::{peek, poke, qemu_img, qemu_io, serve};
use serde_json::{Value, json};
use tests::Setup;
use tests::nbd::{Headers, cmd};

const CLUSTER: u64 = 64 << 10;
const MIB: u64 = 1 << 20;

/// Bit 1 of the incompatible features.
const CORRUPT: u64 = 2;

enum Work {
    Read(u64),
    Write(u64),
}

/// Damages an image at a place that depends on its tables, has a client do something, and returns the event's data, or null.
fn after(damage: impl Fn(&std::path::Path), work: &Work, extra: &Value) -> Value {
    let setup = Setup::new().qmp().nbd_server();
    let (dir, path) = (setup.path("."), setup.path("i.qcow2"));
    qemu_img(&dir, &["create", "-q", "-f", "qcow2", "i.qcow2", "64M"]);
    qemu_io(&dir, "i.qcow2", &["write -P 1 0 1M"]);
    damage(&path);
    let daemon = setup.start();
    let mut qmp = serve(&daemon, "i.qcow2", extra);
    let (mut nbd, _) = daemon.nbd().open("q", Headers::Structured);
    let errno = match work {
        Work::Read(at) => nbd.simple(cmd::READ, 0, *at, 512),
        Work::Write(at) => nbd.write(*at, 0, &[9; 512]),
    };
    if errno == 0 {
        return Value::Null;
    }
    let data = qmp.event("BLOCK_IMAGE_CORRUPTED");
    let fatal = data["fatal"] == true;
    assert_eq!(peek(&path, 72) & CORRUPT != 0, fatal, "the mark in the header");
    assert_eq!(nbd.simple(cmd::READ, 0, 5 * MIB, 512) != 0, fatal, "reads are refused after fatal damage");
    data
}

fn l1(path: &std::path::Path) -> u64 {
    peek(path, 40)
}

fn l2(path: &std::path::Path) -> u64 {
    peek(path, l1(path)) & 0x00ff_ffff_ffff_fe00
}

#[test]
fn entries_that_cannot_be_meant() {
    let unaligned_l2 = |path: &std::path::Path| poke(path, l1(path), &(0x8000_0000_0004_0200u64).to_be_bytes());
    let unaligned_data = |path: &std::path::Path| poke(path, l2(path), &(0x8000_0000_0005_0200u64).to_be_bytes());
    assert_eq!(
        after(unaligned_l2, &Work::Read(0), &json!({})),
        json!({"device": "", "node-name": "q", "fatal": true, "msg": "L2 table offset 0x40200 unaligned (L1 index: 0)"})
    );
    assert_eq!(
        after(unaligned_data, &Work::Read(0), &json!({"read-only": true})),
        json!({
            "device": "", "node-name": "q", "fatal": false,
            "msg": "Cluster allocation offset 0x50200 unaligned (L2 offset: 0x40000, L2 index: 0)"
        })
    );
    assert_eq!(
        after(unaligned_data, &Work::Write(0), &json!({})),
        json!({
            "device": "", "node-name": "q", "fatal": true,
            "msg": "Data cluster offset 0x50200 unaligned (guest offset: 0)"
        })
    );
}

/// What the reference says about a write of guest data over the table at `at` of the header.
fn over(at: u64, extra: &Value) -> Value {
    let damage = |path: &std::path::Path| {
        let target = if at == 0 { l2(path) } else { peek(path, at) };
        let target = if at == 1 { peek(path, peek(path, 48)) } else { target };
        poke(path, l2(path) + 8, &(target | 1 << 63).to_be_bytes());
    };
    after(damage, &Work::Write(CLUSTER + 1024), extra)
}

#[test]
fn writes_over_metadata() {
    for (at, what) in [(40, "active L1 table"), (0, "active L2 table"), (48, "refcount table"), (1, "refcount block")] {
        let data = over(at, &json!({}));
        assert_eq!(data["msg"], format!("Preventing invalid write on metadata (overlaps with {what})"));
        assert_eq!((&data["fatal"], &data["size"]), (&json!(true), &json!(512)));
        assert!(data["offset"].as_u64().unwrap() % CLUSTER == 1024, "{data}");
    }
}

#[test]
fn overlap_checks_are_chosen() {
    for (at, extra, refused) in [
        (40, json!("none"), false),
        (40, json!("constant"), true),
        (0, json!("constant"), false),
        (0, json!("cached"), true),
        (0, json!({"template": "none", "active-l2": true}), true),
        (0, json!({"template": "all", "active-l2": false}), false),
        (0, json!({"active-l2": false}), false),
        (40, json!({"template": "none"}), false),
    ] {
        let data = over(at, &json!({"overlap-check": extra}));
        assert_eq!(data.is_object(), refused, "{extra} {data}");
    }
}

#[test]
fn metadata_that_is_counted_as_free() {
    // The first cluster that is free, says the refcount block, is that of the L2 table.
    let damage = |path: &std::path::Path| {
        let block = peek(path, peek(path, 48));
        poke(path, block + l2(path) / CLUSTER * 2, &[0, 0]);
    };
    let data = after(damage, &Work::Write(32 * MIB), &json!({}));
    assert_eq!(data["msg"], "Preventing invalid write on metadata (overlaps with active L2 table)");
    assert_eq!(data["fatal"], true);
}
