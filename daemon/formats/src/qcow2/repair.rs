//! The check of an image that is open: everything is written out first, and read anew if something was repaired.

use super::bitmap::Recorder;
use super::bytes::{be64, u64_of, us};
use super::check;
use super::header::{self, Header};
use super::image::{Qcow2, lock};
use super::open::{Start, check_features};
use block::IoResult;
use block::check::{Check, Fix, Found};
use block::driver::LocalFuture;
use buf::IoBuf;
use qapi::{Error, Result};
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

impl Check for Qcow2 {
    fn check(&self, fix: Fix) -> LocalFuture<'_, Result<Found>> {
        Box::pin(async move {
            if fix != Fix::Nothing && self.is_read_only() {
                return Err(Error::generic("The node is read-only, so nothing can be repaired"));
            }
            self.settle().await.map_err(|errno| Error::io("Could not write the image out", errno.into()))?;
            self.check_settled(fix).await
        })
    }
}

impl Qcow2 {
    /// Repairs an image that was not closed properly. Nobody uses it yet.
    ///
    /// # Errors
    /// It cannot be repaired.
    pub(super) async fn repair_dirty(&self) -> Result<()> {
        if self.is_read_only() || self.header_now().incompatible & header::DIRTY == 0 {
            return Ok(());
        }
        let found = self.check_settled(Fix::All).await;
        match found {
            Ok(Found { check_errors: 0, corruptions: 0, .. }) => Ok(()),
            Ok(_) => Err(Error::generic("Could not repair dirty image: Input/output error")),
            Err(error) => Err(Error::generic(format!("Could not repair dirty image: {error}"))),
        }
    }

    async fn check_settled(&self, fix: Fix) -> Result<Found> {
        let result = check::check(self.file.node(), fix).await;
        if fix != Fix::Nothing {
            let read = self.read_anew().await;
            read.map_err(|errno| Error::io("Could not read the repaired image", errno.into()))?;
        }
        result
    }

    /// Nothing waits to be written or freed afterwards. Nothing is in flight.
    pub(super) async fn settle(&self) -> IoResult {
        if self.is_read_only() || self.check_sound().is_err() {
            return Ok(());
        }
        self.give_back_spare().await;
        for _ in 0..4 {
            self.write_out().await?;
            if self.is_clean() && lock(&self.retired).is_empty() && lock(&self.unlinked).is_empty() {
                break;
            }
        }
        self.store_bitmaps().await?;
        self.write_lazy().await?;
        self.file.flush().await
    }

    /// Reads the image anew after another process may have changed it.
    ///
    /// # Errors
    /// It cannot be read, or has become another image, or one that cannot be used any more.
    pub(super) async fn read_again(&self) -> Result<()> {
        let before = self.header_now();
        let Start { header, extensions, backing_name } = Start::read(&self.file).await?;
        let shape = |header: &Header| {
            let marks = header::DIRTY | header::CORRUPT;
            (header.version, header.cluster_bits, header.refcount_order, header.incompatible & !marks)
        };
        if shape(&header) != shape(&before) {
            return Err(Error::generic("The image is not the one that it was"));
        }
        check_features(&header, &extensions, self.is_read_only())?;
        let bitmaps = Recorder::read(&self.file, &header, extensions.bitmaps.as_ref()).await?;
        self.bitmaps.replace(bitmaps);
        self.prepared.store(false, Ordering::Release);
        let read = self.read_anew().await;
        read.map_err(|errno| Error::io("Could not read the image", errno.into()))?;
        *lock(&self.backing_name) = backing_name;
        self.size.store(header.size, Ordering::Release);
        self.repair_dirty().await
    }

    /// Forgets what is in memory of the metadata, and reads the header and the tables.
    async fn read_anew(&self) -> IoResult {
        let _turn = self.turn.lock().await;
        let first = IoBuf::alloc(512);
        self.file.read(0, &first).await?;
        let header = Header::parse(&first.to_vec()).map_err(|_| block::Errno::EIO)?;
        let l1 = IoBuf::alloc(us(u64::from(header.l1_entries) * 8));
        self.file.read(header.l1_at, &l1).await?;
        let reftable = IoBuf::alloc(us(header.reftable_bytes()));
        self.file.read(header.reftable_at, &reftable).await?;
        self.l2.clear();
        self.unpacked.forget(&(0..u64::MAX));
        self.refs.read_anew(header.reftable_at, &reftable.to_vec());
        self.handover.take_spare();
        lock(&self.unlinked).clear();
        lock(&self.retired).clear();
        {
            let mut table = self.l1.write().unwrap_or_else(PoisonError::into_inner);
            table.entries = l1.to_vec().chunks_exact(8).map(|entry| be64(entry, 0)).collect();
            table.at = header.l1_at;
            table.dirty.clear();
            table.unhanded.clear();
            debug_assert_eq!(
                u64_of(table.entries.len()),
                u64::from(header.l1_entries),
                "a table as long as its header says"
            );
        }
        let sound = header.incompatible & header::CORRUPT == 0;
        *lock(&self.header) = header;
        if sound {
            self.damage.forget();
        }
        self.guard_anew().await
    }
}
