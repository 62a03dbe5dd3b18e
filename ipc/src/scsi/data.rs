//! Parameter data of PERSISTENT RESERVE IN, both ways: a client decodes what a device sent, the helper encodes it for a
//! device that does not speak SCSI.

use super::command::{Action, Key, Kind};
use bincode::{Decode, Encode};

/// What a command brought back.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Data {
    /// PERSISTENT RESERVE OUT: nothing.
    None,
    /// READ KEYS.
    Keys {
        /// Counts the changes of registrations (PRGENERATION).
        generation: u32,
        /// One for each registration, as far as they came.
        keys: Vec<Key>,
        /// How many there are on the device.
        total: u32,
    },
    /// READ RESERVATION.
    Reservation {
        /// PRGENERATION.
        generation: u32,
        /// The reservation, if there is one.
        holder: Option<Holder>,
    },
    /// REPORT CAPABILITIES.
    Capabilities(Capabilities),
    /// READ FULL STATUS.
    FullStatus {
        /// PRGENERATION.
        generation: u32,
        /// As far as they came.
        registrants: Vec<Registrant>,
        /// Does the device have more than came?
        truncated: bool,
    },
}

/// A reservation, `[SPC-4 §6.15.3]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Holder {
    /// The holder's key; zero for the all-registrants types.
    pub key: Key,
    /// Scope, 0 for the logical unit.
    pub scope: u8,
    /// Type.
    pub kind: Kind,
}

/// What the device can do, `[SPC-4 §6.15.4]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Encode, Decode)]
pub struct Capabilities {
    /// REPLACE LOST RESERVATION (RLR_C).
    pub replace_lost: bool,
    /// RESERVE and RELEASE of SPC-2 while registered (CRH).
    pub compatible_reservations: bool,
    /// SPEC_I_PT (SIP_C).
    pub specify_initiators: bool,
    /// ALL_TG_PT (ATP_C).
    pub all_target_ports: bool,
    /// APTPL (PTPL_C).
    pub persist: bool,
    /// Persistence is on (PTPL_A).
    pub persist_active: bool,
    /// ALLOW COMMANDS, 0 to 7.
    pub allow_commands: u8,
    /// The types it can do, one bit for each as in the standard; `None` if it does not tell (TMV).
    pub types: Option<u16>,
}

/// One registration, `[SPC-4 §6.15.5]`.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Registrant {
    /// Its key.
    pub key: Key,
    /// For all target ports?
    pub all_target_ports: bool,
    /// If it holds the reservation: scope and type.
    pub holds: Option<(u8, Kind)>,
    /// The target port's relative identifier.
    pub target_port: u16,
    /// The initiator port's TransportID.
    pub initiator: Vec<u8>,
}

/// Parameter data that does not follow the standard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}: malformed parameter data")]
pub struct Malformed(pub &'static str);

/// Takes `N` bytes off the front.
fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (head, rest) = bytes.split_first_chunk::<N>()?;
    *bytes = rest;
    Some(*head)
}

fn take_u32(bytes: &mut &[u8]) -> Option<u32> {
    take(bytes).map(u32::from_be_bytes)
}

fn take_key(bytes: &mut &[u8]) -> Option<Key> {
    take(bytes).map(|b| Key(u64::from_be_bytes(b)))
}

impl Data {
    /// Decodes what `action` returned.
    pub fn decode(action: Action, bytes: &[u8]) -> Result<Self, Malformed> {
        match action {
            Action::ReadKeys => decode_keys(bytes),
            Action::ReadReservation => decode_reservation(bytes),
            Action::ReportCapabilities => decode_capabilities(bytes),
            Action::ReadFullStatus => decode_full_status(bytes),
            _ => Some(Self::None),
        }
        .ok_or(Malformed(action.name()))
    }

