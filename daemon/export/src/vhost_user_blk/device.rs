//! The device as one front-end sees it: from its first message to its last, `[vhost-user §Communication]`.
//!
//! One task reads the messages and answers them in order; rings run on tasks of their own. The front-end is hostile: what it
//! says is checked before it changes anything, a message that cannot be taken gets an error if the front-end asked to hear of
//! it, and ends the connection otherwise. When it is gone, rings stop when their requests are done. Its files are looked at, unmapped
//! and closed on its [`Lane`], for they may answer when they like.

use super::wire::{self, HEADER, Header, InflightInfo, MAX_FDS, Malformed, Message, RegionInfo, protocol};
use crate::lifetime::Lifetime;
use crate::virtio_blk::config::{CONFIG_LEN, Geometry, WCE_AT, feature};
use crate::virtio_blk::log::DirtyLog;
use crate::virtio_blk::queue::{Interrupt, Shared};
use crate::virtio_blk::ring::{Broken, MAX_SIZE, RingFeatures};
use crate::virtio_blk::vring::{InflightRegion, Surroundings, Vring};
use buf::{GuestMemory, Mapping, Region};
use io::{Bell, Foreign, IoThread, Lane, MessageSocket};
use std::fmt;
use std::future::poll_fn;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;
use tokio::sync::{mpsc, watch};

/// Regions of guest memory at a time.
const MAX_REGIONS: usize = 509;

/// Of the device, and of vhost.
fn offered(geometry: &Geometry) -> u64 {
    geometry.features() | feature::RING_PACKED | feature::CONFIG_WCE | feature::LOG_ALL | feature::PROTOCOL
}

/// Why a message was not taken.
#[derive(Debug)]
pub(crate) struct Refused(String);

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<Malformed> for Refused {
    fn from(malformed: Malformed) -> Self {
        Self(malformed.to_string())
    }
}

impl From<Broken> for Refused {
    fn from(broken: Broken) -> Self {
        Self(broken.to_string())
    }
}

impl From<std::io::Error> for Refused {
    fn from(error: std::io::Error) -> Self {
        Self(error.to_string())
    }
}

fn refused<T>(why: impl Into<String>) -> Result<T, Refused> {
    Err(Refused(why.into()))
}

/// What a message is answered with.
enum Answer {
    /// Only whether it was taken, if the front-end wants to hear.
    Ack,
    Payload(Vec<u8>),
    WithFd(Vec<u8>, OwnedFd),
}

fn word(value: u64) -> Answer {
    Answer::Payload(value.to_le_bytes().to_vec())
}

/// Reads messages whole; what came in of one stays when the reading is interrupted.
struct Reader {
    bytes: Vec<u8>,
    fds: Vec<Foreign>,
}

impl Reader {
    /// The next message; none at the end of the stream.
    async fn next(&mut self, socket: &MessageSocket) -> Result<Option<(Header, Vec<u8>, Vec<Foreign>)>, Refused> {
        loop {
            let wanted = match self.bytes.first_chunk::<HEADER>() {
                None => HEADER,
                Some(raw) => {
                    let header = Header::parse(raw)?;
                    if self.bytes.len() == HEADER + header.size {
                        let payload = self.bytes.split_off(HEADER);
                        self.bytes.clear();
                        return Ok(Some((header, payload, std::mem::take(&mut self.fds))));
                    }
                    HEADER + header.size
                }
            };
            // Never more than this message, so that the descriptors that come are its own.
            let mut room = [0; wire::MAX_PAYLOAD];
            let missing = (wanted - self.bytes.len()).min(room.len());
            let room = room.get_mut(..missing).unwrap_or_default();
            let count = socket.recv(room, &mut self.fds).await?;
            if self.fds.len() > MAX_FDS {
                return refused("too many descriptors with a message");
            }
            match room.get(..count) {
                Some([]) | None if self.bytes.is_empty() => return Ok(None),
                Some([]) | None => return refused("the connection ended within a message"),
                Some(got) => self.bytes.extend_from_slice(got),
            }
        }
    }
}

