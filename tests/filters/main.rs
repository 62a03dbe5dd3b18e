//! Drivers that stand above other nodes and add behaviour, on both programs [drop-in A.7, A.9, A.10].
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

mod blkdebug;
mod fault;
mod leaks;
mod log;
mod passing;
mod quorum;
mod space;
mod throttle;

const MIB: u64 = 1 << 20;
