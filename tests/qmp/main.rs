//! The QMP protocol on a socket [drop-in A.2].
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

mod backends;
mod chardevs;
mod clients;
mod descriptors;
mod dialect;
mod leaks;
mod objects;
mod session;

use tests::{Daemon, Setup};

/// A daemon with a monitor and a `null-co` node `n` of 1 MiB.
fn monitored() -> Daemon {
    Setup::new().qmp().line("--blockdev null-co,node-name=n,size=1048576").start()
}
