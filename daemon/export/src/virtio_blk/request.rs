//! Requests of the guest: what the bytes of a chain ask for, and doing it, `[virtio 1.2 §5.2.6]`.

use super::config::{MAX_RANGE_SECTORS, MAX_RANGES, SECTOR};
use super::ring::{Broken, Buffers, Chain};
use block::{Disk, Errno, Span, WriteFlags, ZeroFlags};
use buf::IoBuf;

/// Bytes in front of a request: type, priority, sector.
const HEADER: usize = 16;
/// Bytes of one range to discard or to zero.
const RANGE: usize = 16;
/// Bytes of a serial number.
pub(crate) const ID_LEN: usize = 20;
/// What one read or write of the disk moves at most; longer requests are done in pieces, between which others have a turn.
const PIECE: usize = 4 << 20;

mod kind {
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
}

/// The flag of a range: its blocks may be freed.
const UNMAP: u32 = 1;

/// What the guest reads in the last byte of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

impl From<Result<(), Errno>> for Status {
    fn from(result: Result<(), Errno>) -> Self {
        match result {
            Ok(()) => Self::Ok,
            Err(Errno::ENOTSUP) => Self::Unsupported,
            Err(_) => Self::IoError,
        }
    }
}

/// A run of bytes of the disk, and whether it may be unmapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    span: Span,
    unmap: bool,
}

/// What is to be done.
#[derive(Debug)]
pub(crate) enum Command {
    Read { at: u64, buf: IoBuf },
    Write { at: u64, buf: IoBuf },
    Flush,
    Id(IoBuf),
    Discard(Vec<Range>),
    Zero(Vec<Range>),
    Refuse(Status),
}

/// A request of the guest.
#[derive(Debug)]
pub(crate) struct Request {
    pub chain: Chain,
    pub command: Command,
    /// The byte for the status.
    pub status: IoBuf,
}

/// What a request may ask for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub writable: bool,
    /// Bytes; a power of two.
    pub block_size: u32,
}

/// The request in the chain that was collected in `buffers` last.
///
/// # Errors
/// It has no header, or no byte for the status: there is no way to tell the guest.
pub(crate) fn parse(buffers: &mut Buffers, chain: Chain, limits: Limits) -> Result<Request, Broken> {
    let mut header = [0; HEADER];
    if !buffers.to_device.take_front(&mut header) {
        return Err(Broken("a request without a header"));
    }
    let Some(status) = buffers.from_device.take_last() else {
        return Err(Broken("a request without room for its status"));
    };
    let [a, b, c, d, _, _, _, _, rest @ ..] = header;
    let (kind, sector) = (u32::from_le_bytes([a, b, c, d]), u64::from_le_bytes(rest));
    let command = match kind {
        kind::IN => match place(sector, buffers.from_device.len(), limits) {
            Some(at) => Command::Read { at, buf: buffers.from_device.take() },
            None => Command::Refuse(Status::IoError),
        },
        kind::OUT => match place(sector, buffers.to_device.len(), limits) {
            Some(at) if limits.writable => Command::Write { at, buf: buffers.to_device.take() },
            _ => Command::Refuse(Status::IoError),
        },
        kind::FLUSH => Command::Flush,
        kind::GET_ID => Command::Id(buffers.from_device.take()),
        kind::DISCARD | kind::WRITE_ZEROES if !limits.writable => Command::Refuse(Status::IoError),
        kind::DISCARD => ranges(&buffers.to_device.take(), limits, 0).map_or_else(Command::Refuse, Command::Discard),
        kind::WRITE_ZEROES => {
            ranges(&buffers.to_device.take(), limits, UNMAP).map_or_else(Command::Refuse, Command::Zero)
        }
        _ => Command::Refuse(Status::Unsupported),
    };
    Ok(Request { chain, command, status })
}

/// Where a transfer of `len` bytes starts, if it is one of whole blocks.
fn place(sector: u64, len: usize, limits: Limits) -> Option<u64> {
    let at = sector.checked_mul(SECTOR)?;
    let block = u64::from(limits.block_size);
    let whole = at.is_multiple_of(block) && u64::try_from(len).ok()?.is_multiple_of(block);
    whole.then_some(at)
}