/// What an export gives each of its front-ends.
#[derive(Debug)]
pub(crate) struct Parts {
    pub shared: Arc<Shared>,
    pub geometry: Geometry,
    pub threads: Vec<Arc<IoThread>>,
    /// Whether the guest's cache is written back, as it was told and may say itself. Kept from one front-end to the next: one
    /// that comes back does not repeat what its guest has said.
    pub writeback: watch::Sender<bool>,
    /// Changes with the length of the disk.
    pub resized: watch::Receiver<u64>,
}

/// One front-end's view.
pub(crate) struct Device<'a> {
    parts: &'a Parts,
    lifetime: &'a Lifetime,
    /// For all that the front-end sends.
    lane: Lane,
    socket: MessageSocket,
    features: u64,
    protocol: u64,
    status: u64,
    vrings: Vec<Vring>,
    memory: Arc<GuestMemory>,
    inflight: Option<InflightRegion>,
    log: Option<Arc<DirtyLog>>,
    backend: Option<MessageSocket>,
    /// Rings whose guest broke the rules, by index.
    failures: mpsc::UnboundedReceiver<(usize, Broken)>,
    fail: mpsc::UnboundedSender<(usize, Broken)>,
}

impl<'a> Device<'a> {
    pub(crate) fn new(parts: &'a Parts, lifetime: &'a Lifetime, socket: MessageSocket, lane: Lane) -> Self {
        let vrings = (0..parts.geometry.queues).map(|_| Vring::default()).collect();
        let (fail, failures) = mpsc::unbounded_channel();
        let this = Self {
            parts,
            lifetime,
            lane,
            socket,
            features: 0,
            protocol: 0,
            status: 0,
            vrings,
            memory: Arc::default(),
            inflight: None,
            log: None,
            backend: None,
            failures,
            fail,
        };
        this.update_through();
        this
    }

    /// Serves the front-end until it leaves, breaks the protocol, or the export is to end. All rings have stopped then.
    ///
    /// # Errors
    /// Why the connection was ended, if the front-end is to blame.
    pub(crate) async fn run(mut self) -> Result<(), Refused> {
        let mut closing = pin!(self.lifetime.ending());
        let mut reader = Reader { bytes: Vec::new(), fds: Vec::new() };
        let mut resized = self.parts.resized.clone();
        resized.mark_unchanged();
        let result = loop {
            tokio::select! {
                biased;
                () = &mut closing => break Ok(()),
                Some((index, broken)) = self.failures.recv() => {
                    if let Some(err) = self.vrings.get(index).and_then(|vring| vring.err.as_ref()) {
                        err.ring();
                    }
                    break refused(format!("queue {index}: {broken}"));
                }
                Ok(()) = resized.changed() => self.tell_change().await,
                message = reader.next(&self.socket) => match message {
                    Ok(None) => break Ok(()),
                    Err(error) => break Err(error),
                    Ok(Some((header, payload, fds))) => {
                        let (reply, error) = match self.answer(header, &payload, fds).await {
                            Ok(reply) => reply,
                            Err(error) => break Err(error),
                        };
                        if let Some(error) = error {
                            tracing::warn!(target: "vhost_user_blk_refused", request = header.request, %error, "message refused");
                        }
                        let Some((bytes, fd)) = reply else { continue };
                        tokio::select! {
                            sent = self.socket.send(&bytes, fd.as_ref().map(AsFd::as_fd)) => {
                                if sent.is_err() {
                                    break Ok(());
                                }
                            }
                            () = &mut closing => break Ok(()),
                        }
                    }
                },
            }
        };
        self.vrings.iter().for_each(Vring::request_stop);
        for vring in &mut self.vrings {
            vring.stop().await;
        }
        result
    }

