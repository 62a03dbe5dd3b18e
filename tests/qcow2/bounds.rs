//! Images whose tables say that they are enormous, in files that are not: memory stays bounded, and what is too much is
//! refused by what it is.

use crate::{peek, poke, qemu_img, qemu_io};
use serde_json::json;
use std::fs::File;
use std::path::Path;
use tests::{Daemon, Setup, known_defect, on_reference, qmp, skip};

const MIB: u64 = 1 << 20;

fn set_len(path: &Path, len: u64) {
    File::options().write(true).open(path).unwrap().set_len(len).unwrap();
}

/// A daemon, and an image that `damage` has changed.
fn start(create: &[&str], damage: impl Fn(&Path)) -> Daemon {
    let setup = Setup::new().qmp();
    qemu_img(&setup.path("."), &[&["create", "-q", "-f", "qcow2"], create].concat());
    damage(&setup.path(create.iter().rev().nth(1).unwrap()));
    setup.start()
}

fn add(qmp: &mut qmp::Client, image: &str) {
    qmp.ok(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "q", "file": {"driver": "file", "filename": image, "node-name": "f"}}),
    );
}

/// In MiB. What a table of the greatest size takes is allowed for, and no multiple of it.
fn peak(daemon: &Daemon) -> u64 {
    daemon.usage().peak_kib / 1024
}

/// Refcount blocks without end do not have to be in memory for a snapshot, and those that do not change stay where they are.
#[test]
fn snapshots_of_an_image_with_very_many_refcount_blocks() {
    const BLOCKS: u64 = 16384;
    const CLUSTER: u64 = 64 << 10;
    const FAR: u64 = 2 << 30;
    let daemon = start(&["i.qcow2", "64M"], |path| {
        qemu_io(path.parent().unwrap(), "i.qcow2", &["write -P 1 0 1M"]);
        // The first block is where it was; the others are behind 2 GiB, and the second one counts them all.
        let first = peek(path, peek(path, 48));
        let count = |cluster: u64, count: u8| poke(path, first + cluster * 2, &[0, count]);
        let mut table = first.to_be_bytes().to_vec();
        table.extend((1..BLOCKS).flat_map(|i| (FAR + i * CLUSTER).to_be_bytes()));
        poke(path, 2 * MIB, &table);
        let counts: Vec<u8> = (0..BLOCKS).flat_map(|i| [0, u8::from(i > 0)]).collect();
        poke(path, FAR + CLUSTER, &counts);
        set_len(path, FAR + BLOCKS * CLUSTER);
        count(peek(path, 48) / CLUSTER, 0);
        count(2 * MIB / CLUSTER, 1);
        count(2 * MIB / CLUSTER + 1, 1);
        poke(path, 48, &(2 * MIB).to_be_bytes());
        poke(path, 56, &2u32.to_be_bytes());
        qemu_img(path.parent().unwrap(), &["check", "-q", "-f", "qcow2", "i.qcow2"]);
    });
    let mut qmp = daemon.qmp();
    add(&mut qmp, "i.qcow2");
    let space = || std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(daemon.path("i.qcow2")).unwrap()) * 512;
    let before = space();
    qmp.ok("blockdev-snapshot-internal-sync", json!({"device": "q", "name": "one"}));
    qmp.ok("blockdev-snapshot-internal-sync", json!({"device": "q", "name": "two"}));
    qmp.ok("blockdev-snapshot-delete-internal-sync", json!({"device": "q", "name": "one"}));
    assert!(peak(&daemon) < 200, "{} MiB", peak(&daemon));
    assert!(space() < before + 16 * MIB, "only what changes is written anew");
    qmp.ok("blockdev-del", json!({"node-name": "q"}));
    qemu_img(&daemon.path("."), &["check", "-q", "-f", "qcow2", "i.qcow2"]);
    let list = qemu_img(&daemon.path("."), &["snapshot", "-l", "i.qcow2"]);
    assert!(list.contains("two") && !list.contains("one"), "{list}");
}

/// Snapshots without end, each with the largest L1 table that there can be.
fn many_snapshots(path: &Path, place: impl Fn(u64) -> u64) {
    let mut table = Vec::new();
    for i in 0..65536 {
        let mut entry = vec![0; 64];
        entry[..8].copy_from_slice(&place(i).to_be_bytes());
        entry[8..12].copy_from_slice(&(4u32 << 20).to_be_bytes());
        entry[12..14].copy_from_slice(&8u16.to_be_bytes());
        entry[36..40].copy_from_slice(&16u32.to_be_bytes());
        entry[56..].copy_from_slice(&format!("{i:08}").into_bytes());
        table.extend(entry);
    }
    poke(path, 4 * MIB, &table);
    poke(path, 60, &65536u32.to_be_bytes());
    poke(path, 64, &(4 * MIB).to_be_bytes());
    set_len(path, 64 << 30);
}

