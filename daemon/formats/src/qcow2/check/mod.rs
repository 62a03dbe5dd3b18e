//! Checking and repairing an image, as `qemu-img check` does: what refers to which cluster is counted, compared with the
//! refcounts, and made to agree.
//!
//! | file | step |
//! | --- | --- |
//! | `counts` | references to clusters, in memory |
//! | `walk` | finds all references |
//! | `compare` | counted against the image's refcounts |
//! | `rebuild` | new refcount structures, where the old ones cannot be mended |
//! | `copied` | the marks of clusters that nobody shares |
//! | `snapshots` | a new table of snapshots, where the old one is flawed |
//!
//! Works on an image that nobody else uses, below the caches: the caller has written everything out and reads it anew. Each
//! L2 table is read once, however many L1 tables name it. Memory grows with what the image refers to, up to a limit; no size
//! that the image claims is taken for granted. Repairs keep to the order that a crash allows: references never
//! outnumber counts because of one.

mod compare;
mod copied;
mod counts;
mod rebuild;
mod snapshots;
mod walk;

use super::bytes::{be64, u64_of, us};
use super::extensions::{Bitmaps, Extensions};
use super::header::{self, Header};
use super::refcount::Width;
use super::snapshot::{Table, scan_table};
use block::check::{Fix, Found};
use block::{Errno, IoResult, Node, WriteFlags};
use buf::IoBuf;
use qapi::{Error, Result};
use std::sync::Arc;

/// An image to be checked.
pub struct Image {
    file: Arc<Node>,
    header: Header,
    bitmaps: Option<Bitmaps>,
    reftable: Vec<u64>,
    l1: Vec<u64>,
    snapshots: Table,
}

/// Checks the image in `file`, which nobody else uses.
///
/// # Errors
/// It is not an image, or so damaged that it cannot be walked; a write failed. What was repaired before stays repaired.
pub async fn check(file: Arc<Node>, fix: Fix) -> Result<Found> {
    let mut image = Image::read(file, fix == Fix::All).await?;
    let failed = |errno: Errno| match errno {
        Errno::ENOSPC => Error::io(
            "The image cannot be repaired without space for new refcounts, and can be read meanwhile with 'read-only'",
            errno.into(),
        ),
        _ => Error::io("The check was broken off", errno.into()),
    };
    let mut found = image.check(fix).await.map_err(failed)?;
    if found.corruptions_fixed > 0 || found.leaks_fixed > 0 {
        // What a repair says is not believed: everything is looked at again.
        let fixed = found;
        let mut image = Image::read(image.file, false).await?;
        found = image.check(Fix::Nothing).await.map_err(failed)?;
        found.corruptions_fixed = fixed.corruptions_fixed;
        found.leaks_fixed = fixed.leaks_fixed;
        if found.corruptions == 0 && found.check_errors == 0 {
            image.mark_sound().await.map_err(failed)?;
        }
    }
    Ok(found)
}

impl Image {
    /// Reads what everything starts from; of the table of snapshots what can be used of it if it is to be mended.
    async fn read(file: Arc<Node>, mend: bool) -> Result<Self> {
        let failed = |what: &'static str| move |errno: Errno| Error::io(what, errno.into());
        let head = read(&file, 0, 512.min(file.size())).await.map_err(failed("Could not read qcow2 header"))?;
        let header = Header::parse(&head)?;
        let unknown = header.unknown_incompatible();
        let len = header.cluster_size().min(file.size());
        let head = read(&file, 0, len).await.map_err(failed("Could not read qcow2 header"))?;
        let end = if header.backing_at == 0 { len } else { header.backing_at.min(len) };
        let extensions = Extensions::parse(head.get(us(header.header_len.into())..us(end)).unwrap_or_default())?;
        if unknown != 0 {
            return Err(Error::generic(format!("Unsupported qcow2 feature(s): {}", extensions.name_features(unknown))));
        }
        if header.crypt != 0 || extensions.crypto {
            return Err(Error::generic("The image is encrypted, which is not supported"));
        }
        let beyond =
            |at: u64, len: u64| at.checked_add(len).is_none_or(|end| end > file.size().saturating_add(1 << 21));
        if beyond(header.l1_at, u64::from(header.l1_entries) * 8) {
            return Err(Error::generic("Could not read L1 table: it lies beyond the end of the image"));
        }
        if beyond(header.reftable_at, header.reftable_bytes()) {
            return Err(Error::generic("Could not read reference count table: it lies beyond the end of the image"));
        }
        let table = |bytes: Vec<u8>| bytes.chunks_exact(8).map(|entry| be64(entry, 0)).collect::<Vec<_>>();
        let l1 = read(&file, header.l1_at, u64::from(header.l1_entries) * 8).await;
        let l1 = table(l1.map_err(failed("Could not read L1 table"))?);
        let reftable = read(&file, header.reftable_at, header.reftable_bytes()).await;
        let reftable = table(reftable.map_err(failed("Could not read reference count table"))?);
        let snapshots = scan_table(&file, &header, mend).await?;
        let bitmaps = extensions.bitmaps.filter(|_| header.autoclear & header::BITMAPS != 0);
        Ok(Self { file, header, bitmaps, reftable, l1, snapshots })
    }

