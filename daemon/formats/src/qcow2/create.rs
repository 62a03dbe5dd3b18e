//! Making an image (`blockdev-create`).
//!
//! Everything is laid out before anything is written: header, refcount table, refcount blocks, L1 table, and with
//! preallocation L2 tables and the guest's clusters, in this order. The header is written last, behind a barrier: what is
//! not complete is no image.

use super::bytes::{put64, u64_of, us};
use super::entry::COPIED;
use super::extensions::{DATA_FILE as DATA_FILE_NAME, FEATURE_NAMES};
use super::header::{self, Compression, Header};
use super::refcount::Refcounts;
use super::start;
use block::driver::Prealloc;
use block::{CreateContext, Disk, Errno, Span, WriteFlags, ZeroFlags};
use buf::IoBuf;
use qapi::types::create::{BlockdevCreateOptionsQcow2, BlockdevQcow2Version, PreallocMode, Qcow2CompressionType};
use qapi::{Error, Result};
use std::sync::Arc;

/// Bytes of tables that are written at once, at most.
const PIECE: usize = 1 << 20;
/// The cluster size where none is given.
const CLUSTER: u64 = 65536;

/// The bits that can be set, with the names that a program shows which does not know them: kind, bit, name.
const FEATURES: [(u8, u8, &str); 8] = [
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
];

/// Makes the image in nodes that `cx` gives.
///
/// # Errors
/// Options that do not go together, the errors of the nodes. What is in the nodes then is no image.
pub async fn create(cx: &mut dyn CreateContext, options: &BlockdevCreateOptionsQcow2) -> Result<()> {
    let mut plan = Plan::new(options)?;
    let file = cx.open(&options.file).await?;
    let data = match &options.data_file {
        Some(data) => Some(cx.open(data).await?),
        None => None,
    };
    if let Some(data) = &data {
        let (node, name) = (data.node(), data.node().driver().filename());
        // The guest's data would go over the metadata.
        if Arc::ptr_eq(&node, &file.node()) || (!name.is_empty() && name == file.node().driver().filename()) {
            let node = node.name();
            return Err(Error::generic(format!(
                "Permission conflict on node '{node}': it cannot be the file of an image and its data file at once"
            )));
        }
        if name.is_empty() {
            return Err(Error::generic(format!("The data file '{}' has no name to be found by", data.node().name())));
        }
        plan.records.insert(0, (DATA_FILE_NAME, name.into_bytes()));
    }
    start::set_backing_format(&mut plan.records, options.backing_fmt.map(|format| format.as_str()));
    let first = plan.first_cluster(options.backing_file.as_deref())?;
    plan.write(&file, data.as_ref()).await?;
    let failed = |errno: Errno| Error::io("Could not write qcow2 header", errno.into());
    file.flush().await.map_err(failed)?;
    file.write(0, &IoBuf::copy_of(&first), WriteFlags::NONE).await.map_err(failed)?;
    file.flush().await.map_err(failed)
}

/// What the image will be.
struct Plan {
    header: Header,
    records: Vec<start::Record>,
    mode: Prealloc,
    /// Guest clusters have their places from the beginning.
    mapped: bool,
    blocks: u64,
    l1_clusters: u64,
    tables: u64,
    /// Clusters of the whole file, the guest's among them.
    total: u64,
    /// Clusters of metadata, all in front.
    metadata: u64,
}

fn refused(text: &str) -> Error {
    Error::generic(text)
}

/// Checks what needs version 3 of the format.
fn check_version(options: &BlockdevCreateOptionsQcow2, refcount_bits: i64) -> Result<()> {
    let newer = "compatibility level 1.1 and above (use version=v3 or greater)";
    let what = if options.data_file.is_some() {
        "External data files are only"
    } else if options.extended_l2 == Some(true) {
        "Extended L2 entries are only"
    } else if options.lazy_refcounts == Some(true) {
        "Lazy refcounts only"
    } else if options.compression_type == Some(Qcow2CompressionType::Zstd) {
        "Non-zlib compression type is only"
    } else if refcount_bits != 16 {
        return Err(refused(
            "Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or greater)",
        ));
    } else {
        return Ok(());
    };
    Err(Error::generic(format!("{what} supported with {newer}")))
}

