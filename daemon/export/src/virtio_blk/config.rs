//! The device's features and its configuration space, `[virtio 1.2 §5.2.3, §5.2.4]`.

use block::Disk;

/// Bits of the device's features.
pub(crate) mod feature {
    pub const SEG_MAX: u64 = 1 << 2;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const TOPOLOGY: u64 = 1 << 10;
    pub const CONFIG_WCE: u64 = 1 << 11;
    pub const MQ: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
    /// Writes to guest memory are logged; of vhost, not of virtio.
    pub const LOG_ALL: u64 = 1 << 26;
    pub const INDIRECT_DESC: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    /// There are protocol features; of vhost-user, not of virtio.
    pub const PROTOCOL: u64 = 1 << 30;
    pub const VERSION_1: u64 = 1 << 32;
    /// Addresses are those that the platform has translated.
    pub const ACCESS_PLATFORM: u64 = 1 << 33;
    /// Rings may have the packed layout.
    pub const RING_PACKED: u64 = 1 << 34;
}

/// Bytes of a sector, the unit of virtio's addresses.
pub(crate) const SECTOR: u64 = 512;
/// Data segments of a request: a queue of 128 with a header and a status. `[reference, drop-in]`
pub(crate) const SEG_MAX: u32 = 126;
/// Segments of a discard or a write of zeroes.
pub(crate) const MAX_RANGES: u32 = 64;
/// Sectors in one segment of these: just below 2 GiB.
pub(crate) const MAX_RANGE_SECTORS: u32 = (1 << 22) - 1;
/// Bytes of the configuration space.
pub(crate) const CONFIG_LEN: usize = 60;
/// Where the configuration says whether the cache is written back.
pub(crate) const WCE_AT: u32 = 32;

/// What of the options and the disk the configuration shows.
#[derive(Clone, Debug)]
pub(crate) struct Geometry {
    /// A power of two from 512 to a page.
    pub block_size: u32,
    pub queues: u16,
    pub writable: bool,
}

impl Geometry {
    /// What the device can do, whatever carries it.
    pub(crate) fn features(&self) -> u64 {
        let common = feature::SEG_MAX
            | feature::BLK_SIZE
            | feature::TOPOLOGY
            | feature::FLUSH
            | feature::INDIRECT_DESC
            | feature::EVENT_IDX
            | feature::VERSION_1;
        let queues = if self.queues > 1 { feature::MQ } else { 0 };
        let kind = if self.writable { feature::DISCARD | feature::WRITE_ZEROES } else { feature::RO };
        common | queues | kind
    }

    /// The configuration space as of now.
    pub(crate) fn config(&self, disk: &Disk, writeback: bool) -> [u8; CONFIG_LEN] {
        let mut space = [0; CONFIG_LEN];
        let mut put = |at: usize, bytes: &[u8]| {
            if let Some(place) = space.get_mut(at..at + bytes.len()) {
                place.copy_from_slice(bytes);
            }
        };
        let block_sectors = u32::try_from(u64::from(self.block_size) / SECTOR).unwrap_or(1);
        // A last sector that is not whole cannot be reached.
        put(0, &(disk.size() / SECTOR).to_le_bytes());
        // size_max stays zero, for the feature is not offered.
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &self.block_size.to_le_bytes());
        // Topology stays zero: one logical block is a physical one, and no size serves better than another.
        put(32, &[u8::from(writeback)]);
        put(34, &self.queues.to_le_bytes());
        if self.writable {
            put(36, &MAX_RANGE_SECTORS.to_le_bytes());
            put(40, &MAX_RANGES.to_le_bytes());
            put(44, &block_sectors.to_le_bytes());
            put(48, &MAX_RANGE_SECTORS.to_le_bytes());
            put(52, &MAX_RANGES.to_le_bytes());
            put(56, &[1]);
        }
        space
    }
}
