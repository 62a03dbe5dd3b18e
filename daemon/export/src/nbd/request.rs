//! Requests: from the bytes of a header to a command that is known to be valid, `[NBD Request message]`.
//!
//! Pure. The order of the checks decides which of several errors a client is told, and is that of QEMU's server.

use super::metacontext::Contexts;
use super::negotiate::Mode;
use super::wire::{EXTENDED_REQUEST_MAGIC, Fields, MAX_PAYLOAD, REQUEST_MAGIC, cmd, cmd_flag, command_name};

/// Length of a compact header in bytes.
const COMPACT_HEADER: usize = 28;
/// Length of an extended header in bytes.
pub(crate) const EXTENDED_HEADER: usize = 32;

/// Length of a request header in bytes.
pub(crate) fn header_len(mode: Mode) -> usize {
    if mode == Mode::Extended { EXTENDED_HEADER } else { COMPACT_HEADER }
}

/// The fields of a header as they came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub magic: u32,
    pub flags: u16,
    pub command: u16,
    pub cookie: u64,
    pub offset: u64,
    pub length: u64,
}

impl Header {
    /// Takes a header apart; none if there are too few bytes.
    pub(crate) fn parse(mode: Mode, bytes: &[u8]) -> Option<Self> {
        let mut fields = Fields::new(bytes);
        Some(Self {
            magic: fields.u32()?,
            flags: fields.u16()?,
            command: fields.u16()?,
            cookie: fields.u64()?,
            offset: fields.u64()?,
            length: if mode == Mode::Extended { fields.u64()? } else { u64::from(fields.u32()?) },
        })
    }

    fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// How many bytes of payload follow.
    ///
    /// With extended headers a flag says so; a write has a payload even if a client forgot the flag.
    pub(crate) fn payload(&self, mode: Mode) -> u64 {
        let extended = mode == Mode::Extended && self.has(cmd_flag::PAYLOAD_LEN);
        if self.command == cmd::WRITE || extended { self.length } else { 0 }
    }
}

/// What the checks need to know of the connection and its export.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub mode: Mode,
    pub contexts: Contexts,
    pub writable: bool,
    /// Length of the export now, in bytes.
    pub size: u64,
}

/// A valid request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    /// `fragment` is false if the client wants the data in one chunk.
    Read {
        at: u64,
        len: u32,
        fragment: bool,
    },
    /// The payload is the data.
    Write {
        at: u64,
        len: u32,
        fua: bool,
    },
    Flush,
    Trim {
        at: u64,
        len: u64,
        fua: bool,
    },
    Cache {
        at: u64,
        len: u32,
    },
    WriteZeroes {
        at: u64,
        len: u64,
        fua: bool,
        may_unmap: bool,
        fast_only: bool,
    },
    /// With `one`, a single extent for each context.
    BlockStatus {
        at: u64,
        len: u64,
        one: bool,
        contexts: Contexts,
    },
}

/// What is to be done about a header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Serve it. A write has to wait for its payload.
    Serve(Command),
    /// A block status whose payload says what it is about: decide with [`status_request`] when that has come.
    NeedsPayload,
    /// Step over the payload and tell the client.
    Refuse(String),
    /// The client goes away.
    Disconnect,
    /// The stream cannot be followed any further: tell the client and close.
    Fatal(String),
}

fn past_end(at: u64, len: u64, size: u64) -> Option<String> {
    let inside = at.checked_add(len).is_some_and(|end| end <= size);
    (!inside).then(|| format!("operation past EOF; From: {at}, Len: {len}, Size: {size}"))
}

/// The flags that a command may have.
fn valid_flags(command: u16, limits: &Limits) -> u16 {
    let extended = limits.mode == Mode::Extended;
    cmd_flag::FUA
        | match command {
            cmd::READ if limits.mode >= Mode::Structured => cmd_flag::DF,
            cmd::WRITE if extended => cmd_flag::PAYLOAD_LEN,
            cmd::WRITE_ZEROES => cmd_flag::NO_HOLE | cmd_flag::FAST_ZERO,
            cmd::BLOCK_STATUS if extended && !limits.contexts.is_empty() => cmd_flag::REQ_ONE | cmd_flag::PAYLOAD_LEN,
            cmd::BLOCK_STATUS => cmd_flag::REQ_ONE,
            _ => 0,
        }
}

