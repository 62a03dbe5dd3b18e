//! Internal snapshots [qcow2 §Snapshots]: their table is checked and kept, and what they share is copied before it
//! changes. Making and deleting them is not here yet.

use super::bytes::{be16, be32, us};
use super::header::Header;
use block::Edge;
use buf::IoBuf;
use qapi::{Error, Result};

/// Most bytes of the table; the reference's limit.
pub const MAX_TABLE: u64 = 64 << 20;
/// Bytes of the fixed part of an entry.
pub const FIXED: u64 = 40;

/// Reads the table of snapshots through, and checks that it is one.
///
/// # Errors
/// It cannot be read, or is malformed.
pub async fn check_table(file: &Edge, header: &Header) -> Result<()> {
    let mut at = header.snapshots_at;
    let too_large = || Error::generic("Snapshot table too large");
    for _ in 0..header.snapshots {
        at = at.checked_next_multiple_of(8).ok_or_else(too_large)?;
        let fixed = piece(file, at, FIXED).await?;
        let (id_len, name_len) = (u64::from(be16(&fixed, 12)), u64::from(be16(&fixed, 14)));
        let extra_len = u64::from(be32(&fixed, 36));
        if extra_len > 1024 {
            return Err(Error::generic("Too much extra metadata in snapshot table entry"));
        }
        at += FIXED + extra_len + id_len + name_len;
        if at - header.snapshots_at > MAX_TABLE {
            return Err(too_large());
        }
    }
    Ok(())
}

async fn piece(file: &Edge, at: u64, len: u64) -> Result<Vec<u8>> {
    if at.checked_add(len).is_none_or(|end| end > file.size()) {
        return Err(Error::generic("Could not read snapshots: the table lies beyond the end of the image"));
    }
    let buf = IoBuf::alloc(us(len));
    file.read(at, &buf).await.map_err(|errno| Error::io("Could not read snapshots", errno.into()))?;
    Ok(buf.to_vec())
}
