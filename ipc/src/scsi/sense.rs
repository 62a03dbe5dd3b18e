//! Sense data, `[SPC-4 §4.5]`.

/// Bytes of sense data in a reply.
pub const SENSE_SIZE: usize = 96;

/// The sense keys that the helper gives or names, `[SPC-4 §4.5.6]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum SenseKey {
    /// The logical unit cannot be reached.
    NotReady = 0x02,
    /// The target failed.
    HardwareError = 0x04,
    /// The command or its parameters are wrong.
    IllegalRequest = 0x05,
    /// The unit changed since the last command.
    UnitAttention = 0x06,
    /// The access is not allowed.
    DataProtect = 0x07,
    /// The command was ended.
    AbortedCommand = 0x0b,
}

/// A sense key with its additional code and qualifier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sense {
    /// The sense key, 0 to 15.
    pub key: u8,
    /// Additional sense code.
    pub code: u8,
    /// Additional sense code qualifier.
    pub qualifier: u8,
}

impl Sense {
    /// I/O PROCESS TERMINATED: what the ioctl did not do for a reason that has no sense of its own.
    pub const IO_PROCESS_TERMINATED: Self = Self::new(SenseKey::AbortedCommand, 0x00, 0x06);
    /// LOGICAL UNIT COMMUNICATION FAILURE.
    pub const COMMUNICATION_FAILURE: Self = Self::new(SenseKey::AbortedCommand, 0x08, 0x00);
    /// COMMAND TIMEOUT DURING PROCESSING.
    pub const TIMEOUT: Self = Self::new(SenseKey::AbortedCommand, 0x2e, 0x02);
    /// COMMANDS CLEARED BY ANOTHER INITIATOR.
    pub const ABORTED: Self = Self::new(SenseKey::AbortedCommand, 0x2f, 0x00);
    /// LOGICAL UNIT DOES NOT RESPOND TO SELECTION.
    pub const NOT_RESPONDING: Self = Self::new(SenseKey::AbortedCommand, 0x05, 0x00);
    /// INTERNAL TARGET FAILURE.
    pub const TARGET_FAILURE: Self = Self::new(SenseKey::HardwareError, 0x44, 0x00);
    /// MEDIUM NOT PRESENT.
    pub const NO_MEDIUM: Self = Self::new(SenseKey::NotReady, 0x3a, 0x00);
    /// BUS DEVICE RESET FUNCTION OCCURRED.
    pub const RESET: Self = Self::new(SenseKey::UnitAttention, 0x29, 0x00);
    /// INVALID COMMAND OPERATION CODE.
    pub const INVALID_OPCODE: Self = Self::new(SenseKey::IllegalRequest, 0x20, 0x00);
    /// ACCESS DENIED - NO ACCESS RIGHTS.
    pub const ACCESS_DENIED: Self = Self::new(SenseKey::IllegalRequest, 0x20, 0x02);
    /// INVALID FIELD IN CDB.
    pub const INVALID_FIELD_IN_CDB: Self = Self::new(SenseKey::IllegalRequest, 0x24, 0x00);
    /// INVALID FIELD IN PARAMETER LIST.
    pub const INVALID_FIELD_IN_PARAMETER_LIST: Self = Self::new(SenseKey::IllegalRequest, 0x26, 0x00);
    /// PARAMETER LIST LENGTH ERROR.
    pub const PARAMETER_LIST_LENGTH: Self = Self::new(SenseKey::IllegalRequest, 0x1a, 0x00);

    /// A sense of these three.
    pub const fn new(key: SenseKey, code: u8, qualifier: u8) -> Self {
        Self { key: key as u8, code, qualifier }
    }

    /// The standard's name of those above and of what devices often say about reservations. `[SPC-4 table F.2]`
    pub const fn name(self) -> Option<&'static str> {
        Some(match (self.code, self.qualifier) {
            (0x00, 0x06) => "I/O process terminated",
            (0x05, 0x00) => "logical unit does not respond to selection",
            (0x08, 0x00) => "logical unit communication failure",
            (0x1a, 0x00) => "parameter list length error",
            (0x20, 0x00) => "invalid command operation code",
            (0x20, 0x02) => "access denied - no access rights",
            (0x24, 0x00) => "invalid field in CDB",
            (0x26, 0x00) => "invalid field in parameter list",
            (0x26, 0x04) => "invalid release of persistent reservation",
            (0x29, _) => "power on, reset, or bus device reset occurred",
            (0x2a, 0x03) => "reservations preempted",
            (0x2a, 0x04) => "reservations released",
            (0x2a, 0x05) => "registrations preempted",
            (0x2e, 0x02) => "command timeout during processing",
            (0x2f, 0x00) => "commands cleared by another initiator",
            (0x3a, 0x00) => "medium not present",
            (0x44, 0x00) => "internal target failure",
            (0x55, 0x04) => "insufficient registration resources",
            _ => return None,
        })
    }

    /// Fixed-format sense data, current error, additional length 10.
    pub const fn to_fixed(self) -> [u8; SENSE_SIZE] {
        let mut bytes = [0; SENSE_SIZE];
        bytes[0] = 0x70;
        bytes[2] = self.key;
        bytes[7] = 10;
        bytes[12] = self.code;
        bytes[13] = self.qualifier;
        bytes
    }

    /// Reads fixed or descriptor format; `None` if it is neither.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let at = |i: usize| bytes.get(i).copied();
        let (key, code, qualifier) = match at(0)? & 0x7f {
            0x70 | 0x71 => (at(2)?, at(12)?, at(13)?),
            0x72 | 0x73 => (at(1)?, at(2)?, at(3)?),
            _ => return None,
        };
        Some(Self { key: key & 0x0f, code, qualifier })
    }
}

impl std::fmt::Display for Sense {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:x}/{:02x}/{:02x}", self.key, self.code, self.qualifier)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_formats() {
        assert_eq!(Sense::decode(&Sense::TIMEOUT.to_fixed()), Some(Sense::TIMEOUT));
        assert_eq!(Sense::decode(&[0x72, 5, 0x24, 0, 0, 0, 0, 0]), Some(Sense::INVALID_FIELD_IN_CDB));
        assert_eq!(Sense::decode(&[0xf0, 0, 6, 0]), None);
        assert_eq!(Sense::decode(&[]), None);
        assert_eq!(Sense::decode(&[0; 96]), None);
        assert_eq!(Sense::ACCESS_DENIED.to_string(), "5/20/02");
    }
}