/// Checks a header.
pub(crate) fn check(header: &Header, limits: &Limits) -> Verdict {
    let expected = if limits.mode == Mode::Extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
    if header.magic != expected {
        return Verdict::Fatal(format!("invalid magic (got {:#x}, expected {expected:#x})", header.magic));
    }
    let Header { command, cookie: _, offset: at, length, .. } = *header;
    if command == cmd::DISC {
        return Verdict::Disconnect;
    }
    let payload = header.payload(limits.mode);
    if length > u64::from(MAX_PAYLOAD) && (payload > 0 || matches!(command, cmd::READ | cmd::CACHE)) {
        let text = format!("len ({length}) is larger than max len ({MAX_PAYLOAD})");
        // A payload of that size is not stepped over.
        return if payload > 0 { Verdict::Fatal(text) } else { Verdict::Refuse(text) };
    }
    if !limits.writable && matches!(command, cmd::WRITE | cmd::WRITE_ZEROES | cmd::TRIM) {
        return Verdict::Refuse("Export is read-only".to_owned());
    }
    let payload_status = command == cmd::BLOCK_STATUS && payload > 0;
    let anywhere = command == cmd::FLUSH || payload_status;
    if !anywhere && let Some(text) = past_end(at, length, limits.size) {
        return Verdict::Refuse(text);
    }
    // A client that has promised to keep to the minimum block size and does not is served all the same, as QEMU's server does.
    if header.flags & !valid_flags(command, limits) != 0 {
        let name = command_name(command);
        return Verdict::Refuse(format!("unsupported flags for command {name} (got {:#x})", header.flags));
    }
    let fua = header.has(cmd_flag::FUA);
    let len = u32::try_from(length).unwrap_or(u32::MAX);
    Verdict::Serve(match command {
        cmd::READ => Command::Read { at, len, fragment: !header.has(cmd_flag::DF) },
        cmd::WRITE => Command::Write { at, len, fua },
        cmd::FLUSH => Command::Flush,
        cmd::TRIM => Command::Trim { at, len: length, fua },
        cmd::CACHE => Command::Cache { at, len },
        cmd::WRITE_ZEROES => Command::WriteZeroes {
            at,
            len: length,
            fua,
            may_unmap: !header.has(cmd_flag::NO_HOLE),
            fast_only: header.has(cmd_flag::FAST_ZERO),
        },
        cmd::BLOCK_STATUS if limits.contexts.is_empty() => {
            return Verdict::Refuse("CMD_BLOCK_STATUS not negotiated".to_owned());
        }
        cmd::BLOCK_STATUS if payload_status => return Verdict::NeedsPayload,
        cmd::BLOCK_STATUS if header.has(cmd_flag::PAYLOAD_LEN) => {
            return Verdict::Refuse(BAD_STATUS_PAYLOAD.to_owned());
        }
        cmd::BLOCK_STATUS if length == 0 => return Verdict::Refuse(ZERO_LENGTH.to_owned()),
        cmd::BLOCK_STATUS => {
            let one = header.has(cmd_flag::REQ_ONE);
            Command::BlockStatus { at, len: length, one, contexts: limits.contexts }
        }
        other => return Verdict::Refuse(format!("invalid request type ({other}) received")),
    })
}

const BAD_STATUS_PAYLOAD: &str = "CMD_BLOCK_STATUS payload not valid";
const ZERO_LENGTH: &str = "need non-zero length";

/// The longest payload of a block status that can be valid: a length and the id of each context.
pub(crate) const MAX_STATUS_PAYLOAD: usize = 8 + 4 * 2;

