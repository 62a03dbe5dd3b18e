//! A device while it is served: the kernel's messages, and the rings.
//!
//! One task reads the messages and answers them in order. Rings start when the driver says that it is ready, and stop, when their
//! requests are done, before the kernel is told that a reset has happened: from then on the driver may use the memory for
//! something else. The kernel gives a device up whose answer it waits for too long; how long is
//! /sys/class/vduse/NAME/msg_timeout.

use super::memory::Memory;
use super::message::{self, Answer, Message};
use crate::virtio_blk::config::{Geometry, feature};
use crate::virtio_blk::queue::{Interrupt, MemorySource, Shared};
use crate::virtio_blk::ring::{Broken, MAX_SIZE, RingAddresses, RingFeatures};
use crate::virtio_blk::vring::{InflightRegion, Surroundings, Vring};
use io::{Foreign, IoThread, VDUSE_MESSAGE, VduseDevice, VduseQueue, VduseRegion};
use rustix::event::{EventfdFlags, eventfd};
use std::fmt;
use std::future::poll_fn;
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use tokio::sync::{mpsc, watch};

/// The driver is set up and can drive the device. `[virtio 1.2 §2.1]`
const DRIVER_OK: u8 = 4;
/// Where the configuration has the capacity.
const CAPACITY_AT: u32 = 0;

