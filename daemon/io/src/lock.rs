//! Image locks: the bytes by which QEMU's programs, and this one, keep out of each other's way.
//!
//! Byte `100 + i` of the image file is locked, shared, by whoever holds permission `i`; byte `200 + i` by whoever does not share
//! permission `i` with others. To take a permission is to find nobody on its byte of the second kind; to cease sharing one is
//! to find nobody on its byte of the first kind. All locks are read locks, so they need no writable descriptor and programs
//! only look at each other's. They belong to the open file description (OFD locks), not to the process.
//!
//! A change has two phases: [`ImageLock::prepare`] adds the new set to the old one and looks for others, and
//! [`ImageLock::settle`] gives up what is not wanted in the end.

use crate::fd::Fd;
use crate::file::File;
use crate::pool;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use std::fmt;
use std::sync::Arc;

/// First byte of those that say that a permission is held.
const HELD: i64 = 100;
/// First byte of those that say that a permission is not shared.
const UNSHARED: i64 = 200;
/// The permissions by bit, as messages name them.
const NAMES: [(u8, &str); 4] = [(1, "consistent read"), (2, "write"), (4, "write unchanged"), (8, "resize")];

/// The user's choice (`locking`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Locking {
    /// Lock if the file system and the kernel have OFD locks.
    #[default]
    Auto,
    /// Lock, with the weaker locks of the process where there are no OFD locks.
    On,
    /// Do not lock.
    Off,
}

/// Kind of lock in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockMode {
    /// Locks of the open file description.
    Ofd,
    /// Locks of the process: lost as soon as it closes any descriptor of the file.
    Posix,
}

/// Which permissions are announced to others. Bits: 1 consistent read, 2 write, 4 write unchanged, 8 resize.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LockSet {
    /// Permissions that are held.
    pub held: u8,
    /// Permissions that are not shared.
    pub unshared: u8,
}

impl LockSet {
    /// Nothing.
    pub const NONE: Self = Self { held: 0, unshared: 0 };

    const fn union(self, other: Self) -> Self {
        Self { held: self.held | other.held, unshared: self.unshared | other.unshared }
    }

    const fn without(self, other: Self) -> Self {
        Self { held: self.held & !other.held, unshared: self.unshared & !other.unshared }
    }

    /// The bytes that say it.
    fn bytes(self) -> impl Iterator<Item = i64> {
        let of = |bits: u8, base: i64| {
            (0..).zip(NAMES).filter(move |(_, (bit, _))| bits & bit != 0).map(move |(i, _)| base + i)
        };
        of(self.held, HELD).chain(of(self.unshared, UNSHARED))
    }
}

/// Why a lock could not be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockError {
    /// Somebody else does not share this permission.
    Unshared(&'static str),
    /// Somebody else holds this permission, which was not to be shared.
    Held(&'static str),
    /// The system failed to lock a byte.
    Failed(i64, Errno),
}

impl fmt::Display for LockError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unshared(name) => write!(f, "Failed to get \"{name}\" lock"),
            Self::Held(name) => write!(f, "Failed to get shared \"{name}\" lock"),
            Self::Failed(byte, errno) => write!(f, "Failed to lock byte {byte}: {}", errno.desc()),
        }
    }
}

impl std::error::Error for LockError {}

/// The locks of one open image.
#[derive(Clone)]
pub struct ImageLock {
    fd: Arc<Fd>,
    mode: LockMode,
}

impl fmt::Debug for ImageLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ImageLock").field("fd", &self.fd.raw()).field("mode", &self.mode).finish()
    }
}

impl ImageLock {
    /// The means to lock `file`, none if it is not to be or cannot be locked. Locks nothing yet.
    pub async fn new(file: &File, locking: Locking) -> Option<Self> {
        if locking == Locking::Off {
            return None;
        }
        let fd = Arc::clone(&file.fd);
        let test = Arc::clone(&fd);
        // Without a thread to ask, the question is open; assume the usual and let the first lock fail.
        let ofd = pool::blocking(move || find(&test, LockMode::Ofd, 0).is_ok()).await.unwrap_or(true);
        match (locking, ofd) {
            (_, true) => Some(Self { fd, mode: LockMode::Ofd }),
            (Locking::On, false) => Some(Self { fd, mode: LockMode::Posix }),
            _ => None,
        }
    }

