//! A daemon killed in mid-work keeps what it acknowledged. The page cache survives a killed process, so this shows that
//! an acknowledgement comes after the write reached the kernel, not that the disk has it.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tests::Setup;
use tests::image::{Noise, contents};
use tests::nbd::{Headers, Request, cmd, flag};

const MIB: u64 = 1 << 20;
const RECORD: usize = 4096;

/// A record that says where it belongs.
fn record(index: u64) -> Vec<u8> {
    Noise::new(index + 1).bytes(RECORD)
}

#[test]
fn acknowledged_writes_survive_a_kill() {
    for (fua, cache) in [(true, "off"), (false, "off"), (true, "on")] {
        let mut daemon = Setup::new()
            .image("a.img", 16 * MIB)
            .line(&format!("--blockdev file,node-name=f,filename=a.img,cache.direct={cache}"))
            .nbd_server()
            .line("--export nbd,id=e,node-name=f,name=disk,writable=on")
            .start();
        let (mut client, _) = daemon.nbd().open("disk", Headers::Structured);
        let durable = Arc::new(AtomicU64::new(0));
        let acknowledged = Arc::clone(&durable);
        let writer = std::thread::spawn(move || {
            // Records one after the other, up to the end of the image or of the daemon.
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                for index in 0..4096 {
                    let flags = if fua { flag::FUA } else { 0 };
                    let error = client.write(index * RECORD as u64, flags, &record(index));
                    if error != 0 || !fua && client.simple(cmd::FLUSH, 0, 0, 0) != 0 {
                        return;
                    }
                    acknowledged.store(index + 1, Ordering::SeqCst);
                }
            }))
        });
        tests::wait_for("some records", || (durable.load(Ordering::SeqCst) >= 100).then_some(()));
        daemon.crash();
        let _ = writer.join().unwrap();
        let count = durable.load(Ordering::SeqCst);
        let image = contents(&daemon.path("a.img"));
        for index in 0..count {
            let at = usize::try_from(index).unwrap() * RECORD;
            assert!(image[at..at + RECORD] == record(index), "record {index} of {count} is lost (fua {fua})");
        }
    }
}

#[test]
fn acknowledged_writes_in_flight_survive_a_kill() {
    let mut daemon = Setup::new().serving("disk", 16 * MIB).start();
    let (mut client, _) = daemon.nbd().open("disk", Headers::Structured);
    let mut indices = std::collections::HashMap::new();
    let mut durable = Vec::new();
    for index in 0..1000_u64 {
        let offset = index * RECORD as u64;
        let write = Request { cmd: cmd::WRITE, flags: flag::FUA, offset, len: RECORD as u64, payload: record(index) };
        indices.insert(client.send(&write), index);
        if index >= 16 {
            let reply = client.reply();
            assert_eq!(reply.error, 0);
            durable.push(indices[&reply.cookie]);
        }
    }
    daemon.crash();
    let image = contents(&daemon.path("disk.img"));
    for index in durable {
        let at = usize::try_from(index).unwrap() * RECORD;
        assert!(image[at..at + RECORD] == record(index), "record {index} is lost");
    }
}

#[test]
fn a_killed_daemon_leaves_no_locks() {
    let mut daemon = Setup::new().serving("disk", MIB).start();
    daemon.crash();
    assert_eq!(tests::locks::read_locked_bytes(&daemon.path("disk.img")), [].into());
    let image = daemon.path("disk.img");
    // Another daemon takes the image and the socket's name at once.
    let again = Setup::new()
        .arg("--blockdev")
        .arg(format!("file,node-name=f,filename={}", image.display()))
        .arg("--nbd-server")
        .arg(format!("addr.type=unix,addr.path={}", daemon.path("nbd.sock").display()))
        .line("--export nbd,id=e,node-name=f,name=disk,writable=on")
        .start();
    let (mut client, _) = tests::nbd::Client::connect_unix(&daemon.path("nbd.sock")).open("disk", Headers::Simple);
    assert_eq!(client.write(0, 0, b"again"), 0);
    assert!(fs::read(image).unwrap().starts_with(b"again"));
    drop(again);
}
