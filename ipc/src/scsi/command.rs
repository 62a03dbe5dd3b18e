//! PERSISTENT RESERVE IN and OUT: the table of service actions, CDBs, parameter lists, typed commands.

use bincode::{Decode, Encode};
use std::fmt;

/// A reservation key. Zero means "no registration".
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Encode, Decode)]
pub struct Key(pub u64);

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#018x}", self.0)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The type of a reservation, `[SPC-4 §6.15.3.4]`. The scope is always the logical unit (0).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[repr(u8)]
pub enum Kind {
    /// Write Exclusive.
    WriteExclusive = 1,
    /// Exclusive Access.
    ExclusiveAccess = 3,
    /// Write Exclusive, Registrants Only.
    WriteExclusiveRegistrantsOnly = 5,
    /// Exclusive Access, Registrants Only.
    ExclusiveAccessRegistrantsOnly = 6,
    /// Write Exclusive, All Registrants.
    WriteExclusiveAllRegistrants = 7,
    /// Exclusive Access, All Registrants.
    ExclusiveAccessAllRegistrants = 8,
}

impl Kind {
    /// All types.
    pub const ALL: [Self; 6] = [
        Self::WriteExclusive,
        Self::ExclusiveAccess,
        Self::WriteExclusiveRegistrantsOnly,
        Self::ExclusiveAccessRegistrantsOnly,
        Self::WriteExclusiveAllRegistrants,
        Self::ExclusiveAccessAllRegistrants,
    ];

    /// The type of this code, if there is one.
    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|&k| k as u8 == code)
    }
}

/// A service action of either command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// READ KEYS.
    ReadKeys,
    /// READ RESERVATION.
    ReadReservation,
    /// REPORT CAPABILITIES.
    ReportCapabilities,
    /// READ FULL STATUS.
    ReadFullStatus,
    /// REGISTER.
    Register,
    /// RESERVE.
    Reserve,
    /// RELEASE.
    Release,
    /// CLEAR.
    Clear,
    /// PREEMPT.
    Preempt,
    /// PREEMPT AND ABORT.
    PreemptAndAbort,
    /// REGISTER AND IGNORE EXISTING KEY.
    RegisterAndIgnore,
    /// REGISTER AND MOVE.
    RegisterAndMove,
    /// REPLACE LOST RESERVATION.
    ReplaceLost,
}

/// Operation code, service action, name in policies and audit lines. `[SPC-4 table 214]`, `[SPC-4 table 228]`.
const ACTIONS: [(u8, u8, Action, &str); 13] = [
    (Cdb::IN, 0x00, Action::ReadKeys, "read-keys"),
    (Cdb::IN, 0x01, Action::ReadReservation, "read-reservation"),
    (Cdb::IN, 0x02, Action::ReportCapabilities, "report-capabilities"),
    (Cdb::IN, 0x03, Action::ReadFullStatus, "read-full-status"),
    (Cdb::OUT, 0x00, Action::Register, "register"),
    (Cdb::OUT, 0x01, Action::Reserve, "reserve"),
    (Cdb::OUT, 0x02, Action::Release, "release"),
    (Cdb::OUT, 0x03, Action::Clear, "clear"),
    (Cdb::OUT, 0x04, Action::Preempt, "preempt"),
    (Cdb::OUT, 0x05, Action::PreemptAndAbort, "preempt-and-abort"),
    (Cdb::OUT, 0x06, Action::RegisterAndIgnore, "register-and-ignore"),
    (Cdb::OUT, 0x07, Action::RegisterAndMove, "register-and-move"),
    (Cdb::OUT, 0x08, Action::ReplaceLost, "replace-lost-reservation"),
];

impl Action {
    /// All actions.
    pub fn all() -> impl Iterator<Item = Self> {
        ACTIONS.iter().map(|row| row.2)
    }

    /// The action of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        ACTIONS.iter().find(|row| row.3 == name).map(|row| row.2)
    }

    /// The name in policies and audit lines.
    pub fn name(self) -> &'static str {
        ACTIONS.iter().find(|row| row.2 == self).map_or("unknown", |row| row.3)
    }

    /// Does it change something (PERSISTENT RESERVE OUT)?
    pub fn is_out(self) -> bool {
        self.codes().0 == Cdb::OUT
    }

    fn codes(self) -> (u8, u8) {
        ACTIONS.iter().find(|row| row.2 == self).map_or((0, 0), |row| (row.0, row.1))
    }
}

/// A 16-byte CDB that is PERSISTENT RESERVE IN or OUT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cdb([u8; Self::SIZE]);

