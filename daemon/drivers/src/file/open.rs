//! Opening: what the options ask for, and whether the file is what the driver is for.

use super::permissions::Locks;
use super::{Able, Discards, FileDriver, Medium, Settings};
use arc_swap::{ArcSwap, ArcSwapOption};
use block::reservation::ManagerUse;
use block::{NodeOptions, OpenContext};
use io::{Access, Engine, FdSetUse, FdSets, File, FileKind, ImageLock, IoThread, Locking, OpenHow};
use qapi::types::block::{BlockdevAioOptions, BlockdevOptionsFile, OnOffAuto};
use qapi::{Error, Result};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicI32, AtomicU64};

/// Opens a regular file (`file`).
///
/// # Errors
/// It is none, or cannot be opened; options that do not go together.
pub async fn open_regular(cx: &OpenContext<'_>, fdsets: &FdSets, options: &BlockdevOptionsFile) -> Result<FileDriver> {
    open("file", cx, fdsets, options).await
}

/// Opens a block or character device (`host_device`).
///
/// # Errors
/// It is none, or cannot be opened; options that do not go together.
pub async fn open_device(cx: &OpenContext<'_>, fdsets: &FdSets, options: &BlockdevOptionsFile) -> Result<FileDriver> {
    open("host_device", cx, fdsets, options).await
}

/// Opens a drive for compact discs (`host_cdrom`), which need not have one in it.
///
/// # Errors
/// It is no device, or cannot be opened; options that do not go together.
pub async fn open_cdrom(cx: &OpenContext<'_>, fdsets: &FdSets, options: &BlockdevOptionsFile) -> Result<FileDriver> {
    open(CDROM, cx, fdsets, options).await
}

/// The driver whose device may have no medium.
const CDROM: &str = "host_cdrom";

async fn open(
    name: &'static str,
    cx: &OpenContext<'_>,
    fdsets: &FdSets,
    options: &BlockdevOptionsFile,
) -> Result<FileDriver> {
    let manager = options.pr_manager.as_deref().map(|id| cx.reservation_manager(id)).transpose()?;
    open_path(name, &cx.options, manager, fdsets, options).await
}

/// Opens the file or device for a node with these common options.
pub(super) async fn open_path(
    name: &'static str,
    node: &NodeOptions,
    manager: Option<ManagerUse>,
    fdsets: &FdSets,
    options: &BlockdevOptionsFile,
) -> Result<FileDriver> {
    let filename = options.filename.as_str();
    if filename.is_empty() {
        return Err(Error::generic(format!("The '{name}' block driver requires a file name")));
    }
    let access = if node.read_only || node.auto_read_only { Access::ReadOnly } else { Access::ReadWrite };
    let how = OpenHow { access, direct: node.direct, engine: engine(options.aio, node.direct)? };
    let (mut file, passed) = match passed(fdsets, filename, how)? {
        Some((file, from_set)) => (checked(name, filename, file).await?, Some((fdsets.clone(), from_set))),
        None => (open_checked(name, filename, how).await?, None),
    };
    file.set_max_batch(max_batch(options.aio_max_batch)?);

    let failed = |what: &str, e| Error::io(format!("Could not {what} '{filename}'"), e);
    let stat = file.stat().await.map_err(|e| failed("look at", e))?;
    let medium = match stat.kind {
        _ if name == CDROM => Medium::Drive,
        FileKind::Block => Medium::Block(file.block_device().await.map_err(|e| failed("query", e))?),
        FileKind::Char => Medium::Char,
        _ => Medium::Regular,
    };
    let align = file.direct_align().await.map_err(|e| failed("find the alignment of direct I/O on", e))?;
    let locking = match options.locking.unwrap_or(OnOffAuto::Auto) {
        OnOffAuto::Auto => Locking::Auto,
        OnOffAuto::On => Locking::On,
        OnOffAuto::Off => Locking::Off,
    };
    let extent_size_hint = if matches!(medium, Medium::Regular) { file.extent_size_hint().await } else { None };
    let lock = ImageLock::new(&file, locking).await;
    Ok(FileDriver {
        name,
        filename: filename.to_owned(),
        medium,
        engine: how.engine,
        extent_size_hint,
        native: options.aio == Some(BlockdevAioOptions::Native),
        settings: ArcSwap::from_pointee(Settings::new(node, options, align)),
        file: ArcSwapOption::from_pointee(file),
        locks: Mutex::new(Locks::new(lock)),
        able: Able::default(),
        discards: Discards::default(),
        end: AtomicU64::new(stat.size),
        lost: AtomicI32::new(0),
        manager,
        passed,
    })
}

