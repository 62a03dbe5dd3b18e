//! Options and the backing file of an open image change.

use super::bytes::{be32, be64, us};
use super::header;
use super::image::{Qcow2, lock};
use super::open::check_features;
use super::options::Tuning;
use super::start;
use block::driver::LocalFuture;
use block::perm::Bits;
use block::reopen::{Backing, NewOptions, Prepared, Reopen};
use block::{Edge, Errno, Node, Perms, Role, WriteFlags};
use buf::IoBuf;
use qapi::types::block::BlockdevDriverOptions;
use qapi::{Error, Result};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Options that wait to be put in force.
struct Waiting<'a> {
    image: &'a Qcow2,
    read_only: bool,
    tuning: Tuning,
}

impl Reopen for Qcow2 {
    fn mutable(&self) -> &'static [&'static str] {
        &[
            "lazy-refcounts",
            "pass-discard-request",
            "pass-discard-snapshot",
            "pass-discard-other",
            "discard-no-unref",
            "overlap-check",
            "cache-size",
            "l2-cache-size",
            "l2-cache-entry-size",
            "refcount-cache-size",
            "cache-clean-interval",
        ]
    }

    fn prepare<'a>(&'a self, new: &'a NewOptions<'_>) -> LocalFuture<'a, Result<Box<dyn Prepared + 'a>>> {
        Box::pin(async move {
            let read_only = new.after.read_only;
            if self.is_read_only() && !read_only {
                let header = self.header_now();
                check_features(&header, &self.extensions, false)?;
                if header.incompatible & header::DIRTY != 0 {
                    return Err(Error::generic(
                        "The image was not closed properly: it is repaired when it is opened for writing, not when it is reopened",
                    ));
                }
            }
            let BlockdevDriverOptions::Qcow2(options) = new.driver else {
                return Err(Error::generic("The options are not those of a qcow2 image"));
            };
            let tuning = Tuning::choose(options, &self.header_now())?;
            let waiting: Box<dyn Prepared + 'a> = Box::new(Waiting { image: self, read_only, tuning });
            Ok(waiting)
        })
    }
}

impl Prepared for Waiting<'_> {
    fn child_perms(&self, child: &Edge, of_node: Perms) -> Option<Perms> {
        Some(Qcow2::child_perms_as(self.read_only, child, of_node))
    }

    /// What is left to be written must be, as long as it can be.
    fn drained(&mut self) -> LocalFuture<'_, Result<()>> {
        Box::pin(async {
            if self.read_only && !self.image.is_read_only() {
                self.image.close_image().await;
                if !self.image.is_clean() {
                    return Err(Error::io("Could not write the metadata of the image", Errno::EIO.into()));
                }
            }
            self.image.prepare_tuning(&self.tuning).await
        })
    }

    fn commit(self: Box<Self>) {
        self.image.tune(&self.tuning);
        self.image.read_only.store(self.read_only, Ordering::Release);
    }
}

impl Backing for Qcow2 {
    fn named(&self) -> Option<String> {
        lock(&self.backing_name).clone()
    }

    fn check(&self, node: Option<&Arc<Node>>) -> Result<()> {
        if node.is_some() && self.raw_data {
            return Err(Error::generic("An external data file that is raw cannot have a backing file"));
        }
        Ok(())
    }

    fn rename<'a>(&'a self, name: &'a str, format: &'a str) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            self.name_backing(name, format).await.map_err(|error| {
                let text = format!("Could not change backing file to '{name}'");
                if name.len() > 1023 { Error::generic(text) } else { error.context(text) }
            })
        })
    }

    fn set(&self, edge: Option<Arc<Edge>>) {
        self.backing.store(edge);
    }
}

impl Qcow2 {
    /// Writes the first cluster anew, with another name of the backing file.
    async fn name_backing(&self, name: &str, format: &str) -> Result<()> {
        let failed = |errno: Errno| Error::io("Could not write the header", errno.into());
        self.prepare().await.map_err(failed)?;
        self.write_out().await.map_err(failed)?;
        let _turn = self.turn.lock().await;
        let cluster = self.shape.cluster();
        let old = IoBuf::alloc(us(cluster));
        self.file.read(0, &old).await.map_err(failed)?;
        let old = old.to_vec();
        let mut header = self.header_now();
        let split = us(header.header_len.into()).min(old.len());
        let (fixed, rest) = old.split_at(split);
        let end = if header.backing_at == 0 { rest.len() } else { us(header.backing_at).saturating_sub(split) };
        let mut records = start::records(rest.get(..end).unwrap_or_default());
        start::set_backing_format(&mut records, Some(format).filter(|_| !name.is_empty()));
        let first = start::first_cluster(fixed, &records, Some(name), cluster)?;
        self.file.write(0, &IoBuf::copy_of(&first), WriteFlags::NONE).await.map_err(failed)?;
        self.file.flush().await.map_err(failed)?;
        header.backing_at = be64(&first, 8);
        header.backing_len = be32(&first, 16);
        *lock(&self.header) = header;
        *lock(&self.backing_name) = Some(name.to_owned()).filter(|name| !name.is_empty());
        Ok(())
    }

    /// Whether the image is never written to.
    pub(super) fn is_read_only(&self) -> bool {
        self.read_only.load(Ordering::Acquire)
    }

    /// What the image needs of and shares on `child` if it is read-only or not.
    pub(super) fn child_perms_as(read_only: bool, child: &Edge, of_node: Perms) -> Perms {
        let writes = if read_only { Bits::NONE } else { Bits::WRITE | Bits::RESIZE };
        match child.role() {
            Role::Backing => Perms {
                need: of_node.need & Bits::CONSISTENT_READ,
                shared: Bits::CONSISTENT_READ
                    | Bits::WRITE_UNCHANGED
                    | if of_node.shared.contains(Bits::WRITE) { Bits::WRITE | Bits::RESIZE } else { Bits::NONE },
            },
            _ => Perms {
                need: Bits::CONSISTENT_READ | writes,
                shared: (of_node.shared | Bits::CONSISTENT_READ | Bits::WRITE_UNCHANGED)
                    & !(Bits::WRITE | Bits::RESIZE),
            },
        }
    }
}
