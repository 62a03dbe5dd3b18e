//! The messages of the front-end, without I/O: numbers and layouts, `[vhost-user §Message Specification]`.
//!
//! [`Message::decode`] is total: any bytes give a message or a reason. What the numbers in a message mean for the device is not
//! checked here.

use crate::virtio_blk::ring::RingAddresses;
use std::fmt;

/// Bytes of a message's header.
pub(crate) const HEADER: usize = 12;
/// The longest payload that any message may have, in bytes.
pub(crate) const MAX_PAYLOAD: usize = 1024;
/// Descriptors with one message at most: one for each region of a memory table.
pub(crate) const MAX_FDS: usize = 8;
/// Regions in a memory table that comes in one message.
const MAX_TABLE: u32 = 8;
/// Bytes of device configuration in one message. `[vhost-user §Virtio device config space]`
const MAX_CONFIG: u32 = 256;

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// Bits of the protocol features.
pub(crate) mod protocol {
    pub const MQ: u64 = 1 << 0;
    pub const LOG_SHMFD: u64 = 1 << 1;
    pub const REPLY_ACK: u64 = 1 << 3;
    pub const BACKEND_REQ: u64 = 1 << 5;
    pub const CONFIG: u64 = 1 << 9;
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    pub const RESET_DEVICE: u64 = 1 << 13;
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
    /// What this device has.
    pub const OFFERED: u64 = MQ
        | LOG_SHMFD
        | REPLY_ACK
        | BACKEND_REQ
        | CONFIG
        | INFLIGHT_SHMFD
        | RESET_DEVICE
        | CONFIGURE_MEM_SLOTS
        | STATUS;
}

/// Numbers of the front-end's messages.
mod request {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_LOG_FD: u32 = 7;
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

/// The device's own message: its configuration has changed. `[vhost-user VHOST_USER_BACKEND_CONFIG_CHANGE_MSG]`
const CONFIG_CHANGE: u32 = 2;

/// The start of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub request: u32,
    flags: u32,
    pub size: usize,
}

impl Header {
    /// The header in these bytes.
    pub(crate) fn parse(raw: &[u8; HEADER]) -> Result<Self, Malformed> {
        let mut fields = Fields(raw);
        let (request, flags, size) = (fields.u32()?, fields.u32()?, fields.u32()?);
        if flags & VERSION_MASK != VERSION || flags & REPLY != 0 {
            return Err(Malformed("message flags"));
        }
        let size = usize::try_from(size).ok().filter(|size| *size <= MAX_PAYLOAD).ok_or(Malformed("message size"))?;
        Ok(Self { request, flags, size })
    }

    /// Whether the front-end waits to hear how the message was taken.
    pub(crate) fn wants_reply(self) -> bool {
        self.flags & NEED_REPLY != 0
    }

    /// The reply with this payload.
    pub(crate) fn reply(self, payload: &[u8]) -> Vec<u8> {
        message(self.request, VERSION | REPLY, payload)
    }
}

fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER + payload.len());
    // No payload is longer than MAX_PAYLOAD.
    let size = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    [request, flags, size].iter().for_each(|word| out.extend_from_slice(&word.to_le_bytes()));
    out.extend_from_slice(payload);
    out
}

/// The message to the front-end that the configuration has changed.
pub(crate) fn config_change() -> Vec<u8> {
    message(CONFIG_CHANGE, VERSION, &[])
}

/// What is wrong with a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Malformed(pub &'static str);

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "malformed vhost-user message: {}", self.0)
    }
}

/// A region of guest memory as the front-end describes it; all numbers are its claims.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RegionInfo {
    pub guest: u64,
    pub size: u64,
    pub monitor: u64,
    pub offset: u64,
}

/// The memory in which requests in flight are noted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct InflightInfo {
    pub size: u64,
    pub offset: u64,
    pub queues: u16,
    pub queue_size: u16,
    /// Bytes of the message's payload, which the reply has as well: monitors differ in its padding.
    pub payload: usize,
}

