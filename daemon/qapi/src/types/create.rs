//! Making images: `blockdev-create`.
//!
//! A driver that can make images is one struct with its options, and one variant of [`BlockdevCreateVariant`].

use crate::types::block::{BlockdevDriver, BlockdevRef};
use crate::{Qapi, Size};

/// How much of an image is there from the beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Qapi)]
pub enum PreallocMode {
    /// Nothing: it grows as it is written to.
    Off,
    /// The metadata of the format.
    Metadata,
    /// All space, reserved and not written.
    Falloc,
    /// All space, written with zeroes.
    Full,
}

/// Makes a file.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(since = "2.12")]
pub struct BlockdevCreateOptionsFile {
    /// Its path. A file that is there already is emptied first.
    pub filename: String,
    /// Its size in bytes.
    pub size: Size,
    /// How much of its space is taken at once; `off` when left out, and never `metadata`.
    pub preallocation: Option<PreallocMode>,
    /// No copy-on-write by the file system, where it has such a switch; false when left out.
    pub nocow: Option<bool>,
    /// Bytes by which the file system extends the file, where it can be told; 1 MiB when left out, 0 is its own choice.
    #[qapi(since = "5.1")]
    pub extent_size_hint: Option<Size>,
}

/// A version of the QCOW2 format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Qapi)]
pub enum BlockdevQcow2Version {
    /// The original one (`compat=0.10`).
    V2,
    /// The extended one (`compat=1.1`).
    V3,
}

/// How clusters of a QCOW2 image are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Qapi)]
pub enum Qcow2CompressionType {
    /// Deflate.
    Zlib,
    /// Zstandard.
    Zstd,
}

/// Makes a QCOW2 image inside a node.
#[derive(Debug, Clone, PartialEq, Qapi)]
#[qapi(since = "2.12")]
pub struct BlockdevCreateOptionsQcow2 {
    /// The node that becomes the image.
    pub file: BlockdevRef,
    /// The node that keeps the guest's data, if it is to be another one.
    #[qapi(since = "4.0")]
    pub data_file: Option<BlockdevRef>,
    /// The data file alone can be read as a raw image; false when left out.
    #[qapi(since = "4.0")]
    pub data_file_raw: Option<bool>,
    /// Extended L2 entries, with subclusters; false when left out.
    #[qapi(rename = "extended-l2", since = "5.2")]
    pub extended_l2: Option<bool>,
    /// Size of the disk in bytes, a multiple of 512.
    pub size: Size,
    /// Version of the format; `v3` when left out.
    pub version: Option<BlockdevQcow2Version>,
    /// The name of the backing file. It is stored, not opened.
    pub backing_file: Option<String>,
    /// The driver of the backing file.
    pub backing_fmt: Option<BlockdevDriver>,
    /// Bytes of a cluster: a power of two from 512 to 2 MiB; 64 KiB when left out.
    pub cluster_size: Option<Size>,
    /// How much is there from the beginning; `off` when left out.
    pub preallocation: Option<PreallocMode>,
    /// Refcounts may be written late; false when left out.
    pub lazy_refcounts: Option<bool>,
    /// Width of a refcount in bits: 1, 2, 4, 8, 16, 32 or 64; 16 when left out.
    pub refcount_bits: Option<i64>,
    /// How clusters are compressed; `zlib` when left out.
    #[qapi(since = "5.1")]
    pub compression_type: Option<Qcow2CompressionType>,
}

/// An image to make.
#[derive(Debug, Clone, PartialEq, Qapi)]
#[qapi(since = "2.12")]
pub struct BlockdevCreateOptions {
    /// The driver of the image.
    #[qapi(variants, tag = "driver")]
    pub driver: BlockdevCreateVariant,
}

/// The drivers that can make images.
#[derive(Debug, Clone, PartialEq, Qapi)]
#[qapi(variants, tag_type = "BlockdevDriver", refuse = "Driver does not support blockdev-create")]
pub enum BlockdevCreateVariant {
    /// A file.
    File(BlockdevCreateOptionsFile),
    /// A QCOW2 image.
    Qcow2(BlockdevCreateOptionsQcow2),
}

/// Starts a job that makes an image. It is finalized by itself, and must be dismissed.
#[derive(Debug, Clone, PartialEq, Qapi)]
#[qapi(command = "blockdev-create", since = "3.0")]
pub struct BlockdevCreate {
    /// The name of the job.
    pub job_id: String,
    /// The image.
    pub options: BlockdevCreateOptions,
}
