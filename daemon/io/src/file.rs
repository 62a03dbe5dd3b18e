//! Files and block devices: whole-buffer reads and writes, flushes, and what the control path asks about them.
//!
//! A [`File`] may be used from any thread; each call goes through the ring of the thread that makes it, or through its
//! pool. Nothing blocks the event loop. Buffers and the descriptor are owned by the operation (law 1).
//!
//! Reads and writes try the page cache first (RWF_NOWAIT): a hit costs one system call and no hand-over. Whether that
//! works on a file, and whether it is worth trying, is learned. Where it does not work for writes, whole pages go to the
//! file's [`Writer`].

use crate::fd::Fd;
use crate::ring::{Request, SyncKind, WriteThrough, iovecs, rw_flags};
use crate::writer::Writer;
use crate::{pool, thread};
use buf::IoBuf;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag};
use nix::sys::stat::{Mode, SFlag};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// How the blocking part of a file's I/O is done (`aio`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// On the thread pool of the IOThread.
    Threads,
    /// On the io_uring of the IOThread; on its pool where it has none.
    Ring,
}

/// Access mode of an open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Only reads.
    ReadOnly,
    /// Reads and writes.
    ReadWrite,
}

/// How to open a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenHow {
    /// Access mode.
    pub access: Access,
    /// Bypass the page cache (O_DIRECT, `cache.direct`).
    pub direct: bool,
    /// Engine for what can block.
    pub engine: Engine,
}

/// What kind of file it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A regular file.
    Regular,
    /// A block device.
    Block,
    /// A character device.
    Char,
    /// A pipe or a socket: to open or read one may wait for ever.
    Pipe,
    /// Anything else: a directory.
    Other,
}

/// What fstat(2) says of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileStat {
    /// Kind of file.
    pub kind: FileKind,
    /// Length of a regular file in bytes; 0 for devices.
    pub size: u64,
    /// Allocated bytes.
    pub allocated: u64,
    /// Preferred block size in bytes.
    pub block_size: u64,
    /// Device number of a device file, zero otherwise.
    pub rdev: u64,
}

/// Misses of the page cache in a row after which it is tried less often.
const MISSES: u32 = 16;
/// The count of misses where RWF_NOWAIT does not work.
const NEVER: u32 = u32::MAX;
/// A cached write of whole pages never waits for a read.
const PAGE: u64 = 4096;

/// What was learned about trying the page cache: misses in a row, or NEVER. A hint, so unordered.
#[derive(Default)]
struct Luck(AtomicU32);

impl Luck {
    fn worth_trying(&self) -> bool {
        let misses = self.0.load(Ordering::Relaxed);
        if misses < MISSES {
            return true;
        }
        if misses == NEVER {
            return false;
        }
        // Count on, so that one in so many looks again. Stays far from NEVER.
        self.0.store(MISSES + (misses + 1 - MISSES) % MISSES, Ordering::Relaxed);
        misses == MISSES
    }

    /// Learns from the result of a try, and says what it means. No bytes moved, at the end of the file, is left to the
    /// caller's ordinary way to find out.
    fn learn(&self, result: Result<usize, Errno>) -> Result<Cached, Errno> {
        let result = match result {
            Ok(0) | Err(Errno::EAGAIN | Errno::EINTR) => Ok(Cached::Miss),
            Ok(n) => Ok(Cached::Bytes(n)),
            Err(Errno::EOPNOTSUPP | Errno::EINVAL | Errno::ENOSYS) => {
                self.0.store(NEVER, Ordering::Relaxed);
                return Ok(Cached::Miss);
            }
            Err(e) => Err(e),
        };
        let misses = self.0.load(Ordering::Relaxed);
        match result {
            Ok(Cached::Miss) if misses < MISSES => self.0.store(misses + 1, Ordering::Relaxed),
            Ok(Cached::Bytes(_)) | Err(_) if misses != 0 => self.0.store(0, Ordering::Relaxed),
            _ => {}
        }
        result
    }
}

/// An open file or device.
pub struct File {
    pub(crate) fd: Arc<Fd>,
    engine: Engine,
    access: Access,
    direct: bool,
    /// Operations that are handed to the kernel at once at most; 0 for as many as there are.
    max_batch: u32,
    read_luck: Luck,
    write_luck: Luck,
    writer: Arc<Writer>,
}

impl std::fmt::Debug for File {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("File")
            .field("fd", &self.fd.raw())
            .field("engine", &self.engine)
            .field("access", &self.access)
            .field("direct", &self.direct)
            .finish_non_exhaustive()
    }
}

/// What the page cache took or had at once.
enum Cached {
    Bytes(usize),
    Miss,
}

