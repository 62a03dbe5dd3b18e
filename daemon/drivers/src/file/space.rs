//! Space: zeroes without data, discards, holes, and the length.

use super::{FileDriver, Medium, can, cannot};
use block::driver::Prealloc;
use block::{Errno, IoResult, Mapping, Span, ZeroFlags};
use buf::IoBuf;
use io::{AllocMode, Extent, File, OpenHow};
use qapi::{Error, Result};
use std::io as stdio;
use std::sync::atomic::Ordering;

/// Unit in which holes and data are told apart, in bytes: no user addresses less.
const SECTOR: u64 = 512;
/// Bytes written at once by `preallocation=full`.
const FILL: usize = 1 << 20;

/// What the kernel answers when a file or device cannot do something at all.
fn is_unable(errno: Errno) -> bool {
    matches!(errno, Errno::ENOTSUP | Errno::ENOSYS | Errno::ENOTTY | Errno::ENODEV)
}

impl FileDriver {
    /// Zeroes without data, or `ENOTSUP`.
    pub(super) async fn write_zeroes(&self, file: &File, span: Span, flags: ZeroFlags) -> IoResult {
        match self.medium {
            Medium::Regular => self.zero_file(file, span, flags).await,
            Medium::Block(_) => self.zero_device(file, span, flags).await,
            Medium::Char | Medium::Drive => Err(Errno::ENOTSUP),
        }
    }

    async fn zero_file(&self, file: &File, span: Span, flags: ZeroFlags) -> IoResult {
        // A punched hole does not make the file longer, so only what is inside may be punched.
        let inside = span.end() <= self.end.load(Ordering::Relaxed);
        if flags.may_unmap && inside && self.punch(file, span).await? {
            return Ok(());
        }
        if can(&self.able.zero_range) {
            match file.allocate(AllocMode::ZeroRange, span.at, span.len).await {
                Ok(()) => {
                    self.reached(span.end());
                    return Ok(());
                }
                Err(errno) if is_unable(errno) => cannot(&self.able.zero_range),
                // Some file systems take only ranges of whole blocks.
                Err(Errno::EINVAL) => return Err(Errno::ENOTSUP),
                Err(errno) => return Err(errno),
            }
        }
        // To give the space again after the hole is not always faster than writing, so not for who asks for fast.
        if !flags.no_fallback && inside && self.punch(file, span).await? {
            return match file.allocate(AllocMode::AllocateKeepSize, span.at, span.len).await {
                // The bytes are zeroes already; that their space is not reserved is no reason to write them.
                Err(errno) if is_unable(errno) => Ok(()),
                other => other,
            };
        }
        Err(Errno::ENOTSUP)
    }

    async fn zero_device(&self, file: &File, span: Span, flags: ZeroFlags) -> IoResult {
        // On a device the kernel unmaps or uses the device's own command, and fails where it would have to write.
        if flags.may_unmap && self.punch(file, span).await? {
            return Ok(());
        }
        // BLKZEROOUT writes where the device has no command for it: that is the slow way.
        if flags.no_fallback || !can(&self.able.zero_out) {
            return Err(Errno::ENOTSUP);
        }
        match file.block_zero_out(span.at, span.len).await {
            Err(errno) if is_unable(errno) => {
                cannot(&self.able.zero_out);
                Err(Errno::ENOTSUP)
            }
            other => other,
        }
    }

    /// Punches a hole; false if the file cannot.
    async fn punch(&self, file: &File, span: Span) -> IoResult<bool> {
        if !can(&self.able.punch) {
            return Ok(false);
        }
        match file.allocate(AllocMode::PunchHole, span.at, span.len).await {
            Ok(()) => Ok(true),
            Err(errno) if is_unable(errno) => {
                cannot(&self.able.punch);
                Ok(false)
            }
            Err(Errno::EINVAL) => Ok(false),
            Err(errno) => Err(errno),
        }
    }

    /// A discard, or `ENOTSUP`.
    pub(super) async fn give_back(&self, file: &File, span: Span) -> IoResult {
        if !can(&self.able.discard) {
            return Err(Errno::ENOTSUP);
        }
        let result = match self.medium {
            Medium::Regular => file.allocate(AllocMode::PunchHole, span.at, span.len).await,
            Medium::Block(_) => file.block_discard(span.at, span.len).await,
            Medium::Char | Medium::Drive => Err(Errno::ENOTSUP),
        };
        match result {
            Err(errno) if is_unable(errno) => {
                cannot(&self.able.discard);
                Err(Errno::ENOTSUP)
            }
            other => other,
        }
    }