    /// The same locks on another descriptor of the image, on which nothing is locked yet.
    #[must_use]
    pub fn on(&self, file: &File) -> Self {
        Self { fd: Arc::clone(&file.fd), mode: self.mode }
    }

    /// Kind of lock.
    pub fn mode(&self) -> LockMode {
        self.mode
    }

    /// First phase of a change from `old`, which is locked, to `new`: afterwards both are.
    ///
    /// # Errors
    /// Somebody else is in the way, or the system refuses. Then `old` is locked and nothing else.
    pub async fn prepare(&self, old: LockSet, new: LockSet) -> Result<(), LockError> {
        let this = self.clone();
        let result = pool::blocking(move || {
            let result = this.add(new.without(old)).and_then(|()| this.check(new));
            if result.is_err() {
                this.settle(old.union(new), old);
            }
            result
        });
        result.await.unwrap_or(Err(LockError::Failed(HELD, Errno::EAGAIN)))
    }

    /// Locks `set` on a descriptor on which nothing is locked, without looking for others: for a second descriptor of an image
    /// that is already locked, whose own locks would be found.
    ///
    /// # Errors
    /// The system refuses.
    pub async fn copy(&self, set: LockSet) -> Result<(), LockError> {
        let this = self.clone();
        pool::blocking(move || this.add(set)).await.unwrap_or(Err(LockError::Failed(HELD, Errno::EAGAIN)))
    }

    /// Second phase: of what is locked, keeps `keep`. Never waits.
    pub fn settle(&self, locked: LockSet, keep: LockSet) {
        for byte in locked.without(keep).bytes() {
            // To give up a lock can only fail for lack of kernel memory; it then goes when the descriptor is closed.
            let _ = set(&self.fd, self.mode, libc::F_UNLCK, byte);
        }
    }

    fn add(&self, wanted: LockSet) -> Result<(), LockError> {
        for byte in wanted.bytes() {
            set(&self.fd, self.mode, libc::F_RDLCK, byte).map_err(|e| LockError::Failed(byte, e))?;
        }
        Ok(())
    }

    fn check(&self, wanted: LockSet) -> Result<(), LockError> {
        for (i, (bit, name)) in (0..).zip(NAMES) {
            if wanted.held & bit != 0 && self.taken(UNSHARED + i)? {
                return Err(LockError::Unshared(name));
            }
            if wanted.unshared & bit != 0 && self.taken(HELD + i)? {
                return Err(LockError::Held(name));
            }
        }
        Ok(())
    }

    fn taken(&self, byte: i64) -> Result<bool, LockError> {
        find(&self.fd, self.mode, byte).map_err(|e| LockError::Failed(byte, e))
    }
}

fn one_byte(kind: libc::c_int, byte: i64) -> libc::flock {
    // The constants of lock types are small; the structure keeps them in a short.
    let kind = libc::c_short::try_from(kind).unwrap_or_default();
    let whence = libc::c_short::try_from(libc::SEEK_SET).unwrap_or_default();
    libc::flock { l_type: kind, l_whence: whence, l_start: byte, l_len: 1, l_pid: 0 }
}

fn set(fd: &Fd, mode: LockMode, kind: libc::c_int, byte: i64) -> nix::Result<()> {
    let lock = one_byte(kind, byte);
    let arg = match mode {
        LockMode::Ofd => FcntlArg::F_OFD_SETLK(&lock),
        LockMode::Posix => FcntlArg::F_SETLK(&lock),
    };
    fcntl(fd, arg).map(drop)
}

/// Whether somebody else has a lock on the byte.
fn find(fd: &Fd, mode: LockMode, byte: i64) -> nix::Result<bool> {
    let mut lock = one_byte(libc::F_WRLCK, byte);
    let arg = match mode {
        LockMode::Ofd => FcntlArg::F_OFD_GETLK(&mut lock),
        LockMode::Posix => FcntlArg::F_GETLK(&mut lock),
    };
    fcntl(fd, arg)?;
    Ok(libc::c_int::from(lock.l_type) != libc::F_UNLCK)
}
