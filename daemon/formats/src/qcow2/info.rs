//! What an image says of itself: for `query-named-block-nodes`.

use super::header::{self, Compression};
use super::image::{Qcow2, lock};
use super::snapshot::read_table;
use block::driver::ImageDetails;
use qapi::types::block_query::*;

impl Qcow2 {
    pub(super) async fn details(&self) -> ImageDetails {
        let header = self.header_now();
        let named = lock(&self.backing_name).clone();
        // A table that cannot be read any more is told of by who needs it.
        let snapshots = read_table(&self.file.node(), &header).await.map_or_else(|_| Vec::new(), |(list, _)| list);
        let snapshots = snapshots.iter().map(|snapshot| snapshot.facts().into()).collect();
        ImageDetails {
            dirty: Some(header.incompatible & header::DIRTY != 0),
            cluster_size: u32::try_from(header.cluster_size()).ok(),
            full_backing_filename: named
                .as_deref()
                .map(|name| super::open::beside(name, &self.file).unwrap_or_else(|_| name.to_owned())),
            backing_filename: named,
            backing_filename_format: self.extensions.backing_format.clone(),
            snapshots,
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
}
