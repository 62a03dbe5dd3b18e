//! The daemon's sandbox: what is in force, what still works under it, and what an intruder can do from each thread.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

#[cfg(target_arch = "x86_64")]
mod drill;
mod modes;
mod serving;
mod strict;
#[cfg(target_arch = "x86_64")]
mod tracee;
