//! The first cluster as a whole: header, header extensions, name of the backing file [qcow2 §Header].

use super::bytes::{be32, put32, put64, u64_of, us};
use super::extensions::{BACKING_FORMAT, END};
use qapi::{Error, Result};

/// The longest name of a backing file in bytes.
const MAX_NAME: usize = 1023;

/// A header extension as it stands in the image.
pub type Record = (u32, Vec<u8>);

/// The extensions in `bytes` one by one, those that nobody here knows included. Ends at what is none.
pub fn records(bytes: &[u8]) -> Vec<Record> {
    let mut found = Vec::new();
    let mut at = 0;
    while at + 8 <= bytes.len() {
        let (kind, len) = (be32(bytes, at), us(be32(bytes, at + 4).into()));
        let Some(data) = (at + 8).checked_add(len).and_then(|end| bytes.get(at + 8..end)) else { break };
        if kind == END {
            break;
        }
        found.push((kind, data.to_vec()));
        at = (at + 8).saturating_add(len).checked_next_multiple_of(8).unwrap_or(usize::MAX - 8);
    }
    found
}

/// The format of the backing file is `format` from now on, or not named.
pub fn set_backing_format(records: &mut Vec<Record>, format: Option<&str>) {
    records.retain(|(kind, _)| *kind != BACKING_FORMAT);
    if let Some(format) = format {
        records.insert(0, (BACKING_FORMAT, format.as_bytes().to_vec()));
    }
}

/// The first cluster of an image: `header` with all its fields but those of the backing file, which are set here.
///
/// # Errors
/// The name is too long, or there is no room for all.
pub fn first_cluster(header: &[u8], records: &[Record], backing: Option<&str>, cluster: u64) -> Result<Vec<u8>> {
    let mut bytes = header.to_vec();
    for (kind, data) in records.iter().map(|(kind, data)| (*kind, data.as_slice())).chain([(END, [].as_slice())]) {
        bytes.extend(kind.to_be_bytes());
        bytes.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
        bytes.extend(data);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
    let name = backing.unwrap_or_default();
    let at = if name.is_empty() { 0 } else { bytes.len() };
    put64(&mut bytes, 8, u64_of(at));
    put32(&mut bytes, 16, u32::try_from(name.len()).unwrap_or(u32::MAX));
    bytes.extend(name.as_bytes());
    if name.len() > MAX_NAME {
        return Err(Error::generic(format!("The name of the backing file is longer than {MAX_NAME} bytes")));
    }
    if u64_of(bytes.len()) > cluster {
        return Err(Error::generic(format!(
            "Header, extensions and the name of the backing file do not fit into one cluster of {cluster} bytes"
        )));
    }
    bytes.resize(us(cluster), 0);
    Ok(bytes)
}
