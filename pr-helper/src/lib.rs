//! qemu-pr-helper: issues SCSI PERSISTENT RESERVE commands for clients that may not.
//!
//! The privileged half of the suite, so small that it can be read. A client sends a command and a device's descriptor
//! ([`ipc`]); a few kinds of threads, each with a filter of its own, serve it:
//!
//! * *wire* ([`server`], [`classic`], [`frames`]): reads what clients send, asks the [`policy`]; cannot touch a device;
//! * *worker* ([`pool`], [`device`], [`scsi_device`], [`kernel_pr`], [`sg_io`]): waits for a device; cannot touch
//!   anything else;
//! * *logger* ([`log`]): writes lines; *closer* ([`foreign`]): closes what clients sent.
//!
//! [`run::run`] is the order in which all this starts and ends.

mod classic;
pub mod device;
pub mod foreign;
mod frames;
mod kernel_pr;
mod listen;
pub mod log;
mod notify;
pub mod options;
mod peer;
pub mod policy;
pub mod pool;
pub mod run;
mod scsi_device;
pub mod server;
pub mod sg_io;
pub mod shares;
pub mod trace;
