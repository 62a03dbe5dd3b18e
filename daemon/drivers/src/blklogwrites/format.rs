//! The log's format [kernel, admin-guide/device-mapper/log-writes]: numbers are little-endian.
//!
//! The first sector has the superblock: magic, version, number of entries (64 bits each), sector size (32 bits). Each entry has
//! a sector of its own: first sector, number of sectors, flags, length of text (64 bits each); the data follow, unless it is
//! a discard.

use qapi::{Error, Result};

/// Of the superblock.
pub const MAGIC: u64 = 0x006a_7366_7773_6872;
/// The only one there is.
pub const VERSION: u64 = 1;
/// Bytes of a superblock.
pub const SUPER_LEN: usize = 28;
/// Bytes of an entry without its data.
pub const ENTRY_LEN: usize = 32;
/// The first sector size that is too large, in bytes.
const SECTOR_LIMIT: u32 = 1 << 24;

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flags(u64);

impl Flags {
    /// A write.
    pub const NONE: Self = Self(0);
    /// A flush.
    pub const FLUSH: Self = Self(1);
    /// A write that is stable when it completes.
    pub const FUA: Self = Self(2);
    /// A discard.
    pub const DISCARD: Self = Self(4);

    /// Whether all of `other` are set.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// An entry, without its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// First sector of the disk.
    pub sector: u64,
    /// Sectors of the disk.
    pub sectors: u64,
    /// What was done.
    pub flags: Flags,
}

impl Entry {
    /// Sectors of data that follow in the log.
    pub fn data_sectors(&self) -> u64 {
        if self.flags.contains(Flags::DISCARD) { 0 } else { self.sectors }
    }

    /// The entry as a sector of `sector` bytes.
    pub fn encode(&self, sector: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> =
            [self.sector, self.sectors, self.flags.0, 0].iter().flat_map(|number| number.to_le_bytes()).collect();
        bytes.resize(sector.max(ENTRY_LEN), 0);
        bytes
    }

    /// The entry in a sector; none if the sector is too short.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let number = |i: usize| bytes.get(i * 8..)?.first_chunk().copied().map(u64::from_le_bytes);
        Some(Self { sector: number(0)?, sectors: number(1)?, flags: Flags(number(2)?) })
    }
}

/// The superblock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Super {
    /// Entries that count.
    pub entries: u64,
    /// Bytes of a sector.
    pub sector: u32,
}

impl Super {
    /// The superblock as a sector.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes: Vec<u8> =
            [MAGIC, VERSION, self.entries].iter().flat_map(|number| number.to_le_bytes()).collect();
        bytes.extend(self.sector.to_le_bytes());
        bytes.resize(usize::try_from(self.sector).unwrap_or(SUPER_LEN).max(SUPER_LEN), 0);
        bytes
    }

    /// Reads a superblock.
    ///
    /// # Errors
    /// It is none, or one of another version.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let number = |i: usize| bytes.get(i * 8..).and_then(<[u8]>::first_chunk).copied().map(u64::from_le_bytes);
        if number(0) != Some(MAGIC) {
            return Err(Error::generic("Invalid log superblock magic"));
        }
        let version = number(1).unwrap_or(0);
        if version != VERSION {
            return Err(Error::generic(format!("Unsupported log version {version}")));
        }
        let sector = bytes.get(24..).and_then(<[u8]>::first_chunk).copied().map_or(0, u32::from_le_bytes);
        check_sector(sector)?;
        Ok(Self { entries: number(2).unwrap_or(0), sector })
    }
}

/// Whether a log may have sectors of that many bytes: an entry fits into one.
///
/// # Errors
/// It may not.
pub fn check_sector(sector: u32) -> Result<()> {
    let fits = usize::try_from(sector).is_ok_and(|sector| sector >= ENTRY_LEN) && sector < SECTOR_LIMIT;
    if fits && sector.is_power_of_two() {
        return Ok(());
    }
    Err(Error::generic(format!("Invalid log sector size {sector}")))
}
