//! Compressed clusters [qcow2 §Standard Cluster Descriptor, compressed]: one cluster of guest data, never more.

use super::header::Compression;
use block::{Errno, IoResult};
use buf::IoBuf;
use flate2::{Compress, Decompress, FlushCompress, FlushDecompress, Status};
use std::cell::RefCell;
use std::io::Read;

/// What a thread uses again for each cluster that it unpacks.
struct Tools {
    inflate: Decompress,
    /// The packed bytes, in one piece.
    packed: Vec<u8>,
}

/// Packed bytes that a thread has room for between clusters: as many as clusters of the usual size need.
const KEEP: usize = 128 << 10;

thread_local! {
    static TOOLS: RefCell<Tools> = RefCell::new(Tools { inflate: Decompress::new(false), packed: Vec::new() });
}

/// Unpacks `packed` into exactly `len` bytes, for which `room` is used; what follows in `packed` belongs to others.
///
/// # Errors
/// `EIO` if the data is damaged or holds less than a cluster.
pub fn unpack(kind: Compression, packed: &IoBuf, room: Vec<u8>, len: usize) -> IoResult<Vec<u8>> {
    TOOLS.with_borrow_mut(|tools| {
        let Tools { inflate, packed: bytes } = tools;
        bytes.resize(packed.len(), 0);
        packed.read_at(0, bytes);
        let mut out = room;
        out.resize(len, 0);
        let done = match kind {
            Compression::Zlib => unpack_zlib(inflate, bytes, &mut out),
            Compression::Zstd => unpack_zstd(bytes, &mut out),
        };
        if bytes.len() > KEEP {
            *bytes = Vec::new();
        }
        done.map(|()| out)
    })
}

fn unpack_zlib(inflate: &mut Decompress, packed: &[u8], out: &mut [u8]) -> IoResult {
    inflate.reset(false);
    // The output is bounded by the slice, whatever the stream would like to write. A full output with input left over is as
    // good as the end: the tail of the last sector is not ours.
    inflate.decompress(packed, out, FlushDecompress::Finish).map_err(|_| Errno::EIO)?;
    if super::bytes::us(inflate.total_out()) == out.len() { Ok(()) } else { Err(Errno::EIO) }
}

fn unpack_zstd(packed: &[u8], out: &mut [u8]) -> IoResult {
    let mut stream = zstd::stream::read::Decoder::new(packed).map_err(|_| Errno::ENOMEM)?;
    stream.read_exact(out).map_err(|_| Errno::EIO)
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
            let packed = IoBuf::copy_of(&packed);
            // Once more, for the thread keeps what it used; and after damage, which leaves no trace.
            for room in [0, 1000, 100_000] {
                assert_eq!(unpack(kind, &packed, vec![3; room], text.len()).unwrap(), text);
                assert_eq!(unpack(kind, &packed.slice(0, 1000), Vec::new(), text.len()), Err(Errno::EIO));
                assert_eq!(unpack(kind, &IoBuf::copy_of(&[0xff; 700]), Vec::new(), text.len()), Err(Errno::EIO));
                assert_eq!(unpack(kind, &packed, Vec::new(), text.len() + 1), Err(Errno::EIO));
            }
            assert_eq!(pack(kind, &random).unwrap(), None);
        }
    }
}
