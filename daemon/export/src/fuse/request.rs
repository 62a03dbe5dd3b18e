//! Requests of the kernel: bytes to [`Request`], checked, without I/O. `[FUSE fuse_in_header]`
//!
//! Only what an operation uses is read. Numbers are in the order of the machine.

use super::wire::{IN_HEADER, MAX_TRANSFER, WRITE_IN, fattr, opcode};
use block::Errno;

/// The bytes from the front of a request that can matter here, its data apart: a header and the largest fixed part.
pub(crate) const HEAD: usize = 128;

/// One request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    /// What its reply is recognised by.
    pub unique: u64,
    pub operation: Result<Operation, Errno>,
}

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    Init(Init),
    Lookup,
    /// Wants no reply.
    Forget,
    GetAttributes,
    SetAttributes(Attributes),
    Open,
    Read {
        at: u64,
        len: u32,
    },
    Write {
        at: u64,
        len: u32,
    },
    StatFs,
    Release,
    Sync,
    Allocate {
        at: u64,
        len: u64,
        mode: u32,
    },
    Seek {
        at: u64,
        whence: u32,
    },
    Destroy,
}

/// What the kernel offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Init {
    pub major: u32,
    pub minor: u32,
    pub max_readahead: u32,
    pub flags: u64,
}

/// Attributes to set; none stays as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) struct Attributes {
    pub size: Option<u64>,
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
}

/// Numbers at offsets.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn u32(&self, at: usize) -> Option<u32> {
        Some(u32::from_ne_bytes(*self.0.get(at..)?.first_chunk()?))
    }

    fn u64(&self, at: usize) -> Option<u64> {
        Some(u64::from_ne_bytes(*self.0.get(at..)?.first_chunk()?))
    }
}

/// Reads a request of `received` bytes, the first of which are `head`: all, or at least [`HEAD`] of them, of a write without
/// its data. None if not even its header is right, so that nothing can be replied.
pub(crate) fn parse(head: &[u8], received: usize) -> Option<Request> {
    let header = Fields(head.get(..IN_HEADER)?);
    let (len, opcode, unique) = (header.u32(0)?, header.u32(4)?, header.u64(8)?);
    if usize::try_from(len).ok()? != received || unique == 0 {
        return None;
    }
    let body = Fields(head.get(IN_HEADER..received.min(head.len()))?);
    let data = received.saturating_sub(IN_HEADER + WRITE_IN);
    Some(Request { unique, operation: operation(opcode, &body, data) })
}

/// Reads a request that came in parts: its header, what is fixed of its kind and what lay there before, and `payload` more
/// bytes elsewhere. None as for [`parse`].
pub(crate) fn parse_parts(header: &[u8; IN_HEADER], fixed: &[u8], payload: usize) -> Option<Request> {
    let header = Fields(header);
    let (len, opcode, unique) = (header.u32(0)?, header.u32(4)?, header.u64(8)?);
    let fixed_len = usize::try_from(len).ok()?.checked_sub(IN_HEADER)?.checked_sub(payload)?;
    if unique == 0 {
        return None;
    }
    let body = Fields(fixed.get(..fixed_len.min(fixed.len()))?);
    Some(Request { unique, operation: operation(opcode, &body, payload) })
}

/// What `opcode` asks for with `body`, after which `data` bytes follow if it is a write.
fn operation(opcode: u32, body: &Fields<'_>, data: usize) -> Result<Operation, Errno> {
    match opcode {
        opcode::FORGET | opcode::BATCH_FORGET => Ok(Operation::Forget),
        opcode::LOOKUP => Ok(Operation::Lookup),
        opcode::GETATTR => Ok(Operation::GetAttributes),
        opcode::OPEN => Ok(Operation::Open),
        opcode::STATFS => Ok(Operation::StatFs),
        opcode::RELEASE => Ok(Operation::Release),
        opcode::FSYNC | opcode::FLUSH => Ok(Operation::Sync),
        opcode::DESTROY => Ok(Operation::Destroy),
        opcode::INIT => init(body).ok_or(Errno::EINVAL),
        opcode::SETATTR => attributes(body).unwrap_or(Err(Errno::EINVAL)),
        opcode::READ => read(body).ok_or(Errno::EINVAL),
        opcode::WRITE => write(body, data).ok_or(Errno::EINVAL),
        opcode::FALLOCATE => allocate(body).ok_or(Errno::EINVAL),
        opcode::LSEEK => seek(body).ok_or(Errno::EINVAL),
        // The kernel then does without: an interrupted request simply goes on to its end.
        _ => Err(Errno::ENOSYS),
    }
}

