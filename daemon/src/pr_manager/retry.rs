//! When to connect again: soon while requests wait, ever more rarely while none do.

use super::Limits;
use std::time::{Duration, Instant};

/// The pauses between attempts.
pub struct Retry {
    limits: Limits,
    pause: Duration,
}

/// When the next attempt is due.
#[derive(Clone, Copy)]
pub struct Next {
    now: Instant,
    urgent: Duration,
    idle: Duration,
}

impl Retry {
    /// As after the first attempt.
    pub fn new(limits: Limits) -> Self {
        Self { limits, pause: limits.retry }
    }

    /// An attempt that began at `started` has failed, or the connection that it made has ended.
    pub fn after(&mut self, started: Instant) -> Next {
        let now = Instant::now();
        if now - started > self.limits.longest_retry {
            self.pause = self.limits.retry;
        }
        let idle = self.pause;
        self.pause = (self.pause * 2).min(self.limits.longest_retry);
        Next { now, urgent: self.limits.retry, idle }
    }
}

impl Next {
    /// How long to wait from now on; none if it is due.
    pub fn left(&self, waiting: bool) -> Option<Duration> {
        let pause = if waiting { self.urgent } else { self.idle };
        pause.checked_sub(self.now.elapsed()).filter(|left| !left.is_zero())
    }
}
