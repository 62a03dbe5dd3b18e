//! `raw`: an image without format, or a part of one: the bytes of a child, shifted and cut.
//!
//! The child does the work: it is asked for the same request at another offset, through its node, which checks alignment
//! and emulates what its driver lacks.

use crate::filter::{self, len_of};
use block::driver::Prealloc;
use block::perm::Bits;
use block::reservation::Reservations;
use block::{
    BlkdebugEvent, Driver, Edge, Errno, Facts, IoResult, Mapping, OpenContext, Perms, Role, Span, WriteFlags, ZeroFlags,
};
use buf::IoBuf;
use qapi::types::block::BlockdevOptionsRaw;
use qapi::{Error, Result};
use std::sync::Arc;

/// Unit of `size`, in bytes.
const SECTOR: u64 = 512;
/// The greatest length in bytes that messages name.
const MAX_LENGTH: u64 = block::node::MAX_LENGTH;

/// An image without format.
#[derive(Debug)]
pub struct Raw {
    file: Arc<Edge>,
    offset: u64,
    /// Set if the user fixed it, in bytes.
    size: Option<u64>,
    /// Whether the user gave an offset, even of 0.
    named_offset: bool,
}

/// Opens the child and checks the window on it.
///
/// # Errors
/// Those of the child; a window that does not fit into it.
pub async fn open(cx: &mut OpenContext<'_>, options: &BlockdevOptionsRaw) -> Result<Raw> {
    let offset = positive("offset", options.offset)?;
    let size = positive("size", options.size)?;
    let file = cx.child("file", Role::Filtered, &options.file).await?;
    let real = file.size();
    let start = offset.unwrap_or(0);
    if start > real {
        return Err(Error::generic(format!(
            "Offset ({start}) cannot be greater than size of the containing file ({real})"
        )));
    }
    if let Some(size) = size {
        if real - start < size {
            return Err(Error::generic(format!(
                "The sum of offset ({start}) and size ({size}) has to be smaller or equal to the  actual size of the \
                 containing file ({real})"
            )));
        }
        if !size.is_multiple_of(SECTOR) {
            return Err(Error::generic(format!("Specified size is not multiple of {SECTOR}")));
        }
    }
    Ok(Raw { file, offset: start, size, named_offset: offset.is_some() })
}

fn positive(name: &str, value: Option<i64>) -> Result<Option<u64>> {
    let out_of_range = |value: i64| Error::generic(format!("Value '{value}' is out of range for parameter '{name}'"));
    value.map(|value| u64::try_from(value).map_err(|_| out_of_range(value))).transpose()
}

impl Raw {
    /// The child's offset of a request; the end is checked too where the size is fixed.
    fn shift(&self, at: u64, len: u64, beyond: Errno) -> IoResult<u64> {
        let inside = self.size.is_none_or(|size| at.checked_add(len).is_some_and(|end| end <= size));
        match at.checked_add(self.offset) {
            Some(shifted) if inside => Ok(shifted),
            _ => Err(beyond),
        }
    }

    fn shift_span(&self, span: Span) -> IoResult<Span> {
        Ok(Span::new(self.shift(span.at, span.len, Errno::ENOSPC)?, span.len))
    }
}

impl Driver for Raw {
    fn name(&self) -> &'static str {
        "raw"
    }

    fn facts(&self) -> Facts {
        let child = self.file.facts();
        // An offset off the child's units would make what is aligned here unaligned there; the child's node copes.
        let aligned = self.offset.is_multiple_of(u64::from(child.request_align));
        Facts { request_align: if aligned { child.request_align } else { 1 }, ..filter::facts(&self.file) }
    }

    fn filename(&self) -> String {
        if self.size.is_none() && !self.named_offset {
            return self.file.node().driver().filename();
        }
        let offset = self.named_offset.then(|| ("offset", self.offset.into()));
        let size = self.size.map(|size| ("size", size.into()));
        let options: Vec<_> = offset.into_iter().chain(size).collect();
        filter::describe("raw", &options, &[("file", &self.file)])
    }

    async fn length(&self) -> IoResult<u64> {
        Ok(match self.size {
            Some(size) => size,
            None => self.file.size().saturating_sub(self.offset),
        })
    }

    async fn allocated_size(&self) -> Option<u64> {
        self.file.node().driver().allocated_size().await
    }

    async fn read(&self, at: u64, buf: &IoBuf) -> IoResult {
        let at = self.shift(at, len_of(buf), Errno::EINVAL)?;
        self.file.raise(BlkdebugEvent::ReadAio);
        self.file.read(at, buf).await
    }

    async fn write(&self, at: u64, buf: &IoBuf, flags: WriteFlags) -> IoResult {
        let at = self.shift(at, len_of(buf), Errno::ENOSPC)?;
        self.file.raise(BlkdebugEvent::WriteAio);
        self.file.write(at, buf, flags).await
    }

    async fn flush(&self) -> IoResult {
        self.file.flush().await
    }

    async fn zero(&self, span: Span, flags: ZeroFlags) -> IoResult {
        self.file.zero(self.shift_span(span)?, flags).await
    }

    async fn discard(&self, span: Span) -> IoResult {
        self.file.discard(self.shift_span(span)?).await
    }

    async fn map(&self, span: Span, _precise: bool) -> IoResult<Mapping> {
        let at = self.shift(span.at, 0, Errno::EINVAL)?;
        Ok(Mapping::forward(span.len, Arc::clone(&self.file), at))
    }

    async fn truncate(&self, size: u64, exact: bool, prealloc: Prealloc) -> Result<()> {
        if self.size.is_some() {
            return Err(Error::generic("Cannot resize fixed-size raw disks"));
        }
        match size.checked_add(self.offset) {
            Some(below) if below <= MAX_LENGTH => self.file.truncate(below, exact, prealloc).await,
            Some(below) => Err(Error::generic(format!("offset({below}) exceeds maximum({MAX_LENGTH})"))),
            None => Err(Error::generic("Disk size too large for the chosen offset")),
        }
    }

    /// A part of a medium has none of its own.
    fn reservations(&self) -> Option<&dyn Reservations> {
        if self.offset == 0 && self.size.is_none() { Some(&*self.file) } else { None }
    }

    /// As its users, but the length stays while there are any: the window was checked against it.
    fn child_perms(&self, _child: &Edge, of_node: Perms) -> Perms {
        if of_node == Perms::default() {
            return of_node;
        }
        Perms { need: of_node.need | Bits::CONSISTENT_READ, shared: of_node.shared & !Bits::RESIZE }
    }
}