    /// Takes a message and makes its reply, if there is one; with the reason if it was refused in the reply.
    async fn answer(
        &mut self,
        header: Header,
        payload: &[u8],
        fds: Vec<Foreign>,
    ) -> Result<(Option<(Vec<u8>, Option<OwnedFd>)>, Option<Refused>), Refused> {
        let message = Message::decode(header.request, payload)?;
        let (least, most) = message.descriptors();
        if fds.len() < least || fds.len() > most {
            return refused(format!("{} descriptors with message {}", fds.len(), header.request));
        }
        tracing::trace!(target: "vhost_user_blk_message", request = header.request, ?message);
        let acks = header.wants_reply() && self.protocol & protocol::REPLY_ACK != 0;
        match self.take(message, fds).await {
            Ok(Answer::Payload(payload)) => Ok((Some((header.reply(&payload), None)), None)),
            Ok(Answer::WithFd(payload, fd)) => Ok((Some((header.reply(&payload), Some(fd))), None)),
            Ok(Answer::Ack) => Ok((acks.then(|| (header.reply(&0u64.to_le_bytes()), None)), None)),
            Err(error) if acks => Ok((Some((header.reply(&1u64.to_le_bytes()), None)), Some(error))),
            Err(error) => Err(error),
        }
    }

    fn vring(&mut self, index: u32) -> Result<&mut Vring, Refused> {
        let vring = usize::try_from(index).ok().and_then(|index| self.vrings.get_mut(index));
        vring.ok_or_else(|| Refused(format!("there is no queue {index}")))
    }

