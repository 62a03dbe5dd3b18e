//! The header of an image [qcow2 §Header] and its feature bits.
//!
//! Parses untrusted bytes into [`Header`] and writes the fixed part back. Knows the limits of each field; where several
//! fields must agree with the file, the opening code checks them.

use super::bytes::{be32, be64, put32, put64};
use qapi::{Error, Result};

/// `QFI\xfb`.
pub const MAGIC: u32 = 0x5146_49fb;
/// Length of the header of version 2, in bytes.
const V2_LEN: usize = 72;
/// Length of the least header of version 3, in bytes.
const V3_LEN: usize = 104;
/// Most bytes of an active L1 table; the reference's limit.
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// Most bytes of a refcount table; the reference's limit.
pub const MAX_REFTABLE_BYTES: u64 = 8 << 20;
/// Most internal snapshots; the reference's limit.
pub const MAX_SNAPSHOTS: u32 = 65536;

/// Incompatible feature: refcounts may be wrong.
pub const DIRTY: u64 = 1;
/// Incompatible feature: metadata is damaged.
pub const CORRUPT: u64 = 1 << 1;
/// Incompatible feature: guest data is in another file.
pub const DATA_FILE: u64 = 1 << 2;
/// Incompatible feature: compression other than zlib.
pub const COMPRESSION: u64 = 1 << 3;
/// Incompatible feature: L2 entries of 128 bits.
pub const EXTENDED_L2: u64 = 1 << 4;
/// The incompatible features that are understood.
pub const KNOWN_INCOMPATIBLE: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;
/// Compatible feature: refcounts need not be written before the image is closed.
pub const LAZY_REFCOUNTS: u64 = 1;
/// Autoclear feature: the bitmaps extension is valid.
pub const BITMAPS: u64 = 1;
/// Autoclear feature: the external data file is the guest's disk as it is.
pub const RAW_DATA_FILE: u64 = 1 << 1;

/// How compressed clusters are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate.
    Zlib,
    /// Zstandard frames.
    Zstd,
}

/// The header, decoded. Offsets and lengths are bytes in the image file unless said otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Where the backing file's name is, 0 if there is none.
    pub backing_at: u64,
    /// Length of that name.
    pub backing_len: u32,
    /// log2 of the cluster size, 9 to 21.
    pub cluster_bits: u32,
    /// Length of the guest's disk.
    pub size: u64,
    /// Encryption method: 0 none, 1 AES, 2 LUKS.
    pub crypt: u32,
    /// Entries of the active L1 table.
    pub l1_entries: u32,
    /// Where it is.
    pub l1_at: u64,
    /// Where the refcount table is.
    pub reftable_at: u64,
    /// Its length in clusters.
    pub reftable_clusters: u32,
    /// Internal snapshots.
    pub snapshots: u32,
    /// Where their table is.
    pub snapshots_at: u64,
    /// Features without which the image cannot be used.
    pub incompatible: u64,
    /// Features that may be ignored.
    pub compatible: u64,
    /// Features whose data a writer that does not know them makes invalid.
    pub autoclear: u64,
    /// log2 of the width of a refcount in bits, 0 to 6.
    pub refcount_order: u32,
    /// Where the extensions begin.
    pub header_len: u32,
    /// How compressed clusters are compressed.
    pub compression: Compression,
}

fn bad(text: impl Into<String>) -> Error {
    Error::generic(text)
}

impl Header {
    /// Whether `other` has the same tables in the same places.
    pub fn names_same_tables(&self, other: &Self) -> bool {
        let tables = |h: &Self| (h.l1_at, h.reftable_at, h.reftable_clusters, h.snapshots_at);
        tables(self) == tables(other)
    }

