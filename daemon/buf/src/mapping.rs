//! [`Mapping`]: memory of a file that another process shares, may change at any time, and may take away.
//!
//! The file is the other side's: it can be made shorter after it was mapped, and then each touch of a page beyond its end
//! raises SIGBUS, which would end the process. A seal against that (F_SEAL_SHRINK) cannot be asked for, because memory that
//! is a file in a file system has none. So mappings are listed for a signal handler: the first such fault puts
//! anonymous memory in the place of the whole mapping, marks it as torn ([`Mapping::is_torn`]) and goes on. Whoever uses
//! it looks at the mark now and then, and drops the peer. System calls that touch such a page fail with EFAULT and raise
//! nothing.
//!
//! State: one table of the process, because a signal handler can have nothing else. It is written when a mapping is made
//! and dropped, and by the handler, with atomics only.

use crate::iobuf::Backing;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

/// Mappings of the process at a time: some guests with all memory slots that the protocol allows.
const MAX_MAPPINGS: usize = 4096;

/// One mapping, as the handler sees it.
struct Place {
    /// First address; 0 for a free place, 1 for one that is being filled.
    base: AtomicUsize,
    len: AtomicUsize,
    torn: AtomicBool,
}

static PLACES: [Place; MAX_MAPPINGS] =
    [const { Place { base: AtomicUsize::new(0), len: AtomicUsize::new(0), torn: AtomicBool::new(false) } };
        MAX_MAPPINGS];

/// Where a place is being filled.
const TAKEN: usize = 1;

extern "C" fn on_sigbus(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel hands a valid siginfo to a handler with SA_SIGINFO, and SIGBUS has an address.
    let address = unsafe { (*info).si_addr() }.addr();
    for place in &PLACES {
        let base = place.base.load(Ordering::Acquire);
        let len = place.len.load(Ordering::Relaxed);
        if base <= TAKEN || address < base || address - base >= len {
            continue;
        }
        place.torn.store(true, Ordering::Release);
        // SAFETY: the thread that faulted holds the mapping, so it is still there and ours to replace; the addresses stay valid.
        // mmap(2) is a bare system call on Linux, and errno is put back.
        let replaced = unsafe {
            let errno = *libc::__errno_location();
            let at = std::ptr::with_exposed_provenance_mut(base);
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            let result = libc::mmap(at, len, prot, flags, -1, 0);
            *libc::__errno_location() = errno;
            result != libc::MAP_FAILED
        };
        if replaced {
            return;
        }
    }
    // Not ours: what would have happened without this handler happens when the instruction is tried again.
    // SAFETY: signal(2) may be called in a handler.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
}

/// Installs the handler, once in the life of the process; for who makes the first mapping on a thread that may not.
///
/// # Errors
/// The system refuses it.
pub fn watch_faults() -> io::Result<()> {
    static DONE: OnceLock<i32> = OnceLock::new();
    let errno = *DONE.get_or_init(|| {
        // SAFETY: sigaction is a plain structure for which zeroes are a value; the handler has the type that SA_SIGINFO asks
        // for and only does what a handler may.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_sigbus as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
            libc::sigemptyset(&mut action.sa_mask);
            if libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut()) == 0 {
                0
            } else {
                *libc::__errno_location()
            }
        }
    });
    if errno == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(errno)) }
}

/// A run of bytes of a shared file. All access is by copies and single loads and stores; nobody gets a reference into it.
pub struct Mapping {
    base: NonNull<u8>,
    /// Bytes from `base` to the first that was asked for.
    skip: usize,
    len: usize,
    place: &'static Place,
    /// Until the end.
    pages: Option<Pages>,
    disposal: Option<Disposal>,
}

/// Drops the pages of a mapping: to free the memory of a large guest takes its time, and whoever is done with the last request
/// that points to it may have other things to do.
pub type Disposal = Arc<dyn Fn(Pages) + Send + Sync>;

/// What mmap(2) was given and gave. Unmaps it when it is dropped.
pub struct Pages {
    base: NonNull<u8>,
    len: usize,
    place: &'static Place,
}

// SAFETY: addresses, which any thread may unmap.
unsafe impl Send for Pages {}

impl Drop for Pages {
    fn drop(&mut self) {
        self.place.base.store(TAKEN, Ordering::Release);
        // SAFETY: the owner made the mapping, and whoever points into it has kept the owner alive.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
        self.place.base.store(0, Ordering::Release);
    }
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mapping({} bytes at {:p})", self.len, self.base)
    }
}

// SAFETY: the mapping is shared memory by contract; it is touched by raw copies and atomics only.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}
// SAFETY: the pages stay mapped at their address, readable and writable, until this is dropped (a torn file is replaced in
// place), and no method hands out a reference.
unsafe impl Backing for Mapping {}

