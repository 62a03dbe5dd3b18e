//! Files, named pipes, serial and parallel ports as character devices.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use ::io::{Channel, FdSetUse, FdSets};
use nix::fcntl::OFlag;
use nix::sys::stat::{Mode, SFlag, stat};
use nix::sys::termios::{BaudRate, ControlFlags, SetArg, cfmakeraw, cfsetspeed, tcgetattr, tcsetattr};
use qapi::types::chardev::{ChardevFile, ChardevHostdev};
use qapi::{Error, Result};

use super::permanent::Permanent;
use super::transport::WriteOnly;
use super::{Common, Connection};

/// A file that is open, and what keeps its set of descriptors.
struct Opened {
    fd: OwnedFd,
    from_set: Option<FdSetUse>,
}

async fn open(fdsets: &FdSets, name: &str, flags: OFlag) -> io::Result<Opened> {
    let (path, fdsets) = (PathBuf::from(name), fdsets.clone());
    let work = move || {
        let flags = flags | OFlag::O_NOCTTY | OFlag::O_NONBLOCK;
        fdsets.open(&path, flags, Mode::from_bits_truncate(0o666))
    };
    let opened = ::io::blocking(work).await??;
    Ok(Opened { fd: opened.fd, from_set: opened.from_set })
}

fn could_not_open(name: &str) -> impl Fn(io::Error) -> Error {
    move |error| Error::io(format!("Could not open '{name}'"), error)
}

/// `file`: what is sent goes to one file, and what is received comes from another one if there is one.
///
/// # Errors
/// A file cannot be opened.
pub(super) async fn file(options: &ChardevFile, fdsets: &FdSets, common: &Common) -> Result<Permanent> {
    let end = if options.append { OFlag::O_APPEND } else { OFlag::O_TRUNC };
    let output = open(fdsets, &options.out, OFlag::O_WRONLY | OFlag::O_CREAT | end)
        .await
        .map_err(could_not_open(&options.out))?;
    let Some(name) = &options.input else {
        let common = common.clone();
        return Ok(Permanent::new(move || {
            let channel = Channel::single(output.fd.try_clone()?)?;
            Ok(Connection::plain(WriteOnly(channel), &common).with_guard(output.from_set.clone()))
        }));
    };
    // A pipe that is open for writing as well never ends, whoever comes and goes at its other end.
    let flags = if is_pipe(name).await { OFlag::O_RDWR } else { OFlag::O_RDONLY };
    let input = open(fdsets, name, flags).await.map_err(could_not_open(name))?;
    Ok(pair(input, output, common))
}

async fn is_pipe(name: &str) -> bool {
    let path = PathBuf::from(name);
    let found = ::io::blocking(move || stat(&path)).await;
    matches!(found, Ok(Ok(found)) if SFlag::from_bits_truncate(found.st_mode) & SFlag::S_IFMT == SFlag::S_IFIFO)
}

fn pair(input: Opened, output: Opened, common: &Common) -> Permanent {
    let common = common.clone();
    Permanent::new(move || {
        let channel = Channel::pair(input.fd.try_clone()?, output.fd.try_clone()?)?;
        let sets = (input.from_set.clone(), output.from_set.clone());
        Ok(Connection::plain(channel, &common).with_guard(sets))
    })
}

/// `pipe`: two named pipes, `.in` and `.out`, or one for both directions. Whoever comes and goes at the other end, these stay
/// open.
///
/// # Errors
/// Neither can be opened.
pub(super) async fn pipe(options: &ChardevHostdev, fdsets: &FdSets, common: &Common) -> Result<Permanent> {
    let name = &options.device;
    let input = open(fdsets, &format!("{name}.in"), OFlag::O_RDWR).await;
    let output = open(fdsets, &format!("{name}.out"), OFlag::O_RDWR).await;
    if let (Ok(input), Ok(output)) = (input, output) {
        return Ok(pair(input, output, common));
    }
    let both = open(fdsets, name, OFlag::O_RDWR).await.map_err(could_not_open(name))?;
    let output = both.fd.try_clone().map_err(could_not_open(name))?;
    let output = Opened { fd: output, from_set: None };
    Ok(pair(both, output, common))
}

/// `serial`: a port of the host, at 115200 baud with eight bits.
///
/// # Errors
/// It cannot be opened.
pub(super) async fn serial(options: &ChardevHostdev, fdsets: &FdSets, common: &Common) -> Result<Permanent> {
    let name = &options.device;
    let port = open(fdsets, name, OFlag::O_RDWR).await.map_err(could_not_open(name))?;
    // What is no terminal has no speed.
    if let Ok(mut mode) = tcgetattr(&port.fd) {
        cfmakeraw(&mut mode);
        mode.control_flags.remove(ControlFlags::CSTOPB | ControlFlags::CRTSCTS);
        mode.control_flags.insert(ControlFlags::CLOCAL | ControlFlags::CREAD);
        cfsetspeed(&mut mode, BaudRate::B115200)
            .and_then(|()| tcsetattr(&port.fd, SetArg::TCSANOW, &mode))
            .map_err(|errno| Error::io(format!("Could not set up '{name}'"), errno.into()))?;
    }
    let output = port.fd.try_clone().map_err(could_not_open(name))?;
    let output = Opened { fd: output, from_set: None };
    Ok(pair(port, output, common))
}

/// A parallel port that this process has. Nothing can be sent to it or received from it as a stream of bytes.
pub(super) struct ParallelPort(#[expect(dead_code, reason = "open as long as this lives")] OwnedFd);

/// `parallel`: a port of the host.
///
/// # Errors
/// It is none, or somebody else has it.
pub(super) async fn parallel(options: &ChardevHostdev, fdsets: &FdSets) -> Result<ParallelPort> {
    let name = &options.device;
    let port = open(fdsets, name, OFlag::O_RDWR).await.map_err(could_not_open(name))?;
    ::io::parport::claim(&port.fd).map_err(|error| Error::io("not a parallel port", error))?;
    Ok(ParallelPort(port.fd))
}

/// A symbolic link that goes away with its owner, if it still leads to the same place.
pub(super) struct Link {
    path: PathBuf,
    target: PathBuf,
}

impl Link {
    /// # Errors
    /// There is something already, or the system refuses.
    pub(super) fn new(path: &str, target: &Path) -> io::Result<Link> {
        std::os::unix::fs::symlink(target, path)?;
        Ok(Link { path: path.into(), target: target.to_owned() })
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if std::fs::read_link(&self.path).is_ok_and(|target| target == self.target) {
            // If somebody was faster, it is gone all the same.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}
