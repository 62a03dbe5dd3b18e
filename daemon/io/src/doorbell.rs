//! Event descriptors that another process gave: one that it rings, one that it listens to. `[eventfd(2)]`
//!
//! The descriptors are foreign. What is no event counter could keep the thread waiting, so anything that is a file, a device,
//! a pipe or a socket is refused, without being asked anything, and is closed elsewhere. So could a counter that its owner has emptied, or filled, at the right moment; but whether it is
//! blocking belongs to its owner, who may wait in a read of it. So it is read with a call that never waits, and one
//! that could block a write is rung by the kernel, as the signal that a ring of ours has a completion.

use crate::foreign::Foreign;
use crate::polling::note_event;
use crate::{ring, threads};
use io_uring::{IoUring, opcode};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use rustix::fs::{AtFlags, StatxFlags, statx};
use std::cell::RefCell;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Checks that it is an anonymous object of the kernel, as event counters are; says whether it never blocks.
fn check(fd: &Foreign) -> io::Result<bool> {
    // Not by fstat: that may ask the server of a file system, which may be the peer.
    let known = statx(fd, c"", AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE)?;
    if u32::from(known.stx_mode) & libc::S_IFMT != 0 {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the descriptor is no event counter"));
    }
    Ok(OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?).contains(OFlag::O_NONBLOCK))
}

/// What the other side rings. It belongs to the event loop of the thread that made it.
#[derive(Debug)]
pub struct Doorbell(AsyncFd<Foreign>);

impl Doorbell {
    /// Listens to `fd` from now on.
    ///
    /// # Errors
    /// It is no event counter, or no event loop runs here.
    pub fn new(fd: Foreign) -> io::Result<Self> {
        check(&fd)?;
        if tokio::runtime::Handle::try_current().is_err() {
            return Err(io::Error::other("no event loop runs on this thread"));
        }
        // SAFETY: the AsyncFd owns the descriptor, and nothing replaces it.
        Ok(Self(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?))
    }

    /// Ready when it was rung since the last time; any number of rings count as one.
    ///
    /// # Errors
    /// It cannot be read, so it will never ring again.
    pub fn poll_rung(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut ready = ready!(self.0.poll_read_ready(cx))?;
        let result = self.empty();
        // It is empty now, whatever it was; a ring after the read is reported anew.
        ready.clear_ready();
        match result {
            Ok(_) | Err(Errno::EAGAIN | Errno::EINTR) => {
                note_event();
                Poll::Ready(Ok(()))
            }
            Err(errno) => Poll::Ready(Err(errno.into())),
        }
    }

    fn empty(&self) -> Result<libc::ssize_t, Errno> {
        let mut count = 0u64;
        let into = libc::iovec { iov_base: (&raw mut count).cast(), iov_len: size_of::<u64>() };
        let fd = self.0.get_ref().as_raw_fd();
        // SAFETY: the one entry names a variable of ours that is valid for its length.
        match Errno::result(unsafe { libc::preadv2(fd, &into, 1, -1, libc::RWF_NOWAIT) }) {
            // A kernel that cannot promise it (before 5.12).
            Err(Errno::EOPNOTSUPP) => {
                let flags = OFlag::from_bits_retain(fcntl(self.0.get_ref(), FcntlArg::F_GETFL)?);
                fcntl(self.0.get_ref(), FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
                // SAFETY: as above.
                Errno::result(unsafe { libc::readv(fd, &into, 1) })
            }
            other => other,
        }
    }
}

/// What the other side listens to.
#[derive(Debug)]
pub struct Bell(How);

enum How {
    /// It never blocks.
    Write(Foreign),
    /// It might: the kernel signals it for each completion on this ring.
    Signal(Box<RefCell<IoUring>>),
    /// It might, and there is no ring to be had: the peer's own thread rings it, if it is not at it already.
    Thread(Arc<Foreign>, Arc<AtomicBool>),
}

impl fmt::Debug for How {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Write(_) => "Write",
            Self::Signal(_) => "Signal",
            Self::Thread(..) => "Thread",
        })
    }
}

fn write(fd: impl AsFd) {
    // A counter that is full has rung already, and one that takes nothing has nobody who listens.
    let _ = nix::unistd::write(fd, &1u64.to_ne_bytes());
}

