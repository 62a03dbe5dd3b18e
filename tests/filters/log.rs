//! `blklogwrites` [drop-in A.7; kernel, admin-guide/device-mapper/log-writes]: its options, and the log, by another reader.

use serde_json::{Value, json};
use tests::{Daemon, Setup, on_reference, tools};

use crate::MIB;

fn logging(daemon: &Daemon, more: Value) -> Value {
    let mut json = json!({
        "driver": "blklogwrites", "node-name": "l", "file": { "driver": "file", "filename": daemon.path("disk") },
        "log": { "driver": "file", "filename": daemon.path("log") }
    });
    json.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    json
}

fn idle() -> Daemon {
    let daemon = Setup::new().qmp().nbd_server().image("disk", MIB).start();
    std::fs::write(daemon.path("log"), []).unwrap();
    daemon
}

/// Applies a log to zeroes; also the flags of the entries.
fn replay(log: &[u8]) -> (Vec<u8>, Vec<u64>) {
    let number = |at: usize| u64::from_le_bytes(log[at..at + 8].try_into().unwrap());
    assert_eq!((number(0), number(8)), (0x006a_7366_7773_6872, 1));
    let sector = u32::from_le_bytes(log[24..28].try_into().unwrap()).try_into().unwrap();
    let (mut disk, mut flags, mut at) = (vec![0; 1 << 20], Vec::new(), sector);
    let us = |number: u64| usize::try_from(number).unwrap();
    for _ in 0..number(16) {
        let (first, count) = (us(number(at)) * sector, us(number(at + 8)) * sector);
        flags.push(number(at + 16));
        at += sector;
        if number(at - sector + 16) & 4 == 0 {
            let data = &log[at..at + count];
            disk[first..first + count].copy_from_slice(data);
            at += count;
        }
    }
    (disk, flags)
}

#[test]
fn options_are_checked() {
    let daemon = idle();
    let mut qmp = daemon.qmp();
    for (more, text) in [
        (json!({ "log-sector-size": 100 }), "Invalid log sector size 100"),
        (json!({ "log-sector-size": 0 }), "Invalid log sector size 0"),
        (json!({ "log-sector-size": 16 }), "Invalid log sector size 16"),
        (json!({ "log-sector-size": 1 << 24 }), "Invalid log sector size 16777216"),
        (json!({ "log-super-update-interval": 0 }), "Invalid log superblock update interval 0"),
        (
            json!({ "log-append": true, "log-sector-size": 512 }),
            "log-append and log-sector-size are mutually exclusive",
        ),
    ] {
        assert_eq!(qmp.refused("blockdev-add", logging(&daemon, more)), text);
    }
    let superblock = |magic: u64, version: u64, sector: u32| {
        let mut bytes: Vec<u8> = [magic, version, 0].iter().flat_map(|number| number.to_le_bytes()).collect();
        bytes.extend(sector.to_le_bytes());
        bytes.resize(512, 0);
        bytes
    };
    for (bytes, text) in [
        (superblock(1, 1, 512), "Invalid log superblock magic"),
        (superblock(0x006a_7366_7773_6872, 2, 512), "Unsupported log version 2"),
        (superblock(0x006a_7366_7773_6872, 1, 100), "Invalid log sector size 100"),
    ] {
        std::fs::write(daemon.path("log"), bytes).unwrap();
        assert_eq!(qmp.refused("blockdev-add", logging(&daemon, json!({ "log-append": true }))), text);
    }
    for (sector, interval) in [(32, 1), (1 << 20, 1_u64 << 40)] {
        std::fs::write(daemon.path("log"), []).unwrap();
        let more = json!({ "log-sector-size": sector, "log-super-update-interval": interval });
        qmp.ok("blockdev-add", logging(&daemon, more));
        qmp.ok("blockdev-del", json!({ "node-name": "l" }));
    }
}

#[test]
fn the_log_replays_to_the_same_disk() {
    let mut daemon = idle();
    let mut qmp = daemon.qmp();
    qmp.ok("blockdev-add", logging(&daemon, json!({})));
    qmp.ok("block-export-add", json!({ "type": "nbd", "id": "e", "node-name": "l", "writable": true }));
    let uri = daemon.uri("l");
    tools::qemu_io(
        &uri,
        &["write -P 1 0 512k", "write -P 2 100k 7k", "flush", "write -z 64k 64k", "write -f -P 3 1000 3000"],
    );
    tools::qemu_io(
        &uri,
        &["write -P 4 900k 10k", "aio_write -P 5 0 64k", "aio_write -P 6 600k 64k", "aio_flush", "flush"],
    );
    let (_, flags) = replay(&std::fs::read(daemon.path("log")).unwrap());
    assert!(flags.contains(&1), "{flags:?}");
    assert!(on_reference() || flags.contains(&2), "{flags:?}");
    // As far as a flush has counted, a crash loses nothing of it.
    daemon.crash();
    let disk = std::fs::read(daemon.path("disk")).unwrap();
    assert!(replay(&std::fs::read(daemon.path("log")).unwrap()).0 == disk);
}

#[test]
fn a_log_goes_on() {
    let mut daemon = idle();
    for (append, pattern) in [(false, 1), (true, 2)] {
        let mut qmp = daemon.qmp();
        qmp.ok("blockdev-add", logging(&daemon, json!({ "log-append": append })));
        qmp.ok("block-export-add", json!({ "type": "nbd", "id": "e", "node-name": "l", "writable": true }));
        tools::qemu_io(&daemon.uri("l"), &[&format!("write -P {pattern} {pattern}k 1k"), "flush"]);
        qmp.ok("block-export-del", json!({ "id": "e", "mode": "hard" }));
        tests::wait_for("the export to go", || {
            let exports = qmp.ok("query-block-exports", json!({}));
            exports.as_array().unwrap().is_empty().then_some(())
        });
        qmp.ok("blockdev-del", json!({ "node-name": "l" }));
    }
    daemon.stop();
    let (replayed, _) = replay(&std::fs::read(daemon.path("log")).unwrap());
    assert!(replayed == std::fs::read(daemon.path("disk")).unwrap());
    assert!(replayed[1024..2048] == [1; 1024] && replayed[2048..3072] == [2; 1024]);
}

#[test]
fn a_drive_need_not_have_a_disc() {
    let daemon = Setup::new().qmp().image("a", MIB).start();
    let mut qmp = daemon.qmp();
    let drive = |path: &str| json!({ "driver": "host_cdrom", "node-name": "d", "filename": path, "read-only": true });
    let file = daemon.path("a").display().to_string();
    let text = format!("'host_cdrom' driver requires '{file}' to be either a character or block device");
    assert_eq!(qmp.refused("blockdev-add", drive(&file)), text);
    let text = "Could not open '/nope': No such file or directory";
    assert_eq!(qmp.refused("blockdev-add", drive("/nope")), text);
    qmp.ok("blockdev-add", drive("/dev/null"));
    let nodes = qmp.ok("query-named-block-nodes", json!({}));
    assert_eq!((&nodes[0]["drv"], &nodes[0]["image"]["virtual-size"]), (&json!("host_cdrom"), &json!(0)));
}
