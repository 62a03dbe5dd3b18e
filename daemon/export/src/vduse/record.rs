//! The record of a device: a file that tells the process which takes over what the device is, and which requests of it
//! are in flight.
//!
//! It has to outlive the process and to be found again by name, and whoever can write to it has the next process do requests a
//! second time. So it lies in a folder that nobody else can write to, which is looked at before it is used: the one that
//! the service manager made (`RUNTIME_DIRECTORY`), else `/run/qemu-storage-daemon` for root and the user's own runtime
//! folder for others. It is locked while it is in use. What is in it is checked all the same.

use crate::virtio_blk::vring::InflightRegion;
use buf::Mapping;
use rustix::fs::{self, AtFlags, FlockOperation, Mode, OFlags};
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// In front of the parts of the queues.
const HEAD: usize = 64;
const MAGIC: [u8; 8] = *b"vdusblk1";

/// What a device was made with, as far as its driver may have taken it in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub queues: u16,
    pub queue_size: u16,
    pub block_size: u32,
    /// What the device can do.
    pub features: u64,
}

impl Shape {
    fn head(&self) -> [u8; HEAD] {
        let mut head = [0; HEAD];
        let bytes = [
            &MAGIC[..],
            &self.queues.to_le_bytes(),
            &self.queue_size.to_le_bytes(),
            &self.block_size.to_le_bytes(),
            &self.features.to_le_bytes(),
        ]
        .concat();
        for (place, byte) in head.iter_mut().zip(bytes) {
            *place = byte;
        }
        head
    }

    fn len(&self) -> u64 {
        InflightRegion::len(self.queues, self.queue_size, false).saturating_add(64)
    }
}

/// Where the records of this process's user are.
pub(crate) fn folder() -> io::Result<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let first = |list: OsString| std::env::split_paths(&list).next();
    if let Some(folder) = variable("RUNTIME_DIRECTORY").and_then(first) {
        return Ok(folder);
    }
    if nix::unistd::geteuid().is_root() {
        return Ok(PathBuf::from("/run/qemu-storage-daemon"));
    }
    let own = variable("XDG_RUNTIME_DIR").ok_or_else(|| {
        io::Error::new(io::ErrorKind::NotFound, "neither RUNTIME_DIRECTORY nor XDG_RUNTIME_DIR names a folder")
    })?;
    Ok(PathBuf::from(own).join("qemu-storage-daemon"))
}

/// A record that is in use.
#[derive(Debug)]
pub(crate) struct Record {
    folder: OwnedFd,
    name: String,
    /// Locked.
    file: OwnedFd,
    shape: Shape,
}

impl Record {
    /// Makes an empty record, in the place of an older one. Can block.
    ///
    /// # Errors
    /// It cannot be made in private, or is in use.
    pub(crate) fn create(folder: &Path, device: &str, shape: Shape) -> io::Result<Self> {
        let this = Self::open_file(folder, device, shape, OFlags::CREATE)?;
        fs::ftruncate(&this.file, 0)?;
        fs::ftruncate(&this.file, shape.len())?;
        let written = rustix::io::pwrite(&this.file, &shape.head(), 0)?;
        if written < HEAD { Err(io::ErrorKind::WriteZero.into()) } else { Ok(this) }
    }

