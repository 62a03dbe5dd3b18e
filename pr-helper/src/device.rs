//! What a descriptor is, and which way a command to it goes.
//!
//! The descriptor's file type and open mode are checked where the request arrives; the worker thread that has the
//! device executes. A descriptor that is no device gets the answer that the ioctl would have given, without the ioctl.

use crate::foreign::Foreign;
use crate::{kernel_pr, scsi_device};
use ipc::classic::Reply;
use ipc::scsi::{Cdb, Sense};
use rustix::fs::{AtFlags, FileType, OFlags, Statx, StatxFlags, fcntl_getfl, statx};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// A device number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Number {
    /// Which driver.
    pub major: u32,
    /// Which device of it.
    pub minor: u32,
}

impl std::fmt::Display for Number {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// Character devices that take SG_IO: sg, st, ch. `[linux/Documentation/admin-guide/devices.txt]`.
const SCSI_CHARACTER_MAJORS: [u32; 3] = [21, 9, 86];

/// A device that a client sent.
#[derive(Debug)]
pub struct Device {
    fd: Foreign,
    number: Number,
    block: bool,
}

impl Device {
    /// Looks at a descriptor; the error is the answer to the client.
    ///
    /// PERSISTENT RESERVE OUT needs a descriptor open for writing, whatever it is of: who may not write a disk may not
    /// reserve it. The operation is then not valid for the client, hence INVALID COMMAND OPERATION CODE.
    pub fn new(fd: Foreign, cdb: &Cdb) -> Result<Self, Box<Reply>> {
        let terminated = || Box::new(Reply::check(Sense::IO_PROCESS_TERMINATED));
        let mode = fd.fd().and_then(|fd| fcntl_getfl(fd).ok()).ok_or_else(terminated)?;
        let writable = !mode.contains(OFlags::PATH) && mode.intersects(OFlags::WRONLY | OFlags::RDWR);
        if cdb.is_out() && !writable {
            return Err(Box::new(Reply::check(Sense::INVALID_OPCODE)));
        }
        let stat = fd.fd().and_then(|fd| kind(fd).ok()).ok_or_else(terminated)?;
        let number = Number { major: stat.stx_rdev_major, minor: stat.stx_rdev_minor };
        let block = match FileType::from_raw_mode(stat.stx_mode.into()) {
            FileType::BlockDevice if !mode.contains(OFlags::PATH) => true,
            FileType::CharacterDevice if SCSI_CHARACTER_MAJORS.contains(&number.major) => false,
            _ => return Err(terminated()),
        };
        Ok(Self { fd, number, block })
    }

    /// Its number.
    pub fn number(&self) -> Number {
        self.number
    }

    /// Closes the descriptor on this thread.
    pub fn close_here(self) {
        self.fd.close_here();
    }

    /// A stand-in for tests that never reach a device.
    #[cfg(test)]
    pub fn of_number(number: Number) -> Self {
        let (fd, _, _) = crate::foreign::tests::foreign(File::open("/dev/null").unwrap().into());
        Self { fd, number, block: true }
    }
}

/// What kind of file it is, and its device number.
///
/// Not by fstat: that may ask the server of a network or FUSE file system, which may be the client.
fn kind(fd: BorrowedFd<'_>) -> rustix::io::Result<Statx> {
    statx(fd, c"", AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE)
}

/// Executes commands on devices; one for all worker threads.
#[derive(Debug)]
pub struct Executor {
    /// /proc/devices: the device mapper's major number is known only once its module is loaded.
    majors: File,
    timeout: Duration,
}

impl Executor {
    /// Opens what it needs; `timeout` is how long the kernel lets a command run before it aborts it.
    pub fn new(timeout: Duration) -> io::Result<Self> {
        let majors = File::open("/proc/devices")?;
        // The first call of a process finds out whether there is statx, with one that the sandbox would refuse.
        kind(majors.as_fd())?;
        Ok(Self { majors, timeout })
    }

