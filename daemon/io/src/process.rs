//! Going to the background, before there is any thread.

use nix::unistd::{ForkResult, fork, setsid};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::mem::ManuallyDrop;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;

/// The child's end: tells the waiting parent how the start went.
#[derive(Debug)]
pub struct Starting {
    /// Never closed but by the end of the process: if the start fails, the parent returns only after the child has told
    /// the user why.
    pipe: ManuallyDrop<File>,
}

/// Who returned from [`daemonize`].
#[derive(Debug)]
pub enum Daemonized {
    /// The process that was started by the user, with the status it has to exit with; the child has already told it.
    Parent(i32),
    /// The process that serves.
    Child(Starting),
}

/// Forks into a session of its own. The parent returns when the child says how its start went, or dies.
///
/// Must be called while the process has one thread; the standard streams stay open until [`Starting::succeeded`], so that
/// errors of the start are seen.
///
/// # Errors
/// No pipe or no process could be made.
pub fn daemonize() -> io::Result<Daemonized> {
    let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    if threads()? != 1 {
        return Err(io::Error::other("cannot fork: the process has threads already"));
    }
    // SAFETY: there is one thread, as was just checked, so the child may do whatever the parent could.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => {
            drop(write);
            Ok(Daemonized::Parent(wait_for(child, read)))
        }
        ForkResult::Child => {
            drop(read);
            setsid()?;
            // A second fork gives up the lead of the session: the daemon can never get a terminal by accident.
            // SAFETY: as above.
            match unsafe { fork() }? {
                ForkResult::Parent { .. } => std::process::exit(0),
                ForkResult::Child => {}
            }
            nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o027));
            Ok(Daemonized::Child(Starting { pipe: ManuallyDrop::new(File::from(write)) }))
        }
    }
}

fn threads() -> io::Result<usize> {
    Ok(std::fs::read_dir("/proc/self/task")?.count())
}

/// 0 if the child said that it serves, 1 otherwise.
fn wait_for(child: nix::unistd::Pid, pipe: OwnedFd) -> i32 {
    // The first child ends at once; its own exit says only that the second one was made.
    let first = nix::sys::wait::waitpid(child, None);
    let mut said = Vec::new();
    // End of file without a word: the daemon died, and has told why on standard error.
    let read = File::from(pipe).read_to_end(&mut said);
    match (first, read) {
        (Ok(status), Ok(_)) if status_ok(status) && said == [0] => 0,
        _ => 1,
    }
}

fn status_ok(status: nix::sys::wait::WaitStatus) -> bool {
    matches!(status, nix::sys::wait::WaitStatus::Exited(_, code) if std::process::ExitStatus::from_raw(code << 8).success())
}

impl Starting {
    /// The daemon serves: lets go of the starter's directory and standard streams, then tells the parent.
    ///
    /// # Errors
    /// The null device is missing.
    pub fn succeeded(self) -> io::Result<()> {
        std::env::set_current_dir("/")?;
        let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
        nix::unistd::dup2_stdin(&null)?;
        nix::unistd::dup2_stdout(&null)?;
        nix::unistd::dup2_stderr(&null)?;
        ManuallyDrop::into_inner(self.pipe).write_all(&[0])
    }
}
