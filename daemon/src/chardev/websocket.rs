//! The server's side of the WebSocket protocol: the handshake, and binary messages around the bytes. [RFC 6455]
//!
//! Where one message ends and the next begins means nothing here. Text messages are taken as well, for browsers and
//! command line clients send them.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;

use ::io::Channel;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use sha1::{Digest, Sha1};

use super::framed::{Codec, Framed};

/// How long a request may be.
const MAX_REQUEST: usize = 4096;
/// What is appended to a client's key. [RFC 6455 §1.3]
const GUID: &str = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
/// The only subprotocol that a client may ask for.
const SUBPROTOCOL: &str = "binary";

const CONTINUATION: u8 = 0;
const TEXT: u8 = 1;
const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const PING: u8 = 9;
const PONG: u8 = 10;

/// A status code of a close frame. [RFC 6455 §7.4.1]
const PROTOCOL_ERROR: u16 = 1002;

/// Answers a client's request to speak the protocol.
///
/// # Errors
/// The connection broke, or the client asked for something else and was told so.
pub(super) async fn accept(channel: Channel) -> io::Result<Framed<WebSocket>> {
    let mut request = Vec::new();
    let end = loop {
        let mut buffer = [0; MAX_REQUEST];
        let count = poll_fn(|cx| channel.poll_read(cx, &mut buffer, &mut Vec::new())).await?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        request.extend_from_slice(buffer.get(..count).unwrap_or_default());
        if let Some(at) = request.windows(4).position(|four| four == b"\r\n\r\n") {
            break at + 4;
        }
        if request.len() >= MAX_REQUEST {
            let _ = channel.try_write(&refusal("431 Request Header Fields Too Large"));
            return Err(io::Error::other("the request is too long"));
        }
    };
    let (head, rest) = request.split_at_checked(end).unwrap_or_default();
    match answer(head) {
        Ok(answer) => {
            let framed = Framed::new(channel, WebSocket::default(), answer);
            framed.begin_with(rest)?;
            Ok(framed)
        }
        Err(why) => {
            let _ = channel.try_write(&refusal("400 Bad Request"));
            Err(io::Error::other(why))
        }
    }
}

fn refusal(status: &str) -> Vec<u8> {
    format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n").into_bytes()
}

/// The answer to a request, or what is wrong with it. [RFC 6455 §4.2]
fn answer(head: &[u8]) -> Result<Vec<u8>, &'static str> {
    let text = std::str::from_utf8(head).map_err(|_| "the request is not text")?;
    let mut lines = text.split("\r\n");
    let mut words = lines.next().unwrap_or_default().split(' ');
    if (words.next(), words.next(), words.next()) != (Some("GET"), Some("/"), Some("HTTP/1.1")) {
        return Err("the request is not for / with HTTP/1.1");
    }
    let headers: Vec<(&str, &str)> =
        lines.filter_map(|line| line.split_once(':')).map(|(name, value)| (name.trim(), value.trim())).collect();
    let all =
        |name: &'static str| headers.iter().filter(move |(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| *value);
    let lists = |name: &'static str, word: &str| {
        let mut words = all(name).flat_map(|value| value.split(','));
        words.any(|found| found.trim().eq_ignore_ascii_case(word))
    };
    if !lists("Upgrade", "websocket") || !lists("Connection", "upgrade") {
        return Err("the request is not for a WebSocket");
    }
    if !lists("Sec-WebSocket-Version", "13") {
        return Err("the version of the protocol is not 13");
    }
    let key = all("Sec-WebSocket-Key").next().ok_or("the request has no key")?;
    let protocol = match all("Sec-WebSocket-Protocol").next() {
        None => String::new(),
        Some(_) if lists("Sec-WebSocket-Protocol", SUBPROTOCOL) => {
            format!("Sec-WebSocket-Protocol: {SUBPROTOCOL}\r\n")
        }
        Some(_) => return Err("the subprotocol is not binary"),
    };
    let accepted = BASE64.encode(Sha1::new().chain_update(key).chain_update(GUID).finalize());
    let answer = format!(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Accept: {accepted}\r\n{protocol}\r\n"
    );
    Ok(answer.into_bytes())
}

