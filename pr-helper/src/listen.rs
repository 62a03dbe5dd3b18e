//! The listening socket, from the service manager or of one's own, and the pid file: what has to go at the end.

use crate::options::{DEFAULT_SOCKET, Options};
use listenfd::ListenFd;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, Uid};
use rustix::fs::{FileType, OFlags};
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

/// The sockets that a service manager passes begin here, `[sd_listen_fds(3)]`.
const FIRST_PASSED: i32 = 3;

/// A path that this process made and removes at its end.
#[derive(Debug)]
pub struct Made(pub PathBuf);

impl Made {
    /// Removes it; the error is a message.
    pub fn remove(&self, what: &str) -> Result<(), String> {
        match std::fs::remove_file(&self.0) {
            Err(e) if e.kind() != ErrorKind::NotFound => {
                Err(format!("Failed to unlink {what} {}: {e}", self.0.display()))
            }
            _ => Ok(()),
        }
    }
}

/// The first descriptor that no service manager passed to this process.
pub fn first_unannounced(passed: &ListenFd) -> i32 {
    FIRST_PASSED + i32::try_from(passed.len()).unwrap_or(0)
}

/// The socket of the service manager, or a new one; with the path to remove at the end.
pub fn listener(options: &Options, mut passed: ListenFd) -> Result<(UnixListener, Option<Made>), String> {
    match passed.len() {
        0 => bind(options).map(|(listener, made)| (listener, Some(made))),
        1 if options.socket.is_some() => Err("Unix socket can't be set when using socket activation".into()),
        1 if options.shapes_socket() => {
            Err("Owner, mode and label of the socket can't be set when using socket activation".into())
        }
        1 => match passed.take_unix_listener(0) {
            Ok(Some(listener)) => Ok((listener, None)),
            Ok(None) => Err("Failed to use socket activation: no socket".into()),
            Err(e) => Err(format!("Failed to use socket activation: {e}")),
        },
        _ => Err("qemu-pr-helper does not support socket activation with LISTEN_FDS > 1".into()),
    }
}

fn bind(options: &Options) -> Result<(UnixListener, Made), String> {
    let path = options.socket.as_deref().unwrap_or(Path::new(DEFAULT_SOCKET));
    if !path.is_absolute() {
        return Err("socket path must be absolute".into());
    }
    let failed = |e: &dyn std::fmt::Display| format!("Failed to bind socket to {}: {e}", path.display());
    // Only a socket is taken over: what an earlier process left, or what it still listens on.
    if path.symlink_metadata().is_ok_and(|meta| meta.file_type().is_socket()) {
        std::fs::remove_file(path).map_err(|e| failed(&e))?;
    }
    let owner = options.socket_user.as_deref().map(|name| user(name).map(|u| u.0)).transpose()?;
    let group = options.socket_group.as_deref().map(group).transpose()?;
    let label = options.socket_label.as_deref();
    let restricted = options.socket_mode.is_some() || owner.is_some() || group.is_some() || label.is_some();
    // Until owner, mode and label are right, nobody else may connect.
    let before = restricted.then(|| umask(Mode::from_bits_truncate(0o177)));
    let listener = UnixListener::bind(path).map_err(|e| failed(&e));
    if let Some(before) = before {
        umask(before);
    }
    let (listener, made) = (listener?, Made(path.to_owned()));
    if restricted {
        let mode = options.socket_mode.unwrap_or(0o755 & !current_umask());
        if let Err(e) = shape(path, owner, group, mode, label) {
            // That it cannot be removed either is no further news.
            let _ = made.remove("socket");
            return Err(failed(&e));
        }
    }
    Ok((listener, made))
}

/// Gives the socket at `path` its owner, mode and label; none of it to what somebody else put in its place.
fn shape(path: &Path, owner: Option<Uid>, group: Option<Gid>, mode: u32, label: Option<&str>) -> io::Result<()> {
    let socket = rustix::fs::open(path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, rustix::fs::Mode::empty())?;
    if !FileType::from_raw_mode(rustix::fs::fstat(&socket)?.st_mode).is_socket() {
        return Err(io::Error::other("it is no socket any more"));
    }
    // By this name the system calls below reach what was opened, wherever its path leads by now.
    let name = format!("/proc/self/fd/{}", socket.as_raw_fd());
    if let Some(label) = label {
        // With its end, as the tools that show it expect.
        let value = [label.as_bytes(), &[0]].concat();
        rustix::fs::setxattr(&name, "security.selinux", &value, rustix::fs::XattrFlags::empty())?;
    }
    nix::unistd::chown(name.as_str(), owner, group)?;
    std::fs::set_permissions(&name, std::fs::Permissions::from_mode(mode))
}

/// The umask can only be read by setting it.
fn current_umask() -> u32 {
    let mask = umask(Mode::empty());
    umask(mask);
    mask.bits()
}

/// A user of the options, or the message that there is none.
pub fn user(name: &str) -> Result<(Uid, Option<Gid>), String> {
    sandbox::identity::user(name).ok_or_else(|| format!("invalid user '{name}'"))
}

/// A group of the options, or the message that there is none.
pub fn group(name: &str) -> Result<Gid, String> {
    sandbox::identity::group(name).ok_or_else(|| format!("invalid group '{name}'"))
}

/// Writes the pid file and locks it for as long as the process lives: one process a file.
pub fn pidfile(path: &Path) -> Result<(Flock<File>, Made), String> {
    let failed = |e: &dyn std::fmt::Display| format!("Could not create '{}': {e}", path.display());
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false).mode(0o600).custom_flags(libc::O_NOFOLLOW);
    let file = options.open(path).map_err(|e| failed(&e))?;
    let mut file = Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(|(_, e)| format!("Could not lock '{}': {}", path.display(), io::Error::from(e)))?;
    let pid = std::process::id();
    file.set_len(0).and_then(|()| writeln!(file, "{pid}")).map_err(|e| failed(&e))?;
    Ok((file, Made(path.to_owned())))
}
