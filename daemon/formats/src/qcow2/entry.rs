//! Entries of L2 tables [qcow2 §L2 table entry, §Extended L2 Entries].
//!
//! An entry says where a cluster is, and of each of its subclusters whether its data is there, or it reads as zero, or it
//! shows the backing file. An entry without subclusters is one with a single subcluster as long as the cluster.

/// Bit 63 of L1 and L2 entries: the cluster has a refcount of exactly one.
pub const COPIED: u64 = 1 << 63;
/// Bit 62 of L2 entries: the cluster is compressed.
pub const PACKED: u64 = 1 << 62;
/// Bit 0 of L2 entries without subclusters: the cluster reads as zero.
pub const ZERO: u64 = 1;
/// Bits 9 to 55 of L1 and L2 entries.
pub const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// What of the image's header decides how entries look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// 2 or 3.
    pub version: u32,
    /// log2 of the cluster size.
    pub cluster_bits: u32,
    /// Subclusters of a cluster: 1 or 32.
    pub subclusters: u32,
    /// Guest data is in another file, where offset 0 is an offset like others.
    pub data_file: bool,
}

impl Shape {
    /// Bytes of a cluster.
    pub fn cluster(self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of a subcluster.
    pub fn subcluster(self) -> u64 {
        self.cluster() / u64::from(self.subclusters)
    }

    /// The mask of all subclusters.
    pub fn all(self) -> u32 {
        if self.subclusters == 32 { u32::MAX } else { 1 }
    }

    /// The mask of subclusters `from..to`.
    pub fn mask(self, from: u64, to: u64) -> u32 {
        (from..to.min(u64::from(self.subclusters))).fold(0, |mask, bit| mask | (1 << bit))
    }
}

/// Where a cluster is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Nowhere.
    None,
    /// At an offset of the file with the data; `copied` if nobody else refers to it.
    Plain {
        /// In bytes.
        at: u64,
        /// Its refcount is one.
        copied: bool,
    },
    /// Compressed.
    Packed {
        /// First byte in the image file.
        at: u64,
        /// Bytes that the compressed data does not exceed.
        len: u64,
    },
}

/// An entry, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Where the cluster is.
    pub place: Place,
    /// Subclusters whose data is there.
    pub stored: u32,
    /// Subclusters that read as zero.
    pub zero: u32,
}

/// An entry that the format does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// It names a place that is not a cluster's beginning.
    Unaligned {
        /// In bytes.
        at: u64,
        /// The cluster reads as zero.
        zero: bool,
    },
    /// A cluster that reads as zero, in an image of version 2.
    OldZero,
    /// A compressed cluster in an image with an external data file.
    PackedOutside,
    /// Subclusters that are both data and zero, or data of a cluster that is not there.
    Subclusters,
}

impl Entry {
    /// The entry of a cluster that is not in the image.
    pub const NONE: Self = Self { place: Place::None, stored: 0, zero: 0 };

    /// Decodes an entry; `bitmap` is 0 where there are no subclusters.
    ///
    /// # Errors
    /// It is malformed.
    pub fn decode(shape: Shape, word: u64, bitmap: u64) -> Result<Self, Malformed> {
        if word & PACKED != 0 {
            if shape.data_file {
                return Err(Malformed::PackedOutside);
            }
            let limit = Self::packed_limit(shape);
            let at = word & (limit - 1);
            let sectors = (word & !(COPIED | PACKED)) / limit + 1;
            return Ok(Self {
                place: Place::Packed { at, len: sectors * 512 - (at & 511) },
                stored: shape.all(),
                zero: 0,
            });
        }
        let at = word & OFFSET;
        if !at.is_multiple_of(shape.cluster()) {
            let zero = if shape.subclusters == 32 { bitmap & 0xffff_ffff == 0 } else { word & ZERO != 0 };
            return Err(Malformed::Unaligned { at, zero });
        }
        let copied = word & COPIED != 0;
        let there = at != 0 || (shape.data_file && copied);
        let place = if there { Place::Plain { at, copied } } else { Place::None };
        let (stored, zero) = if shape.subclusters == 32 {
            let low = u32::try_from(bitmap & 0xffff_ffff).unwrap_or(0);
            let high = u32::try_from(bitmap >> 32).unwrap_or(0);
            if word & ZERO != 0 {
                return Err(Malformed::Subclusters);
            }
            (low, high)
        } else if word & ZERO != 0 {
            if shape.version < 3 {
                return Err(Malformed::OldZero);
            }
            (0, 1)
        } else {
            (u32::from(there), 0)
        };
        if stored & zero != 0 || (!there && stored != 0) {
            return Err(Malformed::Subclusters);
        }
        Ok(Self { place, stored, zero })
    }