impl Cdb {
    /// Bytes of a CDB in the classic protocol; the command uses the first ten.
    pub const SIZE: usize = 16;
    /// PERSISTENT RESERVE IN.
    pub const IN: u8 = 0x5e;
    /// PERSISTENT RESERVE OUT.
    pub const OUT: u8 = 0x5f;

    /// `None` for any other operation code.
    pub fn new(bytes: [u8; Self::SIZE]) -> Option<Self> {
        matches!(bytes[0], Self::IN | Self::OUT).then_some(Self(bytes))
    }

    /// The CDB of an action, with the scope and type byte (OUT) and the length of the data.
    pub fn build(action: Action, scope_type: u8, length: u16) -> Self {
        let (opcode, code) = action.codes();
        let mut bytes = [0; Self::SIZE];
        bytes[0] = opcode;
        bytes[1] = code;
        bytes[2] = scope_type;
        bytes[7..9].copy_from_slice(&length.to_be_bytes());
        Self(bytes)
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8; Self::SIZE] {
        &self.0
    }

    /// Is it PERSISTENT RESERVE OUT?
    pub fn is_out(&self) -> bool {
        self.0[0] == Self::OUT
    }

    /// The service action, if it is a known one.
    pub fn action(&self) -> Option<Action> {
        let code = self.0[1] & 0x1f;
        ACTIONS.iter().find(|row| (row.0, row.1) == (self.0[0], code)).map(|row| row.2)
    }

    /// Scope (high nibble) and type (low nibble); OUT only.
    pub fn scope_type(&self) -> u8 {
        self.0[2]
    }

    /// Bytes of data: IN the allocation length (bytes 7-8), OUT the parameter list length (bytes 5-8).
    pub fn data_length(&self) -> u32 {
        let high = if self.is_out() { [self.0[5], self.0[6]] } else { [0; 2] };
        u32::from_be_bytes([high[0], high[1], self.0[7], self.0[8]])
    }
}

/// Options of the registering actions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Encode, Decode)]
pub struct RegisterOptions {
    /// Registrations and reservation survive a power loss (APTPL).
    pub persist: bool,
    /// The registration is for all target ports (ALL_TG_PT).
    pub all_target_ports: bool,
}

/// A command with its parameters, as the frames protocol carries it.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Command {
    /// The registered keys.
    ReadKeys,
    /// Who holds the reservation.
    ReadReservation,
    /// What the device can do.
    ReportCapabilities,
    /// Every registration with its nexus.
    ReadFullStatus,
    /// Registers, changes (`key` is the old one) or removes (`new_key` is zero) this nexus's key.
    Register {
        /// The present key, zero if there is none.
        key: Key,
        /// The key from now on.
        new_key: Key,
        /// Options.
        options: RegisterOptions,
        /// TransportIDs of further initiator ports to register (SPEC_I_PT), as `[SPC-4 §7.6.4]` has them; may be empty.
        initiators: Vec<u8>,
    },
    /// The same whatever the present key is.
    RegisterAndIgnore {
        /// The key from now on.
        new_key: Key,
        /// Options.
        options: RegisterOptions,
    },
    /// Takes the reservation.
    Reserve {
        /// This nexus's key.
        key: Key,
        /// The type.
        kind: Kind,
    },
    /// Gives the reservation up.
    Release {
        /// This nexus's key.
        key: Key,
        /// The type, as it was reserved.
        kind: Kind,
    },
    /// Removes the reservation and all registrations.
    Clear {
        /// This nexus's key.
        key: Key,
    },
    /// Removes the registrations of `victim` and takes its reservation if it holds one.
    Preempt {
        /// This nexus's key.
        key: Key,
        /// The key to remove.
        victim: Key,
        /// The type.
        kind: Kind,
        /// Also abort the victim's commands.
        abort: bool,
    },
    /// Registers another initiator port and gives it the reservation.
    RegisterAndMove {
        /// This nexus's key.
        key: Key,
        /// The key of the port named.
        new_key: Key,
        /// Remove this nexus's registration.
        unregister: bool,
        /// APTPL.
        persist: bool,
        /// The target port, as its relative identifier.
        target_port: u16,
        /// The initiator port's TransportID.
        initiator: Vec<u8>,
    },
    /// Begins anew after the device lost its reservations.
    ReplaceLost {
        /// The key to register.
        new_key: Key,
        /// The type.
        kind: Kind,
        /// APTPL.
        persist: bool,
    },
}

