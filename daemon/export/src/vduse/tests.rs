//! A device against a stand-in for the kernel, with a driver that does as each test likes.

use super::device::{Device, Kernel, Parts};
use super::memory::Memory;
use super::record::{Record, Shape};
use crate::virtio_blk::config::{Geometry, feature};
use crate::virtio_blk::queue::{MemorySource, Shared};
use crate::virtio_blk::request::Limits;
use crate::virtio_blk::ring::Chain;
use crate::virtio_blk::vring::InflightRegion;
use block::disk::DiskOptions;
use block::perm::Bits;
use block::testing::{self, MemoryDriver};
use block::{Disk, Facts, NodeOptions, OnError, Perms};
use buf::Gather;
use io::{IoThread, VDUSE_MESSAGE, VduseQueue, VduseRegion};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::collections::VecDeque;
use std::io::Result;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tokio::sync::{Notify, watch};

/// Entries of the ring, and where its parts lie in the file and, with [`RINGS`] added, in the device's memory.
const SIZE: u16 = 8;
const AVAILABLE: u64 = 0x100;
const USED: u64 = 0x200;
const RINGS: u64 = 0x10_0000;
/// Where the data lie in the file; in the device's memory they begin at 0.
const DATA: u64 = 0x1000;
const DATA_LEN: u64 = 0x8000;
const DISK: usize = 64 << 10;

const GET_STATE: u32 = 0;
const SET_STATUS: u32 = 1;
const UPDATE: u32 = 2;
const READY: u64 = 15;

#[derive(Debug)]
struct StandIn {
    file: Mutex<Arc<OwnedFd>>,
    /// Start, last, offset.
    regions: Mutex<Vec<(u64, u64, u64)>>,
    features: AtomicU64,
    queues: Mutex<Vec<VduseQueue>>,
    kicks: Mutex<Vec<Option<OwnedFd>>>,
    messages: Mutex<(VecDeque<[u8; VDUSE_MESSAGE]>, Option<Waker>)>,
    replies: Mutex<Vec<[u8; VDUSE_MESSAGE]>>,
    interrupts: AtomicU64,
    /// Something happened.
    news: Notify,
    endless: AtomicBool,
}

impl Kernel for StandIn {
    fn features(&self) -> Result<u64> {
        Ok(self.features.load(Ordering::Relaxed))
    }
    fn queue(&self, index: u16) -> Result<VduseQueue> {
        Ok(self.queues.lock().unwrap()[usize::from(index)])
    }
    fn set_kick(&self, index: u16, fd: BorrowedFd<'_>) -> Result<()> {
        self.kicks.lock().unwrap()[usize::from(index)] = Some(fd.try_clone_to_owned()?);
        Ok(())
    }
    fn interrupt(&self, _: u16) -> Result<()> {
        self.interrupts.fetch_add(1, Ordering::SeqCst);
        self.news.notify_one();
        Ok(())
    }
    fn set_config(&self, _: u32, _: &[u8]) -> Result<()> {
        Ok(())
    }
    fn interrupt_config(&self) -> Result<()> {
        Ok(())
    }
    fn region(&self, at: u64) -> Result<Option<VduseRegion>> {
        let fd = self.file.lock().unwrap().try_clone()?;
        if self.endless.load(Ordering::Relaxed) {
            return Ok(Some(VduseRegion { start: at, last: at | 0xFFF, offset: 0, writable: true, fd }));
        }
        let regions = self.regions.lock().unwrap();
        let found = regions.iter().filter(|region| region.1 >= at).min().copied();
        Ok(found.map(|(start, last, offset)| VduseRegion { start, last, offset, writable: true, fd }))
    }
    fn poll_message(&self, cx: &mut Context<'_>) -> Poll<Result<[u8; VDUSE_MESSAGE]>> {
        let mut messages = self.messages.lock().unwrap();
        match messages.0.pop_front() {
            Some(message) => Poll::Ready(Ok(message)),
            None => {
                messages.1 = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
    fn reply(&self, reply: &[u8; VDUSE_MESSAGE]) -> Result<()> {
        self.replies.lock().unwrap().push(*reply);
        self.news.notify_one();
        Ok(())
    }
}

fn memory_file() -> Arc<OwnedFd> {
    let fd = memfd_create("driver", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, DATA + DATA_LEN).unwrap();
    Arc::new(fd)
}

fn ready_queue() -> VduseQueue {
    VduseQueue {
        size: u32::from(SIZE),
        descriptors: RINGS,
        available: RINGS + AVAILABLE,
        used: RINGS + USED,
        base: 0,
        ready: true,
    }
}

const RING_REGION: (u64, u64, u64) = (RINGS, RINGS + 0xFFF, 0);
const DATA_REGION: (u64, u64, u64) = (0, DATA_LEN - 1, DATA);

impl StandIn {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            file: Mutex::new(memory_file()),
            regions: Mutex::new(vec![DATA_REGION, RING_REGION]),
            features: AtomicU64::new(
                feature::VERSION_1 | feature::ACCESS_PLATFORM | feature::FLUSH | feature::INDIRECT_DESC,
            ),
            queues: Mutex::new(vec![ready_queue()]),
            kicks: Mutex::new(vec![None]),
            messages: Mutex::default(),
            replies: Mutex::default(),
            interrupts: AtomicU64::new(0),
            news: Notify::new(),
            endless: AtomicBool::new(false),
        })
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        rustix::io::pwrite(&**self.file.lock().unwrap(), bytes, at).unwrap();
    }

