//! The process that mounts, for one that may not.
//!
//! A sandboxed daemon neither mounts nor starts programs, and nothing that it starts can have more than it has itself. So
//! before it gives anything up it forks a process that does [`fuse_mount`]'s two calls on request, and nothing else: no
//! file of the daemon is left open in it, and it ends when the daemon does. What was mounted then stays, as it does when a
//! daemon without a sandbox is killed: a program that goes on using the path gets an error, not the file below the mount.
//!
//! Without that process, [`mount`] and [`unmount`] are those of [`fuse_mount`].
//!
//! A request is one message on a socket that keeps messages apart: a letter, the path, for `m` a zero byte and the options.
//! The answer is an errno, or zero, and words for the user; with it comes the device.

use crate::fuse_mount::{self, MountId};
use nix::errno::Errno;
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::{ForkResult, fork};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use std::ffi::OsStr;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

/// The longest request and answer: a path, options, words.
const LARGEST: usize = 8192;

/// Words that options may have; everything else but [`is_harmless`]'s names could give files powers that the daemon does not
/// have.
const OPTIONS: &[&str] = &["ro", "rw", "nosuid", "nodev", "noexec", "noatime", "allow_other", "default_permissions"];

/// The way to the process. One request at a time: a mount is quick, and the kernel keeps them apart anyhow.
static PROCESS: OnceLock<Mutex<OwnedFd>> = OnceLock::new();

/// Starts the process. It mounts on all that the daemon's user may mount on, or on `places` alone. Returns in the daemon
/// only, which must have one thread; once.
///
/// # Errors
/// There are threads already; the system has no process or no socket for it.
pub fn start(places: Option<Vec<PathBuf>>) -> io::Result<()> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::other("the process has threads already"));
    }
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    // SAFETY: there is one thread, as was just checked, so the child may do whatever the parent could.
    match unsafe { fork() }? {
        ForkResult::Parent { .. } => {
            PROCESS.set(Mutex::new(ours)).map_err(|_| io::Error::other("the process that mounts runs already"))
        }
        ForkResult::Child => {
            let status = match settle(theirs) {
                Ok(socket) => serve(&socket, places.as_deref()),
                Err(_) => 1,
            };
            // Not `exit`: what the daemon registered for its end is the daemon's.
            // SAFETY: ends the process at once and touches no memory of it.
            unsafe { libc::_exit(status) }
        }
    }
}

/// Mounts as [`fuse_mount::mount`] does, by the process if there is one, and says which mount it is. The path is absolute.
///
/// # Errors
/// Those of [`fuse_mount::mount`]; the process has ended.
pub fn mount(mountpoint: &Path, options: &str) -> io::Result<(OwnedFd, MountId)> {
    let device = match PROCESS.get() {
        None => fuse_mount::mount(mountpoint, options)?,
        Some(process) => {
            let request = [b"m", mountpoint.as_os_str().as_bytes(), b"\0", options.as_bytes()].concat();
            ask(process, &request)?.ok_or_else(|| io::Error::other("the process that mounts sent no device"))?
        }
    };
    Ok((device, MountId::at(mountpoint)?))
}

/// Unmounts as [`fuse_mount::unmount`] does, by the process if there is one.
///
/// # Errors
/// Those of [`fuse_mount::unmount`]; the process has ended.
pub fn unmount(mountpoint: &Path, what: MountId) -> io::Result<()> {
    // That process knows by itself what it mounted.
    let Some(process) = PROCESS.get() else { return fuse_mount::unmount(mountpoint, what) };
    ask(process, &[b"u", mountpoint.as_os_str().as_bytes()].concat()).map(drop)
}

fn ask(process: &Mutex<OwnedFd>, request: &[u8]) -> io::Result<Option<OwnedFd>> {
    let socket = process.lock().unwrap_or_else(PoisonError::into_inner);
    if request.len() > LARGEST {
        return Err(Errno::ENAMETOOLONG.into());
    }
    rustix::io::retry_on_intr(|| rustix::net::send(&*socket, request, SendFlags::NOSIGNAL))?;
    let (answer, device) = receive(socket.as_fd())?;
    let Some((code, words)) = answer.split_first_chunk() else {
        return Err(io::Error::other("the process that mounts has ended"));
    };
    match i32::from_ne_bytes(*code) {
        0 => Ok(device),
        code if words.is_empty() => Err(io::Error::from_raw_os_error(code)),
        _ => Err(io::Error::other(String::from_utf8_lossy(words).into_owned())),
    }
}

/// One message and the descriptor that came with it; an empty message is the other side's end.
fn receive(socket: BorrowedFd<'_>) -> io::Result<(Vec<u8>, Option<OwnedFd>)> {
    let mut message = vec![0; LARGEST];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::io::retry_on_intr(|| {
        let mut pieces = [IoSliceMut::new(&mut message)];
        rustix::net::recvmsg(socket, &mut pieces, &mut ancillary, RecvFlags::CMSG_CLOEXEC)
    })?;
    message.truncate(received.bytes);
    let device = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    Ok((message, device))
}

