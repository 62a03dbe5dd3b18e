//! [`FuseRing`] and [`FuseQueues`]: requests of the kernel over an io_uring, and replies to it, without a system call for each.
//! `[Linux Documentation/filesystems/fuse/fuse-io-uring.rst, include/uapi/linux/fuse.h]`
//!
//! A mount has one queue for each processor that the system may have, and none is used before all have an entry. An entry is a
//! command that the kernel keeps until it has a request for it, and memory that it was given with it once: the kernel puts the
//! request there and completes the command; the reply lies in the same memory, and the next command gives it back and asks for more.
//! Entries are shared out over the threads of an export, each of which has a ring of its own for its queues. What is in the
//! bytes is nothing that this module knows.
//!
//! Law 1: the memory belongs to the kernel while it has a command. A ring that is dropped before leaves its addresses
//! reserved for good, without pages; the kernel ends such commands by itself, and nobody can be told when.
//!
//! A ring can do nothing else than these commands: the kernel holds it to that.

use crate::polling::note_event;
use crate::{pool, threads};
use buf::{Backing, HUGE_FROM, HUGE_PAGE, IoBuf, Segment};
use io_uring::register::Restriction;
use io_uring::squeue::Entry128;
use io_uring::{IoUring, cqueue, opcode, types};
use nix::errno::Errno;
use std::cell::RefCell;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Gives an entry to the kernel for the first time.
const REGISTER: u32 = 1;
/// Replies to the request of an entry, and gives it back.
const COMMIT_AND_FETCH: u32 = 2;
/// The memory of an entry has two parts, headers and payload.
const PARTS: u32 = 2;

/// `struct fuse_uring_req_header`: a header of the device's protocol, the fixed part of the request, and the ring's own.
const HEADERS: usize = 288;
const FIXED_AT: usize = 128;
const COMMIT_ID_AT: usize = 264;
const PAYLOAD_LEN_AT: usize = 272;
/// The headers of one entry lie this far behind those of the one before.
const HEADERS_STRIDE: usize = 512;

/// The bytes of the fixed part of a request that can be looked at.
pub const FUSE_FIXED: usize = 128;
/// The bytes of the header of a request.
pub const FUSE_HEADER: usize = 40;

/// Entries of one queue, at most and at least; between them as many as make [`ALL_ENTRIES`] together.
const QUEUE_ENTRIES: (usize, usize) = (32, 4);
const ALL_ENTRIES: usize = 128;
/// The memory of all entries of a mount, in bytes, at most. It is taken when a request first needs it, and kept: in the long run a
/// client that moves about has it all. With fewer entries for a queue than the least, a client that does not move about waits for them.
const ALL_BYTES: usize = 256 << 20;
/// IORING_ENTER_GETEVENTS: run deferred work.
const GETEVENTS: u32 = 1;

/// The memory of the entries of one ring: all payloads, then all headers.
struct Area {
    /// Where the mapping starts.
    map: NonNull<u8>,
    mapped: usize,
    /// The first byte in it that starts a huge page, and how many come from there.
    base: NonNull<u8>,
    len: usize,
    /// The kernel may still write to it.
    lent: AtomicBool,
}

// SAFETY: plain memory that is only reached by raw copies and by the kernel.
unsafe impl Send for Area {}
// SAFETY: as above.
unsafe impl Sync for Area {}
// SAFETY: the pages stay mapped at their address, readable and writable, until this is dropped or for good.
unsafe impl Backing for Area {}

impl Area {
    fn new(len: usize) -> io::Result<Arc<Self>> {
        let mapped = len.next_multiple_of(HUGE_PAGE) + HUGE_PAGE;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping wherever the kernel likes; it touches no memory of ours.
        let map = unsafe { libc::mmap(std::ptr::null_mut(), mapped, prot, flags, -1, 0) };
        let map = if map == libc::MAP_FAILED { None } else { NonNull::new(map.cast::<u8>()) };
        let map = map.ok_or_else(io::Error::last_os_error)?;
        // SAFETY: less than a huge page, so inside.
        let base = unsafe { map.add(map.as_ptr().align_offset(HUGE_PAGE).min(HUGE_PAGE)) };
        Ok(Arc::new(Self { map, mapped, base, len, lent: AtomicBool::new(false) }))
    }

