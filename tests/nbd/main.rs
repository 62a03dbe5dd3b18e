//! The NBD server [drop-in A.6, NBD protocol document].
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]