/// Decides on a block status with a payload, which holds the effective length and the ids of some contexts.
pub(crate) fn status_request(header: &Header, payload: &[u8], limits: &Limits) -> Result<Command, String> {
    let bad = || BAD_STATUS_PAYLOAD.to_owned();
    let mut fields = Fields::new(payload);
    let len = fields.u64().ok_or_else(bad)?;
    let mut contexts = Contexts::NONE;
    while fields.left() > 0 {
        let context = fields.u32().and_then(|id| limits.contexts.by_id(id)).ok_or_else(bad)?;
        if contexts.contains(context) {
            return Err(bad());
        }
        contexts.insert(context);
    }
    if contexts.is_empty() {
        return Err(bad());
    }
    if let Some(text) = past_end(header.offset, len, limits.size) {
        return Err(text);
    }
    if len == 0 {
        return Err(ZERO_LENGTH.to_owned());
    }
    Ok(Command::BlockStatus { at: header.offset, len, one: header.has(cmd_flag::REQ_ONE), contexts })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1 << 20;

    fn limits(mode: Mode) -> Limits {
        Limits { mode, contexts: Contexts::NONE, writable: true, size: SIZE }
    }

    fn header(command: u16, offset: u64, length: u64, flags: u16) -> Header {
        Header { magic: REQUEST_MAGIC, flags, command, cookie: 7, offset, length }
    }

    fn refusal(header: &Header, limits: &Limits) -> String {
        match check(header, limits) {
            Verdict::Refuse(text) => text,
            other => panic!("{header:?}: {other:?}"),
        }
    }

    #[test]
    fn headers_are_taken_apart() {
        let compact = b"\x25\x60\x95\x13\0\x01\0\x06\0\0\0\0\0\0\0\x07\0\0\0\0\0\0\x10\0\0\0\x02\0";
        let got = Header::parse(Mode::Simple, compact).unwrap();
        assert_eq!(got, header(cmd::WRITE_ZEROES, 4096, 512, cmd_flag::FUA));
        assert_eq!(Header::parse(Mode::Simple, &compact[..27]), None);
        assert_eq!(Header::parse(Mode::Extended, compact), None, "four bytes longer");
        assert_eq!(header_len(Mode::Structured), compact.len());
    }

    #[test]
    fn good_requests() {
        let simple = limits(Mode::Simple);
        let serve = |h: Header| match check(&h, &simple) {
            Verdict::Serve(command) => command,
            other => panic!("{h:?}: {other:?}"),
        };
        assert_eq!(serve(header(cmd::READ, SIZE, 0, 0)), Command::Read { at: SIZE, len: 0, fragment: true });
        assert_eq!(serve(header(cmd::READ, 3, 5, cmd_flag::FUA)), Command::Read { at: 3, len: 5, fragment: true });
        assert_eq!(serve(header(cmd::FLUSH, 5, 5, 0)), Command::Flush);
        assert_eq!(serve(header(cmd::TRIM, 0, SIZE, 1)), Command::Trim { at: 0, len: SIZE, fua: true });
        assert_eq!(
            serve(header(cmd::WRITE_ZEROES, 1, 2, cmd_flag::NO_HOLE | cmd_flag::FAST_ZERO)),
            Command::WriteZeroes { at: 1, len: 2, fua: false, may_unmap: false, fast_only: true }
        );
        assert_eq!(check(&header(cmd::DISC, 9, 9, 0xffff), &simple), Verdict::Disconnect);
    }

    #[test]
    fn bad_requests_say_what_is_wrong() {
        let simple = limits(Mode::Simple);
        let structured = limits(Mode::Structured);
        let past = "operation past EOF; From: 18446744073709551615, Len: 2, Size: 1048576";
        assert_eq!(refusal(&header(cmd::READ, u64::MAX, 2, 0), &simple), past);
        assert_eq!(
            refusal(&header(77, SIZE, 5, 0), &simple),
            "operation past EOF; From: 1048576, Len: 5, Size: 1048576"
        );
        assert_eq!(refusal(&header(77, 0, 0, 0), &simple), "invalid request type (77) received");
        assert_eq!(refusal(&header(77, 0, 0, 32), &simple), "unsupported flags for command <unknown> (got 0x20)");
        let long = u64::from(MAX_PAYLOAD) + 1;
        let text = "len (33554433) is larger than max len (33554432)";
        assert_eq!(refusal(&header(cmd::READ, 0, long, 0), &simple), text);
        assert_eq!(refusal(&header(cmd::CACHE, 0, long, 0), &simple), text);
        assert_eq!(check(&header(cmd::WRITE, 0, long, 0), &simple), Verdict::Fatal(text.to_owned()));
        let df = header(cmd::READ, 0, 4, cmd_flag::DF);
        assert_eq!(refusal(&df, &simple), "unsupported flags for command read (got 0x4)");
        assert!(matches!(check(&df, &structured), Verdict::Serve(Command::Read { fragment: false, .. })));
        for command in [cmd::WRITE, cmd::TRIM, cmd::WRITE_ZEROES] {
            let locked = Limits { writable: false, ..simple };
            assert_eq!(refusal(&header(command, u64::MAX, 4, 2), &locked), "Export is read-only");
        }
        let status = header(cmd::BLOCK_STATUS, 0, 4, 0);
        assert_eq!(refusal(&status, &structured), "CMD_BLOCK_STATUS not negotiated");
        let with = Limits { contexts: Contexts::offered(false), ..structured };
        assert_eq!(refusal(&header(cmd::BLOCK_STATUS, 0, 0, 0), &with), "need non-zero length");
        let strange = Header { magic: EXTENDED_REQUEST_MAGIC, ..status };
        assert_eq!(
            check(&strange, &simple),
            Verdict::Fatal("invalid magic (got 0x21e41c71, expected 0x25609513)".to_owned())
        );
    }

    #[test]
    fn extended_payloads() {
        let all = Limits { contexts: Contexts::offered(true), ..limits(Mode::Extended) };
        let ext =
            |command, length, flags| Header { magic: EXTENDED_REQUEST_MAGIC, ..header(command, 0, length, flags) };
        assert_eq!(ext(cmd::WRITE, 4, 0).payload(Mode::Extended), 4, "even if the flag is forgotten");
        assert_eq!(ext(cmd::READ, 4, 0).payload(Mode::Extended), 0);
        assert_eq!(ext(cmd::READ, 4, cmd_flag::PAYLOAD_LEN).payload(Mode::Extended), 4);
        assert_eq!(
            refusal(&ext(cmd::READ, 4, cmd_flag::PAYLOAD_LEN), &all),
            "unsupported flags for command read (got 0x20)"
        );
        let status = ext(cmd::BLOCK_STATUS, 12, cmd_flag::PAYLOAD_LEN);
        assert_eq!(check(&status, &all), Verdict::NeedsPayload);
        let ask = |payload: &[u8]| status_request(&status, payload, &all);
        let mut base = Contexts::NONE;
        base.insert(crate::nbd::metacontext::Context::BaseAllocation);
        let good = Command::BlockStatus { at: 0, len: 4096, one: false, contexts: base };
        assert_eq!(ask(b"\0\0\0\0\0\0\x10\0\0\0\0\0"), Ok(good));
        for bad in [
            &b""[..],
            b"\0\0\0\0\0\0\x10",
            b"\0\0\0\0\0\0\x10\0",
            b"\0\0\0\0\0\0\x10\0\0\0",
            b"\0\0\0\0\0\0\x10\0\0\0\0\x09",
            b"\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\0\0",
        ] {
            assert_eq!(ask(bad), Err(BAD_STATUS_PAYLOAD.to_owned()), "{bad:?}");
        }
        assert!(ask(b"\0\0\0\0\x40\0\0\0\0\0\0\0").unwrap_err().starts_with("operation past EOF; From: 0"));
        let empty = ext(cmd::BLOCK_STATUS, 0, cmd_flag::PAYLOAD_LEN);
        assert_eq!(refusal(&empty, &all), BAD_STATUS_PAYLOAD);
    }
}