    /// Executes a command, however long it takes.
    pub fn execute(&self, device: &Device, cdb: &Cdb, parameters: &[u8]) -> Reply {
        if cdb.action().is_none() {
            return Reply::check(Sense::INVALID_FIELD_IN_CDB);
        }
        let Some(fd) = device.fd.fd() else { return Reply::check(Sense::IO_PROCESS_TERMINATED) };
        if device.block && cdb.is_out() && self.is_device_mapper(device.number.major) {
            return kernel_pr::reserve_out(fd, None, cdb, parameters, self.timeout);
        }
        let error = match scsi_device::execute(fd, cdb, parameters, self.timeout) {
            Ok(reply) => return reply,
            Err(error) => error,
        };
        // Not SCSI. NVMe says so with either; that it is NVMe, it says itself.
        if device.block
            && matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL))
            && let Ok(namespace) = crate::sg_io::nvme_namespace(fd)
        {
            return if cdb.is_out() {
                kernel_pr::reserve_out(fd, Some(namespace), cdb, parameters, self.timeout)
            } else {
                kernel_pr::reserve_in(fd, namespace, cdb, self.timeout)
            };
        }
        scsi_device::ioctl_error(&error)
    }

    fn is_device_mapper(&self, major: u32) -> bool {
        // SCSI disks and "blkext" (NVMe), the majors that nearly every request is for.
        if matches!(major, 8 | 65..=71 | 128..=135 | 259) {
            return false;
        }
        let mut text = vec![0; 8192];
        let length = self.majors.read_at(&mut text, 0).unwrap_or(0);
        text.truncate(length);
        device_mapper_major(&String::from_utf8_lossy(&text)) == Some(major)
    }
}

/// The device mapper's block major number in /proc/devices.
fn device_mapper_major(devices: &str) -> Option<u32> {
    let (_, block) = devices.split_once("Block devices:")?;
    block.lines().find_map(|line| line.trim().strip_suffix(" device-mapper")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::foreign::tests::foreign;
    use ipc::scsi::Action;
    use std::fs::OpenOptions;
    use std::os::fd::OwnedFd;

    #[test]
    fn majors() {
        let text = "Character devices:\n  1 mem\n 21 sg\n\nBlock devices:\n  8 sd\n253 device-mapper\n259 blkext\n";
        assert_eq!(device_mapper_major(text), Some(253));
        assert_eq!(device_mapper_major("Block devices:\n  8 sd\n"), None);
        assert_eq!(device_mapper_major(""), None);
    }

    #[test]
    fn what_is_no_device_gets_the_answer_of_the_ioctl() {
        let read = Cdb::build(Action::ReadKeys, 0, 64);
        let write = Cdb::build(Action::Register, 0, 24);
        let refused = |fd: OwnedFd, cdb| *Device::new(foreign(fd).0, cdb).map(|d| d.number()).unwrap_err();
        let null = || OpenOptions::new().read(true).write(true).open("/dev/null").unwrap();
        assert_eq!(refused(null().into(), &read), Reply::check(Sense::IO_PROCESS_TERMINATED));
        assert_eq!(refused(null().into(), &write), Reply::check(Sense::IO_PROCESS_TERMINATED));
        assert_eq!(refused(File::open("/dev/null").unwrap().into(), &write), Reply::check(Sense::INVALID_OPCODE));
        assert_eq!(refused(tempfile::tempfile().unwrap().into(), &read), Reply::check(Sense::IO_PROCESS_TERMINATED));
        assert_eq!(refused(File::open("/").unwrap().into(), &read), Reply::check(Sense::IO_PROCESS_TERMINATED));
        let (reader, writer) = io::pipe().unwrap();
        assert_eq!(refused(reader.into(), &write), Reply::check(Sense::INVALID_OPCODE));
        assert_eq!(refused(writer.into(), &write), Reply::check(Sense::IO_PROCESS_TERMINATED));
    }
}
