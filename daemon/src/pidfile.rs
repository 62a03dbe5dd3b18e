//! The file with the process's number: locked while the process lives, removed at its end.
//!
//! It appears when the daemon serves, and not before: others wait for it. A process that may make names in its folder then,
//! but no longer open what is there, prepares a file without a name.

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, FcntlArg, fcntl};
use nix::unistd::linkat;
use qapi::{Error, Result};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// The pid file of this process; dropping it removes the file.
#[derive(Debug)]
pub struct PidFile {
    path: PathBuf,
    /// Holds the lock.
    _file: File,
}

impl PidFile {
    /// A file in the folder of `path` that has no name yet, for [`create`](Self::create); none if `path` exists, or if the
    /// file system has no such files.
    pub fn prepare(path: &str) -> Option<File> {
        let path = std::path::absolute(path).ok().filter(|path| fs::symlink_metadata(path).is_err())?;
        let mut how = OpenOptions::new();
        how.read(true).write(true).mode(0o600).custom_flags(nix::libc::O_TMPFILE);
        how.open(path.parent()?).ok()
    }

    /// Creates or takes over the file, locks it and writes the process's number. A `prepared` file gets the name if it is
    /// free.
    ///
    /// # Errors
    /// It cannot be made or written, or another process holds it.
    pub fn create(path: &str, prepared: Option<File>) -> Result<Self> {
        let shown = Path::new(path).display();
        Self::create_inner(&shown, prepared).map_err(|error| error.context("cannot create PID file"))
    }

    fn create_inner(shown: &std::path::Display<'_>, prepared: Option<File>) -> Result<Self> {
        // The process may have another working directory when it ends.
        let path = &std::path::absolute(shown.to_string())
            .map_err(|error| Error::io(format!("Could not create '{shown}'"), error))?;
        if let Some(mut file) = prepared {
            lock(&file).map_err(|error| Error::io("Cannot lock pid file", error))?;
            write_number(&mut file)?;
            let unnamed = format!("/proc/self/fd/{}", file.as_raw_fd());
            match linkat(AT_FDCWD, unnamed.as_str(), AT_FDCWD, path, AtFlags::AT_SYMLINK_FOLLOW) {
                Ok(()) => return Ok(Self { path: path.clone(), _file: file }),
                // Somebody made it meanwhile; whether it is in use is what the lock tells.
                Err(Errno::EEXIST) => {}
                Err(error) => return Err(Error::io(format!("Could not create '{shown}'"), error.into())),
            }
        }
        loop {
            let mut file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(path)
                .map_err(|error| Error::io(format!("Could not create '{shown}'"), error))?;
            lock(&file).map_err(|error| Error::io("Cannot lock pid file", error))?;
            // Between open and lock the former owner may have removed the file: then it is not the one at the path.
            let ours = file.metadata().map_err(|error| Error::io("Cannot stat file", error))?;
            match fs::metadata(path) {
                Ok(there) if (there.dev(), there.ino()) == (ours.dev(), ours.ino()) => {}
                _ => continue,
            }
            file.set_len(0).map_err(|error| Error::io("Cannot truncate pid file", error))?;
            write_number(&mut file)?;
            return Ok(Self { path: path.clone(), _file: file });
        }
    }
}

fn write_number(file: &mut File) -> Result<()> {
    writeln!(file, "{}", std::process::id()).map_err(|error| Error::io("Failed to write pid file", error))
}

/// A write lock on the whole file that belongs to this process.
fn lock(file: &File) -> std::io::Result<()> {
    let whole = nix::libc::flock {
        l_type: i16::try_from(nix::libc::F_WRLCK).unwrap_or_default(),
        l_whence: i16::try_from(nix::libc::SEEK_SET).unwrap_or_default(),
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_SETLK(&whole))?;
    Ok(())
}

impl Drop for PidFile {
    fn drop(&mut self) {
        // If it is gone already there is nothing to remove.
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_the_number_and_goes_away() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        fs::write(&path, "an older and longer content\n").unwrap();
        let file = PidFile::create(path.to_str().unwrap(), None).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{}\n", std::process::id()));
        drop(file);
        assert!(!path.exists());
    }

    #[test]
    fn a_prepared_file_appears_with_its_number() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        let path_text = path.to_str().unwrap();
        let prepared = PidFile::prepare(path_text);
        assert!(prepared.is_some() && !path.exists());
        let file = PidFile::create(path_text, prepared).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{}\n", std::process::id()));
        assert!(PidFile::prepare(path_text).is_none(), "there is one");
        drop(file);
        assert!(!path.exists());
    }

    #[test]
    fn a_prepared_file_does_not_take_the_place_of_another() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        let prepared = PidFile::prepare(path.to_str().unwrap());
        fs::write(&path, "of another process\n").unwrap();
        let file = PidFile::create(path.to_str().unwrap(), prepared).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{}\n", std::process::id()));
        drop(file);
    }

    #[test]
    fn says_what_is_wrong() {
        let text = PidFile::create("/nonexistent/pid", None).unwrap_err().to_string();
        assert_eq!(text, "cannot create PID file: Could not create '/nonexistent/pid': No such file or directory");
    }
}