/// A message of the front-end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Message {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    ResetOwner,
    SetMemTable(Vec<RegionInfo>),
    SetLogBase {
        size: u64,
        offset: u64,
    },
    SetLogFd,
    SetVringNum {
        index: u32,
        size: u32,
    },
    SetVringAddr {
        index: u32,
        at: RingAddresses,
    },
    SetVringBase {
        index: u32,
        base: u32,
    },
    GetVringBase {
        index: u32,
    },
    /// The descriptor is there unless the ring is to be polled.
    SetVringKick {
        index: u32,
        has_fd: bool,
    },
    SetVringCall {
        index: u32,
        has_fd: bool,
    },
    SetVringErr {
        index: u32,
        has_fd: bool,
    },
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    GetQueueNum,
    SetVringEnable {
        index: u32,
        enable: bool,
    },
    SetBackendReqFd,
    GetConfig {
        offset: u32,
        size: u32,
        flags: u32,
    },
    SetConfig {
        offset: u32,
        flags: u32,
        bytes: Vec<u8>,
    },
    GetInflightFd(InflightInfo),
    SetInflightFd(InflightInfo),
    ResetDevice,
    GetMaxMemSlots,
    AddMemReg(RegionInfo),
    RemMemReg(RegionInfo),
    SetStatus(u64),
    GetStatus,
    /// One that this device does not know.
    Unknown(u32),
}

/// Reads numbers off the front of a payload.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (first, rest) = self.0.split_first_chunk().ok_or(Malformed("too short"))?;
        self.0 = rest;
        Ok(*first)
    }

    fn u16(&mut self) -> Result<u16, Malformed> {
        self.take().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, Malformed> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, Malformed> {
        self.take().map(u64::from_le_bytes)
    }

    fn region(&mut self) -> Result<RegionInfo, Malformed> {
        Ok(RegionInfo { guest: self.u64()?, size: self.u64()?, monitor: self.u64()?, offset: self.u64()? })
    }

    fn inflight(&mut self, payload: usize) -> Result<InflightInfo, Malformed> {
        let (size, offset) = (self.u64()?, self.u64()?);
        let info = InflightInfo { size, offset, queues: self.u16()?, queue_size: self.u16()?, payload };
        // Some monitors pad the structure to whole words.
        if self.0.len() == 4 {
            self.u32()?;
        }
        Ok(info)
    }

    /// Index and whether there is a descriptor.
    fn vring_fd(&mut self) -> Result<(u32, bool), Malformed> {
        const INDEX: u64 = 0xFF;
        const NO_FD: u64 = 1 << 8;
        let word = self.u64()?;
        if word & !(INDEX | NO_FD) != 0 {
            return Err(Malformed("ring index"));
        }
        let index = u32::try_from(word & INDEX).map_err(|_| Malformed("ring index"))?;
        Ok((index, word & NO_FD == 0))
    }
}

