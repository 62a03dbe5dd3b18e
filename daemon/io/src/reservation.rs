//! Persistent reservations of a block device through the kernel's own interface. [linux/pr.h]
//!
//! Since Linux 6.5 a descriptor that is open for writing is all that it takes; before, and on a read-only one, the calls
//! fail with `EPERM` (`EOPNOTSUPP`, `ENOTTY` where the device or the kernel has no such thing) and nothing has been done.

use crate::fd::Fd;
use crate::file::File;
use crate::pool;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

mod calls {
    //! The ioctls by name, and the structures that they take.
    use nix::{ioctl_read, ioctl_readwrite, ioctl_write_ptr};

    /// Old key, new key, flags, padding.
    #[repr(C)]
    pub struct Registration(pub u64, pub u64, pub u32, pub u32);
    /// Key, type, flags.
    #[repr(C)]
    pub struct Reservation(pub u64, pub u32, pub u32);
    /// One's own key (`old_key`), the victim's (`new_key`), type, flags.
    #[repr(C)]
    pub struct Preempt(pub u64, pub u64, pub u32, pub u32);
    /// Key, flags, padding.
    #[repr(C)]
    pub struct Clear(pub u64, pub u32, pub u32);
    /// Generation, number of keys (in: room, out: registered), address of the first.
    #[repr(C)]
    pub struct ReadKeys(pub u32, pub u32, pub u64);
    /// Key, generation, type.
    #[repr(C)]
    pub struct ReadReservation(pub u64, pub u32, pub u32);

    ioctl_write_ptr!(register, b'p', 200, Registration);
    ioctl_write_ptr!(reserve, b'p', 201, Reservation);
    ioctl_write_ptr!(release, b'p', 202, Reservation);
    ioctl_write_ptr!(preempt, b'p', 203, Preempt);
    ioctl_write_ptr!(preempt_abort, b'p', 204, Preempt);
    ioctl_write_ptr!(clear, b'p', 205, Clear);
    ioctl_readwrite!(read_keys, b'p', 206, ReadKeys);
    ioctl_read!(read_reservation, b'p', 207, ReadReservation);
}

/// `PR_FL_IGNORE_KEY`.
const IGNORE_KEY: u32 = 1;

/// A change of reservations, as the kernel takes it. Types are `enum pr_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrOut {
    /// Registers, changes or (`new` is 0) removes a key; with persistence through power loss, always.
    Register {
        /// The present key.
        old: u64,
        /// The key from now on.
        new: u64,
        /// Whatever the present key is.
        ignore: bool,
    },
    /// Takes the reservation.
    Reserve {
        /// One's own key.
        key: u64,
        /// Type.
        kind: u32,
    },
    /// Gives it up.
    Release {
        /// One's own key.
        key: u64,
        /// Type.
        kind: u32,
    },
    /// Removes another key, and takes its reservation.
    Preempt {
        /// One's own key.
        key: u64,
        /// The other.
        victim: u64,
        /// Type.
        kind: u32,
        /// Also abort its commands.
        abort: bool,
    },
    /// Removes everything.
    Clear {
        /// One's own key.
        key: u64,
    },
}

/// What `IOC_PR_READ_RESERVATION` tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrReservation {
    /// Counts the changes of registrations.
    pub generation: u32,
    /// The holder's key.
    pub key: u64,
    /// `enum pr_type`; 0 if there is no reservation.
    pub kind: u32,
}

impl File {
    /// Changes reservations. Returns the kernel's status: 0 for done, else `enum pr_status` or, of kernels before 6.4, the
    /// device's own.
    ///
    /// # Errors
    /// What ioctl(2) says; see the module.
    pub async fn pr_out(&self, change: PrOut) -> io::Result<i32> {
        let fd = Arc::clone(&self.fd);
        Ok(pool::blocking(move || pr_out(&fd, change)).await??)
    }

