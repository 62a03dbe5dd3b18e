//! [`Gate`]: counts requests in and can be closed.
//!
//! A request enters before it touches the graph and leaves when it is complete. A drain closes the gate, waits until
//! nothing is inside, changes what it has to change and opens it again. Closing nests. Model-checked with loom (see the
//! tests at the end): no request is inside while a drain believes it is empty, and no wake-up is lost.
//!
//! The word holds the number of requests inside in its lower half and the number of closings in its upper half. Wakers are
//! kept in a list under a lock that only the slow paths take; whoever has to wait puts its waker there *before* it looks at
//! the word again.

#[cfg(loom)]
use loom::sync::{Mutex, MutexGuard, atomic::AtomicU64, atomic::Ordering};
#[cfg(not(loom))]
use std::sync::{Mutex, MutexGuard, atomic::AtomicU64, atomic::Ordering};

use std::future::poll_fn;
use std::sync::PoisonError;
use std::task::{Context, Poll, Waker};

const CLOSED: u64 = 1 << 32;
const INSIDE: u64 = CLOSED - 1;

/// See the module.
#[derive(Debug)]
pub struct Gate {
    word: AtomicU64,
    /// Who waits to enter, or for the gate to be empty. Never held across an await.
    waiting: Mutex<Vec<Waker>>,
}

impl Default for Gate {
    fn default() -> Self {
        Self { word: AtomicU64::new(0), waiting: Mutex::new(Vec::new()) }
    }
}

/// A request is inside while this lives.
#[derive(Debug)]
pub struct Entered<'a>(&'a Gate);

impl Gate {
    /// Enters at once, or returns none while the gate is closed.
    pub fn try_enter(&self) -> Option<Entered<'_>> {
        // Those who wait at a closed gate must not count themselves in and out: each would wake all others.
        if self.word.load(Ordering::Acquire) >= CLOSED {
            return None;
        }
        let before = self.word.fetch_add(1, Ordering::AcqRel);
        let entered = Entered(self);
        // When it was closed in between, the drop of `entered` takes the count back and wakes a drain that saw it.
        (before < CLOSED).then_some(entered)
    }

    /// Enters, waiting while the gate is closed.
    pub async fn enter(&self) -> Entered<'_> {
        if let Some(entered) = self.try_enter() {
            return entered;
        }
        poll_fn(|cx| self.poll_or_wait(cx, |gate| gate.try_enter())).await
    }

    /// Closes the gate: who is inside stays, nobody else enters. Each closing needs its own [`Gate::open`].
    pub fn close(&self) {
        self.word.fetch_add(CLOSED, Ordering::AcqRel);
    }

    /// Takes one closing back.
    pub fn open(&self) {
        let before = self.word.fetch_sub(CLOSED, Ordering::AcqRel);
        debug_assert!(before >= CLOSED, "opened more often than closed");
        if before & !INSIDE == CLOSED {
            self.wake_all();
        }
    }

    /// Waits until nothing is inside. Meaningful while the gate is closed.
    pub async fn empty(&self) {
        poll_fn(|cx| self.poll_or_wait(cx, |gate| (gate.inside() == 0).then_some(()))).await;
    }

    /// The number of requests inside now.
    pub fn inside(&self) -> u64 {
        self.word.load(Ordering::Acquire) & INSIDE
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Waker>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `ask`, and if it says no leave the waker and ask once more, so that a change in between is seen.
    fn poll_or_wait<'a, T>(&'a self, cx: &mut Context<'_>, ask: impl Fn(&'a Self) -> Option<T>) -> Poll<T> {
        if let Some(done) = ask(self) {
            return Poll::Ready(done);
        }
        {
            let mut waiting = self.lock();
            if !waiting.iter().any(|w| w.will_wake(cx.waker())) {
                waiting.push(cx.waker().clone());
            }
        }
        ask(self).map_or(Poll::Pending, Poll::Ready)
    }

    fn wake_all(&self) {
        let wakers = std::mem::take(&mut *self.lock());
        wakers.into_iter().for_each(Waker::wake);
    }
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let before = self.0.word.fetch_sub(1, Ordering::AcqRel);
        if before >= CLOSED && before & INSIDE == 1 {
            self.0.wake_all();
        }
    }
}

#[cfg(all(test, loom))]
mod model {
    use super::*;
    use loom::future::block_on;
    use loom::sync::Arc;
    use loom::sync::atomic::AtomicUsize;
    use loom::thread;

    /// Explores all interleavings with up to three preemptions: enough for every known kind of lost wake-up, and it ends.
    fn model(run: impl Fn() + Sync + Send + 'static) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(3);
        builder.check(run);
    }

    /// Two requests against one drain: the drain never sees one inside, and all three end.
    #[test]
    fn a_drain_excludes_requests_and_everybody_ends() {
        model(|| {
            let gate = Arc::new(Gate::default());
            let busy = Arc::new(AtomicUsize::new(0));
            let requests: Vec<_> = (0..2)
                .map(|_| {
                    let (gate, busy) = (gate.clone(), busy.clone());
                    thread::spawn(move || {
                        let inside = block_on(gate.enter());
                        busy.fetch_add(1, Ordering::Relaxed);
                        busy.fetch_sub(1, Ordering::Relaxed);
                        drop(inside);
                    })
                })
                .collect();
            gate.close();
            block_on(gate.empty());
            assert_eq!(busy.load(Ordering::Relaxed), 0);
            gate.open();
            requests.into_iter().for_each(|r| r.join().unwrap());
            assert_eq!(gate.inside(), 0);
        });
    }

    /// Closings nest: a request enters only after both have been taken back.
    #[test]
    fn closings_nest() {
        model(|| {
            let gate = Arc::new(Gate::default());
            gate.close();
            gate.close();
            let other = gate.clone();
            let request = thread::spawn(move || drop(block_on(other.enter())));
            gate.open();
            block_on(gate.empty());
            assert!(gate.try_enter().is_none());
            gate.open();
            request.join().unwrap();
        });
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn counts_and_closes() {
        let gate = Gate::default();
        let a = gate.try_enter().unwrap();
        gate.close();
        assert!(gate.try_enter().is_none());
        assert_eq!(gate.inside(), 1);
        drop(a);
        assert_eq!(gate.inside(), 0);
        gate.open();
        assert!(gate.try_enter().is_some());
    }
}
