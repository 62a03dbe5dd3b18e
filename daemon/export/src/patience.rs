//! Whether a task that has nothing to do looks for more requests of its client once again, or sleeps.
//!
//! A client with one request at a time sends the next as soon as it has the reply, some microseconds later. To fall asleep
//! and be woken takes longer than that and costs as much as to keep looking. So a task whose client was quick last time
//! keeps looking for a short while, letting other tasks of the thread run in between. Where that was in vain it is
//! tried ever more rarely, so that a slow client, or a machine with too few processors, costs next to nothing.
//!
//! For NBD connections on the daemon's first thread, and FUSE exports on any thread whose properties do not tell how long it looks for
//! events. Decides about time and does no I/O.

use std::time::{Duration, Instant};

/// The most pauses that are slept through after one in which looking was in vain.
const MOST_SKIPPED: u32 = 1024;

#[derive(Debug)]
enum Pause {
    None,
    /// Since then, looking.
    Looking(Instant),
    /// Since then, and sleeping is fine.
    Asleep(Instant),
}

/// The state of one client.
#[derive(Debug)]
pub(crate) struct Patience {
    limit: Duration,
    pause: Pause,
    /// The last pause was short.
    quick: bool,
    /// Pauses to sleep through before it is worth another try.
    skip: u32,
    /// What `skip` becomes after the next try in vain.
    next_skip: u32,
}

impl Patience {
    /// `limit` is how long to keep looking. A client that took no longer than twice as long, the sleep included, may be quick enough.
    pub(crate) fn new(limit: Duration) -> Self {
        Self { limit, pause: Pause::None, quick: false, skip: 0, next_skip: 1 }
    }

    /// There is nothing to do: whether to look again rather than to sleep.
    pub(crate) fn look_again(&mut self, now: Instant) -> bool {
        match self.pause {
            Pause::None => {
                let look = self.quick && self.skip == 0;
                self.skip = self.skip.saturating_sub(1);
                self.pause = if look { Pause::Looking(now) } else { Pause::Asleep(now) };
                look
            }
            Pause::Looking(since) if now.saturating_duration_since(since) < self.limit => true,
            Pause::Looking(since) => {
                self.skip = self.next_skip;
                self.next_skip = (self.next_skip * 2).min(MOST_SKIPPED);
                self.pause = Pause::Asleep(since);
                false
            }
            Pause::Asleep(_) => false,
        }
    }

    /// There is something to do.
    pub(crate) fn found(&mut self, now: impl FnOnce() -> Instant) {
        match std::mem::replace(&mut self.pause, Pause::None) {
            Pause::None => {}
            Pause::Looking(_) => {
                self.quick = true;
                self.next_skip = 1;
            }
            Pause::Asleep(since) => self.quick = now().saturating_duration_since(since) < self.limit * 2,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_micros(32);
    const US: Duration = Duration::from_micros(1);

    /// One pause of `len`, looked at each microsecond; for how long it was looked.
    fn pause(patience: &mut Patience, now: &mut Instant, len: Duration) -> Duration {
        let start = *now;
        let mut looked = Duration::ZERO;
        while *now - start < len && patience.look_again(*now) {
            *now += US;
            looked += US;
        }
        *now = start + len;
        patience.found(|| *now);
        looked
    }

    #[test]
    fn a_quick_client_is_waited_for() {
        let (mut patience, mut now) = (Patience::new(LIMIT), Instant::now());
        assert_eq!(pause(&mut patience, &mut now, 10 * US), Duration::ZERO, "not known to be quick yet");
        for _ in 0..100 {
            assert_eq!(pause(&mut patience, &mut now, 10 * US), 10 * US);
        }
        assert_eq!(pause(&mut patience, &mut now, 1000 * US), LIMIT);
        for _ in 0..100 {
            assert_eq!(pause(&mut patience, &mut now, 1000 * US), Duration::ZERO);
        }
    }

    /// A client that would be quick if it was let run: looking is in vain, however short its pauses are.
    #[test]
    fn looking_in_vain_becomes_rare() {
        let (mut patience, mut now) = (Patience::new(LIMIT), Instant::now());
        let mut looked = Duration::ZERO;
        for _ in 0..10_000 {
            looked += pause(&mut patience, &mut now, 40 * US);
        }
        assert!(looked <= 20 * LIMIT, "{looked:?}");
        assert!(looked >= 10 * LIMIT, "it is tried again now and then: {looked:?}");
    }
}