impl Command {
    /// The service action.
    pub fn action(&self) -> Action {
        match self {
            Self::ReadKeys => Action::ReadKeys,
            Self::ReadReservation => Action::ReadReservation,
            Self::ReportCapabilities => Action::ReportCapabilities,
            Self::ReadFullStatus => Action::ReadFullStatus,
            Self::Register { .. } => Action::Register,
            Self::RegisterAndIgnore { .. } => Action::RegisterAndIgnore,
            Self::Reserve { .. } => Action::Reserve,
            Self::Release { .. } => Action::Release,
            Self::Clear { .. } => Action::Clear,
            Self::Preempt { abort: false, .. } => Action::Preempt,
            Self::Preempt { abort: true, .. } => Action::PreemptAndAbort,
            Self::RegisterAndMove { .. } => Action::RegisterAndMove,
            Self::ReplaceLost { .. } => Action::ReplaceLost,
        }
    }

    /// The CDB and the parameter list; `None` if the TransportIDs make it longer than [`crate::classic::MAX_DATA`].
    pub fn encode(&self) -> Option<(Cdb, Vec<u8>)> {
        let mut p = Parameters::default();
        let mut kind = None;
        match self {
            Self::ReadKeys | Self::ReadReservation | Self::ReportCapabilities | Self::ReadFullStatus => {
                let all = u16::try_from(crate::classic::MAX_DATA).ok()?;
                return Some((Cdb::build(self.action(), 0, all), Vec::new()));
            }
            Self::Register { key, new_key, options, initiators } => {
                p = Parameters { key: *key, action_key: *new_key, ..p };
                p.persist = options.persist;
                p.all_target_ports = options.all_target_ports;
                p.initiators.clone_from(initiators);
            }
            Self::RegisterAndIgnore { new_key, options } => {
                p.action_key = *new_key;
                p.persist = options.persist;
                p.all_target_ports = options.all_target_ports;
            }
            Self::Reserve { key, kind: k } | Self::Release { key, kind: k } => {
                p.key = *key;
                kind = Some(*k);
            }
            Self::Clear { key } => p.key = *key,
            Self::Preempt { key, victim, kind: k, .. } => {
                p = Parameters { key: *key, action_key: *victim, ..p };
                kind = Some(*k);
            }
            Self::RegisterAndMove { key, new_key, unregister, persist, target_port, initiator } => {
                return encode_move(*key, *new_key, *unregister, *persist, *target_port, initiator);
            }
            Self::ReplaceLost { new_key, kind: k, persist } => {
                p.action_key = *new_key;
                p.persist = *persist;
                kind = Some(*k);
            }
        }
        let list = p.encode()?;
        Some((Cdb::build(self.action(), kind.map_or(0, |k| k as u8), u16::try_from(list.len()).ok()?), list))
    }
}

/// `[SPC-4 §6.16.4]`, the parameter list of REGISTER AND MOVE.
fn encode_move(
    key: Key,
    new_key: Key,
    unregister: bool,
    persist: bool,
    port: u16,
    initiator: &[u8],
) -> Option<(Cdb, Vec<u8>)> {
    let mut list = Vec::with_capacity(24 + initiator.len());
    list.extend_from_slice(&key.0.to_be_bytes());
    list.extend_from_slice(&new_key.0.to_be_bytes());
    list.extend_from_slice(&[0, u8::from(unregister) << 1 | u8::from(persist)]);
    list.extend_from_slice(&port.to_be_bytes());
    list.extend_from_slice(&u32::try_from(initiator.len()).ok()?.to_be_bytes());
    list.extend_from_slice(initiator);
    let length = u16::try_from(list.len()).ok().filter(|&n| usize::from(n) <= crate::classic::MAX_DATA)?;
    Some((Cdb::build(Action::RegisterAndMove, 0, length), list))
}

/// The basic parameter list of PERSISTENT RESERVE OUT, `[SPC-4 §6.16.3]`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Parameters {
    /// RESERVATION KEY.
    pub key: Key,
    /// SERVICE ACTION RESERVATION KEY.
    pub action_key: Key,
    /// APTPL.
    pub persist: bool,
    /// ALL_TG_PT.
    pub all_target_ports: bool,
    /// The TransportIDs that come with SPEC_I_PT; empty without.
    pub initiators: Vec<u8>,
}

impl Parameters {
    /// Bytes of a list without TransportIDs.
    pub const SIZE: usize = 24;

    /// The two keys, which every form of the list begins with; `None` if it is too short for them.
    pub fn keys(list: &[u8]) -> Option<(Key, Key)> {
        let (key, rest) = list.split_first_chunk::<8>()?;
        let (action_key, _) = rest.split_first_chunk::<8>()?;
        Some((Key(u64::from_be_bytes(*key)), Key(u64::from_be_bytes(*action_key))))
    }

