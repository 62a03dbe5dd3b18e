//! Compressed clusters [qcow2 §Standard Cluster Descriptor, compressed]: one cluster of guest data, never more.

use super::header::Compression;
use block::{Errno, IoResult};
use flate2::{Compress, Decompress, FlushCompress, FlushDecompress, Status};
use std::io::Read;

/// Unpacks `packed` into exactly `len` bytes; what follows in `packed` belongs to others.
///
/// # Errors
/// `EIO` if the data is damaged or holds less than a cluster.
pub fn unpack(kind: Compression, packed: &[u8], len: usize) -> IoResult<Vec<u8>> {
    let mut out = vec![0; len];
    match kind {
        Compression::Zlib => {
            // The output is bounded by the vector, whatever the stream would like to write.
            let mut stream = Decompress::new(false);
            let done = stream.decompress(packed, &mut out, FlushDecompress::Finish);
            // A full output with input left over is as good as the end: the tail of the last sector is not ours.
            done.map_err(|_| Errno::EIO)?;
            if stream.total_out() != super::bytes::u64_of(len) {
                return Err(Errno::EIO);
            }
        }
        Compression::Zstd => {
            let mut stream = zstd::stream::read::Decoder::new(packed).map_err(|_| Errno::ENOMEM)?;
            stream.read_exact(&mut out).map_err(|_| Errno::EIO)?;
        }
    }
    Ok(out)
}

/// log2 of the window of deflate that readers have: distances in the stream are no longer.
const WINDOW_BITS: u8 = 12;

/// Packs one cluster; none if that would not make it smaller.
///
/// # Errors
/// `ENOMEM` where the library has no memory.
pub fn pack(kind: Compression, cluster: &[u8]) -> IoResult<Option<Vec<u8>>> {
    // One byte less than the cluster: what does not fit is not worth it.
    let room = cluster.len().saturating_sub(1);
    match kind {
        Compression::Zlib => {
            let mut out = vec![0; room];
            let mut stream = Compress::new_with_window_bits(flate2::Compression::default(), false, WINDOW_BITS);
            let done = stream.compress(cluster, &mut out, FlushCompress::Finish).map_err(|_| Errno::ENOMEM)?;
            out.truncate(super::bytes::us(stream.total_out()));
            Ok((done == Status::StreamEnd).then_some(out))
        }
        Compression::Zstd => {
            let out = zstd::stream::encode_all(cluster, zstd::DEFAULT_COMPRESSION_LEVEL).map_err(|_| Errno::ENOMEM)?;
            Ok((out.len() <= room).then_some(out))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_packed_is_unpacked() {
        let text: Vec<u8> = (0..65536_u32).map(|i| u8::try_from((i / 7 % 251) ^ (i / 4000)).unwrap_or(0)).collect();
        let mut noise = 1_u64;
        let random: Vec<u8> = std::iter::repeat_with(|| {
            noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            noise.to_be_bytes()[0]
        })
        .take(65536)
        .collect();
        for kind in [Compression::Zlib, Compression::Zstd] {
            let mut packed = pack(kind, &text).unwrap().unwrap();
            assert!(packed.len() < 20_000);
            // Others' bytes follow in the sector.
            packed.extend([0xff; 300]);
            assert_eq!(unpack(kind, &packed, text.len()).unwrap(), text);
            assert_eq!(pack(kind, &random).unwrap(), None);
        }
    }
}
