//! The testkit: starts the daemon under test, speaks QMP and NBD to it, and runs the programs of others against it.
//!
//! The same tests run on this project's daemon and on the reference: `QSD_UNDER_TEST=/usr/bin/qemu-storage-daemon`
//! picks the program; by default it is the one that cargo built next to the test executable. A helper here fails by
//! panicking, as a test does. Nothing here sleeps for a state: every wait polls for the state itself, up to
//! [`DEADLINE`].
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::missing_panics_doc,
    reason = "a helper of tests fails by panicking"
)]

pub mod blkdriver;
pub mod daemon;
pub mod image;
pub mod lingering;
pub mod locks;
pub mod nbd;
pub mod program;
pub mod qmp;
pub mod tools;
pub mod vhost;

pub use daemon::{Daemon, Setup, Usage};
pub use program::{known_defect, on_reference};

use std::time::{Duration, Instant};

/// How long a test waits for anything that must happen, before it calls that a failure. Long, because machines under
/// load are slow and a passing test never waits for it.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// Polls `state` until it gives a value; panics with `what` when [`DEADLINE`] has passed.
pub fn wait_for<T>(what: &str, state: impl FnMut() -> Option<T>) -> T {
    wait_within(DEADLINE, state).unwrap_or_else(|| panic!("waited {DEADLINE:?} in vain: {what}"))
}

/// Polls `state` until it gives a value or `limit` has passed.
pub fn wait_within<T>(limit: Duration, mut state: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + limit;
    loop {
        if let Some(value) = state() {
            return Some(value);
        }
        if Instant::now() > end {
            return None;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Raises a flag at the end of its scope, also at that of a test that fails: for threads that work until then.
#[derive(Debug)]
pub struct RaisedAtEnd<'a>(pub &'a std::sync::atomic::AtomicBool);

impl Drop for RaisedAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, std::sync::atomic::Ordering::Relaxed);
    }
}

/// Ends the test early and says why, on the test's output and in the file that `TESTS_NOTES` names.
#[macro_export]
macro_rules! skip {
    ($($reason:tt)*) => {{
        $crate::program::note("SKIP", &format!("{}:{}: {}", file!(), line!(), format!($($reason)*)));
        return;
    }};
}