fn ranges(list: &IoBuf, limits: Limits, allowed: u32) -> Result<Vec<Range>, Status> {
    let count = list.len() / RANGE;
    let most = usize::try_from(MAX_RANGES).unwrap_or(1);
    if count == 0 || !list.len().is_multiple_of(RANGE) || count > most {
        return Err(Status::IoError);
    }
    // Copied once, for the guest may still change it.
    let list = list.to_vec();
    let range = |raw: &[u8]| {
        let (sector, rest) = raw.split_first_chunk::<8>()?;
        let (sectors, rest) = rest.split_first_chunk::<4>()?;
        let (flags, _) = rest.split_first_chunk::<4>()?;
        Some((u64::from_le_bytes(*sector), u32::from_le_bytes(*sectors), u32::from_le_bytes(*flags)))
    };
    let mut found = Vec::with_capacity(count);
    for raw in list.chunks_exact(RANGE) {
        let (sector, sectors, flags) = range(raw).ok_or(Status::IoError)?;
        if flags & !allowed != 0 {
            return Err(Status::Unsupported);
        }
        let len = u64::from(sectors) * SECTOR;
        let in_bytes = usize::try_from(len).map_err(|_| Status::IoError)?;
        let at = place(sector, in_bytes, limits).filter(|_| sectors <= MAX_RANGE_SECTORS).ok_or(Status::IoError)?;
        at.checked_add(len).ok_or(Status::IoError)?;
        found.push(Range { span: Span::new(at, len), unmap: flags & UNMAP != 0 });
    }
    Ok(found)
}

/// Does it. With `through` a write is on stable storage before it is done.
pub(crate) async fn serve(disk: &Disk, command: &Command, through: bool, serial: &[u8; ID_LEN]) -> Status {
    match command {
        Command::Read { at, buf } if buf.len() <= PIECE => Status::from(disk.read(*at, buf).await),
        Command::Write { at, buf } if buf.len() <= PIECE => {
            Status::from(disk.write(*at, buf, WriteFlags { fua: through }).await)
        }
        Command::Refuse(status) => *status,
        other => Box::pin(rare(disk, other, through, serial)).await,
    }
}

async fn rare(disk: &Disk, command: &Command, through: bool, serial: &[u8; ID_LEN]) -> Status {
    let flags = WriteFlags { fua: through };
    let result = match command {
        Command::Read { at, buf } => in_pieces(*at, buf, async |at, piece| disk.read(at, piece).await).await,
        Command::Write { at, buf } => in_pieces(*at, buf, async |at, piece| disk.write(at, piece, flags).await).await,
        Command::Flush => disk.flush().await,
        Command::Id(buf) => {
            buf.write_at(0, serial);
            Ok(())
        }
        Command::Discard(ranges) => {
            each(ranges, async |range| if range.span.len > 0 { disk.discard(range.span).await } else { Ok(()) }).await
        }
        Command::Zero(ranges) => {
            each(ranges, async |range| {
                let flags = ZeroFlags { fua: through, may_unmap: range.unmap, no_fallback: false };
                if range.span.len > 0 { disk.zero(range.span, flags).await } else { Ok(()) }
            })
            .await
        }
        Command::Refuse(status) => return *status,
    };
    Status::from(result)
}

async fn in_pieces(at: u64, buf: &IoBuf, io: impl AsyncFn(u64, &IoBuf) -> Result<(), Errno>) -> Result<(), Errno> {
    let mut done = 0;
    while done < buf.len() {
        let piece = buf.slice(done, PIECE);
        let at = at.checked_add(u64::try_from(done).map_err(|_| Errno::EIO)?).ok_or(Errno::EIO)?;
        io(at, &piece).await?;
        done += piece.len();
        tokio::task::yield_now().await;
    }
    Ok(())
}

async fn each(ranges: &[Range], io: impl AsyncFn(&Range) -> Result<(), Errno>) -> Result<(), Errno> {
    for range in ranges {
        io(range).await?;
    }
    Ok(())
}
