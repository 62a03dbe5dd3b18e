//! A daemon that is killed at random, again and again, under fio and under a client that flushes, while snapshots come and go
//! and the disk gets other lengths. The same image all the time: what was acknowledged as durable is there after each kill, and
//! `qemu-img check` finds leaks at most. The page cache survives, so this is about the order of what the daemon does.
//!
//! `TMPDIR=/dev/shm QCOW2_KILLS=200 cargo test -p tests --test qcow2 kills` is the long form.

use super::qemu_img;
use nix::sys::signal::Signal;
use serde_json::json;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tests::image::Noise;
use tests::nbd::{Headers, cmd, flag};
use tests::{Daemon, Setup, known_defect, locks, on_reference, qmp, wait_for, wait_within};

const MIB: u64 = 1 << 20;
/// Bytes of a record.
const RECORD: u64 = 4096;
/// Records: the first 16 MiB of the disk. fio has the 64 MiB behind them.
const RECORDS: u64 = 4096;
const SIZE: u64 = 80 * MIB;

/// What a record is after so many changes of records; 0 is never written.
fn record(version: u64) -> Vec<u8> {
    let len = usize::try_from(RECORD).unwrap();
    if version == 0 { vec![0; len] } else { Noise::new(version).bytes(len) }
}

/// What the client knows.
struct Known {
    /// The version of each record.
    durable: Vec<u64>,
    /// A change that was not acknowledged: record, version.
    pending: Option<(usize, u64)>,
    last: u64,
    acknowledged: u64,
}

/// Changes records one after the other until the daemon has gone, each durable before the next.
fn change_records(daemon: &Daemon, known: &Mutex<Known>, noise: &mut Noise) {
    let (mut client, _) = daemon.nbd().open("disk", Headers::Structured);
    loop {
        let index = noise.below(RECORDS);
        let kind = noise.below(8);
        let (at, slot) = (index * RECORD, usize::try_from(index).unwrap());
        let version = {
            let mut known = known.lock().unwrap();
            known.last += 1;
            let version = if kind == 0 { 0 } else { known.last };
            known.pending = Some((slot, version));
            version
        };
        let error = match kind {
            0 => client.simple(cmd::WRITE_ZEROES, flag::FUA, at, RECORD),
            1..4 => client.write(at, 0, &record(version)) | client.simple(cmd::FLUSH, 0, 0, 0),
            _ => client.write(at, flag::FUA, &record(version)),
        };
        assert_eq!(error, 0);
        let mut known = known.lock().unwrap();
        known.durable[slot] = version;
        known.pending = None;
        known.acknowledged += 1;
    }
}

/// Makes and deletes snapshots, and resizes the disk, until the daemon has gone.
fn change_image(mut qmp: qmp::Client, noise: &mut Noise) {
    // One may have stayed from before.
    let _ = qmp.execute("blockdev-snapshot-delete-internal-sync", json!({"device": "disk", "name": "s"}));
    loop {
        qmp.ok("blockdev-snapshot-internal-sync", json!({"device": "disk", "name": "s"}));
        if !on_reference() {
            qmp.ok("block_resize", json!({"node-name": "disk", "size": SIZE + noise.below(MIB) * 512}));
        }
        qmp.ok("blockdev-snapshot-delete-internal-sync", json!({"device": "disk", "name": "s"}));
    }
}

fn fio(daemon: &Daemon) -> Child {
    Command::new("fio")
        .args(["--name=load", "--ioengine=nbd", "--rw=randwrite", "--bsrange=4k-128k", "--iodepth=16", "--fsync=40"])
        .args(["--offset=16m", "--size=64m", "--time_based", "--runtime=600", &format!("--uri={}", daemon.uri("disk"))])
        .current_dir(daemon.path("."))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("fio runs")
}

