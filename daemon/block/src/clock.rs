//! [`Clock`]: the time as the block layer sees it, so that tests can move it instead of waiting.

use crate::driver::LocalFuture;
use std::fmt::Debug;
use std::time::{Duration, Instant};

/// A monotonic clock.
pub trait Clock: Debug + Send + Sync + 'static {
    /// Nanoseconds since some moment before.
    fn now(&self) -> u64;

    /// Completes at `at` or later, never before; `at` is on the scale of [`Clock::now`]. On the calling task's thread.
    fn sleep_until(&self, at: u64) -> LocalFuture<'static, ()>;
}

/// The host's monotonic clock and the timers of the event loop, which tick in milliseconds and round up.
#[derive(Clone, Copy, Debug)]
pub struct SystemClock {
    origin: Instant,
}

impl Default for SystemClock {
    fn default() -> Self {
        Self { origin: Instant::now() }
    }
}

impl Clock for SystemClock {
    fn now(&self) -> u64 {
        u64::try_from(self.origin.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn sleep_until(&self, at: u64) -> LocalFuture<'static, ()> {
        let at = self.origin.checked_add(Duration::from_nanos(at));
        Box::pin(async move {
            match at {
                Some(at) => tokio::time::sleep_until(at.into()).await,
                // Later than the host can say.
                None => std::future::pending().await,
            }
        })
    }
}
