//! `copy-on-read`: what is read from a backing file is written to the node below, so that it need not be read there again.
//!
//! A copy must not take the place of what a user writes meanwhile: copies and changes of the same bytes through this node
//! are serialised, copies exclusively. Without `bottom` all that the node below does not have itself is copied; with it
//! only what lies in a layer down to `bottom`.

use crate::filter::{self, len_of};
use block::driver::Prealloc;
use block::overlap::{Overlap, Reservation};
use block::perm::Bits;
use block::reservation::Reservations;
use block::status::{self, Status};
use block::{
    BlkdebugEvent, Driver, Edge, Facts, IoResult, Mapping, Node, OpenContext, Perms, Role, Span, WriteFlags, ZeroFlags,
};
use buf::IoBuf;
use qapi::types::block_filters::BlockdevOptionsCor;
use qapi::{Error, Result};
use std::sync::Arc;

/// A node that fills the one below by reading.
pub struct CopyOnRead {
    file: Arc<Edge>,
    /// How many layers down `bottom` is, 1 being the node below.
    bottom: Option<(String, u32)>,
    /// Copies and changes in flight.
    overlap: Overlap,
}

/// Opens the child and finds `bottom` in its chain.
///
/// # Errors
/// No such node in the chain; those of the child.
pub async fn open(cx: &mut OpenContext<'_>, options: &BlockdevOptionsCor) -> Result<CopyOnRead> {
    let file = cx.child("file", Role::Filtered, &options.file).await?;
    let bottom = match &options.bottom {
        None => None,
        Some(name) => {
            let node = cx.find(name).ok_or_else(|| Error::generic(format!("Bottom node '{name}' not found")))?;
            let depth = depth_of(file.node(), &node);
            let not_in =
                || Error::generic(format!("Bottom node '{name}' is not in the chain of node '{}'", file.node().name()));
            Some((name.clone(), depth.ok_or_else(not_in)?))
        }
    };
    Ok(CopyOnRead { file, bottom, overlap: Overlap::default() })
}

/// How many layers below `top` a node is, counted as the status of blocks counts them.
fn depth_of(top: Arc<Node>, bottom: &Arc<Node>) -> Option<u32> {
    let mut node = top;
    let mut depth = 1;
    while !Arc::ptr_eq(&node, bottom) {
        let children = node.children();
        let backing = children.iter().find(|edge| edge.role() == Role::Backing);
        let below = backing.or_else(|| children.iter().find(|edge| edge.role() == Role::Filtered))?;
        depth += u32::from(below.role() == Role::Backing);
        node = below.node();
    }
    Some(depth)
}

impl CopyOnRead {
    /// Nothing is ever copied while the child is what it is, so nothing has to be kept apart from copies either. The child
    /// only changes while no request is under way here.
    #[inline]
    fn is_idle(&self) -> bool {
        self.file.is_complete()
    }

    /// Keeps a change apart from copies.
    async fn reserve(&self, span: Span) -> Option<Reservation<'_>> {
        if self.is_idle() { None } else { Some(self.overlap.reserve(span, false).await) }
    }

    async fn read_copying(&self, at: u64, buf: &IoBuf) -> IoResult {
        let len = len_of(buf);
        let mut done = 0;
        while done < len {
            let rest = buf.slice(usize::try_from(done).unwrap_or(usize::MAX), buf.len());
            let Ok(found) = status::layer(&self.file.node(), Span::new(at + done, len - done)).await else {
                // Nobody can tell what to copy: the data are there all the same.
                return self.file.read(at + done, &rest).await;
            };
            done += self.read_part(at + done, &rest, found).await?;
        }
        Ok(())
    }

    fn is_wanted(&self, found: &Status) -> bool {
        match &self.bottom {
            None => found.depth != 1,
            Some((_, bottom)) => (2..=*bottom).contains(&found.depth),
        }
    }

    /// Reads the start of `buf`, whose status was `found`, and copies it if it still is not there. The bytes done.
    async fn read_part(&self, at: u64, buf: &IoBuf, found: Status) -> IoResult<u64> {
        let len = found.len.min(len_of(buf));
        let part = buf.slice(0, usize::try_from(len).unwrap_or(usize::MAX));
        if !self.is_wanted(&found) {
            self.file.read(at, &part).await?;
            return Ok(len);
        }
        let _alone = self.overlap.reserve(Span::new(at, len), true).await;
        // A write or another copy may have come first.
        let found = status::of(&self.file.node(), Span::new(at, len)).await?;
        let len = found.len.min(len);
        let part = part.slice(0, usize::try_from(len).unwrap_or(usize::MAX));
        self.file.read(at, &part).await?;
        if self.is_wanted(&found) {
            self.file.raise(BlkdebugEvent::CorWrite);
            // The reader has its data; what could not be copied is read from below again the next time.
            let _ = if found.zero {
                self.file.zero(Span::new(at, len), ZeroFlags::default()).await
            } else {
                self.file.write(at, &part, WriteFlags::NONE).await
            };
        }
        Ok(len)
    }
}

impl Driver for CopyOnRead {
    fn name(&self) -> &'static str {
        "copy-on-read"
    }

    fn facts(&self) -> Facts {
        let child = self.file.facts();
        Facts { compressed_unit: child.compressed_unit, complete: child.complete, ..filter::facts(&self.file) }
    }

    fn filename(&self) -> String {
        let bottom: Vec<_> = self.bottom.iter().map(|(name, _)| ("bottom", name.clone().into())).collect();
        filter::describe("copy-on-read", &bottom, &[("file", &self.file)])
    }

    async fn length(&self) -> IoResult<u64> {
        Ok(self.file.size())
    }

    async fn read(&self, at: u64, buf: &IoBuf) -> IoResult {
        if self.is_idle() { self.file.read(at, buf).await } else { Box::pin(self.read_copying(at, buf)).await }
    }

    async fn write(&self, at: u64, buf: &IoBuf, flags: WriteFlags) -> IoResult {
        let _held = self.reserve(Span::new(at, len_of(buf))).await;
        self.file.write(at, buf, flags).await
    }

    async fn write_compressed(&self, at: u64, buf: &IoBuf) -> IoResult {
        let _held = self.reserve(Span::new(at, len_of(buf))).await;
        self.file.write_compressed(at, buf).await
    }

    async fn flush(&self) -> IoResult {
        self.file.flush().await
    }

    async fn zero(&self, span: Span, flags: ZeroFlags) -> IoResult {
        let _held = self.reserve(span).await;
        self.file.zero(span, flags).await
    }

    async fn discard(&self, span: Span) -> IoResult {
        let _held = self.reserve(span).await;
        self.file.discard(span).await
    }

    async fn map(&self, span: Span, _precise: bool) -> IoResult<Mapping> {
        Ok(Mapping::forward(span.len, Arc::clone(&self.file), span.at))
    }

    async fn truncate(&self, size: u64, exact: bool, prealloc: Prealloc) -> Result<()> {
        self.file.truncate(size, exact, prealloc).await
    }

    /// Copies are writes that change nothing for a reader.
    fn child_perms(&self, _child: &Edge, of_node: Perms) -> Perms {
        Perms { need: of_node.need | Bits::WRITE_UNCHANGED, shared: of_node.shared | Bits::WRITE_UNCHANGED }
    }

    fn reservations(&self) -> Option<&dyn Reservations> {
        Some(&*self.file)
    }
}
