//! [`Transport`]: how the kernel's requests come to an export.
//!
//! A mount begins on `/dev/fuse`. If the kernel offers to send requests over io_uring, which it does where the administrator has
//! switched that on, rings are made before that is agreed on, and given to the threads once it is. Where there can be none all
//! goes on over the device. So does what the kernel never sends over a ring, such as the first request.

use super::export::Serving;
use super::queues::Queues;
use super::reply::Reply;
use super::request::Init;
use super::session::{self, Answer, End, Greet};
use super::wire::{MAJOR, MAX_TRANSFER, OVER_IO_URING};
use crate::Transport as Kind;
use io::{FuseRing, IoThread};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The way of one export's requests.
pub(crate) struct Transport {
    threads: Vec<Arc<IoThread>>,
    /// A descriptor of the mount.
    device: Arc<OwnedFd>,
    serving: Serving,
}

/// The rings on which requests come.
#[derive(Debug, Default)]
pub(crate) struct Rings(AtomicUsize);

impl Rings {
    pub(crate) fn kind(&self) -> Kind {
        if self.0.load(Ordering::Relaxed) > 0 { Kind::IoUring } else { Kind::Device }
    }
}

impl Transport {
    pub(crate) fn new(threads: Vec<Arc<IoThread>>, device: OwnedFd, serving: Serving) -> Arc<Self> {
        Arc::new(Self { threads, device: Arc::new(device), serving })
    }

    async fn rings(&self, offered: &Init) -> Vec<FuseRing> {
        // A kernel of another language asks once more; what it offers then is what counts.
        if offered.flags & OVER_IO_URING == 0 || offered.major != MAJOR {
            return Vec::new();
        }
        let payload = usize::try_from(MAX_TRANSFER).unwrap_or(usize::MAX);
        let made = FuseRing::for_threads(Arc::clone(&self.device), self.threads.len(), payload).await;
        made.unwrap_or_else(|error| {
            tracing::debug!(target: "fuse_transport", %error, "no rings for FUSE requests, which are read instead");
            Vec::new()
        })
    }

    /// Has each thread serve its ring. The kernel waits for them from now on.
    fn start(&self, rings: Vec<FuseRing>) {
        for (thread, ring) in self.threads.iter().zip(rings) {
            let serving = self.serving.clone();
            // A thread that has ended means that the export ends.
            let _ = thread.spawn(move || serve(ring, serving));
        }
    }
}

impl Greet for Arc<Transport> {
    async fn greet(&self, unique: u64, offered: &Init) -> Answer {
        tracing::debug!(target: "fuse_init", ?offered);
        let rings = self.rings(offered).await;
        if rings.is_empty() {
            return Answer::Reply(Reply::init(unique, offered, 0));
        }
        let this = Self::clone(self);
        Answer::Then(Reply::init(unique, offered, OVER_IO_URING), Box::new(move || this.start(rings)))
    }
}

async fn serve(ring: FuseRing, serving: Serving) {
    let queues = match ring.start() {
        Ok(queues) => queues,
        Err(error) => {
            tracing::warn!(target: "fuse_error", %error, "a thread cannot serve a FUSE export");
            // The kernel would wait for the queues of this thread for ever.
            serving.ended(End::Aborted);
            return;
        }
    };
    let rings = serving.rings();
    rings.0.fetch_add(1, Ordering::Relaxed);
    tracing::debug!(target: "fuse_transport", "requests of a FUSE export come over io_uring");
    let source = Queues::new(queues);
    let end = session::run(source, serving.file(), &NoGreeting, serving.stop(), serving.is_ours()).await;
    rings.0.fetch_sub(1, Ordering::Relaxed);
    // Those who read the device know better what else the end of the queues means: the kernel may only not want them.
    if end == End::Aborted {
        serving.ended(end);
    }
}

/// The first request comes over the device.
struct NoGreeting;

impl Greet for NoGreeting {
    async fn greet(&self, unique: u64, _: &Init) -> Answer {
        Answer::Reply(Reply::failed(unique, block::Errno::EIO))
    }
}
