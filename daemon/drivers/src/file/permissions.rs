//! Image locks, and opening for writing and for reading again, as users come and go.
//!
//! Both happen in the two phases of a change of permissions: `prepare` gets what the new users need and keeps what the old
//! ones need; `commit` or `abort` gives up the rest and cannot fail.

use super::{FileDriver, Settings, Writing};
use block::Perms;
use block::perm::Bits;
use io::{Access, File, ImageLock, LockError, LockSet};
use qapi::{Error, Result};
use std::sync::Arc;

/// The locks of a file: those in force, and the change that is under way.
#[derive(Debug)]
pub(super) struct Locks {
    /// None if the file is not to be, or cannot be, locked.
    lock: Option<ImageLock>,
    set: LockSet,
    pending: Option<Pending>,
    /// Settings that come in force with the permissions that are prepared next.
    pub(super) reopening: Option<Settings>,
}

/// What a change of permissions has prepared.
#[derive(Debug)]
struct Pending {
    set: LockSet,
    settings: Settings,
    /// The file that replaces the current one, with its locks.
    next: Option<(Arc<File>, Option<ImageLock>)>,
}

impl Locks {
    pub(super) fn new(lock: Option<ImageLock>) -> Self {
        Self { lock, set: LockSet::NONE, pending: None, reopening: None }
    }
}

impl FileDriver {
    /// The lock bytes for what the users need and share. They may share a resize with each other, as it goes through the
    /// graph and tells them; no other process may resize the file under any of them.
    fn lock_set(force_share: bool, new: Perms) -> LockSet {
        let outsiders = if new.need.is_empty() { new.shared } else { new.shared & !Bits::RESIZE };
        let unshared = if force_share { Bits::NONE } else { !outsiders };
        LockSet { held: new.need.bits(), unshared: unshared.bits() }
    }

    pub(super) async fn prepare(&self, new: Perms) -> Result<()> {
        let file = self.file().map_err(|e| Error::io(format!("'{}' is closed", self.filename), e.into()))?;
        let (lock, old, reopening) = {
            let locks = self.locks();
            (locks.lock.clone(), locks.set, locks.reopening)
        };
        let mut settings = reopening.unwrap_or_else(|| self.settings());
        let set = Self::lock_set(settings.force_share, new);
        if let Some(lock) = &lock
            && set != old
        {
            lock.prepare(old, set).await.map_err(|e| self.lock_error(&e))?;
        }
        let next = match self.other_opening(&file, new, &mut settings, set, lock.as_ref()).await {
            Ok(next) => next,
            Err(error) => {
                if let Some(lock) = &lock {
                    lock.settle(union(old, set), old);
                }
                return Err(error);
            }
        };
        self.locks().pending = Some(Pending { set, settings, next });
        Ok(())
    }

    /// The file opened for what the new users do and as the settings say, if that is not how it is open.
    async fn other_opening(
        &self,
        file: &File,
        new: Perms,
        settings: &mut Settings,
        set: LockSet,
        lock: Option<&ImageLock>,
    ) -> Result<Option<(Arc<File>, Option<ImageLock>)>> {
        let writes = match settings.writing {
            Writing::Never => false,
            Writing::Always => true,
            Writing::WhenNeeded => new.need.intersects(Bits::WRITE | Bits::WRITE_UNCHANGED | Bits::RESIZE),
        };
        let access = if writes { Access::ReadWrite } else { Access::ReadOnly };
        if access == file.access() && settings.direct == file.is_direct() {
            return Ok(None);
        }
        if access == Access::ReadOnly {
            // An error of the writes so far is reported to this description; it must not go with it. It is remembered, and
            // the next flush says so.
            let _ = self.sync(file).await;
        }
        let again = match self.open_again(file, access, settings.direct).await {
            Ok(again) => again,
            // To stay writable does no harm.
            Err(_) if settings.writing == Writing::WhenNeeded && settings.direct == file.is_direct() && !writes => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        if settings.direct != file.is_direct() {
            let failed = |e| Error::io(format!("Could not find the alignment of direct I/O on '{}'", self.filename), e);
            settings.align = again.direct_align().await.map_err(failed)?;
        }
        let lock = match lock {
            None => None,
            Some(lock) => {
                let lock = lock.on(&again);
                lock.copy(set).await.map_err(|e| self.lock_error(&e))?;
                Some(lock)
            }
        };
        Ok(Some((again, lock)))
    }

    pub(super) fn commit(&self) {
        let mut locks = self.locks();
        let Some(Pending { set, settings, next }) = locks.pending.take() else { return };
        let old = std::mem::replace(&mut locks.set, set);
        self.settings.store(Arc::new(settings));
        match next {
            None => {
                if let Some(lock) = &locks.lock {
                    lock.settle(union(old, set), set);
                }
            }
            Some((file, lock)) => {
                // Requests may hold the old file for a while; its locks go now.
                if let Some(before) = std::mem::replace(&mut locks.lock, lock) {
                    before.settle(union(old, set), LockSet::NONE);
                }
                self.file.store(Some(file));
            }
        }
    }

    pub(super) fn abort(&self) {
        let mut locks = self.locks();
        if let Some(Pending { set, next, .. }) = locks.pending.take() {
            if let Some(lock) = &locks.lock {
                lock.settle(union(locks.set, set), locks.set);
            }
            if let Some((_, Some(lock))) = next {
                lock.settle(set, LockSet::NONE);
            }
        }
    }

    pub(super) fn release_locks(&self) {
        let mut locks = self.locks();
        let set = std::mem::take(&mut locks.set);
        if let Some(lock) = locks.lock.take() {
            lock.settle(set, LockSet::NONE);
        }
    }

    fn lock_error(&self, error: &LockError) -> Error {
        let text = Error::generic(error.to_string());
        match error {
            LockError::Failed(..) => text,
            _ => text.with_hint(format!("Is another process using the image [{}]?", self.filename)),
        }
    }
}

fn union(a: LockSet, b: LockSet) -> LockSet {
    LockSet { held: a.held | b.held, unshared: a.unshared | b.unshared }
}
