//! New files, and the attributes that a file system keeps of them. [ioctl_iflags(2)], [linux/fs.h FS_IOC_FSSETXATTR]

use crate::fd::Fd;
use crate::fdset::FdSets;
use crate::file::{Engine, File};
use crate::pool;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use std::io;
use std::path::Path;
use std::sync::Arc;

/// `struct fsxattr`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Attributes {
    flags: u32,
    /// Bytes.
    extent_size: u32,
    extents: u32,
    project: u32,
    cow_extent_size: u32,
    pad: [u8; 8],
}

mod calls {
    //! The ioctls by name.
    use super::Attributes;
    use nix::{ioctl_read, ioctl_write_ptr};

    // The numbers say long, the kernel takes an int.
    ioctl_read!(get_flags, b'f', 1, libc::c_long);
    ioctl_write_ptr!(set_flags, b'f', 2, libc::c_long);
    ioctl_read!(get_attributes, b'X', 31, Attributes);
    ioctl_write_ptr!(set_attributes, b'X', 32, Attributes);
}

/// Copy-on-write is off for the file: FS_NOCOW_FL.
const NOCOW: libc::c_long = 0x0080_0000;
/// The hint counts: FS_XFLAG_EXTSIZE.
const HAS_EXTENT_SIZE: u32 = 0x0000_0800;

impl File {
    /// Opens `path` for reading and writing, off the event loop, and makes the file if there is none (mode 0644 less the
    /// umask). Its name is on stable storage then: what is flushed to it later can be found again. It may be the name of one
    /// of the `sets`, whose files have been made by others.
    ///
    /// # Errors
    /// What [`FdSets::open`], or fsync(2) of the folder, says.
    pub async fn create(path: &Path, sets: &FdSets, engine: Engine) -> io::Result<Self> {
        let (path, sets) = (path.to_owned(), sets.clone());
        let create = move || {
            let opened = sets.open(&path, OFlag::O_RDWR | OFlag::O_CREAT, Mode::from_bits_truncate(0o644))?;
            if opened.from_set.is_none() {
                sync_folder(&path)?;
            }
            Ok::<_, io::Error>(opened.fd)
        };
        Self::from_fd(pool::blocking(create).await??, engine)
    }

    /// Has the file system write an empty file in place, always.
    ///
    /// # Errors
    /// What the kernel says; most file systems have no such attribute.
    pub async fn set_nocow(&self) -> io::Result<()> {
        let fd = Arc::clone(&self.fd);
        Ok(pool::blocking(move || set_nocow(&fd)).await??)
    }

    /// Has the file system extend an empty file by at least so many bytes at a time.
    ///
    /// # Errors
    /// What the kernel says; few file systems have such an attribute.
    pub async fn set_extent_size_hint(&self, bytes: u32) -> io::Result<()> {
        let fd = Arc::clone(&self.fd);
        Ok(pool::blocking(move || set_extent_size(&fd, bytes)).await??)
    }

    /// By how many bytes at least the file system extends the file; none where it keeps no such hint, or the system has no
    /// thread to ask.
    pub async fn extent_size_hint(&self) -> Option<u32> {
        let fd = Arc::clone(&self.fd);
        let attributes = pool::blocking(move || attributes(&fd)).await.ok()?.ok()?;
        (attributes.flags & HAS_EXTENT_SIZE != 0).then_some(attributes.extent_size)
    }
}

/// Puts the names in the folder of `path` on stable storage.
fn sync_folder(path: &Path) -> Result<(), Errno> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let flags = OFlag::O_CLOEXEC | OFlag::O_RDONLY | OFlag::O_DIRECTORY;
    match nix::fcntl::open(folder, flags, Mode::empty()).and_then(|fd| nix::unistd::fsync(&fd)) {
        // A folder that may be used but not read, and file systems without the call: there it is as good as it gets.
        Err(Errno::EACCES | Errno::EPERM | Errno::EINVAL | Errno::ENOSYS | Errno::EROFS) => Ok(()),
        result => result,
    }
}

fn set_nocow(fd: &Fd) -> Result<(), Errno> {
    let mut flags: libc::c_long = 0;
    // SAFETY: the call writes an int or a long through the pointer, which is to a long.
    unsafe { calls::get_flags(fd.raw(), &mut flags) }?;
    flags |= NOCOW;
    // SAFETY: the call reads an int or a long through the pointer, which is to a long.
    unsafe { calls::set_flags(fd.raw(), &flags) }?;
    Ok(())
}

fn attributes(fd: &Fd) -> Result<Attributes, Errno> {
    let mut attributes = Attributes::default();
    // SAFETY: the call writes one struct fsxattr through the pointer; the type has its layout.
    unsafe { calls::get_attributes(fd.raw(), &mut attributes) }?;
    Ok(attributes)
}

fn set_extent_size(fd: &Fd, bytes: u32) -> Result<(), Errno> {
    let mut attributes = attributes(fd)?;
    attributes.flags |= HAS_EXTENT_SIZE;
    attributes.extent_size = bytes;
    // SAFETY: the call reads one struct fsxattr through the pointer.
    unsafe { calls::set_attributes(fd.raw(), &attributes) }?;
    Ok(())
}

const _: () = assert!(size_of::<Attributes>() == 28, "the layout is the kernel's");
