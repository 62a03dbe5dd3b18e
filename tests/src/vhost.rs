//! A small vhost-user front-end with a guest of its own: enough of a virtio-blk driver to use a disk, and all the freedom to
//! break the rules.
//!
//! The guest's memory is a file (memfd) that the back-end maps and this side reads and writes, so nothing here is unsafe. It is
//! not fast: speed is measured elsewhere.

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{Ordering, fence};

use crate::DEADLINE;

/// Numbers of messages. `[vhost-user §Front-end message types]`
#[expect(missing_docs, reason = "the specification's names")]
pub mod msg {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    pub const SET_STATUS: u32 = 39;
    pub const GET_STATUS: u32 = 40;
}

/// Bits of features. `[virtio 1.2 §5.2.3]`
#[expect(missing_docs, reason = "the specification's names")]
pub mod feature {
    pub const SIZE_MAX: u64 = 1 << 1;
    pub const SEG_MAX: u64 = 1 << 2;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const TOPOLOGY: u64 = 1 << 10;
    pub const CONFIG_WCE: u64 = 1 << 11;
    pub const MQ: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
    pub const LOG_ALL: u64 = 1 << 26;
    pub const INDIRECT: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const PROTOCOL: u64 = 1 << 30;
    pub const VERSION_1: u64 = 1 << 32;
    pub const RING_PACKED: u64 = 1 << 34;
}

/// Bits of protocol features. `[vhost-user §Protocol features]`
#[expect(missing_docs, reason = "the specification's names")]
pub mod protocol {
    pub const MQ: u64 = 1 << 0;
    pub const LOG_SHMFD: u64 = 1 << 1;
    pub const REPLY_ACK: u64 = 1 << 3;
    pub const BACKEND_REQ: u64 = 1 << 5;
    pub const CONFIG: u64 = 1 << 9;
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    pub const RESET_DEVICE: u64 = 1 << 13;
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
}

/// Types of requests. `[virtio 1.2 §5.2.6]`
#[expect(missing_docs, reason = "the specification's names")]
pub mod req {
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
}

/// The guest's address of its first byte.
pub const GUEST: u64 = 0x10_0000;
/// The monitor's address of the same byte.
pub const MONITOR: u64 = 0x7000_0000_0000;
/// Bytes of guest memory.
pub const MEMORY: u64 = 32 << 20;
/// Where a queue's rings start, relative to the memory; each has this much.
const RINGS: u64 = 64 << 10;
const AVAILABLE: u64 = 0x4000;
const USED: u64 = 0x8000;
/// Where buffers start, and how long each is.
const BUFFERS: u64 = 4 << 20;
const BUFFER: u64 = 64 << 10;

const NEED_REPLY: u32 = 1 << 3;

/// Flags of descriptors.
pub const NEXT: u16 = 1;
/// The device writes.
pub const WRITE: u16 = 2;
/// The descriptor points to a table.
pub const INDIRECT: u16 = 4;
/// Whose a descriptor of a packed ring is. `[virtio 1.2 §2.8.1]`
const MADE_AVAILABLE: u16 = 1 << 7;
const IS_USED: u16 = 1 << 15;
/// The bit of a place in a packed ring. `[virtio 1.2 §2.8.10]`
const WRAP: u16 = 1 << 15;

/// A message that came in.
#[derive(Debug)]
pub struct Reply {
    /// Its kind.
    pub request: u32,
    /// Its flags.
    pub flags: u32,
    /// What follows.
    pub payload: Vec<u8>,
    /// What came with it.
    pub fds: Vec<OwnedFd>,
}

impl Reply {
    /// The payload as one number.
    pub fn word(&self) -> u64 {
        u64::from_le_bytes(self.payload.as_slice().try_into().expect("a payload of one word"))
    }
}

