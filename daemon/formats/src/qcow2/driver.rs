//! The image as a driver of the graph.

use super::bytes::u64_of;
use super::image::Qcow2;
use block::check::Check;
use block::driver::Prealloc;
use block::reopen::{Backing, Reopen};
use block::snapshot::Snapshots;
use block::{Driver, Edge, Facts, ImageDetails, IoResult, Mapping, Node, Perms, Span, Support, WriteFlags, ZeroFlags};
use buf::IoBuf;
use qapi::{Error, Result};
use std::sync::Arc;

impl Qcow2 {
    /// [`Qcow2::keep`] as the end of a request.
    async fn conclude_kept(&self, span: Span) -> IoResult {
        let kept = self.keep(span).await;
        self.conclude(kept).await
    }
}

impl Driver for Qcow2 {
    fn name(&self) -> &'static str {
        "qcow2"
    }

    fn facts(&self) -> Facts {
        let cluster = u32::try_from(self.shape.cluster()).unwrap_or(1 << 21);
        Facts {
            zero_align: u32::try_from(self.shape.subcluster()).unwrap_or(cluster),
            discard_align: cluster,
            fua: Support::Emulated,
            zero: if self.shape.version >= 3 { Support::Native } else { Support::None },
            discard: Support::Native,
            compressed_unit: if self.data_file.is_some() { 0 } else { cluster },
            ..Facts::default()
        }
    }

    async fn length(&self) -> IoResult<u64> {
        Ok(self.length_now())
    }

    async fn image_info(&self) -> ImageDetails {
        self.details().await
    }

    async fn read(&self, at: u64, buf: &IoBuf) -> IoResult {
        self.check_sound()?;
        let read = {
            let _inside = self.epochs.enter();
            self.read_guest(at, buf).await
        };
        self.conclude(read).await
    }

    fn read_through(&self, span: Span) -> Option<Arc<Node>> {
        self.backs(span)
    }

    async fn write(&self, at: u64, buf: &IoBuf, flags: WriteFlags) -> IoResult {
        // With nothing waiting to be written, data over data needs no more than the data to be stable.
        let direct = flags.fua && self.is_clean();
        let written = self.write_guest(at, buf, WriteFlags { fua: direct }).await;
        self.conclude(written).await?;
        if flags.fua && !(direct && self.is_clean()) {
            return Driver::flush(self).await;
        }
        self.conclude_kept(Span::new(at, u64_of(buf.len()))).await
    }

    async fn write_compressed(&self, at: u64, buf: &IoBuf) -> IoResult {
        let written = self.write_packed(at, buf).await;
        self.conclude(written).await?;
        self.conclude_kept(Span::new(at, u64_of(buf.len()))).await
    }

    async fn flush(&self) -> IoResult {
        let flushed = self.flush_guest().await;
        self.conclude(flushed).await
    }

    async fn zero(&self, span: Span, flags: ZeroFlags) -> IoResult {
        let zeroed = self.zero_guest(span, flags).await;
        self.conclude(zeroed).await?;
        if flags.fua { Driver::flush(self).await } else { self.conclude_kept(span).await }
    }

    async fn discard(&self, span: Span) -> IoResult {
        let discarded = self.discard_guest(span).await;
        self.conclude(discarded).await?;
        self.conclude_kept(span).await
    }

    async fn map(&self, span: Span, _precise: bool) -> IoResult<Mapping> {
        self.check_sound()?;
        let found = {
            let _inside = self.epochs.enter();
            self.map_guest(span).await
        };
        self.conclude(found).await
    }

    async fn truncate(&self, size: u64, exact: bool, prealloc: Prealloc) -> Result<()> {
        self.resize(size, exact, prealloc).await
    }

    /// The image file is ours as long as the node lives: metadata is written without users as well.
    fn child_perms(&self, child: &Edge, of_node: Perms) -> Perms {
        Self::child_perms_as(self.is_read_only(), child, of_node)
    }

    fn reopen(&self) -> Option<&dyn Reopen> {
        Some(self)
    }

    fn backing(&self) -> Option<&dyn Backing> {
        Some(self)
    }

    fn snapshots(&self) -> Option<&dyn Snapshots> {
        Some(self)
    }

    fn check_control(&self) -> Option<&dyn Check> {
        Some(self)
    }

    fn outlived(&self, outlived: bool) {
        self.set_outlived(outlived);
    }

    async fn start(&self) -> Result<()> {
        self.repair_dirty().await
    }

    async fn activate(&self) -> Result<()> {
        self.read_again().await
    }

    async fn deactivate(&self) -> Result<()> {
        self.settle().await.map_err(|errno| Error::io("Could not write the metadata of the image", errno.into()))
    }

    async fn close(&self) {
        self.close_image().await;
        // The last writes may have found damage too.
        let _ = self.conclude(Ok(())).await;
    }
}