    /// The bytes a SCSI device would send.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::None => Vec::new(),
            Self::Keys { generation, keys, total } => {
                let mut out = header(*generation, total.saturating_mul(8));
                keys.iter().for_each(|k| out.extend_from_slice(&k.0.to_be_bytes()));
                out
            }
            Self::Reservation { generation, holder: None } => header(*generation, 0),
            Self::Reservation { generation, holder: Some(h) } => {
                let mut out = header(*generation, 16);
                out.extend_from_slice(&h.key.0.to_be_bytes());
                out.extend_from_slice(&[0, 0, 0, 0, 0, h.scope << 4 | h.kind as u8, 0, 0]);
                out
            }
            Self::Capabilities(c) => c.encode(),
            Self::FullStatus { generation, registrants, .. } => {
                let mut body = Vec::new();
                for r in registrants {
                    body.extend_from_slice(&r.key.0.to_be_bytes());
                    let flags = u8::from(r.all_target_ports) << 1 | u8::from(r.holds.is_some());
                    let scope_type = r.holds.map_or(0, |(scope, kind)| scope << 4 | kind as u8);
                    body.extend_from_slice(&[0, 0, 0, 0, flags, scope_type, 0, 0, 0, 0]);
                    body.extend_from_slice(&r.target_port.to_be_bytes());
                    body.extend_from_slice(&u32::try_from(r.initiator.len()).unwrap_or(0).to_be_bytes());
                    body.extend_from_slice(&r.initiator);
                }
                let mut out = header(*generation, u32::try_from(body.len()).unwrap_or(u32::MAX));
                out.extend_from_slice(&body);
                out
            }
        }
    }
}

/// PRGENERATION and ADDITIONAL LENGTH.
fn header(generation: u32, length: u32) -> Vec<u8> {
    [generation.to_be_bytes(), length.to_be_bytes()].concat()
}

fn decode_keys(mut bytes: &[u8]) -> Option<Data> {
    let generation = take_u32(&mut bytes)?;
    let length = take_u32(&mut bytes)?;
    let total = length / 8;
    let mut keys = Vec::new();
    while keys.len() < usize::try_from(total).ok()? {
        match take_key(&mut bytes) {
            Some(key) => keys.push(key),
            None => break,
        }
    }
    (length % 8 == 0).then_some(Data::Keys { generation, keys, total })
}

fn decode_reservation(mut bytes: &[u8]) -> Option<Data> {
    let generation = take_u32(&mut bytes)?;
    let holder = match take_u32(&mut bytes)? {
        0 => None,
        16.. => {
            let key = take_key(&mut bytes)?;
            let [_, _, _, _, _, scope_type, _, _] = take(&mut bytes)?;
            Some(Holder { key, scope: scope_type >> 4, kind: Kind::from_code(scope_type & 0x0f)? })
        }
        _ => return None,
    };
    Some(Data::Reservation { generation, holder })
}

fn decode_capabilities(mut bytes: &[u8]) -> Option<Data> {
    let [l0, l1, able, active, t0, t1, _, _] = take(&mut bytes)?;
    (u16::from_be_bytes([l0, l1]) >= 8).then(|| {
        Data::Capabilities(Capabilities {
            replace_lost: able & 0x80 != 0,
            compatible_reservations: able & 0x10 != 0,
            specify_initiators: able & 0x08 != 0,
            all_target_ports: able & 0x04 != 0,
            persist: able & 0x01 != 0,
            persist_active: active & 0x01 != 0,
            allow_commands: active >> 4 & 7,
            types: (active & 0x80 != 0).then_some(u16::from_be_bytes([t0, t1])),
        })
    })
}

impl Capabilities {
    fn encode(&self) -> Vec<u8> {
        let able = u8::from(self.replace_lost) << 7
            | u8::from(self.compatible_reservations) << 4
            | u8::from(self.specify_initiators) << 3
            | u8::from(self.all_target_ports) << 2
            | u8::from(self.persist);
        let active =
            u8::from(self.types.is_some()) << 7 | (self.allow_commands & 7) << 4 | u8::from(self.persist_active);
        let [t0, t1] = self.types.unwrap_or(0).to_be_bytes();
        vec![0, 8, able, active, t0, t1, 0, 0]
    }
}