    /// The first offset that the entry of a compressed cluster has no bits for.
    pub fn packed_limit(shape: Shape) -> u64 {
        1 << (62 - (shape.cluster_bits - 8))
    }

    /// The entry as it stands in a table. A compressed cluster lies below [`Entry::packed_limit`].
    pub fn encode(self, shape: Shape) -> (u64, u64) {
        let word = match self.place {
            Place::Plain { at, copied } => at | if copied { COPIED } else { 0 },
            Place::None => 0,
            Place::Packed { at, len } => {
                let more = ((at & 511) + len).div_ceil(512).saturating_sub(1);
                return (PACKED | at | (more * Self::packed_limit(shape)), 0);
            }
        };
        if shape.subclusters == 32 {
            (word, u64::from(self.stored) | (u64::from(self.zero) << 32))
        } else {
            (word | if self.zero != 0 { ZERO } else { 0 }, 0)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Shape = Shape { version: 3, cluster_bits: 16, subclusters: 1, data_file: false };
    const EXTENDED: Shape = Shape { subclusters: 32, ..PLAIN };

    #[test]
    fn entries_survive_a_round_trip() {
        for (shape, word, bitmap) in [
            (PLAIN, 0, 0),
            (PLAIN, 0x50000 | COPIED, 0),
            (PLAIN, 0x50000, 0),
            (PLAIN, 0x50000 | COPIED | 1, 0),
            (PLAIN, 1, 0),
            (EXTENDED, 0x50000 | COPIED, 0x0000_00f0_0000_000f),
            (EXTENDED, 0, 0xffff_ffff_0000_0000),
        ] {
            let entry = Entry::decode(shape, word, bitmap).unwrap();
            assert_eq!(entry.encode(shape), (word, bitmap));
        }
    }

    #[test]
    fn malformed_entries_are_refused() {
        for (shape, word, bitmap) in [
            (PLAIN, 0x50200, 0),
            (Shape { version: 2, ..PLAIN }, 1, 0),
            (EXTENDED, 0x50000, 0x0000_0001_0000_0001),
            (EXTENDED, 0, 1),
            (EXTENDED, 1, 0),
            (Shape { data_file: true, ..PLAIN }, PACKED | 0x50000, 0),
        ] {
            assert!(Entry::decode(shape, word, bitmap).is_err(), "{word:x} {bitmap:x}");
        }
    }

    #[test]
    fn compressed_descriptors_have_sectors_above_the_offset() {
        // 62 - (16 - 8) = 54 bits of offset.
        let word = PACKED | (3 << 54) | 0x5_0123;
        let entry = Entry::decode(PLAIN, word, 0).unwrap();
        assert_eq!(entry.place, Place::Packed { at: 0x5_0123, len: 4 * 512 - 0x123 });
        assert_eq!(entry.encode(PLAIN), (word, 0));
        // Its length to the byte is as good.
        let shorter = Entry { place: Place::Packed { at: 0x5_0123, len: 3 * 512 }, ..entry };
        assert_eq!(shorter.encode(PLAIN), (word, 0));
    }
}