    /// Decodes the beginning of an image, which must be at least 112 bytes unless the file is shorter.
    ///
    /// # Errors
    /// Not this format, or a field out of its range.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        if bytes.len() < V2_LEN || be32(bytes, 0) != MAGIC {
            return Err(bad("Image is not in qcow2 format"));
        }
        let version = be32(bytes, 4);
        if !(2..=3).contains(&version) {
            return Err(bad(format!("Unsupported qcow2 version {version}")));
        }
        let cluster_bits = be32(bytes, 20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(bad(format!("Unsupported cluster size: 2^{cluster_bits}")));
        }
        let mut header = Self {
            version,
            backing_at: be64(bytes, 8),
            backing_len: be32(bytes, 16),
            cluster_bits,
            size: be64(bytes, 24),
            crypt: be32(bytes, 32),
            l1_entries: be32(bytes, 36),
            l1_at: be64(bytes, 40),
            reftable_at: be64(bytes, 48),
            reftable_clusters: be32(bytes, 56),
            snapshots: be32(bytes, 60),
            snapshots_at: be64(bytes, 64),
            incompatible: 0,
            compatible: 0,
            autoclear: 0,
            refcount_order: 4,
            header_len: 72,
            compression: Compression::Zlib,
        };
        if version >= 3 {
            header.parse_v3(bytes)?;
        }
        header.check()?;
        Ok(header)
    }

    fn parse_v3(&mut self, bytes: &[u8]) -> Result<()> {
        if bytes.len() < V3_LEN {
            return Err(bad("qcow2 header too short"));
        }
        self.incompatible = be64(bytes, 72);
        self.compatible = be64(bytes, 80);
        self.autoclear = be64(bytes, 88);
        self.refcount_order = be32(bytes, 96);
        self.header_len = be32(bytes, 100);
        if self.header_len < 104 {
            return Err(bad("qcow2 header too short"));
        }
        if u64::from(self.header_len) > self.cluster_size() {
            return Err(bad("qcow2 header exceeds cluster size"));
        }
        let compression = if self.header_len >= 112 { bytes.get(104).copied().unwrap_or(0) } else { 0 };
        self.compression = match compression {
            0 => Compression::Zlib,
            1 => Compression::Zstd,
            other => return Err(bad(format!("qcow2: unknown compression type: {other}"))),
        };
        if (self.incompatible & COMPRESSION != 0) != (self.compression != Compression::Zlib) {
            return Err(bad(if self.compression == Compression::Zlib {
                "qcow2: Compression type incompatible feature bit must not be set"
            } else {
                "qcow2: Compression type incompatible feature bit must be set"
            }));
        }
        Ok(())
    }

    fn check(&self) -> Result<()> {
        if self.refcount_order > 6 {
            return Err(bad("Reference count entry width too large; may not exceed 64 bits"));
        }
        if self.backing_at > self.cluster_size() {
            return Err(bad("Invalid backing file offset"));
        }
        if self.backing_at != 0 && (self.backing_len > 1023 || self.backing_at < u64::from(self.header_len)) {
            return Err(bad("Backing file name too long"));
        }
        if self.extended_l2() && self.cluster_bits < 14 {
            return Err(bad("L2 entries of 128 bits need clusters of at least 16 KiB"));
        }
        if self.size > block::node::MAX_LENGTH {
            return Err(bad("Image is too big"));
        }
        self.check_tables()
    }

    fn check_tables(&self) -> Result<()> {
        self.check_table("Reference count table", self.reftable_at, self.reftable_bytes(), MAX_REFTABLE_BYTES)?;
        if self.reftable_clusters == 0 {
            return Err(bad("Image does not contain a reference count table"));
        }
        if self.snapshots > MAX_SNAPSHOTS {
            return Err(bad("Snapshot table too large"));
        }
        self.check_table("Snapshot table", self.snapshots_at, u64::from(self.snapshots) * 40, 64 << 20)?;
        self.check_table("Active L1 table", self.l1_at, u64::from(self.l1_entries) * 8, MAX_L1_BYTES)?;
        match self.l1_needed() {
            Some(needed) if needed <= u64::from(self.l1_entries) => Ok(()),
            Some(needed) if needed <= u64::from(u32::MAX) => Err(bad("L1 table is too small")),
            _ => Err(bad("Image is too big")),
        }
    }

    fn check_table(&self, what: &str, at: u64, len: u64, most: u64) -> Result<()> {
        if len > most {
            return Err(bad(format!("{what} too large")));
        }
        let fits = at.checked_add(len).is_some_and(|end| end <= i64::MAX.unsigned_abs());
        if len > 0 && (!fits || !at.is_multiple_of(self.cluster_size()) || at == 0) {
            return Err(bad(format!("{what} offset invalid")));
        }
        Ok(())
    }

    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of the refcount table.
    pub fn reftable_bytes(&self) -> u64 {
        u64::from(self.reftable_clusters) << self.cluster_bits
    }

    /// Whether L2 entries have 128 bits, with a bitmap of 32 subclusters.
    pub fn extended_l2(&self) -> bool {
        self.incompatible & EXTENDED_L2 != 0
    }

    /// Whether the bitmaps extension holds.
    pub fn has_bitmaps(&self) -> bool {
        self.autoclear & BITMAPS != 0
    }

    /// Whether guest data is in another file.
    pub fn has_data_file(&self) -> bool {
        self.incompatible & DATA_FILE != 0
    }

    /// Bytes of an L2 entry.
    pub fn l2_entry_size(&self) -> u64 {
        if self.extended_l2() { 16 } else { 8 }
    }

    /// Entries of an L2 table.
    pub fn l2_entries(&self) -> u64 {
        self.cluster_size() / self.l2_entry_size()
    }

    /// Bytes of the guest's disk that one L2 table maps.
    pub fn l2_reach(&self) -> u64 {
        self.cluster_size() * self.l2_entries()
    }

    /// L1 entries for a disk of `size` bytes.
    pub fn l1_entries_for(&self, size: u64) -> u64 {
        size.div_ceil(self.l2_reach())
    }

    fn l1_needed(&self) -> Option<u64> {
        Some(self.l1_entries_for(self.size))
    }

    /// The incompatible features that are not understood.
    pub fn unknown_incompatible(&self) -> u64 {
        self.incompatible & !KNOWN_INCOMPATIBLE
    }

    /// The fixed part as it stands in the image: 72 bytes, or 104 from version 3 on. What follows stays as it is.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; if self.version >= 3 { V3_LEN } else { V2_LEN }];
        put32(&mut bytes, 0, MAGIC);
        put32(&mut bytes, 4, self.version);
        put64(&mut bytes, 8, self.backing_at);
        put32(&mut bytes, 16, self.backing_len);
        put32(&mut bytes, 20, self.cluster_bits);
        put64(&mut bytes, 24, self.size);
        put32(&mut bytes, 32, self.crypt);
        put32(&mut bytes, 36, self.l1_entries);
        put64(&mut bytes, 40, self.l1_at);
        put64(&mut bytes, 48, self.reftable_at);
        put32(&mut bytes, 56, self.reftable_clusters);
        put32(&mut bytes, 60, self.snapshots);
        put64(&mut bytes, 64, self.snapshots_at);
        if self.version >= 3 {
            put64(&mut bytes, 72, self.incompatible);
            put64(&mut bytes, 80, self.compatible);
            put64(&mut bytes, 88, self.autoclear);
            put32(&mut bytes, 96, self.refcount_order);
            put32(&mut bytes, 100, self.header_len);
        }
        bytes
    }
}