fn init(body: &Fields<'_>) -> Option<Operation> {
    let flags = u64::from(body.u32(12)?);
    // The upper half came later, and a flag of the lower one says whether it is there.
    let extended = flags & fuser::InitFlags::FUSE_INIT_EXT.bits() != 0;
    let upper = if extended { u64::from(body.u32(16)?) } else { 0 };
    Some(Operation::Init(Init {
        major: body.u32(0)?,
        minor: body.u32(4)?,
        max_readahead: body.u32(8)?,
        flags: flags | upper << 32,
    }))
}

fn attributes(body: &Fields<'_>) -> Option<Result<Operation, Errno>> {
    let valid = body.u32(0)?;
    let set = |flag, at| if valid & flag == 0 { Some(None) } else { body.u32(at).map(Some) };
    let attributes = Attributes {
        size: if valid & fattr::SIZE == 0 { None } else { Some(body.u64(16)?) },
        mode: set(fattr::MODE, 68)?,
        uid: set(fattr::UID, 76)?,
        gid: set(fattr::GID, 80)?,
    };
    let known = fattr::SIZE | fattr::MODE | fattr::UID | fattr::GID | fattr::MANNER;
    Some(if valid & !known == 0 { Ok(Operation::SetAttributes(attributes)) } else { Err(Errno::ENOTSUP) })
}

/// Offset and length at their places in the fixed parts of reads and writes.
fn span(body: &Fields<'_>) -> Option<(u64, u32)> {
    let (at, len) = (body.u64(8)?, body.u32(16)?);
    let end = at.checked_add(u64::from(len))?;
    (len <= MAX_TRANSFER && i64::try_from(end).is_ok()).then_some((at, len))
}

fn read(body: &Fields<'_>) -> Option<Operation> {
    span(body).map(|(at, len)| Operation::Read { at, len })
}

fn write(body: &Fields<'_>, data: usize) -> Option<Operation> {
    // Its data come after the whole fixed part, or there are none.
    let (at, len) = span(&Fields(body.0.get(..WRITE_IN)?))?;
    (usize::try_from(len).ok()? == data).then_some(Operation::Write { at, len })
}

fn allocate(body: &Fields<'_>) -> Option<Operation> {
    let (at, len, mode) = (body.u64(8)?, body.u64(16)?, body.u32(24)?);
    i64::try_from(at.checked_add(len)?).ok()?;
    Some(Operation::Allocate { at, len, mode })
}