    /// Has the huge page that byte `at` is in be one, if the system can. It takes all of its memory from then on.
    fn make_huge(&self, at: usize) {
        let at = at - at % HUGE_PAGE;
        if at < self.len {
            // SAFETY: the range is in the mapping, whose bytes do not change. Before Linux 6.1 nothing happens.
            unsafe { libc::madvise(self.base.add(at).as_ptr().cast(), HUGE_PAGE, libc::MADV_COLLAPSE) };
        }
    }

    /// The bytes from `at`, which lie inside.
    fn part(self: &Arc<Self>, at: usize, len: usize) -> IoBuf {
        debug_assert!(at + len <= self.len, "the layout is fixed when the memory is made");
        // SAFETY: `at` is inside the mapping.
        let ptr = unsafe { self.base.add(at) };
        // SAFETY: the segment lies in memory that the area keeps.
        unsafe { IoBuf::from_backing(Arc::clone(self) as Arc<dyn Backing>, &[Segment { ptr, len }]) }
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        let map = self.map.as_ptr().cast();
        if *self.lent.get_mut() {
            // SAFETY: the range is this area's; nobody but the kernel knows its addresses any more, and they stay reserved.
            unsafe { libc::madvise(map, self.mapped, libc::MADV_DONTNEED) };
        } else {
            // SAFETY: this owner made the mapping, and nobody points into it any more.
            unsafe { libc::munmap(map, self.mapped) };
        }
    }
}

struct Entry {
    queue: u16,
    headers: IoBuf,
    payload: IoBuf,
    /// What the kernel reads when the entry is registered.
    parts: [libc::iovec; 2],
    /// The number of the request that it holds.
    commit_id: u64,
    /// Its payload was asked to lie in a huge page.
    huge: bool,
}

// SAFETY: the addresses in `parts` are those of the two buffers, which may be sent.
unsafe impl Send for Entry {}

/// A ring that is not in use yet, and can be given to the thread that will use it.
pub struct FuseRing {
    uring: IoUring<Entry128, cqueue::Entry>,
    device: Arc<OwnedFd>,
    area: Arc<Area>,
    entries: Vec<Entry>,
}

impl fmt::Debug for FuseRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FuseRing({} entries)", self.entries.len())
    }
}

/// How many processors the system may come to have, which is how many queues a mount has.
fn possible_processors() -> io::Result<u16> {
    let text = std::fs::read_to_string("/sys/devices/system/cpu/possible")?;
    let unknown = || io::Error::other(format!("the list of processors is not understood: {}", text.trim()));
    // Ranges, the last of which has the highest number.
    let last =
        text.trim().rsplit([',', '-']).next().and_then(|number| number.parse::<u16>().ok()).ok_or_else(unknown)?;
    last.checked_add(1).ok_or_else(unknown)
}

/// How many entries each of `queues` queues gets, with `payload` bytes each.
fn entries_per_queue(queues: usize, payload: usize) -> io::Result<usize> {
    let (most, least) = QUEUE_ENTRIES;
    let entries = (ALL_ENTRIES / queues.max(1)).clamp(least, most);
    if queues.saturating_mul(entries).saturating_mul(payload) > ALL_BYTES {
        let text = format!("queues for {queues} processors would take more than {} MiB of memory", ALL_BYTES >> 20);
        return Err(io::Error::new(io::ErrorKind::OutOfMemory, text));
    }
    Ok(entries)
}

impl FuseRing {
    /// Makes rings for the mount of `device`, for up to `threads` threads: one for each, but no more than there are queues. A
    /// request has at most `payload` bytes besides its headers, which must be no less than what was agreed on with the kernel.
    ///
    /// # Errors
    /// The kernel has no io_uring, or not for this process; there is no memory, or the system may have so many processors that their
    /// queues would take too much of it.
    pub async fn for_threads(device: Arc<OwnedFd>, threads: usize, payload: usize) -> io::Result<Vec<Self>> {
        let processors = pool::blocking(possible_processors).await??;
        let all = usize::from(processors);
        let per_queue = entries_per_queue(all, payload)?;
        let rings = threads.clamp(1, all.max(1));
        let make = move || {
            (0..rings)
                .map(|ring| {
                    let queues = (0..processors).skip(ring).step_by(rings);
                    let queues: Vec<u16> = queues.flat_map(|queue| std::iter::repeat_n(queue, per_queue)).collect();
                    Self::new(Arc::clone(&device), &queues, payload)
                })
                .collect::<io::Result<Vec<Self>>>()
        };
        let (tell, told) = tokio::sync::oneshot::channel();
        // A thread that may make rings; all it does is this.
        threads::spawn_unlimited("fuse-rings", None, move || {
            // Whoever asked may have gone.
            let _ = tell.send(make());
        })?;
        told.await.map_err(io::Error::other)?
    }

