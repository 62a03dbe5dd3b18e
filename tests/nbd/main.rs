//! The NBD server [drop-in A.6, NBD protocol document].
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

mod crash;
mod differential;
mod errors;
mod handshake;
mod hostile;
mod interop;
mod lifecycle;
mod threads;
mod transmission;

/// The protocol's numbers for errors, which are not always those of this machine [NBD §Error values].
mod errno {
    pub const EPERM: u32 = 1;
    pub const EINVAL: u32 = 22;
    pub const ENOSPC: u32 = 28;
    pub const EOVERFLOW: u32 = 75;
    pub const ENOTSUP: u32 = 95;
}
