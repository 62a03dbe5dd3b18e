//! `file`, `host_device` and `host_cdrom`: a regular file, a block or character device, or a drive, of this host.
//!
//! The driver owns the open file, its image locks and what was learned about it. The file may be replaced by another
//! opening of itself when write permission comes or goes (`auto-read-only`): requests hold the one that they started with.
//!
//! | module | what |
//! | --- | --- |
//! | [`open`](self) | options, opening, checks |
//! | `permissions` | locks and reopening as users come and go |
//! | `reopen` | options that change |
//! | `reservation` | persistent reservations, by the kernel or a manager |
//! | `space` | zeroes, discards, holes, lengths |

mod create;
mod open;
mod permissions;
mod reopen;
mod reservation;
mod space;

pub use create::create;
pub use open::{open_cdrom, open_device, open_regular};

use arc_swap::{ArcSwap, ArcSwapOption};
use block::driver::Prealloc;
use block::reopen::Reopen;
use block::reservation::{ManagerUse, Reservations};
use block::{
    Driver, Errno, Facts, ImageDetails, IoResult, Mapping, NodeOptions, Perms, Span, Support, WriteFlags, ZeroFlags,
};
use buf::IoBuf;
use io::{BlockDevice, DirectAlign, Engine, File};
use permissions::Locks;
use qapi::types::block::BlockdevOptionsFile;
use qapi::types::block_query::{
    BlockStatsSpecificFile, BlockStatsSpecificVariant, ImageInfoSpecificFile, ImageInfoSpecificFileWrapper,
    ImageInfoSpecificVariant,
};
use qapi::{Error, Result, Size};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What is behind the name.
#[derive(Clone, Copy, Debug)]
enum Medium {
    Regular,
    Block(BlockDevice),
    Char,
    /// A drive, which may have no medium.
    Drive,
}

/// When the file is open for writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Writing {
    Never,
    Always,
    /// While a user has permission to write.
    WhenNeeded,
}

/// What options say that can change while the file is open.
#[derive(Clone, Copy, Debug)]
struct Settings {
    writing: Writing,
    force_share: bool,
    direct: bool,
    /// The page cache is dropped when another host may have changed the file.
    drop_cache: bool,
    /// And it is an error if anything stays there.
    check_dropped: bool,
    align: DirectAlign,
}

impl Settings {
    fn new(node: &NodeOptions, options: &BlockdevOptionsFile, align: DirectAlign) -> Self {
        let writing = match (node.read_only, node.auto_read_only) {
            (true, _) => Writing::Never,
            (false, false) => Writing::Always,
            (false, true) => Writing::WhenNeeded,
        };
        Self {
            writing,
            force_share: node.force_share,
            direct: node.direct,
            drop_cache: options.drop_cache,
            check_dropped: options.x_check_cache_dropped,
            align,
        }
    }
}

/// What the file has not been found unable to do. Hints that only ever turn off, so unordered.
#[derive(Debug)]
struct Able {
    punch: AtomicBool,
    zero_range: AtomicBool,
    zero_out: AtomicBool,
    discard: AtomicBool,
    dsync: AtomicBool,
}

impl Default for Able {
    fn default() -> Self {
        let yes = || AtomicBool::new(true);
        Self { punch: yes(), zero_range: yes(), zero_out: yes(), discard: yes(), dsync: yes() }
    }
}

/// Counts of discards; unordered, as all counters.
#[derive(Debug, Default)]
struct Discards {
    ok: AtomicU64,
    failed: AtomicU64,
    bytes: AtomicU64,
}