    fn get<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        rustix::io::pread(&**self.file.lock().unwrap(), &mut bytes, at).unwrap();
        bytes
    }

    async fn until(&self, what: impl Fn(&Self) -> bool) {
        let wait = async {
            while !what(self) {
                self.news.notified().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), wait).await.expect("nothing happens");
    }

    /// Sends a message and returns result and payload of its answer.
    async fn tell(&self, kind: u32, rest: [u64; 2]) -> (u32, [u8; 8]) {
        let mut raw = [0; VDUSE_MESSAGE];
        raw[..4].copy_from_slice(&kind.to_ne_bytes());
        raw[4..8].copy_from_slice(&77u32.to_ne_bytes());
        raw[24..32].copy_from_slice(&rest[0].to_ne_bytes());
        raw[32..40].copy_from_slice(&rest[1].to_ne_bytes());
        let before = self.replies.lock().unwrap().len();
        {
            let mut messages = self.messages.lock().unwrap();
            messages.0.push_back(raw);
            messages.1.take().into_iter().for_each(Waker::wake);
        }
        self.until(|this| this.replies.lock().unwrap().len() > before).await;
        let reply = self.replies.lock().unwrap()[before];
        assert_eq!(reply[..4], 77u32.to_ne_bytes());
        (u32::from_ne_bytes(reply[4..8].try_into().unwrap()), reply[24..32].try_into().unwrap())
    }

    async fn set_status(&self, status: u64) -> u32 {
        self.tell(SET_STATUS, [status, 0]).await.0
    }

    fn descriptor(&self, index: u64, addr: u64, len: u32, flags: u16, next: u16) {
        let rest = [&len.to_le_bytes()[..], &flags.to_le_bytes(), &next.to_le_bytes()].concat();
        self.put(16 * index, &[&addr.to_le_bytes()[..], &rest].concat());
    }

    /// Writes a request that writes `byte` to one sector into descriptors 3·n and up, with its data at `at`.
    fn write_request(&self, n: u16, sector: u64, byte: u8, at: u64) {
        let first = n * 3;
        let header = [&1u64.to_le_bytes()[..], &sector.to_le_bytes()].concat();
        self.put(DATA + at, &[&header[..], &[0; 496], &[byte; 512], &[0xFF]].concat());
        self.descriptor(first.into(), at, 16, 1, first + 1);
        self.descriptor((first + 1).into(), at + 512, 512, 1, first + 2);
        self.descriptor((first + 2).into(), at + 1024, 1, 2, 0);
    }

    fn status(&self, at: u64) -> u8 {
        self.get::<1>(DATA + at + 1024)[0]
    }

    /// Makes the request that starts with descriptor `head` available as number `turn`, and kicks.
    fn offer(&self, turn: u16, head: u16) {
        self.put(AVAILABLE + 4 + 2 * u64::from(turn % SIZE), &head.to_le_bytes());
        self.put(AVAILABLE + 2, &(turn + 1).to_le_bytes());
        if let Some(kick) = &self.kicks.lock().unwrap()[0] {
            rustix::io::write(kick, &1u64.to_ne_bytes()).unwrap();
        }
    }

    async fn used(&self, count: u16) {
        self.until(|this| this.get(USED + 2) == count.to_le_bytes()).await;
    }
}

