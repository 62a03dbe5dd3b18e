//! SCSI persistent reservations as both sides see them: commands, parameter lists, parameter data, sense.
//!
//! Pure bytes and types, no I/O. `[SPC-4 §5.9]` the model, `[SPC-4 §6.15]` PERSISTENT RESERVE IN, `[SPC-4 §6.16]`
//! PERSISTENT RESERVE OUT.

mod command;
mod data;
mod sense;
mod transport;

pub use command::{Action, Cdb, Command, Key, Kind, Parameters, RegisterOptions};
pub use data::{Capabilities, Data, Holder, Malformed, Registrant};
pub use sense::{SENSE_SIZE, Sense, SenseKey};
pub use transport::port_name;

/// SCSI status bytes, `[SAM-5 §5.3]`.
pub mod status {
    /// Done.
    pub const GOOD: u8 = 0x00;
    /// Not done, the sense data says why.
    pub const CHECK_CONDITION: u8 = 0x02;
    /// The logical unit cannot take the command now.
    pub const BUSY: u8 = 0x08;
    /// Another nexus holds a reservation, or the key is not this nexus's.
    pub const RESERVATION_CONFLICT: u8 = 0x18;
    /// No room for a further command; the initiator repeats it.
    pub const TASK_SET_FULL: u8 = 0x28;
    /// Another initiator ended the command.
    pub const TASK_ABORTED: u8 = 0x40;
}
