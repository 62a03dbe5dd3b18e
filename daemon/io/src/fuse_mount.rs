//! Mounting of `/dev/fuse` on a regular file, and taking the mount away again. `[mount(2)]`, `[fusermount3(1)]`
//!
//! Plain calls that block, without threads or state, so that a process of its own can make them for one that is not allowed
//! to. Whoever is privileged mounts by itself; others ask the set-user-id program `fusermount3`. No descriptor
//! and nothing else of the caller is left to that program but one end of a socket pair.

use nix::errno::Errno;
use rustix::fs::{AtFlags, StatxFlags};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use std::ffi::CString;
use std::fs::OpenOptions;
use std::io::{self, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

const DEVICE: &str = "/dev/fuse";
const HELPER: &str = "fusermount3";
/// Names the descriptor to the helper over which it sends the mounted device.
const HELPER_SOCKET: &str = "_FUSE_COMMFD";

/// The options that are flags of mount(2); the file system reads the others itself.
const FLAGS: &[(&str, libc::c_ulong)] = &[
    ("ro", libc::MS_RDONLY),
    ("rw", 0),
    ("nosuid", libc::MS_NOSUID),
    ("nodev", libc::MS_NODEV),
    ("noexec", libc::MS_NOEXEC),
    ("noatime", libc::MS_NOATIME),
];

/// Mounts a new `/dev/fuse` on `mountpoint` with `options`, a list like `ro,nosuid,allow_other`. The result is the device,
/// closed on exec; the kernel's first request waits in it.
///
/// # Errors
/// The kernel does not let it happen and neither does the helper, whose words are in the error then.
pub fn mount(mountpoint: &Path, options: &str) -> io::Result<OwnedFd> {
    match mount_directly(mountpoint, options) {
        Err(error) if is_refusal(&error) => mount_by_helper(mountpoint, options),
        other => other,
    }
}

/// One mount among all that there ever are; before Linux 6.8 among those that there are at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MountId {
    /// The number that stat(2) shows as the device of its files.
    device: (u32, u32),
    number: u64,
}

impl MountId {
    /// The one that `path` leads to, not through a link. Whoever serves it is not asked.
    ///
    /// # Errors
    /// There is no such path, or nobody may look.
    pub fn at(path: &Path) -> io::Result<Self> {
        /// `[Linux include/uapi/linux/stat.h]`
        const MNT_ID_UNIQUE: u32 = 0x4000;
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
        // A kernel that does not know the one gives the other.
        let wanted = StatxFlags::MNT_ID | StatxFlags::from_bits_retain(MNT_ID_UNIQUE);
        let found = rustix::fs::statx(rustix::fs::CWD, path, flags, wanted)?;
        Ok(Self { device: (found.stx_dev_major, found.stx_dev_minor), number: found.stx_mnt_id })
    }
}

/// Takes the last mount off `mountpoint`, if it is `what`: who has unmounted that may have put something else there. Files
/// that are open stay so until their users close them.
///
/// # Errors
/// There is no such mount, or neither the caller nor the helper may take it away.
pub fn unmount(mountpoint: &Path, what: MountId) -> io::Result<()> {
    if MountId::at(mountpoint)? != what {
        return Err(io::Error::other("it is not mounted there any more, or something else is, over it"));
    }
    let path = c_string(mountpoint.as_os_str().as_bytes())?;
    // SAFETY: the path is a string that ends with a zero and lives until the call returns.
    let result = unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH | libc::UMOUNT_NOFOLLOW) };
    match Errno::result(result).map(drop).map_err(io::Error::from) {
        Err(error) if is_refusal(&error) => unmount_by_helper(mountpoint),
        other => other,
    }
}

fn is_refusal(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EPERM | libc::EACCES))
}

fn c_string(bytes: &[u8]) -> io::Result<CString> {
    CString::new(bytes).map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "a zero byte in a path or an option"))
}

fn mount_directly(mountpoint: &Path, options: &str) -> io::Result<OwnedFd> {
    let device = OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC).open(DEVICE)?;
    let root = std::fs::metadata(mountpoint)?;
    let mut flags = 0;
    // SAFETY: these calls read two numbers of the process.
    let (uid, gid) = unsafe { (libc::geteuid(), libc::getegid()) };
    let mut data =
        format!("fd={},rootmode={:o},user_id={uid},group_id={gid}", device.as_raw_fd(), root.mode() & libc::S_IFMT);
    for option in options.split(',').filter(|option| !option.is_empty()) {
        match FLAGS.iter().find(|(name, _)| *name == option) {
            Some((_, flag)) => flags |= flag,
            None => {
                data.push(',');
                data.push_str(option);
            }
        }
    }
    let (target, data) = (c_string(mountpoint.as_os_str().as_bytes())?, c_string(data.as_bytes())?);
    // SAFETY: all pointers are strings that end with a zero and live until the call returns.
    let result =
        unsafe { libc::mount(c"/dev/fuse".as_ptr(), target.as_ptr(), c"fuse".as_ptr(), flags, data.as_ptr().cast()) };
    Errno::result(result)?;
    Ok(device.into())
}

fn mount_by_helper(mountpoint: &Path, options: &str) -> io::Result<OwnedFd> {
    let (ours, theirs) = UnixStream::pair()?;
    let number = theirs.as_raw_fd();
    let mut command = Command::new(HELPER);
    command.arg("-o").arg(options).arg("--").arg(mountpoint).env(HELPER_SOCKET, number.to_string());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    // SAFETY: between fork and exec there is one system call, which is safe in a signal handler.
    unsafe {
        command.pre_exec(move || match libc::fcntl(number, libc::F_SETFD, 0) {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
    let mut child = command.spawn().map_err(|error| {
        io::Error::new(error.kind(), format!("not permitted, and {HELPER} cannot be started: {error}"))
    })?;
    drop(theirs);
    let received = receive_descriptor(&ours);
    drop(ours);
    let mut words = String::new();
    if let Some(stderr) = child.stderr.take() {
        // Only for the message; more than some lines are not worth it.
        let _ = stderr.take(4096).read_to_string(&mut words);
    }
    let status = child.wait()?;
    match received? {
        Some(device) if status.success() => Ok(device),
        _ if words.trim().is_empty() => Err(io::Error::other(format!("{HELPER} failed: {status}"))),
        _ => Err(io::Error::other(words.trim().to_owned())),
    }
}

/// The first descriptor that comes over `socket`, none if its other end is closed without one.
fn receive_descriptor(socket: &UnixStream) -> io::Result<Option<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    loop {
        match rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Ok(_) => break,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    }))
}

fn unmount_by_helper(mountpoint: &Path) -> io::Result<()> {
    let mut command = Command::new(HELPER);
    command.args(["-u", "-z", "-q", "--"]).arg(mountpoint);
    let output = command.stdin(Stdio::null()).stdout(Stdio::null()).output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(format!("{HELPER}: {}", String::from_utf8_lossy(&output.stderr).trim())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_mount_is_not_unmounted_and_what_does_not_exist_not_mounted_on() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f");
        assert!(mount(&file, "ro").is_err());
        std::fs::write(&file, "x").unwrap();
        let below = MountId::at(&file).unwrap();
        assert!(unmount(&file, below).is_err());
        let other = MountId::at(Path::new("/proc")).unwrap();
        assert!(unmount(&file, other).unwrap_err().to_string().contains("not mounted there any more"));
        assert!(mount(&file, "ro,a\0b").is_err());
    }

    #[test]
    fn a_helper_that_says_nothing_sends_nothing() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert!(receive_descriptor(&ours).unwrap().is_none());
    }
}