impl Discards {
    fn count(&self, bytes: u64, ok: bool) {
        if ok {
            self.ok.fetch_add(1, Ordering::Relaxed);
            self.bytes.fetch_add(bytes, Ordering::Relaxed);
        } else {
            self.failed.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn read(&self) -> BlockStatsSpecificFile {
        BlockStatsSpecificFile {
            discard_nb_ok: self.ok.load(Ordering::Relaxed),
            discard_nb_failed: self.failed.load(Ordering::Relaxed),
            discard_bytes_ok: self.bytes.load(Ordering::Relaxed),
        }
    }
}

fn can(flag: &AtomicBool) -> bool {
    flag.load(Ordering::Relaxed)
}

fn cannot(flag: &AtomicBool) {
    flag.store(false, Ordering::Relaxed);
}

/// A file or device of this host.
#[derive(Debug)]
pub struct FileDriver {
    name: &'static str,
    filename: String,
    medium: Medium,
    engine: Engine,
    /// `aio=native` was asked for.
    native: bool,
    /// Bytes; asked for once, for queries.
    extent_size_hint: Option<u32>,
    /// Replaced with `file`, by the control task.
    settings: ArcSwap<Settings>,
    /// None once closed.
    file: ArcSwapOption<File>,
    /// Guards the locks held and prepared. Control task only, never across an await.
    locks: Mutex<Locks>,
    able: Able,
    discards: Discards,
    /// Lower bound of a regular file's length in bytes, unless somebody else cuts it.
    end: AtomicU64,
    /// The errno of the first flush that failed, 0 if none did. The kernel may have dropped the pages that it could not
    /// write and says so once; nobody may believe a later success.
    lost: AtomicI32,
    /// `pr-manager`.
    manager: Option<ManagerUse>,
    /// The sets of descriptors, if the file came out of one, and what keeps that set.
    passed: Option<(io::FdSets, Option<io::FdSetUse>)>,
}

impl FileDriver {
    /// The file, for one request.
    fn file(&self) -> IoResult<Arc<File>> {
        self.file.load_full().ok_or(Errno::ENOMEDIUM)
    }

    fn locks(&self) -> MutexGuard<'_, Locks> {
        self.locks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check_not_lost(&self) -> IoResult {
        match self.lost.load(Ordering::Acquire) {
            0 => Ok(()),
            errno => Err(Errno::from_raw(errno)),
        }
    }

    async fn sync(&self, file: &File) -> IoResult {
        self.check_not_lost()?;
        match file.sync_data().await {
            // Not every device knows the call; none of those has a cache.
            Err(Errno::EINVAL | Errno::ENOTSUP) if matches!(self.medium, Medium::Char) => Ok(()),
            Err(errno) => {
                // EAGAIN is ours: no thread to make the call.
                if errno != Errno::EAGAIN {
                    self.remember_loss(file, errno);
                }
                Err(errno)
            }
            Ok(()) => Ok(()),
        }
    }

    fn remember_loss(&self, file: &File, errno: Errno) {
        // With O_DIRECT there are no pages to lose.
        if !file.is_direct() {
            let _ = self.lost.compare_exchange(0, errno as i32, Ordering::AcqRel, Ordering::Acquire);
        }
    }

    /// A durable write failed: the kernel may have told us in passing, and only us, that it could not write earlier pages.
    async fn durable_write_failed(&self, file: &File, at: u64, buf: &IoBuf, errno: Errno) {
        match errno {
            // It did not get as far as writing anything.
            Errno::EAGAIN | Errno::EINVAL | Errno::EBADF | Errno::EPERM | Errno::EFBIG => {}
            // A full file system refuses an ordinary write as well, and has lost nothing.
            Errno::ENOSPC | Errno::EDQUOT if file.write_at(at, buf, false).await.is_err() => {}
            _ => self.remember_loss(file, errno),
        }
    }

    /// Bytes up to `end` are there now.
    fn reached(&self, end: u64) {
        if self.end.load(Ordering::Relaxed) < end {
            self.end.fetch_max(end, Ordering::Relaxed);
        }
    }
}

impl FileDriver {
    fn settings(&self) -> Settings {
        **self.settings.load()
    }
}

impl Driver for FileDriver {
    fn name(&self) -> &'static str {
        self.name
    }

    fn facts(&self) -> Facts {
        let (sector, io_opt, granularity) = match &self.medium {
            Medium::Block(dev) => (
                dev.logical_sector,
                dev.io_opt,
                dev.queue.discard_granularity.and_then(|bytes| u32::try_from(bytes).ok()).unwrap_or(0),
            ),
            Medium::Regular | Medium::Char | Medium::Drive => (1, 0, 0),
        };
        let align = self.settings().align;
        let native = |able: bool| if able { Support::Native } else { Support::None };
        let is_char = matches!(self.medium, Medium::Char);
        let zero = match self.medium {
            Medium::Regular => can(&self.able.punch) || can(&self.able.zero_range),
            Medium::Block(_) => can(&self.able.punch) || can(&self.able.zero_out),
            Medium::Char | Medium::Drive => false,
        };
        let granularity = if granularity.is_power_of_two() { granularity } else { 1 };
        Facts {
            request_align: align.offset,
            mem_align: align.memory,
            opt_transfer: io_opt,
            zero_align: sector.max(align.offset),
            discard_align: sector.max(granularity).max(align.offset),
            fua: native(!is_char),
            zero: native(zero),
            discard: native(!is_char && !matches!(self.medium, Medium::Drive) && can(&self.able.discard)),
            complete: true,
            ..Facts::default()
        }
    }

    fn filename(&self) -> String {
        self.filename.clone()
    }

    async fn length(&self) -> IoResult<u64> {
        self.current_length().await.map_err(|e| e.raw_os_error().map_or(Errno::EIO, Errno::from_raw))
    }

    async fn allocated_size(&self) -> Option<u64> {
        let stat = self.file().ok()?.stat().await.ok()?;
        Some(stat.allocated)
    }

    async fn image_info(&self) -> ImageDetails {
        let data = ImageInfoSpecificFile { extent_size_hint: self.extent_size_hint.map(|hint| Size(hint.into())) };
        let specific = Some(ImageInfoSpecificVariant::File(ImageInfoSpecificFileWrapper { data }));
        ImageDetails { dirty: Some(false), specific, ..ImageDetails::default() }
    }

    fn driver_stats(&self) -> Option<BlockStatsSpecificVariant> {
        let counts = self.discards.read();
        Some(match self.name {
            "file" => BlockStatsSpecificVariant::File(counts),
            _ => BlockStatsSpecificVariant::HostDevice(counts),
        })
    }

    async fn read(&self, at: u64, buf: &IoBuf) -> IoResult {
        let file = self.file()?;
        if matches!(self.medium, Medium::Drive) && !file.has_disc().await {
            return Err(Errno::ENOMEDIUM);
        }
        file.read_at(at, buf).await.map(drop)
    }

    async fn write(&self, at: u64, buf: &IoBuf, flags: WriteFlags) -> IoResult {
        let file = self.file()?;
        let dsync = flags.fua && can(&self.able.dsync);
        if flags.fua {
            self.check_not_lost()?;
        }
        match file.write_at(at, buf, dsync).await {
            Err(Errno::ENOTSUP) if dsync => {
                cannot(&self.able.dsync);
                file.write_at(at, buf, false).await?;
            }
            Err(errno) => {
                if dsync {
                    self.durable_write_failed(&file, at, buf, errno).await;
                }
                return Err(errno);
            }
            Ok(()) => {}
        }
        self.reached(at.saturating_add(u64::try_from(buf.len()).unwrap_or(u64::MAX)));
        if flags.fua && !can(&self.able.dsync) { self.sync(&file).await } else { Ok(()) }
    }

    async fn flush(&self) -> IoResult {
        self.sync(&*self.file()?).await
    }

    async fn zero(&self, span: Span, flags: ZeroFlags) -> IoResult {
        let file = self.file()?;
        self.write_zeroes(&file, span, flags).await?;
        if flags.fua { self.sync(&file).await } else { Ok(()) }
    }

    async fn discard(&self, span: Span) -> IoResult {
        let result = self.give_back(&*self.file()?, span).await;
        self.discards.count(span.len, result.is_ok());
        result
    }

    async fn map(&self, span: Span, precise: bool) -> IoResult<Mapping> {
        self.find_extent(&*self.file()?, span, precise).await
    }

    async fn truncate(&self, size: u64, exact: bool, prealloc: Prealloc) -> Result<()> {
        self.set_length(size, exact, prealloc).await
    }

    fn reservations(&self) -> Option<&dyn Reservations> {
        Some(self)
    }

    fn reopen(&self) -> Option<&dyn Reopen> {
        Some(self)
    }

    /// The pages that this host has of the file may be older than what another host has written.
    async fn activate(&self) -> Result<()> {
        let failed = |e| Error::io(format!("Could not drop the cache of '{}'", self.filename), e);
        let file = self.file().map_err(|e| Error::io(format!("'{}' is closed", self.filename), e.into()))?;
        let stat = file.stat().await.map_err(failed)?;
        self.end.store(stat.size, Ordering::Relaxed);
        let settings = self.settings();
        if settings.drop_cache && !settings.direct && !matches!(self.medium, Medium::Char) {
            // Dirty pages stay.
            self.sync(&file).await.map_err(|errno| failed(errno.into()))?;
            file.drop_cache(0, 0).await.map_err(failed)?;
            if settings.check_dropped {
                let length = self.current_length().await.map_err(failed)?;
                if file.is_cached(length).await.map_err(failed)? {
                    return Err(Error::generic("page cache still in use!"));
                }
            }
        }
        Ok(())
    }

    async fn prepare_perms(&self, new: Perms) -> Result<()> {
        self.prepare(new).await
    }

    fn commit_perms(&self) {
        self.commit();
    }

    fn abort_perms(&self) {
        self.abort();
    }

    async fn close(&self) {
        self.release_locks();
        if let Some(file) = self.file.swap(None)
            && let Some(file) = Arc::into_inner(file)
        {
            file.close().await;
        }
    }
}