    /// The registered keys: the generation, how many there are, and the first of them up to `room`.
    ///
    /// # Errors
    /// What ioctl(2) says: `ENOTTY` of kernels that lack the call.
    pub async fn pr_read_keys(&self, room: u16) -> io::Result<(u32, u32, Vec<u64>)> {
        let fd = Arc::clone(&self.fd);
        let read = move || {
            let mut keys = vec![0u64; usize::from(room)];
            let address = u64::try_from(keys.as_mut_ptr().expose_provenance()).map_err(io::Error::other)?;
            let mut argument = calls::ReadKeys(0, u32::from(room), address);
            // SAFETY: the call takes this structure, which points to `room` keys that the kernel may write; both live until
            // it returns, and it keeps no pointer.
            unsafe { calls::read_keys(fd.raw(), &mut argument) }?;
            let calls::ReadKeys(generation, total, _) = argument;
            keys.truncate(usize::try_from(total).unwrap_or(usize::MAX));
            Ok((generation, total, keys))
        };
        pool::blocking(read).await?
    }

    /// The reservation.
    ///
    /// # Errors
    /// What ioctl(2) says: `ENOTTY` of kernels that lack the call.
    pub async fn pr_read_reservation(&self) -> io::Result<PrReservation> {
        let fd = Arc::clone(&self.fd);
        let read = move || {
            let mut argument = calls::ReadReservation(0, 0, 0);
            // SAFETY: the call writes this structure and nothing else.
            unsafe { calls::read_reservation(fd.raw(), &mut argument) }?;
            let calls::ReadReservation(key, generation, kind) = argument;
            Ok(PrReservation { generation, key, kind })
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

fn pr_out(fd: &Fd, change: PrOut) -> nix::Result<i32> {
    let fd = fd.raw();
    match change {
        PrOut::Register { old, new, ignore } => {
            let argument = calls::Registration(old, new, if ignore { IGNORE_KEY } else { 0 }, 0);
            // SAFETY: the call reads this structure, which holds no pointer; the same for those below.
            unsafe { calls::register(fd, &argument) }
        }
        PrOut::Reserve { key, kind } => {
            // SAFETY: see above.
            unsafe { calls::reserve(fd, &calls::Reservation(key, kind, 0)) }
        }
        PrOut::Release { key, kind } => {
            // SAFETY: see above.
            unsafe { calls::release(fd, &calls::Reservation(key, kind, 0)) }
        }
        PrOut::Preempt { key, victim, kind, abort } => {
            let argument = calls::Preempt(key, victim, kind, 0);
            let call = if abort { calls::preempt_abort } else { calls::preempt };
            // SAFETY: see above.
            unsafe { call(fd, &argument) }
        }
        PrOut::Clear { key } => {
            // SAFETY: see above.
            unsafe { calls::clear(fd, &calls::Clear(key, 0, 0)) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file::Engine;
    use nix::errno::Errno;

    #[test]
    fn sizes_are_the_kernels() {
        assert_eq!((size_of::<calls::Registration>(), size_of::<calls::Reservation>()), (24, 16));
        assert_eq!((size_of::<calls::Preempt>(), size_of::<calls::Clear>()), (24, 16));
        assert_eq!((size_of::<calls::ReadKeys>(), size_of::<calls::ReadReservation>()), (16, 16));
    }

    #[test]
    fn a_file_has_no_reservations() {
        let file = tempfile::tempfile().unwrap();
        let file = File::from_fd(file.into(), Engine::Threads).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let refused = |e: io::Error| e.raw_os_error() == Some(Errno::ENOTTY as i32);
            for change in [
                PrOut::Register { old: 0, new: 1, ignore: true },
                PrOut::Reserve { key: 1, kind: 1 },
                PrOut::Release { key: 1, kind: 1 },
                PrOut::Preempt { key: 1, victim: 2, kind: 1, abort: true },
                PrOut::Clear { key: 1 },
            ] {
                assert!(file.pr_out(change).await.is_err_and(refused), "{change:?}");
            }
            assert!(file.pr_read_keys(8).await.is_err_and(refused));
            assert!(file.pr_read_reservation().await.is_err_and(refused));
        });
    }
}