/// What the kernel does for a device that is open; no call waits for anybody else.
pub(crate) trait Kernel: Send + Sync + fmt::Debug {
    fn features(&self) -> std::io::Result<u64>;
    fn queue(&self, index: u16) -> std::io::Result<VduseQueue>;
    fn set_kick(&self, index: u16, fd: BorrowedFd<'_>) -> std::io::Result<()>;
    fn interrupt(&self, index: u16) -> std::io::Result<()>;
    fn set_config(&self, offset: u32, bytes: &[u8]) -> std::io::Result<()>;
    fn interrupt_config(&self) -> std::io::Result<()>;
    fn region(&self, start: u64) -> std::io::Result<Option<VduseRegion>>;
    fn poll_message(&self, cx: &mut Context<'_>) -> Poll<std::io::Result<[u8; VDUSE_MESSAGE]>>;
    fn reply(&self, reply: &[u8; VDUSE_MESSAGE]) -> std::io::Result<()>;
}

impl Kernel for VduseDevice {
    fn features(&self) -> std::io::Result<u64> {
        self.features()
    }
    fn queue(&self, index: u16) -> std::io::Result<VduseQueue> {
        self.queue(index)
    }
    fn set_kick(&self, index: u16, fd: BorrowedFd<'_>) -> std::io::Result<()> {
        self.set_kick(index, fd)
    }
    fn interrupt(&self, index: u16) -> std::io::Result<()> {
        self.interrupt(index)
    }
    fn set_config(&self, offset: u32, bytes: &[u8]) -> std::io::Result<()> {
        self.set_config(offset, bytes)
    }
    fn interrupt_config(&self) -> std::io::Result<()> {
        self.interrupt_config()
    }
    fn region(&self, start: u64) -> std::io::Result<Option<VduseRegion>> {
        self.region(start)
    }
    fn poll_message(&self, cx: &mut Context<'_>) -> Poll<std::io::Result<[u8; VDUSE_MESSAGE]>> {
        self.poll_message(cx)
    }
    fn reply(&self, reply: &[u8; VDUSE_MESSAGE]) -> std::io::Result<()> {
        self.reply(reply)
    }
}

/// Tells the driver that requests of one queue are done.
#[derive(Debug)]
struct QueueInterrupt {
    kernel: Arc<dyn Kernel>,
    index: u16,
}

impl Interrupt for QueueInterrupt {
    fn raise(&self) {
        // A driver that is about to go needs none.
        let _ = self.kernel.interrupt(self.index);
    }
}

/// What an export gives its device.
#[derive(Debug)]
pub(crate) struct Parts {
    pub shared: Arc<Shared>,
    pub geometry: Geometry,
    pub queue_size: u16,
    pub threads: Vec<Arc<IoThread>>,
    /// Changes with the length of the disk.
    pub resized: watch::Receiver<u64>,
    /// Drivers that use the device: none or one.
    pub drivers: watch::Sender<usize>,
}

impl Parts {
    /// What the device offers. The kernel wants the addresses to be those of the table, and no configuration that the driver
    /// can write to.
    pub(crate) fn features(&self) -> u64 {
        self.geometry.features() | feature::ACCESS_PLATFORM
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Device<'a> {
    parts: &'a Parts,
    kernel: Arc<dyn Kernel>,
    memory: Arc<Memory>,
    vrings: Vec<Vring>,
    inflight: InflightRegion,
    status: u8,
    /// Rings whose driver broke the rules, by index.
    failures: mpsc::UnboundedReceiver<(usize, Broken)>,
    fail: mpsc::UnboundedSender<(usize, Broken)>,
}

impl<'a> Device<'a> {
    pub(crate) fn new(parts: &'a Parts, kernel: Arc<dyn Kernel>, inflight: InflightRegion) -> Self {
        let (fail, failures) = mpsc::unbounded_channel();
        Self {
            parts,
            memory: Arc::new(Memory::new(Arc::clone(&kernel))),
            kernel,
            vrings: (0..parts.geometry.queues).map(|_| Vring::default()).collect(),
            inflight,
            status: 0,
            failures,
            fail,
        }
    }

    /// Goes on where another process ended, with the configuration as it is now.
    ///
    /// # Errors
    /// The kernel has given the device up, or the driver has not set it up as it can be.
    pub(crate) async fn take_up(&mut self) -> std::io::Result<()> {
        let writeback = !self.parts.shared.disk.is_writethrough();
        let config = self.parts.geometry.config(&self.parts.shared.disk, writeback);
        self.kernel.set_config(CAPACITY_AT, &config)?;
        self.start(true).await?;
        if self.vrings.iter().any(Vring::is_running) {
            self.status = DRIVER_OK;
        }
        // No driver, no interrupt.
        let _ = self.kernel.interrupt_config();
        Ok(())
    }

    /// Serves the device until `closing` resolves. All rings have stopped then.
    ///
    /// # Errors
    /// The kernel says nothing more.
    pub(crate) async fn run(mut self, closing: impl Future<Output = ()>) -> std::io::Result<()> {
        let mut closing = pin!(closing);
        let mut resized = self.parts.resized.clone();
        resized.mark_unchanged();
        let kernel = Arc::clone(&self.kernel);
        let result = loop {
            tokio::select! {
                biased;
                () = &mut closing => break Ok(()),
                Some((index, broken)) = self.failures.recv() => {
                    tracing::warn!(target: "vduse_broken", queue = index, %broken, "a driver broke the rules, its device stops until it is reset");
                    self.stop_all().await;
                }
                Ok(()) = resized.changed() => self.tell_size(),
                raw = poll_fn(|cx| kernel.poll_message(cx)) => match raw {
                    Ok(raw) => self.take(&raw).await,
                    Err(error) => break Err(error),
                },
            }
        };
        self.stop_all().await;
        result
    }

    async fn take(&mut self, raw: &[u8; VDUSE_MESSAGE]) {
        let (number, message) = message::decode(raw);
        tracing::trace!(target: "vduse_message", number, ?message);
        let answer = match message {
            Message::GetQueueState(index) => {
                match usize::try_from(index).ok().and_then(|index| self.vrings.get(index)) {
                    Some(vring) => Answer::QueueState(index, u16::try_from(vring.position().await).unwrap_or(0)),
                    None => Answer::Failed,
                }
            }
            Message::SetStatus(status) => self.set_status(status).await,
            Message::UpdateMemory(start, last) => self.update_memory(start, last).await,
            Message::Unknown(_) => Answer::Failed,
        };
        if let Err(error) = self.kernel.reply(&message::encode(number, answer)) {
            tracing::warn!(target: "vduse_refused", %error, ?message, "the kernel did not wait for an answer");
        }
    }

    async fn set_status(&mut self, status: u8) -> Answer {
        let (was, is) = (self.status & DRIVER_OK != 0, status & DRIVER_OK != 0);
        self.status = status;
        if is && !was {
            if let Err(error) = self.start(false).await {
                tracing::warn!(target: "vduse_refused", %error, "the driver cannot use the device");
                self.stop_all().await;
                return Answer::Failed;
            }
        } else if !is && (was || status == 0) {
            self.stop_all().await;
            self.vrings.iter_mut().for_each(|vring| *vring = Vring::default());
            self.memory.clear();
            self.each_part(|_, part| part.clear());
        }
        Answer::Done
    }

    fn each_part(&self, mut each: impl FnMut(usize, &crate::virtio_blk::inflight::Inflight)) {
        for index in 0..self.vrings.len() {
            if let Some(part) = self.inflight.queue(index) {
                each(index, &part);
            }
        }
    }

    /// Starts the queues that the driver has made ready and that do not run. With `resume` another process may have requests
    /// of them in flight.
    async fn start(&mut self, resume: bool) -> std::io::Result<()> {
        let features = self.kernel.features()?;
        if features & !self.parts.features() != 0 {
            return Err(std::io::Error::other(format!("features {features:#x} are not all offered")));
        }
        // A driver that knows of no cache cannot flush it.
        let through = features & feature::FLUSH == 0 || self.parts.shared.disk.is_writethrough();
        self.parts.shared.through.store(through, Ordering::Relaxed);
        let memory = self.memory.update(0, u64::MAX)?;
        let source: Arc<dyn MemorySource> = Arc::<Memory>::clone(&self.memory);
        let features = RingFeatures {
            indirect: features & feature::INDIRECT_DESC != 0,
            event_idx: features & feature::EVENT_IDX != 0,
            packed: false,
        };
        let threads = &self.parts.threads;
        for (at, vring) in self.vrings.iter_mut().enumerate() {
            let index = u16::try_from(at).map_err(std::io::Error::other)?;
            let queue = self.kernel.queue(index)?;
            if !queue.ready || vring.is_running() {
                continue;
            }
            let size = u16::try_from(queue.size).ok().filter(|size| *size <= self.parts.queue_size.min(MAX_SIZE));
            vring.size =
                Some(size.ok_or_else(|| std::io::Error::other(format!("queue {index}: {} entries", queue.size)))?);
            vring.addresses = Some(RingAddresses {
                descriptors: queue.descriptors,
                used: queue.used,
                available: queue.available,
                log: None,
            });
            vring.base = queue.base.into();
            let kick = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
            self.kernel.set_kick(index, kick.as_fd())?;
            if !resume && let Some(part) = self.inflight.queue(at) {
                part.clear();
            }
            vring.set_call(Some(Box::new(QueueInterrupt { kernel: Arc::clone(&self.kernel), index }))).await;
            let thread = at.checked_rem(threads.len()).and_then(|turn| threads.get(turn));
            let around = Surroundings {
                memory: &memory,
                source: Some(&source),
                features,
                always_enabled: true,
                inflight: Some(&self.inflight),
                log: None,
                shared: &self.parts.shared,
                thread: thread.ok_or_else(|| std::io::Error::other("no iothread"))?,
                failures: &self.fail,
            };
            let started = vring.kick(at, Some(Foreign::own(kick)), &around).await;
            started.map_err(|broken| std::io::Error::other(format!("queue {index}: {broken}")))?;
            self.parts.drivers.send_replace(1);
        }
        Ok(())
    }

    async fn stop_all(&mut self) {
        self.vrings.iter().for_each(Vring::request_stop);
        for vring in &mut self.vrings {
            vring.stop().await;
        }
        self.parts.drivers.send_replace(0);
    }

    /// Rings that lie in memory that is gone say so themselves.
    async fn update_memory(&self, start: u64, last: u64) -> Answer {
        let updated = self.memory.update(start, last);
        let known = self.memory.known();
        for vring in &self.vrings {
            vring.moved(&known).await;
        }
        match updated {
            Ok(_) => Answer::Done,
            Err(error) => {
                tracing::warn!(target: "vduse_refused", %error, "the device's memory cannot be mapped");
                Answer::Failed
            }
        }
    }

    fn tell_size(&self) {
        let writeback = !self.parts.shared.disk.is_writethrough();
        let config = self.parts.geometry.config(&self.parts.shared.disk, writeback);
        let capacity = config.get(..8).unwrap_or_default();
        let told = self.kernel.set_config(CAPACITY_AT, capacity);
        // Without a driver there is nobody to tell.
        let told = told.map(|()| drop(self.kernel.interrupt_config()));
        if let Err(error) = told {
            tracing::warn!(target: "vduse_refused", %error, "the driver cannot be told of the new length");
        }
    }
}
