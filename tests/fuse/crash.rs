//! A daemon killed in mid-work keeps what it acknowledged: what fsync(2) has confirmed is in the image. The page cache
//! survives a killed process, so this shows that acknowledgements come after the writes, not that a disk has them.
//!
//! `FUSE_KILLS=200` makes it longer.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tests::image::Noise;
use tests::{Setup, skip, wait_for};

use crate::{Mounted, qcow2, raw};

const RECORD: usize = 4096;
const SIZE: u64 = 16 << 20;

/// A record that says where it belongs.
fn record(index: u64) -> Vec<u8> {
    Noise::new(index + 1).bytes(RECORD)
}

fn place(index: u64) -> u64 {
    // Not one after the other, so that metadata changes all over the image.
    index * 1237 % (SIZE / RECORD as u64) * RECORD as u64
}

fn write_until_the_end(file: &File, acknowledged: &AtomicU64) {
    for index in 0..SIZE / RECORD as u64 {
        if file.write_all_at(&record(index), place(index)).is_err() || file.sync_data().is_err() {
            return;
        }
        acknowledged.store(index + 1, Ordering::SeqCst);
    }
}

fn kill_while_writing(setup: Setup, kill_after: u64) -> Option<()> {
    let mut mounted = Mounted::start(setup, ",writable=on")?;
    let durable = Arc::new(AtomicU64::new(0));
    let writer = {
        let (file, durable) = (mounted.open(), Arc::clone(&durable));
        std::thread::spawn(move || write_until_the_end(&file, &durable))
    };
    wait_for("some records", || (durable.load(Ordering::SeqCst) >= kill_after).then_some(()));
    mounted.daemon.crash();
    writer.join().unwrap();
    // The kernel ends what a ring had in flight a moment after the process, and its locks with it.
    let locked = mounted.daemon.path("a.img");
    wait_for("the locks to go", || tests::locks::read_locked_bytes(&locked).is_empty().then_some(()));
    let count = durable.load(Ordering::SeqCst);
    let (image, flat) = (mounted.daemon.path("a.img"), mounted.daemon.path("flat.img"));
    let (image, flat) = (image.display().to_string(), flat.display().to_string());
    tests::tools::ok("qemu-img", ["convert", "-O", "raw", &image, &flat]);
    let flat = File::open(flat).unwrap();
    for index in 0..count {
        let mut got = vec![0; RECORD];
        flat.read_exact_at(&mut got, place(index)).unwrap();
        assert!(got == record(index), "record {index} of {count} is lost");
    }
    Some(())
}

fn kills(make: impl Fn() -> Setup) {
    let rounds = std::env::var("FUSE_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(3);
    let mut noise = Noise::new(3);
    for _ in 0..rounds {
        let after = 1 + noise.below(150);
        if kill_while_writing(make(), after).is_none() {
            skip!("no FUSE here");
        }
    }
}

#[test]
fn synced_records_survive_a_kill_on_raw() {
    kills(|| raw(SIZE));
}

#[test]
fn synced_records_survive_a_kill_on_qcow2() {
    kills(|| qcow2(SIZE));
}
