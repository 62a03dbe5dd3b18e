//! The classic protocol's messages, byte for byte what QEMU's `pr-manager-helper` speaks.
//!
//! All numbers are big endian. After connecting: the helper sends a word of the features it offers, the client answers
//! with a word of those it wants. Then, any number of times, one after the other: the client sends a 16-byte CDB with
//! exactly one descriptor and, for PERSISTENT RESERVE OUT, the parameter list that the CDB announces; the helper
//! answers with a [`Reply`].

use crate::scsi::{Cdb, SENSE_SIZE};

/// Feature bit: after the negotiation both sides speak [`crate::frame`]. QEMU defines no features and asks for none.
///
/// Neither the lowest bits, where QEMU would define its first, nor the highest, which clients use to test refusal.
pub const FEATURE_FRAMES: u32 = 1 << 30;

/// Every feature this implementation knows.
pub const FEATURES: u32 = FEATURE_FRAMES;

/// Bytes of a reply before its payload: status, size, sense.
pub const REPLY_HEADER: usize = 4 + 4 + SENSE_SIZE;

/// The largest parameter list and the largest payload, in bytes; a request that names more ends the connection.
pub const MAX_DATA: usize = 8192;

/// What a client asked for in the negotiation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// No feature: the classic protocol.
    Classic,
    /// [`FEATURE_FRAMES`].
    Frames,
}

impl Protocol {
    /// Reads the client's answer to the feature word; `None` for a bit that `offered` does not have.
    pub fn from_requested(word: [u8; 4], offered: u32) -> Option<Self> {
        match u32::from_be_bytes(word) {
            0 => Some(Self::Classic),
            FEATURE_FRAMES if offered & FEATURE_FRAMES != 0 => Some(Self::Frames),
            _ => None,
        }
    }
}

/// What a device, or the helper in its place, answered to a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// SCSI status, [`crate::scsi::status`].
    pub status: u8,
    /// Sense data; zero unless the status is CHECK CONDITION.
    pub sense: [u8; SENSE_SIZE],
    /// Parameter data: PERSISTENT RESERVE IN with status GOOD only, else empty. At most [`MAX_DATA`] bytes.
    pub data: Vec<u8>,
}

impl Reply {
    /// A reply of a status alone.
    pub fn status(status: u8) -> Self {
        Self { status, sense: [0; SENSE_SIZE], data: Vec::new() }
    }

    /// CHECK CONDITION with this sense.
    pub fn check(sense: crate::scsi::Sense) -> Self {
        Self { status: crate::scsi::status::CHECK_CONDITION, sense: sense.to_fixed(), data: Vec::new() }
    }

    /// The bytes of the reply, header and payload.
    pub fn encode(&self) -> Vec<u8> {
        let data = self.data.get(..MAX_DATA).unwrap_or(&self.data);
        let size = u32::try_from(data.len()).unwrap_or(0);
        let mut out = Vec::with_capacity(REPLY_HEADER + data.len());
        out.extend_from_slice(&u32::from(self.status).to_be_bytes());
        out.extend_from_slice(&size.to_be_bytes());
        out.extend_from_slice(&self.sense);
        out.extend_from_slice(data);
        out
    }

    /// Reads the header of a reply: the reply without its payload, and how many bytes of payload follow.
    ///
    /// `None` if the status is no SCSI status or the payload is larger than [`MAX_DATA`].
    pub fn decode_header(header: &[u8; REPLY_HEADER]) -> Option<(Self, usize)> {
        let (status, rest) = header.split_first_chunk::<4>()?;
        let (size, sense) = rest.split_first_chunk::<4>()?;
        let status = u8::try_from(u32::from_be_bytes(*status)).ok()?;
        let size = usize::try_from(u32::from_be_bytes(*size)).ok().filter(|&n| n <= MAX_DATA)?;
        Some((Self { status, sense: sense.try_into().ok()?, data: Vec::new() }, size))
    }
}

