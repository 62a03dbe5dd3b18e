//! A small NBD client that can also say what no client should say [NBD protocol document].
//!
//! It checks the form of what it receives and leaves the meaning to the test.

use std::collections::HashMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::{DEADLINE, wait_for};

/// Options of the handshake [NBD §Option types].
pub mod opt {
    #![allow(missing_docs, reason = "the names are the protocol's own")]
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Replies to options [NBD §Option reply types].
pub mod rep {
    #![allow(missing_docs, reason = "the names are the protocol's own")]
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERR_UNSUP: u32 = 0x8000_0001;
    pub const ERR_POLICY: u32 = 0x8000_0002;
    pub const ERR_INVALID: u32 = 0x8000_0003;
    pub const ERR_TLS_REQD: u32 = 0x8000_0005;
    pub const ERR_UNKNOWN: u32 = 0x8000_0006;
    pub const ERR_TOO_BIG: u32 = 0x8000_0009;
    pub const ERR_EXT_HEADER_REQD: u32 = 0x8000_000A;
}

/// Commands of the transmission phase [NBD §Request types].
pub mod cmd {
    #![allow(missing_docs, reason = "the names are the protocol's own")]
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of a command [NBD §Command flags].
pub mod flag {
    #![allow(missing_docs, reason = "the names are the protocol's own")]
    pub const FUA: u16 = 1;
    pub const NO_HOLE: u16 = 2;
    pub const DF: u16 = 4;
    pub const REQ_ONE: u16 = 8;
    pub const FAST_ZERO: u16 = 16;
    pub const PAYLOAD_LEN: u16 = 32;
}

/// Types of structured chunks [NBD §Structured reply types].
pub mod chunk {
    #![allow(missing_docs, reason = "the names are the protocol's own")]
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    pub const BLOCK_STATUS_EXT: u16 = 6;
    pub const ERROR: u16 = 0x8001;
    pub const ERROR_OFFSET: u16 = 0x8002;
}

const REQUEST_MAGIC: u32 = 0x2560_9513;
const EXTENDED_REQUEST_MAGIC: u32 = 0x21E4_1C71;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_REPLY_MAGIC: u32 = 0x668E_33EF;
const EXTENDED_REPLY_MAGIC: u32 = 0x6E8A_278C;
const OPTION_MAGIC: u64 = 0x4948_4156_454F_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_E889_0455_65A9;

/// A byte stream to a server.
pub trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

/// Which reply headers both sides agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Headers {
    /// Simple replies only.
    Simple,
    /// Structured replies.
    Structured,
    /// Extended headers, which are structured too.
    Extended,
}

/// One reply to an option.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OptionReply {
    /// The option it answers.
    pub option: u32,
    /// Its type.
    pub kind: u32,
    /// Its payload.
    pub data: Vec<u8>,
}

/// What a server told about an export.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Export {
    /// Its size in bytes.
    pub size: u64,
    /// Its transmission flags.
    pub flags: u16,
    /// Minimum, preferred and maximum block size, when told.
    pub block_sizes: Option<(u32, u32, u32)>,
    /// Its description, when told.
    pub description: Option<String>,
}

/// One extent of a block status reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Its length in bytes.
    pub len: u64,
    /// Its status flags.
    pub flags: u64,
}

/// A whole reply, its chunks put together.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reply {
    /// The cookie of the request.
    pub cookie: u64,
    /// 0 or the protocol's error number.
    pub error: u32,
    /// The text that came with an error.
    pub message: String,
    /// The data of a read.
    pub data: Vec<u8>,
    /// The extents of a block status, by context.
    pub extents: HashMap<u32, Vec<Extent>>,
    /// The types of the chunks in their order; empty for a simple reply.
    pub chunks: Vec<u16>,
}

