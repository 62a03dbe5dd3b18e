//! The programs that are compared, how they are started on the image, and what they cost the machine.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::time::TimeValLike;
use nix::time::{ClockId, clock_getcpuclockid};
use nix::unistd::Pid;
use tests::image::Noise;
use tests::{Daemon, Setup, tools};

use crate::cells::Backend;

/// A program with the options that make a contender of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// This project's daemon, without options.
    Ours,
    /// This project's daemon, the export on an IOThread of its own.
    OursThread,
    /// The reference without options: a pool of threads.
    Reference,
    /// The reference with `aio=io_uring` and an IOThread: its best.
    ReferenceRing,
}

impl Program {
    /// The program that the command line calls so.
    pub fn named(name: &str) -> Self {
        match name {
            "ours" => Self::Ours,
            "ours-iothread" => Self::OursThread,
            "ref" => Self::Reference,
            "ref-uring" => Self::ReferenceRing,
            _ => panic!("no program {name}: ours, ours-iothread, ref, ref-uring"),
        }
    }

    /// Its name in the table.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ours => "ours",
            Self::OursThread => "ours, iothread",
            Self::Reference => "reference",
            Self::ReferenceRing => "reference, io_uring and iothread",
        }
    }

    /// Whether it is the reference.
    pub fn is_reference(self) -> bool {
        matches!(self, Self::Reference | Self::ReferenceRing)
    }

    /// Its binary, when there is one.
    pub fn path(self) -> Option<PathBuf> {
        if self.is_reference() {
            return tests::program::reference();
        }
        let beside = || std::env::current_exe().ok()?.parent().map(|dir| dir.join("qemu-storage-daemon"));
        std::env::var_os("QSD_OURS").map(PathBuf::from).or_else(beside).filter(|path| path.is_file())
    }

    /// A daemon to be started, with nothing but what this contender adds.
    pub fn setup(self) -> Setup {
        let setup = Setup::of(&self.path().expect("an installed program"));
        if self.has_thread() { setup.line("--object iothread,id=t0") } else { setup }
    }

    /// Whether it has the IOThread `t0`.
    pub fn has_thread(self) -> bool {
        matches!(self, Self::OursThread | Self::ReferenceRing)
    }

    /// What this contender adds to the options of an export.
    pub fn export_options(self) -> &'static str {
        if self.has_thread() { ",iothread=t0" } else { "" }
    }

    /// What this contender adds to the options of a `file` node.
    pub fn file_options(self) -> &'static str {
        if self == Self::ReferenceRing { ",aio=io_uring" } else { "" }
    }

    /// The options of a node called `disk` on the image, or on nothing.
    pub fn node(self, backend: Backend, image: &Image) -> String {
        let aio = self.file_options();
        match backend {
            Backend::Null => format!("null-co,node-name=disk,size={},read-zeroes=off", image.size),
            Backend::Cache => format!("file,node-name=disk,filename={}{aio}", image.path.display()),
            Backend::Direct => {
                format!("file,node-name=disk,filename={},cache.direct=on{aio}", image.path.display())
            }
            Backend::Qcow2 => {
                let (from, full) = (text(&image.path), image.path.with_file_name("full.qcow2"));
                if !full.exists() {
                    tools::ok("qemu-img", ["convert", "-f", "raw", "-O", "qcow2", &from, &text(&full)]);
                }
                format!(
                    "qcow2,node-name=disk,file.driver=file,file.filename={}{}",
                    full.display(),
                    aio.replace(',', ",file.")
                )
            }
            Backend::Overlay => image.overlay(&image.path, "raw", aio),
            Backend::OverlayOfNothing => {
                let empty = image.path.with_file_name("empty");
                tools::ok("qemu-img", ["create", "-q", "-f", "qcow2", &text(&empty), &image.size.to_string()]);
                image.overlay(&empty, "qcow2", aio)
            }
        }
    }

    /// Starts it with the image, or with nothing behind it, as the writable export `disk`.
    pub fn serve(self, backend: Backend, image: &Image) -> Daemon {
        self.serve_nodes(&[self.node(backend, image)])
    }

    /// Starts it with nodes, the last of which is called `disk`, and that one as the writable export `disk`.
    pub fn serve_nodes(self, nodes: &[String]) -> Daemon {
        let thread = self.export_options();
        nodes
            .iter()
            .fold(self.setup(), |setup, node| setup.arg("--blockdev").arg(node))
            .qmp()
            .nbd_server()
            .arg("--export")
            .arg(format!("nbd,id=e,node-name=disk,name=disk,writable=on{thread}"))
            .start()
    }
}

/// The image that all programs serve in turn: a file full of noise, on the disk that holds temporary files.
pub struct Image {
    _dir: tempfile::TempDir,
    path: PathBuf,
    /// Its size in bytes.
    pub size: u64,
}

impl Image {
    /// Makes the image.
    pub fn new(size: u64) -> Self {
        let dir = tempfile::Builder::new().prefix("qsd-bench-").tempdir().expect("make a directory");
        let path = dir.path().join("image");
        let mut file = File::create(&path).expect("make the image");
        let block = Noise::new(1).bytes(1 << 20);
        for _ in 0..size >> 20 {
            file.write_all(&block).expect("fill the image");
        }
        file.sync_all().expect("write the image to its disk");
        Self { _dir: dir, path, size }
    }

    /// The options of the node `disk` on a new overlay of the image at `below`.
    fn overlay(&self, below: &Path, format: &str, file_options: &str) -> String {
        let path = text(&self.path.with_file_name("overlay"));
        let _ = std::fs::remove_file(&path);
        tools::ok("qemu-img", ["create", "-q", "-f", "qcow2", "-F", format, "-b", &text(below), &path]);
        let file_options = file_options.replace(',', ",file.");
        format!("qcow2,node-name=disk,file.driver=file,file.filename={path}{file_options}")
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// The processor time that a process has used, all its threads together, also those that have ended.
pub fn cpu_time(daemon: &Daemon) -> Duration {
    let pid = Pid::from_raw(i32::try_from(daemon.pid()).expect("a process id"));
    let clock: ClockId = clock_getcpuclockid(pid).expect("the clock of a process");
    let time = clock.now().expect("read the clock of a process");
    Duration::from_nanos(u64::try_from(time.num_nanoseconds()).unwrap_or(0))
}

/// The memory that a process has to itself, with its part of what it shares, in KiB [proc_pid_smaps(5) Pss].
pub fn pss(daemon: &Daemon) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", daemon.pid())).expect("read smaps_rollup");
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).expect("a line for Pss");
    line.trim().trim_end_matches(" kB").parse().expect("a number of kB")
}

fn text(path: &Path) -> String {
    path.display().to_string()
}