impl OpenHow {
    /// The access mode and O_DIRECT, as open(2) takes them.
    pub fn flags(self) -> OFlag {
        let access = match self.access {
            Access::ReadOnly => OFlag::O_RDONLY,
            Access::ReadWrite => OFlag::O_RDWR,
        };
        if self.direct { access | OFlag::O_DIRECT } else { access }
    }
}

impl File {
    /// Opens `path`, off the event loop. The descriptor is closed on exec.
    ///
    /// # Errors
    /// What open(2) says.
    pub async fn open(path: &Path, how: OpenHow) -> io::Result<Self> {
        Self::open_with(path, how, OFlag::empty()).await
    }

    /// Opens a drive, also one without a medium (O_NONBLOCK).
    ///
    /// # Errors
    /// What `open` says.
    pub async fn open_drive(path: &Path, how: OpenHow) -> io::Result<Self> {
        Self::open_with(path, how, OFlag::O_NONBLOCK).await
    }

    async fn open_with(path: &Path, how: OpenHow, more: OFlag) -> io::Result<Self> {
        let path: PathBuf = path.to_owned();
        let flags = more | OFlag::O_CLOEXEC | how.flags();
        let fd = pool::blocking(move || nix::fcntl::open(&path, flags, Mode::empty())).await??;
        Self::from_fd(fd, how.engine)
    }

