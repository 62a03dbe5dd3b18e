//! Replies to the kernel: what an operation brought, as bytes, without I/O. `[FUSE fuse_out_header]`

use super::request::Init;
use super::wire::{MAJOR, MAX_TRANSFER, MINOR, NOTIFY_INVAL_INODE, OLDEST_MINOR, OUT_HEADER, ROOT};
use block::Errno;
use fuser::{FopenFlags, InitFlags};
use std::time::Duration;

/// The longest reply without data: a header and the attributes of a file.
const MAX: usize = OUT_HEADER + 104;

/// How long the kernel may show attributes without asking. What changes them tells it.
const ATTRIBUTES_HOLD: Duration = Duration::from_secs(1);

/// Requests that the kernel has under way without their caller waiting for each (asynchronous direct I/O), at most; and from
/// how many on it tells its callers to slow down.
const MAX_BACKGROUND: u16 = 512;
const CONGESTED: u16 = 384;

/// What the kernel is asked for, if it has it.
const WANTED: InitFlags = InitFlags::FUSE_ASYNC_READ
    .union(InitFlags::FUSE_BIG_WRITES)
    .union(InitFlags::FUSE_ASYNC_DIO)
    .union(InitFlags::FUSE_ABORT_ERROR)
    .union(InitFlags::FUSE_MAX_PAGES)
    .union(InitFlags::FUSE_INIT_EXT)
    .union(InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP);

/// The most pages of one read or write: as many as its bytes can touch.
fn max_pages(page: u32) -> u16 {
    u16::try_from(MAX_TRANSFER.checked_div(page).unwrap_or(1)).unwrap_or(u16::MAX).max(1)
}

/// In bytes.
fn page_size() -> u32 {
    let found = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE);
    found.ok().flatten().and_then(|size| u32::try_from(size).ok()).unwrap_or(4096)
}

/// One reply up to its data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Reply {
    bytes: [u8; MAX],
    len: usize,
}

/// What stat(2) shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shown {
    /// Bytes.
    pub size: u64,
    /// Bytes that are allocated.
    pub allocated: u64,
    /// With the type.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Bytes that are best read or written at once.
    pub block: u32,
    /// Since 1970.
    pub modified: Duration,
}

impl Reply {
    fn new(unique: u64, code: i32) -> Self {
        let mut this = Self { bytes: [0; MAX], len: 0 };
        this.put(&0u32.to_ne_bytes());
        this.put(&code.to_ne_bytes());
        this.put(&unique.to_ne_bytes());
        this
    }

    /// Adds bytes, of which there are never more than fit.
    fn put(&mut self, bytes: &[u8]) {
        if let Some(place) = self.bytes.get_mut(self.len..self.len + bytes.len()) {
            place.copy_from_slice(bytes);
            self.len += bytes.len();
        }
    }

    fn put_u16(&mut self, value: u16) {
        self.put(&value.to_ne_bytes());
    }

    fn put_u32(&mut self, value: u32) {
        self.put(&value.to_ne_bytes());
    }

    fn put_u64(&mut self, value: u64) {
        self.put(&value.to_ne_bytes());
    }

    /// Writes the length, with that of the data which come after.
    fn sized(mut self, data: usize) -> Self {
        let total = u32::try_from(self.len + data).unwrap_or(0);
        if let Some(place) = self.bytes.first_chunk_mut() {
            *place = total.to_ne_bytes();
        }
        self
    }