/// Opens the file if it is of the driver's kind.
async fn open_checked(name: &str, filename: &str, how: OpenHow) -> Result<File> {
    let path = Path::new(filename);
    let could_not = |e| Error::io(format!("Could not open '{filename}'"), e);
    // To open a pipe could wait for ever for its other end.
    if File::stat_path(path).await.map_err(could_not)?.kind == FileKind::Pipe {
        return Err(wrong_kind(name, filename));
    }
    let opened = if name == CDROM { File::open_drive(path, how).await } else { File::open(path, how).await };
    let file = match opened {
        Ok(file) => file,
        Err(e) if how.direct && e.raw_os_error() == Some(block::Errno::EINVAL as i32) => {
            return Err(match File::open(path, OpenHow { direct: false, ..how }).await {
                Ok(_) => no_direct_io(filename),
                Err(_) => could_not(e),
            });
        }
        Err(e) => return Err(could_not(e)),
    };
    checked(name, filename, file).await
}

/// The file that a client passed, if `filename` is the name of one.
pub(super) fn passed(fdsets: &FdSets, filename: &str, how: OpenHow) -> Result<Option<(File, Option<FdSetUse>)>> {
    let Some(found) = fdsets.find(Path::new(filename), how.flags()) else { return Ok(None) };
    let found = found.map_err(|error| Error::generic(error.text(filename)))?;
    let could_not = |e| Error::io(format!("Could not open '{filename}'"), e);
    Ok(Some((File::from_fd(found.fd, how.engine).map_err(could_not)?, found.from_set)))
}

/// The file if it is of the driver's kind.
async fn checked(name: &str, filename: &str, file: File) -> Result<File> {
    let could_not = |e| Error::io(format!("Could not open '{filename}'"), e);
    let kind = file.stat().await.map_err(could_not)?.kind;
    let fits = match name {
        "file" => kind == FileKind::Regular,
        _ => matches!(kind, FileKind::Block | FileKind::Char),
    };
    if fits {
        return Ok(file);
    }
    file.close().await;
    Err(wrong_kind(name, filename))
}

fn wrong_kind(name: &str, filename: &str) -> Error {
    let wanted = if name == "file" { "a regular file" } else { "either a character or block device" };
    Error::generic(format!("'{name}' driver requires '{filename}' to be {wanted}"))
}

/// The engine for `aio`: the ring for all but `threads`, as it does for both others what they are wanted for.
fn engine(aio: Option<BlockdevAioOptions>, direct: bool) -> Result<Engine> {
    match aio {
        None => Ok(Engine::Ring),
        Some(BlockdevAioOptions::Threads) => Ok(Engine::Threads),
        Some(BlockdevAioOptions::Native) if !direct => Err(native_needs_direct()),
        Some(BlockdevAioOptions::Native) => Ok(Engine::Ring),
        // Whoever asks for it by name hears if there is none.
        Some(BlockdevAioOptions::IoUring) => match IoThread::current() {
            Some(thread) => match thread.ring_error() {
                Some(e) => Err(Error::generic(format!("Unable to use linux io_uring: {}", qapi::error::errno_text(e)))),
                None => Ok(Engine::Ring),
            },
            None => Ok(Engine::Ring),
        },
    }
}

pub(super) fn native_needs_direct() -> Error {
    Error::generic("aio=native was specified, but it requires cache.direct=on, which was not specified.")
}

pub(super) fn no_direct_io(filename: &str) -> Error {
    Error::generic(format!("Could not open '{filename}': filesystem does not support O_DIRECT"))
}

fn max_batch(given: Option<i64>) -> Result<u32> {
    let max = given.unwrap_or(0);
    if max < 0 {
        return Err(Error::generic("Parameter 'aio-max-batch' expects a number of requests, or 0 for no limit"));
    }
    // More than the ring holds is no limit either.
    Ok(u32::try_from(max).unwrap_or(0))
}
