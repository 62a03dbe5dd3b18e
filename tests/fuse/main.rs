//! FUSE exports [drop-in A.6]: a node as a regular file, used by whatever uses files.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

mod attributes;
mod crash;
mod data;
mod errors;
mod interop;
mod lifecycle;
mod options;
mod random;
mod transport;
mod unprivileged;

use std::fs::{File, OpenOptions};
use std::path::PathBuf;

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use tests::{Daemon, Setup};

/// Sizes.
const MIB: u64 = 1 << 20;

/// A daemon with a FUSE export of the node `f` on the file `mnt` in its directory. What is left of the mount goes with it.
pub struct Mounted {
    /// The daemon.
    pub daemon: Daemon,
    mountpoint: PathBuf,
}

impl Mounted {
    /// Starts `setup`, which has the node `f`, with an export of it, called `e`. `options` are more of its options, each with
    /// a comma in front. None where the machine has no FUSE.
    pub fn start(setup: Setup, options: &str) -> Option<Self> {
        if File::open("/dev/fuse").is_err() {
            return None;
        }
        let setup = setup.image("mnt", 0).qmp();
        let daemon = setup.line(&format!("--export fuse,id=e,node-name=f,mountpoint=mnt{options}")).start();
        let mountpoint = daemon.path("mnt");
        Some(Self { daemon, mountpoint })
    }

    /// The file that the export is.
    pub fn path(&self) -> PathBuf {
        self.mountpoint.clone()
    }

    /// The same for programs.
    pub fn name(&self) -> String {
        self.mountpoint.display().to_string()
    }

    /// The file, open for both.
    pub fn open(&self) -> File {
        OpenOptions::new().read(true).write(true).open(&self.mountpoint).unwrap()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // A killed daemon leaves its mount, and the directory cannot be removed then. If there is none, fine.
        let _ = umount2(&self.mountpoint, MntFlags::MNT_DETACH);
    }
}

/// The node `f` on a raw image of so many bytes.
fn raw(size: u64) -> Setup {
    Setup::new().image("a.img", size).line("--blockdev file,node-name=f,filename=a.img,discard=unmap")
}

/// The node `f` on a new qcow2 image of so many bytes.
fn qcow2(size: u64) -> Setup {
    let setup = Setup::new();
    let path = setup.path("a.img").display().to_string();
    tests::tools::ok("qemu-img", ["create", "-q", "-f", "qcow2", &path, &size.to_string()]);
    setup
        .line("--blockdev file,node-name=p,filename=a.img,discard=unmap")
        .line("--blockdev qcow2,node-name=f,file=p,discard=unmap")
}

/// Where the kernel has a mount on this file.
fn is_mounted(path: &std::path::Path) -> bool {
    let wanted = path.display().to_string();
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    mounts.lines().any(|line| line.split(' ').nth(1) == Some(&wanted))
}

/// Whether the kernel sends requests over io_uring to those that can take them so.
fn over_rings() -> bool {
    std::fs::read_to_string("/sys/module/fuse/parameters/enable_uring").is_ok_and(|text| text.trim() == "Y")
}

/// Whether an error says that the export of an open file has gone. Over io_uring a request that comes in the moment of the end
/// is ended as aborted or cancelled.
fn says_gone(error: &std::io::Error) -> bool {
    let known: &[Errno] =
        if over_rings() { &[Errno::ENOTCONN, Errno::ECONNABORTED, Errno::ECANCELED] } else { &[Errno::ENOTCONN] };
    error.raw_os_error().is_some_and(|number| known.contains(&Errno::from_raw(number)))
}
