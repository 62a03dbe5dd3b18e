//! Checks of images.

use crate::Qapi;

/// What a check of an image may change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Qapi)]
pub enum XCheckFix {
    /// Nothing.
    None,
    /// Space that is counted as used and is not.
    Leaks,
    /// Everything.
    All,
}

/// Checks an image as `qemu-img check` does, and repairs it. The node is one of a format that can do so, whose requests wait
/// meanwhile, or one with an image of that format that nobody uses: so are images checked that cannot be opened. Until it
/// is done the daemon answers queries; commands that change something wait.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "x-blockdev-check", returns = "ImageCheck", unstable)]
pub struct XBlockdevCheck {
    /// The name of the node.
    pub node_name: String,
    /// What may be changed.
    #[qapi(default = XCheckFix::None)]
    pub fix: XCheckFix,
}

/// What a check of an image has found. Counts of 0 are left out.
#[derive(Debug, Clone, PartialEq, Eq, Default, Qapi)]
#[qapi(since = "1.4")]
pub struct ImageCheck {
    /// The file name of the image.
    pub filename: String,
    /// Its format.
    pub format: String,
    /// Problems of the check itself.
    pub check_errors: i64,
    /// The end of the last cluster in use, in bytes.
    pub image_end_offset: Option<i64>,
    /// Damage that is there.
    pub corruptions: Option<i64>,
    /// Clusters that are counted as used and are not.
    pub leaks: Option<i64>,
    /// Damage that has been repaired.
    pub corruptions_fixed: Option<i64>,
    /// Leaks that have been repaired.
    pub leaks_fixed: Option<i64>,
    /// Clusters of the guest's disk.
    pub total_clusters: Option<i64>,
    /// Those that are stored.
    pub allocated_clusters: Option<i64>,
    /// Those that do not follow the one before them.
    pub fragmented_clusters: Option<i64>,
    /// Those that are compressed.
    pub compressed_clusters: Option<i64>,
}
