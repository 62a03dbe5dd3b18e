//! A virtio block device, whatever carries it to its driver: `[virtio 1.2]` is the OASIS standard. Each transport
//! ([`vhost_user_blk`](crate::vhost_user_blk), [`vduse`](crate::vduse)) says where rings and memory lie and how an interrupt is
//! raised; the rest is here.
//!
//! | module | noun |
//! | --- | --- |
//! | `options` | what the user says of it |
//! | `config` | features and configuration space |
//! | `ring` | a virtqueue in the guest's memory |
//! | `request` | one request against the disk |
//! | `inflight`, `log` | what others read: requests in flight, pages that were written to |
//! | `queue` | a running ring |
//! | `vring` | one queue, running or not |
//!
//! The guest is hostile: its memory is reached through [`buf::GuestMemory`] only, by checked copies and single loads; this
//! crate has no unsafe code. Data goes between the guest's memory and the file without a copy.

pub(crate) mod config;
pub(crate) mod inflight;
pub(crate) mod log;
pub(crate) mod options;
pub(crate) mod queue;
pub(crate) mod request;
pub(crate) mod ring;
pub(crate) mod vring;

#[cfg(any(test, fuzzing))]
pub mod fuzz;
