//! Replies: their headers and small payloads, in each of the three styles, `[NBD Simple, structured and extended reply]`.
//!
//! Writes into a [`SendQueue`]: headers are copied there, data goes along as the buffers that it was read into.

use super::metacontext::Context;
use super::negotiate::Mode;
use super::wire::{
    EXTENDED_REPLY_MAGIC, MAX_EXTENTS, MAX_STRING, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, chunk, error,
};
use block::Errno;
use buf::IoBuf;
use io::SendQueue;

/// The number that stands for an errno on the wire. What the protocol has no number for is an invalid argument.
pub(crate) fn error_number(errno: Errno) -> u32 {
    match errno {
        Errno::EPERM | Errno::EROFS => error::PERM,
        Errno::EIO => error::IO,
        Errno::ENOMEM => error::NOMEM,
        Errno::ENOSPC | Errno::EDQUOT | Errno::EFBIG => error::NOSPC,
        Errno::EOVERFLOW => error::OVERFLOW,
        Errno::EOPNOTSUPP => error::NOTSUP,
        Errno::ESHUTDOWN => error::SHUTDOWN,
        _ => error::INVAL,
    }
}

/// To which request a reply belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Origin {
    pub mode: Mode,
    pub cookie: u64,
    /// The offset of the request, which extended replies repeat.
    pub offset: u64,
}

/// A run of blocks with the same status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    /// Bytes.
    pub len: u64,
    pub flags: u64,
}

/// The extents that were found for one context.
#[derive(Clone, Debug)]
pub(crate) struct ContextExtents {
    pub context: Context,
    pub extents: Vec<Extent>,
}

/// Reads are looked through for zeroes in aligned pieces of this many bytes; each run of pieces becomes a chunk.
const HOLE_PIECE: u64 = 64 << 10;

impl Origin {
    fn simple(&self, out: &mut SendQueue, error: u32) {
        let mut head = [0; 16];
        fill(&mut head, &[&SIMPLE_REPLY_MAGIC.to_be_bytes(), &error.to_be_bytes(), &self.cookie.to_be_bytes()]);
        out.push_bytes(&head);
    }

    /// The header of a chunk with `len` bytes of payload, `fields` being the first of them.
    fn chunk(&self, out: &mut SendQueue, flags: u16, kind: u16, len: u64, fields: &[&[u8]]) {
        let (flags, kind, cookie) = (flags.to_be_bytes(), kind.to_be_bytes(), self.cookie.to_be_bytes());
        let mut head = [0; 32 + 12];
        let mut at = if self.mode == Mode::Extended {
            let magic = EXTENDED_REPLY_MAGIC.to_be_bytes();
            fill(&mut head, &[&magic, &flags, &kind, &cookie, &self.offset.to_be_bytes(), &len.to_be_bytes()])
        } else {
            // Longer ones are never made: payloads are at most 32 MiB and a few bytes.
            let len = u32::try_from(len).unwrap_or(u32::MAX);
            fill(&mut head, &[&STRUCTURED_REPLY_MAGIC.to_be_bytes(), &flags, &kind, &cookie, &len.to_be_bytes()])
        };
        at += fill(head.get_mut(at..).unwrap_or_default(), fields);
        out.push_bytes(head.get(..at).unwrap_or_default());
    }

    /// Success, and nothing else to say.
    pub(crate) fn done(&self, out: &mut SendQueue) {
        match self.mode {
            // With structured replies a simple one is still allowed, and shorter.
            Mode::Simple | Mode::Structured => self.simple(out, 0),
            Mode::Extended => self.chunk(out, chunk::FLAG_DONE, chunk::NONE, 0, &[]),
        }
    }

    /// Failure. The text is for a person, and lost on clients with simple replies.
    pub(crate) fn failed(&self, out: &mut SendQueue, error: u32, text: &str) {
        if self.mode == Mode::Simple {
            return self.simple(out, error);
        }
        let text = text.as_bytes();
        let text = text.get(..text.len().min(MAX_STRING)).unwrap_or_default();
        let len = u16::try_from(text.len()).unwrap_or(0);
        let total = 6 + u64::from(len);
        self.chunk(out, chunk::FLAG_DONE, chunk::ERROR, total, &[&error.to_be_bytes(), &len.to_be_bytes()]);
        out.push_bytes(text);
    }