    /// Opens the record that another process left. Can block.
    ///
    /// # Errors
    /// There is none (`NotFound`), it is in use or not private, or of a device of another shape (`InvalidData`).
    pub(crate) fn open(folder: &Path, device: &str, shape: Shape) -> io::Result<Self> {
        let this = Self::open_file(folder, device, shape, OFlags::empty())?;
        let mut head = [0; HEAD];
        let read = rustix::io::pread(&this.file, &mut head, 0)?;
        let len = u64::try_from(fs::fstat(&this.file)?.st_size).unwrap_or(0);
        if read < HEAD || head != shape.head() || len != shape.len() {
            let text = "it was made with other num-queues, queue-size, logical-block-size or writable";
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        Ok(this)
    }

    fn open_file(folder: &Path, device: &str, shape: Shape, how: OFlags) -> io::Result<Self> {
        match fs::mkdir(folder, Mode::RWXU) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(errno) => return Err(errno.into()),
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let folder = fs::open(folder, flags, Mode::empty())?;
        let me = nix::unistd::geteuid().as_raw();
        let found = fs::fstat(&folder)?;
        if (found.st_uid != me && found.st_uid != 0) || found.st_mode & 0o022 != 0 {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, "others can write to the folder"));
        }
        let name = format!("vduse-blk-{device}");
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC | how;
        let file = fs::openat(&folder, name.as_str(), flags, Mode::RUSR | Mode::WUSR)?;
        let found = fs::fstat(&file)?;
        let private = found.st_uid == me && found.st_nlink == 1 && found.st_mode & 0o7077 == 0;
        if !private || !fs::FileType::from_raw_mode(found.st_mode).is_file() {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, "the record is not a private file"));
        }
        fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        Ok(Self { folder, name, file, shape })
    }

    /// The parts of the queues.
    ///
    /// # Errors
    /// The file system of the folder is none whose files can be mapped, or there is no memory.
    pub(crate) fn region(&self) -> io::Result<InflightRegion> {
        let map = Arc::new(Mapping::new(self.file.as_fd(), 0, self.shape.len())?);
        let Shape { queues, queue_size, .. } = self.shape;
        Ok(InflightRegion { map, start: HEAD, queues, queue_size, packed: false })
    }

    /// Removes it: the device is gone. Can block.
    pub(crate) fn remove(self) {
        // One that stays is overwritten by the next device of the name.
        let _ = fs::unlinkat(&self.folder, self.name.as_str(), AtFlags::empty());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio_blk::inflight::Resume;
    use crate::virtio_blk::ring::{Chain, Taken};
    use std::os::unix::fs::{PermissionsExt, symlink};

    const SHAPE: Shape = Shape { queues: 2, queue_size: 8, block_size: 512, features: 0x1234_5678_9ABC };

    fn private() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
        folder
    }

    #[test]
    fn a_record_is_found_by_the_next_process_and_gone_after_removal() {
        let folder = private();
        let record = Record::create(folder.path(), "disk", SHAPE).unwrap();
        let mut part = record.region().unwrap().queue(1).unwrap();
        assert_eq!(part.resume(0, 8, |_| 0), Ok(None), "a new one");
        part.started(&Chain { id: 5, slots: 1, entry: 5, writable: 0 }, &[]).unwrap();
        drop((record, part));

        let record = Record::open(folder.path(), "disk", SHAPE).unwrap();
        let resume = record.region().unwrap().queue(1).unwrap().resume(0, 8, |_| 0).unwrap();
        assert_eq!(resume, Some(Resume { base: 1, left: vec![Taken::Fresh(5)] }));
        record.remove();
        assert_eq!(Record::open(folder.path(), "disk", SHAPE).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_record_of_another_device_is_refused() {
        let folder = private();
        drop(Record::create(folder.path(), "disk", SHAPE).unwrap());
        for other in [
            Shape { queues: 1, ..SHAPE },
            Shape { queue_size: 16, ..SHAPE },
            Shape { block_size: 4096, ..SHAPE },
            Shape { features: 0, ..SHAPE },
        ] {
            assert_eq!(Record::open(folder.path(), "disk", other).unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
        std::fs::write(folder.path().join("vduse-blk-short"), b"vdusblk1").unwrap();
        let path = folder.path().join("vduse-blk-short");
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(Record::open(folder.path(), "short", SHAPE).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn a_record_has_one_user() {
        let folder = private();
        let record = Record::create(folder.path(), "disk", SHAPE).unwrap();
        assert_eq!(Record::open(folder.path(), "disk", SHAPE).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert_eq!(Record::create(folder.path(), "disk", SHAPE).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(record);
        Record::open(folder.path(), "disk", SHAPE).unwrap();
    }

    #[test]
    fn nothing_is_followed_and_nothing_is_shared() {
        let folder = private();
        let target = folder.path().join("target");
        std::fs::write(&target, b"precious").unwrap();
        symlink(&target, folder.path().join("vduse-blk-link")).unwrap();
        assert!(Record::create(folder.path(), "link", SHAPE).is_err(), "a symbolic link");
        std::fs::set_permissions(&target, std::fs::Permissions::from_mode(0o600)).unwrap();
        std::fs::hard_link(&target, folder.path().join("vduse-blk-hard")).unwrap();
        assert!(Record::create(folder.path(), "hard", SHAPE).is_err(), "a file with another name");
        rustix::fs::mkfifoat(fs::CWD, folder.path().join("vduse-blk-pipe"), Mode::RUSR | Mode::WUSR).unwrap();
        assert!(Record::create(folder.path(), "pipe", SHAPE).is_err(), "no file");
        let open = folder.path().join("vduse-blk-open");
        std::fs::write(&open, b"").unwrap();
        std::fs::set_permissions(open, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(Record::create(folder.path(), "open", SHAPE).is_err(), "others can read it");
        assert_eq!(std::fs::read(&target).unwrap(), b"precious");

        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
        let error = Record::create(folder.path(), "disk", SHAPE).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "a folder that others can write to");
        let link = private();
        symlink(link.path(), link.path().join("folder")).unwrap();
        assert!(Record::create(&link.path().join("folder"), "disk", SHAPE).is_err());
    }
}
