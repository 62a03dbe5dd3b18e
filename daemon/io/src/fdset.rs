//! Sets of descriptors that a client passed, and the names `/dev/fdset/N` under which files in them are opened.
//!
//! To open such a name is to duplicate the member of the set whose access mode is the one asked for. Monitors add and remove
//! members; a set without members is remembered as long as a file that was opened through it is. All clones share the
//! sets. `[QAPI §add-fd]`

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What the names of sets start with.
const PREFIX: &str = "/dev/fdset/";

/// The flags of an open file that a duplicate can be given.
const CHANGEABLE: OFlag = OFlag::O_APPEND.union(OFlag::O_DIRECT).union(OFlag::O_NONBLOCK);

/// All sets.
#[derive(Clone, Debug, Default)]
pub struct FdSets(Arc<Mutex<BTreeMap<u64, Set>>>);

#[derive(Debug, Default)]
struct Set {
    members: Vec<Member>,
    /// One for the set and one for each file that was opened through it.
    users: Arc<()>,
}

#[derive(Debug)]
struct Member {
    fd: OwnedFd,
    opaque: Option<String>,
}

/// A set as clients see it.
#[derive(Debug, PartialEq, Eq)]
pub struct FdSetInfo {
    /// Its number.
    pub id: u64,
    /// The descriptors in it by their numbers in this process, and the texts that clients gave with them.
    pub members: Vec<(RawFd, Option<String>)>,
}

