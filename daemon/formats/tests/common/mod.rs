//! What the tests of formats share: a graph on an IOThread, images by qemu-img.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "each test takes what it needs"
)]

use block::disk::DiskOptions;
use block::perm::Bits;
use block::{Disk, Graph, Perms};
use formats::{Formats, Workers};
use io::{IoThread, Params};
use qapi::Qapi;
use qapi::types::block::BlockdevOptions;
use serde_json::Value;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

/// Runs on an IOThread.
pub fn on_thread<F, Fut>(f: F)
where
    F: FnOnce() -> Fut + Send + 'static,
    Fut: Future<Output = ()> + 'static,
{
    let thread = IoThread::start("test", Params::default()).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        thread.run(f).await.unwrap();
        thread.stop().await;
    });
}

/// Whether the reference's tools are installed; says so if not.
pub fn has_qemu() -> bool {
    let found = Command::new("qemu-img").arg("--version").output().is_ok();
    if !found {
        println!("skipped: qemu-img is not installed");
    }
    found
}

/// Runs a program; its output.
pub fn run(dir: &Path, program: &str, args: &[&str]) -> String {
    let out = Command::new(program).args(args).current_dir(dir).output().expect("the program runs");
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let errors = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{program} {args:?}: {errors}{text}");
    text
}

/// `qemu-img create` with a size in the arguments.
pub fn create(dir: &Path, args: &str) {
    let mut all = vec!["create", "-q", "-f", "qcow2"];
    all.extend(args.split_whitespace());
    run(dir, "qemu-img", &all);
}

/// Commands of qemu-io.
pub fn qemu_io(dir: &Path, image: &str, commands: &[&str]) {
    let mut args = vec!["-f", "qcow2"];
    for command in commands {
        args.extend(["-c", command]);
    }
    args.push(image);
    let out = run(dir, "qemu-io", &args);
    assert!(!out.contains("failed"), "{out}");
}

pub fn graph() -> Graph {
    Graph::new(Arc::new(Formats::new(drivers::Drivers::default(), Workers::default())))
}

pub fn options(json: &Value) -> BlockdevOptions {
    BlockdevOptions::from_value(json).unwrap()
}

pub async fn attach(graph: &mut Graph, name: &str, write: bool) -> Disk {
    let node = Arc::clone(graph.get(name).unwrap());
    let need = Bits::CONSISTENT_READ | if write { Bits::WRITE } else { Bits::NONE };
    let perms = Perms { need, shared: Bits::ALL };
    graph.attach(&node, &DiskOptions { label: "a test".into(), perms, writethrough: false }).await.unwrap()
}

/// A temporary folder on a real file system.
pub fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// A small generator with a seed, which is not zero: the same run each time.
pub struct Random(pub u64);

impl Random {
    /// A number below `below`.
    pub fn next(&mut self, below: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 16).unwrap() % below
    }
}