    fn cluster(&self) -> u64 {
        self.header.cluster_size()
    }

    fn width(&self) -> Width {
        Width(self.header.refcount_order)
    }

    async fn check(&mut self, fix: Fix) -> IoResult<Found> {
        let mut walked = self.walk(fix).await?;
        let before = walked.found;
        self.compare(&mut walked, Fix::Nothing).await?;
        if walked.beyond_repair && fix == Fix::All {
            let old = walked.found;
            self.rebuild(&mut walked).await?;
            // The old structures are leaked now, and everything is counted anew.
            walked = self.walk(Fix::Nothing).await?;
            self.compare(&mut walked, Fix::Leaks).await?;
            let found = &mut walked.found;
            found.leaks_fixed = old.leaks_fixed + old.leaks.saturating_sub(found.leaks);
            found.corruptions_fixed = old.corruptions_fixed + old.corruptions.saturating_sub(found.corruptions);
            found.check_errors += u64::from(walked.rebuild);
        } else if fix != Fix::Nothing && (walked.found.leaks > 0 || walked.found.corruptions > 0) {
            if walked.rebuild && fix != Fix::All {
                // Without leave to correct what is counted as free, no leak is one for sure.
                return Err(Errno::EIO);
            }
            walked.found = before;
            self.compare(&mut walked, fix).await?;
        }
        self.check_copied(&mut walked.found, fix).await?;
        let flaws = self.snapshots.flaws.total();
        if fix == Fix::All && flaws > 0 && walked.found.corruptions == 0 {
            self.write_snapshots().await?;
            walked.found.corruptions_fixed += flaws;
        } else {
            walked.found.corruptions += flaws;
        }
        if fix != Fix::Nothing {
            self.file.flush().await?;
            if walked.found.check_errors == 0 && walked.found.corruptions == 0 {
                self.mark_sound().await?;
            }
        }
        Ok(walked.found)
    }

    /// Takes the marks of a damaged or dirty image off. Everything has been flushed.
    async fn mark_sound(&mut self) -> IoResult {
        let sound = self.header.incompatible & !(header::DIRTY | header::CORRUPT);
        if self.header.incompatible == sound {
            return Ok(());
        }
        self.header.incompatible = sound;
        self.write_header().await
    }

    async fn write_header(&self) -> IoResult {
        write(&self.file, 0, &self.header.encode()).await?;
        self.file.flush().await
    }
}

async fn read(file: &Arc<Node>, at: u64, len: u64) -> IoResult<Vec<u8>> {
    if len == 0 {
        return Ok(Vec::new());
    }
    let buf = IoBuf::alloc(us(len));
    file.read(at, &buf).await?;
    Ok(buf.to_vec())
}

async fn write(file: &Arc<Node>, at: u64, bytes: &[u8]) -> IoResult {
    debug_assert!(u64_of(bytes.len()) > 0, "nothing to write");
    file.write(at, &IoBuf::copy_of(bytes), WriteFlags::NONE).await
}
