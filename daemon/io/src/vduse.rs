//! [`VduseControl`], [`VduseDevice`]: virtio devices of the kernel's vDPA bus that a process serves. `[linux/vduse.h]`
//!
//! The structures of the interface are put together and taken apart byte by byte here, in one place each. Calls never wait for
//! anybody but the kernel. A device belongs to the event loop of the thread that made it, as far as its messages go;
//! all other calls can be made on any thread. What the messages mean is nothing that this module knows.

use crate::polling::note_event;
use nix::errno::Errno;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::task::{Context, Poll, ready};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Where devices are made.
const CONTROL: &str = "/dev/vduse/control";
/// The folder of the devices.
const FOLDER: &str = "/dev/vduse";
/// The version of the interface that this module speaks. `VDUSE_API_VERSION`
const API_VERSION: u64 = 0;
/// Bytes for the name of a device, with a zero at the end.
const NAME_MAX: usize = 256;
/// Bytes of a message in either direction.
pub const VDUSE_MESSAGE: usize = 152;

/// The direction and size of an ioctl's argument. `[asm-generic/ioctl.h]`
const fn request(direction: libc::Ioctl, number: libc::Ioctl, size: libc::Ioctl) -> libc::Ioctl {
    direction << 30 | size << 16 | 0x81 << 8 | number
}

const WRITE: libc::Ioctl = 1;
const READ: libc::Ioctl = 2;

const SET_API_VERSION: libc::Ioctl = request(WRITE, 0x01, 8);
const CREATE_DEV: libc::Ioctl = request(WRITE, 0x02, 336);
const DESTROY_DEV: libc::Ioctl = request(WRITE, 0x03, 256);
const IOTLB_GET_FD: libc::Ioctl = request(READ | WRITE, 0x10, 32);
const DEV_GET_FEATURES: libc::Ioctl = request(READ, 0x11, 8);
const DEV_SET_CONFIG: libc::Ioctl = request(WRITE, 0x12, 8);
const DEV_INJECT_CONFIG_IRQ: libc::Ioctl = request(0, 0x13, 0);
const VQ_SETUP: libc::Ioctl = request(WRITE, 0x14, 32);
const VQ_GET_INFO: libc::Ioctl = request(READ | WRITE, 0x15, 48);
const VQ_SETUP_KICKFD: libc::Ioctl = request(WRITE, 0x16, 8);
const VQ_INJECT_IRQ: libc::Ioctl = request(WRITE, 0x17, 4);

/// Sends the ioctl with `arg` as its argument, which the kernel may change; returns what the kernel returns.
fn call(fd: BorrowedFd<'_>, request: libc::Ioctl, arg: &mut [u8]) -> io::Result<libc::c_int> {
    let size = usize::try_from(request >> 16 & 0x3fff).unwrap_or(usize::MAX);
    if arg.len() < size {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // SAFETY: the kernel reads and writes as many bytes as the number of the request says, which are there, and reads as many more
    // as a length in them says, which each caller has put there for its own bytes.
    Ok(Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), request, arg.as_mut_ptr()) })?)
}

fn named(name: &str) -> io::Result<[u8; NAME_MAX]> {
    let mut bytes = [0; NAME_MAX];
    match bytes.get_mut(..name.len()) {
        Some(place) if name.len() < NAME_MAX => place.copy_from_slice(name.as_bytes()),
        _ => return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG)),
    }
    Ok(bytes)
}

/// The kernel's register of devices.
#[derive(Debug)]
pub struct VduseControl(OwnedFd);

/// A device to be made.
#[derive(Clone, Debug)]
pub struct VduseNew<'a> {
    /// 255 bytes at most.
    pub name: &'a str,
    /// The kind of device. `[virtio 1.2 §5]`
    pub device: u32,
    /// What it can do.
    pub features: u64,
    /// Its virtqueues.
    pub queues: u16,
    /// Its configuration space, a page at most.
    pub config: &'a [u8],
}

impl VduseControl {
    /// Opens the register. Can block.
    ///
    /// # Errors
    /// The kernel has none, or one with another interface; or this process may not use it.
    pub fn open() -> io::Result<Self> {
        let fd = OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC).open(CONTROL)?;
        let this = Self(fd.into());
        call(this.0.as_fd(), SET_API_VERSION, &mut API_VERSION.to_ne_bytes())?;
        Ok(this)
    }

    /// Makes a device. Can block.
    ///
    /// # Errors
    /// `EEXIST` if there is one of that name.
    pub fn create(&self, new: &VduseNew<'_>) -> io::Result<()> {
        // SAFETY: sysconf takes a number.
        let page = u32::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096);
        let size = u32::try_from(new.config.len()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
        let mut arg = named(new.name)?.to_vec();
        arg.extend_from_slice(&0u32.to_ne_bytes());
        arg.extend_from_slice(&new.device.to_ne_bytes());
        arg.extend_from_slice(&new.features.to_ne_bytes());
        arg.extend_from_slice(&u32::from(new.queues).to_ne_bytes());
        arg.extend_from_slice(&page.to_ne_bytes());
        arg.extend_from_slice(&[0; 4 * 13]);
        arg.extend_from_slice(&size.to_ne_bytes());
        arg.extend_from_slice(new.config);
        call(self.0.as_fd(), CREATE_DEV, &mut arg).map(drop)
    }

    /// Removes a device that nobody has open, and that is not on the vDPA bus. Can block.
    ///
    /// # Errors
    /// `EBUSY` if that is not so.
    pub fn destroy(&self, name: &str) -> io::Result<()> {
        call(self.0.as_fd(), DESTROY_DEV, &mut named(name)?).map(drop)
    }
}

