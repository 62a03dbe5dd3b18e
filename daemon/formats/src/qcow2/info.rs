//! What an image says of itself: for `query-named-block-nodes`.

use super::bytes::be16;
use super::bytes::{be32, be64, u64_of, us};
use super::header::{self, Compression};
use super::image::{Qcow2, lock};
use super::snapshot::{FIXED, MAX_TABLE};
use block::driver::ImageDetails;
use buf::IoBuf;
use qapi::types::block_query::*;

/// Most bytes of an entry of the table of snapshots: the fixed part, extra data, name and number.
const MAX_ENTRY: u64 = FIXED + 1024 + 2 * 65535;

impl Qcow2 {
    pub(super) async fn details(&self) -> ImageDetails {
        let header = self.header_now();
        let named = lock(&self.backing_name).clone();
        ImageDetails {
            dirty: Some(header.incompatible & header::DIRTY != 0),
            cluster_size: u32::try_from(header.cluster_size()).ok(),
            full_backing_filename: named
                .as_deref()
                .map(|name| super::open::beside(name, &self.file).unwrap_or_else(|_| name.to_owned())),
            backing_filename: named,
            backing_filename_format: self.extensions.backing_format.clone(),
            snapshots: self.snapshot_infos().await,
            specific: Some(ImageInfoSpecificVariant::Qcow2(Box::new(ImageInfoSpecificQCow2Wrapper {
                data: self.specific(&header),
            }))),
            ..ImageDetails::default()
        }
    }

    fn specific(&self, header: &header::Header) -> ImageInfoSpecificQCow2 {
        let modern = |value: bool| (header.version >= 3).then_some(value);
        let bitmaps = self.bitmaps.list();
        let bitmap = |bitmap: &super::bitmap::Bitmap| Qcow2BitmapInfo {
            name: bitmap.name.clone(),
            granularity: u32::try_from(bitmap.granularity).unwrap_or(u32::MAX),
            flags: [(bitmap.in_use, Qcow2BitmapInfoFlags::InUse), (bitmap.auto, Qcow2BitmapInfoFlags::Auto)]
                .into_iter()
                .filter_map(|(set, flag)| set.then_some(flag))
                .collect(),
        };
        ImageInfoSpecificQCow2 {
            compat: if header.version >= 3 { "1.1" } else { "0.10" }.to_owned(),
            data_file: self.extensions.data_file.clone(),
            data_file_raw: header.has_data_file().then_some(self.raw_data),
            extended_l2: modern(header.extended_l2()),
            lazy_refcounts: modern(header.compatible & header::LAZY_REFCOUNTS != 0),
            corrupt: modern(header.incompatible & header::CORRUPT != 0),
            refcount_bits: 1 << header.refcount_order,
            bitmaps: (!bitmaps.is_empty()).then(|| bitmaps.iter().map(bitmap).collect()),
            compression_type: match header.compression {
                Compression::Zlib => Qcow2CompressionType::Zlib,
                Compression::Zstd => Qcow2CompressionType::Zstd,
            },
        }
    }

    /// The internal snapshots as the table in the image has them; those up to an entry that cannot be read.
    async fn snapshot_infos(&self) -> Vec<SnapshotInfo> {
        let header = self.header_now();
        let mut at = header.snapshots_at;
        let mut infos = Vec::new();
        for _ in 0..header.snapshots {
            at = at.next_multiple_of(8);
            let buf = IoBuf::alloc(us(MAX_ENTRY.min(self.file.size().saturating_sub(at))));
            if at - header.snapshots_at > MAX_TABLE || self.file.read(at, &buf).await.is_err() {
                break;
            }
            let Some((info, len)) = entry(&buf.to_vec()) else { break };
            infos.push(info);
            at += len;
        }
        infos
    }
}

/// The first entry of a piece of the table, and its length.
fn entry(bytes: &[u8]) -> Option<(SnapshotInfo, u64)> {
    let (id_len, name_len) = (usize::from(be16(bytes, 12)), usize::from(be16(bytes, 14)));
    let extra_at = us(FIXED);
    let extra = us(be32(bytes, 36).into());
    let id_at = extra_at.checked_add(extra)?;
    let text = |at: usize, len: usize| Some(String::from_utf8_lossy(bytes.get(at..at.checked_add(len)?)?).into_owned());
    let signed = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    let clock = be64(bytes, 24);
    let state = if extra >= 8 { be64(bytes, extra_at) } else { be32(bytes, 32).into() };
    let icount = if extra >= 24 { be64(bytes, extra_at + 16) } else { u64::MAX };
    let info = SnapshotInfo {
        id: text(id_at, id_len)?,
        name: text(id_at.checked_add(id_len)?, name_len)?,
        vm_state_size: signed(state),
        date_sec: be32(bytes, 16).into(),
        date_nsec: be32(bytes, 20).into(),
        vm_clock_sec: signed(clock / 1_000_000_000),
        vm_clock_nsec: signed(clock % 1_000_000_000),
        icount: i64::try_from(icount).ok(),
    };
    Some((info, u64_of(id_at + id_len + name_len)))
}