/// One virtqueue from the driver's side.
#[derive(Debug)]
pub struct Queue {
    /// Entries.
    pub size: u16,
    at: u64,
    kick: OwnedFd,
    call: OwnedFd,
    available: u16,
    seen: u16,
    buffers: u64,
    /// With packed rings, the descriptors as of a split one, and the chains that the device has: descriptors of each.
    table: BTreeMap<u16, [u8; 16]>,
    taken: BTreeMap<u16, u16>,
}

impl Queue {
    /// A place of a packed ring: its index, with the bit that goes with it.
    fn place(&self, count: u16) -> u16 {
        let first = (count / self.size).is_multiple_of(2);
        (count % self.size) | if first { WRAP } else { 0 }
    }

    /// What SET_VRING_BASE says.
    fn base(&self, next: u16, packed: bool) -> u32 {
        let place = u32::from(self.place(next));
        if packed { place | place << 16 } else { u32::from(next) }
    }

    /// So many places behind this one.
    fn after(&self, count: u16, places: u16) -> u16 {
        (count + places) % (2 * self.size)
    }
}

/// A device that a back-end serves. See the module.
#[derive(Debug)]
pub struct FrontEnd {
    socket: UnixStream,
    /// The guest's memory.
    pub memory: File,
    /// What was agreed on.
    pub features: u64,
    /// What was agreed on.
    pub protocol: u64,
    /// Queues that were started.
    pub queues: Vec<Queue>,
    /// Whether packed rings are wanted.
    pub packed: bool,
    /// The region of requests in flight and the message's payload that goes with it.
    pub inflight: Option<(OwnedFd, Vec<u8>)>,
}

/// A new event descriptor.
pub fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("make an event descriptor")
}

/// A new event descriptor that its owner may block on.
pub fn blocking_event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC).expect("make an event descriptor")
}