/// Whether a device of that name is on the vDPA bus. Looks at a file of the kernel's.
pub fn vduse_is_attached(name: &str) -> bool {
    Path::new("/sys/bus/vdpa/devices").join(name).exists()
}

/// A queue as the driver has set it up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VduseQueue {
    /// Entries.
    pub size: u32,
    /// Addresses of descriptors, available ring and used ring, as the device sees memory.
    pub descriptors: u64,
    /// See above.
    pub available: u64,
    /// See above.
    pub used: u64,
    /// The next entry of the available ring, when the driver made the queue ready.
    pub base: u16,
    /// Whether the driver has done so.
    pub ready: bool,
}

/// A run of the device's address space, and the file behind it.
#[derive(Debug)]
pub struct VduseRegion {
    /// First and last address.
    pub start: u64,
    /// See above.
    pub last: u64,
    /// Where it starts in the file.
    pub offset: u64,
    /// Whether the device may write there.
    pub writable: bool,
    /// The file.
    pub fd: OwnedFd,
}

/// A device that this process serves.
#[derive(Debug)]
pub struct VduseDevice(AsyncFd<OwnedFd>);

fn word<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
}

impl VduseDevice {
    /// Opens a device. Can block.
    ///
    /// # Errors
    /// There is none, somebody else serves it (`EBUSY`), or this process may not.
    pub fn open(name: &str) -> io::Result<OwnedFd> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        let path = Path::new(FOLDER).join(name);
        Ok(OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)?.into())
    }

    /// Takes a device that was opened into the event loop of the calling thread.
    ///
    /// # Errors
    /// It cannot be polled, or no event loop runs here.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        if tokio::runtime::Handle::try_current().is_err() {
            return Err(io::Error::other("no event loop runs on this thread"));
        }
        // SAFETY: the AsyncFd owns the descriptor, and nothing replaces it.
        Ok(Self(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?))
    }

    fn call(&self, request: libc::Ioctl, arg: &mut [u8]) -> io::Result<libc::c_int> {
        call(self.0.get_ref().as_fd(), request, arg)
    }

    /// What the driver agreed to.
    ///
    /// # Errors
    /// `EPERM`, as of all calls, if the kernel has given the device up because a message was not answered in time.
    pub fn features(&self) -> io::Result<u64> {
        let mut arg = [0; 8];
        self.call(DEV_GET_FEATURES, &mut arg)?;
        Ok(u64::from_ne_bytes(arg))
    }

    /// Changes bytes of the configuration space.
    ///
    /// # Errors
    /// They are not within it.
    pub fn set_config(&self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        let len = u32::try_from(bytes.len()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
        let mut arg = offset.to_ne_bytes().to_vec();
        arg.extend_from_slice(&len.to_ne_bytes());
        arg.extend_from_slice(bytes);
        self.call(DEV_SET_CONFIG, &mut arg).map(drop)
    }

    /// Tells the driver that the configuration changed.
    ///
    /// # Errors
    /// There is no driver.
    pub fn interrupt_config(&self) -> io::Result<()> {
        self.call(DEV_INJECT_CONFIG_IRQ, &mut []).map(drop)
    }

    /// Sets the most entries that a queue can have.
    ///
    /// # Errors
    /// There is no such queue.
    pub fn set_queue_max(&self, index: u16, size: u16) -> io::Result<()> {
        let mut arg = [0; 32];
        if let Some((at, rest)) = arg.split_first_chunk_mut::<4>() {
            *at = u32::from(index).to_ne_bytes();
            if let Some((at, _)) = rest.split_first_chunk_mut::<2>() {
                *at = size.to_ne_bytes();
            }
        }
        self.call(VQ_SETUP, &mut arg).map(drop)
    }

    /// What the driver made of a queue.
    ///
    /// # Errors
    /// There is no such queue.
    pub fn queue(&self, index: u16) -> io::Result<VduseQueue> {
        let mut arg = [0; 48];
        if let Some((at, _)) = arg.split_first_chunk_mut::<4>() {
            *at = u32::from(index).to_ne_bytes();
        }
        self.call(VQ_GET_INFO, &mut arg)?;
        Ok(VduseQueue {
            size: u32::from_ne_bytes(word(&arg, 4)),
            descriptors: u64::from_ne_bytes(word(&arg, 8)),
            available: u64::from_ne_bytes(word(&arg, 16)),
            used: u64::from_ne_bytes(word(&arg, 24)),
            base: u16::from_ne_bytes(word(&arg, 32)),
            ready: word::<1>(&arg, 40) != [0],
        })
    }

    /// Has the driver's kicks of a queue ring an event counter.
    ///
    /// # Errors
    /// There is no such queue, or the descriptor is no event counter.
    pub fn set_kick(&self, index: u16, fd: BorrowedFd<'_>) -> io::Result<()> {
        let mut arg = [0; 8];
        if let Some((first, rest)) = arg.split_first_chunk_mut::<4>() {
            *first = u32::from(index).to_ne_bytes();
            rest.copy_from_slice(&fd.as_raw_fd().to_ne_bytes());
        }
        self.call(VQ_SETUP_KICKFD, &mut arg).map(drop)
    }

    /// Tells the driver that requests of a queue are done.
    ///
    /// # Errors
    /// The driver does not use the queue.
    pub fn interrupt(&self, index: u16) -> io::Result<()> {
        self.call(VQ_INJECT_IRQ, &mut u32::from(index).to_ne_bytes()).map(drop)
    }

    /// The first run of memory that has bytes at `start` or behind.
    ///
    /// # Errors
    /// The kernel has no descriptor to give, or has given the device up.
    pub fn region(&self, start: u64) -> io::Result<Option<VduseRegion>> {
        let mut arg = [0; 32];
        let (at, last) = (start.to_ne_bytes(), u64::MAX.to_ne_bytes());
        for (place, byte) in arg.iter_mut().zip([0; 8].iter().chain(&at).chain(&last)) {
            *place = *byte;
        }
        let fd = match self.call(IOTLB_GET_FD, &mut arg) {
            Ok(fd) => fd,
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(None),
            Err(error) => return Err(error),
        };
        // SAFETY: the kernel has just made it for this call, and nobody else knows of it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let [access] = word::<1>(&arg, 24);
        Ok(Some(VduseRegion {
            offset: u64::from_ne_bytes(word(&arg, 0)),
            start: u64::from_ne_bytes(word(&arg, 8)),
            last: u64::from_ne_bytes(word(&arg, 16)),
            writable: access & 2 != 0,
            fd,
        }))
    }

    /// The next message of the kernel.
    ///
    /// # Errors
    /// It cannot be read, so there will be none any more.
    pub fn poll_message(&self, cx: &mut Context<'_>) -> Poll<io::Result<[u8; VDUSE_MESSAGE]>> {
        let mut message = [0; VDUSE_MESSAGE];
        loop {
            let mut guard = ready!(self.0.poll_read_ready(cx))?;
            match nix::unistd::read(self.0.get_ref(), &mut message) {
                Ok(VDUSE_MESSAGE) => {
                    note_event();
                    return Poll::Ready(Ok(message));
                }
                Ok(_) => return Poll::Ready(Err(io::Error::other("a message that is cut off"))),
                Err(Errno::EAGAIN) => guard.clear_ready(),
                Err(Errno::EINTR) => {}
                Err(errno) => return Poll::Ready(Err(errno.into())),
            }
        }
    }

    /// Answers a message.
    ///
    /// # Errors
    /// `ENOENT` if nobody waits for it any more.
    pub fn reply(&self, reply: &[u8; VDUSE_MESSAGE]) -> io::Result<()> {
        loop {
            match nix::unistd::write(self.0.get_ref(), reply) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_header() {
        // As a C compiler has them with linux/vduse.h of 6.12.
        assert_eq!(SET_API_VERSION, 0x4008_8101);
        assert_eq!(CREATE_DEV, 0x4150_8102);
        assert_eq!(DESTROY_DEV, 0x4100_8103);
        assert_eq!(IOTLB_GET_FD, 0xc020_8110);
        assert_eq!(DEV_GET_FEATURES, 0x8008_8111);
        assert_eq!(DEV_SET_CONFIG, 0x4008_8112);
        assert_eq!(DEV_INJECT_CONFIG_IRQ, 0x8113);
        assert_eq!(VQ_SETUP, 0x4020_8114);
        assert_eq!(VQ_GET_INFO, 0xc030_8115);
        assert_eq!(VQ_SETUP_KICKFD, 0x4008_8116);
        assert_eq!(VQ_INJECT_IRQ, 0x4004_8117);
    }

    #[test]
    fn arguments_that_are_too_short_are_not_sent() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(call(file.as_fd(), CREATE_DEV, &mut [0; 8]).unwrap_err().raw_os_error(), Some(libc::EINVAL));
        assert_eq!(call(file.as_fd(), DEV_GET_FEATURES, &mut [0; 8]).unwrap_err().raw_os_error(), Some(libc::ENOTTY));
    }

    #[test]
    fn a_name_has_room_for_its_end() {
        assert!(named(&"a".repeat(255)).is_ok());
        assert!(named(&"a".repeat(256)).is_err());
    }
}
