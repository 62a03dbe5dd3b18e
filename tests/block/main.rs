//! The block graph through QMP [drop-in A.3, A.5, A.7].
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]
