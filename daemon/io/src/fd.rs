//! A counted file descriptor that is never closed in an event loop.

use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

/// An open file. Operations hold clones of an `Arc` of it, so that it stays open until the last one completed.
///
/// Closing can wait for the disk (delayed writes of a network file system), so the last owner hands it to the pool.
pub(crate) struct Fd(ManuallyDrop<OwnedFd>);

impl Fd {
    pub(crate) fn new(fd: OwnedFd) -> Self {
        Self(ManuallyDrop::new(fd))
    }

    pub(crate) fn raw(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl AsFd for Fd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Drop for Fd {
    fn drop(&mut self) {
        // SAFETY: taken once, here, and not used afterwards.
        let fd = unsafe { ManuallyDrop::take(&mut self.0) };
        if tokio::runtime::Handle::try_current().is_ok() {
            crate::pool::detach(move || drop(fd));
        }
    }
}