struct World {
    kernel: Arc<StandIn>,
    /// What the export holds.
    export: Disk,
    disk: Arc<testing::Memory>,
    drivers: watch::Receiver<usize>,
}

impl World {
    fn sector(&self, sector: usize) -> u8 {
        let bytes = self.disk.bytes.lock().unwrap();
        let sector = &bytes[512 * sector..512 * (sector + 1)];
        assert!(sector.iter().all(|byte| *byte == sector[0]));
        sector[0]
    }
}

fn record(folder: &std::path::Path) -> InflightRegion {
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o700)).unwrap();
    let shape = Shape { queues: 1, queue_size: SIZE, block_size: 512, features: 0 };
    Record::create(folder, "test", shape).unwrap().region().unwrap()
}

/// Runs `test` against a device, which has been left by another process if `left` says so.
fn with_device<F: Future<Output = ()>>(
    kernel: Arc<StandIn>,
    left: Option<fn(&InflightRegion)>,
    test: impl FnOnce(Rc<World>) -> F + Send + 'static,
) {
    let thread = IoThread::start("device", io::Params::default()).unwrap();
    let this = Arc::clone(&thread);
    let body = move || async move {
        let mut graph = testing::graph();
        let (driver, disk) = MemoryDriver::open(DISK, Facts::default());
        let node = graph.adopt("disk", driver, NodeOptions { discard: true, ..NodeOptions::default() }).await.unwrap();
        let perms = Perms { need: Bits::CONSISTENT_READ | Bits::WRITE, shared: Bits::ALL };
        let options = DiskOptions { label: "test".to_owned(), perms, writethrough: false };
        let attached = graph.attach(&node, &options).await.unwrap();
        let (drivers, counted) = watch::channel(0);
        let (_resize, resized) = watch::channel(0);
        let parts = Parts {
            shared: Arc::new(Shared {
                disk: attached.clone(),
                limits: Limits { writable: true, block_size: 512 },
                serial: [0; 20],
                through: AtomicBool::new(true),
            }),
            geometry: Geometry { block_size: 512, queues: 1, writable: true },
            queue_size: SIZE,
            threads: vec![this],
            resized,
            drivers,
        };
        let folder = tempfile::tempdir().unwrap();
        let inflight = record(folder.path());
        if let Some(leave) = left {
            leave(&inflight);
        }
        let (close, closing) = tokio::sync::oneshot::channel::<()>();
        let on_kernel: Arc<dyn Kernel> = Arc::<StandIn>::clone(&kernel);
        let running = tokio::task::spawn_local(async move {
            let mut device = Device::new(&parts, on_kernel, inflight);
            if left.is_some() {
                device.take_up().await.unwrap();
            }
            let closing = async {
                let _ = closing.await;
            };
            device.run(closing).await.unwrap();
        });
        test(Rc::new(World { kernel, export: attached.clone(), disk, drivers: counted })).await;
        close.send(()).unwrap();
        running.await.unwrap();
        graph.detach(attached).await;
    };
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
        thread.run(body).await.unwrap();
        thread.stop().await;
    });
}

