//! The load generator: one connection, a fixed number of requests in flight, many requests in one system call.
//!
//! It speaks simple replies, which is what costs the client least: the machine's time is for the program under test.

use std::io::{IoSlice, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use tests::image::Noise;
use tests::nbd::{cmd, opt};

/// What is asked for.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// Bytes of a request.
    pub block: u32,
    /// At random places, or one after the other.
    pub random: bool,
    /// Writes, or reads.
    pub write: bool,
}

/// A connection in the transmission phase.
pub struct Connection {
    stream: UnixStream,
    load: Load,
    from: u64,
    blocks: u64,
    next: u64,
    noise: Noise,
    payload: Vec<u8>,
    requests: Vec<u8>,
    input: Vec<u8>,
    /// Payload still to come of the reply that is being received.
    skip: usize,
    /// A reply's header that came in part.
    partial: Vec<u8>,
    in_flight: u32,
}

const REQUEST: usize = 28;
const REPLY: usize = 16;

impl Connection {
    /// Connects and enters the export `disk`, to work on `len` bytes from `from`.
    pub fn open(socket: &Path, load: Load, from: u64, len: u64, seed: u64) -> Self {
        Self::open_export(socket, "disk", load, from, len, seed)
    }

    /// The same with another export.
    pub fn open_export(socket: &Path, export: &str, load: Load, from: u64, len: u64, seed: u64) -> Self {
        let mut stream = UnixStream::connect(socket).expect("connect to the server");
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).expect("the greeting");
        let mut hello = 3_u32.to_be_bytes().to_vec();
        hello.extend(b"IHAVEOPT");
        hello.extend(opt::EXPORT_NAME.to_be_bytes());
        hello.extend(u32::try_from(export.len()).expect("a short name").to_be_bytes());
        hello.extend(export.as_bytes());
        stream.write_all(&hello).expect("the handshake");
        let mut answer = [0; 10];
        stream.read_exact(&mut answer).expect("the size of the export");
        let payload = if load.write { Noise::new(seed).bytes(load.block as usize) } else { Vec::new() };
        Self {
            stream,
            load,
            from,
            blocks: len / u64::from(load.block),
            next: 0,
            noise: Noise::new(seed),
            payload,
            requests: Vec::new(),
            input: vec![0; 512 << 10],
            skip: 0,
            partial: Vec::with_capacity(REPLY),
            in_flight: 0,
        }
    }

    /// Keeps `depth` requests in flight for a time; gives the number of replies.
    pub fn run(&mut self, depth: u32, time: Duration) -> u64 {
        let end = Instant::now() + time;
        let mut done = 0;
        while Instant::now() < end {
            self.send(depth - self.in_flight);
            done += self.receive();
        }
        // What is in flight is not left for the next run to count.
        while self.in_flight > 0 {
            done += self.receive();
        }
        done
    }

    fn send(&mut self, count: u32) {
        self.requests.clear();
        let cmd = if self.load.write { cmd::WRITE } else { cmd::READ };
        for _ in 0..count {
            let index = if self.load.random { self.noise.below(self.blocks) } else { self.next % self.blocks };
            self.next += 1;
            self.requests.extend(0x2560_9513_u32.to_be_bytes());
            self.requests.extend(0_u16.to_be_bytes());
            self.requests.extend(cmd.to_be_bytes());
            self.requests.extend(self.next.to_be_bytes());
            self.requests.extend((self.from + index * u64::from(self.load.block)).to_be_bytes());
            self.requests.extend(self.load.block.to_be_bytes());
        }
        self.in_flight += count;
        if !self.load.write {
            self.stream.write_all(&self.requests).expect("send requests");
            return;
        }
        let mut parts = Vec::with_capacity(count as usize * 2);
        for header in self.requests.chunks_exact(REQUEST) {
            parts.extend([IoSlice::new(header), IoSlice::new(&self.payload)]);
        }
        let mut left = &mut parts[..];
        while !left.is_empty() {
            let sent = self.stream.write_vectored(left).expect("send requests");
            IoSlice::advance_slices(&mut left, sent);
        }
    }

    /// Takes what has come, waiting for something; gives the number of whole replies.
    fn receive(&mut self) -> u64 {
        let got = self.stream.read(&mut self.input).expect("receive replies");
        assert!(got > 0, "the server closed the connection");
        let mut at = 0;
        let mut done = 0;
        let payload = if self.load.write { 0 } else { self.load.block as usize };
        while at < got {
            if self.skip > 0 {
                let step = self.skip.min(got - at);
                self.skip -= step;
                at += step;
                done += u64::from(self.skip == 0);
                continue;
            }
            let step = (REPLY - self.partial.len()).min(got - at);
            self.partial.extend_from_slice(&self.input[at..at + step]);
            at += step;
            if self.partial.len() == REPLY {
                assert_eq!(self.partial[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0], "a reply that is an error");
                self.partial.clear();
                self.skip = payload;
                done += u64::from(payload == 0);
            }
        }
        self.in_flight -= u32::try_from(done).expect("few replies");
        done
    }
}
