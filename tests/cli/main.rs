//! The command line: order, errors, exit codes, pid file, daemonize, descriptors, signals [drop-in A.1].
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

mod errors;
mod life;
mod service;
mod sockets;