    /// Reads a list; `None` if its length is wrong: under 24 bytes, or not what SPEC_I_PT asks for.
    pub fn decode(list: &[u8]) -> Option<Self> {
        let (key, action_key) = Self::keys(list)?;
        let (head, more) = list.split_first_chunk::<{ Self::SIZE }>()?;
        let flags = head[20];
        let initiators = if flags & 0x08 == 0 {
            if !more.is_empty() {
                return None;
            }
            Vec::new()
        } else {
            let (length, ids) = more.split_first_chunk::<4>()?;
            if usize::try_from(u32::from_be_bytes(*length)).ok()? != ids.len() {
                return None;
            }
            ids.to_vec()
        };
        Some(Self { key, action_key, persist: flags & 0x01 != 0, all_target_ports: flags & 0x04 != 0, initiators })
    }

    /// The bytes; `None` if they are more than [`crate::classic::MAX_DATA`].
    pub fn encode(&self) -> Option<Vec<u8>> {
        let spec_i_pt = !self.initiators.is_empty();
        let mut list = vec![0; Self::SIZE];
        list[..8].copy_from_slice(&self.key.0.to_be_bytes());
        list[8..16].copy_from_slice(&self.action_key.0.to_be_bytes());
        list[20] = u8::from(spec_i_pt) << 3 | u8::from(self.all_target_ports) << 2 | u8::from(self.persist);
        if spec_i_pt {
            list.extend_from_slice(&u32::try_from(self.initiators.len()).ok()?.to_be_bytes());
            list.extend_from_slice(&self.initiators);
        }
        (list.len() <= crate::classic::MAX_DATA).then_some(list)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_action_has_one_row() {
        for action in Action::all() {
            assert_eq!(Action::from_name(action.name()), Some(action));
            assert_eq!(Cdb::build(action, 0, 24).action(), Some(action));
        }
        assert_eq!(Cdb::build(Action::ReplaceLost, 0, 24).bytes()[..2], [0x5f, 8]);
        let mut unknown = *Cdb::build(Action::Register, 0, 24).bytes();
        unknown[1] = 9;
        assert_eq!(Cdb::new(unknown).unwrap().action(), None);
        unknown[0] = 0x5e;
        unknown[1] = 4;
        assert_eq!(Cdb::new(unknown).unwrap().action(), None);
    }

    #[test]
    fn command_bytes() {
        let (cdb, list) =
            Command::Preempt { key: Key(0xa), victim: Key(0xb), kind: Kind::ExclusiveAccess, abort: true }
                .encode()
                .unwrap();
        assert_eq!(cdb.bytes()[..10], [0x5f, 5, 3, 0, 0, 0, 0, 0, 24, 0]);
        assert_eq!(list, [0, 0, 0, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0, 0, 0, 11, 0, 0, 0, 0, 0, 0, 0, 0]);
        let options = RegisterOptions { persist: true, all_target_ports: true };
        let id = vec![6; 24];
        let (cdb, list) =
            Command::Register { key: Key(0), new_key: Key(1), options, initiators: id.clone() }.encode().unwrap();
        assert_eq!((cdb.data_length(), list[20], &list[24..28]), (52, 0x0d, &[0, 0, 0, 24][..]));
        assert_eq!(Parameters::decode(&list).unwrap().initiators, id);
        let (cdb, list) = Command::RegisterAndMove {
            key: Key(1),
            new_key: Key(2),
            unregister: true,
            persist: true,
            target_port: 0x102,
            initiator: id,
        }
        .encode()
        .unwrap();
        assert_eq!((cdb.data_length(), &list[16..24]), (48, &[0, 3, 1, 2, 0, 0, 0, 24][..]));
        let huge = Command::Register { key: Key(0), new_key: Key(1), options, initiators: vec![0; 8192] };
        assert_eq!(huge.encode(), None);
    }

    #[test]
    fn list_lengths() {
        assert_eq!(Parameters::decode(&[0; 23]), None);
        assert!(Parameters::decode(&[0; 24]).is_some());
        assert_eq!(Parameters::decode(&[0; 25]), None);
        let mut list = [0; 30];
        list[20] = 8;
        list[27] = 3;
        assert_eq!(Parameters::decode(&list), None);
        list[27] = 2;
        assert!(Parameters::decode(&list).is_some());
    }

    proptest! {
        #[test]
        fn parameters_round_trip(key: u64, action_key: u64, persist: bool, all: bool, ids in prop::collection::vec(any::<u8>(), 0..100)) {
            let p = Parameters { key: Key(key), action_key: Key(action_key), persist, all_target_ports: all, initiators: ids };
            prop_assert_eq!(Parameters::decode(&p.encode().unwrap()), Some(p));
        }

        #[test]
        fn any_list(list in prop::collection::vec(any::<u8>(), 0..100)) {
            if let Some(p) = Parameters::decode(&list) {
                prop_assert_eq!(p.encode().unwrap().len(), list.len() - if list[20] & 8 != 0 && p.initiators.is_empty() { 4 } else { 0 });
            }
        }
    }
}
