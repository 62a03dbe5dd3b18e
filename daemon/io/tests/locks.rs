//! Image locks against QEMU's own programs.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "test code")]

use io::{Access, Engine, File, ImageLock, LockError, LockMode, LockSet, Locking, OpenHow};
use std::future::Future;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};

const HOW: OpenHow = OpenHow { access: Access::ReadWrite, direct: false, engine: Engine::Threads };
const READ: u8 = 1;
const WRITE: u8 = 2;
const RESIZE: u8 = 8;

/// A child that is about to exec has copies of all descriptors, and with them of the locks: no two tests at a time.
static ONE_TEST: Mutex<()> = Mutex::new(());

fn wait<T>(f: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(f)
}

fn image() -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    file
}

fn have(program: &str) -> bool {
    let there = Command::new(program).arg("--version").stdout(Stdio::null()).status().is_ok();
    if !there {
        println!("skipped: {program} is not installed");
    }
    there
}

async fn locked(path: &Path) -> (File, ImageLock) {
    let file = File::open(path, HOW).await.unwrap();
    let lock = ImageLock::new(&file, Locking::Auto).await.unwrap();
    assert_eq!(lock.mode(), LockMode::Ofd);
    (file, lock)
}

/// An image of a format whose driver shares neither writing nor resizing with others; raw images share both.
fn exclusive_image() -> tempfile::NamedTempFile {
    let file = image();
    let made =
        Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(file.path()).arg("1M").status().unwrap();
    assert!(made.success());
    file
}

/// What qemu-io says when it opens the image, for writing unless told otherwise, and reads from it.
fn qemu_io(path: &Path, args: &[&str]) -> (bool, String) {
    let out = Command::new("qemu-io").args(args).args(["-f", "qcow2", "-c", "read 0 512"]).arg(path).output().unwrap();
    (out.status.success(), String::from_utf8_lossy(&out.stderr).into_owned())
}

/// A qemu-io that has the image open for writing until it is dropped.
struct Holder(Child);

impl Holder {
    fn new(path: &Path) -> Self {
        let mut child = Command::new("qemu-io")
            .args(["-f", "qcow2"])
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.as_mut().unwrap().write_all(b"length\n").unwrap();
        // It answers once the image is open and locked.
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        assert!(line.contains("1 MiB"), "{line}");
        Self(child)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
fn qemu_is_kept_out_and_let_in() {
    let _alone = ONE_TEST.lock().unwrap_or_else(PoisonError::into_inner);
    if !have("qemu-io") || !have("qemu-img") {
        return;
    }
    let temp = exclusive_image();
    wait(async {
        let (_file, lock) = locked(temp.path()).await;
        let writer = LockSet { held: READ | WRITE, unshared: WRITE | RESIZE };
        lock.prepare(LockSet::NONE, writer).await.unwrap();
        let (ok, said) = qemu_io(temp.path(), &[]);
        assert!(!ok && said.contains("Failed to get \"write\" lock"), "{said}");
        let (ok, said) = qemu_io(temp.path(), &["-r"]);
        assert!(!ok && said.contains("Failed to get shared \"write\" lock"), "{said}");
        assert!(qemu_io(temp.path(), &["-r", "-U"]).0, "who shares everything may read");

        let reader = LockSet { held: READ, unshared: WRITE | RESIZE };
        lock.settle(writer, reader);
        assert!(qemu_io(temp.path(), &["-r"]).0, "two readers");
        assert!(!qemu_io(temp.path(), &[]).0);
        lock.settle(reader, LockSet::NONE);
        assert!(qemu_io(temp.path(), &[]).0);
    });
}

#[test]
fn we_are_kept_out_by_qemu_and_keep_what_we_had() {
    let _alone = ONE_TEST.lock().unwrap_or_else(PoisonError::into_inner);
    if !have("qemu-io") || !have("qemu-img") {
        return;
    }
    let temp = exclusive_image();
    wait(async {
        let (_file, lock) = locked(temp.path()).await;
        let polite = LockSet { held: READ, unshared: 0 };
        lock.prepare(LockSet::NONE, polite).await.unwrap();
        let holder = Holder::new(temp.path());
        let writer = LockSet { held: READ | WRITE, unshared: WRITE | RESIZE };
        let err = lock.prepare(polite, writer).await.unwrap_err();
        assert_eq!(err, LockError::Unshared("write"));
        assert_eq!(err.to_string(), "Failed to get \"write\" lock");
        let reader = LockSet { held: READ, unshared: WRITE };
        let err = lock.prepare(polite, reader).await.unwrap_err();
        assert_eq!(err.to_string(), "Failed to get shared \"write\" lock");
        drop(holder);
        // What was tried in vain left nothing behind: a writer of QEMU's that shares reading gets in ...
        let holder = Holder::new(temp.path());
        drop(holder);
        // ... and what was held before still is: it is seen by whoever does not share reading.
        let (_other_file, other) = locked(temp.path()).await;
        let alone = LockSet { held: 0, unshared: READ };
        assert_eq!(other.prepare(LockSet::NONE, alone).await, Err(LockError::Held("consistent read")));
        lock.settle(polite, LockSet::NONE);
        other.prepare(LockSet::NONE, alone).await.unwrap();
    });
}

#[test]
fn locks_move_to_another_descriptor_and_end_with_it() {
    let _alone = ONE_TEST.lock().unwrap_or_else(PoisonError::into_inner);
    let temp = image();
    wait(async {
        let (file, lock) = locked(temp.path()).await;
        let writer = LockSet { held: READ | WRITE, unshared: WRITE };
        lock.prepare(LockSet::NONE, writer).await.unwrap();
        let (other_file, other) = locked(temp.path()).await;
        assert_eq!(other.prepare(LockSet::NONE, writer).await, Err(LockError::Unshared("write")));

        let second_file = File::open(temp.path(), HOW).await.unwrap();
        let second = lock.on(&second_file);
        second.copy(writer).await.unwrap();
        drop(lock);
        file.close().await;
        assert_eq!(other.prepare(LockSet::NONE, writer).await, Err(LockError::Unshared("write")), "moved");
        drop(second);
        second_file.close().await;
        other.prepare(LockSet::NONE, writer).await.unwrap();
        drop(other);
        other_file.close().await;
    });
}

#[test]
fn locking_off_locks_nothing() {
    let _alone = ONE_TEST.lock().unwrap_or_else(PoisonError::into_inner);
    let temp = image();
    wait(async {
        let file = File::open(temp.path(), HOW).await.unwrap();
        assert!(ImageLock::new(&file, Locking::Off).await.is_none());
        assert!(ImageLock::new(&file, Locking::On).await.is_some());
    });
}