    async fn take(&mut self, message: Message, fds: Vec<Foreign>) -> Result<Answer, Refused> {
        let mut fds = fds.into_iter();
        match message {
            Message::GetFeatures => return Ok(word(offered(&self.parts.geometry))),
            Message::SetFeatures(features) => self.set_features(features).await?,
            Message::GetProtocolFeatures => return Ok(word(protocol::OFFERED)),
            Message::SetProtocolFeatures(features) => {
                if features & !protocol::OFFERED != 0 {
                    return refused(format!("protocol features {features:#x} are not offered"));
                }
                self.protocol = features;
            }
            Message::GetQueueNum => return Ok(word(u64::from(self.parts.geometry.queues))),
            Message::GetMaxMemSlots => return Ok(word(u64::try_from(MAX_REGIONS).unwrap_or(0))),
            // The front-end may stop using the queue any time; whose it is does not matter here.
            Message::SetOwner => {}
            Message::ResetOwner => self.stop_all().await,
            Message::ResetDevice => {
                self.reset_rings().await;
                self.vrings.iter_mut().for_each(|vring| *vring = Vring::default());
                self.features = 0;
                self.status = 0;
                self.parts.writeback.send_replace(!self.parts.shared.disk.is_writethrough());
                self.update_through();
            }
            Message::SetStatus(status) => {
                self.status = status & 0xFF;
                if self.status == 0 {
                    self.reset_rings().await;
                }
            }
            Message::GetStatus => return Ok(word(self.status)),
            Message::SetMemTable(table) => {
                let mut regions = Vec::new();
                for (info, fd) in table.iter().zip(fds) {
                    regions.push(self.map_region(info, fd).await?);
                }
                self.set_memory(regions).await?;
            }
            Message::AddMemReg(info) => {
                let fd = fds.next().ok_or(Refused("no descriptor".to_owned()))?;
                let mut regions = self.memory.regions().to_vec();
                if regions.len() >= MAX_REGIONS {
                    return refused("too many memory regions");
                }
                regions.push(self.map_region(&info, fd).await?);
                self.set_memory(regions).await?;
            }
            Message::RemMemReg(info) => {
                let is_it = |region: &Region| {
                    let len = u64::try_from(region.map.len()).unwrap_or(u64::MAX);
                    (region.guest, region.monitor, len) == (info.guest, info.monitor, info.size)
                };
                let mut regions = self.memory.regions().to_vec();
                let at = regions.iter().position(is_it).ok_or(Refused("no such memory region".to_owned()))?;
                regions.remove(at);
                self.set_memory(regions).await?;
            }
            Message::SetLogBase { size, offset } => {
                let fd = fds.next().ok_or(Refused("no descriptor".to_owned()))?;
                let map = self.map(fd, offset, size).await?;
                self.log = DirtyLog::new(&map).map(Arc::new);
                self.update_log().await;
                return Ok(if self.protocol & protocol::LOG_SHMFD != 0 { word(0) } else { Answer::Ack });
            }
            // Who reads the log looks when it likes.
            Message::SetLogFd => {}
            Message::SetVringNum { index, size } => {
                let packed = self.is_packed();
                let size = u16::try_from(size).ok().filter(|size| (1..=MAX_SIZE).contains(size));
                let size = size.filter(|size| packed || size.is_power_of_two());
                let size = size.ok_or(Refused("the size of a ring is not a power of two up to 1024".to_owned()))?;
                self.stopped_vring(index)?.size = Some(size);
            }
            Message::SetVringAddr { index, at } => {
                let memory = Arc::clone(&self.memory);
                let vring = self.vring(index)?;
                vring.addresses = Some(at);
                vring.moved(&memory).await;
            }
            Message::SetVringBase { index, base } => {
                let base = match base >> 16 {
                    // Some tell the available position only; nothing is in flight then.
                    0 if self.is_packed() => base | base << 16,
                    _ if self.is_packed() => base,
                    0 => base,
                    _ => return refused(format!("ring index {base}")),
                };
                self.stopped_vring(index)?.base = base;
            }
            Message::GetVringBase { index } => {
                let base = self.vring(index)?.stop().await;
                let at = usize::try_from(index).unwrap_or(usize::MAX);
                if let Some(part) = self.inflight.as_ref().and_then(|region| region.queue(at)) {
                    part.stopped();
                }
                let mut payload = index.to_le_bytes().to_vec();
                payload.extend_from_slice(&base.to_le_bytes());
                return Ok(Answer::Payload(payload));
            }
            Message::SetVringKick { index, .. } => self.kick(index, fds.next()).await?,
            Message::SetVringCall { index, .. } => {
                let call = fds.next().map(Bell::new).transpose()?;
                let call = call.map(|bell| Box::new(bell) as Box<dyn Interrupt>);
                self.vring(index)?.set_call(call).await;
            }
            Message::SetVringErr { index, .. } => self.vring(index)?.err = fds.next().map(Bell::new).transpose()?,
            Message::SetVringEnable { index, enable } => self.vring(index)?.set_enabled(enable).await,
            Message::SetBackendReqFd => {
                let fd = fds.next().ok_or(Refused("no descriptor".to_owned()))?;
                self.backend = Some(MessageSocket::of(fd, &self.lane)?);
            }
            Message::GetConfig { offset, size, flags } => return self.config(offset, size, flags),
            Message::SetConfig { offset, bytes, .. } => self.set_config(offset, &bytes).await?,
            Message::GetInflightFd(info) => return self.make_inflight(info),
            Message::SetInflightFd(info) => {
                let fd = fds.next().ok_or(Refused("no descriptor".to_owned()))?;
                self.check_inflight(&info)?;
                let InflightInfo { size, offset, queues, queue_size, .. } = info;
                let packed = self.is_packed();
                if size < InflightRegion::len(queues, queue_size, packed) {
                    return refused("the inflight region is too small");
                }
                let map = self.map(fd, offset, size).await?;
                self.inflight = Some(InflightRegion { map, start: 0, queues, queue_size, packed });
            }
            Message::Unknown(kind) => return refused(format!("message {kind} is not supported")),
        }
        Ok(Answer::Ack)
    }

    fn is_packed(&self) -> bool {
        self.features & feature::RING_PACKED != 0
    }