/// Why a CDB ends the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Neither PERSISTENT RESERVE IN nor PERSISTENT RESERVE OUT.
    #[error("CDB of operation code {0:#04x}, which is not PERSISTENT RESERVE IN or OUT")]
    Opcode(u8),
    /// The allocation or parameter list length.
    #[error("CDB of {0} bytes of data, more than {MAX_DATA}")]
    Length(u32),
}

/// Checks the CDB of a classic request; what it returns is complete in itself, but its service action may be unknown.
pub fn decode_request(bytes: [u8; Cdb::SIZE]) -> Result<Cdb, Refused> {
    let cdb = Cdb::new(bytes).ok_or(Refused::Opcode(bytes[0]))?;
    if usize::try_from(cdb.data_length()).is_ok_and(|n| n <= MAX_DATA) {
        Ok(cdb)
    } else {
        Err(Refused::Length(cdb.data_length()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scsi::{Sense, status};
    use proptest::prelude::*;

    #[test]
    fn reply_layout() {
        let bytes = Reply::check(Sense::IO_PROCESS_TERMINATED).encode();
        assert_eq!(bytes.len(), 104);
        assert_eq!(bytes[..8], [0, 0, 0, 2, 0, 0, 0, 0]);
        assert_eq!(bytes[8..26], [0x70, 0, 0x0b, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0, 6, 0, 0, 0, 0]);
        assert!(bytes[26..].iter().all(|&b| b == 0));
        let data = Reply { data: vec![1, 2, 3], ..Reply::status(status::GOOD) }.encode();
        assert_eq!((data.len(), &data[4..8], &data[104..]), (107, &[0, 0, 0, 3][..], &[1, 2, 3][..]));
    }

    #[test]
    fn negotiation() {
        assert_eq!(Protocol::from_requested([0; 4], FEATURES), Some(Protocol::Classic));
        assert_eq!(Protocol::from_requested([0x40, 0, 0, 0], FEATURES), Some(Protocol::Frames));
        assert_eq!(Protocol::from_requested([0x40, 0, 0, 0], 0), None);
        assert_eq!(Protocol::from_requested([0x40, 0, 0, 1], FEATURES), None);
        assert_eq!(Protocol::from_requested([0x80, 0, 0, 0], FEATURES), None);
    }

    #[test]
    fn lengths() {
        let cdb = |op: u8, len: [u8; 4]| {
            let mut c = [0; 16];
            c[0] = op;
            c[5..9].copy_from_slice(&len);
            c
        };
        assert_eq!(decode_request(cdb(0x5f, [0, 0, 0x20, 0])).map(|c| c.data_length()), Ok(8192));
        assert_eq!(decode_request(cdb(0x5f, [0, 0, 0x20, 1])), Err(Refused::Length(8193)));
        // The high bytes count for OUT; for IN they are reserved.
        assert_eq!(decode_request(cdb(0x5f, [0, 1, 0, 24])), Err(Refused::Length(65560)));
        assert_eq!(decode_request(cdb(0x5e, [0, 1, 0, 24])).map(|c| c.data_length()), Ok(24));
        assert_eq!(decode_request(cdb(0x12, [0; 4])), Err(Refused::Opcode(0x12)));
    }

    proptest! {
        #[test]
        fn any_header_and_cdb(header in proptest::array::uniform32(any::<u8>()), cdb: [u8; 16]) {
            let mut h = [0; REPLY_HEADER];
            h[..32].copy_from_slice(&header);
            if let Some((reply, size)) = Reply::decode_header(&h) {
                prop_assert!(size <= MAX_DATA && u32::from(reply.status) == u32::from_be_bytes([h[0], h[1], h[2], h[3]]));
            }
            if let Ok(cdb) = decode_request(cdb) {
                prop_assert!(cdb.data_length() <= 8192);
            }
        }
    }
}