fn cluster_bits(options: &BlockdevCreateOptionsQcow2) -> Result<u32> {
    let cluster = options.cluster_size.map_or(CLUSTER, |size| size.0);
    if !cluster.is_power_of_two() || !(512..=2 << 20).contains(&cluster) {
        return Err(refused("Cluster size must be a power of two between 512 and 2048k"));
    }
    if options.extended_l2 == Some(true) && cluster < 16384 {
        return Err(refused("Extended L2 entries are only supported with cluster sizes of at least 16384 bytes"));
    }
    Ok(cluster.trailing_zeros())
}

fn check_files(options: &BlockdevCreateOptionsQcow2, mode: PreallocMode) -> Result<()> {
    let raw = options.data_file_raw == Some(true);
    if options.backing_file.is_some() && mode != PreallocMode::Off && options.extended_l2 != Some(true) {
        return Err(refused("Backing file and preallocation can only be used at the same time if extended_l2 is on"));
    }
    if options.backing_fmt.is_some() && options.backing_file.is_none() {
        return Err(refused("Backing format cannot be used without backing file"));
    }
    if raw && options.data_file.is_none() {
        return Err(refused("data-file-raw requires data-file"));
    }
    if raw && options.backing_file.is_some() {
        return Err(refused("Backing file and data-file-raw cannot be used at the same time"));
    }
    match &options.backing_file {
        Some(name) if name.len() > 1023 => {
            Err(Error::generic(format!("Could not assign backing file '{name}' to format '(null)': Invalid argument")))
        }
        _ => Ok(()),
    }
}

impl Plan {
    fn new(options: &BlockdevCreateOptionsQcow2) -> Result<Self> {
        let size = options.size.0;
        if !size.is_multiple_of(512) {
            return Err(refused("Image size must be a multiple of 512 bytes"));
        }
        let cluster_bits = cluster_bits(options)?;
        let refcount_bits = options.refcount_bits.unwrap_or(16);
        let width = u32::try_from(refcount_bits).ok().filter(|bits| bits.is_power_of_two() && *bits <= 64);
        let width = width.ok_or_else(|| refused("Refcount width must be a power of two and may not exceed 64 bits"))?;
        let v3 = options.version != Some(BlockdevQcow2Version::V2);
        if !v3 {
            check_version(options, refcount_bits)?;
        }
        let given = options.preallocation.unwrap_or(PreallocMode::Off);
        check_files(options, given)?;
        let raw = options.data_file_raw == Some(true);
        let bit = |set: bool, bit: u64| if set { bit } else { 0 };
        let zstd = options.compression_type == Some(Qcow2CompressionType::Zstd);
        let header = Header {
            version: if v3 { 3 } else { 2 },
            backing_at: 0,
            backing_len: 0,
            cluster_bits,
            size,
            crypt: 0,
            l1_entries: 0,
            l1_at: 0,
            reftable_at: 0,
            reftable_clusters: 0,
            snapshots: 0,
            snapshots_at: 0,
            incompatible: bit(options.data_file.is_some(), header::DATA_FILE)
                | bit(zstd, header::COMPRESSION)
                | bit(options.extended_l2 == Some(true), header::EXTENDED_L2),
            compatible: bit(options.lazy_refcounts == Some(true), header::LAZY_REFCOUNTS),
            autoclear: bit(raw, header::RAW_DATA_FILE),
            refcount_order: width.trailing_zeros(),
            header_len: if v3 { 112 } else { 72 },
            compression: if zstd { Compression::Zstd } else { Compression::Zlib },
        };
        let mode = match given {
            PreallocMode::Off => Prealloc::Off,
            PreallocMode::Metadata => Prealloc::Metadata,
            PreallocMode::Falloc => Prealloc::Falloc,
            PreallocMode::Full => Prealloc::Full,
        };
        // A raw data file is the guest's disk as it is, so all of it is mapped.
        Self::lay_out(header, mode, raw || given != PreallocMode::Off)
    }