impl Message {
    /// The message of this kind with this payload.
    ///
    /// # Errors
    /// The payload is too long or too short, or a number is one that the specification does not allow.
    pub(crate) fn decode(kind: u32, payload: &[u8]) -> Result<Self, Malformed> {
        let mut f = Fields(payload);
        let message = match kind {
            request::GET_FEATURES => Self::GetFeatures,
            request::SET_FEATURES => Self::SetFeatures(f.u64()?),
            request::SET_OWNER => Self::SetOwner,
            request::RESET_OWNER => Self::ResetOwner,
            request::SET_MEM_TABLE => {
                let (count, _padding) = (f.u32()?, f.u32()?);
                if count > MAX_TABLE {
                    return Err(Malformed("number of memory regions"));
                }
                let table = (0..count).map(|_| f.region()).collect::<Result<_, _>>()?;
                // The structure has room for all regions, and some front-ends send it whole.
                f.0 = &[];
                Self::SetMemTable(table)
            }
            request::SET_LOG_BASE => Self::SetLogBase { size: f.u64()?, offset: f.u64()? },
            request::SET_LOG_FD => Self::SetLogFd,
            request::SET_VRING_NUM => Self::SetVringNum { index: f.u32()?, size: f.u32()? },
            request::SET_VRING_ADDR => {
                let (index, flags) = (f.u32()?, f.u32()?);
                if flags > 1 {
                    return Err(Malformed("ring flags"));
                }
                let (descriptors, used, available, log) = (f.u64()?, f.u64()?, f.u64()?, f.u64()?);
                let log = (flags == 1).then_some(log);
                Self::SetVringAddr { index, at: RingAddresses { descriptors, used, available, log } }
            }
            request::SET_VRING_BASE => Self::SetVringBase { index: f.u32()?, base: f.u32()? },
            request::GET_VRING_BASE => {
                let (index, _) = (f.u32()?, f.u32()?);
                Self::GetVringBase { index }
            }
            request::SET_VRING_KICK => {
                let (index, has_fd) = f.vring_fd()?;
                Self::SetVringKick { index, has_fd }
            }
            request::SET_VRING_CALL => {
                let (index, has_fd) = f.vring_fd()?;
                Self::SetVringCall { index, has_fd }
            }
            request::SET_VRING_ERR => {
                let (index, has_fd) = f.vring_fd()?;
                Self::SetVringErr { index, has_fd }
            }
            request::GET_PROTOCOL_FEATURES => Self::GetProtocolFeatures,
            request::SET_PROTOCOL_FEATURES => Self::SetProtocolFeatures(f.u64()?),
            request::GET_QUEUE_NUM => Self::GetQueueNum,
            request::SET_VRING_ENABLE => match (f.u32()?, f.u32()?) {
                (index, on @ 0..=1) => Self::SetVringEnable { index, enable: on == 1 },
                _ => return Err(Malformed("ring state")),
            },
            request::SET_BACKEND_REQ_FD => Self::SetBackendReqFd,
            request::GET_CONFIG => {
                let (offset, size, flags) = (f.u32()?, f.u32()?, f.u32()?);
                if offset.checked_add(size).is_none_or(|end| end > MAX_CONFIG) {
                    return Err(Malformed("configuration range"));
                }
                // What follows is room for the reply.
                f.0 = &[];
                Self::GetConfig { offset, size, flags }
            }
            request::SET_CONFIG => {
                let (offset, size, flags) = (f.u32()?, f.u32()?, f.u32()?);
                let bytes = usize::try_from(size).ok().and_then(|size| f.0.get(..size));
                let bytes = bytes.ok_or(Malformed("configuration size"))?.to_vec();
                f.0 = &[];
                Self::SetConfig { offset, flags, bytes }
            }
            request::GET_INFLIGHT_FD => Self::GetInflightFd(f.inflight(payload.len())?),
            request::SET_INFLIGHT_FD => Self::SetInflightFd(f.inflight(payload.len())?),
            request::RESET_DEVICE => Self::ResetDevice,
            request::GET_MAX_MEM_SLOTS => Self::GetMaxMemSlots,
            request::ADD_MEM_REG | request::REM_MEM_REG => {
                let _padding = f.u64()?;
                let region = f.region()?;
                if kind == request::ADD_MEM_REG { Self::AddMemReg(region) } else { Self::RemMemReg(region) }
            }
            request::SET_STATUS => Self::SetStatus(f.u64()?),
            request::GET_STATUS => Self::GetStatus,
            other => {
                f.0 = &[];
                Self::Unknown(other)
            }
        };
        // Some front-ends send a word with messages that have none.
        let spare = payload.len() == 8 && f.0.len() == 8;
        if f.0.is_empty() || spare { Ok(message) } else { Err(Malformed("too long")) }
    }

    /// How many descriptors come with it, at least and at most.
    pub(crate) fn descriptors(&self) -> (usize, usize) {
        match self {
            Self::SetMemTable(regions) => (regions.len(), regions.len()),
            Self::SetVringKick { has_fd, .. }
            | Self::SetVringCall { has_fd, .. }
            | Self::SetVringErr { has_fd, .. } => (usize::from(*has_fd), usize::from(*has_fd)),
            Self::SetLogBase { .. }
            | Self::SetLogFd
            | Self::SetBackendReqFd
            | Self::SetInflightFd(_)
            | Self::AddMemReg(_) => (1, 1),
            // A monitor may send the descriptor of the region that it takes back.
            Self::RemMemReg(_) => (0, 1),
            Self::Unknown(_) => (0, MAX_FDS),
            _ => (0, 0),
        }
    }
}
