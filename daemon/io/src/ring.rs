//! The io_uring of one thread.
//!
//! Operations are pushed into the submission queue and submitted together: when the thread is about to sleep (`turn`,
//! called from the runtime's park hook), when the queue is full, and at the latest when the ring's own task gets its turn,
//! so that a thread that never sleeps submits as well. Completions are reaped right after a submission and whenever the
//! ring's descriptor becomes readable. State is owned by the thread; nothing here is shared.
//!
//! Why no wake-up is lost: each completion that is posted makes the descriptor readable once more (edge-triggered); the
//! ring's task clears the readiness *before* it looks at the queue, so what is posted later raises it again. With
//! COOP_TASKRUN the kernel posts completions when the thread enters the kernel for any reason; an `epoll_wait` that has such
//! work pending returns instead of sleeping, and then the hook looks at the queue again before the next sleep.
//!
//! Law 1: the slab owns buffer, descriptor and iovecs of each operation until its completion was reaped. An operation whose
//! future was dropped stays in the slab and its result is discarded.

use crate::fd::Fd;
use crate::polling::note_event;
use buf::IoBuf;
use io_uring::register::Restriction;
use io_uring::{IoUring, Probe, opcode, squeue, types};
use nix::errno::Errno;
use std::cell::{RefCell, RefMut};
use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll, Waker};
use tokio::io::unix::AsyncFd;

/// Entries of the submission queue; more operations than that can be in flight.
const ENTRIES: u32 = 256;
/// The most bytes that Linux moves in one call (MAX_RW_COUNT).
const MAX_TRANSFER: usize = 0x7fff_f000;
/// IORING_ENTER_GETEVENTS: run deferred work and flush the kernel's backlog of completions.
const GETEVENTS: u32 = 1;

/// What a ring may do. The kernel holds it to that, for its calls pass by every filter of system calls.
const OPERATIONS: [u8; 6] = [
    opcode::Read::CODE,
    opcode::Write::CODE,
    opcode::Readv::CODE,
    opcode::Writev::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
];

/// What an operation keeps alive until the kernel is done with it.
#[derive(Default)]
struct Hold {
    fd: Option<Arc<Fd>>,
    buf: Option<IoBuf>,
    iov: Vec<libc::iovec>,
}

enum Slot {
    Free,
    /// Submitted or about to be; somebody may wait for it.
    Running(Hold, Option<Waker>),
    /// Submitted or about to be; nobody will ask for the result.
    Abandoned(Hold),
    Done(i32),
}

/// The thread's ring.
pub(crate) struct Ring {
    inner: RefCell<Inner>,
    /// Operations that gather before a submission, at most; 0 is no limit. Other threads change it.
    max_batch: Arc<AtomicU32>,
}

struct Inner {
    uring: IoUring,
    slab: Slab,
    /// Pushed and not taken by the kernel yet, in order.
    unsubmitted: VecDeque<usize>,
    /// Taken by the kernel and not completed yet.
    in_flight: usize,
    /// The ring's own task, woken by the first push after a submission.
    task: Option<Waker>,
    /// The kernel refuses submissions for good; new operations go elsewhere.
    dead: bool,
}

/// The operations of a ring; their keys are the `user_data` of its entries.
#[derive(Default)]
struct Slab {
    slots: Vec<Slot>,
    free: Vec<usize>,
    /// Who is to be woken and what is to be freed, once nobody borrows this.
    ended: Vec<(Option<Waker>, Hold)>,
}

/// The bytes and the direction of a transfer.
pub(crate) enum Request {
    /// Fills the buffer from the offset.
    Read(IoBuf, u64),
    /// Writes the buffer at the offset, durably if asked.
    Write(IoBuf, u64, WriteThrough),
    /// fdatasync or fsync.
    Sync(SyncKind),
    /// fallocate(2) with mode, offset and length.
    Allocate(i32, u64, u64),
}

/// Whether a write completes when it is durable (RWF_DSYNC).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WriteThrough {
    No,
    Yes,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SyncKind {
    Data,
    All,
}

/// Sets up a ring that can do these operations and no others, with the first of the setups that the kernel knows. What is to be
/// registered with it, `register` does: later nothing can be.
///
/// # Errors
/// The kernel has no io_uring or forbids it; `register` failed.
pub(crate) fn limited(
    setups: &[io_uring::Builder],
    entries: u32,
    operations: &[u8],
    register: impl FnOnce(&IoUring) -> io::Result<()>,
) -> io::Result<IoUring> {
    // Disabled: nothing is taken until the ring is restricted.
    let made = setups.iter().find_map(|setup| setup.clone().setup_r_disabled().build(entries).ok());
    let (uring, restricts) = match made {
        Some(uring) => (uring, true),
        // Linux before 5.10 cannot restrict a ring.
        None => (IoUring::builder().setup_clamp().build(entries)?, false),
    };
    register(&uring)?;
    if restricts {
        let mut allowed: Vec<_> = operations.iter().copied().map(Restriction::sqe_op).collect();
        uring.submitter().register_restrictions(&mut allowed)?;
        uring.submitter().register_enable_rings()?;
    }
    Ok(uring)
}