    fn lay_out(mut header: Header, mode: Prealloc, mapped: bool) -> Result<Self> {
        let could_not = |why: &str| Error::generic(format!("Could not resize image: {why}"));
        if i64::try_from(header.size).is_err() {
            return Err(could_not("Image size cannot be negative"));
        }
        let cluster = header.cluster_size();
        let l1 = header.l1_entries_for(header.size);
        let l1_entries = u32::try_from(l1).ok().filter(|_| l1 * 8 <= header::MAX_L1_BYTES);
        header.l1_entries = l1_entries.ok_or_else(|| could_not("Failed to grow the L1 table: File too large"))?;
        let l1_clusters = (l1 * 8).div_ceil(cluster);
        let tables = if mapped { l1 } else { 0 };
        let guest = if mapped && !header.has_data_file() { header.size.div_ceil(cluster) } else { 0 };
        let fixed = 1 + l1_clusters + tables + guest;
        let per_block = (cluster * 8) >> header.refcount_order;
        let (mut blocks, mut table) = (1, 1);
        loop {
            let total: u64 = fixed + blocks + table;
            let needed = total.div_ceil(per_block);
            let (more_blocks, more_table) = (needed.max(blocks), (needed * 8).div_ceil(cluster).max(table));
            if (more_blocks, more_table) == (blocks, table) {
                break;
            }
            (blocks, table) = (more_blocks, more_table);
        }
        if table * cluster > header::MAX_REFTABLE_BYTES {
            return Err(could_not("the table of refcounts would be too large"));
        }
        header.reftable_at = cluster;
        header.reftable_clusters = u32::try_from(table).unwrap_or(u32::MAX);
        let metadata = 1 + table + blocks + l1_clusters + tables;
        header.l1_at = if l1 == 0 { 0 } else { (1 + table + blocks) * cluster };
        Ok(Self {
            header,
            records: Vec::new(),
            mode,
            mapped,
            blocks,
            l1_clusters,
            tables,
            total: metadata + guest,
            metadata,
        })
    }

    fn cluster(&self) -> u64 {
        self.header.cluster_size()
    }

    /// The names of features are for people: they are left out where they would leave no room for other things.
    fn first_cluster(&self, backing: Option<&str>) -> Result<Vec<u8>> {
        let mut header = self.header.encode();
        header.resize(us(self.header.header_len.into()), 0);
        if let (Some(place), Compression::Zstd) = (header.get_mut(104), self.header.compression) {
            *place = 1;
        }
        if self.header.version >= 3 && self.cluster() > 4096 {
            let mut names = Vec::with_capacity(FEATURES.len() * 48);
            for (kind, bit, name) in FEATURES {
                let end = names.len() + 48;
                names.extend([kind, bit]);
                names.extend(name.as_bytes());
                names.resize(end, 0);
            }
            let mut records = self.records.clone();
            records.push((FEATURE_NAMES, names));
            if let Ok(first) = start::first_cluster(&header, &records, backing, self.cluster()) {
                return Ok(first);
            }
        }
        start::first_cluster(&header, &self.records, backing, self.cluster())
    }