    /// A ring with an entry for each of `queues`, in which a queue comes several times.
    fn new(device: Arc<OwnedFd>, queues: &[u16], payload: usize) -> io::Result<Self> {
        let size = u32::try_from(queues.len()).map_err(io::Error::other)?;
        let mut builder = IoUring::<Entry128, cqueue::Entry>::builder();
        builder.setup_r_disabled().setup_submit_all().setup_coop_taskrun().setup_taskrun_flag();
        let uring = builder.build(size)?;
        uring.submitter().register_restrictions(&mut [Restriction::sqe_op(opcode::UringCmd80::CODE)])?;
        uring.submitter().register_enable_rings()?;
        let payload = payload.next_multiple_of(buf::MAX_ALIGN);
        let headers = queues.len() * payload;
        let area = Area::new(headers + queues.len() * HEADERS_STRIDE)?;
        let entry = |(index, queue): (usize, &u16)| {
            let entry_headers = area.part(headers + index * HEADERS_STRIDE, HEADERS);
            let entry_payload = area.part(index * payload, payload);
            let part = |buf: &IoBuf| {
                let first = buf.segments().next().map_or(std::ptr::null_mut(), |segment| segment.ptr.as_ptr());
                libc::iovec { iov_base: first.cast(), iov_len: buf.len() }
            };
            let parts = [part(&entry_headers), part(&entry_payload)];
            Entry { queue: *queue, headers: entry_headers, payload: entry_payload, parts, commit_id: 0, huge: false }
        };
        let entries = queues.iter().enumerate().map(entry).collect();
        Ok(Self { uring, device, area, entries })
    }

    /// Takes the ring into the event loop of the calling thread and gives its entries to the kernel, which must have taken the
    /// reply that agrees on it.
    ///
    /// # Errors
    /// The descriptor cannot be polled, or no event loop runs here.
    pub fn start(self) -> io::Result<FuseQueues> {
        if tokio::runtime::Handle::try_current().is_err() {
            return Err(io::Error::other("no event loop runs on this thread"));
        }
        let Self { uring, device, area, entries } = self;
        let fd = RingFd(uring.as_raw_fd());
        let mut inner = Inner { uring, device, area, entries, in_kernel: 0, live: 0, refused: None, task: None };
        for index in 0..inner.entries.len() {
            inner.push(index, REGISTER);
        }
        inner.live = inner.entries.len();
        inner.submit()?;
        // SAFETY: the ring owns the descriptor, and the declaration order of FuseQueues drops this before it.
        let ready = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?;
        let inner = Rc::new(RefCell::new(inner));
        // A thread that is ending has no such list, and looks at nothing any more.
        let _ = RINGS.try_with(|rings| rings.borrow_mut().push(Rc::downgrade(&inner)));
        Ok(FuseQueues { ready, inner })
    }
}

/// The ring's descriptor, for epoll; the ring owns it.
struct RingFd(RawFd);

impl AsRawFd for RingFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0
    }
}

struct Inner {
    uring: IoUring<Entry128, cqueue::Entry>,
    device: Arc<OwnedFd>,
    area: Arc<Area>,
    entries: Vec<Entry>,
    /// Commands that were pushed and are not completed.
    in_kernel: usize,
    /// Entries that the kernel has not sent back for good.
    live: usize,
    /// Why it sent the last one back.
    refused: Option<Errno>,
    /// Who waits for requests.
    task: Option<Waker>,
}

impl Inner {
    /// Queues a command for an entry, of which there is never more than one.
    fn push(&mut self, index: usize, command: u32) {
        let Some(entry) = self.entries.get(index) else { return };
        // `struct fuse_uring_cmd_req`: flags, the number of the request, the queue.
        let mut body = [0; 80];
        for (at, bytes) in [(8, &entry.commit_id.to_ne_bytes()[..]), (16, &entry.queue.to_ne_bytes()[..])] {
            for (place, byte) in body.iter_mut().skip(at).zip(bytes) {
                *place = *byte;
            }
        }
        let mut op = opcode::UringCmd80::new(types::Fd(self.device.as_raw_fd()), command).cmd(body);
        if command == REGISTER {
            op = op.addr(Some(entry.parts.as_ptr().expose_provenance() as u64));
        }
        let mut sqe = op.build().user_data(index as u64);
        if command == REGISTER {
            /// Offset of `len` in `struct io_uring_sqe`, for which the builder has no word.
            const LEN_AT: usize = 24;
            // SAFETY: the entry is 128 bytes that the kernel reads as they lie there, and `len` is an u32 at this place.
            unsafe { (&raw mut sqe).cast::<u8>().add(LEN_AT).cast::<u32>().write_unaligned(PARTS) };
        }
        // SAFETY: the command points to memory of the area and to `parts`. Both stay until the command was completed, the latter
        // because `entries` does not change; the device is open as long. If the ring is dropped before, the area stays.
        let pushed = unsafe { self.uring.submission().push(&sqe) };
        debug_assert!(pushed.is_ok(), "there is room for a command of each entry");
        self.in_kernel += 1;
        self.area.lent.store(true, Ordering::Relaxed);
    }

