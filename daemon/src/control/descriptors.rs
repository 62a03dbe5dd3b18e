//! Descriptors that clients pass: by name, each monitor's own, and in sets that all share.
//!
//! A descriptor belongs to exactly one place: to the bytes that it came with, to its monitor until a command wants it or others
//! come, to a name, to a set. Whoever has no more use for it gives it to [`io::dispose`], for a close may hang. The sets themselves are in [`io::fdset`], for files are opened
//! through them everywhere.

use super::Control;
use io::{FdSets, socket};
use qapi::types::descriptors::{AddFd, AddfdInfo, Closefd, FdsetFdInfo, FdsetInfo, Getfd, QueryFdsets, RemoveFd};
use qapi::types::sockets::{
    FdSocketAddress, SocketAddress, SocketAddressLegacy, SocketAddressLegacyVariant, SocketAddressVariant,
};
use qapi::{Error, Result};
use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The monitor from which a command came, and the descriptors that its client passed and no command has taken.
#[derive(Clone, Debug)]
pub struct Caller {
    monitor: u64,
    /// Guards against nothing but the compiler: both ends are on the main thread.
    passed: Arc<Mutex<Vec<OwnedFd>>>,
}

impl Caller {
    /// The monitor of that number.
    pub fn new(monitor: u64) -> Self {
        Self { monitor, passed: Arc::default() }
    }

    fn passed(&self) -> MutexGuard<'_, Vec<OwnedFd>> {
        self.passed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// These came. Those that were there before are closed.
    pub fn pass(&self, descriptors: Vec<OwnedFd>) {
        let former = std::mem::replace(&mut *self.passed(), descriptors);
        if !former.is_empty() {
            io::dispose(former);
        }
    }
}

/// The descriptors that have names, and the sets.
#[derive(Default)]
pub(super) struct Descriptors {
    caller: Option<Caller>,
    /// By monitor and name.
    named: BTreeMap<(u64, String), OwnedFd>,
    sets: FdSets,
}

impl Descriptors {
    pub fn new(sets: FdSets) -> Self {
        Self { sets, ..Self::default() }
    }

    /// The sets.
    pub fn sets(&self) -> &FdSets {
        &self.sets
    }

    /// From now on commands come from there; none is the command line.
    pub fn called_by(&mut self, caller: Option<Caller>) {
        self.caller = caller;
    }

    /// The descriptor that came with the command, or last before it; others that came with it are closed.
    fn take_passed(&self) -> Result<OwnedFd> {
        let all = self.caller.as_ref().map(|caller| std::mem::take(&mut *caller.passed()));
        let mut all = all.unwrap_or_default().into_iter();
        let first = all.next();
        if all.len() > 0 {
            io::dispose(all);
        }
        first.ok_or_else(|| Error::generic("No file descriptor supplied via SCM_RIGHTS"))
    }

    fn key(&self, name: &str) -> (u64, String) {
        (self.caller.as_ref().map_or(0, |caller| caller.monitor), name.to_owned())
    }

    /// Replaces the name of a socket that a client passed by the socket's number. What is returned has to live until the
    /// address was used; the name means nothing any more.
    ///
    /// # Errors
    /// There is no such name, neither of this monitor nor from the service manager; or it is no socket.
    pub fn resolve_address(&mut self, address: &mut SocketAddress) -> Result<Option<OwnedFd>> {
        match &mut address.addr {
            SocketAddressVariant::Fd(fd) => self.resolve(fd),
            _ => Ok(None),
        }
    }

    /// The same, of the older form of an address.
    pub fn resolve_legacy(&mut self, address: &mut SocketAddressLegacy) -> Result<Option<OwnedFd>> {
        match &mut address.addr {
            SocketAddressLegacyVariant::Fd(fd) => self.resolve(&mut fd.data),
            _ => Ok(None),
        }
    }

    fn resolve(&mut self, address: &mut FdSocketAddress) -> Result<Option<OwnedFd>> {
        if self.caller.is_none() || address.str.parse::<i32>().is_ok() {
            return Ok(None);
        }
        let Some(fd) = self.named.remove(&self.key(&address.str)) else {
            if socket::was_passed(&address.str) {
                return Ok(None);
            }
            return Err(Error::generic(format!("File descriptor named '{}' has not been found", address.str)));
        };
        if !socket::is_socket(&fd) {
            io::dispose(fd);
            return Err(Error::generic(format!("File descriptor '{}' is not a socket", address.str)));
        }
        address.str = fd.as_raw_fd().to_string();
        Ok(Some(fd))
    }
}

fn not_found(what: &str) -> Error {
    Error::generic(format!("File descriptor named '{what}' not found"))
}

impl Control {
    pub(super) async fn getfd(&mut self, args: Getfd) -> Result<()> {
        let fd = self.descriptors.take_passed()?;
        if args.fdname.starts_with(|c: char| c.is_ascii_digit()) {
            io::dispose(fd);
            return Err(Error::generic("Parameter 'fdname' expects a name not starting with a digit"));
        }
        let key = self.descriptors.key(&args.fdname);
        if let Some(former) = self.descriptors.named.insert(key, fd) {
            io::dispose(former);
        }
        Ok(())
    }

    pub(super) async fn closefd(&mut self, args: Closefd) -> Result<()> {
        let key = self.descriptors.key(&args.fdname);
        self.descriptors.named.remove(&key).map(io::dispose).ok_or_else(|| not_found(&args.fdname))
    }

    pub(super) async fn add_fd(&mut self, args: AddFd) -> Result<AddfdInfo> {
        let fd = self.descriptors.take_passed()?;
        let wrong = |_| Error::generic("Parameter 'fdset-id' expects a non-negative value");
        let id = match args.fdset_id.map(u64::try_from).transpose().map_err(wrong) {
            Ok(id) => id,
            Err(error) => {
                io::dispose(fd);
                return Err(error);
            }
        };
        let (id, fd) = self.descriptors.sets.add(id, fd, args.opaque);
        Ok(AddfdInfo { fdset_id: i64::try_from(id).unwrap_or(i64::MAX), fd: fd.into() })
    }

    pub(super) async fn remove_fd(&mut self, args: RemoveFd) -> Result<()> {
        let what = match args.fd {
            Some(fd) => format!("fdset-id:{}, fd:{fd}", args.fdset_id),
            None => format!("fdset-id:{}", args.fdset_id),
        };
        let numbers = (u64::try_from(args.fdset_id), args.fd.map(i32::try_from).transpose());
        match numbers {
            (Ok(id), Ok(fd)) if self.descriptors.sets.remove(id, fd) => Ok(()),
            _ => Err(not_found(&what)),
        }
    }

    pub(super) async fn query_fdsets(&mut self, _: QueryFdsets) -> Result<Vec<FdsetInfo>> {
        let member = |(fd, opaque): (i32, Option<String>)| FdsetFdInfo { fd: fd.into(), opaque };
        let set = |set: io::fdset::FdSetInfo| FdsetInfo {
            fdset_id: i64::try_from(set.id).unwrap_or(i64::MAX),
            fds: set.members.into_iter().map(member).collect(),
        };
        Ok(self.descriptors.sets.list().into_iter().map(set).collect())
    }
}