    /// A queue whose setup may be changed.
    fn stopped_vring(&mut self, index: u32) -> Result<&mut Vring, Refused> {
        let vring = self.vring(index)?;
        if vring.is_running() { refused(format!("queue {index} is running")) } else { Ok(vring) }
    }

    async fn stop_all(&mut self) {
        self.vrings.iter().for_each(Vring::request_stop);
        for vring in &mut self.vrings {
            vring.stop().await;
        }
    }

    /// Stops all rings, which the driver sets up anew when it needs them.
    async fn reset_rings(&mut self) {
        self.stop_all().await;
        let parts = (0..self.vrings.len()).filter_map(|index| self.inflight.as_ref()?.queue(index));
        parts.for_each(|part| part.stopped());
    }

    async fn set_features(&mut self, features: u64) -> Result<(), Refused> {
        let offered = offered(&self.parts.geometry);
        if features & !offered != 0 {
            return refused(format!("features {:#x} are not offered", features & !offered));
        }
        let changed = self.features ^ features;
        if changed & !feature::LOG_ALL != 0 && self.vrings.iter().any(Vring::is_running) {
            return refused("features change while a queue is running");
        }
        self.features = features;
        let packed = self.is_packed();
        self.inflight.iter_mut().for_each(|region| region.packed = packed);
        self.update_through();
        if changed & feature::LOG_ALL != 0 {
            self.update_log().await;
        }
        Ok(())
    }

    /// Whether writes have to be on stable storage: a guest that knows of no cache cannot flush it.
    fn update_through(&self) {
        let flushes = self.features & feature::FLUSH != 0;
        let through = !(flushes && *self.parts.writeback.borrow());
        self.parts.shared.through.store(through, Ordering::Relaxed);
    }

    fn active_log(&self) -> Option<Arc<DirtyLog>> {
        if self.features & feature::LOG_ALL != 0 { self.log.clone() } else { None }
    }

    async fn update_log(&self) {
        for vring in &self.vrings {
            vring.set_log(self.active_log()).await;
        }
    }

    async fn set_memory(&mut self, regions: Vec<Region>) -> Result<(), Refused> {
        let memory = GuestMemory::new(regions).map_err(|error| Refused(error.to_string()))?;
        self.memory = Arc::new(memory);
        for vring in &self.vrings {
            vring.moved(&self.memory).await;
        }
        Ok(())
    }

    async fn kick(&mut self, index: u32, kick: Option<Foreign>) -> Result<(), Refused> {
        let at = usize::try_from(index).map_err(|_| Refused(format!("there is no queue {index}")))?;
        let threads = &self.parts.threads;
        let thread = at.checked_rem(threads.len()).and_then(|turn| threads.get(turn));
        let around = Surroundings {
            memory: &self.memory,
            source: None,
            features: RingFeatures {
                indirect: self.features & feature::INDIRECT_DESC != 0,
                event_idx: self.features & feature::EVENT_IDX != 0,
                packed: self.is_packed(),
            },
            always_enabled: self.features & feature::PROTOCOL == 0,
            inflight: self.inflight.as_ref().filter(|_| self.protocol & protocol::INFLIGHT_SHMFD != 0),
            log: self.active_log(),
            shared: &self.parts.shared,
            thread: thread.ok_or(Refused("no iothread".to_owned()))?,
            failures: &self.fail,
        };
        let vring = self.vrings.get_mut(at).ok_or_else(|| Refused(format!("there is no queue {index}")))?;
        if let Some(true) = vring.kick(at, kick, &around).await? {
            self.parts.writeback.send_replace(false);
            self.update_through();
        }
        self.note_through();
        Ok(())
    }

    fn note_through(&self) {
        let through = !*self.parts.writeback.borrow();
        self.vrings.iter().for_each(|vring| vring.note_through(through));
    }

