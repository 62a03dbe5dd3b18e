//! Persistent reservations as Linux has them for every kind of disk, `<linux/pr.h>`, and what they are in SCSI.
//!
//! The daemon takes this way where its own descriptor is enough, the helper for device-mapper maps and NVMe namespaces.
//! Numbers and layouts only: the calls are made where unsafe code may be, in the daemon's `io` and in the helper's ioctl
//! file. The kernel passes a status but no sense, so [`ended`] has what a SCSI disk would have said.

use crate::scsi::{Holder, Key, Kind, Sense};
use rustix::ioctl::{Opcode, opcode};
use std::io;

/// A change of reservations, as the kernel takes it. It always asks for persistence through power loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// IOC_PR_REGISTER: registers, changes or (`new` is 0) removes a key.
    Register {
        /// The present key.
        old: Key,
        /// The key from now on.
        new: Key,
        /// Whatever the present key is.
        ignore: bool,
    },
    /// IOC_PR_RESERVE: takes the reservation.
    Reserve {
        /// One's own key.
        key: Key,
        /// Type.
        kind: Kind,
    },
    /// IOC_PR_RELEASE: gives it up.
    Release {
        /// One's own key.
        key: Key,
        /// Type.
        kind: Kind,
    },
    /// IOC_PR_PREEMPT, IOC_PR_PREEMPT_ABORT: removes another key, and takes its reservation.
    Preempt {
        /// One's own key.
        key: Key,
        /// The other.
        victim: Key,
        /// Type.
        kind: Kind,
        /// Also abort its commands.
        abort: bool,
    },
    /// IOC_PR_CLEAR: removes everything.
    Clear {
        /// One's own key.
        key: Key,
    },
}

/// An ioctl: its number, and the structure that it reads, which holds no pointer and is not written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// The request.
    pub request: Opcode,
    /// The structure; at least as long as the request's number says.
    pub argument: [u64; 3],
}

/// `struct pr_read_keys`, argument of [`READ_KEYS`].
#[repr(C)]
#[derive(Debug)]
pub struct ReadKeys {
    /// Counts the changes of registrations.
    pub generation: u32,
    /// In: for how many keys there is room. Out: how many are registered.
    pub count: u32,
    /// Where the keys go, each a `u64`.
    pub keys: u64,
}

/// `struct pr_read_reservation`, argument of [`READ_RESERVATION`].
#[repr(C)]
#[derive(Debug, Default)]
pub struct ReadReservation {
    /// The holder's key.
    pub key: u64,
    /// Counts the changes of registrations.
    pub generation: u32,
    /// `enum pr_type`, see [`holder`].
    pub kind: u32,
}

/// IOC_PR_READ_KEYS.
pub const READ_KEYS: Opcode = opcode::read_write::<ReadKeys>(b'p', 206);
/// IOC_PR_READ_RESERVATION.
pub const READ_RESERVATION: Opcode = opcode::read::<ReadReservation>(b'p', 207);

/// `enum pr_type` and NVMe's reservation types (the same numbers) with the SCSI types.
const KINDS: [(u32, Kind); 6] = [
    (1, Kind::WriteExclusive),
    (2, Kind::ExclusiveAccess),
    (3, Kind::WriteExclusiveRegistrantsOnly),
    (4, Kind::ExclusiveAccessRegistrantsOnly),
    (5, Kind::WriteExclusiveAllRegistrants),
    (6, Kind::ExclusiveAccessAllRegistrants),
];

fn pr_type(kind: Kind) -> u32 {
    KINDS.iter().find(|row| row.1 == kind).map_or(0, |row| row.0)
}

/// Two fields of 32 bits, one behind the other in memory.
fn pair(first: u32, second: u32) -> u64 {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&first.to_ne_bytes());
    bytes[4..].copy_from_slice(&second.to_ne_bytes());
    u64::from_ne_bytes(bytes)
}

impl Change {
    /// The ioctl that makes it.
    pub fn call(&self) -> Call {
        type Three = [u64; 3];
        type Two = [u64; 2];
        let two = |a, b| [a, b, 0];
        let (request, argument) = match *self {
            // struct pr_registration: old key, new key, flags (PR_FL_IGNORE_KEY), padding.
            Self::Register { old, new, ignore } => {
                (opcode::write::<Three>(b'p', 200), [old.0, new.0, pair(u32::from(ignore), 0)])
            }
            // struct pr_reservation: key, type, flags.
            Self::Reserve { key, kind } => (opcode::write::<Two>(b'p', 201), two(key.0, pair(pr_type(kind), 0))),
            Self::Release { key, kind } => (opcode::write::<Two>(b'p', 202), two(key.0, pair(pr_type(kind), 0))),
            // struct pr_preempt: one's own key is the "old" one, the victim's the "new" one; type, flags.
            Self::Preempt { key, victim, kind, abort } => {
                (opcode::write::<Three>(b'p', if abort { 204 } else { 203 }), [key.0, victim.0, pair(pr_type(kind), 0)])
            }
            // struct pr_clear: key, flags, padding.
            Self::Clear { key } => (opcode::write::<Two>(b'p', 205), two(key.0, 0)),
        };
        Call { request, argument }
    }
}