impl Ring {
    /// Sets up a ring for the calling thread, with the best flags that the kernel knows.
    ///
    /// # Errors
    /// The kernel has no io_uring, forbids it, or lacks an operation that is needed.
    pub(crate) fn new(max_batch: Arc<AtomicU32>) -> io::Result<Rc<Self>> {
        let mut plain = IoUring::builder();
        let mut coop = plain.clone();
        coop.setup_submit_all().setup_coop_taskrun().setup_taskrun_flag();
        let mut best = coop.clone();
        best.setup_single_issuer();
        plain.setup_clamp();
        let uring = limited(&[best, coop, plain], ENTRIES, &OPERATIONS, |uring| {
            let mut probe = Probe::new();
            uring.submitter().register_probe(&mut probe)?;
            if !uring.params().is_feature_nodrop() || !OPERATIONS.iter().all(|op| probe.is_supported(*op)) {
                return Err(io::Error::new(io::ErrorKind::Unsupported, "io_uring lacks the operations of Linux 5.6"));
            }
            Ok(())
        })?;
        let inner =
            Inner { uring, slab: Slab::default(), unsubmitted: VecDeque::new(), in_flight: 0, task: None, dead: false };
        Ok(Rc::new(Self { inner: RefCell::new(inner), max_batch }))
    }

    /// Queues an operation, and submits if as many wait for it then as `max_batch` of its file or that of the thread says
    /// (0: no limit). Its future holds no memory that the kernel uses: it may be dropped at any time.
    ///
    /// # Errors
    /// Gives the request back if the ring cannot take it now.
    pub(crate) fn start(self: &Rc<Self>, fd: &Arc<Fd>, request: Request, max_batch: u32) -> Result<Operation, Request> {
        let mut inner = self.inner.borrow_mut();
        if inner.dead {
            return Err(request);
        }
        if inner.unsubmitted.len() >= ENTRIES as usize {
            drop(inner);
            self.turn();
            inner = self.inner.borrow_mut();
            if inner.dead || inner.unsubmitted.len() >= ENTRIES as usize {
                return Err(request);
            }
        }
        let (entry, mut hold) = prepare(fd.raw(), request);
        hold.fd = Some(Arc::clone(fd));
        let key = inner.slab.insert(hold);
        let entry = entry.user_data(key as u64);
        // SAFETY: the entry points into memory that the slot keeps alive until the completion of this key is reaped: the
        // segments of an IoBuf (fixed addresses while a clone lives) and the heap block of the iovecs. The descriptor is open
        // as long. Slots are never freed before the completion; a ring that is dropped waits for completions first.
        let pushed = unsafe { inner.uring.submission().push(&entry) };
        debug_assert!(pushed.is_ok(), "room was checked");
        inner.unsubmitted.push_back(key);
        let wake = if inner.unsubmitted.len() == 1 { inner.task.take() } else { None };
        let waiting = u32::try_from(inner.unsubmitted.len()).unwrap_or(u32::MAX);
        let full =
            [max_batch, self.max_batch.load(Ordering::Relaxed)].into_iter().any(|max| max != 0 && waiting >= max);
        drop(inner);
        if let Some(task) = wake {
            task.wake();
        }
        if full {
            self.submit();
        }
        Ok(Operation { ring: Rc::clone(self), key, taken: false })
    }

    /// Submits what was pushed and reaps what completed. Called before the thread sleeps.
    pub(crate) fn turn(&self) {
        self.reap();
        self.submit();
        self.reap();
    }

    fn submit(&self) {
        let mut inner = self.inner.borrow_mut();
        while !inner.unsubmitted.is_empty() && !inner.dead {
            match inner.uring.submit() {
                Ok(taken) => {
                    let taken = taken.min(inner.unsubmitted.len());
                    inner.unsubmitted.drain(..taken);
                    inner.in_flight += taken;
                    if taken > 0 {
                        continue;
                    }
                }
                Err(e) if e.raw_os_error() == Some(libc::EINTR) => continue,
                // The kernel is short of memory or has completions to hand over first: try again at the task's next turn.
                Err(e) if matches!(e.raw_os_error(), Some(libc::EBUSY | libc::EAGAIN | libc::ENOMEM)) => {}
                Err(_) => {
                    inner.give_up();
                    break;
                }
            }
            // The task runs again after everybody else had a turn, so a stuck submission costs time but is never forgotten.
            if let Some(task) = inner.task.take() {
                drop(inner);
                task.wake();
            }
            return;
        }
        self.finish(inner);
    }

