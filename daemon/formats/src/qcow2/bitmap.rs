//! The bitmaps extension [qcow2 §Bitmaps extension]: bitmaps are kept as they are. An image whose bitmaps would have to
//! record writes is not written to, for they would silently miss them.

use super::bytes::{be16, be32, us};
use super::extensions::Bitmaps;
use super::header::{self, Header};
use block::Edge;
use buf::IoBuf;
use qapi::{Error, Result};

/// Most bytes of a directory; the reference's limit.
pub const MAX_DIRECTORY: u64 = 64 << 20;
/// Most bitmaps; the reference's limit.
const MAX_BITMAPS: u32 = 65535;
/// Bytes of the fixed part of an entry.
const FIXED: usize = 24;
/// Flag of an entry: the bitmap records all writes.
const AUTO: u32 = 2;

/// Reads the directory and checks that the image may be used as wanted.
///
/// # Errors
/// A malformed directory; a bitmap that would have to record writes in an image that is writable.
pub async fn check(file: &Edge, header: &Header, bitmaps: &Bitmaps, read_only: bool) -> Result<()> {
    if header.autoclear & header::BITMAPS == 0 {
        // Somebody who does not know bitmaps has written to the image: what the extension says counts for nothing.
        return Ok(());
    }
    let bad = |why: &str| Err(Error::generic(format!("bitmaps_ext: {why}")));
    if bitmaps.count == 0 || bitmaps.count > MAX_BITMAPS {
        return bad("found bitmaps extension with an impossible number of bitmaps");
    }
    if bitmaps.at == 0 || !bitmaps.at.is_multiple_of(header.cluster_size()) {
        return bad("Invalid bitmap directory offset");
    }
    if bitmaps.len > MAX_DIRECTORY || bitmaps.at.checked_add(bitmaps.len).is_none_or(|end| end > file.size()) {
        return bad("bitmap directory lies beyond the end of the image");
    }
    let buf = IoBuf::alloc(us(bitmaps.len));
    file.read(bitmaps.at, &buf).await.map_err(|errno| Error::io("Failed to read bitmap directory", errno.into()))?;
    let bytes = buf.to_vec();
    let mut at = 0;
    for _ in 0..bitmaps.count {
        let Some(entry) = bytes.get(at..).filter(|rest| rest.len() >= FIXED) else {
            return bad("Broken bitmap directory");
        };
        let (flags, name_len, extra) = (be32(entry, 12), usize::from(be16(entry, 18)), us(be32(entry, 20).into()));
        let len = FIXED.saturating_add(name_len).saturating_add(extra);
        let Some(name) = entry.get(FIXED.saturating_add(extra)..len) else { return bad("Broken bitmap directory") };
        if flags & AUTO != 0 && !read_only {
            return Err(Error::generic(format!(
                "The image has the bitmap '{}', which has to record writes: that is not supported, so the image can only be \
                 opened read-only",
                String::from_utf8_lossy(name)
            )));
        }
        at = at.saturating_add(len.next_multiple_of(8));
    }
    Ok(())
}