    /// The data of a read at `at`. With `fragment` zeroes may be told as holes.
    pub(crate) fn data(&self, out: &mut SendQueue, at: u64, data: IoBuf, fragment: bool) {
        if self.mode == Mode::Simple {
            self.simple(out, 0);
            out.push_buf(data);
        } else if data.is_empty() {
            self.chunk(out, chunk::FLAG_DONE, chunk::NONE, 0, &[]);
        } else if fragment {
            self.data_and_holes(out, at, &data);
        } else {
            self.data_chunk(out, chunk::FLAG_DONE, at, data);
        }
    }

    fn data_chunk(&self, out: &mut SendQueue, flags: u16, at: u64, data: IoBuf) {
        let len = 8 + length(&data);
        self.chunk(out, flags, chunk::OFFSET_DATA, len, &[&at.to_be_bytes()]);
        out.push_buf(data);
    }

    fn data_and_holes(&self, out: &mut SendQueue, at: u64, data: &IoBuf) {
        let mut start = 0;
        while start < data.len() {
            let here = at + u64::try_from(start).unwrap_or(0);
            let (mut end, zero) = next_piece(at, data, start);
            while end < data.len() {
                let (next, next_zero) = next_piece(at, data, end);
                if next_zero != zero {
                    break;
                }
                end = next;
            }
            let flags = if end == data.len() { chunk::FLAG_DONE } else { 0 };
            let run = data.slice(start, end - start);
            if zero {
                let len = u32::try_from(run.len()).unwrap_or(u32::MAX);
                self.chunk(out, flags, chunk::OFFSET_HOLE, 12, &[&here.to_be_bytes(), &len.to_be_bytes()]);
            } else {
                self.data_chunk(out, flags, here, run);
            }
            start = end;
        }
    }

    /// The answer to a block status: a chunk for each context.
    pub(crate) fn status(&self, out: &mut SendQueue, found: &[ContextExtents]) {
        for (i, context) in found.iter().enumerate() {
            let flags = if i + 1 == found.len() { chunk::FLAG_DONE } else { 0 };
            let id = context.context.id().to_be_bytes();
            let extents = context.extents.get(..context.extents.len().min(MAX_EXTENTS)).unwrap_or_default();
            let count = u32::try_from(extents.len()).unwrap_or(0);
            let mut body = Vec::with_capacity(extents.len() * 16);
            if self.mode == Mode::Extended {
                for extent in extents {
                    body.extend_from_slice(&extent.len.to_be_bytes());
                    body.extend_from_slice(&extent.flags.to_be_bytes());
                }
                let len = 8 + u64::from(count) * 16;
                self.chunk(out, flags, chunk::BLOCK_STATUS_EXT, len, &[&id, &count.to_be_bytes()]);
            } else {
                for extent in extents {
                    // No extent is longer than a request, whose length has 32 bits in this mode.
                    body.extend_from_slice(&u32::try_from(extent.len).unwrap_or(u32::MAX).to_be_bytes());
                    body.extend_from_slice(&u32::try_from(extent.flags).unwrap_or(0).to_be_bytes());
                }
                self.chunk(out, flags, chunk::BLOCK_STATUS, 4 + u64::from(count) * 8, &[&id]);
            }
            out.push_bytes(&body);
        }
    }
}

/// The end of the piece that starts at `start`, and whether it is all zero.
fn next_piece(at: u64, data: &IoBuf, start: usize) -> (usize, bool) {
    let here = at + u64::try_from(start).unwrap_or(0);
    let len = usize::try_from(HOLE_PIECE - here % HOLE_PIECE).unwrap_or(usize::MAX);
    let piece = data.slice(start, len);
    (start + piece.len(), piece.is_zero())
}

fn length(data: &IoBuf) -> u64 {
    u64::try_from(data.len()).unwrap_or(u64::MAX)
}

/// Copies the fields one after another to the front of `to`; returns where they end.
fn fill(to: &mut [u8], fields: &[&[u8]]) -> usize {
    let mut at = 0;
    for field in fields {
        if let Some(place) = to.get_mut(at..at + field.len()) {
            place.copy_from_slice(field);
            at += field.len();
        }
    }
    at
}