    fn reap(&self) {
        let mut inner = self.inner.borrow_mut();
        loop {
            inner.drain_completions();
            let flagged = {
                let sq = inner.uring.submission();
                sq.cq_overflow() || sq.taskrun()
            };
            if !flagged || inner.dead {
                break;
            }
            // SAFETY: submits nothing, waits for nothing, passes no argument.
            let entered = unsafe { inner.uring.submitter().enter::<libc::sigset_t>(0, 0, GETEVENTS, None) };
            if entered.is_err() {
                break;
            }
        }
        self.finish(inner);
    }

    /// Reaps and submits whenever the descriptor becomes readable or something was pushed. Runs as long as the thread.
    pub(crate) async fn serve(self: Rc<Self>) -> io::Result<()> {
        let fd = RingFd(self.inner.borrow().uring.as_raw_fd());
        // SAFETY: the ring owns the descriptor for as long as it lives, this future owns a reference to the ring, and `ready` is
        // dropped before it.
        let ready = unsafe { AsyncFd::register_with_interest(fd, tokio::io::Interest::READABLE) }?;
        std::future::poll_fn(|cx| {
            self.inner.borrow_mut().task = Some(cx.waker().clone());
            loop {
                match ready.poll_read_ready(cx) {
                    Poll::Ready(Ok(mut guard)) => guard.clear_ready(),
                    Poll::Ready(Err(e)) => return Poll::Ready(Err(e)),
                    Poll::Pending => break,
                }
            }
            // After the readiness was cleared and the waker registered: what is posted from here on wakes this task.
            self.turn();
            Poll::Pending
        })
        .await
    }

    /// Wakes and frees what ended, outside the borrow: a waker or a destructor may come back to the ring.
    fn finish(&self, mut inner: RefMut<'_, Inner>) {
        if inner.slab.ended.is_empty() {
            return;
        }
        let mut ended = std::mem::take(&mut inner.slab.ended);
        drop(inner);
        note_event();
        for (waker, hold) in ended.drain(..) {
            drop(hold);
            if let Some(waker) = waker {
                waker.wake();
            }
        }
        let mut inner = self.inner.borrow_mut();
        if inner.slab.ended.is_empty() {
            inner.slab.ended = ended;
        }
    }

    /// Blocks until the kernel is done with everything it was given.
    fn drain(&self) {
        loop {
            self.turn();
            let inner = self.inner.borrow();
            if inner.dead || (inner.in_flight == 0 && inner.unsubmitted.is_empty()) {
                break;
            }
            if inner.in_flight > 0 {
                // SAFETY: submits nothing, waits for one completion, passes no argument. An error means another round.
                let _ = unsafe { inner.uring.submitter().enter::<libc::sigset_t>(0, 1, GETEVENTS, None) };
            }
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.drain();
        let inner = self.inner.get_mut();
        for slot in inner.slab.slots.drain(..) {
            if let Slot::Running(hold, _) | Slot::Abandoned(hold) = slot {
                // Only on a ring that died: the kernel may still write there, so the memory stays for good.
                std::mem::forget(hold);
            }
        }
    }
}

/// The ring's descriptor, for epoll; the ring owns it.
struct RingFd(RawFd);

impl AsRawFd for RingFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0
    }
}

impl Slab {
    fn insert(&mut self, hold: Hold) -> usize {
        let slot = Slot::Running(hold, None);
        if let Some(key) = self.free.pop()
            && let Some(place) = self.slots.get_mut(key)
        {
            *place = slot;
            return key;
        }
        self.slots.push(slot);
        self.slots.len() - 1
    }

    fn replace(&mut self, key: usize, new: Slot) -> Slot {
        match self.slots.get_mut(key) {
            Some(place) => std::mem::replace(place, new),
            None => Slot::Free,
        }
    }

    fn complete(&mut self, key: usize, result: i32) {
        match self.replace(key, Slot::Done(result)) {
            Slot::Running(hold, waker) => self.ended.push((waker, hold)),
            Slot::Abandoned(hold) => {
                self.replace(key, Slot::Free);
                self.free.push(key);
                self.ended.push((None, hold));
            }
            // Not a key of ours: leave the slot as it was.
            other => {
                self.replace(key, other);
            }
        }
    }
}

impl Inner {
    fn drain_completions(&mut self) {
        for cqe in self.uring.completion() {
            self.in_flight = self.in_flight.saturating_sub(1);
            if let Ok(key) = usize::try_from(cqe.user_data()) {
                self.slab.complete(key, cqe.result());
            }
        }
    }