/// File systems whose pages are always there at once: memory, and the local ones that a persistent memory may lie on. A
/// file of a network or of a user's own file system could keep a thread waiting for ever.
/// `[linux/magic.h]`
const FILE_SYSTEMS: [i64; 6] = [
    0x0102_1994, // tmpfs, and so memfd
    0x9584_58F6, // hugetlbfs
    0x8584_58F6, // ramfs
    0xEF53,      // ext4
    0x5846_5342, // xfs
    0x9123_683E, // btrfs
];

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what)
}

impl Mapping {
    /// Maps `len` bytes of `file` from `offset`, to be shared with whoever else has the file.
    ///
    /// # Errors
    /// The descriptor is no regular file that can be read and written, the file lies in a file system that may let one wait, or
    /// it is shorter than that; the process has no room for one more mapping.
    pub fn new(file: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<Self> {
        Self::map(file, offset, len, inspect(file, false)?, libc::MAP_SHARED)
    }

    /// Maps what a device of the kernel's calls memory: as [`new`](Self::new), or an object of the kernel's own, which has no
    /// length. What is not `writable` can be written to here without an error, and without anybody seeing it.
    ///
    /// # Errors
    /// As of [`new`](Self::new).
    pub fn of_device(file: BorrowedFd<'_>, offset: u64, len: u64, writable: bool) -> io::Result<Self> {
        let sharing = if writable { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
        Self::map(file, offset, len, inspect(file, true)?, sharing)
    }

    fn map(
        file: BorrowedFd<'_>,
        offset: u64,
        len: u64,
        (size, block): (u64, u64),
        sharing: libc::c_int,
    ) -> io::Result<Self> {
        let end = offset.checked_add(len).filter(|end| *end <= size);
        let end = end.ok_or_else(|| invalid("the file is shorter than the memory it shall hold"))?;
        if len == 0 {
            return Err(invalid("a mapping of no bytes"));
        }
        // Whole blocks, for huge pages cannot be cut.
        let start = offset - offset % block;
        let mapped = (end - start).checked_next_multiple_of(block).and_then(|n| usize::try_from(n).ok());
        let mapped = mapped.ok_or_else(|| invalid("the memory is larger than the address space"))?;
        let at = libc::off_t::try_from(start).map_err(|_| invalid("the offset is too large"))?;
        let (skip, len) = (usize::try_from(offset - start), usize::try_from(len));
        let (Ok(skip), Ok(len)) = (skip, len) else { return Err(invalid("the memory is too large")) };
        watch_faults()?;
        let place = take_place()?;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = sharing | libc::MAP_NORESERVE;
        // SAFETY: a new mapping wherever the kernel likes; it touches no memory of ours.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), mapped, prot, flags, file.as_raw_fd(), at) };
        let base = if base == libc::MAP_FAILED { None } else { NonNull::new(base.cast::<u8>()) };
        let Some(base) = base else {
            let error = io::Error::last_os_error();
            place.base.store(0, Ordering::Release);
            return Err(error);
        };
        // A dump of this process is not the place for a guest's memory. If the kernel will not, it is only larger.
        // SAFETY: the range was just mapped.
        unsafe { libc::madvise(base.as_ptr().cast(), mapped, libc::MADV_DONTDUMP) };
        place.torn.store(false, Ordering::Relaxed);
        place.len.store(mapped, Ordering::Relaxed);
        place.base.store(base.as_ptr().expose_provenance(), Ordering::Release);
        let pages = Some(Pages { base, len: mapped, place });
        Ok(Self { base, skip, len, place, pages, disposal: None })
    }

    /// The same; in the end `disposal` gets its pages.
    #[must_use]
    pub fn disposed_by(self, disposal: Disposal) -> Self {
        let mut this = self;
        this.disposal = Some(disposal);
        this
    }

    /// Length in bytes.
    #[expect(clippy::len_without_is_empty, reason = "no mapping is empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the other side took pages away; what is read and written here since then reaches nobody.
    pub fn is_torn(&self) -> bool {
        self.place.torn.load(Ordering::Acquire)
    }

    /// The address of byte `at`, if `len` bytes from there lie in the mapping.
    pub(crate) fn at(&self, at: usize, len: usize) -> Option<NonNull<u8>> {
        if at > self.len || len > self.len - at {
            return None;
        }
        // SAFETY: `skip + len` bytes are mapped and `at` is at most `len`.
        Some(unsafe { self.base.add(self.skip + at) })
    }

    /// The bytes from `at`, as a run of their own.
    pub fn window(self: &Arc<Self>, at: usize, len: usize) -> Option<Window> {
        let base = self.at(at, len)?;
        Some(Window { base, len, map: Arc::clone(self) })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if let (Some(pages), Some(disposal)) = (self.pages.take(), &self.disposal) {
            disposal(pages);
        }
    }
}

/// Objects of the kernel that are in no file system. `[linux/magic.h]`
const ANONYMOUS: i64 = 0x0904_1934;

/// Size and block size of a file that may be mapped; with `device` of an object of the kernel's, too.
fn inspect(file: BorrowedFd<'_>, device: bool) -> io::Result<(u64, u64)> {
    // SAFETY: plain structures for which zeroes are a value, filled by the calls; the descriptor is open.
    let (stat, system) = unsafe {
        let mut stat: libc::stat = std::mem::zeroed();
        let mut system: libc::statfs = std::mem::zeroed();
        if libc::fstat(file.as_raw_fd(), &mut stat) != 0 || libc::fstatfs(file.as_raw_fd(), &mut system) != 0 {
            return Err(io::Error::last_os_error());
        }
        (stat, system)
    };
    // SAFETY: sysconf takes a number.
    let page = u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096);
    if device && system.f_type == ANONYMOUS {
        return Ok((u64::MAX, page));
    }
    if stat.st_mode & libc::S_IFMT != libc::S_IFREG {
        return Err(invalid("the descriptor is not one of a file"));
    }
    if !FILE_SYSTEMS.contains(&system.f_type) {
        return Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "memory cannot be shared from this kind of file system",
        ));
    }
    let huge = system.f_type == FILE_SYSTEMS[1];
    let block = if huge { u64::try_from(system.f_bsize).unwrap_or(page).max(page) } else { page };
    Ok((u64::try_from(stat.st_size).unwrap_or(0), block))
}

