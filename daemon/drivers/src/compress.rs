//! `compress`: another node, whose format compresses what is written through this one.
//!
//! Requests come in whole runs of the format ([`Facts::compressed_unit`]): the core makes them so, by reading what is around a
//! smaller write. Zeroes and discards are the format's own business.

use crate::filter::{self, len_of};
use block::driver::Prealloc;
use block::reservation::Reservations;
use block::{Driver, Edge, Facts, IoResult, Mapping, OpenContext, Role, Span, Support, WriteFlags, ZeroFlags};
use buf::IoBuf;
use qapi::types::block_filters::BlockdevOptionsCompress;
use qapi::{Error, Result};
use std::sync::Arc;

/// A node that compresses.
#[derive(Debug)]
pub struct Compress {
    file: Arc<Edge>,
}

/// Opens the child, which must be able to compress.
///
/// # Errors
/// It is not; those of the child.
pub async fn open(cx: &mut OpenContext<'_>, options: &BlockdevOptionsCompress) -> Result<Compress> {
    let file = cx.child("file", Role::Filtered, &options.file).await?;
    if file.facts().compressed_unit == 0 {
        let format = file.node().driver().name();
        return Err(Error::generic(format!("Compression is not supported for underlying format: {format}")));
    }
    Ok(Compress { file })
}

impl Driver for Compress {
    fn name(&self) -> &'static str {
        "compress"
    }

    fn facts(&self) -> Facts {
        let below = filter::facts(&self.file);
        let unit = self.file.facts().compressed_unit.max(below.request_align);
        // A compressed write has no FUA: a flush follows.
        Facts { request_align: unit, discard_align: below.discard_align, fua: Support::None, ..below }
    }

    fn filename(&self) -> String {
        filter::describe("compress", &[], &[("file", &self.file)])
    }

    async fn length(&self) -> IoResult<u64> {
        Ok(self.file.size())
    }

    async fn allocated_size(&self) -> Option<u64> {
        self.file.node().driver().allocated_size().await
    }

    async fn read(&self, at: u64, buf: &IoBuf) -> IoResult {
        self.file.read(at, buf).await
    }

    async fn write(&self, at: u64, buf: &IoBuf, _flags: WriteFlags) -> IoResult {
        // A unit may reach beyond the end; a node that does not grow has no place for that.
        let inside = self.file.size().saturating_sub(at).min(len_of(buf));
        let part = if inside == 0 { buf.clone() } else { buf.slice(0, usize::try_from(inside).unwrap_or(usize::MAX)) };
        self.file.write_compressed(at, &part).await
    }

    async fn flush(&self) -> IoResult {
        self.file.flush().await
    }

    async fn zero(&self, span: Span, flags: ZeroFlags) -> IoResult {
        self.file.zero(span, ZeroFlags { fua: false, ..flags }).await
    }

    async fn discard(&self, span: Span) -> IoResult {
        self.file.discard(span).await
    }

    async fn map(&self, span: Span, _precise: bool) -> IoResult<Mapping> {
        Ok(Mapping::forward(span.len, Arc::clone(&self.file), span.at))
    }

    async fn truncate(&self, size: u64, exact: bool, prealloc: Prealloc) -> Result<()> {
        self.file.truncate(size, exact, prealloc).await
    }

    fn reservations(&self) -> Option<&dyn Reservations> {
        Some(&*self.file)
    }
}
