//! The frames protocol: what both sides speak after the client asked for [`crate::classic::FEATURE_FRAMES`].
//!
//! A frame is a little-endian `u32` length and so many bytes of one bincode message (fixed-size integers, little
//! endian, nothing left over). The client says [`Hello`], the helper answers [`Welcome`]; from then on the client sends
//! [`Request`]s, each with exactly one descriptor (the device) that comes with the bytes of its frame, at most
//! [`Welcome::max_in_flight`] at a time, and the helper answers each with a [`Response`] of the same id, in the order
//! in which devices finish. Anything else ends the connection.

use crate::classic::Reply;
use crate::scsi::{Command, Data, Malformed, Sense, status};
use bincode::config::{Configuration, Fixint, Limit, LittleEndian};
use bincode::{Decode, Encode};

/// The version of the messages below.
pub const VERSION: u16 = 1;

/// The largest message in bytes, either way: twice the largest parameter list, with room for the typed form.
pub const MAX_MESSAGE: usize = 16 * 1024;

/// Bytes of the length before a message.
pub const HEADER: usize = 4;

/// The limit makes a length inside a message fail before memory is taken for it.
const CONFIG: Configuration<LittleEndian, Fixint, Limit<MAX_MESSAGE>> =
    bincode::config::standard().with_fixed_int_encoding().with_limit::<MAX_MESSAGE>();

/// The client's first message: the versions it speaks, both inclusive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Hello {
    /// The lowest.
    pub min_version: u16,
    /// The highest.
    pub max_version: u16,
}

impl Hello {
    /// This implementation's.
    pub const OURS: Self = Self { min_version: VERSION, max_version: VERSION };

    /// The version to speak with this client, if there is one.
    pub fn choose(self) -> Option<u16> {
        (self.min_version..=self.max_version).contains(&VERSION).then_some(VERSION)
    }
}

/// The helper's first message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Welcome {
    /// The version to speak, or 0: none in common, the connection ends.
    pub version: u16,
    /// How many requests the client may have open; one more ends the connection.
    pub max_in_flight: u16,
}

/// A command for the device whose descriptor comes with it.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Request {
    /// The client's choice; the response carries it.
    pub id: u64,
    /// The command.
    pub command: Command,
}

/// The answer to a request.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Response {
    /// The request's.
    pub id: u64,
    /// What came of it.
    pub result: Result<Data, Failure>,
}

/// A command that was not done.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Failure {
    /// SCSI status, never GOOD.
    pub status: u8,
    /// The sense data as the device sent it; empty unless the status is CHECK CONDITION.
    pub sense: Vec<u8>,
}

impl Failure {
    /// The sense, decoded.
    pub fn sense(&self) -> Option<Sense> {
        Sense::decode(&self.sense)
    }
}

impl Response {
    /// The response to a command that a device answered so.
    pub fn from_reply(id: u64, action: crate::scsi::Action, reply: &Reply) -> Self {
        let failure = |status, sense: &[u8]| Err(Failure { status, sense: sense.to_vec() });
        let result = match reply.status {
            status::GOOD => Data::decode(action, &reply.data)
                .or_else(|Malformed(_)| failure(status::CHECK_CONDITION, &Sense::COMMUNICATION_FAILURE.to_fixed())),
            status::CHECK_CONDITION => failure(reply.status, &reply.sense),
            other => failure(other, &[]),
        };
        Self { id, result }
    }
}

/// What a frame carries.
pub trait Message: Encode + Decode<()> {}

impl Message for Hello {}
impl Message for Welcome {}
impl Message for Request {}
impl Message for Response {}

