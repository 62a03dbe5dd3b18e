//! Descriptors that clients sent, and who closes them.
//!
//! Closing can hang: a file of a client's own FUSE file system is flushed by a request to the client, a hung disk is
//! synced when its last user goes. So the thread of the sockets never closes what it was sent. What reaches a worker is
//! closed by it; everything else goes to a thread that does nothing else. How many one process may have unclosed is
//! limited where they are received.

use ipc::fds::Passed;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{Receiver, Sender};
use tokio::sync::OwnedSemaphorePermit;

/// A descriptor with what it takes from its sender's share until it is closed.
pub type Closing = (Vec<OwnedFd>, OwnedSemaphorePermit);

/// Where a request's descriptors arrive; they go to the closing thread unless a worker takes them.
#[derive(Debug)]
pub struct Arrival {
    /// What came so far.
    pub passed: Passed,
    permit: Option<OwnedSemaphorePermit>,
    closer: Sender<Closing>,
}

/// The one descriptor of a request.
#[derive(Debug)]
pub struct Foreign {
    fd: Option<OwnedFd>,
    permit: Option<OwnedSemaphorePermit>,
    closer: Sender<Closing>,
}

/// Closes until nobody can send any more.
pub fn close_all(from: Receiver<Closing>) {
    from.into_iter().for_each(drop);
}

impl Arrival {
    /// Nothing came yet.
    pub fn new(permit: OwnedSemaphorePermit, closer: Sender<Closing>) -> Self {
        Self { passed: Passed::default(), permit: Some(permit), closer }
    }

    /// The one that came, if it is one.
    pub fn take_one(mut self) -> Option<Foreign> {
        let fd = self.passed.take_one()?;
        Some(Foreign { fd: Some(fd), permit: self.permit.take(), closer: self.closer.clone() })
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        let fds = self.passed.take_all();
        if let (false, Some(permit)) = (fds.is_empty(), self.permit.take()) {
            // It fails only at the end of the process, which closes everything.
            let _ = self.closer.send((fds, permit));
        }
    }
}

impl Foreign {
    /// The descriptor; always there until [`Foreign::close_here`].
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.fd.as_ref().map(AsFd::as_fd)
    }

    /// Closes it on this thread.
    pub fn close_here(mut self) {
        drop(self.fd.take());
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        if let (Some(fd), Some(permit)) = (self.fd.take(), self.permit.take()) {
            let _ = self.closer.send((vec![fd], permit));
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::sync::Arc;
    use tokio::sync::Semaphore;

    /// A descriptor as a request brings it, with the other end of its closer.
    pub fn foreign(fd: OwnedFd) -> (Foreign, Receiver<Closing>, Arc<Semaphore>) {
        let (closer, closing) = std::sync::mpsc::channel();
        let share = Arc::new(Semaphore::new(1));
        let permit = share.clone().try_acquire_owned().ok();
        (Foreign { fd: Some(fd), permit, closer }, closing, share)
    }

    #[test]
    fn dropping_hands_it_on_with_its_permit() {
        let file = || tempfile::tempfile().unwrap().into();
        let (fd, closing, share) = foreign(file());
        drop(fd);
        assert_eq!(share.available_permits(), 0);
        close_all(closing);
        assert_eq!(share.available_permits(), 1);
        let (fd, closing, share) = foreign(file());
        fd.close_here();
        assert_eq!((closing.recv().is_err(), share.available_permits()), (true, 1));
    }
}
