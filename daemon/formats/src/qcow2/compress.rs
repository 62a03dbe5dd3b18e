//! Compressed clusters [qcow2 §Standard Cluster Descriptor, compressed]: one cluster of guest data, never more.

use super::header::Compression;
use block::{Errno, IoResult};
use flate2::{Decompress, FlushDecompress};
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
