//! Header extensions [qcow2 §Header extensions]: typed records between the header and the backing file's name.

use super::bytes::{be32, be64, us};
use qapi::{Error, Result};

pub(super) const END: u32 = 0;
pub(super) const BACKING_FORMAT: u32 = 0xe279_2aca;
pub(super) const FEATURE_NAMES: u32 = 0x6803_f857;
const BITMAPS: u32 = 0x2385_2875;
const CRYPTO: u32 = 0x0537_be77;
pub(super) const DATA_FILE: u32 = 0x4441_5441;

/// Where the directory of bitmaps is [qcow2 §Bitmaps extension].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmaps {
    /// Number of bitmaps.
    pub count: u32,
    /// Bytes of the directory.
    pub len: u64,
    /// Where it is.
    pub at: u64,
}

/// What the extensions say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extensions {
    /// The format of the backing file.
    pub backing_format: Option<String>,
    /// The name of the external data file.
    pub data_file: Option<String>,
    /// Names of feature bits: kind (0 incompatible, 1 compatible, 2 autoclear), bit, name.
    pub names: Vec<(u8, u8, String)>,
    /// The bitmaps of the image.
    pub bitmaps: Option<Bitmaps>,
    /// There is a header of full-disk encryption.
    pub crypto: bool,
}

impl Extensions {
    /// Decodes those in `bytes`, which begin behind the header and end before the backing file's name or at the end of the
    /// first cluster. Unknown ones are passed over.
    ///
    /// # Errors
    /// One that runs over the end, or is malformed.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let mut found = Self::default();
        let mut at = 0;
        while at + 8 <= bytes.len() {
            let (kind, len) = (be32(bytes, at), us(be32(bytes, at + 4).into()));
            if kind == END {
                break;
            }
            at += 8;
            let Some(data) = at.checked_add(len).and_then(|end| bytes.get(at..end)) else {
                return Err(Error::generic("Header extension too large"));
            };
            found.take(kind, data)?;
            at = at.saturating_add(len).checked_next_multiple_of(8).unwrap_or(usize::MAX);
        }
        Ok(found)
    }

    fn take(&mut self, kind: u32, data: &[u8]) -> Result<()> {
        match kind {
            BACKING_FORMAT => self.backing_format = Some(text("format of the backing file", data)?),
            DATA_FILE => self.data_file = Some(text("name of the data file", data)?),
            FEATURE_NAMES => {
                for row in data.chunks_exact(48) {
                    let name: Vec<u8> = row.iter().skip(2).copied().take_while(|b| *b != 0).collect();
                    if let [kind, bit, ..] = row {
                        self.names.push((*kind, *bit, String::from_utf8_lossy(&name).into_owned()));
                    }
                }
            }
            BITMAPS => {
                if data.len() != 24 {
                    return Err(Error::generic("bitmaps_ext: Invalid extension length"));
                }
                if be32(data, 4) != 0 {
                    return Err(Error::generic("bitmaps_ext: Reserved field is not zero"));
                }
                self.bitmaps = Some(Bitmaps { count: be32(data, 0), len: be64(data, 8), at: be64(data, 16) });
            }
            CRYPTO => self.crypto = true,
            _ => {}
        }
        Ok(())
    }

    /// The names of the incompatible features in `bits`, for a message.
    pub fn name_features(&self, bits: u64) -> String {
        let mut names = Vec::new();
        let mut unnamed = bits;
        for (_, bit, name) in self.names.iter().filter(|(kind, bit, _)| *kind == 0 && *bit < 64) {
            if unnamed & (1 << bit) != 0 {
                names.push(name.clone());
                unnamed &= !(1 << bit);
            }
        }
        if unnamed != 0 {
            names.push(format!("Unknown incompatible feature: {unnamed:x}"));
        }
        names.join(", ")
    }
}

fn text(what: &str, data: &[u8]) -> Result<String> {
    if data.len() > 1023 {
        return Err(Error::generic(format!("The {what} is longer than 1023 bytes")));
    }
    String::from_utf8(data.to_vec()).map_err(|_| Error::generic(format!("The {what} is not UTF-8")))
}
