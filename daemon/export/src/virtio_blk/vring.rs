//! One virtqueue as the other side sets it up: what is known of it before it runs, and the task that runs it.

use super::inflight::{Inflight, queue_len};
use super::log::DirtyLog;
use super::queue::{self, Change, Ended, Interrupt, MemorySource, Order, Setup, Shared};
use super::ring::{Broken, Ring, RingAddresses, RingFeatures};
use buf::{GuestMemory, Mapping};
use io::{Bell, Foreign, IoThread};
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot};

/// The shared memory in which requests in flight are noted.
#[derive(Clone, Debug)]
pub(crate) struct InflightRegion {
    pub map: Arc<Mapping>,
    /// Where the part of the first queue begins.
    pub start: usize,
    pub queues: u16,
    pub queue_size: u16,
    /// Whether its layout is that of packed rings.
    pub packed: bool,
}

impl InflightRegion {
    /// Bytes that a region for so many queues has.
    pub(crate) fn len(queues: u16, queue_size: u16, packed: bool) -> u64 {
        u64::from(queues).saturating_mul(u64::try_from(queue_len(queue_size, packed)).unwrap_or(u64::MAX))
    }

    /// The part of a queue.
    pub(crate) fn queue(&self, index: usize) -> Option<Inflight> {
        if index >= usize::from(self.queues) {
            return None;
        }
        Inflight::new(&self.map, self.start, index, self.queue_size, self.packed)
    }
}

/// What a ring needs of its device when it starts.
pub(crate) struct Surroundings<'a> {
    pub memory: &'a Arc<GuestMemory>,
    /// Where more of it may come from.
    pub source: Option<&'a Arc<dyn MemorySource>>,
    pub features: RingFeatures,
    /// Rings run without being enabled.
    pub always_enabled: bool,
    pub inflight: Option<&'a InflightRegion>,
    pub log: Option<Arc<DirtyLog>>,
    pub shared: &'a Arc<Shared>,
    pub thread: &'a Arc<IoThread>,
    /// Is told the index of a ring whose guest broke the rules.
    pub failures: &'a mpsc::UnboundedSender<(usize, Broken)>,
}

#[derive(Debug)]
struct Running {
    orders: mpsc::UnboundedSender<Order>,
    ended: oneshot::Receiver<Ended>,
    /// What was noted for a successor about the cache, shared with the task's part of the region.
    note: Option<Inflight>,
}

/// One virtqueue.
#[derive(Debug, Default)]
pub(crate) struct Vring {
    pub size: Option<u16>,
    pub addresses: Option<RingAddresses>,
    /// Where it goes on, as of [`Ring::new`].
    pub base: u32,
    call: Option<Box<dyn Interrupt>>,
    pub err: Option<Bell>,
    enabled: bool,
    running: Option<Running>,
}

impl Vring {
    pub(crate) fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// Changes the task, if there is one, and waits until the change holds.
    async fn change(&self, change: Change) {
        if let Some(running) = &self.running {
            let (done, held) = oneshot::channel();
            if running.orders.send((change, done)).is_ok() {
                // One that has ended needs no change.
                let _ = held.await;
            }
        }
    }

    pub(crate) async fn set_call(&mut self, call: Option<Box<dyn Interrupt>>) {
        if self.is_running() {
            self.change(Change::Call(call)).await;
        } else {
            self.call = call;
        }
    }

    pub(crate) async fn set_enabled(&mut self, enabled: bool) {
        self.enabled = enabled;
        self.change(Change::Enable(enabled)).await;
    }

    /// The ring, or the memory below it, lies elsewhere.
    pub(crate) async fn moved(&self, memory: &Arc<GuestMemory>) {
        if let Some(addresses) = self.addresses {
            self.change(Change::Memory(Arc::clone(memory), addresses)).await;
        }
    }

    pub(crate) async fn set_log(&self, log: Option<Arc<DirtyLog>>) {
        self.change(Change::Log(log)).await;
    }

    /// Where it is, as of [`Ring::new`].
    pub(crate) async fn position(&self) -> u32 {
        let (tell, told) = oneshot::channel();
        self.change(Change::Where(tell)).await;
        told.await.unwrap_or(self.base)
    }

    /// Notes for a successor of this process whether writes are written through.
    pub(crate) fn note_through(&self, through: bool) {
        if let Some(note) = self.running.as_ref().and_then(|running| running.note.as_ref()) {
            note.note_through(through);
        }
    }

    /// Starts the ring, or gives one that runs another descriptor for kicks.
    ///
    /// Returns what a former process noted about the cache, if there was one.
    ///
    /// # Errors
    /// It is not set up, or cannot be where it is said to be.
    pub(crate) async fn kick(
        &mut self,
        index: usize,
        kick: Option<Foreign>,
        around: &Surroundings<'_>,
    ) -> Result<Option<bool>, Broken> {
        if self.is_running() {
            self.change(Change::Kick(kick)).await;
            return Ok(None);
        }
        let (Some(size), Some(at)) = (self.size, self.addresses) else {
            return Err(Broken("a ring is started before its size and place are known"));
        };
        let mut ring = Ring::new(around.memory, &at, size, self.base, around.features)?;
        if around.inflight.is_some_and(|region| region.queue_size < size) {
            return Err(Broken("the inflight region is one of shorter rings"));
        }
        let region = around.inflight.filter(|region| index < usize::from(region.queues));
        let mut inflight = region.and_then(|region| region.queue(index));
        if region.is_some() && inflight.is_none() {
            return Err(Broken("the inflight region is too small for the kind of ring"));
        }
        let note = region.and_then(|region| region.queue(index));
        let noted = inflight.as_ref().and_then(Inflight::noted_through);
        let mut left = Vec::new();
        if let Some(inflight) = &mut inflight
            && let Some(resume) = inflight.resume(ring.published(), size, |slot| ring.flags_at(slot)).map_err(Broken)?
        {
            ring = Ring::new(around.memory, &at, size, resume.base, around.features)?;
            left = resume.left;
            // What the former process showed to the guest it may not have told it.
            if let Some(call) = &self.call {
                call.raise();
            }
        }
        tracing::debug!(target: "virtio_blk_ring_start", index, size, base = ring.base(), resumed = left.len());
        let (orders, taken) = mpsc::unbounded_channel();
        let (tell, ended) = oneshot::channel();
        let setup = Setup {
            ring,
            at,
            memory: Arc::clone(around.memory),
            source: around.source.cloned(),
            inflight,
            left,
            log: around.log.clone(),
            enabled: self.enabled || around.always_enabled,
            kick,
            call: self.call.take(),
            shared: Arc::clone(around.shared),
        };
        let failures = around.failures.clone();
        let task = move || async move {
            let (next, broken) = queue::run(setup, taken).await;
            // The device may have gone.
            let _ = tell.send((next, broken));
            if let Some(broken) = broken {
                let _ = failures.send((index, broken));
            }
        };
        around.thread.spawn(task).map_err(|_| Broken("the iothread is stopped"))?;
        self.running = Some(Running { orders, ended, note });
        Ok(noted)
    }

    /// Tells the ring to stop, without waiting.
    pub(crate) fn request_stop(&self) {
        if let Some(running) = &self.running {
            let (done, _) = oneshot::channel();
            // One that has ended needs not to be told.
            let _ = running.orders.send((Change::Stop, done));
        }
    }

    /// Stops the ring when all its requests are done; returns where it would go on.
    pub(crate) async fn stop(&mut self) -> u32 {
        self.request_stop();
        if let Some(running) = self.running.take()
            && let Ok((next, _)) = running.ended.await
        {
            self.base = next;
        }
        self.base
    }
}