/// A request of the transmission phase; `len` is the effect length where there is no payload.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// The command.
    pub cmd: u16,
    /// Its flags.
    pub flags: u16,
    /// The first byte.
    pub offset: u64,
    /// The number of bytes.
    pub len: u64,
    /// The bytes of a write.
    pub payload: Vec<u8>,
}

/// A connection to a server.
pub struct Client {
    stream: Box<dyn Stream>,
    headers: Headers,
    next_cookie: u64,
    expected: HashMap<u64, (u16, u64, u64)>,
}

impl Client {
    /// Connects to a Unix socket; the server may still be on its way to listen.
    pub fn connect_unix(path: &Path) -> Self {
        Self::over_unix(wait_for("the NBD server's socket", || UnixStream::connect(path).ok()))
    }

    /// Speaks over a connected Unix socket.
    pub fn over_unix(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(DEADLINE)).expect("set a time limit");
        stream.set_write_timeout(Some(DEADLINE)).expect("set a time limit");
        Self::over(Box::new(stream))
    }

    /// Connects over TCP.
    pub fn connect_tcp(addr: impl ToSocketAddrs) -> Self {
        let stream = wait_for("the NBD server's port", || TcpStream::connect(&addr).ok());
        stream.set_read_timeout(Some(DEADLINE)).expect("set a time limit");
        stream.set_nodelay(true).expect("send at once");
        Self::over(Box::new(stream))
    }

    /// Speaks over any stream, with the greeting still to come.
    pub fn over(stream: Box<dyn Stream>) -> Self {
        Self { stream, headers: Headers::Simple, next_cookie: 1, expected: HashMap::new() }
    }

    /// Greeting, header style and `GO` for an export; fails the test when the server refuses.
    pub fn open(mut self, export: &str, headers: Headers) -> (Self, Export) {
        self.greet();
        self.negotiate(headers);
        let info = self.go(export).unwrap_or_else(|reply| panic!("{export}: refused: {reply:?}"));
        (self, info)
    }

    /// Takes the server's greeting and answers it with fixed newstyle and no zeroes [NBD §Fixed newstyle].
    pub fn greet(&mut self) {
        let greeting = self.take(18);
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        assert_eq!(greeting[16..], [0, 3], "handshake flags");
        self.send_raw(&3u32.to_be_bytes());
    }

    /// Asks for a style of headers; fails the test when the server refuses.
    pub fn negotiate(&mut self, headers: Headers) {
        let option = match headers {
            Headers::Simple => return,
            Headers::Structured => opt::STRUCTURED_REPLY,
            Headers::Extended => opt::EXTENDED_HEADERS,
        };
        let replies = self.option(option, &[]);
        assert_eq!(replies.iter().map(|reply| reply.kind).collect::<Vec<_>>(), [rep::ACK], "headers {headers:?}");
        self.headers = headers;
    }

    /// Sends an option without waiting for the replies.
    pub fn send_option(&mut self, option: u32, data: &[u8]) {
        let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
        bytes.extend(option.to_be_bytes());
        bytes.extend(u32::try_from(data.len()).expect("a short option").to_be_bytes());
        bytes.extend(data);
        self.send_raw(&bytes);
    }

    /// Sends an option and gives its replies, the final one last.
    pub fn option(&mut self, option: u32, data: &[u8]) -> Vec<OptionReply> {
        self.send_option(option, data);
        let mut replies = Vec::new();
        loop {
            let reply = self.option_reply();
            assert_eq!(reply.option, option, "the reply is for another option");
            let last = reply.kind == rep::ACK || reply.kind & 0x8000_0000 != 0;
            replies.push(reply);
            if last {
                return replies;
            }
        }
    }

    /// Takes one reply to an option.
    pub fn option_reply(&mut self) -> OptionReply {
        assert_eq!(self.take_u64(), OPTION_REPLY_MAGIC);
        let (option, kind, len) = (self.take_u32(), self.take_u32(), self.take_u32());
        OptionReply { option, kind, data: self.take(len as usize) }
    }

    /// `INFO` or `GO` for an export, asking for the information items given.
    pub fn info(&mut self, option: u32, export: &str, items: &[u16]) -> Result<Export, OptionReply> {
        let mut data = u32::try_from(export.len()).expect("a short name").to_be_bytes().to_vec();
        data.extend(export.as_bytes());
        data.extend(u16::try_from(items.len()).expect("few items").to_be_bytes());
        data.extend(items.iter().flat_map(|item| item.to_be_bytes()));
        let mut info = Export::default();
        for reply in self.option(option, &data) {
            match (reply.kind, &reply.data[..]) {
                (rep::INFO, [0, 0, rest @ ..]) => {
                    info.size = u64::from_be_bytes(rest[..8].try_into().expect("8 bytes"));
                    info.flags = u16::from_be_bytes(rest[8..].try_into().expect("2 bytes"));
                }
                (rep::INFO, [0, 2, text @ ..]) => info.description = Some(String::from_utf8_lossy(text).into_owned()),
                (rep::INFO, [0, 3, rest @ ..]) => {
                    let word = |at: usize| u32::from_be_bytes(rest[at..at + 4].try_into().expect("4 bytes"));
                    info.block_sizes = Some((word(0), word(4), word(8)));
                }
                (rep::INFO, _) | (rep::ACK, []) => {}
                _ => return Err(reply),
            }
        }
        Ok(info)
    }

    /// Enters the transmission phase, asking for the block sizes.
    pub fn go(&mut self, export: &str) -> Result<Export, OptionReply> {
        self.info(opt::GO, export, &[3])
    }

    /// Selects metadata contexts for an export; gives their ids by name.
    pub fn set_contexts(&mut self, export: &str, queries: &[&str]) -> Result<HashMap<String, u32>, OptionReply> {
        Ok(self.contexts(opt::SET_META_CONTEXT, export, queries)?.into_iter().map(|(id, name)| (name, id)).collect())
    }

    /// Lists or selects metadata contexts.
    pub fn contexts(&mut self, option: u32, export: &str, queries: &[&str]) -> Result<Vec<(u32, String)>, OptionReply> {
        let text = |text: &str| {
            let mut bytes = u32::try_from(text.len()).expect("a short text").to_be_bytes().to_vec();
            bytes.extend(text.as_bytes());
            bytes
        };
        let mut data = text(export);
        data.extend(u32::try_from(queries.len()).expect("few queries").to_be_bytes());
        data.extend(queries.iter().flat_map(|query| text(query)));
        let mut found = Vec::new();
        for reply in self.option(option, &data) {
            match reply.kind {
                rep::META_CONTEXT => {
                    let id = u32::from_be_bytes(reply.data[..4].try_into().expect("4 bytes"));
                    found.push((id, String::from_utf8_lossy(&reply.data[4..]).into_owned()));
                }
                rep::ACK => {}
                _ => return Err(reply),
            }
        }
        Ok(found)
    }

    /// Sends bytes as they are.
    pub fn send_raw(&mut self, bytes: &[u8]) {
        self.try_send_raw(bytes).expect("send to the NBD server");
    }

    /// Sends bytes as they are, unless the server has gone.
    pub fn try_send_raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// The bytes of a request under a cookie, and nothing sent.
    pub fn encode(&self, cookie: u64, request: &Request) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(32 + request.payload.len());
        let extended = self.headers == Headers::Extended;
        bytes.extend(if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC }.to_be_bytes());
        bytes.extend(request.flags.to_be_bytes());
        bytes.extend(request.cmd.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(request.offset.to_be_bytes());
        if extended {
            bytes.extend(request.len.to_be_bytes());
        } else {
            bytes.extend(u32::try_from(request.len).expect("a length of 32 bits").to_be_bytes());
        }
        bytes.extend(&request.payload);
        bytes
    }

    /// A new cookie, under which a reply to this request will be expected.
    pub fn expect(&mut self, request: &Request) -> u64 {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        self.expected.insert(cookie, (request.cmd, request.offset, request.len));
        cookie
    }

    /// Sends a request; gives its cookie. Extended headers get the payload flag with each write.
    pub fn send(&mut self, request: &Request) -> u64 {
        let cookie = self.expect(request);
        let mut request = request.clone();
        if self.headers == Headers::Extended && request.cmd == cmd::WRITE {
            request.flags |= flag::PAYLOAD_LEN;
        }
        let bytes = self.encode(cookie, &request);
        self.send_raw(&bytes);
        cookie
    }

    /// Sends a request and gives the reply to it; no other request may be in flight.
    pub fn call(&mut self, request: &Request) -> Reply {
        let cookie = self.send(request);
        let reply = self.reply();
        assert_eq!(reply.cookie, cookie);
        reply
    }

    /// Reads that must work.
    pub fn read(&mut self, offset: u64, len: u64) -> Vec<u8> {
        let reply = self.call(&Request { cmd: cmd::READ, offset, len, ..Request::default() });
        assert_eq!(reply.error, 0, "read {len} at {offset}: {}", reply.message);
        reply.data
    }

    /// A write; gives the protocol's error number, 0 for success.
    pub fn write(&mut self, offset: u64, flags: u16, data: &[u8]) -> u32 {
        let request = Request { cmd: cmd::WRITE, flags, offset, len: data.len() as u64, payload: data.to_vec() };
        self.call(&request).error
    }

    /// A request without data; gives the protocol's error number.
    pub fn simple(&mut self, cmd: u16, flags: u16, offset: u64, len: u64) -> u32 {
        self.call(&Request { cmd, flags, offset, len, payload: Vec::new() }).error
    }

    /// Takes one whole reply, of any request in flight.
    pub fn reply(&mut self) -> Reply {
        let mut whole: Option<Reply> = None;
        loop {
            let (cookie, last) = self.reply_chunk(&mut whole);
            if last {
                self.expected.remove(&cookie);
                return whole.unwrap_or_default();
            }
        }
    }

    /// Takes one chunk; gives the cookie and whether it was the last one of its reply. Tests have one reply under way
    /// at a time: chunks of another reply in between fail the test.
    fn reply_chunk(&mut self, whole: &mut Option<Reply>) -> (u64, bool) {
        let magic = self.take_u32();
        let (flags, kind, error, cookie, len) = match (magic, self.headers) {
            (SIMPLE_REPLY_MAGIC, Headers::Simple | Headers::Structured) => {
                let (error, cookie) = (self.take_u32(), self.take_u64());
                (1, None, error, cookie, 0)
            }
            (STRUCTURED_REPLY_MAGIC, Headers::Structured) => {
                let (flags, kind) = (self.take_u16(), self.take_u16());
                let (cookie, len) = (self.take_u64(), u64::from(self.take_u32()));
                (flags, Some(kind), 0, cookie, len)
            }
            (EXTENDED_REPLY_MAGIC, Headers::Extended) => {
                let (flags, kind) = (self.take_u16(), self.take_u16());
                let (cookie, _offset, len) = (self.take_u64(), self.take_u64(), self.take_u64());
                (flags, Some(kind), 0, cookie, len)
            }
            _ => panic!("reply magic {magic:#x} with {:?} headers", self.headers),
        };
        let &(cmd, offset, length) = self.expected.get(&cookie).unwrap_or_else(|| panic!("no request {cookie}"));
        let reply = whole.get_or_insert_with(|| Reply { cookie, ..Reply::default() });
        assert_eq!(reply.cookie, cookie, "chunks of two replies mixed");
        let mut reply = std::mem::take(reply);
        let length_in_memory = usize::try_from(length).expect("a length in memory");
        if cmd == cmd::READ && kind.is_some() && reply.data.is_empty() {
            reply.data = vec![0xEE; length_in_memory];
        }
        match kind {
            None => {
                reply.error = error;
                assert!(
                    cmd != cmd::READ || error != 0 || self.headers == Headers::Simple,
                    "a simple reply to a read after structured replies were agreed on"
                );
                if cmd == cmd::READ && error == 0 {
                    reply.data = self.take(length_in_memory);
                }
            }
            Some(kind) => {
                reply.chunks.push(kind);
                let payload = self.take(usize::try_from(len).expect("a chunk in memory"));
                take_payload(&mut reply, kind, &payload, offset);
            }
        }
        *whole = Some(reply);
        (cookie, flags & 1 != 0)
    }

    /// Whether the server has closed the connection; takes what still comes before.
    pub fn closed(&mut self) -> bool {
        let mut sink = [0; 4096];
        loop {
            match self.stream.read(&mut sink) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    return matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe);
                }
            }
        }
    }

    /// Takes that many bytes off the stream.
    pub fn take(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes).unwrap_or_else(|error| panic!("receive {len} bytes: {error}"));
        bytes
    }

    fn take_u16(&mut self) -> u16 {
        u16::from_be_bytes(self.take(2).try_into().expect("2 bytes"))
    }

    fn take_u32(&mut self) -> u32 {
        u32::from_be_bytes(self.take(4).try_into().expect("4 bytes"))
    }

    fn take_u64(&mut self) -> u64 {
        u64::from_be_bytes(self.take(8).try_into().expect("8 bytes"))
    }
}