    fn config(&self, offset: u32, size: u32, flags: u32) -> Result<Answer, Refused> {
        let space = self.parts.geometry.config(&self.parts.shared.disk, *self.parts.writeback.borrow());
        let mut payload = Vec::new();
        [offset, size, flags].iter().for_each(|field| payload.extend_from_slice(&field.to_le_bytes()));
        // What this device has not reads as zero: monitors know later versions of the structure.
        let (from, len) = (usize::try_from(offset).unwrap_or(CONFIG_LEN), usize::try_from(size).unwrap_or(0));
        payload.extend(space.iter().copied().chain(std::iter::repeat(0)).skip(from).take(len));
        Ok(Answer::Payload(payload))
    }

    async fn set_config(&mut self, offset: u32, bytes: &[u8]) -> Result<(), Refused> {
        let (WCE_AT, [writeback @ 0..=1]) = (offset, bytes) else {
            return refused("only the cache mode of the configuration can be set");
        };
        let writeback = *writeback == 1;
        self.parts.writeback.send_replace(writeback);
        self.update_through();
        self.note_through();
        if !writeback && self.parts.geometry.writable {
            // What was written before is not to be lost any more either.
            let flushed = self.parts.shared.disk.flush().await;
            return flushed.or_else(|errno| refused(format!("cannot flush: {errno}")));
        }
        Ok(())
    }

    fn check_inflight(&self, info: &InflightInfo) -> Result<(), Refused> {
        if info.queues == 0 || info.queues > self.parts.geometry.queues {
            return refused(format!("an inflight region for {} queues", info.queues));
        }
        if info.queue_size == 0 || info.queue_size > MAX_SIZE {
            return refused(format!("an inflight region for queues of {} entries", info.queue_size));
        }
        Ok(())
    }

    fn make_inflight(&self, info: InflightInfo) -> Result<Answer, Refused> {
        use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
        self.check_inflight(&info)?;
        let size = InflightRegion::len(info.queues, info.queue_size, self.is_packed());
        let make = || {
            let fd = memfd_create("vhost-user-blk-inflight", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
            ftruncate(&fd, size)?;
            fcntl_add_seals(&fd, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
            Ok(fd)
        };
        let fd =
            make().map_err(|errno: rustix::io::Errno| Refused(format!("cannot make an inflight region: {errno}")))?;
        let mut payload = size.to_le_bytes().to_vec();
        payload.extend_from_slice(&0u64.to_le_bytes());
        payload.extend_from_slice(&info.queues.to_le_bytes());
        payload.extend_from_slice(&info.queue_size.to_le_bytes());
        payload.resize(info.payload, 0);
        Ok(Answer::WithFd(payload, fd))
    }

    /// Tells the front-end that the configuration changed. One that does not take it has an older one to read first.
    async fn tell_change(&self) {
        if let Some(backend) = &self.backend {
            let bytes = wire::config_change();
            let mut send = pin!(backend.send(&bytes, None));
            poll_fn(|cx| {
                let _ = send.as_mut().poll(cx);
                Poll::Ready(())
            })
            .await;
        }
    }

    /// Maps a file of the front-end's.
    async fn map(&self, fd: Foreign, offset: u64, size: u64) -> Result<Arc<Mapping>, Refused> {
        buf::watch_faults()?;
        let disposal = self.lane.disposal();
        let map = move || Mapping::new(fd.as_fd(), offset, size).map(|map| map.disposed_by(disposal));
        tokio::select! {
            biased;
            () = self.lifetime.ending() => refused("the export ends"),
            () = self.socket.gone() => refused("the front-end left"),
            map = self.lane.run(map) => Ok(Arc::new(map??)),
        }
    }

    async fn map_region(&self, info: &RegionInfo, fd: Foreign) -> Result<Region, Refused> {
        let map = self.map(fd, info.offset, info.size).await?;
        Ok(Region { guest: info.guest, monitor: info.monitor, map })
    }
}