#[test]
fn a_driver_comes_writes_and_goes() {
    with_device(StandIn::new(), None, async |world| {
        let kernel = &world.kernel;
        assert_eq!(kernel.set_status(3).await, 0);
        assert_eq!(*world.drivers.borrow(), 0, "it is not ready yet");
        assert_eq!(kernel.set_status(READY).await, 0);
        assert_eq!(*world.drivers.borrow(), 1);
        kernel.write_request(0, 3, 0xAB, 0);
        kernel.offer(0, 0);
        kernel.used(1).await;
        assert_eq!((kernel.status(0), world.sector(3)), (0, 0xAB));
        assert!(kernel.interrupts.load(Ordering::SeqCst) > 0);
        let (result, state) = kernel.tell(GET_STATE, [0, 0]).await;
        assert_eq!((result, state), (0, [0, 0, 0, 0, 1, 0, 0, 0]));
        assert_eq!(kernel.tell(GET_STATE, [1, 0]).await.0, 1, "there is no second queue");
        assert_eq!(kernel.tell(9, [0, 0]).await.0, 1, "nor such a message");

        assert_eq!(kernel.set_status(0).await, 0);
        assert_eq!(*world.drivers.borrow(), 0);
        kernel.write_request(0, 4, 0xCD, 0);
        kernel.put(AVAILABLE, &[0; 0x300]);
        assert_eq!(kernel.set_status(READY).await, 0);
        kernel.offer(0, 0);
        kernel.used(1).await;
        assert_eq!((kernel.status(0), world.sector(4)), (0, 0xCD), "the next driver begins anew");
    });
}

impl World {
    /// Waits until a request waits for better times.
    async fn until_one_waits(&self) {
        let wait = async {
            while self.export.waiting() == 0 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), wait).await.expect("no request waits");
    }
}

#[test]
fn a_write_without_space_is_the_drivers_where_errors_are_reported() {
    with_device(StandIn::new(), None, async |world| {
        let kernel = &world.kernel;
        world.export.handle_errors("e".to_owned(), OnError::Report);
        world.disk.fails.store(true, Ordering::Relaxed);
        assert_eq!(kernel.set_status(READY).await, 0);
        kernel.write_request(0, 3, 0xAB, 0);
        kernel.offer(0, 0);
        kernel.used(1).await;
        assert_eq!((kernel.status(0), world.export.waiting()), (1, 0));
    });
}

#[test]
fn a_write_without_space_waits_for_a_resume_where_errors_stop() {
    for policy in [OnError::Stop, OnError::Enospc] {
        with_device(StandIn::new(), None, async move |world| {
            let kernel = &world.kernel;
            world.export.handle_errors("e".to_owned(), policy);
            world.disk.fails.store(true, Ordering::Relaxed);
            assert_eq!(kernel.set_status(READY).await, 0);
            kernel.write_request(0, 3, 0xAB, 0);
            kernel.offer(0, 0);
            world.until_one_waits().await;
            world.disk.fails.store(false, Ordering::Relaxed);
            kernel.write_request(1, 5, 0xCD, 0x1000);
            kernel.offer(1, 3);
            kernel.used(1).await;
            assert_eq!((kernel.status(0x1000), world.sector(5)), (0, 0xCD), "others are served meanwhile");
            assert_eq!(kernel.status(0), 0xFF, "the driver was told nothing of the first");
            world.export.resume();
            kernel.used(2).await;
            assert_eq!((kernel.status(0), world.sector(3), world.export.waiting()), (0, 0xAB, 0));
        });
    }
}

#[test]
fn a_reset_is_answered_when_what_waits_is_done() {
    with_device(StandIn::new(), None, async |world| {
        let kernel = &world.kernel;
        world.export.handle_errors("e".to_owned(), OnError::Stop);
        world.disk.fails.store(true, Ordering::Relaxed);
        assert_eq!(kernel.set_status(READY).await, 0);
        kernel.write_request(0, 3, 0xAB, 0);
        kernel.offer(0, 0);
        world.until_one_waits().await;
        let answered = kernel.replies.lock().unwrap().len();
        let better = async {
            // The memory is the driver's for something else from the answer on, so there is none before.
            for _ in 0..100 {
                tokio::task::yield_now().await;
            }
            assert_eq!(kernel.replies.lock().unwrap().len(), answered);
            world.disk.fails.store(false, Ordering::Relaxed);
            world.export.resume();
        };
        let (result, ()) = tokio::join!(kernel.set_status(0), better);
        assert_eq!((result, kernel.status(0), world.sector(3)), (0, 0, 0xAB));
    });
}

