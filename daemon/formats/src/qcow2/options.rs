//! The options of an image that can change while it is open.

use super::guard::Kinds;
use super::header::{self, Header};
use super::image::{Discards, Qcow2};
use qapi::types::block::BlockdevOptionsQcow2;
use qapi::{Error, Result};
use std::sync::atomic::Ordering;

/// The reference's limit of L2 tables in memory, in bytes.
const L2_CACHE: u64 = 32 << 20;

/// The reference's time after which unused tables leave the memory, in seconds.
const CLEAN_INTERVAL: i64 = 600;

/// All of them, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tuning {
    pub caches: Caches,
    /// In seconds; 0 is never.
    pub clean_interval: u32,
    /// Refcounts are written when the image is closed.
    pub lazy: bool,
    pub discards: Discards,
    /// Metadata that is looked for before writes.
    pub checked: Kinds,
}

impl Tuning {
    /// What `options` say of an image with this header.
    ///
    /// # Errors
    /// A value out of its range, or that contradicts another.
    pub fn choose(options: &BlockdevOptionsQcow2, header: &Header) -> Result<Self> {
        if options.discard_no_unref == Some(true) && header.version < 3 {
            return Err(Error::generic("discard-no-unref is only supported since qcow2 version 3"));
        }
        let interval = options.cache_clean_interval.unwrap_or(CLEAN_INTERVAL);
        Ok(Self {
            caches: Caches::choose(options, header)?,
            clean_interval: u32::try_from(interval).map_err(|_| Error::generic("Cache clean interval too big"))?,
            lazy: lazy_refcounts(options, header)?,
            discards: Discards {
                request: options.pass_discard_request.unwrap_or(true),
                other: options.pass_discard_other.unwrap_or(false),
                snapshot: options.pass_discard_snapshot.unwrap_or(true),
                no_unref: options.discard_no_unref.unwrap_or(false),
            },
            checked: Kinds::chosen(options.overlap_check.as_ref()),
        })
    }
}

impl Qcow2 {
    /// Gets ready for `new`. Nothing is in flight.
    ///
    /// # Errors
    /// Those of the file.
    pub(super) async fn prepare_tuning(&self, new: &Tuning) -> Result<()> {
        let failed = |errno: block::Errno| Error::io("Could not write the image out", errno.into());
        self.settle().await.map_err(failed)?;
        self.guard_anew_for(new.checked).await.map_err(failed)
    }

    /// The options hold from now on. Nothing is in flight or dirty.
    pub(super) fn tune(&self, new: &Tuning) {
        self.l2.reshape(new.caches.l2, super::bytes::us(new.caches.l2_entry));
        self.refs.blocks.reshape(new.caches.refcounts, self.refs.blocks.unit());
        self.lazy.store(new.lazy, Ordering::Relaxed);
        self.discards.store(new.discards.bits(), Ordering::Relaxed);
        self.guard.set_checked(new.checked);
        self.cleaner.set_interval(new.clean_interval);
    }
}

/// Sizes of the caches in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Caches {
    pub l2: u64,
    /// Of a slice of an L2 table.
    pub l2_entry: u64,
    pub refcounts: u64,
}

impl Caches {
    fn choose(options: &BlockdevOptionsQcow2, header: &Header) -> Result<Self> {
        let cluster = header.cluster_size();
        let needed = header.l1_entries_for(header.size).saturating_mul(cluster);
        let least_refcounts = 4 * cluster;
        let size = |name: &str, value: Option<i64>| {
            let refused = |value| Error::generic(format!("Value '{value}' is out of range for parameter '{name}'"));
            value.map(|value| u64::try_from(value).map_err(|_| refused(value))).transpose()
        };
        let all = size("cache-size", options.cache_size)?;
        let l2 = size("l2-cache-size", options.l2_cache_size)?;
        let refcounts = size("refcount-cache-size", options.refcount_cache_size)?;
        let (l2, refcounts) = match (all, l2, refcounts) {
            (Some(_), Some(_), Some(_)) => {
                return Err(Error::generic(
                    "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time",
                ));
            }
            (Some(all), Some(l2), _) if l2 > all => {
                return Err(Error::generic("l2-cache-size may not exceed cache-size"));
            }
            (Some(all), _, Some(refcounts)) if refcounts > all => {
                return Err(Error::generic("refcount-cache-size may not exceed cache-size"));
            }
            (Some(all), Some(l2), None) => (l2, all - l2),
            (Some(all), None, Some(refcounts)) => (all - refcounts, refcounts),
            (Some(all), None, None) if all >= needed.saturating_add(least_refcounts) => (needed, all - needed),
            (Some(all), None, None) => (all - all.min(least_refcounts), all.min(least_refcounts)),
            (None, l2, refcounts) => (needed.min(l2.unwrap_or(L2_CACHE)), refcounts.unwrap_or(least_refcounts)),
        };
        let l2_entry = size("l2-cache-entry-size", options.l2_cache_entry_size)?.unwrap_or(cluster.min(65536));
        if !l2_entry.is_power_of_two() || !(512..=cluster).contains(&l2_entry) {
            return Err(Error::generic(format!(
                "L2 cache entry size must be a power of two between 512 and the cluster size ({cluster})"
            )));
        }
        // The reference's limits of the numbers of tables.
        let most = u64::from(i32::MAX.unsigned_abs());
        if l2 / l2_entry > most {
            return Err(Error::generic("L2 cache size too big"));
        }
        if refcounts / cluster > most {
            return Err(Error::generic("Refcount cache size too big"));
        }
        Ok(Self { l2, l2_entry, refcounts })
    }
}

/// Whether refcounts are written late.
fn lazy_refcounts(options: &BlockdevOptionsQcow2, header: &Header) -> Result<bool> {
    match options.lazy_refcounts {
        Some(true) if header.version < 3 => {
            Err(Error::generic("Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level"))
        }
        Some(lazy) => Ok(lazy),
        None => Ok(header.compatible & header::LAZY_REFCOUNTS != 0),
    }
}
