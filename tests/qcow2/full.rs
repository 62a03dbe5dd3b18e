//! A file system that runs full under an image, again and again, as the host's does: a client gets `ENOSPC` in the middle of its
//! changes, and goes on when there is space. What was acknowledged as durable is there all the time, also after a kill while it
//! is full, and `qemu-img check` finds nothing but what a kill may leak.

use super::qemu_img;
use serde_json::json;
use std::collections::HashMap;
use std::path::PathBuf;
use std::process::Command;
use tests::image::Noise;
use tests::nbd::{Client, Headers, cmd, flag};
use tests::{Daemon, Setup, locks, on_reference, wait_for};

const MIB: u64 = 1 << 20;
/// Bytes of a record; the whole disk is records.
const RECORD: u64 = 4096;
const SIZE: u64 = 64 * MIB;
/// As the protocol has it.
const ENOSPC: u32 = 28;

/// A file system in memory, of this many bytes.
struct Small(PathBuf);

impl Small {
    /// None where this process may not mount one.
    fn mount(at: PathBuf, size: u64) -> Option<Self> {
        std::fs::create_dir(&at).unwrap();
        let this = Self(at);
        this.mounted(&format!("size={size}")).then_some(this)
    }

    fn resize(&self, size: u64) {
        assert!(self.mounted(&format!("remount,size={size}")));
    }

    fn mounted(&self, options: &str) -> bool {
        let out = Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(&self.0).output();
        out.is_ok_and(|out| out.status.success())
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).output();
    }
}

fn record(version: u64) -> Vec<u8> {
    let len = usize::try_from(RECORD).unwrap();
    if version == 0 { vec![0; len] } else { Noise::new(version).bytes(len) }
}

/// What may be in the records.
#[derive(Default)]
struct Known {
    durable: HashMap<u64, u64>,
    /// Changes that failed, or whose flush did, since.
    tried: HashMap<u64, Vec<u64>>,
    last: u64,
}

impl Known {
    /// Changes records at random until `errors` of them met a full file system, or `most` did not; returns how many met it.
    fn change(&mut self, client: &mut Client, noise: &mut Noise, errors: usize, most: usize) -> usize {
        let mut met = 0;
        for _ in 0..most {
            let slot = noise.below(SIZE / RECORD);
            self.last += 1;
            let (at, kind) = (slot * RECORD, noise.below(8));
            let version = if kind == 0 { 0 } else { self.last };
            self.tried.entry(slot).or_default().push(version);
            let mut error = match kind {
                0 => client.simple(cmd::WRITE_ZEROES, flag::FUA, at, RECORD),
                1..5 => client.write(at, 0, &record(version)),
                _ => client.write(at, flag::FUA, &record(version)),
            };
            if error == 0 && (1..5).contains(&kind) {
                error = client.simple(cmd::FLUSH, 0, 0, 0);
            }
            if error == 0 {
                self.durable.insert(slot, version);
                self.tried.remove(&slot);
                continue;
            }
            assert_eq!(error, ENOSPC);
            met += 1;
            if met == errors {
                break;
            }
        }
        met
    }

    fn verify(&self, client: &mut Client, what: &str) {
        for slot in 0..SIZE / RECORD {
            let durable = self.durable.get(&slot).copied();
            let tried = self.tried.get(&slot).cloned().unwrap_or_default();
            if durable.is_none() && tried.is_empty() && slot % 64 > 0 {
                continue;
            }
            let found = client.read(slot * RECORD, RECORD);
            let may = tried.into_iter().chain([durable.unwrap_or(0)]);
            assert!(may.into_iter().any(|version| found == record(version)), "{what}: record {slot} is lost");
        }
    }
}

fn serve(image: &std::path::Path) -> Daemon {
    Setup::new()
        .arg("--blockdev")
        .arg(format!("driver=file,node-name=f,filename={},discard=unmap", image.display()))
        .line("--blockdev driver=qcow2,node-name=disk,file=f,discard=unmap")
        .nbd_server()
        .line("--export nbd,id=e,node-name=disk,name=disk,writable=on")
        .qmp()
        .start()
}

fn runs_full(options: &str) {
    let owner = Setup::new().line("--blockdev driver=null-co,node-name=n").start();
    let Some(small) = Small::mount(owner.path("small"), 3 * MIB) else { tests::skip!("no file system can be mounted") };
    let image = owner.path("small/disk.img");
    qemu_img(&owner.path("small"), &["create", "-q", "-f", "qcow2", "-o", options, "disk.img", "64M"]);
    let (mut noise, mut known) = (Noise::new(11), Known::default());
    let mut space = 3 * MIB;
    for round in 0..4 {
        let what = format!("{options}, round {round}");
        let mut daemon = serve(&image);
        let mut client = daemon.nbd().open("disk", Headers::Structured).0;
        known.verify(&mut client, &what);
        // The reference may need a number of errors to give up what a failed allocation has taken.
        assert_eq!(known.change(&mut client, &mut noise, 10, 20_000), 10, "{what}: it is never full");
        known.verify(&mut client, &what);
        if !on_reference() {
            let refused =
                daemon.qmp().execute("blockdev-snapshot-internal-sync", json!({"device": "disk", "name": "s"}));
            assert!(refused.is_err(), "{what}: there is no space for a snapshot");
        }
        // Last, for what a kill leaks behind the end of the file is seen only when that has grown.
        let killed = round >= 2;
        if killed {
            daemon.signal(nix::sys::signal::Signal::SIGKILL);
            daemon.crash();
            wait_for("the image to be free", || locks::read_locked_bytes(&image).is_empty().then_some(()));
            if options.contains("lazy") && on_reference() {
                // There, counting anew takes space.
                space += MIB;
                small.resize(space);
            }
        } else {
            space += 12 * MIB;
            small.resize(space);
            assert_eq!(known.change(&mut client, &mut noise, 1, 100), 0, "{what}: there is space");
            known.verify(&mut client, &what);
            daemon.stop();
        }
        let out = Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(&image).output().unwrap();
        let (code, text) = (out.status.code(), String::from_utf8_lossy(&out.stdout));
        let dirty = killed && options.contains("lazy");
        let errors = String::from_utf8_lossy(&out.stderr);
        assert!(dirty || code == Some(0) || killed && code == Some(3), "{what}: {text}{errors}");
    }
}

#[test]
fn a_full_file_system() {
    runs_full("cluster_size=4k");
}

#[test]
fn a_full_file_system_with_large_clusters() {
    runs_full("cluster_size=64k");
}

#[test]
fn a_full_file_system_with_lazy_refcounts() {
    runs_full("cluster_size=4k,lazy_refcounts=on");
}
