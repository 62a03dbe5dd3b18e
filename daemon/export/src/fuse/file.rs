//! [`File`]: the one file of an export, its attributes, and what each operation does with the disk.
//!
//! Shared by the threads of the export; what changes is in atomics. Lengths are those of the node, in whole sectors. The rules of what is
//! refused with which errno are those of QEMU's exports, which programs know.

use super::reply::Shown;
use super::request::Attributes;
use crate::Resize;
use block::{Disk, Errno, IoResult, Node, Span, Support, WriteFlags, ZeroFlags};
use buf::IoBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime};
use tokio::sync::watch;

/// The unit of lengths, in bytes.
const SECTOR: u64 = 512;
/// Permission bits.
const OTHERS: u32 = 0o077;
const WRITERS: u32 = 0o222;
const ALL: u32 = 0o7777;

/// What an export's file is made from.
pub(crate) struct FileOptions {
    pub disk: Disk,
    pub writable: bool,
    pub growable: bool,
    /// Others than the daemon's user can reach it.
    pub shared: bool,
    pub resize: Arc<dyn Resize>,
    /// True once the export ends, after which nobody sets another length.
    pub closing: watch::Receiver<bool>,
    pub owner: (u32, u32),
}

/// The file.
pub(crate) struct File {
    options: FileOptions,
    mode: AtomicU32,
    uid: AtomicU32,
    gid: AtomicU32,
    /// Nanoseconds since 1970.
    modified: AtomicU64,
}

/// How fallocate(2) is called. `[FUSE fuse_fallocate_in]`
mod mode {
    pub(super) const KEEP_SIZE: u32 = 1;
    pub(super) const PUNCH_HOLE: u32 = 2;
    pub(super) const ZERO_RANGE: u32 = 16;
}

/// SEEK_DATA and SEEK_HOLE.
const SEEK_DATA: u32 = 3;
const SEEK_HOLE: u32 = 4;

fn now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// What `node` and what is below it take of their media, none if nobody knows.
async fn allocated(node: &Arc<Node>) -> Option<u64> {
    if let Some(own) = node.driver().allocated_size().await {
        return Some(own);
    }
    let mut all = None;
    for edge in node.children().iter().filter(|edge| edge.role() != block::Role::Backing) {
        let below = Box::pin(allocated(&edge.node())).await?;
        all = Some(all.unwrap_or(0) + below);
    }
    all
}

impl File {
    pub(crate) fn new(options: FileOptions) -> Self {
        let mode = if options.writable { 0o600 } else { 0o400 };
        let (uid, gid) = options.owner;
        Self {
            options,
            mode: AtomicU32::new(mode),
            uid: AtomicU32::new(uid),
            gid: AtomicU32::new(gid),
            modified: AtomicU64::new(now()),
        }
    }

    fn disk(&self) -> &Disk {
        &self.options.disk
    }

    pub(crate) fn size(&self) -> u64 {
        self.disk().size()
    }

    fn writable(&self, otherwise: Errno) -> IoResult {
        if self.options.writable { Ok(()) } else { Err(otherwise) }
    }

    fn touch(&self) {
        self.modified.store(now(), Relaxed);
    }

    pub(crate) async fn shown(&self) -> Shown {
        let size = self.size();
        Shown {
            size,
            allocated: allocated(&self.disk().node()).await.unwrap_or(size),
            mode: regular_file() | self.mode.load(Relaxed),
            uid: self.uid.load(Relaxed),
            gid: self.gid.load(Relaxed),
            block: self.disk().facts().request_align.max(4096),
            modified: Duration::from_nanos(self.modified.load(Relaxed)),
        }
    }

    pub(crate) async fn set(&self, wanted: &Attributes) -> IoResult {
        let Attributes { size, mode, uid, gid } = *wanted;
        let ours = self.options.shared;
        // All is looked at before anything changes.
        if let Some(mode) = mode {
            if !ours && mode & OTHERS != 0 {
                return Err(Errno::EPERM);
            }
            if mode & WRITERS != 0 {
                self.writable(Errno::EROFS)?;
            }
        }
        if !ours && (uid.is_some() || gid.is_some()) {
            return Err(Errno::ENOTSUP);
        }
        if let Some(size) = size {
            self.writable(Errno::EACCES)?;
            self.resize(size, false).await?;
            self.touch();
        }
        for (place, value) in [(&self.mode, mode.map(|mode| mode & ALL)), (&self.uid, uid), (&self.gid, gid)] {
            if let Some(value) = value {
                place.store(value, Relaxed);
            }
        }
        Ok(())
    }