    /// Takes the ring out of use. What the kernel has not taken it will never see, as nothing is submitted again: those
    /// operations end with EAGAIN, which sends them to the pool.
    fn give_up(&mut self) {
        self.dead = true;
        for key in std::mem::take(&mut self.unsubmitted) {
            self.slab.complete(key, -libc::EAGAIN);
        }
    }
}

/// The submission entry of a request, and what it points to.
fn prepare(fd: RawFd, request: Request) -> (squeue::Entry, Hold) {
    let fd = types::Fd(fd);
    let mut hold = Hold::default();
    let entry = match request {
        Request::Read(buf, at) => {
            let entry = match single(&buf) {
                Some((ptr, len)) => opcode::Read::new(fd, ptr, len).offset(at).build(),
                None => {
                    hold.iov = iovecs(&buf);
                    opcode::Readv::new(fd, hold.iov.as_ptr(), count(&hold.iov)).offset(at).build()
                }
            };
            hold.buf = Some(buf);
            entry
        }
        Request::Write(buf, at, through) => {
            let flags = rw_flags(through);
            let entry = match single(&buf) {
                Some((ptr, len)) => opcode::Write::new(fd, ptr, len).offset(at).rw_flags(flags).build(),
                None => {
                    hold.iov = iovecs(&buf);
                    opcode::Writev::new(fd, hold.iov.as_ptr(), count(&hold.iov)).offset(at).rw_flags(flags).build()
                }
            };
            hold.buf = Some(buf);
            entry
        }
        Request::Sync(SyncKind::Data) => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
        Request::Sync(SyncKind::All) => opcode::Fsync::new(fd).build(),
        Request::Allocate(mode, at, len) => opcode::Fallocate::new(fd, len).offset(at).mode(mode).build(),
    };
    (entry, hold)
}

pub(crate) fn rw_flags(through: WriteThrough) -> i32 {
    match through {
        WriteThrough::No => 0,
        WriteThrough::Yes => libc::RWF_DSYNC,
    }
}

/// Address and length if the buffer is one run of bytes, cut to what one call can move.
fn single(buf: &IoBuf) -> Option<(*mut u8, u32)> {
    let mut segments = buf.segments();
    let first = segments.next()?;
    if segments.next().is_some() {
        return None;
    }
    Some((first.ptr.as_ptr(), u32::try_from(first.len.min(MAX_TRANSFER)).ok()?))
}

fn count(iov: &[libc::iovec]) -> u32 {
    u32::try_from(iov.len()).unwrap_or(0)
}

/// The segments as the kernel wants them, at most IOV_MAX of them: the caller continues after a short transfer.
pub(crate) fn iovecs(buf: &IoBuf) -> Vec<libc::iovec> {
    const IOV_MAX: usize = 1024;
    buf.segments().take(IOV_MAX).map(|s| libc::iovec { iov_base: s.ptr.as_ptr().cast(), iov_len: s.len }).collect()
}

/// A started operation; resolves to the bytes moved (0 for calls that move none) or the error.
pub(crate) struct Operation {
    ring: Rc<Ring>,
    key: usize,
    taken: bool,
}

impl Future for Operation {
    type Output = Result<usize, Errno>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let key = self.key;
        if self.taken {
            return Poll::Ready(Err(Errno::EIO));
        }
        let mut inner = self.ring.inner.borrow_mut();
        let result = match inner.slab.slots.get_mut(key) {
            Some(Slot::Done(result)) => *result,
            Some(Slot::Running(_, waker)) => {
                if waker.as_ref().is_some_and(|w| w.will_wake(cx.waker())) {
                    return Poll::Pending;
                }
                let old = waker.replace(cx.waker().clone());
                drop(inner);
                drop(old);
                return Poll::Pending;
            }
            _ => return Poll::Ready(Err(Errno::EIO)),
        };
        inner.slab.replace(key, Slot::Free);
        inner.slab.free.push(key);
        drop(inner);
        self.taken = true;
        Poll::Ready(usize::try_from(result).map_err(|_| Errno::from_raw(result.wrapping_neg())))
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        if self.taken {
            return;
        }
        let mut inner = self.ring.inner.borrow_mut();
        match inner.slab.replace(self.key, Slot::Free) {
            // The kernel still has it: keep what it uses until the completion.
            Slot::Running(hold, waker) => {
                inner.slab.replace(self.key, Slot::Abandoned(hold));
                drop(inner);
                drop(waker);
            }
            Slot::Done(_) => inner.slab.free.push(self.key),
            other => {
                inner.slab.replace(self.key, other);
            }
        }
    }
}
