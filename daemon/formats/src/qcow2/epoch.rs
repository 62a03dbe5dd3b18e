//! Who may still use a cluster: requests enter an epoch, and a cluster that was unlinked in one epoch is given away again
//! only when every request of that epoch and earlier ones has ended.
//!
//! A request resolves an offset and then does I/O there without any lock. Meanwhile a discard may unlink the cluster. It
//! must not be used for anything else until the I/O is over: a late read would see foreign bytes, a late write would
//! destroy them.
//!
//! Two counters suffice: epoch `n + 1` begins only when no request of epoch `n - 1` is left, so those inside belong to the
//! current epoch or the one before it.

use std::sync::atomic::{AtomicU64, Ordering};

/// See the module.
#[derive(Debug, Default)]
pub struct Epochs {
    now: AtomicU64,
    inside: [AtomicU64; 2],
}

/// A request is inside while this lives.
#[derive(Debug)]
pub struct Inside<'a>(&'a AtomicU64);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Epochs {
    fn counter(&self, epoch: u64) -> &AtomicU64 {
        let [even, odd] = &self.inside;
        if epoch.is_multiple_of(2) { even } else { odd }
    }

    /// Enters the current epoch.
    pub fn enter(&self) -> Inside<'_> {
        loop {
            let epoch = self.now.load(Ordering::SeqCst);
            let counter = self.counter(epoch);
            counter.fetch_add(1, Ordering::SeqCst);
            let inside = Inside(counter);
            // Had a new epoch begun in between, it did not know of us.
            if self.now.load(Ordering::SeqCst) == epoch {
                return inside;
            }
        }
    }

    /// The current epoch: what is unlinked before this call may be reused when [`Epochs::passed`] says so of the result.
    pub fn now(&self) -> u64 {
        self.now.load(Ordering::SeqCst)
    }

    /// Begins new epochs as far as possible now. One caller at a time.
    pub fn advance(&self) {
        for _ in 0..2 {
            let epoch = self.now.load(Ordering::SeqCst);
            if self.counter(epoch + 1).load(Ordering::SeqCst) != 0 {
                return;
            }
            self.now.store(epoch + 1, Ordering::SeqCst);
        }
    }

    /// Whether all requests that were inside in `epoch` have ended.
    pub fn passed(&self, epoch: u64) -> bool {
        self.now.load(Ordering::SeqCst) >= epoch + 2
    }
}
