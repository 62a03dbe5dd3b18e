//! The process itself: what it inherited, its limits, its life in the background.

use crate::Error;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::ForkResult;
use std::fs::{File, OpenOptions};
use std::io::{self, PipeWriter, Read, Write};
use std::os::fd::RawFd;

/// An error unless the process has exactly one thread.
fn one_thread(step: &'static str) -> Result<(), Error> {
    match std::fs::read_dir("/proc/self/task").map(Iterator::count) {
        Ok(1) => Ok(()),
        Ok(n) => Err(Error::new(step, format!("the process has {n} threads"))),
        Err(e) => Err(Error::new(step, e)),
    }
}

/// Closes the descriptors from `first` on (at least 3) that this process inherited.
///
/// What it opened itself is close-on-exec, which nothing inherited can be.
pub fn close_inherited(first: RawFd) -> Result<(), Error> {
    let error = |e: &dyn std::fmt::Display| Error::new("inherited descriptors", e);
    let entries = std::fs::read_dir("/proc/self/fd").map_err(|e| error(&e))?;
    // Collected first: the listing has a descriptor of its own, which is gone (or close-on-exec) afterwards.
    let open: Vec<RawFd> = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    for fd in open.into_iter().filter(|fd| *fd >= first.max(3)) {
        // SAFETY: F_GETFD only reads a flag; a number that is closed by now is an error.
        let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
        if flags >= 0 && flags & libc::FD_CLOEXEC == 0 {
            // SAFETY: nothing in this process owns it: it is not one of those that the process opened.
            unsafe { libc::close(fd) };
        }
    }
    Ok(())
}

/// Empties the environment. Read before what it has to say.
pub fn clear_environment() -> Result<(), Error> {
    one_thread("environment")?;
    // SAFETY: with one thread, nobody reads the environment at the same time.
    if unsafe { libc::clearenv() } != 0 {
        return Err(Error::new("environment", "clearenv failed"));
    }
    Ok(())
}

/// Allows `open_files` descriptors if the hard limit does.
pub(crate) fn limit_files(open_files: u64) -> Result<(), Error> {
    let error = |e| Error::new("limits", e);
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(error)?;
    let files = open_files.min(hard);
    setrlimit(Resource::RLIMIT_NOFILE, files, files).map_err(error)
}

/// No core file: it would hold what others sent.
pub(crate) fn no_core_file() -> Result<(), Error> {
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(|e| Error::new("limits", e))
}

/// The process that goes on in the background, while the one that was started waits for it.
#[derive(Debug)]
pub struct Background {
    parent: PipeWriter,
    null: File,
}

/// Goes on in a child with a session of its own and the root as its folder; the parent ends when the child says
/// [`Background::ready`] (with status 0) or ends before (with status 1). Only the child returns. The process must have
/// one thread.
pub fn background() -> Result<Background, Error> {
    one_thread("background")?;
    let error = |e: &dyn std::fmt::Display| Error::new("background", e);
    let null = OpenOptions::new().read(true).write(true).open("/dev/null").map_err(|e| error(&e))?;
    let (mut child_says, parent) = io::pipe().map_err(|e| error(&e))?;
    // SAFETY: with one thread, no lock is held by a thread that the child does not have.
    match unsafe { nix::unistd::fork() }.map_err(|e| error(&e))? {
        ForkResult::Parent { .. } => {
            drop(parent);
            let ready = child_says.read_exact(&mut [0]).is_ok();
            std::process::exit(i32::from(!ready));
        }
        ForkResult::Child => {
            nix::unistd::setsid().map_err(|e| error(&e))?;
            nix::unistd::chdir("/").map_err(|e| error(&e))?;
            Ok(Background { parent, null })
        }
    }
}

impl Background {
    /// Leaves the terminal and lets the parent end well. Under a filter this needs write and dup2.
    pub fn ready(mut self) -> Result<(), Error> {
        let error = |e: &dyn std::fmt::Display| Error::new("background", e);
        nix::unistd::dup2_stdin(&self.null).map_err(|e| error(&e))?;
        nix::unistd::dup2_stdout(&self.null).map_err(|e| error(&e))?;
        nix::unistd::dup2_stderr(&self.null).map_err(|e| error(&e))?;
        self.parent.write_all(&[0]).map_err(|e| error(&e))
    }
}