    /// Waits for the control task to set the length, or for the end of the export: the control task may be waiting for it.
    async fn resize(&self, size: u64, grow_only: bool) -> IoResult {
        let mut closing = self.options.closing.clone();
        tokio::select! {
            biased;
            done = self.options.resize.resize(size, grow_only) => done,
            _ = closing.wait_for(|closing| *closing) => Err(Errno::EIO),
        }
    }

    /// Makes room up to `end`, and to the end of its sector: lengths are shown so, and formats may know no others.
    async fn grow(&self, end: u64) -> IoResult {
        let sectors = end.checked_next_multiple_of(SECTOR).ok_or(Errno::EFBIG)?;
        self.resize(sectors, true).await
    }

    /// What the file has of the bytes from `at`, at most `len` of them: at the front of `room`, if there is any.
    pub(crate) async fn read(&self, at: u64, len: u32, room: Option<IoBuf>) -> IoResult<IoBuf> {
        let len = u64::from(len).min(self.size().saturating_sub(at));
        let bytes = usize::try_from(len).map_err(|_| Errno::EINVAL)?;
        let mut buf = room.unwrap_or_else(|| IoBuf::alloc(bytes));
        buf.truncate(bytes);
        if len > 0 {
            self.disk().read(at, &buf).await?;
        }
        Ok(buf)
    }

    /// Writes, and says how many bytes; fewer at the end of a file that does not grow.
    pub(crate) async fn write(&self, at: u64, mut data: IoBuf) -> IoResult<u32> {
        self.writable(Errno::EACCES)?;
        let len = u64::try_from(data.len()).map_err(|_| Errno::EINVAL)?;
        let end = at.checked_add(len).ok_or(Errno::EFBIG)?;
        let size = self.size();
        if end > size {
            if self.options.growable {
                self.grow(end).await?;
            } else {
                data.truncate(usize::try_from(size.saturating_sub(at)).unwrap_or(usize::MAX));
                if data.is_empty() {
                    // To say that nothing was written would make many a program try again for ever.
                    return Err(Errno::EIO);
                }
            }
        }
        if !data.is_empty() {
            self.disk().write(at, &data, WriteFlags::default()).await?;
            self.touch();
        }
        u32::try_from(data.len()).map_err(|_| Errno::EINVAL)
    }

    pub(crate) async fn sync(&self) -> IoResult {
        self.disk().flush().await
    }

    pub(crate) async fn allocate(&self, at: u64, len: u64, how: u32) -> IoResult {
        self.writable(Errno::EACCES)?;
        let end = at.checked_add(len).ok_or(Errno::EFBIG)?;
        match how {
            0 => {
                // What is there already may be full of holes, which nobody here can fill without a race.
                if at < self.size() {
                    return Err(Errno::ENOTSUP);
                }
                self.grow(end).await?;
                self.zero(at, len, ZeroFlags::default()).await?;
            }
            how if how == mode::PUNCH_HOLE | mode::KEEP_SIZE => {
                // Zeroes may be written at the ends, where less than a unit of the format is punched, but not instead of it.
                let slow = self.disk().facts().zero == Support::None;
                let flags = ZeroFlags { may_unmap: true, no_fallback: slow, ..ZeroFlags::default() };
                self.zero(at, len, flags).await?;
            }
            how if how & !mode::KEEP_SIZE == mode::ZERO_RANGE => {
                if how & mode::KEEP_SIZE == 0 && end > self.size() {
                    self.grow(end).await?;
                }
                self.zero(at, len, ZeroFlags::default()).await?;
            }
            _ => return Err(Errno::ENOTSUP),
        }
        self.touch();
        Ok(())
    }

    /// What the file has of a range becomes zero; `EIO` where it has nothing and does not end.
    async fn zero(&self, at: u64, len: u64, flags: ZeroFlags) -> IoResult {
        let left = self.size().checked_sub(at).ok_or(Errno::EIO)?;
        let len = len.min(left);
        if len == 0 { Ok(()) } else { self.disk().zero(Span::new(at, len), flags).await }
    }

    /// The next byte from `at` that is data, or in a hole.
    pub(crate) async fn seek(&self, at: u64, whence: u32) -> IoResult<u64> {
        let wants_data = match whence {
            SEEK_DATA => true,
            SEEK_HOLE => false,
            _ => return Err(Errno::EINVAL),
        };
        let size = self.size();
        let mut here = at;
        while here < size {
            let status = self.disk().status(Span::new(here, size - here)).await?;
            if status.data == wants_data {
                return Ok(here);
            }
            here = here.saturating_add(status.len.max(1));
        }
        // At the end there is an imaginary hole, if one asks from before it.
        if wants_data || at > size { Err(Errno::ENXIO) } else { Ok(size) }
    }
}

/// The type of the file, in its mode.
fn regular_file() -> u32 {
    nix::sys::stat::SFlag::S_IFREG.bits()
}