/// A message that ends the connection.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The length of a frame.
    #[error("frame of {0} bytes, more than {MAX_MESSAGE}")]
    TooLarge(u32),
    /// What is in it.
    #[error("malformed message: {0}")]
    Malformed(#[from] bincode::error::DecodeError),
    /// Bytes after the message.
    #[error("{0} bytes left over after a message")]
    LeftOver(usize),
    /// A message of ours that no frame can hold.
    #[error("cannot encode the message: {0}")]
    Encode(#[from] bincode::error::EncodeError),
}

/// Reads the length of a frame.
pub fn message_length(header: [u8; HEADER]) -> Result<usize, Error> {
    let length = u32::from_le_bytes(header);
    usize::try_from(length).ok().filter(|&n| n <= MAX_MESSAGE).ok_or(Error::TooLarge(length))
}

/// Decodes the one message of a frame (without its header).
pub fn decode<T: Message>(message: &[u8]) -> Result<T, Error> {
    let (value, used) = bincode::decode_from_slice(message, CONFIG)?;
    match message.len().saturating_sub(used) {
        0 => Ok(value),
        left => Err(Error::LeftOver(left)),
    }
}

/// Encodes a message with its header.
pub fn encode<T: Message>(message: &T) -> Result<Vec<u8>, Error> {
    let body = bincode::encode_to_vec(message, CONFIG)?;
    let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
    if body.len() > MAX_MESSAGE {
        return Err(Error::TooLarge(length));
    }
    Ok([&length.to_le_bytes()[..], &body].concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scsi::{Action, Key, Kind, RegisterOptions};
    use proptest::prelude::*;

    fn round_trip<T: Message + PartialEq + std::fmt::Debug>(value: T) {
        let frame = encode(&value).unwrap();
        let (header, body) = frame.split_first_chunk::<HEADER>().unwrap();
        assert_eq!(message_length(*header).unwrap(), body.len());
        assert_eq!(decode::<T>(body).unwrap(), value);
        assert!(matches!(decode::<T>(&[body, &[0][..]].concat()), Err(Error::LeftOver(1))));
        assert!(decode::<T>(&body[..body.len() - 1]).is_err());
    }

    #[test]
    fn messages() {
        round_trip(Hello::OURS);
        round_trip(Welcome { version: 1, max_in_flight: 4 });
        let options = RegisterOptions { persist: true, all_target_ports: false };
        round_trip(Request {
            id: 3,
            command: Command::Register { key: Key(1), new_key: Key(2), options, initiators: vec![1; 40] },
        });
        round_trip(Request { id: 3, command: Command::Reserve { key: Key(1), kind: Kind::ExclusiveAccess } });
        round_trip(Response { id: 3, result: Err(Failure { status: 2, sense: vec![0x70; 96] }) });
        // The layout is the contract between two versions of the programs.
        let frame = encode(&Request { id: 1, command: Command::Clear { key: Key(0x0102) } }).unwrap();
        assert_eq!(frame, [20, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn versions() {
        assert_eq!(Hello::OURS.choose(), Some(VERSION));
        assert_eq!(Hello { min_version: VERSION + 1, max_version: 9 }.choose(), None);
        assert_eq!(Hello { min_version: 9, max_version: 0 }.choose(), None);
    }

    #[test]
    fn limits() {
        assert!(message_length(16384u32.to_le_bytes()).is_ok());
        assert!(message_length(16385u32.to_le_bytes()).is_err());
        // A length inside the message that no message can hold takes no memory.
        let mut register = encode(&Request {
            id: 1,
            command: Command::Register {
                key: Key(1),
                new_key: Key(2),
                options: RegisterOptions::default(),
                initiators: Vec::new(),
            },
        })
        .unwrap();
        let end = register.len();
        register[end - 8..].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(decode::<Request>(&register[HEADER..]).is_err());
    }

    #[test]
    fn the_largest_answers_fit() {
        let keys = Data::Keys { generation: 1, keys: vec![Key(1); 1023], total: 1023 };
        let reply = Reply { data: keys.encode(), ..Reply::status(status::GOOD) };
        assert!(encode(&Response::from_reply(1, Action::ReadKeys, &reply)).is_ok());
        let mut bytes = vec![0, 0, 0, 1, 0, 0, 0x1f, 0xf8];
        bytes.resize(8192, 0);
        let reply = Reply { data: bytes, ..Reply::status(status::GOOD) };
        let response = Response::from_reply(1, Action::ReadFullStatus, &reply);
        assert!(matches!(&response.result, Ok(Data::FullStatus { registrants, .. }) if registrants.len() == 341));
        assert!(encode(&response).is_ok());
    }

    proptest! {
        #[test]
        fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode::<Hello>(&bytes);
            let _ = decode::<Response>(&bytes);
            if let Ok(request) = decode::<Request>(&bytes)
                && let Some((cdb, list)) = request.command.encode()
            {
                prop_assert_eq!(cdb.action(), Some(request.command.action()));
                prop_assert!(!cdb.is_out() || usize::try_from(cdb.data_length()).unwrap() == list.len());
            }
        }
    }
}