/// The state of one conversation.
#[derive(Debug, Default)]
pub(super) struct WebSocket {
    /// The part of a header that has come.
    header: Vec<u8>,
    frame: Option<Frame>,
    /// The payload of a control frame.
    control: Vec<u8>,
}

/// A frame whose header is complete.
#[derive(Debug)]
struct Frame {
    opcode: u8,
    mask: [u8; 4],
    done: u64,
    length: u64,
}

impl WebSocket {
    /// The frame whose header is complete with `byte`, if it is.
    fn header(&mut self, byte: u8) -> Result<Option<Frame>, &'static str> {
        self.header.push(byte);
        let [first, second, rest @ ..] = self.header.as_slice() else { return Ok(None) };
        if first & 0x70 != 0 {
            return Err("a reserved bit is set");
        }
        if second & 0x80 == 0 {
            return Err("a frame of a client is not masked");
        }
        let (opcode, is_last, short) = (first & 0xf, first & 0x80 != 0, second & 0x7f);
        match opcode {
            CONTINUATION | TEXT | BINARY => {}
            CLOSE | PING | PONG if is_last && short < 126 => {}
            CLOSE | PING | PONG => return Err("a control frame is too long or not whole"),
            _ => return Err("only data, close, ping, and pong frames are supported"),
        }
        let length_bytes = match short {
            126 => 2,
            127 => 8,
            _ => 0,
        };
        let Some((length, mask)) = rest.split_at_checked(length_bytes) else { return Ok(None) };
        let Ok(mask) = mask.try_into() else { return Ok(None) };
        let length = match length_bytes {
            0 => u64::from(short),
            _ => length.iter().fold(0, |length, byte| length << 8 | u64::from(*byte)),
        };
        self.header.clear();
        self.control.clear();
        Ok(Some(Frame { opcode, mask, done: 0, length }))
    }

    /// A frame has come whole. Returns true at the end of the conversation.
    fn end_of_frame(&mut self, opcode: u8, reply: &mut Vec<u8>) -> bool {
        match opcode {
            PING => frame(PONG, &self.control, reply),
            CLOSE => frame(CLOSE, &self.control, reply),
            _ => {}
        }
        opcode == CLOSE
    }
}

