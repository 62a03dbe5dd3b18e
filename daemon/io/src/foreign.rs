//! What a peer sent, and the thread on which it may hang.
//!
//! A file of the peer's own file system (FUSE) answers when the peer likes: to be asked what it is, and to be closed. A TCP socket
//! lingers until its peer has read everything, and the memory of a large guest takes its time to be freed. So a thread that
//! others depend on never looks at such a file, closes it or unmaps it: a [`Lane`] does, which is one thread for one peer.
//! Who sends what hangs waits for nobody but himself.
//!
//! The helper, which must not start threads, has a few for all peers instead (its `foreign.rs`).

use crate::pool::Pool;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use tokio::sync::{Notify, oneshot};

/// What may wait on a lane before its peer is not listened to any more.
const MAX_WAITING: usize = 1024;

/// The thread for what one peer sent. Clones are handles to the same; it ends with the last one.
#[derive(Clone, Debug)]
pub struct Lane(Arc<Inner>);

struct Inner {
    pool: Pool,
    waiting: Arc<Waiting>,
}

#[derive(Default)]
struct Waiting {
    count: AtomicUsize,
    fewer: Notify,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Lane({} waiting)", self.waiting.count.load(Ordering::Relaxed))
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.pool.close();
    }
}

impl Lane {
    /// Starts the thread.
    ///
    /// # Errors
    /// The system has none.
    pub fn start(name: &str) -> io::Result<Self> {
        let lane = Self(Arc::new(Inner { pool: Pool::new(name, 1, 1), waiting: Arc::default() }));
        // From now on it has a thread, so that no job is ever refused and done by who gave it.
        lane.0.pool.execute(Box::new(|| ()))?;
        Ok(lane)
    }

    /// Does `job` there.
    pub(crate) fn execute(&self, job: impl FnOnce() + Send + 'static) {
        let waiting = Arc::clone(&self.0.waiting);
        waiting.count.fetch_add(1, Ordering::Relaxed);
        // Refused only by a lane without a thread.
        let _ = self.0.pool.execute(Box::new(move || {
            job();
            waiting.count.fetch_sub(1, Ordering::Release);
            waiting.fewer.notify_waiters();
        }));
    }

    /// Drops `what` there.
    pub fn dispose(&self, what: impl Send + 'static) {
        self.execute(move || drop(what));
    }

    /// For memory that is unmapped there.
    pub fn disposal(&self) -> buf::Disposal {
        let lane = self.clone();
        Arc::new(move |pages| lane.dispose(pages))
    }

    /// Does `f` there and waits for its result, whose drop must not hang.
    ///
    /// # Errors
    /// `f` panicked.
    pub async fn run<T: Send + 'static>(&self, f: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
        let (done, result) = oneshot::channel();
        self.execute(move || {
            // Who asked may have gone.
            let _ = done.send(f());
        });
        result.await.map_err(|_| io::Error::other("what was asked of a peer's file did not end"))
    }

    /// Whether nothing waits there.
    pub fn is_idle(&self) -> bool {
        self.0.waiting.count.load(Ordering::Acquire) == 0
    }

    /// Waits until nothing waits there.
    pub async fn idle(&self) {
        self.at_most(0).await;
    }

    /// Waits until little waits there. Who receives from the peer asks for this first, so that no more piles up than a peer can
    /// send at once.
    pub async fn room(&self) {
        self.at_most(MAX_WAITING - 1).await;
    }

    async fn at_most(&self, count: usize) {
        let waiting = &self.0.waiting;
        loop {
            let mut fewer = std::pin::pin!(waiting.fewer.notified());
            // From here on no notice is missed.
            fewer.as_mut().enable();
            if waiting.count.load(Ordering::Acquire) <= count {
                return;
            }
            fewer.await;
        }
    }
}

/// Drops `what` on a thread that does nothing else, of which the process has one: for what comes from those who may do anything,
/// and for what nobody should have sent.
pub fn dispose(what: impl Send + 'static) {
    static SHARED: OnceLock<Option<Lane>> = OnceLock::new();
    // Without a thread it is dropped here.
    if let Some(lane) = SHARED.get_or_init(|| Lane::start("disposal").ok()) {
        lane.dispose(what);
    }
}

/// A descriptor that a peer sent. It is closed on the lane.
#[derive(Debug)]
pub struct Foreign {
    fd: ManuallyDrop<OwnedFd>,
    /// None if it is ours after all.
    lane: Option<Lane>,
}

impl Foreign {
    /// It came from the peer of that lane.
    pub fn new(fd: OwnedFd, lane: &Lane) -> Self {
        Self { fd: ManuallyDrop::new(fd), lane: Some(lane.clone()) }
    }

    /// The same interface for one that this process or the kernel made, which is closed where it is dropped.
    pub fn own(fd: OwnedFd) -> Self {
        Self { fd: ManuallyDrop::new(fd), lane: None }
    }

    /// Where it is closed.
    pub(crate) fn lane(&self) -> Option<&Lane> {
        self.lane.as_ref()
    }
}

impl AsFd for Foreign {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Foreign {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        // SAFETY: taken once, here, and not used afterwards.
        let fd = unsafe { ManuallyDrop::take(&mut self.fd) };
        if let Some(lane) = &self.lane {
            lane.dispose(fd);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::task::{Context, Poll, Waker};

    #[test]
    fn what_hangs_holds_up_its_lane_and_nobody_else() {
        let (bad, good) = (Lane::start("bad").unwrap(), Lane::start("good").unwrap());
        let (go, wait) = mpsc::channel::<()>();
        bad.execute(move || wait.recv().unwrap_or_default());
        let (mut reader, writer) = std::io::pipe().unwrap();
        drop(Foreign::new(writer.into(), &bad));
        let event_loop = tokio::runtime::Builder::new_current_thread().build().unwrap();
        assert_eq!(event_loop.block_on(good.run(|| 5)).unwrap(), 5);
        rustix::io::ioctl_fionbio(&reader, true).unwrap();
        let read = |reader: &mut io::PipeReader| io::Read::read(reader, &mut [0]);
        assert_eq!(read(&mut reader).unwrap_err().kind(), io::ErrorKind::WouldBlock, "it is not closed yet");
        rustix::io::ioctl_fionbio(&reader, false).unwrap();
        go.send(()).unwrap();
        assert_eq!(read(&mut reader).unwrap(), 0);
    }

    #[test]
    fn a_peer_with_too_much_to_close_waits() {
        let lane = Lane::start("full").unwrap();
        let (go, wait) = mpsc::channel::<()>();
        lane.execute(move || wait.recv().unwrap_or_default());
        (1..MAX_WAITING).for_each(|_| lane.dispose(()));
        let mut room = Box::pin(lane.room());
        assert_eq!(room.as_mut().poll(&mut Context::from_waker(Waker::noop())), Poll::Pending);
        go.send(()).unwrap();
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(room);
    }

    #[test]
    fn one_of_ours_is_closed_at_once() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        drop(Foreign::own(writer.into()));
        assert_eq!(io::Read::read(&mut reader, &mut [0]).unwrap(), 0);
    }
}
