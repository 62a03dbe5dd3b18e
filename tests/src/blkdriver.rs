//! A virtio-blk device through the crate virtio-driver: a front-end that nobody here wrote, and a fast one.
#![expect(unsafe_code, reason = "the crate's requests take raw memory, as the device's do")]

use memmap2::{MmapOptions, MmapRaw};
use std::path::Path;
use std::sync::Arc;
use virtio_driver::{
    EventFd, QueueNotifier, VhostUser, VhostVdpa, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkTransport,
    VirtioFeatureFlags,
};

/// Entries of each queue.
pub const QUEUE_SIZE: u16 = 128;

/// A device with its queues.
pub struct Disk {
    /// The queues, to be used by a thread each.
    pub queues: Vec<Queue>,
    /// Bytes.
    pub size: u64,
    /// Whether it says that its cache has to be flushed.
    pub writeback: bool,
    // After the queues, which use it.
    _transport: Box<VirtioBlkTransport>,
}

/// One queue and memory for its requests: a buffer of the same length for each.
pub struct Queue {
    inner: VirtioBlkQueue<'static, usize>,
    notifier: Box<dyn QueueNotifier>,
    completed: Arc<EventFd>,
    memory: Arc<MmapRaw>,
    from: usize,
    len: usize,
}

// SAFETY: the queue's rings and buffers are used by it alone; what is missing is only that the crate holds raw pointers to them.
unsafe impl Send for Queue {}

/// What is asked of the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Into the buffer.
    Read,
    /// From the buffer.
    Write,
    /// Nothing of the buffer.
    Flush,
}

impl Disk {
    /// Connects, and starts so many queues of `depth` buffers of `len` bytes each.
    pub fn open(socket: &Path, queues: usize, depth: usize, len: usize) -> Self {
        let features =
            VirtioFeatureFlags::VERSION_1 | VirtioFeatureFlags::RING_EVENT_IDX | VirtioFeatureFlags::RING_INDIRECT_DESC;
        let path = socket.to_str().expect("a path in UTF-8");
        let transport = VhostUser::new(path, features.bits() | device_features()).expect("connect to the device");
        Self::over(Box::new(transport), queues, depth, len)
    }

    /// The device of the kernel's bus that vhost_vdpa gives to programs and virtual machines, with one queue.
    pub fn of_kernel(path: &Path, depth: usize, len: usize) -> Self {
        let features = VirtioFeatureFlags::VERSION_1 | VirtioFeatureFlags::RING_INDIRECT_DESC;
        let path = path.to_str().expect("a path in UTF-8");
        let transport = VhostVdpa::with_path(path, features.bits() | device_features()).expect("open the device");
        Self::over(Box::new(transport), 1, depth, len)
    }

    fn over(mut transport: Box<VirtioBlkTransport>, queues: usize, depth: usize, len: usize) -> Self {
        let file = crate::vhost::memory((queues * depth * len).next_multiple_of(4096) as u64);
        let memory = Arc::new(MmapOptions::new().map_raw(&file).expect("map memory"));
        let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
        transport.map_mem_region(memory.as_ptr().addr(), memory.len(), fd, 0).expect("share memory");
        let inner = VirtioBlkQueue::setup_queues(&mut *transport, queues, QUEUE_SIZE).expect("start the queues");
        let config = transport.get_config().expect("the configuration");
        let queues = inner
            .into_iter()
            .enumerate()
            .map(|(index, inner)| Queue {
                inner,
                notifier: transport.get_submission_notifier(index),
                completed: transport.get_completion_fd(index),
                memory: Arc::clone(&memory),
                from: index * depth * len,
                len,
            })
            .collect();
        let (size, writeback) = (u64::from(config.capacity) * 512, config.writeback != 0);
        Self { queues, size, writeback, _transport: transport }
    }
}

fn device_features() -> u64 {
    (VirtioBlkFeatureFlags::FLUSH | VirtioBlkFeatureFlags::CONFIG_WCE | VirtioBlkFeatureFlags::MQ).bits()
}

impl Queue {
    fn buffer(&self, slot: usize) -> *mut u8 {
        self.memory.as_mut_ptr().wrapping_add(self.from + slot * self.len)
    }

    /// Puts a request in the ring, without telling the device.
    pub fn submit(&mut self, slot: usize, op: Op, at: u64) {
        let buffer = self.buffer(slot);
        let result = match op {
            // SAFETY: the buffer lies in the shared memory, which lives as long as the queue, and is this slot's alone.
            Op::Read => unsafe { self.inner.read_raw(at, buffer, self.len, slot) },
            // SAFETY: as above.
            Op::Write => unsafe { self.inner.write_raw(at, buffer, self.len, slot) },
            Op::Flush => self.inner.flush(slot),
        };
        result.expect("room in the queue");
    }

    /// Tells the device, unless it does not want to be told.
    pub fn kick(&mut self) {
        if self.inner.avail_notif_needed() {
            self.notifier.notify().expect("tell the device");
        }
    }

    /// Takes what is done, and waits if there is nothing yet: slots and results.
    pub fn wait(&mut self, done: &mut Vec<(usize, i32)>) {
        loop {
            done.extend(self.inner.completions().map(|completion| (completion.context, completion.ret)));
            if !done.is_empty() {
                return;
            }
            self.inner.set_used_notif_enabled(true);
            if !self.inner.completions().has_next() {
                assert!(crate::vhost::readable(&*self.completed, crate::DEADLINE), "the device does nothing");
                // Somebody may ring in between; then there is something to be found, too.
                let _ = self.completed.read();
            }
            self.inner.set_used_notif_enabled(false);
        }
    }

    /// Fills a slot's buffer.
    pub fn fill(&mut self, slot: usize, bytes: &[u8]) {
        assert_eq!(bytes.len(), self.len);
        // SAFETY: the buffer is as long, and no request uses it.
        unsafe { self.buffer(slot).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    /// A copy of a slot's buffer.
    pub fn contents(&self, slot: usize) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        // SAFETY: as above.
        unsafe { self.buffer(slot).copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len()) };
        bytes
    }
}