fn decode_full_status(mut bytes: &[u8]) -> Option<Data> {
    let generation = take_u32(&mut bytes)?;
    let length = usize::try_from(take_u32(&mut bytes)?).ok()?;
    let mut truncated = length > bytes.len();
    let mut rest = bytes.get(..length).unwrap_or(bytes);
    let mut registrants = Vec::new();
    while !rest.is_empty() {
        // A descriptor cut by the allocation length is not an error; one that ends beyond the data's own length is.
        match decode_registrant(&mut rest) {
            Some(r) => registrants.push(r?),
            None if length > bytes.len() => {
                truncated = true;
                break;
            }
            None => return None,
        }
    }
    Some(Data::FullStatus { generation, registrants, truncated })
}

/// `None`: not enough bytes; `Some(None)`: a wrong type.
fn decode_registrant(rest: &mut &[u8]) -> Option<Option<Registrant>> {
    let key = take_key(rest)?;
    let [_, _, _, _, flags, scope_type] = take(rest)?;
    let [_, _, _, _, p0, p1] = take(rest)?;
    let length = usize::try_from(take_u32(rest)?).ok()?;
    let initiator = rest.get(..length)?.to_vec();
    *rest = rest.get(length..)?;
    let holds = if flags & 1 == 0 {
        None
    } else {
        match Kind::from_code(scope_type & 0x0f) {
            Some(kind) => Some((scope_type >> 4, kind)),
            None => return Some(None),
        }
    };
    let target_port = u16::from_be_bytes([p0, p1]);
    Some(Some(Registrant { key, all_target_ports: flags & 2 != 0, holds, target_port, initiator }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn round_trips() {
        let holder = Holder { key: Key(0xa), scope: 0, kind: Kind::WriteExclusiveRegistrantsOnly };
        let all = [
            (Action::ReadKeys, Data::Keys { generation: 7, keys: vec![Key(1), Key(2)], total: 2 }),
            (Action::ReadReservation, Data::Reservation { generation: 7, holder: None }),
            (Action::ReadReservation, Data::Reservation { generation: 7, holder: Some(holder) }),
            (
                Action::ReportCapabilities,
                Data::Capabilities(Capabilities {
                    persist: true,
                    replace_lost: true,
                    allow_commands: 5,
                    types: Some(0xea01),
                    ..Capabilities::default()
                }),
            ),
            (
                Action::ReadFullStatus,
                Data::FullStatus {
                    generation: 9,
                    registrants: vec![
                        Registrant {
                            key: Key(5),
                            all_target_ports: true,
                            holds: None,
                            target_port: 1,
                            initiator: vec![0; 24],
                        },
                        Registrant {
                            key: Key(6),
                            all_target_ports: false,
                            holds: Some((0, Kind::ExclusiveAccess)),
                            target_port: 2,
                            initiator: vec![5; 8],
                        },
                    ],
                    truncated: false,
                },
            ),
        ];
        for (action, data) in all {
            assert_eq!(Data::decode(action, &data.encode()), Ok(data));
        }
    }

    #[test]
    fn cut_data() {
        let full = Data::Keys { generation: 1, keys: vec![Key(1), Key(2), Key(3)], total: 3 }.encode();
        let cut = Data::decode(Action::ReadKeys, &full[..20]).unwrap();
        assert_eq!(cut, Data::Keys { generation: 1, keys: vec![Key(1)], total: 3 });
        assert!(Data::decode(Action::ReadKeys, &full[..7]).is_err());
        // A type that does not exist.
        let mut r = Data::Reservation {
            generation: 1,
            holder: Some(Holder { key: Key(1), scope: 0, kind: Kind::WriteExclusive }),
        }
        .encode();
        r[21] = 2;
        assert!(Data::decode(Action::ReadReservation, &r).is_err());
    }

    proptest! {
        #[test]
        fn anything(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            for action in Action::all() {
                if let Ok(data) = Data::decode(action, &bytes) {
                    prop_assert!(data.encode().len() <= bytes.len().max(8));
                }
            }
        }
    }
}