    /// Whether commands wait to be given to the kernel.
    fn has_unsubmitted(&mut self) -> bool {
        !self.uring.submission().is_empty()
    }

    /// Gives the kernel what waits, or some of it.
    fn submit(&mut self) -> io::Result<()> {
        while self.has_unsubmitted() {
            match self.uring.submit() {
                Ok(_) => {}
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    Some(libc::EBUSY | libc::EAGAIN | libc::ENOMEM) => return Ok(()),
                    _ => return Err(error),
                },
            }
        }
        Ok(())
    }

    /// Whether a look at the completions is worth it.
    fn has_news(&mut self) -> bool {
        !self.uring.completion().is_empty() || self.uring.submission().taskrun()
    }

    /// Has the kernel do what it put off until the thread has time.
    fn run_deferred(&mut self) {
        if self.uring.submission().taskrun() {
            // SAFETY: submits nothing, waits for nothing, passes no argument. After an error the next look does it.
            let _ = unsafe { self.uring.submitter().enter::<libc::sigset_t>(0, 0, GETEVENTS, None) };
        }
    }

    /// The next entry that the kernel completed, and how.
    fn next(&mut self) -> Option<(usize, i32)> {
        let cqe = self.uring.completion().next()?;
        self.in_kernel = self.in_kernel.saturating_sub(1);
        if self.in_kernel == 0 {
            self.area.lent.store(false, Ordering::Relaxed);
        }
        Some((usize::try_from(cqe.user_data()).unwrap_or(usize::MAX), cqe.result()))
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // What the kernel has ended already need not be left to it.
        self.run_deferred();
        while self.next().is_some() {}
    }
}

thread_local! {
    /// The rings of this thread.
    static RINGS: RefCell<Vec<Weak<RefCell<Inner>>>> = const { RefCell::new(Vec::new()) };
}

/// Wakes whose requests have come, before the thread sleeps: otherwise it would have to be woken for them at once.
pub(crate) fn before_park() {
    // Only a thread that is ending has none.
    let _ = RINGS.try_with(|rings| {
        let Ok(mut rings) = rings.try_borrow_mut() else { return };
        rings.retain(|ring| {
            let Some(ring) = ring.upgrade() else { return false };
            let Ok(mut inner) = ring.try_borrow_mut() else { return true };
            if inner.has_news()
                && let Some(task) = &inner.task
            {
                task.wake_by_ref();
            }
            true
        });
    });
}

/// The queues of a mount that one thread serves.
pub struct FuseQueues {
    ready: AsyncFd<RingFd>,
    inner: Rc<RefCell<Inner>>,
}

impl fmt::Debug for FuseQueues {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FuseQueues")
    }
}

/// A request that came over a ring. It must be replied to with [`FuseQueues::reply`].
#[derive(Debug)]
pub struct Fetched {
    /// Which entry it lies in.
    pub entry: usize,
    /// The header of the request.
    pub header: [u8; FUSE_HEADER],
    /// What is fixed of a request of its kind; beyond its length, whatever there was before.
    pub fixed: [u8; FUSE_FIXED],
    /// Bytes in `payload` that belong to the request.
    pub payload_len: usize,
    /// The memory for what else there is of the request, and for the body of its reply, however long it is.
    pub payload: IoBuf,
}