fn seek(body: &Fields<'_>) -> Option<Operation> {
    Some(Operation::Seek { at: body.u64(8)?, whence: body.u32(16)? })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A request as the kernel sends it.
    pub(in crate::fuse) fn raw(opcode: u32, unique: u64, body: &[u8]) -> Vec<u8> {
        let mut raw = u32::try_from(IN_HEADER + body.len()).unwrap().to_ne_bytes().to_vec();
        raw.extend(opcode.to_ne_bytes());
        raw.extend(unique.to_ne_bytes());
        raw.extend(1u64.to_ne_bytes());
        raw.extend([0; 16]);
        raw.extend(body);
        raw
    }

    fn operation(opcode: u32, body: &[u8]) -> Result<Operation, Errno> {
        let raw = raw(opcode, 7, body);
        let request = parse(&raw, raw.len()).unwrap();
        assert_eq!(request.unique, 7);
        request.operation
    }

    fn span_body(at: u64, len: u32) -> Vec<u8> {
        let mut body = vec![0; 8];
        body.extend(at.to_ne_bytes());
        body.extend(len.to_ne_bytes());
        body.extend([0; 20]);
        body
    }

    #[test]
    fn a_header_that_lies_is_no_request() {
        let good = raw(opcode::GETATTR, 7, &[0; 16]);
        assert!(parse(&good, good.len()).is_some());
        assert!(parse(&good, good.len() + 1).is_none());
        assert!(parse(&good[..39], 39).is_none());
        assert!(parse(&[], 0).is_none());
        let unasked = raw(opcode::GETATTR, 0, &[0; 16]);
        assert!(parse(&unasked, unasked.len()).is_none(), "a reply to number 0 would be a notification");
    }

    #[test]
    fn parts_are_read_like_a_whole() {
        let whole = raw(opcode::WRITE, 7, &[span_body(512, 3), b"abc".to_vec()].concat());
        let header = whole.first_chunk().unwrap();
        let mut fixed = whole[IN_HEADER..IN_HEADER + WRITE_IN].to_vec();
        fixed.extend([0xee; 88]);
        let expected = Request { unique: 7, operation: Ok(Operation::Write { at: 512, len: 3 }) };
        assert_eq!(parse_parts(header, &fixed, 3), Some(expected));
        let lies = Request { operation: Err(Errno::EINVAL), ..expected };
        assert_eq!(parse_parts(header, &fixed, 2), Some(lies), "the data are not as many as it says");
        assert_eq!(parse_parts(header, &fixed, 44), None, "more payload than the request has bytes");
        let short = raw(opcode::READ, 7, &[0; 8]);
        let found = parse_parts(short.first_chunk().unwrap(), &fixed, 0);
        assert_eq!(found, Some(lies), "what was there before is not looked at");
        let cut = raw(opcode::WRITE, 7, &[0; 20]);
        assert_eq!(parse_parts(cut.first_chunk().unwrap(), &fixed, 0), Some(lies), "half a fixed part");
        let unasked = raw(opcode::GETATTR, 0, &[]);
        assert_eq!(parse_parts(unasked.first_chunk().unwrap(), &fixed, 0), None);
    }

    #[test]
    fn spans_are_bounded() {
        assert_eq!(operation(opcode::READ, &span_body(5, 9)), Ok(Operation::Read { at: 5, len: 9 }));
        assert_eq!(operation(opcode::READ, &span_body(0, MAX_TRANSFER + 1)), Err(Errno::EINVAL));
        assert_eq!(operation(opcode::READ, &span_body(u64::MAX, 2)), Err(Errno::EINVAL));
        assert_eq!(operation(opcode::READ, &span_body(i64::MAX as u64, 1)), Err(Errno::EINVAL));
        assert_eq!(operation(opcode::READ, &[0; 19]), Err(Errno::EINVAL), "cut off");
        let mut write = span_body(512, 3);
        assert_eq!(operation(opcode::WRITE, &write), Err(Errno::EINVAL), "without its data");
        write.extend(b"abc");
        assert_eq!(operation(opcode::WRITE, &write), Ok(Operation::Write { at: 512, len: 3 }));
        write.push(0);
        assert_eq!(operation(opcode::WRITE, &write), Err(Errno::EINVAL), "with more than it says");
    }

    #[test]
    fn only_attributes_that_exist_are_set() {
        let mut body = vec![0; 88];
        body[0..4].copy_from_slice(&(fattr::MODE | fattr::SIZE | fattr::MANNER).to_ne_bytes());
        body[16..24].copy_from_slice(&4096u64.to_ne_bytes());
        body[68..72].copy_from_slice(&0o100600u32.to_ne_bytes());
        let expected = Attributes { size: Some(4096), mode: Some(0o100600), uid: None, gid: None };
        assert_eq!(operation(opcode::SETATTR, &body), Ok(Operation::SetAttributes(expected)));
        assert_eq!(operation(opcode::SETATTR, &body[..70]), Err(Errno::EINVAL));
        body[0..4].copy_from_slice(&(1u32 << 5).to_ne_bytes());
        assert_eq!(operation(opcode::SETATTR, &body), Err(Errno::ENOTSUP), "times");
    }

    #[test]
    fn the_upper_flags_of_init_are_there_if_the_lower_say_so() {
        let mut body: Vec<u8> = [7u32, 45, 131072, 1].iter().flat_map(|n| n.to_ne_bytes()).collect();
        let init = |flags| Ok(Operation::Init(Init { major: 7, minor: 45, max_readahead: 131072, flags }));
        assert_eq!(operation(opcode::INIT, &body), init(1));
        body.extend(5u32.to_ne_bytes());
        assert_eq!(operation(opcode::INIT, &body), init(1));
        body[12..16].copy_from_slice(&(1u32 << 30).to_ne_bytes());
        assert_eq!(operation(opcode::INIT, &body), init(1 << 30 | 5 << 32));
        assert_eq!(operation(opcode::INIT, &body[..16]), Err(Errno::EINVAL));
    }

    #[test]
    fn what_is_not_known_is_not_there() {
        assert_eq!(operation(9999, &[]), Err(Errno::ENOSYS));
        assert_eq!(operation(36, &[0; 8]), Err(Errno::ENOSYS), "interrupts");
    }
}
