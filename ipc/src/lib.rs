//! The protocols between the daemon, QEMU and the persistent-reservation helper.
//!
//! One Unix stream socket serves two protocols. The helper speaks first, with a word of feature bits; the client
//! answers with the bits it wants. A client that wants none (QEMU's `pr-manager-helper`) speaks the *classic* protocol
//! ([`classic`]): a bare SCSI CDB with a descriptor, one at a time. A client that asks for [`classic::FEATURE_FRAMES`]
//! speaks *frames* ([`frame`]): bincode messages with a length, request ids that overlap, typed actions and results.
//!
//! Both carry the same thing, SCSI persistent reservations, which [`scsi`] models once: service actions, parameter
//! lists, parameter data, sense. [`fds`] passes descriptors, [`client`] is the blocking client of both protocols. [`kernel`]
//! is the same as Linux's own interface has it, which both sides use where it serves.
//!
//! Nothing here opens a device or decides who may do what: that is the helper's.
#![forbid(unsafe_code)]

pub mod classic;
pub mod client;
pub mod fds;
pub mod frame;
pub mod kernel;
pub mod scsi;
