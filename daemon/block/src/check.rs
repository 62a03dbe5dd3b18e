//! [`Check`]: the facet of a format that can check its image and repair it.

use crate::driver::LocalFuture;
use qapi::Result;

/// What a check may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fix {
    /// Nothing.
    Nothing,
    /// Space that is counted as used and is not.
    Leaks,
    /// Everything.
    All,
}

/// What a check has found, in the words of `qemu-img check`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Problems of the check itself: what it could not read.
    pub check_errors: u64,
    /// Damage that is still there.
    pub corruptions: u64,
    /// Clusters whose count is too high, still.
    pub leaks: u64,
    /// Damage that has been repaired.
    pub corruptions_fixed: u64,
    /// Leaks that have been repaired.
    pub leaks_fixed: u64,
    /// Clusters of the guest's disk.
    pub total_clusters: u64,
    /// Those that are stored.
    pub allocated_clusters: u64,
    /// Those that do not follow the one before them.
    pub fragmented_clusters: u64,
    /// Those that are compressed.
    pub compressed_clusters: u64,
    /// Bytes up to the end of the last cluster that is in use.
    pub image_end_offset: u64,
}

/// A format that can check its image.
pub trait Check: Send + Sync {
    /// Checks the image; no request is in flight and none comes before this returns.
    ///
    /// # Errors
    /// The image cannot be read, or is so damaged that it cannot be walked; `fix` on a read-only node.
    fn check(&self, fix: Fix) -> LocalFuture<'_, Result<Found>>;
}