/// Compares all records with what may be there, from when the daemon was killed.
fn verify(daemon: &Daemon, known: &mut Known, what: &str) {
    let (mut client, _) = daemon.nbd().open("disk", Headers::Structured);
    let pending = known.pending.take();
    for first in (0..RECORDS).step_by(256) {
        let bytes = client.read(first * RECORD, 256 * RECORD);
        for (slot, found) in (usize::try_from(first).unwrap()..).zip(bytes.chunks(usize::try_from(RECORD).unwrap())) {
            if found == record(known.durable[slot]) {
                continue;
            }
            let new = pending.filter(|(index, version)| *index == slot && found == record(*version));
            let Some((_, version)) = new else { panic!("{what}: record {slot} is lost") };
            known.durable[slot] = version;
        }
    }
}

fn check(image: &Path, what: &str) {
    let out = Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(image).output().unwrap();
    // 3 is leaks and nothing else.
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(matches!(out.status.code(), Some(0 | 3)), "{what}: {text}{}", String::from_utf8_lossy(&out.stderr));
}

fn killed(format: &str, options: &str) {
    if Command::new("fio").arg("--version").output().is_err() {
        tests::skip!("fio is not installed");
    }
    let kills = std::env::var("QCOW2_KILLS").ok().and_then(|kills| kills.parse().ok()).unwrap_or(3);
    let (qcow2, lazy) = (format == "qcow2", options.contains("lazy"));
    if qcow2 && known_defect("snapshots and resizes while clients write leave damage after a kill") {
        return;
    }
    let owner = Setup::new().line("--blockdev driver=null-co,node-name=n").start();
    let image = owner.path("disk.img");
    let mut create = vec!["create", "-q", "-f", format];
    if !options.is_empty() {
        create.extend(["-o", options]);
    }
    qemu_img(&owner.path("."), &[&create[..], &["disk.img", "80M"]].concat());
    let mut noise = Noise::new(7);
    let known = Known { durable: vec![0; usize::try_from(RECORDS).unwrap()], pending: None, last: 0, acknowledged: 0 };
    let known = Arc::new(Mutex::new(known));
    for kill in 0..=kills {
        let what = format!("{format},{options}, kill {kill}");
        let mut daemon = Setup::new()
            .arg("--blockdev")
            .arg(format!("driver=file,node-name=f,filename={}", image.display()))
            .line(&format!("--blockdev driver={format},node-name=disk,file=f"))
            .nbd_server()
            .line("--export nbd,id=e,node-name=disk,name=disk,writable=on")
            .qmp()
            .start();
        verify(&daemon, &mut known.lock().unwrap(), &what);
        if kill == kills {
            daemon.stop();
            qcow2.then(|| check(&image, &what));
            break;
        }
        let target = known.lock().unwrap().acknowledged + 1 + noise.below(120);
        let mut load = fio(&daemon);
        let (mut records, mut changes) = (Noise::new(noise.below(1 << 40)), Noise::new(noise.below(1 << 40)));
        let mut reached = None;
        let qmp = qcow2.then(|| daemon.qmp());
        std::thread::scope(|scope| {
            scope.spawn(|| catch_unwind(AssertUnwindSafe(|| change_records(&daemon, &known, &mut records))));
            if let Some(qmp) = qmp {
                scope.spawn(|| catch_unwind(AssertUnwindSafe(|| change_image(qmp, &mut changes))));
            }
            reached =
                wait_within(Duration::from_secs(300), || (known.lock().unwrap().acknowledged >= target).then_some(()));
            daemon.signal(Signal::SIGKILL);
        });
        assert!(reached.is_some(), "{what}: the daemon does not go on");
        daemon.crash();
        let _ = load.wait();
        // The kernel may hold the file for a moment longer than the process.
        wait_for("the image to be free", || locks::read_locked_bytes(&image).is_empty().then_some(()));
        // With lazy refcounts that finds errors until somebody has opened the image.
        if qcow2 && !lazy {
            check(&image, &what);
        }
    }
    println!("{format},{options}: {kills} kills, {} records", known.lock().unwrap().acknowledged);
}

#[test]
fn kills_of_qcow2() {
    killed("qcow2", "cluster_size=4k");
}

#[test]
fn kills_of_qcow2_with_lazy_refcounts() {
    killed("qcow2", "lazy_refcounts=on");
}

#[test]
fn kills_of_raw() {
    killed("raw", "");
}