    /// Everything but the first cluster, which holds no image meanwhile.
    async fn write(&self, file: &Disk, data: Option<&Disk>) -> Result<()> {
        let failed = |errno: Errno| Error::io("Could not write the tables of the image", errno.into());
        let cluster = self.cluster();
        let end = self.metadata * cluster;
        let node = file.node();
        // Old bytes go where they can; on a device the old header at least.
        let emptied = node.truncate(0, false, Prealloc::Off).await.is_ok() && node.size() == 0;
        if node.size() < end {
            node.truncate(end, false, Prealloc::Off).await?;
        }
        if !emptied {
            file.write(0, &IoBuf::zeroed(us(cluster)), WriteFlags::NONE).await.map_err(failed)?;
            file.flush().await.map_err(failed)?;
        }
        self.write_refcounts(file).await.map_err(failed)?;
        self.write_mapping(file).await.map_err(failed)?;
        let whole = self.total * cluster;
        if let Some(data) = data {
            self.prepare_data(data).await?;
        } else if whole > end {
            if node.size() < whole {
                node.truncate(whole, false, self.file_mode()).await?;
            }
            if !emptied {
                // Nobody may see in the image what was on the device before.
                let flags = ZeroFlags { may_unmap: self.mode == Prealloc::Metadata, ..ZeroFlags::default() };
                file.zero(Span::new(end, whole - end), flags).await.map_err(failed)?;
            }
        }
        Ok(())
    }

    /// What preallocation of the image is for the file below.
    fn file_mode(&self) -> Prealloc {
        if self.mode == Prealloc::Metadata { Prealloc::Off } else { self.mode }
    }

    async fn prepare_data(&self, data: &Disk) -> Result<()> {
        if !self.mapped {
            return Ok(());
        }
        let node = data.node();
        let failed = |errno: Errno| Error::io("Could not clear the data file", errno.into());
        let emptied = node.truncate(0, false, Prealloc::Off).await.is_ok() && node.size() == 0;
        if node.size() < self.header.size {
            node.truncate(self.header.size, false, self.file_mode()).await?;
        }
        if !emptied {
            let flags = ZeroFlags { may_unmap: self.mode == Prealloc::Metadata, ..ZeroFlags::default() };
            data.zero(Span::new(0, self.header.size), flags).await.map_err(failed)?;
        }
        data.flush().await.map_err(failed)
    }

    async fn write_refcounts(&self, file: &Disk) -> Result<(), Errno> {
        let cluster = self.cluster();
        let first = 1 + u64::from(self.header.reftable_clusters);
        let mut table = vec![0; us(self.header.reftable_bytes())];
        for i in 0..self.blocks {
            put64(&mut table, us(i * 8), (first + i) * cluster);
        }
        write(file, self.header.reftable_at, &table).await?;
        let counts = Refcounts::new(self.header.cluster_bits, self.header.refcount_order, 0, &[], 0);
        for i in 0..self.blocks {
            write(file, (first + i) * cluster, &counts.full_block(i, self.total)).await?;
        }
        Ok(())
    }

    /// The L1 table, and the L2 tables if there are any.
    async fn write_mapping(&self, file: &Disk) -> Result<(), Errno> {
        let cluster = self.cluster();
        let mut l1 = vec![0; us(self.l1_clusters * cluster)];
        let first = self.header.l1_at + self.l1_clusters * cluster;
        for i in 0..self.tables {
            put64(&mut l1, us(i * 8), (first + i * cluster) | COPIED);
        }
        for (i, piece) in l1.chunks(PIECE).enumerate() {
            write(file, self.header.l1_at + u64_of(i * PIECE), piece).await?;
        }
        let entries = self.header.l2_entries();
        let guest = self.header.size.div_ceil(cluster);
        for table in 0..self.tables {
            let mut bytes = vec![0; us(cluster)];
            for i in 0..entries.min(guest - table * entries) {
                let index = table * entries + i;
                let host = if self.header.has_data_file() { index } else { self.metadata + index };
                put64(&mut bytes, us(i * self.header.l2_entry_size()), (host * cluster) | COPIED);
            }
            write(file, first + table * cluster, &bytes).await?;
        }
        Ok(())
    }
}

async fn write(file: &Disk, at: u64, bytes: &[u8]) -> Result<(), Errno> {
    if bytes.is_empty() {
        return Ok(());
    }
    file.write(at, &IoBuf::copy_of(bytes), WriteFlags::NONE).await
}