fn take_place() -> io::Result<&'static Place> {
    let free =
        PLACES.iter().find(|place| place.base.compare_exchange(0, TAKEN, Ordering::AcqRel, Ordering::Relaxed).is_ok());
    free.ok_or_else(|| io::Error::new(io::ErrorKind::OutOfMemory, "too many mappings"))
}

/// A part of a [`Mapping`] that is used word by word. Numbers are little-endian, as virtio and its relatives have them.
///
/// A load beyond the end, or at an offset or address that is no multiple of its size, gives zero; such a store is
/// dropped. Whoever computes offsets from foreign numbers reduces them first.
#[derive(Clone, Debug)]
pub struct Window {
    base: NonNull<u8>,
    len: usize,
    map: Arc<Mapping>,
}

// SAFETY: as the mapping it points into, which it keeps alive.
unsafe impl Send for Window {}
// SAFETY: as above.
unsafe impl Sync for Window {}

macro_rules! words {
    ($load:ident, $store:ident, $word:ty, $atomic:ty) => {
        /// One load, never repeated, that later loads cannot overtake.
        #[inline]
        pub fn $load(&self, at: usize) -> $word {
            let Some(word) = self.word::<$word>(at) else { return 0 };
            // SAFETY: `word` has checked bounds and alignment, and the mapping lives as long as `self`. What else touches these
            // bytes is another process, with loads and stores of its own.
            <$word>::from_le(unsafe { <$atomic>::from_ptr(word) }.load(Ordering::Acquire))
        }

        /// One store, which earlier stores are seen before.
        #[inline]
        pub fn $store(&self, at: usize, value: $word) {
            if let Some(word) = self.word::<$word>(at) {
                // SAFETY: as above.
                unsafe { <$atomic>::from_ptr(word) }.store(value.to_le(), Ordering::Release);
            }
        }
    };
}

impl Window {
    #[inline]
    fn word<T>(&self, at: usize) -> Option<*mut T> {
        if at.checked_add(size_of::<T>())? > self.len {
            return None;
        }
        // SAFETY: `at` is below the length.
        let word = unsafe { self.base.add(at) }.cast::<T>();
        word.is_aligned().then_some(word.as_ptr())
    }

    words!(load_u16, store_u16, u16, AtomicU16);
    words!(load_u32, store_u32, u32, AtomicU32);
    words!(load_u64, store_u64, u64, AtomicU64);

    words!(load_u8, store_u8, u8, AtomicU8);

    /// Sets bits of the byte at `at`, without a moment at which another's bits are lost.
    pub fn or_u8(&self, at: usize, bits: u8) {
        if let Some(word) = self.word::<u8>(at) {
            // SAFETY: as for loads.
            unsafe { AtomicU8::from_ptr(word) }.fetch_or(bits, Ordering::SeqCst);
        }
    }

    /// Copies from `at` into `out`; false, and nothing copied, if it does not fit.
    pub fn read(&self, at: usize, out: &mut [u8]) -> bool {
        let fits = at <= self.len && out.len() <= self.len - at;
        if fits {
            // SAFETY: the bytes lie within the window, and a unique slice does not overlap memory that nobody may borrow.
            unsafe { self.base.add(at).as_ptr().copy_to_nonoverlapping(out.as_mut_ptr(), out.len()) };
        }
        fits
    }

    /// Sets all bytes to zero.
    pub fn clear(&self) {
        // SAFETY: the window is valid for writes of its length.
        unsafe { self.base.as_ptr().write_bytes(0, self.len) };
    }

    /// Whether its address in this process is a multiple of `align`.
    pub fn is_aligned(&self, align: usize) -> bool {
        self.base.addr().get().is_multiple_of(align)
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether the mapping below is torn, see [`Mapping::is_torn`].
    pub fn is_torn(&self) -> bool {
        self.map.is_torn()
    }
}
