//! The device's address space, as far as it was looked up: a table of mappings that all rings of a device share.
//!
//! The kernel is asked for all there is when the device starts, when it says that some of it changed, and when a ring meets
//! an address that is not in the table; memory that the driver uses for the first time comes without a message. A table
//! never changes. Requests in flight keep the one that they were made with, so what is dropped here goes when the last of
//! them is done, and not before.

use super::device::Kernel;
use crate::virtio_blk::queue::MemorySource;
use buf::{GuestMemory, Mapping, Region};
use io::VduseRegion;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};

/// Runs of memory at a time. Each queue of the kernel's driver has one, and all data are in one more.
const MAX_REGIONS: usize = 1024;

/// See the module.
#[derive(Debug)]
pub(crate) struct Memory {
    kernel: Arc<dyn Kernel>,
    /// Guards the newest table. Held while the kernel is asked, which does not wait for anybody; never across an await.
    table: Mutex<Arc<GuestMemory>>,
}

fn same(region: &Region, found: &VduseRegion) -> bool {
    let last = u64::try_from(region.map.len()).ok().and_then(|len| region.guest.checked_add(len - 1));
    region.guest == found.start && last == Some(found.last)
}

impl Memory {
    pub(crate) fn new(kernel: Arc<dyn Kernel>) -> Self {
        Self { kernel, table: Mutex::default() }
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, Arc<GuestMemory>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was looked up so far.
    pub(crate) fn known(&self) -> Arc<GuestMemory> {
        Arc::clone(&self.locked())
    }

    /// Forgets all of it.
    pub(crate) fn clear(&self) {
        *self.locked() = Arc::default();
    }

    /// Forgets what has bytes between the two addresses, and looks everything up.
    ///
    /// # Errors
    /// Some of it cannot be mapped. Nothing is known of what was forgotten.
    pub(crate) fn update(&self, start: u64, last: u64) -> std::io::Result<Arc<GuestMemory>> {
        let mut table = self.locked();
        let outside = |region: &&Region| {
            let len = u64::try_from(region.map.len()).unwrap_or(u64::MAX);
            region.guest > last || region.guest.saturating_add(len - 1) < start
        };
        let kept: Vec<Region> = table.regions().iter().filter(outside).cloned().collect();
        *table = Arc::new(GuestMemory::new(kept.clone()).unwrap_or_default());
        *table = Arc::new(self.look_up(&kept)?);
        Ok(Arc::clone(&table))
    }

    /// All memory that there is; what is in `kept` is not mapped again.
    fn look_up(&self, kept: &[Region]) -> std::io::Result<GuestMemory> {
        let mut regions: Vec<Region> = Vec::new();
        let mut next = Some(0);
        while let Some(found) = next.map(|at| self.kernel.region(at)).transpose()?.flatten() {
            if regions.len() == MAX_REGIONS {
                return Err(std::io::Error::other("the device's memory is in too many pieces"));
            }
            let len = found.last.checked_sub(found.start).and_then(|len| len.checked_add(1));
            // Behind the last one there is nothing; nor is where the kernel does not go on.
            next = found.last.checked_add(1).filter(|after| next.is_some_and(|at| *after > at));
            let old = kept.iter().find(|region| same(region, &found) && !region.map.is_torn());
            let map = match (old, len) {
                (Some(old), _) => Arc::clone(&old.map),
                (None, Some(len)) => Arc::new(Mapping::of_device(found.fd.as_fd(), found.offset, len, found.writable)?),
                (None, None) => return Err(std::io::Error::other("a region that ends before it begins")),
            };
            regions.push(Region { guest: found.start, monitor: found.start, map });
        }
        GuestMemory::new(regions).map_err(std::io::Error::other)
    }
}

impl MemorySource for Memory {
    fn more(&self, known: &Arc<GuestMemory>) -> Option<Arc<GuestMemory>> {
        let mut table = self.locked();
        // Another ring may have been here.
        if !Arc::ptr_eq(&table, known) {
            return Some(Arc::clone(&table));
        }
        let found = self.look_up(known.regions()).ok()?;
        let is_known = |region: &Region| known.regions().iter().any(|old| Arc::ptr_eq(&old.map, &region.map));
        if found.regions().iter().all(is_known) {
            return None;
        }
        *table = Arc::new(found);
        Some(Arc::clone(&table))
    }
}
