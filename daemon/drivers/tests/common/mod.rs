//! What the tests of drivers share: a graph on an IOThread, users of nodes, loop devices.
#![allow(dead_code, clippy::unwrap_used, clippy::print_stdout, reason = "each test takes what it needs")]

pub mod suite;

use block::disk::DiskOptions;
use block::perm::Bits;
use block::resource::Resource;
use block::throttle::{Group, Limit, Limits};
use block::{Disk, Graph, Perms};
use drivers::Drivers;
use io::{IoThread, Params, RingUse};
use qapi::Qapi;
use qapi::types::block::BlockdevOptions;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

/// Runs on an IOThread with or without a ring.
pub fn on_thread<F, Fut>(ring: RingUse, f: F)
where
    F: FnOnce() -> Fut + Send + 'static,
    Fut: Future<Output = ()> + 'static,
{
    let thread = IoThread::start("test", Params { ring, ..Params::default() }).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        thread.run(f).await.unwrap();
        thread.stop().await;
    });
}

/// An empty graph; drivers find the throttle groups `fast`, which has limits that no test reaches, and `unlimited`.
pub fn graph() -> Graph {
    let drivers = Drivers::default();
    let rate = |avg| Limit { avg, ..Limit::default() };
    let fast = Limits { buckets: [1 << 40, 0, 0, 0, 1 << 40, 1 << 40].map(rate), op_size: 4096 };
    let mut graph = Graph::new(Arc::new(drivers.clone()));
    for (name, limits) in [("fast", fast), ("unlimited", Limits::default())] {
        let group = Group::new(name, limits, Arc::clone(&drivers.clock));
        graph.resources_mut().add(name, Resource::ThrottleGroup(group));
    }
    graph
}

pub fn options(json: &Value) -> BlockdevOptions {
    BlockdevOptions::from_value(json).unwrap()
}

/// The message that an addition fails with.
pub async fn refused(graph: &mut Graph, json: &Value) -> String {
    graph.add(&options(json)).await.unwrap_err().to_string()
}

pub const READER: Perms = Perms { need: Bits::CONSISTENT_READ, shared: Bits::ALL };

pub fn writer() -> Perms {
    Perms { need: Bits::CONSISTENT_READ | Bits::WRITE, shared: Bits::ALL }
}

pub async fn attach(graph: &mut Graph, name: &str, perms: Perms) -> qapi::Result<Disk> {
    let node = Arc::clone(graph.get(name).unwrap());
    graph.attach(&node, &DiskOptions { label: "a test".into(), perms, writethrough: false }).await
}

/// An empty file of `len` bytes in a folder whose file system is a real one.
pub fn image(len: u64) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    file.as_file().set_len(len).unwrap();
    file
}

/// Whether the file system of the tests has O_DIRECT.
pub fn has_direct() -> bool {
    use std::os::unix::fs::OpenOptionsExt;
    let file = image(4096);
    let direct = nix::fcntl::OFlag::O_DIRECT.bits();
    let there = std::fs::OpenOptions::new().read(true).custom_flags(direct).open(file.path()).is_ok();
    if !there {
        println!("skipped: no O_DIRECT on {}", file.path().display());
    }
    there
}

pub fn have(program: &str) -> bool {
    let there = Command::new(program).arg("--version").stdout(Stdio::null()).status().is_ok();
    if !there {
        println!("skipped: {program} is not installed");
    }
    there
}

/// A loop device over a file, none where it cannot be made.
pub struct Loop {
    pub device: PathBuf,
    pub image: tempfile::NamedTempFile,
}

impl Loop {
    pub fn new(len: u64) -> Option<Self> {
        let image = image(len);
        let out = Command::new("losetup").args(["--find", "--show"]).arg(image.path()).output().ok()?;
        if !out.status.success() {
            println!("skipped: no loop device: {}", String::from_utf8_lossy(&out.stderr));
            return None;
        }
        let device = String::from_utf8(out.stdout).unwrap().trim().into();
        Some(Self { device, image })
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.device).status();
    }
}

/// How many open descriptors of this process show `path`, and how many of them for writing.
pub fn descriptors(path: &Path) -> (usize, usize) {
    let (mut all, mut writable) = (0, 0);
    for entry in std::fs::read_dir("/proc/self/fd").unwrap().flatten() {
        if std::fs::read_link(entry.path()).is_ok_and(|target| target == path) {
            // Closed by another thread in between.
            let Ok(info) = std::fs::read_to_string(Path::new("/proc/self/fdinfo").join(entry.file_name())) else {
                continue;
            };
            let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap().trim();
            all += 1;
            writable += usize::from(u32::from_str_radix(flags, 8).unwrap() & 3 == 2);
        }
    }
    (all, writable)
}

/// Waits until [`descriptors`] are `want`: files are closed on other threads. Hangs if they never are.
pub async fn until(path: &Path, want: (usize, usize)) {
    while descriptors(path) != want {
        io::blocking(std::thread::yield_now).await.unwrap();
    }
}