    /// The bytes to send.
    pub(crate) fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }

    pub(crate) fn done(unique: u64) -> Self {
        Self::new(unique, 0).sized(0)
    }

    pub(crate) fn failed(unique: u64, errno: Errno) -> Self {
        // The kernel takes what it takes for an errno, and nothing else.
        let code = match errno as i32 {
            code @ 1..512 => code,
            _ => Errno::EIO as i32,
        };
        Self::new(unique, -code).sized(0)
    }

    /// So many bytes follow.
    pub(crate) fn data(unique: u64, len: usize) -> Self {
        Self::new(unique, 0).sized(len)
    }

    pub(crate) fn written(unique: u64, len: u32) -> Self {
        let mut this = Self::new(unique, 0);
        this.put_u32(len);
        this.put_u32(0);
        this.sized(0)
    }

    pub(crate) fn found(unique: u64, at: u64) -> Self {
        let mut this = Self::new(unique, 0);
        this.put_u64(at);
        this.sized(0)
    }

    /// The file is open; there is nothing to tell one opening from another.
    pub(crate) fn opened(unique: u64) -> Self {
        let mut this = Self::new(unique, 0);
        this.put_u64(0);
        this.put_u32(FopenFlags::FOPEN_DIRECT_IO.union(FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES).bits());
        this.put_u32(0);
        this.sized(0)
    }

    pub(crate) fn attributes(unique: u64, shown: &Shown) -> Self {
        let mut this = Self::new(unique, 0);
        this.put_u64(ATTRIBUTES_HOLD.as_secs());
        this.put_u32(ATTRIBUTES_HOLD.subsec_nanos());
        this.put_u32(0);
        this.put_u64(ROOT);
        this.put_u64(shown.size);
        this.put_u64(shown.allocated.div_ceil(512));
        for _ in 0..3 {
            this.put_u64(shown.modified.as_secs());
        }
        for _ in 0..3 {
            this.put_u32(shown.modified.subsec_nanos());
        }
        this.put_u32(shown.mode);
        this.put_u32(1);
        this.put_u32(shown.uid);
        this.put_u32(shown.gid);
        this.put_u32(0);
        this.put_u32(shown.block);
        this.put_u32(0);
        this.sized(0)
    }

    /// A file system of one file that is full.
    pub(crate) fn file_system(unique: u64, size: u64) -> Self {
        const BLOCK: u32 = 512;
        let mut this = Self::new(unique, 0);
        this.put_u64(size.div_ceil(u64::from(BLOCK)));
        this.put_u64(0);
        this.put_u64(0);
        this.put_u64(1);
        this.put_u64(0);
        this.put_u32(BLOCK);
        this.put_u32(255);
        this.put_u32(BLOCK);
        this.put(&[0; 28]);
        this.sized(0)
    }

    /// What is agreed on with the kernel, with `more` flags besides those that are always wanted; an error where it is too
    /// old, or speaks another language.
    pub(crate) fn init(unique: u64, offered: &Init, more: u64) -> Self {
        if offered.major > MAJOR {
            // It asks once more, in this version.
            let mut this = Self::new(unique, 0);
            this.put_u32(MAJOR);
            this.put_u32(MINOR);
            this.put(&[0; 56]);
            return this.sized(0);
        }
        if offered.major < MAJOR || offered.minor < OLDEST_MINOR {
            return Self::failed(unique, Errno::EPROTO);
        }
        let flags = WANTED.intersection(InitFlags::from_bits_truncate(offered.flags)).bits() | offered.flags & more;
        let [f0, f1, f2, f3, f4, f5, f6, f7] = flags.to_ne_bytes();
        let low_first = cfg!(target_endian = "little");
        let (a, b) = ([f0, f1, f2, f3], [f4, f5, f6, f7]);
        let (lower, upper) = if low_first { (a, b) } else { (b, a) };
        let mut this = Self::new(unique, 0);
        this.put_u32(MAJOR);
        this.put_u32(MINOR.min(offered.minor));
        this.put_u32(offered.max_readahead);
        this.put(&lower);
        this.put_u16(MAX_BACKGROUND);
        this.put_u16(CONGESTED);
        this.put_u32(MAX_TRANSFER);
        // Times are exact to one nanosecond.
        this.put_u32(1);
        this.put_u16(max_pages(page_size()));
        this.put_u16(0);
        this.put(&upper);
        this.put(&[0; 28]);
        this.sized(0)
    }

    /// Nobody asked: the attributes that the kernel has are old.
    pub(crate) fn attributes_changed() -> Self {
        let mut this = Self::new(0, NOTIFY_INVAL_INODE);
        this.put_u64(ROOT);
        // Attributes alone, no bytes of the file.
        this.put(&(-1i64).to_ne_bytes());
        this.put_u64(0);
        this.sized(0)
    }
}

#[cfg(test)]
mod tests {
    use super::super::wire::OVER_IO_URING;
    use super::*;

    #[test]
    fn lengths_are_those_of_the_protocol() {
        let shown = Shown { size: 1, allocated: 0, mode: 0, uid: 0, gid: 0, block: 512, modified: Duration::ZERO };
        let init = Init { major: 7, minor: 45, max_readahead: 0, flags: u64::MAX };
        for (reply, body) in [
            (Reply::done(1), 0),
            (Reply::failed(1, Errno::EIO), 0),
            (Reply::written(1, 5), 8),
            (Reply::found(1, 5), 8),
            (Reply::opened(1), 16),
            (Reply::attributes(1, &shown), 104),
            (Reply::file_system(1, 5), 80),
            (Reply::init(1, &init, 0), 64),
            (Reply::init(1, &Init { major: 8, ..init }, 0), 64),
            (Reply::attributes_changed(), 24),
        ] {
            assert_eq!(reply.bytes().len(), OUT_HEADER + body, "{reply:?}");
            assert_eq!(reply.bytes()[..4], u32::try_from(OUT_HEADER + body).unwrap().to_ne_bytes());
        }
        assert_eq!(Reply::data(1, 4096).bytes()[..4], 4112u32.to_ne_bytes());
    }

    #[test]
    fn only_what_is_offered_is_asked_for() {
        let old = Init { major: 7, minor: 31, max_readahead: 0, flags: 1 };
        let reply = Reply::init(9, &old, OVER_IO_URING);
        assert_eq!(reply.bytes()[20..24], 31u32.to_ne_bytes());
        assert_eq!(reply.bytes()[28..32], 1u32.to_ne_bytes());
        assert_eq!(reply.bytes()[48..52], 0u32.to_ne_bytes());
        let new = Init { minor: 45, flags: u64::MAX, ..old };
        let upper = |more| u32::from_ne_bytes(*Reply::init(9, &new, more).bytes()[48..].first_chunk().unwrap());
        assert_eq!((upper(0) >> 9 & 1, upper(OVER_IO_URING) >> 9 & 1), (0, 1));
        assert_eq!(Reply::init(9, &Init { minor: 22, ..old }, 0), Reply::failed(9, Errno::EPROTO));
        assert_eq!(Reply::init(9, &Init { major: 6, ..old }, 0), Reply::failed(9, Errno::EPROTO));
    }

    /// The kernel counts reads in pages, and a request must not be longer than what is taken.
    #[test]
    fn no_request_is_longer_than_the_longest_whatever_pages_have() {
        for (page, pages) in [(4096, 256), (16384, 64), (65536, 16)] {
            assert_eq!(max_pages(page), pages);
            assert_eq!(u32::from(pages) * page, MAX_TRANSFER);
        }
        assert!(max_pages(page_size()) > 0 && max_pages(0) == 1);
    }

    #[test]
    fn an_errno_that_the_kernel_would_not_take_is_none() {
        assert_eq!(Reply::failed(1, Errno::ENOSPC).bytes()[4..8], (-28i32).to_ne_bytes());
        assert_eq!(Reply::failed(1, Errno::UnknownErrno).bytes()[4..8], (-5i32).to_ne_bytes());
    }
}