    /// Takes over an open descriptor; access mode and O_DIRECT are taken from it.
    ///
    /// # Errors
    /// The descriptor was opened for writing only.
    pub fn from_fd(fd: OwnedFd, engine: Engine) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(nix::fcntl::fcntl(&fd, FcntlArg::F_GETFL)?);
        let access = match flags & OFlag::O_ACCMODE {
            OFlag::O_RDONLY => Access::ReadOnly,
            OFlag::O_RDWR => Access::ReadWrite,
            _ => return Err(io::Error::new(io::ErrorKind::InvalidInput, "the descriptor cannot be read")),
        };
        let direct = flags.contains(OFlag::O_DIRECT);
        // With O_DIRECT there is no cache to hit, and the ring batches better than a call for each read.
        let luck = || Luck(AtomicU32::new(if direct { NEVER } else { 0 }));
        Ok(Self {
            fd: Arc::new(Fd::new(fd)),
            engine,
            access,
            direct,
            max_batch: 0,
            read_luck: luck(),
            write_luck: luck(),
            writer: Arc::default(),
        })
    }

    /// Opens the same file once more, also if it was renamed or unlinked since.
    ///
    /// # Errors
    /// What open(2) says, with the permissions of the process as they are now; /proc is needed.
    pub async fn reopen(&self, how: OpenHow) -> io::Result<Self> {
        let mut file = Self::open(Path::new(&format!("/proc/self/fd/{}", self.fd.raw())), how).await?;
        file.max_batch = self.max_batch;
        Ok(file)
    }

    /// Limits the operations on this file that are handed to the ring's kernel side at once (`aio-max-batch`); 0 is no limit.
    pub fn set_max_batch(&mut self, max: u32) {
        self.max_batch = max;
    }

    /// That limit.
    pub fn max_batch(&self) -> u32 {
        self.max_batch
    }

    /// Access mode.
    pub fn access(&self) -> Access {
        self.access
    }

    /// Whether the page cache is bypassed.
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// Which engine does what can block.
    pub fn engine(&self) -> Engine {
        self.engine
    }

    /// Reads into all of `buf` from byte `at`. Returns the bytes that the file had; those after its end read as zeroes.
    ///
    /// # Errors
    /// What the kernel says; some of the buffer may have been filled then.
    pub async fn read_at(&self, at: u64, buf: &IoBuf) -> Result<usize, Errno> {
        let total = buf.len();
        check_range(at, total)?;
        let mut done = 0;
        if self.read_luck.worth_trying() {
            match self.read_luck.learn(preadv2(&self.fd, buf, at, libc::RWF_NOWAIT))? {
                Cached::Bytes(n) => {
                    done = n;
                    // A loop over cached data must let others run now and then.
                    tokio::task::coop::consume_budget().await;
                }
                Cached::Miss => {}
            }
        }
        while done < total {
            match self.transfer(|| Request::Read(rest(buf, done), at + done as u64)).await {
                Ok(0) => break,
                Ok(n) => done += n.min(total - done),
                Err(Errno::EINTR) => continue,
                // The first part ended at the end of the file, off its blocks.
                Err(Errno::EINVAL) if self.direct && done > 0 => break,
                Err(e) => return Err(e),
            }
            // A direct read that ends off the blocks has met the end of the file; to go on from there would be an error.
            if self.direct && done % 512 != 0 {
                break;
            }
        }
        if done < total {
            buf.slice(done, total - done).fill(0);
        }
        Ok(done)
    }

    /// Writes all of `buf` at byte `at`; with `dsync` it completes when the bytes are durable.
    ///
    /// # Errors
    /// What the kernel says; some of the bytes may have been written then.
    pub async fn write_at(&self, at: u64, buf: &IoBuf, dsync: bool) -> Result<(), Errno> {
        let total = buf.len();
        check_range(at, total)?;
        let len = u64::try_from(total).unwrap_or(u64::MAX);
        let through = if dsync { WriteThrough::Yes } else { WriteThrough::No };
        let mut done = 0;
        if !dsync
            && self.write_luck.worth_trying()
            && let Cached::Bytes(n) = self.write_luck.learn(pwritev2(&self.fd, buf, at, libc::RWF_NOWAIT))?
        {
            done = n;
            tokio::task::coop::consume_budget().await;
        }
        let whole_pages = (at | len).is_multiple_of(PAGE);
        let queued = whole_pages && !dsync && !self.direct;
        while done < total {
            let request = || Request::Write(rest(buf, done), at + done as u64, through);
            let result =
                if queued { self.writer.write(&self.fd, request()).await } else { self.transfer(request).await };
            match result {
                // No file of ours takes no bytes without an error, and to try for ever would be worse.
                Ok(0) => return Err(Errno::ENOSPC),
                Ok(n) => done += n.min(total - done),
                Err(Errno::EINTR) => continue,
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Makes the data durable, and the metadata that is needed to read it (fdatasync).
    ///
    /// # Errors
    /// What the kernel says. Linux then may have dropped dirty pages: later calls may succeed without the data being there.
    pub async fn sync_data(&self) -> Result<(), Errno> {
        self.sync(SyncKind::Data).await
    }

    /// Makes the data and all metadata durable (fsync).
    ///
    /// # Errors
    /// As [`sync_data`](Self::sync_data).
    pub async fn sync_all(&self) -> Result<(), Errno> {
        self.sync(SyncKind::All).await
    }

    async fn sync(&self, kind: SyncKind) -> Result<(), Errno> {
        loop {
            match self.transfer(|| Request::Sync(kind)).await {
                Err(Errno::EINTR) => continue,
                other => return other.map(drop),
            }
        }
    }

    /// Sets the length of a regular file, in bytes.
    ///
    /// # Errors
    /// What the kernel says.
    pub async fn set_len(&self, len: u64) -> io::Result<()> {
        let len = i64::try_from(len).map_err(|_| io::Error::from(Errno::EFBIG))?;
        let fd = Arc::clone(&self.fd);
        Ok(pool::blocking(move || nix::unistd::ftruncate(&*fd, len)).await??)
    }

    /// What the file system says of the file.
    ///
    /// # Errors
    /// What fstat(2) says.
    pub async fn stat(&self) -> io::Result<FileStat> {
        let fd = Arc::clone(&self.fd);
        Ok(FileStat::of(&pool::blocking(move || nix::sys::stat::fstat(&*fd)).await??))
    }

    /// What the file system says of a path, without opening it.
    ///
    /// # Errors
    /// What stat(2) says.
    pub async fn stat_path(path: &Path) -> io::Result<FileStat> {
        let path = path.to_owned();
        Ok(FileStat::of(&pool::blocking(move || nix::sys::stat::stat(&path)).await??))
    }

    /// Drops the file's clean pages from the page cache (`drop-cache`); `len` 0 means to the end.
    ///
    /// # Errors
    /// What posix_fadvise(2) says.
    pub async fn drop_cache(&self, at: u64, len: u64) -> io::Result<()> {
        let at = i64::try_from(at).map_err(|_| io::Error::from(Errno::EINVAL))?;
        let len = i64::try_from(len).map_err(|_| io::Error::from(Errno::EINVAL))?;
        let fd = Arc::clone(&self.fd);
        let advice = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED;
        Ok(pool::blocking(move || nix::fcntl::posix_fadvise(&*fd, at, len, advice)).await??)
    }

    /// Closes the file and waits for it, if this is its last owner and no operation is under way; else it is closed when
    /// the last of them ends.
    pub async fn close(self) {
        let fd = self.fd;
        // Nothing is left to be done where not even a thread for it can be had: the descriptor is closed either way.
        let _ = pool::blocking(move || drop(fd)).await;
    }

    /// One call, on the ring or the pool; may move fewer bytes than asked.
    pub(crate) async fn transfer(&self, request: impl Fn() -> Request) -> Result<usize, Errno> {
        let request = match thread::current_ring() {
            Some(ring) if self.engine == Engine::Ring => match ring.start(&self.fd, request(), self.max_batch) {
                Ok(operation) => match operation.await {
                    // The kernel could not do it without waiting, nor find a worker to wait: a pool thread can.
                    Err(Errno::EAGAIN) => request(),
                    other => return other,
                },
                Err(refused) => refused,
            },
            _ => request(),
        };
        let fd = Arc::clone(&self.fd);
        match pool::blocking(move || request.run(&fd)).await {
            Ok(result) => result,
            Err(e) => Err(e.raw_os_error().map_or(Errno::EIO, Errno::from_raw)),
        }
    }
}

impl AsFd for File {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl FileStat {
    fn of(stat: &nix::sys::stat::FileStat) -> Self {
        let kind = match SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT {
            SFlag::S_IFREG => FileKind::Regular,
            SFlag::S_IFBLK => FileKind::Block,
            SFlag::S_IFCHR => FileKind::Char,
            SFlag::S_IFIFO | SFlag::S_IFSOCK => FileKind::Pipe,
            _ => FileKind::Other,
        };
        // The kernel hands out no negative sizes.
        let positive = |n: i64| u64::try_from(n).unwrap_or(0);
        Self {
            kind,
            size: if kind == FileKind::Regular { positive(stat.st_size) } else { 0 },
            allocated: positive(stat.st_blocks).saturating_mul(512),
            block_size: positive(stat.st_blksize),
            rdev: stat.st_rdev,
        }
    }
}

/// The kernel's offsets are signed.
fn check_range(at: u64, len: usize) -> Result<(), Errno> {
    let end = u64::try_from(len).ok().and_then(|len| at.checked_add(len));
    if end.is_none_or(|end| i64::try_from(end).is_err()) { Err(Errno::EINVAL) } else { Ok(()) }
}

impl Request {
    /// The same as a system call on a thread that may wait.
    pub(crate) fn run(self, fd: &Fd) -> Result<usize, Errno> {
        loop {
            let result = match &self {
                Self::Read(buf, at) => preadv2(fd, buf, *at, 0),
                Self::Write(buf, at, through) => pwritev2(fd, buf, *at, rw_flags(*through)),
                Self::Sync(SyncKind::Data) => nix::unistd::fdatasync(fd).map(|()| 0),
                Self::Sync(SyncKind::All) => nix::unistd::fsync(fd).map(|()| 0),
                Self::Allocate(mode, at, len) => crate::extent::fallocate(fd, *mode, *at, *len).map(|()| 0),
            };
            if result != Err(Errno::EINTR) {
                return result;
            }
        }
    }
}

/// What is left of a buffer after its first `done` bytes.
fn rest(buf: &IoBuf, done: usize) -> IoBuf {
    if done == 0 { buf.clone() } else { buf.slice(done, buf.len()) }
}

/// The kernel's result of a transfer.
fn moved(result: libc::ssize_t) -> Result<usize, Errno> {
    usize::try_from(result).map_err(|_| Errno::last())
}

fn offset(at: u64) -> Result<libc::off_t, Errno> {
    libc::off_t::try_from(at).map_err(|_| Errno::EINVAL)
}

fn preadv2(fd: &Fd, buf: &IoBuf, at: u64, flags: i32) -> Result<usize, Errno> {
    let at = offset(at)?;
    let mut segments = buf.segments();
    if let (Some(one), None) = (segments.next(), segments.next()) {
        let iov = [libc::iovec { iov_base: one.ptr.as_ptr().cast(), iov_len: one.len }];
        // SAFETY: the iovec lies on the stack and names memory that `buf` keeps valid during the call.
        return moved(unsafe { libc::preadv2(fd.raw(), iov.as_ptr(), 1, at, flags) });
    }
    let iov = iovecs(buf);
    let count = i32::try_from(iov.len()).map_err(|_| Errno::EINVAL)?;
    // SAFETY: the iovecs live until the call returns and name memory that `buf` keeps valid.
    moved(unsafe { libc::preadv2(fd.raw(), iov.as_ptr(), count, at, flags) })
}

fn pwritev2(fd: &Fd, buf: &IoBuf, at: u64, flags: i32) -> Result<usize, Errno> {
    let at = offset(at)?;
    let iov = iovecs(buf);
    let count = i32::try_from(iov.len()).map_err(|_| Errno::EINVAL)?;
    // SAFETY: the iovecs live until the call returns and name memory that `buf` keeps valid.
    moved(unsafe { libc::pwritev2(fd.raw(), iov.as_ptr(), count, at, flags) })
}