/// A new file in memory of so many bytes.
pub fn memory(size: u64) -> File {
    let fd = memfd_create("guest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).expect("make a memory file");
    let file = File::from(fd);
    file.set_len(size).expect("size a memory file");
    file
}

fn words(list: &[u32]) -> Vec<u8> {
    list.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn longs(list: &[u64]) -> Vec<u8> {
    list.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Whether the descriptor becomes readable in time.
pub(crate) fn readable(fd: impl AsFd, limit: std::time::Duration) -> bool {
    let mut list = [PollFd::new(&fd, PollFlags::IN)];
    let limit = Timespec::try_from(limit).expect("a time limit");
    loop {
        match poll(&mut list, Some(&limit)) {
            Ok(count) => return count > 0,
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => panic!("poll: {errno}"),
        }
    }
}

impl FrontEnd {
    /// Connects, with a new guest, and says nothing.
    pub fn connect(path: &Path) -> Self {
        Self::with_memory(path, memory(MEMORY))
    }

    /// Connects for a guest with this memory.
    pub fn with_memory(path: &Path, memory: File) -> Self {
        let socket = UnixStream::connect(path).unwrap_or_else(|error| panic!("connect {}: {error}", path.display()));
        Self { socket, memory, features: 0, protocol: 0, queues: Vec::new(), inflight: None, packed: false }
    }

    /// Connects again for the same guest, with its queues as they are.
    pub fn reconnect(&mut self, path: &Path) {
        self.socket = UnixStream::connect(path).unwrap_or_else(|error| panic!("connect {}: {error}", path.display()));
    }

    /// Connects and agrees on everything that is offered but `without`, shares the memory, and starts so many queues.
    pub fn start(path: &Path, queues: u32, without: u64) -> Self {
        Self::connect(path).started(queues, without)
    }

    /// As [`start`](Self::start), with packed rings; none if the back-end has no such.
    pub fn start_packed(path: &Path, queues: u32, without: u64) -> Option<Self> {
        let mut this = Self::connect(path);
        this.packed = true;
        let this = this.started(queues, without);
        this.is_packed().then_some(this)
    }

    fn started(self, queues: u32, without: u64) -> Self {
        let mut this = self;
        this.negotiate(!without, u64::MAX);
        this.share_memory();
        for index in 0..queues {
            this.add_queue(index, 128);
        }
        this
    }

    /// The connection.
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Sends a message.
    pub fn send(&self, request: u32, flags: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        self.try_send(request, flags, payload, fds).expect("send a message");
    }

    /// Sends a message, unless the back-end is gone.
    pub fn try_send(&self, request: u32, flags: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> std::io::Result<()> {
        let mut bytes = words(&[request, 1 | flags, u32::try_from(payload.len()).expect("a length")]);
        bytes.extend_from_slice(payload);
        self.try_send_raw(&bytes, fds)
    }

    /// Sends any bytes.
    pub fn try_send_raw(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> std::io::Result<()> {
        let sent = crate::lingering::send(&self.socket, bytes, fds)?;
        assert_eq!(sent, bytes.len());
        Ok(())
    }

    /// Waits for a message; none when the back-end has gone.
    pub fn receive(&self) -> Option<Reply> {
        receive(&self.socket)
    }

    /// Sends a message and waits for its reply.
    pub fn ask(&self, request: u32, payload: &[u8]) -> Reply {
        self.send(request, 0, payload, &[]);
        let reply = self.receive().expect("a reply");
        assert_eq!((reply.request, reply.flags & 7), (request, 5));
        reply
    }

    /// Sends a message that has no reply of its own, and waits until it is done where the back-end can say so.
    pub fn tell(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        assert_eq!(self.try_tell(request, payload, fds), 0, "message {request} failed");
    }

    /// As [`tell`](Self::tell), with the back-end's answer.
    pub fn try_tell(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> u64 {
        if self.protocol & protocol::REPLY_ACK == 0 {
            self.send(request, 0, payload, fds);
            return 0;
        }
        self.send(request, NEED_REPLY, payload, fds);
        self.receive().expect("an answer").word()
    }

    /// Whether the back-end ends the connection.
    pub fn closed(&self) -> bool {
        if !readable(&self.socket, DEADLINE) {
            return false;
        }
        self.receive().is_none()
    }

    /// Agrees on what is offered and within the masks.
    pub fn negotiate(&mut self, features: u64, protocols: u64) {
        let offered = self.ask(msg::GET_FEATURES, &[]).word();
        // The log is for migration alone.
        self.features = offered & features & !feature::LOG_ALL;
        if !self.packed {
            self.features &= !feature::RING_PACKED;
        }
        if offered & features & feature::PROTOCOL != 0 {
            let offered = self.ask(msg::GET_PROTOCOL_FEATURES, &[]).word();
            let known = protocol::MQ
                | protocol::LOG_SHMFD
                | protocol::REPLY_ACK
                | protocol::BACKEND_REQ
                | protocol::CONFIG
                | protocol::INFLIGHT_SHMFD
                | protocol::RESET_DEVICE
                | protocol::CONFIGURE_MEM_SLOTS
                | protocol::STATUS;
            let wanted = offered & protocols & known;
            self.send(msg::SET_PROTOCOL_FEATURES, 0, &longs(&[wanted]), &[]);
            self.protocol = wanted;
        }
        self.tell(msg::SET_OWNER, &[], &[]);
        self.tell(msg::SET_FEATURES, &longs(&[self.features]), &[]);
    }

    /// Shares the guest's memory, in one region.
    pub fn share_memory(&self) {
        let mut payload = words(&[1, 0]);
        payload.extend(longs(&[GUEST, MEMORY, MONITOR, 0]));
        self.tell(msg::SET_MEM_TABLE, &payload, &[self.memory.as_fd()]);
    }

    /// Asks for a region for requests in flight, and hands it back at once.
    pub fn make_inflight(&mut self, queues: u16, size: u16) {
        let mut payload = longs(&[0, 0]);
        payload.extend(queues.to_le_bytes());
        payload.extend(size.to_le_bytes());
        payload.extend([0; 4]);
        let mut reply = self.ask(msg::GET_INFLIGHT_FD, &payload);
        let fd = reply.fds.pop().expect("a descriptor");
        self.inflight = Some((fd, reply.payload));
        self.set_inflight();
    }

    /// Hands the region for requests in flight over.
    pub fn set_inflight(&self) {
        let (fd, payload) = self.inflight.as_ref().expect("a region");
        self.tell(msg::SET_INFLIGHT_FD, payload, &[fd.as_fd()]);
    }

    /// Where in the memory the rings of a queue are.
    fn rings(index: u32) -> u64 {
        u64::from(index) * RINGS
    }

    /// Sets a new queue up and starts it.
    pub fn add_queue(&mut self, index: u32, size: u16) {
        assert_eq!(usize::try_from(index).expect("an index"), self.queues.len());
        let at = Self::rings(index);
        let buffers = BUFFERS + u64::from(index) * u64::from(size / 3) * BUFFER;
        self.queues.push(Queue {
            size,
            at,
            kick: event(),
            call: event(),
            available: 0,
            seen: 0,
            buffers,
            table: BTreeMap::new(),
            taken: BTreeMap::new(),
        });
        self.start_queue(index, 0);
    }

    /// Has the device ring `call` for a queue from now on.
    pub fn call_by(&mut self, index: u32, call: OwnedFd) {
        self.tell(msg::SET_VRING_CALL, &longs(&[u64::from(index)]), &[call.as_fd()]);
        self.queue_mut(index).call = call;
    }

    /// The payload that says where the rings are.
    pub fn addresses(index: u32, flags: u32, log: u64) -> Vec<u8> {
        let at = MONITOR + Self::rings(index);
        let mut payload = words(&[index, flags]);
        payload.extend(longs(&[at, at + USED, at + AVAILABLE, log]));
        payload
    }

    /// Starts a queue from this entry of the available ring on.
    pub fn start_queue(&self, index: u32, base: u16) {
        let queue = self.queue(index);
        self.tell(msg::SET_VRING_NUM, &words(&[index, u32::from(queue.size)]), &[]);
        self.tell(msg::SET_VRING_BASE, &words(&[index, self.queue(index).base(base, self.is_packed())]), &[]);
        self.tell(msg::SET_VRING_ADDR, &Self::addresses(index, 0, 0), &[]);
        self.tell(msg::SET_VRING_CALL, &longs(&[u64::from(index)]), &[queue.call.as_fd()]);
        self.tell(msg::SET_VRING_KICK, &longs(&[u64::from(index)]), &[queue.kick.as_fd()]);
        if self.features & feature::PROTOCOL != 0 || self.protocol != 0 {
            self.tell(msg::SET_VRING_ENABLE, &words(&[index, 1]), &[]);
        }
    }

    /// Stops a queue; the next entry of its available ring, or the next place of a packed one, which counts through two rounds.
    pub fn stop_queue(&self, index: u32) -> u16 {
        let reply = self.ask(msg::GET_VRING_BASE, &words(&[index, 0]));
        assert_eq!(reply.payload[..4], index.to_le_bytes());
        let halves = [4, 6].map(|at| u16::from_le_bytes(reply.payload[at..at + 2].try_into().expect("two bytes")));
        if !self.is_packed() {
            return halves[0];
        }
        assert_eq!(halves[0], halves[1], "nothing is in flight");
        let round = if halves[0] & WRAP == 0 { self.queue(index).size } else { 0 };
        (halves[0] & !WRAP) + round
    }

    /// Whether rings are packed.
    pub fn is_packed(&self) -> bool {
        self.features & feature::RING_PACKED != 0
    }

    fn queue(&self, index: u32) -> &Queue {
        &self.queues[usize::try_from(index).expect("an index")]
    }

    fn queue_mut(&mut self, index: u32) -> &mut Queue {
        &mut self.queues[usize::try_from(index).expect("an index")]
    }

    /// Writes to the guest's memory, at an offset in it.
    pub fn poke(&self, at: u64, bytes: &[u8]) {
        self.memory.write_all_at(bytes, at).expect("write guest memory");
    }

    /// Reads the guest's memory.
    pub fn peek(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_exact_at(&mut bytes, at).expect("read guest memory");
        bytes
    }

    fn peek_u16(&self, at: u64) -> u16 {
        u16::from_le_bytes(self.peek(at, 2).try_into().expect("two bytes"))
    }

    /// Where in the memory the buffers of the request `slot` of a queue are: header, status, data.
    pub fn buffer(&self, index: u32, slot: u16) -> u64 {
        self.queue(index).buffers + u64::from(slot) * BUFFER
    }

    /// Writes a descriptor of a queue's table; with a packed ring, what is to be put into it.
    pub fn descriptor(&mut self, index: u32, number: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let bytes = descriptor(addr, len, flags, next);
        if self.is_packed() {
            self.queue_mut(index).table.insert(number, bytes);
        } else {
            self.poke(Self::rings(index) + 16 * u64::from(number), &bytes);
        }
    }

    /// As [`offer`](Self::offer), into a packed ring.
    fn offer_packed(&mut self, index: u32, head: u16) {
        let mut queue = self.queues.remove(usize::try_from(index).expect("an index"));
        let (mut number, mut at, mut places) = (head, queue.available, 0);
        let mut first = None;
        loop {
            let from = *queue.table.get(&number).expect("a descriptor");
            let flags = u16::from_le_bytes([from[12], from[13]]);
            let place = queue.place(at);
            let to = Self::rings(index) + 16 * u64::from(place & !WRAP);
            self.poke(to, &[&from[..12], &head.to_le_bytes()].concat());
            let flags_now = flags | if place & WRAP == 0 { IS_USED } else { MADE_AVAILABLE };
            match first {
                None => first = Some((to + 14, flags_now)),
                Some(_) => self.poke(to + 14, &flags_now.to_le_bytes()),
            }
            (at, places) = (queue.after(at, 1), places + 1);
            if flags & NEXT == 0 {
                break;
            }
            number = u16::from_le_bytes([from[14], from[15]]);
        }
        let (place, flags) = first.expect("a descriptor");
        fence(Ordering::SeqCst);
        self.poke(place, &flags.to_le_bytes());
        queue.available = at;
        assert_eq!(queue.taken.insert(head, places), None, "the request is in flight");
        self.queues.insert(usize::try_from(index).expect("an index"), queue);
    }

    fn poll_packed(&mut self, index: u32) -> Option<(u32, u32)> {
        let place = self.queue(index).place(self.queue(index).seen);
        let at = Self::rings(index) + 16 * u64::from(place & !WRAP);
        let wanted = if place & WRAP == 0 { 0 } else { MADE_AVAILABLE | IS_USED };
        if self.peek_u16(at + 14) & (MADE_AVAILABLE | IS_USED) != wanted {
            return None;
        }
        fence(Ordering::SeqCst);
        let len = u32::from_le_bytes(self.peek(at + 8, 4).try_into().expect("four bytes"));
        let head = self.peek_u16(at + 12);
        let queue = self.queue_mut(index);
        let places = queue.taken.remove(&head).expect("a request that is in flight");
        queue.seen = queue.after(queue.seen, places);
        Some((u32::from(head), len))
    }

    /// Makes a chain available without telling the device.
    pub fn offer(&mut self, index: u32, head: u16) {
        if self.is_packed() {
            return self.offer_packed(index, head);
        }
        let queue = self.queue(index);
        let (at, slot) = (queue.at + AVAILABLE, queue.available % queue.size);
        self.poke(at + 4 + 2 * u64::from(slot), &head.to_le_bytes());
        let available = self.queue(index).available.wrapping_add(1);
        self.queue_mut(index).available = available;
        fence(Ordering::SeqCst);
        self.poke(at + 2, &available.to_le_bytes());
    }

    /// Sets the index of the available ring to any number.
    pub fn set_available(&self, index: u32, value: u16) {
        self.poke(Self::rings(index) + AVAILABLE + 2, &value.to_le_bytes());
    }

    /// Rings the device.
    pub fn kick(&self, index: u32) {
        rustix::io::write(&self.queue(index).kick, &1u64.to_ne_bytes()).expect("kick");
    }

    /// Writes the three descriptors of a request in `slot`: header, data and status. Up to 60 KiB of data.
    pub fn prepare(&mut self, index: u32, slot: u16, kind: u32, sector: u64, out: &[u8], into: u32) {
        let at = self.buffer(index, slot);
        let mut header = words(&[kind, 0]);
        header.extend(longs(&[sector]));
        self.poke(at, &header);
        self.poke(at + 16, &[0xFF]);
        self.poke(at + 4096, out);
        let head = slot * 3;
        let data = GUEST + at + 4096;
        self.descriptor(index, head, GUEST + at, 16, NEXT, head + 1);
        let out_len = u32::try_from(out.len()).expect("a length");
        match (out_len, into) {
            (0, 0) => self.descriptor(index, head, GUEST + at, 16, NEXT, head + 2),
            (0, into) => self.descriptor(index, head + 1, data, into, NEXT | WRITE, head + 2),
            (out, _) => self.descriptor(index, head + 1, data, out, NEXT, head + 2),
        }
        self.descriptor(index, head + 2, GUEST + at + 16, 1, WRITE, 0);
    }

    /// Starts a request in `slot` (up to a third of the queue's size) and kicks.
    pub fn submit(&mut self, index: u32, slot: u16, kind: u32, sector: u64, out: &[u8], into: u32) {
        self.prepare(index, slot, kind, sector, out, into);
        self.offer(index, slot * 3);
        self.kick(index);
    }

    /// The next used entry, if there is one: descriptor number and length.
    pub fn poll_used(&mut self, index: u32) -> Option<(u32, u32)> {
        if self.is_packed() {
            return self.poll_packed(index);
        }
        let queue = self.queue(index);
        let at = queue.at + USED;
        if self.peek_u16(at + 2) == queue.seen {
            return None;
        }
        fence(Ordering::SeqCst);
        let entry = self.peek(at + 4 + 8 * u64::from(queue.seen % queue.size), 8);
        self.queue_mut(index).seen = self.queue(index).seen.wrapping_add(1);
        let number = |raw: &[u8]| u32::from_le_bytes(raw.try_into().expect("four bytes"));
        Some((number(&entry[..4]), number(&entry[4..])))
    }

    /// Waits for the next used entry, by interrupt. None if the device does not come to it in time.
    pub fn wait_used_within(&mut self, index: u32, limit: std::time::Duration) -> Option<(u32, u32)> {
        let end = std::time::Instant::now() + limit;
        loop {
            if let Some(entry) = self.poll_used(index) {
                return Some(entry);
            }
            // Ask for an interrupt at the next entry, and look once more.
            let queue = self.queue(index);
            if self.is_packed() {
                let kind = if self.features & feature::EVENT_IDX == 0 { 0 } else { 2_u16 };
                self.poke(queue.at + AVAILABLE, &queue.place(queue.seen).to_le_bytes());
                self.poke(queue.at + AVAILABLE + 2, &kind.to_le_bytes());
            } else {
                let event = queue.at + AVAILABLE + 4 + 2 * u64::from(queue.size);
                self.poke(event, &queue.seen.to_le_bytes());
            }
            fence(Ordering::SeqCst);
            if let Some(entry) = self.poll_used(index) {
                return Some(entry);
            }
            let left = end.checked_duration_since(std::time::Instant::now())?;
            if readable(&self.queue(index).call, left) {
                let mut count = [0; 8];
                let _ = rustix::io::read(&self.queue(index).call, &mut count);
            }
        }
    }

    /// Waits for the next used entry, by interrupt.
    pub fn wait_used(&mut self, index: u32) -> (u32, u32) {
        self.wait_used_within(index, DEADLINE).expect("a request to be done")
    }

    /// The status that the device gave the request in `slot`; 255 if none.
    pub fn status(&self, index: u32, slot: u16) -> u8 {
        self.peek(self.buffer(index, slot) + 16, 1)[0]
    }

    /// The data of the request in `slot`.
    pub fn data(&self, index: u32, slot: u16, len: usize) -> Vec<u8> {
        self.peek(self.buffer(index, slot) + 4096, len)
    }

    /// One request from start to end: its status, and the data that came.
    pub fn request(&mut self, index: u32, kind: u32, sector: u64, out: &[u8], into: u32) -> (u8, Vec<u8>) {
        self.submit(index, 0, kind, sector, out, into);
        let (head, _) = self.wait_used(index);
        assert_eq!(head, 0);
        (self.status(index, 0), self.data(index, 0, usize::try_from(into).expect("a length")))
    }

    /// Reads, and checks that it worked.
    pub fn read(&mut self, sector: u64, len: u32) -> Vec<u8> {
        let (status, data) = self.request(0, req::IN, sector, &[], len);
        assert_eq!(status, 0, "read at sector {sector}");
        data
    }

    /// Writes, and checks that it worked.
    pub fn write(&mut self, sector: u64, data: &[u8]) {
        assert_eq!(self.request(0, req::OUT, sector, data, 0).0, 0, "write at sector {sector}");
    }

    /// Flushes, and checks that it worked.
    pub fn flush(&mut self) {
        assert_eq!(self.request(0, req::FLUSH, 0, &[], 0).0, 0, "flush");
    }

    /// So many bytes of the configuration from its start.
    pub fn config(&self, len: u32) -> Vec<u8> {
        let mut payload = words(&[0, len, 0]);
        payload.extend(vec![0; usize::try_from(len).expect("a length")]);
        let reply = self.ask(msg::GET_CONFIG, &payload);
        assert_eq!(reply.payload[..8], payload[..8]);
        reply.payload[12..].to_vec()
    }

    /// Says whether the guest's cache is written back.
    pub fn set_writeback(&self, on: bool) -> u64 {
        let mut payload = words(&[32, 1, 0]);
        payload.push(u8::from(on));
        self.try_tell(msg::SET_CONFIG, &payload, &[])
    }

    /// Hands over one end of a socket pair for messages of the back-end, and gives the other.
    pub fn backend_channel(&self) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        self.tell(msg::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]);
        ours
    }
}

/// Waits for a message on any socket; none at its end.
pub fn receive(socket: &UnixStream) -> Option<Reply> {
    assert!(readable(socket, DEADLINE), "nothing came");
    let mut header = [0; 12];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    // A connection that was reset has ended as well.
    let got = recvmsg(socket, &mut [IoSliceMut::new(&mut header)], &mut control, RecvFlags::CMSG_CLOEXEC).ok()?.bytes;
    if got == 0 {
        return None;
    }
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(passed) = message {
            fds.extend(passed);
        }
    }
    let mut socket = socket;
    socket.read_exact(&mut header[got..]).expect("a whole header");
    let field = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("four bytes"));
    let mut payload = vec![0; usize::try_from(field(8)).expect("a length")];
    socket.read_exact(&mut payload).expect("a whole payload");
    Some(Reply { request: field(0), flags: field(4), payload, fds })
}

/// The bytes of a descriptor.
pub fn descriptor(addr: u64, len: u32, flags: u16, next: u16) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&addr.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}