impl Bell {
    /// Will ring `fd`.
    ///
    /// # Errors
    /// It is no event counter; no more threads are started, so no ring is made either.
    pub fn new(fd: Foreign) -> io::Result<Self> {
        if check(&fd)? {
            return Ok(Self(How::Write(fd)));
        }
        // On the thread that may make rings; it can do no more than complete at once.
        let (ring, fd) = threads::on_starter(move || {
            let signal = |ring: &IoUring| ring.submitter().register_eventfd(fd.as_raw_fd());
            (ring::limited(&[IoUring::builder()], 2, &[opcode::Nop::CODE], signal), fd)
        })?;
        Ok(Self(match ring {
            Ok(ring) => How::Signal(Box::new(RefCell::new(ring))),
            Err(_) => How::Thread(Arc::new(fd), Arc::default()),
        }))
    }

    /// Rings, and never waits.
    pub fn ring(&self) {
        match &self.0 {
            How::Write(fd) => write(fd),
            How::Signal(ring) => {
                let mut ring = ring.borrow_mut();
                // What completed before makes room.
                ring.completion().for_each(drop);
                // SAFETY: an operation without memory.
                let pushed = unsafe { ring.submission().push(&opcode::Nop::new().build()) };
                // There is room for one, and nothing else that could be done about it.
                if pushed.is_ok() {
                    let _ = ring.submit();
                }
            }
            How::Thread(fd, busy) => {
                if busy.swap(true, Ordering::AcqRel) {
                    return;
                }
                let (counter, busy) = (Arc::clone(fd), Arc::clone(busy));
                let ring = move || {
                    // Whoever rings from here on is heard by a write of his own.
                    busy.store(false, Ordering::Release);
                    write(&*counter);
                };
                match fd.lane() {
                    Some(lane) => lane.execute(ring),
                    None => crate::pool::detach(ring),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};
    use std::os::fd::OwnedFd;

    fn counter(flags: EventfdFlags) -> OwnedFd {
        eventfd(0, flags).unwrap()
    }

    fn count(fd: &OwnedFd) -> u64 {
        let mut raw = [0; 8];
        nix::unistd::read(fd, &mut raw).unwrap();
        u64::from_ne_bytes(raw)
    }

    #[test]
    fn a_counter_rings_whether_it_blocks_or_not() {
        for flags in [EventfdFlags::empty(), EventfdFlags::NONBLOCK] {
            let ours = counter(flags);
            let bell = Bell::new(Foreign::own(ours.try_clone().unwrap())).unwrap();
            for turn in 1..10 {
                for _ in 0..turn {
                    bell.ring();
                }
                assert_eq!(count(&ours), turn);
            }
            assert_eq!(
                OFlag::from_bits_retain(fcntl(&ours, FcntlArg::F_GETFL).unwrap()).contains(OFlag::O_NONBLOCK),
                flags.contains(EventfdFlags::NONBLOCK),
                "it is as its owner made it"
            );
        }
    }

    #[test]
    fn a_counter_that_is_full_keeps_nobody_waiting() {
        let full = counter(EventfdFlags::empty());
        nix::unistd::write(&full, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        let bell = Bell::new(Foreign::own(full.try_clone().unwrap())).unwrap();
        bell.ring();
        bell.ring();
        assert!(count(&full) >= u64::MAX - 1);
    }

    #[test]
    fn a_counter_that_was_emptied_keeps_nobody_waiting() {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
            let ours = counter(EventfdFlags::empty());
            let bell = Doorbell::new(Foreign::own(ours.try_clone().unwrap())).unwrap();
            nix::unistd::write(&ours, &1u64.to_ne_bytes()).unwrap();
            std::future::poll_fn(|cx| bell.poll_rung(cx)).await.unwrap();
            nix::unistd::write(&ours, &3u64.to_ne_bytes()).unwrap();
            std::future::poll_fn(|cx| {
                // Its owner is faster.
                let mut raw = [0; 8];
                if bell.0.poll_read_ready(cx).is_pending() {
                    return Poll::Pending;
                }
                nix::unistd::read(&ours, &mut raw).unwrap();
                bell.poll_rung(cx)
            })
            .await
            .unwrap();
        });
    }

    #[test]
    fn other_descriptors_are_refused() {
        let file = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        assert!(Bell::new(Foreign::own(file)).is_err());
        let (pipe, _writer) = std::io::pipe().unwrap();
        assert!(Bell::new(Foreign::own(pipe.into())).is_err());
    }
}