#[test]
fn l1_tables_of_very_many_snapshots() {
    if on_reference() {
        skip!("x-blockdev-check is a command of this daemon");
    }
    let daemon = start(&["-o", "cluster_size=512", "i.qcow2", "1M"], |path| {
        many_snapshots(path, |i| 16 * MIB + i * 512 * 1024);
    });
    let mut qmp = daemon.qmp();
    add(&mut qmp, "i.qcow2");
    assert!(peak(&daemon) < 600, "{} MiB", peak(&daemon));
    let refused = qmp.execute("x-blockdev-check", json!({"node-name": "q"})).unwrap_err();
    assert!(refused.desc.contains("File too large"), "{refused:?}");
    assert!(peak(&daemon) < 600, "{} MiB", peak(&daemon));
}

#[test]
fn an_l1_table_of_very_many_snapshots() {
    if on_reference() {
        skip!("x-blockdev-check is a command of this daemon");
    }
    let daemon = start(&["-o", "cluster_size=64k", "i.qcow2", "1M"], |path| many_snapshots(path, |_| 16 * MIB));
    let mut qmp = daemon.qmp();
    add(&mut qmp, "i.qcow2");
    let found = qmp.ok("x-blockdev-check", json!({"node-name": "q"}));
    assert!(found["corruptions"].as_u64().unwrap() > 0, "{found}");
    assert!(peak(&daemon) < 400, "{} MiB", peak(&daemon));
}

/// Bitmaps without end, which all have the same table.
#[test]
fn a_resize_with_very_many_bitmaps() {
    if on_reference() {
        skip!("QEMU opens no image whose bitmaps have the same name");
    }
    const BITMAPS: u64 = 65535;
    let daemon = start(&["i.qcow2", "2T"], |path| {
        qemu_img(path.parent().unwrap(), &["bitmap", "--add", "-g", "512", "i.qcow2", "b"]);
        let header = peek(path, 100) >> 32;
        let extension = (0..400).map(|i| header + i * 8).find(|at| peek(path, *at) >> 32 == 0x2385_2875).unwrap();
        let directory = peek(path, extension + 24);
        let mut entry = [0; 32];
        for i in 0..4 {
            entry[i * 8..i * 8 + 8]
                .copy_from_slice(&peek(path, directory + u64::try_from(i).unwrap() * 8).to_be_bytes());
        }
        set_len(path, 64 * MIB);
        poke(path, 32 * MIB, &entry.repeat(usize::try_from(BITMAPS).unwrap()));
        poke(path, extension + 8, &u32::try_from(BITMAPS).unwrap().to_be_bytes());
        poke(path, extension + 16, &(BITMAPS * 32).to_be_bytes());
        poke(path, extension + 24, &(32 * MIB).to_be_bytes());
    });
    let mut qmp = daemon.qmp();
    add(&mut qmp, "i.qcow2");
    let refused = qmp.execute("block_resize", json!({"node-name": "q", "size": 1u64 << 40})).unwrap_err();
    assert!(refused.desc.contains("remove some bitmaps"), "{refused:?}");
    assert!(peak(&daemon) < 300, "{} MiB", peak(&daemon));
}

#[test]
fn names_of_snapshots_have_a_length() {
    let daemon = start(&["i.qcow2", "1M"], |_| {});
    let mut qmp = daemon.qmp();
    add(&mut qmp, "i.qcow2");
    let mut make =
        |len: usize| qmp.execute("blockdev-snapshot-internal-sync", json!({"device": "q", "name": "x".repeat(len)}));
    make(255).unwrap();
    let refused = match make(256) {
        Ok(_) if known_defect("a longer name of a snapshot is cut when it is read") => return,
        made => made.unwrap_err(),
    };
    assert!(refused.desc.ends_with("its name is longer than 255 bytes"), "{refused:?}");
    make(1).unwrap();
    qmp.ok("blockdev-del", json!({"node-name": "q"}));
    let list = qemu_img(&daemon.path("."), &["snapshot", "-l", "i.qcow2"]);
    assert!(list.contains(&"x".repeat(255)) && list.lines().count() == 4, "{list}");
}