/// Puts the payload of a chunk where it belongs in the reply.
fn take_payload(reply: &mut Reply, kind: u16, payload: &[u8], offset: u64) {
    let word = |at: usize| u32::from_be_bytes(payload[at..at + 4].try_into().expect("4 bytes"));
    let long = |at: usize| u64::from_be_bytes(payload[at..at + 8].try_into().expect("8 bytes"));
    match kind {
        chunk::NONE => assert!(payload.is_empty(), "a chunk of type NONE with a payload"),
        chunk::OFFSET_DATA => {
            let at = usize::try_from(long(0) - offset).expect("data inside the request");
            reply.data[at..at + payload.len() - 8].copy_from_slice(&payload[8..]);
        }
        chunk::OFFSET_HOLE => {
            assert_eq!(payload.len(), 12, "the length of a hole chunk");
            let at = usize::try_from(long(0) - offset).expect("a hole inside the request");
            reply.data[at..at + word(8) as usize].fill(0);
        }
        chunk::BLOCK_STATUS => {
            assert_eq!(payload.len() % 8, 4, "the length of a status chunk");
            let extents = payload[4..].chunks_exact(8).map(|pair| Extent {
                len: u64::from(u32::from_be_bytes(pair[..4].try_into().expect("4 bytes"))),
                flags: u64::from(u32::from_be_bytes(pair[4..].try_into().expect("4 bytes"))),
            });
            reply.extents.insert(word(0), extents.collect());
        }
        chunk::BLOCK_STATUS_EXT => {
            assert_eq!(payload.len() % 16, 8, "the length of an extended status chunk");
            assert_eq!(word(4) as usize, payload.len() / 16, "the number of extents");
            let extents = payload[8..].chunks_exact(16).map(|pair| Extent {
                len: u64::from_be_bytes(pair[..8].try_into().expect("8 bytes")),
                flags: u64::from_be_bytes(pair[8..].try_into().expect("8 bytes")),
            });
            reply.extents.insert(word(0), extents.collect());
        }
        chunk::ERROR | chunk::ERROR_OFFSET => {
            reply.error = word(0);
            let len = usize::from(u16::from_be_bytes(payload[4..6].try_into().expect("2 bytes")));
            reply.message = String::from_utf8_lossy(&payload[6..6 + len]).into_owned();
        }
        _ => panic!("chunk type {kind:#x}"),
    }
}
