//! [`Mounts`]: where the FUSE exports of a daemon are mounted, so that there is one at a place.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// The places that are taken; clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Mounts {
    /// Guards the paths, which are absolute and without links. Never held across an await.
    taken: Arc<Mutex<HashSet<PathBuf>>>,
}

impl Mounts {
    /// Takes a place, none if somebody has it. `path` must be absolute and without links.
    pub(crate) fn take(&self, path: &Path) -> Option<Place> {
        let new = self.taken.lock().unwrap_or_else(PoisonError::into_inner).insert(path.to_owned());
        new.then(|| Place { path: path.to_owned(), mounts: self.clone() })
    }
}

/// A place, taken as long as this lives.
#[derive(Debug)]
pub(crate) struct Place {
    path: PathBuf,
    mounts: Mounts,
}

impl Place {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.mounts.taken.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_taken_once_at_a_time() {
        let mounts = Mounts::default();
        let first = mounts.take(Path::new("/a")).unwrap();
        assert!(mounts.take(Path::new("/a")).is_none());
        assert!(mounts.clone().take(Path::new("/b")).is_some());
        drop(first);
        assert_eq!(mounts.take(Path::new("/a")).unwrap().path(), Path::new("/a"));
    }
}
