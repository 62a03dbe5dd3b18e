//! `raw`: an image without format, or a part of one: the bytes of a child, shifted and cut.
//!
//! The child does the work: it is asked for the same request at another offset, through its node, which checks alignment
//! and emulates what its driver lacks.

use crate::filter::{self, len_of};
use arc_swap::ArcSwap;
use block::driver::{LocalFuture, Prealloc};
use block::perm::Bits;
use block::reopen::{NewOptions, Prepared, Reopen};
use block::reservation::Reservations;
use block::{
    BlkdebugEvent, Driver, Edge, Errno, Facts, IoResult, Mapping, OpenContext, Perms, Role, Span, WriteFlags, ZeroFlags,
};
use buf::IoBuf;
use qapi::types::block::{BlockdevDriverOptions, BlockdevOptionsRaw};
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
    /// Replaced by the control task, while nothing is in flight.
    window: ArcSwap<Window>,
}

/// The part of the child that is the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Window {
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
    Window::asked(options)?;
    let file = cx.child("file", Role::Filtered, &options.file).await?;
    let window = Window::new(options, file.size())?;
    Ok(Raw { file, window: ArcSwap::from_pointee(window) })
}

impl Window {
    /// What the options ask for.
    fn asked(options: &BlockdevOptionsRaw) -> Result<Self> {
        let offset = positive("offset", options.offset)?;
        let size = positive("size", options.size)?;
        Ok(Self { offset: offset.unwrap_or(0), size, named_offset: offset.is_some() })
    }

    /// The same, if a child of `real` bytes has it.
    fn new(options: &BlockdevOptionsRaw, real: u64) -> Result<Self> {
        let window = Self::asked(options)?;
        let start = window.offset;
        if start > real {
            return Err(Error::generic(format!(
                "Offset ({start}) cannot be greater than size of the containing file ({real})"
            )));
        }
        if let Some(size) = window.size {
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
        Ok(window)
    }
}

/// A window that waits to be put in force.
struct Waiting<'a> {
    raw: &'a Raw,
    window: Window,
}

impl Reopen for Raw {
    fn mutable(&self) -> &'static [&'static str] {
        &["offset", "size"]
    }

    fn prepare<'a>(&'a self, new: &'a NewOptions<'_>) -> LocalFuture<'a, Result<Box<dyn Prepared + 'a>>> {
        Box::pin(async move {
            let (BlockdevDriverOptions::Raw(options), Some(child)) = (new.driver, new.child("file")) else {
                return Err(Error::generic("These are not the options of a raw node"));
            };
            let window = Window::new(options, child.size())?;
            let waiting: Box<dyn Prepared + 'a> = Box::new(Waiting { raw: self, window });
            Ok(waiting)
        })
    }
}

impl Prepared for Waiting<'_> {
    fn commit(self: Box<Self>) {
        self.raw.window.store(Arc::new(self.window));
    }
}

fn positive(name: &str, value: Option<i64>) -> Result<Option<u64>> {
    let out_of_range = |value: i64| Error::generic(format!("Value '{value}' is out of range for parameter '{name}'"));
    value.map(|value| u64::try_from(value).map_err(|_| out_of_range(value))).transpose()
}

impl Raw {
    fn window(&self) -> Window {
        **self.window.load()
    }

    /// The child's offset of a request; the end is checked too where the size is fixed.
    fn shift(&self, at: u64, len: u64, beyond: Errno) -> IoResult<u64> {
        let window = self.window();
        let inside = window.size.is_none_or(|size| at.checked_add(len).is_some_and(|end| end <= size));
        match at.checked_add(window.offset) {
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
        let aligned = self.window().offset.is_multiple_of(u64::from(child.request_align));
        let request_align = if aligned { child.request_align } else { 1 };
        Facts { request_align, complete: child.complete, ..filter::facts(&self.file) }
    }

    fn filename(&self) -> String {
        let window = self.window();
        if window.size.is_none() && !window.named_offset {
            return self.file.node().driver().filename();
        }
        let offset = window.named_offset.then(|| ("offset", window.offset.into()));
        let size = window.size.map(|size| ("size", size.into()));
        let options: Vec<_> = offset.into_iter().chain(size).collect();
        filter::describe("raw", &options, &[("file", &self.file)])
    }

    async fn length(&self) -> IoResult<u64> {
        let window = self.window();
        Ok(match window.size {
            Some(size) => size,
            None => self.file.size().saturating_sub(window.offset),
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
        let window = self.window();
        if window.size.is_some() {
            return Err(Error::generic("Cannot resize fixed-size raw disks"));
        }
        match size.checked_add(window.offset) {
            Some(below) if below <= MAX_LENGTH => self.file.truncate(below, exact, prealloc).await,
            Some(below) => Err(Error::generic(format!("offset({below}) exceeds maximum({MAX_LENGTH})"))),
            None => Err(Error::generic("Disk size too large for the chosen offset")),
        }
    }

    fn reopen(&self) -> Option<&dyn Reopen> {
        Some(self)
    }

    /// A part of a medium has none of its own.
    fn reservations(&self) -> Option<&dyn Reservations> {
        let window = self.window();
        if window.offset == 0 && window.size.is_none() { Some(&*self.file) } else { None }
    }

    /// As its users, but the length stays while there are any: the window was checked against it.
    fn child_perms(&self, _child: &Edge, of_node: Perms) -> Perms {
        if of_node == Perms::default() {
            return of_node;
        }
        Perms { need: of_node.need | Bits::CONSISTENT_READ, shared: of_node.shared & !Bits::RESIZE }
    }
}