impl Codec for WebSocket {
    fn decode(&mut self, raw: &[u8], bytes: &mut VecDeque<u8>, reply: &mut Vec<u8>) -> io::Result<bool> {
        for byte in raw {
            let Some(current) = &mut self.frame else {
                match self.header(*byte) {
                    Ok(Some(frame)) if frame.length == 0 => {
                        if self.end_of_frame(frame.opcode, reply) {
                            return Ok(true);
                        }
                    }
                    Ok(frame) => self.frame = frame,
                    Err(why) => {
                        let mut payload = PROTOCOL_ERROR.to_be_bytes().to_vec();
                        payload.extend_from_slice(why.as_bytes());
                        frame(CLOSE, &payload, reply);
                        return Err(io::Error::other(why));
                    }
                }
                continue;
            };
            let mask = usize::try_from(current.done % 4).ok().and_then(|at| current.mask.get(at)).copied();
            let plain = byte ^ mask.unwrap_or_default();
            current.done += 1;
            let (opcode, is_whole) = (current.opcode, current.done == current.length);
            if opcode < CLOSE {
                bytes.push_back(plain);
            } else {
                self.control.push(plain);
            }
            if is_whole {
                self.frame = None;
                if self.end_of_frame(opcode, reply) {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    fn encode(&mut self, bytes: &[u8], raw: &mut Vec<u8>) {
        frame(BINARY, bytes, raw);
    }
}

/// A whole message of at most 65535 bytes. [RFC 6455 §5.2]
fn frame(opcode: u8, payload: &[u8], raw: &mut Vec<u8>) {
    for part in payload.chunks(usize::from(u16::MAX)).chain(payload.is_empty().then_some(payload)) {
        raw.push(0x80 | opcode);
        match u8::try_from(part.len()).ok().filter(|length| *length < 126) {
            Some(length) => raw.push(length),
            None => {
                raw.push(126);
                raw.extend_from_slice(&u16::try_from(part.len()).unwrap_or(u16::MAX).to_be_bytes());
            }
        }
        raw.extend_from_slice(part);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REQUEST: &str = "GET / HTTP/1.1\r\nHost: x\r\nupgrade: WebSocket\r\nConnection: keep-alive, Upgrade\r\n\
        Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n";

    #[test]
    fn the_example_of_the_specification_is_answered() {
        let text = |request: String| answer(request.as_bytes()).map(|answer| String::from_utf8(answer).unwrap());
        let plain = text(format!("{REQUEST}\r\n")).unwrap();
        assert!(plain.contains("Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"), "{plain}");
        assert!(!plain.contains("Protocol:"));
        let binary = text(format!("{REQUEST}Sec-WebSocket-Protocol: chat, binary\r\n\r\n")).unwrap();
        assert!(binary.contains("Sec-WebSocket-Protocol: binary\r\n"), "{binary}");
        for (from, to) in
            [("GET", "PUT"), ("1.1", "1.0"), ("/ ", "/x "), ("13", "12"), ("Key", "Lock"), ("upgrade:", "x:")]
        {
            assert!(text(format!("{}\r\n", REQUEST.replacen(from, to, 1))).is_err(), "{to}");
        }
        assert!(text(format!("{REQUEST}Sec-WebSocket-Protocol: chat\r\n\r\n")).is_err());
    }

    fn masked(first: u8, payload: &[u8]) -> Vec<u8> {
        let mut raw = Vec::new();
        frame(first & 0xf, payload, &mut raw);
        raw[0] = first;
        raw[1] |= 0x80;
        let at = raw.len() - payload.len();
        let mask = [1, 2, 3, 250];
        raw.iter_mut().skip(at).zip(mask.iter().cycle()).for_each(|(byte, mask)| *byte ^= mask);
        raw.splice(at..at, mask);
        raw
    }

    #[test]
    fn frames_are_unwrapped_wherever_they_are_cut() {
        let long = vec![b'x'; 300];
        let parts = [
            masked(0x80 | BINARY, b"a"),
            masked(TEXT, b"bc"),
            masked(0x80 | PING, b"hello"),
            masked(0x80 | CONTINUATION, b""),
            masked(0x80 | BINARY, &long),
            masked(0x80 | CLOSE, b""),
        ];
        let raw = parts.concat();
        for cut in 0..raw.len() {
            let (first, second) = raw.split_at(cut);
            let (mut ws, mut bytes, mut reply) = (WebSocket::default(), VecDeque::new(), Vec::new());
            assert!(!ws.decode(first, &mut bytes, &mut reply).unwrap());
            assert!(ws.decode(second, &mut bytes, &mut reply).unwrap());
            assert_eq!(bytes, [b"abc", long.as_slice()].concat());
            assert_eq!(reply, b"\x8a\x05hello\x88\x00");
        }
    }

    #[test]
    fn what_is_not_of_the_protocol_ends_it() {
        for raw in [&b"\x82\x05hello"[..], b"\xc2\x80", b"\x83\x80", b"\x89\xfe", b"\x09\x80"] {
            let (mut bytes, mut reply) = (VecDeque::new(), Vec::new());
            WebSocket::default().decode(raw, &mut bytes, &mut reply).unwrap_err();
            assert!(reply.starts_with(b"\x88") && bytes.is_empty());
        }
    }
}
