//! The telnet protocol as far as a monitor needs it: options are announced and whatever the client says about options is
//! skipped. [RFC 854, RFC 2355]

use std::collections::VecDeque;
use std::io;

use super::framed::Codec;

const IAC: u8 = 255;
const DONT: u8 = 254;
const DO: u8 = 253;
const WONT: u8 = 252;
const WILL: u8 = 251;
const SB: u8 = 250;
const SE: u8 = 240;
const BINARY: u8 = 0;
const ECHO: u8 = 1;
const SUPPRESS_GO_AHEAD: u8 = 3;
const TERMINAL_TYPE: u8 = 24;
const END_OF_RECORD: u8 = 25;

/// What the daemon says first: characters one by one, echoed by the daemon, eight bits wide.
pub(super) const GREETING: &[u8] = &[IAC, WILL, ECHO, IAC, WILL, SUPPRESS_GO_AHEAD, IAC, WILL, BINARY, IAC, DO, BINARY];

/// What it says to a terminal of type 3270: records, eight bits wide, and which terminal is it?
#[rustfmt::skip]
pub(super) const GREETING_TN3270: &[u8] = &[
    IAC, DO, END_OF_RECORD, IAC, WILL, END_OF_RECORD, IAC, DO, BINARY, IAC, WILL, BINARY,
    IAC, DO, TERMINAL_TYPE, IAC, SB, TERMINAL_TYPE, 1, IAC, SE,
];

/// What the next byte from the client is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum State {
    #[default]
    Data,
    /// Behind an IAC.
    Command,
    /// The option of DO, DONT, WILL or WONT.
    Option,
    /// In what an SB began.
    Subnegotiation,
    /// Behind an IAC there.
    SubnegotiationCommand,
}

/// The state of one conversation.
#[derive(Debug, Default)]
pub(super) struct Telnet(State);

impl Codec for Telnet {
    fn decode(&mut self, raw: &[u8], bytes: &mut VecDeque<u8>, _: &mut Vec<u8>) -> io::Result<bool> {
        for byte in raw {
            self.0 = match (self.0, *byte) {
                (State::Data, IAC) => State::Command,
                (State::Data, byte) => {
                    bytes.push_back(byte);
                    State::Data
                }
                (State::Command, IAC) => {
                    bytes.push_back(IAC);
                    State::Data
                }
                (State::Command, DO | DONT | WILL | WONT) => State::Option,
                (State::Command, SB) => State::Subnegotiation,
                (State::Command | State::Option, _) => State::Data,
                (State::Subnegotiation, IAC) => State::SubnegotiationCommand,
                (State::SubnegotiationCommand, SE) => State::Data,
                (State::Subnegotiation | State::SubnegotiationCommand, _) => State::Subnegotiation,
            };
        }
        Ok(false)
    }

    fn encode(&mut self, bytes: &[u8], raw: &mut Vec<u8>) {
        for byte in bytes {
            raw.push(*byte);
            if *byte == IAC {
                raw.push(IAC);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_skipped_wherever_the_bytes_are_cut() {
        let raw = b"a\xff\xfd\x03b\xff\xf1c\xff\xfa\x18\x00IBM-\xff\xff3279\xff\xf0d\xff\xffe\xff\xf3";
        for cut in 0..=raw.len() {
            let (first, second) = raw.split_at(cut);
            let (mut telnet, mut bytes, mut reply) = (Telnet::default(), VecDeque::new(), Vec::new());
            for part in [first, second] {
                assert!(!telnet.decode(part, &mut bytes, &mut reply).unwrap());
            }
            assert_eq!(bytes, b"abcd\xffe");
            assert!(reply.is_empty());
        }
        let mut raw = Vec::new();
        Telnet::default().encode(b"a\xffb", &mut raw);
        assert_eq!(raw, b"a\xff\xffb");
    }
}
