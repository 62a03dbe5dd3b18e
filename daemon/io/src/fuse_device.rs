//! [`FuseDevice`]: requests of the kernel from `/dev/fuse`, and replies to it. `[Linux include/uapi/linux/fuse.h]`
//!
//! One read takes one whole request, one write gives one whole reply; the kernel knows no batches here. A device belongs to
//! the event loop of the thread that made it. Several threads share a mount by clones of its device, each of which gets
//! the replies of the requests that were read from it. What is in the bytes is nothing that this module knows.

use crate::polling::note_event;
use buf::IoBuf;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::task::{Context, Poll};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// The numbers of `/dev/fuse`. `[Linux admin-guide/devices.txt]`
const MAJOR: u32 = 10;
const MINOR: u32 = 229;
/// Ties a new descriptor to the mount of another one: `_IOR(229, 0, uint32_t)`.
const CLONE: libc::Ioctl = 0x8004_e500;
/// Pieces of one reply: as many as writev(2) takes.
const MAX_PIECES: usize = 1024;

/// One descriptor of a mount.
#[derive(Debug)]
pub struct FuseDevice {
    fd: AsyncFd<OwnedFd>,
}

impl FuseDevice {
    /// Takes a mounted device into the event loop of the calling thread, and makes it non-blocking.
    ///
    /// # Errors
    /// The descriptor cannot be polled, or no event loop runs here.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        if tokio::runtime::Handle::try_current().is_err() {
            return Err(io::Error::other("no event loop runs on this thread"));
        }
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        // SAFETY: the AsyncFd owns the descriptor, and nothing replaces it.
        Ok(Self { fd: unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }? })
    }

    /// Another descriptor for the mount of `fd`, for another thread. Opens `/dev/fuse`, so it can block.
    ///
    /// # Errors
    /// `/dev/fuse` cannot be opened, or the kernel is older than Linux 4.2.
    pub fn clone_of(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
        let new: OwnedFd =
            OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC).open("/dev/fuse")?.into();
        let number = fd.as_raw_fd();
        // SAFETY: the call reads the number of a descriptor from the address, which is that of a local variable.
        Errno::result(unsafe { libc::ioctl(new.as_raw_fd(), CLONE, &raw const number) })?;
        Ok(new)
    }

    /// Takes a device that the process was started with, by its number. It belongs to the caller from now on.
    ///
    /// # Errors
    /// It is none, or none that was passed.
    pub fn passed(number: RawFd) -> io::Result<OwnedFd> {
        let refused = |text: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, text.to_owned()));
        if number < 0 {
            return refused("it is negative");
        }
        // SAFETY: only looked at; whether it is open is what the calls find out.
        let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
        // All descriptors that the process itself opens are closed on exec: this one was passed, and nobody here has it.
        let flags = FdFlag::from_bits_retain(fcntl(borrowed, FcntlArg::F_GETFD)?);
        let found = nix::sys::stat::fstat(borrowed)?;
        if found.st_mode & libc::S_IFMT != libc::S_IFCHR || found.st_rdev != libc::makedev(MAJOR, MINOR) {
            return refused("it is not /dev/fuse");
        }
        if flags.contains(FdFlag::FD_CLOEXEC) {
            return refused("it was not passed to this process, or is in use already");
        }
        fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
        // SAFETY: it is open, and was passed to this process for this use, see above. From now on it does not look like that
        // any more, so that nobody takes it twice.
        Ok(unsafe { OwnedFd::from_raw_fd(number) })
    }

    /// Tells the kernel of the mount of `fd` something that it did not ask for. Never waits.
    ///
    /// # Errors
    /// The kernel refuses it, or has nothing that it is about; or the mount has ended.
    pub fn notify(fd: BorrowedFd<'_>, message: &[u8]) -> Result<(), Errno> {
        nix::unistd::write(fd, message).map(drop)
    }

    /// Reads one request into the buffers, one after the other, and says how many bytes it has.
    ///
    /// # Errors
    /// `ENOENT` if a request was withdrawn while it was read, after which there may be others. `ENODEV` after the file
    /// system was unmounted, `ECONNABORTED` after the connection was ended in another way.
    pub fn poll_receive(&self, cx: &mut Context<'_>, bufs: &[&IoBuf]) -> Poll<Result<usize, Errno>> {
        loop {
            // The end of a mount is no readiness to read but an error, which shows as the other direction being closed.
            let mut guard = match self.fd.poll_read_ready(cx) {
                Poll::Ready(Ok(guard)) => Some(guard),
                Poll::Ready(Err(_)) => return Poll::Ready(Err(Errno::ENODEV)),
                Poll::Pending if self.fd.poll_write_ready(cx).is_ready() => None,
                Poll::Pending => return Poll::Pending,
            };
            match self.receive(bufs) {
                Err(Errno::EAGAIN) => match &mut guard {
                    Some(guard) => guard.clear_ready(),
                    None => return Poll::Ready(Err(Errno::ENODEV)),
                },
                Err(Errno::EINTR) => {}
                other => return Poll::Ready(other),
            }
        }
    }

    /// As [`poll_receive`](Self::poll_receive) without waiting.
    ///
    /// # Errors
    /// `EAGAIN` if there is no request; else as there.
    pub fn receive(&self, bufs: &[&IoBuf]) -> Result<usize, Errno> {
        let mut iov = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; 8];
        let mut count = 0;
        for (place, segment) in iov.iter_mut().zip(bufs.iter().flat_map(|buf| buf.segments())) {
            *place = libc::iovec { iov_base: segment.ptr.as_ptr().cast(), iov_len: segment.len };
            count += 1;
        }
        // SAFETY: the first `count` entries name memory that `bufs` keep valid.
        let result = unsafe { libc::readv(self.fd.as_raw_fd(), iov.as_ptr(), count) };
        let received = usize::try_from(result).map_err(|_| Errno::last())?;
        note_event();
        Ok(received)
    }

    /// Gives the kernel one reply: `head`, and the bytes of `data` after it. Never waits.
    ///
    /// # Errors
    /// `ENOENT` if nobody waits for it any more; else it was refused as malformed, or the mount has ended.
    pub fn reply(&self, head: &[u8], data: Option<&IoBuf>) -> Result<(), Errno> {
        let first = libc::iovec { iov_base: head.as_ptr().cast_mut().cast(), iov_len: head.len() };
        let segments = data.into_iter().flat_map(|buf| buf.segments());
        let rest = segments.map(|s| libc::iovec { iov_base: s.ptr.as_ptr().cast(), iov_len: s.len });
        let mut few = [first; 4];
        let mut many = Vec::new();
        let mut count = 1;
        for piece in rest {
            match few.get_mut(count) {
                Some(place) if many.is_empty() => *place = piece,
                _ => {
                    if many.is_empty() {
                        many.extend_from_slice(&few);
                    }
                    many.push(piece);
                }
            }
            count += 1;
        }
        if count > MAX_PIECES {
            return Err(Errno::EINVAL);
        }
        let pieces = if many.is_empty() { few.as_ptr() } else { many.as_ptr() };
        let count = libc::c_int::try_from(count).map_err(|_| Errno::EINVAL)?;
        loop {
            // SAFETY: the first `count` entries name memory of `head` and `data`, which is only read. It may change
            // meanwhile, as all I/O buffers may.
            let result = unsafe { libc::writev(self.fd.as_raw_fd(), pieces, count) };
            match Errno::result(result) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn only_a_device_that_was_passed_is_taken() {
        let file = tempfile::tempfile().unwrap();
        assert!(FuseDevice::passed(file.as_raw_fd()).is_err());
        assert!(FuseDevice::passed(-1).is_err());
        assert!(FuseDevice::passed(1 << 20).is_err());
        if let Ok(device) = OpenOptions::new().read(true).write(true).open("/dev/fuse") {
            let error = FuseDevice::passed(device.as_raw_fd()).unwrap_err();
            assert!(error.to_string().contains("was not passed"), "{error}");
            assert!(FuseDevice::clone_of(device.as_fd()).is_err(), "nothing is mounted");
        }
    }
}