/// The reservation of this key and `enum pr_type` (0: there is none).
pub fn holder(key: u64, code: u32) -> Option<Holder> {
    let kind = KINDS.iter().find(|row| row.0 == code)?.1;
    // Of these types all registrants are holders, `[SPC-4 §6.15.3.2]`.
    let all = matches!(kind, Kind::WriteExclusiveAllRegistrants | Kind::ExclusiveAccessAllRegistrants);
    Some(Holder { key: Key(if all { 0 } else { key }), scope: 0, kind })
}

/// How a change ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// Done.
    Good,
    /// Reservation conflict.
    Conflict,
    /// Not done; what a SCSI disk would have said.
    Check(Sense),
}

/// `PR_STS_IOERR`: the device answered CHECK CONDITION, and the kernel has kept the sense to itself.
const CHECK_CONDITION: i32 = 0x02;

/// What the kernel's status means: `enum pr_status`, and the NVMe status codes that kernels before 6.4 passed on.
pub fn ended(code: i32) -> Ended {
    match code {
        0 => Ended::Good,
        // SCSI's and the kernel's; NVMe's 83h with and without "do not retry".
        0x18 | 0x83 | 0x4083 => Ended::Conflict,
        // Invalid opcode, invalid field: NVMe's.
        0x01 | 0x4001 => Ended::Check(Sense::INVALID_OPCODE),
        0x4002 => Ended::Check(Sense::INVALID_FIELD_IN_CDB),
        // PR_STS_RETRY_PATH_FAILURE, PR_STS_PATH_FAST_FAILED, PR_STS_PATH_FAILED.
        0x000e_0000 | 0x000f_0000 | 0x0001_0000 => Ended::Check(Sense::NOT_RESPONDING),
        _ => Ended::Check(Sense::COMMUNICATION_FAILURE),
    }
}

/// How often a change is tried that ended with CHECK CONDITION.
const TRIES: usize = 9;

/// Makes a change until it no longer ends with CHECK CONDITION. Most often the reason is a unit attention, of which each
/// path of a map has its own, and which is gone when it was reported; a command that ended with it had no effect.
///
/// # Errors
/// Those of `call`.
pub fn past_attentions(call: impl FnMut() -> io::Result<i32>) -> io::Result<i32> {
    let mut tries = std::iter::repeat_with(call).take(TRIES);
    tries.find(|result| !matches!(result, Ok(CHECK_CONDITION))).unwrap_or(Ok(CHECK_CONDITION))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_layouts_are_the_kernels() {
        let (key, victim, kind) = (Key(1), Key(2), Kind::ExclusiveAccessRegistrantsOnly);
        let numbers = |changes: &[Change]| changes.iter().map(|c| c.call().request).collect::<Vec<_>>();
        assert_eq!(
            numbers(&[
                Change::Register { old: key, new: victim, ignore: false },
                Change::Reserve { key, kind },
                Change::Release { key, kind },
                Change::Preempt { key, victim, kind, abort: false },
                Change::Preempt { key, victim, kind, abort: true },
                Change::Clear { key },
            ]),
            [0x4018_70c8, 0x4010_70c9, 0x4010_70ca, 0x4018_70cb, 0x4018_70cc, 0x4010_70cd]
        );
        assert_eq!([READ_KEYS, READ_RESERVATION], [0xc010_70ce, 0x8010_70cf]);
        let bytes = |change: Change| change.call().argument.map(u64::to_ne_bytes).concat();
        let preempt = bytes(Change::Preempt { key, victim, kind, abort: true });
        assert_eq!(preempt[16..20], 4u32.to_ne_bytes());
        assert_eq!(preempt[20..], [0; 4]);
        let register = bytes(Change::Register { old: key, new: victim, ignore: true });
        assert_eq!(register[..8], 1u64.to_ne_bytes());
        assert_eq!(register[8..16], 2u64.to_ne_bytes());
        assert_eq!(register[16..20], 1u32.to_ne_bytes());
        assert_eq!(bytes(Change::Reserve { key, kind })[8..12], 4u32.to_ne_bytes());
    }

    #[test]
    fn holders() {
        let found = |code| holder(7, code).map(|h| (h.key.0, h.kind));
        assert_eq!((found(0), found(7)), (None, None));
        assert_eq!(found(3), Some((7, Kind::WriteExclusiveRegistrantsOnly)));
        assert_eq!(found(6), Some((0, Kind::ExclusiveAccessAllRegistrants)));
    }

    #[test]
    fn a_unit_attention_is_passed_and_a_lasting_one_told() {
        let answers = |list: Vec<i32>| {
            let mut left = list.into_iter();
            past_attentions(|| Ok(left.next().unwrap_or(CHECK_CONDITION))).map(ended).map_err(|e| e.kind())
        };
        assert_eq!(answers(vec![2, 2, 0, 0x18]), Ok(Ended::Good));
        assert_eq!(answers(vec![2, 0x18]), Ok(Ended::Conflict));
        assert_eq!(answers(vec![]), Ok(Ended::Check(Sense::COMMUNICATION_FAILURE)));
        assert_eq!(
            past_attentions(|| Err(io::ErrorKind::Other.into())).map_err(|e| e.kind()),
            Err(io::ErrorKind::Other)
        );
    }
}
