//! The QMP protocol on a socket [drop-in A.2].
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]