#[test]
fn memory_is_looked_up_when_it_is_first_used() {
    let kernel = StandIn::new();
    *kernel.regions.lock().unwrap() = vec![RING_REGION];
    with_device(kernel, None, async |world| {
        let kernel = &world.kernel;
        assert_eq!(kernel.set_status(READY).await, 0);
        kernel.regions.lock().unwrap().push(DATA_REGION);
        for turn in 0..3 {
            kernel.write_request(turn % 2, turn.into(), 0xA0 + u8::try_from(turn).unwrap(), 0);
            kernel.offer(turn, turn % 2 * 3);
            kernel.used(turn + 1).await;
        }
        assert_eq!([0, 1, 2].map(|sector| world.sector(sector)), [0xA0, 0xA1, 0xA2]);
    });
}

#[test]
fn memory_moves_under_a_running_device() {
    with_device(StandIn::new(), None, async |world| {
        let kernel = &world.kernel;
        assert_eq!(kernel.set_status(READY).await, 0);
        kernel.write_request(0, 1, 0x11, 0);
        kernel.offer(0, 0);
        kernel.used(1).await;
        // The same addresses are other memory now, with the rings as they were.
        let former = Arc::clone(&kernel.file.lock().unwrap());
        let rings: [u8; 0x1000] = kernel.get(0);
        *kernel.file.lock().unwrap() = memory_file();
        kernel.put(0, &rings);
        assert_eq!(kernel.tell(UPDATE, [0, u64::MAX]).await.0, 0);
        rustix::io::pwrite(&*former, &[0xEE; 2048], DATA).unwrap();
        kernel.write_request(0, 2, 0x22, 0);
        kernel.offer(1, 0);
        kernel.used(2).await;
        assert_eq!((world.sector(1), world.sector(2)), (0x11, 0x22));
        // And now the rings are gone, which only their driver suffers from.
        kernel.regions.lock().unwrap().retain(|region| *region != RING_REGION);
        assert_eq!(kernel.tell(UPDATE, [RINGS, RINGS]).await.0, 0);
        world.drivers.clone().wait_for(|drivers| *drivers == 0).await.unwrap();
    });
}

/// A driver that breaks a rule loses its device until it resets it.
fn broken_by(break_it: impl Fn(&StandIn) + Send + 'static) {
    with_device(StandIn::new(), None, async move |world| {
        let kernel = &world.kernel;
        assert_eq!(kernel.set_status(READY).await, 0);
        break_it(kernel);
        kernel.offer(0, 0);
        world.drivers.clone().wait_for(|drivers| *drivers == 0).await.unwrap();
        assert_eq!(world.disk.requests.load(Ordering::Relaxed), 0);
        assert_eq!(kernel.set_status(0).await, 0);
        kernel.put(0, &[0; 0x1000]);
        assert_eq!(kernel.set_status(READY).await, 0);
        kernel.write_request(0, 5, 0x55, 0);
        kernel.offer(0, 0);
        kernel.used(1).await;
        assert_eq!((kernel.status(0), world.sector(5)), (0, 0x55));
    });
}

#[test]
fn addresses_outside_of_the_memory() {
    broken_by(|kernel| kernel.descriptor(0, 1 << 40, 16, 1, 1));
}

#[test]
fn a_buffer_that_ends_outside_of_the_memory() {
    broken_by(|kernel| {
        kernel.descriptor(0, 0, 16, 1, 1);
        kernel.descriptor(1, DATA_LEN - 512, 1024, 1, 2);
        kernel.descriptor(2, 2048, 1, 2, 0);
    });
}

#[test]
fn chains_that_go_in_a_circle() {
    broken_by(|kernel| {
        kernel.descriptor(0, 0, 16, 1, 1);
        kernel.descriptor(1, 512, 512, 1, 0);
    });
}

#[test]
fn requests_without_room_for_a_status() {
    broken_by(|kernel| kernel.descriptor(0, 0, 16, 0, 0));
}