/// Makes the child a process of its own: nothing open but its socket, no folder, no terminal, no signal that is meant for the daemon.
fn settle(socket: OwnedFd) -> io::Result<OwnedFd> {
    const PLACE: i32 = 3;
    for kind in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGPIPE] {
        // SAFETY: no handler runs; the signal is dropped. The daemon's end is what ends this process.
        unsafe { signal(kind, SigHandler::SigIgn) }?;
    }
    // SIGCHLD as usual: programs are waited for.
    nix::sys::prctl::set_name(c"qsd-mounter")?;
    std::env::set_current_dir("/")?;
    let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
    nix::unistd::dup2_stdin(&null)?;
    nix::unistd::dup2_stdout(&null)?;
    nix::unistd::dup2_stderr(&null)?;
    drop(null);
    if socket.as_raw_fd() != PLACE {
        // SAFETY: whatever has this number belongs to the daemon, and nobody in this process uses it any more.
        Errno::result(unsafe { libc::dup3(socket.as_raw_fd(), PLACE, libc::O_CLOEXEC) })?;
    }
    // SAFETY: as above, for all numbers from the next one on.
    Errno::result(unsafe { libc::syscall(libc::SYS_close_range, PLACE + 1, libc::c_uint::MAX, 0) })?;
    std::mem::forget(socket);
    // SAFETY: the descriptor was just made, and its former owner is forgotten.
    Ok(unsafe { OwnedFd::from_raw_fd(PLACE) })
}

/// Carries out requests until the daemon has gone; the exit status.
fn serve(socket: &OwnedFd, places: Option<&[PathBuf]>) -> i32 {
    let mut mounted = Vec::new();
    loop {
        let Ok((request, _)) = receive(socket.as_fd()) else { return 1 };
        if request.is_empty() {
            return 0;
        }
        let result = carry_out(&request, places, &mut mounted);
        let (code, words) = match &result {
            Ok(_) => (0, String::new()),
            Err(error) => match error.raw_os_error() {
                Some(code) => (code, String::new()),
                None => (libc::EIO, error.to_string()),
            },
        };
        let code = code.to_ne_bytes();
        let words = words.as_bytes().get(..LARGEST - code.len()).unwrap_or(words.as_bytes());
        let device = result.ok().flatten();
        let borrowed = device.as_ref().map(AsFd::as_fd);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !borrowed.as_slice().is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(borrowed.as_slice()));
        }
        let pieces = [IoSlice::new(&code), IoSlice::new(words)];
        if rustix::net::sendmsg(socket, &pieces, &mut ancillary, SendFlags::NOSIGNAL).is_err() {
            return 0;
        }
    }
}

/// `mounted` is what was mounted here and not unmounted: nothing else is unmounted.
fn carry_out(
    request: &[u8],
    places: Option<&[PathBuf]>,
    mounted: &mut Vec<(PathBuf, MountId)>,
) -> io::Result<Option<OwnedFd>> {
    let (path, options) = match request {
        [b'u', path @ ..] => (path, None),
        [b'm', rest @ ..] => {
            let zero = rest.iter().position(|byte| *byte == 0).ok_or(Errno::EINVAL)?;
            let (path, options) = rest.split_at(zero);
            let options = std::str::from_utf8(options.get(1..).unwrap_or_default()).map_err(|_| Errno::EINVAL)?;
            (path, Some(options))
        }
        _ => return Err(Errno::EINVAL.into()),
    };
    let path = Path::new(OsStr::from_bytes(path));
    if places.is_some_and(|places| !places.iter().any(|place| place == path)) {
        return Err(Errno::EACCES.into());
    }
    match options {
        None => {
            let index = mounted.iter().rposition(|(place, _)| place == path).ok_or(Errno::EINVAL)?;
            // Asked for once, whatever comes of it.
            let (_, what) = mounted.remove(index);
            fuse_mount::unmount(path, what)?;
            Ok(None)
        }
        // No set-user-id program and no device file comes from an image.
        Some(options) if options.split(',').all(is_harmless) => {
            // Whoever could mount on a folder could put other programs under their names.
            if !std::fs::symlink_metadata(path)?.is_file() {
                return Err(io::Error::other(format!("{} is not a regular file", path.display())));
            }
            let device = fuse_mount::mount(path, &format!("{options},nosuid,nodev"))?;
            mounted.push((path.to_owned(), MountId::at(path)?));
            Ok(Some(device))
        }
        Some(_) => Err(Errno::EPERM.into()),
    }
}

fn is_harmless(option: &str) -> bool {
    let fixed = ["fsname=", "subtype=", "max_read=", "blksize="];
    option.is_empty() || OPTIONS.contains(&option) || fixed.iter().any(|name| option.starts_with(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn errno(request: &[u8], places: Option<&[PathBuf]>) -> Option<i32> {
        carry_out(request, places, &mut Vec::new()).unwrap_err().raw_os_error()
    }

    #[test]
    fn only_mounts_that_give_no_more_than_the_daemon_has() {
        assert_eq!(errno(b"m/nowhere\0ro,suid", None), Some(libc::EPERM));
        assert_eq!(errno(b"m/nowhere\0dev", None), Some(libc::EPERM));
        assert_eq!(errno(b"m/nowhere\0fsname=x,rootcontext=y", None), Some(libc::EPERM));
    }

    #[test]
    fn only_at_the_places_it_was_told() {
        let places = [PathBuf::from("/somewhere")];
        assert_eq!(errno(b"m/nowhere\0ro", Some(&places)), Some(libc::EACCES));
        assert_eq!(errno(b"u/nowhere", Some(&places)), Some(libc::EACCES));
        assert_eq!(errno(b"m/somewhere/../nowhere\0ro", Some(&places)), Some(libc::EACCES));
    }

    #[test]
    fn nothing_but_files_is_mounted_on_and_nothing_of_others_unmounted() {
        let error = carry_out(b"m/proc\0ro", None, &mut Vec::new()).unwrap_err();
        assert_eq!(error.to_string(), "/proc is not a regular file");
        assert_eq!(errno(b"u/proc", None), Some(libc::EINVAL));
    }

    #[test]
    fn what_is_no_request() {
        for request in [&b"x/nowhere"[..], b"m/nowhere", b"m/nowhere\0\xff", b""] {
            assert_eq!(errno(request, None), Some(libc::EINVAL), "{request:?}");
        }
    }
}
