//! The file with the process's number: locked while the process lives, removed at its end.

use nix::fcntl::{FcntlArg, fcntl};
use qapi::{Error, Result};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
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
    /// Creates or takes over the file, locks it and writes the process's number.
    ///
    /// # Errors
    /// It cannot be made or written, or another process holds it.
    pub fn create(path: &str) -> Result<Self> {
        Self::create_inner(Path::new(path)).map_err(|error| error.context("cannot create PID file"))
    }

    fn create_inner(path: &Path) -> Result<Self> {
        let shown = path.display();
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
            writeln!(file, "{}", std::process::id()).map_err(|error| Error::io("Failed to write pid file", error))?;
            // A process that goes to the background goes to another folder.
            let path =
                std::path::absolute(path).map_err(|error| Error::io("Failed to resolve pid file path", error))?;
            return Ok(Self { path, _file: file });
        }
    }
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
        let file = PidFile::create(path.to_str().unwrap()).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{}\n", std::process::id()));
        drop(file);
        assert!(!path.exists());
    }

    #[test]
    fn says_what_is_wrong() {
        let text = PidFile::create("/nonexistent/pid").unwrap_err().to_string();
        assert_eq!(text, "cannot create PID file: Could not create '/nonexistent/pid': No such file or directory");
    }
}