impl FuseQueues {
    /// The next request. Commands that wait are given to the kernel when there is none. None when the kernel has sent all
    /// entries back, as it does at the end of a mount or if it does not want them in the first place.
    ///
    /// # Errors
    /// The kernel does not take commands any more.
    pub fn poll_next(&self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Fetched>>> {
        let mut inner = self.inner.borrow_mut();
        loop {
            while let Some((entry, result)) = inner.next() {
                if result == 0 {
                    match inner.fetched(entry) {
                        Some(fetched) => {
                            note_event();
                            return Poll::Ready(Ok(Some(fetched)));
                        }
                        None => continue,
                    }
                }
                inner.live = inner.live.saturating_sub(1);
                inner.refused = Some(Errno::from_raw(result.wrapping_neg()));
            }
            if inner.live == 0 {
                return Poll::Ready(Ok(None));
            }
            if inner.has_unsubmitted() {
                inner.submit()?;
                if inner.has_unsubmitted() {
                    // The kernel is short of memory: again after others had their turn.
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                continue;
            }
            inner.run_deferred();
            if !inner.uring.completion().is_empty() {
                continue;
            }
            match self.ready.poll_read_ready(cx) {
                // What is completed from here on makes it ready once more.
                Poll::Ready(guard) => guard?.clear_ready(),
                Poll::Pending => {
                    if !inner.task.as_ref().is_some_and(|task| task.will_wake(cx.waker())) {
                        inner.task = Some(cx.waker().clone());
                    }
                    return Poll::Pending;
                }
            }
        }
    }

    /// Replies to the request of an entry with `header` and the first `payload_len` bytes of its payload, and gives it back to
    /// the kernel: with the next [`flush`](Self::flush), or when there are no more requests.
    pub fn reply(&self, entry: usize, header: &[u8], payload_len: usize) {
        let mut inner = self.inner.borrow_mut();
        inner.moved(entry, payload_len);
        let Some(place) = inner.entries.get(entry) else { return };
        place.headers.write_at(0, header.get(..FIXED_AT).unwrap_or(header));
        // No payload is as long as that.
        let len = u32::try_from(payload_len).unwrap_or(u32::MAX);
        place.headers.write_at(PAYLOAD_LEN_AT, &len.to_ne_bytes());
        inner.push(entry, COMMIT_AND_FETCH);
    }

    /// Why the kernel sent an entry back, the last time that it did.
    pub fn refused(&self) -> Option<Errno> {
        self.inner.borrow().refused
    }

    /// Gives waiting commands to the kernel.
    ///
    /// # Errors
    /// The kernel does not take them.
    pub fn flush(&self) -> io::Result<()> {
        self.inner.borrow_mut().submit()
    }
}

impl Inner {
    /// What the kernel put into an entry.
    fn fetched(&mut self, index: usize) -> Option<Fetched> {
        let entry = self.entries.get_mut(index)?;
        let (mut header, mut fixed) = ([0; FUSE_HEADER], [0; FUSE_FIXED]);
        let (mut commit_id, mut len) = ([0; 8], [0; 4]);
        entry.headers.read_at(0, &mut header);
        entry.headers.read_at(FIXED_AT, &mut fixed);
        entry.headers.read_at(COMMIT_ID_AT, &mut commit_id);
        entry.headers.read_at(PAYLOAD_LEN_AT, &mut len);
        entry.commit_id = u64::from_ne_bytes(commit_id);
        let payload_len = usize::try_from(u32::from_ne_bytes(len)).unwrap_or(usize::MAX).min(entry.payload.len());
        let payload = entry.payload.clone();
        self.moved(index, payload_len);
        Some(Fetched { entry: index, header, fixed, payload_len, payload })
    }

    /// The payload of an entry was used for so many bytes. The kernel takes the entry that came back last, so that this one will be
    /// used again.
    fn moved(&mut self, index: usize, len: usize) {
        let Some(entry) = self.entries.get_mut(index).filter(|entry| len >= HUGE_FROM && !entry.huge) else { return };
        entry.huge = true;
        self.area.make_huge(index.saturating_mul(entry.payload.len()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_bounded_however_many_processors_there_are() {
        const PAYLOAD: usize = 1 << 20;
        for (queues, entries) in [(1, 32), (2, 32), (4, 32), (8, 16), (32, 4), (64, 4)] {
            assert_eq!(entries_per_queue(queues, PAYLOAD).unwrap(), entries, "{queues} processors");
        }
        let refused = entries_per_queue(65, PAYLOAD).unwrap_err();
        assert_eq!(refused.to_string(), "queues for 65 processors would take more than 256 MiB of memory");
        for queues in 0..=usize::from(u16::MAX) {
            let entries = entries_per_queue(queues, PAYLOAD).unwrap_or(0);
            assert!(queues * entries * PAYLOAD <= ALL_BYTES, "{queues} processors");
        }
        assert_eq!(entries_per_queue(256, PAYLOAD / 4).unwrap(), 4, "smaller entries, more of them");
    }
}