    /// Data or hole, as the file system knows it now; nothing is remembered that a later write could make wrong.
    pub(super) async fn find_extent(&self, file: &File, span: Span, precise: bool) -> IoResult<Mapping> {
        let data = |len: u64| Mapping::data(len.min(span.len), span.at);
        if !precise || !matches!(self.medium, Medium::Regular) {
            return Ok(data(span.len));
        }
        let unit = u64::from(self.settings().align.offset).max(SECTOR);
        let extent = file.extent_at(span.at).await.map_err(|e| e.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?;
        Ok(match extent {
            Extent::Unknown => data(span.len),
            // After the end of the file, in the sector that it ends in or because it was cut: zeroes.
            Extent::End => Mapping::hole(span.len, span.at),
            // A unit that has any data is data.
            Extent::Data(end) => data(end.checked_next_multiple_of(unit).unwrap_or(u64::MAX) - span.at),
            Extent::Hole(end) if end >= span.end() => Mapping::hole(span.len, span.at),
            Extent::Hole(end) => match (end - end % unit).saturating_sub(span.at) {
                0 => data(unit - span.at % unit),
                len => Mapping::hole(len, span.at),
            },
        })
    }

    pub(super) async fn current_length(&self) -> stdio::Result<u64> {
        let file = self.file().map_err(stdio::Error::from)?;
        match self.medium {
            Medium::Regular => Ok(file.stat().await?.size),
            Medium::Block(_) => file.block_device_size().await,
            // A device that cannot seek has no length.
            Medium::Char => Ok(file.seek_end().await.unwrap_or(0)),
            // Without a medium there is nothing; the length is looked at again with each change of the node.
            Medium::Drive if file.has_disc().await => Ok(file.seek_end().await?),
            Medium::Drive => Ok(0),
        }
    }

    pub(super) async fn set_length(&self, size: u64, exact: bool, prealloc: Prealloc) -> Result<()> {
        let now = self.current_length().await.map_err(|e| Error::io("Could not get the length", e))?;
        if !matches!(self.medium, Medium::Regular) {
            if prealloc != Prealloc::Off {
                return Err(Error::generic(format!(
                    "Preallocation mode '{}' unsupported for this non-regular file",
                    prealloc_name(prealloc)
                )));
            }
            return if size > now {
                Err(Error::generic("Cannot grow device files"))
            } else if size < now && exact {
                Err(Error::generic("Cannot resize device files"))
            } else {
                Ok(())
            };
        }
        if prealloc == Prealloc::Metadata {
            return Err(Error::generic("Unsupported preallocation mode 'metadata'"));
        }
        if prealloc != Prealloc::Off && size < now {
            return Err(Error::generic("Preallocation can't be used for shrinking files"));
        }
        let file = self.file().map_err(|e| Error::io("Could not resize file", e.into()))?;
        if let Err(error) = self.grow_or_cut(&file, now, size, prealloc).await {
            // As it was before; if that fails too, the node finds out the length that it has now.
            let _ = file.set_len(now).await;
            return Err(error);
        }
        self.end.store(size, Ordering::Relaxed);
        Ok(())
    }

    async fn grow_or_cut(&self, file: &File, now: u64, size: u64, prealloc: Prealloc) -> Result<()> {
        if prealloc == Prealloc::Falloc && size > now {
            let done = file.allocate(AllocMode::Allocate, now, size - now).await;
            return done.map_err(|e| Error::io("Could not preallocate data", e.into()));
        }
        file.set_len(size).await.map_err(|e| Error::io("Could not resize file", e))?;
        if prealloc == Prealloc::Full && size > now {
            self.fill(file, now, size).await?;
        }
        Ok(())
    }

    /// Writes zeroes from `from` to `to`, past a cache that may ask for alignment.
    async fn fill(&self, file: &File, from: u64, to: u64) -> Result<()> {
        let failed = |e: Errno| Error::io("Could not write zeros for preallocation", e.into());
        let buffered;
        let file = if file.is_direct() {
            let how = OpenHow { access: io::Access::ReadWrite, direct: false, engine: self.engine };
            buffered = file.reopen(how).await.map_err(|e| Error::io("Could not write zeros for preallocation", e))?;
            &buffered
        } else {
            file
        };
        let zeroes = IoBuf::zeroed(FILL);
        let mut at = from;
        while at < to {
            let piece = zeroes.slice(0, usize::try_from(to - at).unwrap_or(usize::MAX));
            file.write_at(at, &piece, false).await.map_err(failed)?;
            at += u64::try_from(piece.len()).unwrap_or(u64::MAX);
        }
        self.sync(file).await.map_err(|e| Error::io("Could not flush file to disk", e.into()))
    }
}

fn prealloc_name(prealloc: Prealloc) -> &'static str {
    match prealloc {
        Prealloc::Off => "off",
        Prealloc::Metadata => "metadata",
        Prealloc::Falloc => "falloc",
        Prealloc::Full => "full",
    }
}
