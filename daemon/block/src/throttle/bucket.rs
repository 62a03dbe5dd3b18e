//! The buckets: what has been let through lately, leaking at the rate that is allowed.
//!
//! A bucket may be filled past its size by the request that finds room in it; the next one waits until it has leaked
//! down to its size. Without a burst rate the size is a tenth of a second's worth. With one it is the whole burst, and a burst
//! longer than a second has a second bucket that keeps its rate.
//!
//! Levels are counted in billionths of a unit, so that rates times nanoseconds are exact.

use super::Direction;
use super::limits::{Kind, Limit, Limits};

const NANO: u128 = 1_000_000_000;

#[derive(Clone, Copy, Debug, Default)]
struct Bucket {
    limit: Limit,
    level: u128,
    /// Level of the second bucket.
    burst: u128,
}

/// The time until `level` is down to `size` at `rate` units a second.
fn wait(level: u128, size: u128, rate: u64) -> u64 {
    let extra = level.saturating_sub(size);
    u64::try_from(extra.div_ceil(u128::from(rate).max(1))).unwrap_or(u64::MAX)
}

impl Bucket {
    fn leak(&mut self, ns: u64) {
        let leaked = |rate: u64| u128::from(rate) * u128::from(ns);
        self.level = self.level.saturating_sub(leaked(self.limit.avg));
        self.burst = self.burst.saturating_sub(leaked(self.limit.max));
    }

    fn fill(&mut self, units: u128) {
        self.level = self.level.saturating_add(units);
        if self.limit.length > 1 {
            self.burst = self.burst.saturating_add(units);
        }
    }

    fn wait(&self) -> u64 {
        let Limit { avg, max, length } = self.limit;
        if avg == 0 {
            return 0;
        }
        let size = if max == 0 { u128::from(avg) * NANO / 10 } else { u128::from(max) * u128::from(length) * NANO };
        match wait(self.level, size, avg) {
            0 if length > 1 => wait(self.burst, u128::from(max) * NANO / 10, max),
            ns => ns,
        }
    }
}

/// The six buckets of a group.
#[derive(Clone, Debug, Default)]
pub(super) struct Buckets {
    all: [Bucket; 6],
    op_size: u64,
    /// Up to when they have leaked, in nanoseconds.
    now: u64,
}

impl Buckets {
    /// Empty buckets with these limits.
    pub fn new(limits: &Limits, now: u64) -> Self {
        let all = limits.buckets.map(|limit| Bucket { limit, ..Bucket::default() });
        Self { all, op_size: limits.op_size, now }
    }

    /// Lets them leak up to `now`; time that does not move forward changes nothing.
    pub fn advance(&mut self, now: u64) {
        let passed = now.saturating_sub(self.now);
        self.now = self.now.max(now);
        self.all.iter_mut().for_each(|bucket| bucket.leak(passed));
    }

    /// Nanoseconds from the last [`Buckets::advance`] until a request of `direction` may go; 0 if it may now.
    pub fn wait(&self, direction: Direction) -> u64 {
        let counting = self.all.iter().zip(Kind::ALL).filter(|(_, kind)| kind.counts(direction));
        counting.map(|(bucket, _)| bucket.wait()).max().unwrap_or(0)
    }

    /// Counts a request that goes.
    pub fn account(&mut self, direction: Direction, bytes: u64) {
        let (bytes, size) = (u128::from(bytes), u128::from(self.op_size));
        let requests = if size > 0 && bytes > size { bytes * NANO / size } else { NANO };
        for (bucket, kind) in self.all.iter_mut().zip(Kind::ALL).filter(|(_, kind)| kind.counts(direction)) {
            bucket.fill(match kind {
                Kind::Iops(_) => requests,
                Kind::Bps(_) => bytes * NANO,
            });
        }
    }
}