#[test]
fn rings_that_lie_nowhere_or_are_none() {
    for break_it in [
        (|queue| queue.descriptors = 1 << 40) as fn(&mut VduseQueue),
        |queue| queue.used = RINGS + 0xFF0,
        |queue| queue.available = u64::MAX,
        |queue| queue.descriptors = RINGS + 1,
        |queue| queue.size = 7,
        |queue| queue.size = u32::from(SIZE) * 2,
        |queue| queue.size = 1 << 16,
        |queue| queue.size = 0,
    ] {
        let kernel = StandIn::new();
        break_it(&mut kernel.queues.lock().unwrap()[0]);
        with_device(kernel, None, async |world| {
            assert_eq!(world.kernel.set_status(READY).await, 1);
            assert_eq!(*world.drivers.borrow(), 0);
        });
    }
    let kernel = StandIn::new();
    kernel.features.fetch_or(feature::CONFIG_WCE, Ordering::Relaxed);
    with_device(kernel, None, async |world| {
        assert_eq!(world.kernel.set_status(READY).await, 1, "a feature that was not offered");
    });
}

#[test]
fn requests_in_flight_are_taken_up_once() {
    let kernel = StandIn::new();
    // Three requests were taken, the second is done and was shown.
    for n in 0..2 {
        kernel.write_request(n, u64::from(n) + 1, 0x10 + u8::try_from(n).unwrap(), u64::from(n) * 2048);
    }
    kernel.descriptor(6, 0x4000, 16, 1, 7);
    for (slot, head) in [0_u16, 6, 3].into_iter().enumerate() {
        kernel.put(AVAILABLE + 4 + 2 * u64::try_from(slot).unwrap(), &head.to_le_bytes());
    }
    kernel.put(AVAILABLE + 2, &3u16.to_le_bytes());
    kernel.put(USED + 4, &6u32.to_le_bytes());
    kernel.put(USED + 2, &1u16.to_le_bytes());
    let leave = |region: &InflightRegion| {
        let mut part = region.queue(0).unwrap();
        assert_eq!(part.resume(0, SIZE, |_| 0), Ok(None));
        for id in [0, 6, 3] {
            part.started(&Chain { id, slots: 1, entry: id, writable: 0 }, &[]).unwrap();
        }
        part.done(6);
        part.published(&[6], 1);
    };
    with_device(kernel, Some(leave), async |world| {
        let kernel = &world.kernel;
        kernel.used(3).await;
        assert_eq!([world.sector(1), world.sector(2)], [0x10, 0x11]);
        assert_eq!(world.disk.requests.load(Ordering::Relaxed), 2, "each once, and not what was done");
        assert!(kernel.interrupts.load(Ordering::SeqCst) > 0);
        assert_eq!(*world.drivers.borrow(), 1);
        kernel.write_request(0, 7, 0x77, 0);
        kernel.offer(3, 0);
        kernel.used(4).await;
        assert_eq!(world.sector(7), 0x77);
        // The message that the former process had not answered comes again.
        assert_eq!(kernel.set_status(0).await, 0);
        assert_eq!(*world.drivers.borrow(), 0);
    });
}

#[test]
fn buffers_keep_the_memory_that_they_were_made_with() {
    let kernel = StandIn::new();
    let memory = Memory::new(Arc::<StandIn>::clone(&kernel));
    let known = memory.update(0, u64::MAX).unwrap();
    assert!(memory.more(&known).is_none(), "there is no more");
    let mut gather = Gather::new(Arc::clone(&known));
    gather.push(0, 512).unwrap();
    let buf = gather.take();
    let former = Arc::clone(&kernel.file.lock().unwrap());
    *kernel.file.lock().unwrap() = memory_file();
    let updated = memory.update(0, 0).unwrap();
    drop((known, gather));
    buf.write_at(0, &[0x99; 512]);
    let mut seen = [0; 512];
    rustix::io::pread(&*former, &mut seen, DATA).unwrap();
    assert_eq!(seen, [0x99; 512], "it goes where it was to go");
    updated.read(0, &mut seen).unwrap();
    assert_eq!(seen, [0; 512]);
    assert!(
        Arc::ptr_eq(&updated.regions()[1].map, &memory.update(0, 0).unwrap().regions()[1].map),
        "what did not change is mapped once"
    );
    memory.clear();
    assert!(memory.known().regions().is_empty());
}

#[test]
fn memory_in_too_many_pieces_is_refused() {
    let kernel = StandIn::new();
    kernel.endless.store(true, Ordering::Relaxed);
    let memory = Memory::new(Arc::<StandIn>::clone(&kernel));
    assert!(memory.update(0, u64::MAX).is_err());
    assert!(memory.more(&memory.known()).is_none());
}
