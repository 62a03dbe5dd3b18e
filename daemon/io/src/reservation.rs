//! Persistent reservations of a block device through the kernel's own interface. [linux/pr.h]
//!
//! Since Linux 6.5 a descriptor that is open for writing is all that it takes; before, and on a read-only one, the calls
//! fail with `EPERM` (`EOPNOTSUPP`, `ENOTTY` where the device or the kernel has no such thing) and nothing has been done.

use crate::file::File;
use crate::pool;
use ipc::kernel::{self, Change};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

impl File {
    /// Changes reservations. Returns the kernel's status, [`kernel::ended`].
    ///
    /// # Errors
    /// What ioctl(2) says; see the module.
    pub async fn pr_out(&self, change: Change) -> io::Result<i32> {
        let fd = Arc::clone(&self.fd);
        let call = change.call();
        let once = move || {
            // SAFETY: the request reads the structure that `call` has for it, which lives across the call and holds no
            // pointer.
            let code = unsafe { libc::ioctl(fd.raw(), libc::Ioctl::from(call.request), call.argument.as_ptr()) };
            Ok(nix::errno::Errno::result(code)?)
        };
        pool::blocking(move || kernel::past_attentions(once)).await?
    }

    /// The registered keys: the generation, how many there are, and the first of them up to `room`.
    ///
    /// # Errors
    /// What ioctl(2) says: `ENOTTY` of kernels that lack the call.
    pub async fn pr_read_keys(&self, room: u16) -> io::Result<(u32, u32, Vec<u64>)> {
        let fd = Arc::clone(&self.fd);
        let read = move || {
            let mut list = vec![0u64; usize::from(room)];
            let keys = u64::try_from(list.as_mut_ptr().expose_provenance()).map_err(io::Error::other)?;
            let mut found = kernel::ReadKeys { generation: 0, count: u32::from(room), keys };
            // SAFETY: the request takes this structure, which points to `room` keys that the kernel may write; both live
            // until it returns, and it keeps no pointer.
            let code = unsafe { libc::ioctl(fd.raw(), libc::Ioctl::from(kernel::READ_KEYS), &raw mut found) };
            nix::errno::Errno::result(code)?;
            list.truncate(usize::try_from(found.count).unwrap_or(usize::MAX));
            Ok((found.generation, found.count, list))
        };
        pool::blocking(read).await?
    }

    /// The reservation.
    ///
    /// # Errors
    /// What ioctl(2) says: `ENOTTY` of kernels that lack the call.
    pub async fn pr_read_reservation(&self) -> io::Result<kernel::ReadReservation> {
        let fd = Arc::clone(&self.fd);
        let read = move || {
            let mut found = kernel::ReadReservation::default();
            // SAFETY: the request writes this structure and nothing else.
            let code = unsafe { libc::ioctl(fd.raw(), libc::Ioctl::from(kernel::READ_RESERVATION), &raw mut found) };
            nix::errno::Errno::result(code)?;
            Ok(found)
        };
        pool::blocking(read).await?
    }

    /// Another descriptor of the same open file, to be given to another process.
    ///
    /// # Errors
    /// The process has no descriptor left.
    pub fn share(&self) -> io::Result<OwnedFd> {
        self.fd.as_fd().try_clone_to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file::Engine;
    use ipc::scsi::{Key, Kind};
    use nix::errno::Errno;

    #[test]
    fn a_file_has_no_reservations() {
        let file = tempfile::tempfile().unwrap();
        let file = File::from_fd(file.into(), Engine::Threads).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let refused = |e: io::Error| e.raw_os_error() == Some(Errno::ENOTTY as i32);
            let (key, kind) = (Key(1), Kind::WriteExclusive);
            for change in [
                Change::Register { old: Key(0), new: key, ignore: true },
                Change::Reserve { key, kind },
                Change::Release { key, kind },
                Change::Preempt { key, victim: Key(2), kind, abort: true },
                Change::Clear { key },
            ] {
                assert!(file.pr_out(change).await.is_err_and(refused), "{change:?}");
            }
            assert!(file.pr_read_keys(8).await.is_err_and(refused));
            assert!(file.pr_read_reservation().await.is_err_and(refused));
        });
    }
}