/// Keeps a set in [`FdSets::list`] while a file that was opened through it is in use.
#[derive(Clone, Debug)]
pub struct FdSetUse(#[expect(dead_code, reason = "counted by its existence")] Arc<()>);

/// A file that was opened by its name.
#[derive(Debug)]
pub struct Opened {
    /// The descriptor, closed on exec.
    pub fd: OwnedFd,
    /// To be kept as long as the file is in use, if it came out of a set.
    pub from_set: Option<FdSetUse>,
}

/// Why a name cannot be opened.
#[derive(Debug)]
pub enum FdSetError {
    /// The name does not say which set.
    Parse,
    /// There is no such set.
    NotFound,
    /// No member of the set has the access mode, which is `O_RDONLY`, `O_WRONLY` or `O_RDWR`.
    NoMatch(i32),
    /// The system refuses the duplicate.
    System(io::Error),
}

impl FdSetError {
    /// The text for the operation on `name`, and its cause.
    pub fn text(&self, name: &str) -> String {
        match self {
            Self::Parse => format!("Could not parse fdset {name}"),
            Self::NotFound => format!("Failed to find fdset {name}"),
            Self::NoMatch(flags) => format!("Failed to find file descriptor with matching flags=0x{flags:x}"),
            Self::System(error) => format!("Could not dup FD for {name}: {}", qapi::error::errno_text(error)),
        }
    }
}

impl FdSets {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Set>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a descriptor to the set `id`, or to a new one with the lowest number that is free. Returns the set's number and
    /// the descriptor's.
    pub fn add(&self, id: Option<u64>, fd: OwnedFd, opaque: Option<String>) -> (u64, RawFd) {
        let mut sets = self.lock();
        forget_unused(&mut sets);
        let id = id.unwrap_or_else(|| (0..).find(|id| !sets.contains_key(id)).unwrap_or_default());
        let number = fd.as_raw_fd();
        sets.entry(id).or_default().members.push(Member { fd, opaque });
        (id, number)
    }

    /// Closes the descriptor with that number in the set, or all of them. False if there is none.
    pub fn remove(&self, id: u64, number: Option<RawFd>) -> bool {
        let mut sets = self.lock();
        forget_unused(&mut sets);
        let Some(set) = sets.get_mut(&id) else { return false };
        let before = set.members.len();
        let goes = |member: &mut Member| number.is_none_or(|number| member.fd.as_raw_fd() == number);
        crate::foreign::dispose(set.members.extract_if(.., goes).collect::<Vec<_>>());
        let found = number.is_none() || set.members.len() != before;
        forget_unused(&mut sets);
        found
    }

    /// All sets, highest number first.
    pub fn list(&self) -> Vec<FdSetInfo> {
        let mut sets = self.lock();
        forget_unused(&mut sets);
        let of = |member: &Member| (member.fd.as_raw_fd(), member.opaque.clone());
        let info = |(id, set): (&u64, &Set)| FdSetInfo { id: *id, members: set.members.iter().map(of).collect() };
        sets.iter().rev().map(info).collect()
    }

    /// The file that `name` stands for, if it is the name of a set. `flags` are those of open(2).
    ///
    /// # Errors
    /// There is no such set, or nothing in it can be used so.
    pub fn find(&self, name: &Path, flags: OFlag) -> Option<Result<Opened, FdSetError>> {
        let number = name.to_str()?.strip_prefix(PREFIX)?;
        Some(self.duplicate(number, flags))
    }

    fn duplicate(&self, number: &str, flags: OFlag) -> Result<Opened, FdSetError> {
        let digits = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
        let id: u64 = number.parse().ok().filter(|_| digits).ok_or(FdSetError::Parse)?;
        let mut sets = self.lock();
        forget_unused(&mut sets);
        let set = sets.get(&id).ok_or(FdSetError::NotFound)?;
        let system = |errno: Errno| FdSetError::System(errno.into());
        let wanted = flags & OFlag::O_ACCMODE;
        for member in &set.members {
            let current = OFlag::from_bits_retain(fcntl(&member.fd, FcntlArg::F_GETFL).map_err(system)?);
            if current & OFlag::O_ACCMODE != wanted {
                continue;
            }
            let own = fcntl(&member.fd, FcntlArg::F_DUPFD_CLOEXEC(3)).map_err(system)?;
            // SAFETY: the descriptor was just made for us.
            let fd = unsafe { OwnedFd::from_raw_fd(own) };
            let changed = (current - CHANGEABLE) | (flags & CHANGEABLE);
            if changed != current {
                fcntl(&fd, FcntlArg::F_SETFL(changed)).map_err(system)?;
            }
            if flags.contains(OFlag::O_TRUNC) {
                // As open(2) would; what has no length, such as a pipe, stays as it is.
                let _ = nix::unistd::ftruncate(&fd, 0);
            }
            return Ok(Opened { fd, from_set: Some(FdSetUse(Arc::clone(&set.users))) });
        }
        Err(FdSetError::NoMatch(wanted.bits()))
    }

    /// Opens a file, or duplicates it out of a set. Can block.
    ///
    /// # Errors
    /// What open(2) says; of a set, what [`FdSetError::text`] says.
    pub fn open(&self, path: &Path, flags: OFlag, mode: nix::sys::stat::Mode) -> io::Result<Opened> {
        if let Some(found) = self.find(path, flags) {
            return found.map_err(|error| io::Error::other(error.text(&path.to_string_lossy())));
        }
        Ok(Opened { fd: nix::fcntl::open(path, flags | OFlag::O_CLOEXEC, mode)?, from_set: None })
    }
}

fn forget_unused(sets: &mut BTreeMap<u64, Set>) {
    sets.retain(|_, set| !set.members.is_empty() || Arc::strong_count(&set.users) > 1);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{File, OpenOptions};

    fn numbers(sets: &FdSets) -> Vec<(u64, usize)> {
        sets.list().into_iter().map(|set| (set.id, set.members.len())).collect()
    }

    #[test]
    fn the_member_with_the_access_mode_is_duplicated() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, "content").unwrap();
        let sets = FdSets::default();
        sets.add(Some(7), File::open(&path).unwrap().into(), None);
        sets.add(Some(7), OpenOptions::new().write(true).open(&path).unwrap().into(), Some("w".into()));
        let open = |name: &str, flags| sets.find(Path::new(name), flags).unwrap();
        let mode = |fd: &OwnedFd| OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL).unwrap());
        let reader = open("/dev/fdset/7", OFlag::O_RDONLY).unwrap();
        assert_eq!(mode(&reader.fd) & OFlag::O_ACCMODE, OFlag::O_RDONLY);
        let writer = open("/dev/fdset/7", OFlag::O_WRONLY | OFlag::O_APPEND | OFlag::O_TRUNC).unwrap();
        assert!(mode(&writer.fd).contains(OFlag::O_WRONLY | OFlag::O_APPEND));
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 0);
        let text = |name: &str, flags| open(name, flags).unwrap_err().text(name);
        let no_match = "Failed to find file descriptor with matching flags=0x2";
        assert_eq!(text("/dev/fdset/7", OFlag::O_RDWR | OFlag::O_CREAT), no_match);
        assert_eq!(text("/dev/fdset/8", OFlag::O_RDWR), "Failed to find fdset /dev/fdset/8");
        for name in ["/dev/fdset/", "/dev/fdset/x", "/dev/fdset/-1", "/dev/fdset/+7", "/dev/fdset/7/"] {
            assert_eq!(text(name, OFlag::O_RDONLY), format!("Could not parse fdset {name}"));
        }
        assert!(sets.find(Path::new("/dev/fdset"), OFlag::O_RDONLY).is_none());
        let refused = sets.open(Path::new("/dev/fdset/8"), OFlag::O_RDONLY, nix::sys::stat::Mode::empty()).unwrap_err();
        assert_eq!(qapi::error::errno_text(&refused), "Failed to find fdset /dev/fdset/8");
    }

    #[test]
    fn a_set_lives_while_it_has_members_or_users() {
        let sets = FdSets::default();
        let null = || OwnedFd::from(File::open("/dev/null").unwrap());
        let (first, number) = sets.add(None, null(), None);
        assert_eq!((first, sets.add(None, null(), None).0, sets.add(Some(5), null(), None).0), (0, 1, 5));
        assert_eq!(numbers(&sets), [(5, 1), (1, 1), (0, 1)]);
        let used = sets.open(Path::new("/dev/fdset/0"), OFlag::O_RDONLY, nix::sys::stat::Mode::empty()).unwrap();
        assert!(!sets.remove(0, Some(number + 1000)) && !sets.remove(77, None));
        assert!(sets.remove(0, Some(number)) && sets.remove(1, None));
        assert_eq!(numbers(&sets), [(5, 1), (0, 0)]);
        assert_eq!(sets.add(None, null(), None).0, 1);
        drop(used);
        assert_eq!(numbers(&sets), [(5, 1), (1, 1)]);
    }
}
