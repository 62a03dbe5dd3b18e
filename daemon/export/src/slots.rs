//! A bounded set of futures in places that are used again and again.
//!
//! Each request of a connection, or of a thread of a FUSE export, is one future. It is polled once where it is started, so that one which need not wait costs
//! no task and no allocation; one that waits stays in its place until it is done. A place has its own waker, so that only
//! what can make progress is polled. The set belongs to one task; it never drops a future that is not done, except
//! when the whole task is dropped.

use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

/// The most futures in a set, and so the most requests of a connection that are being served.
pub(crate) const MAX_SLOTS: usize = 128;

const WORD: usize = 64;
/// One word more than the slots need: for other things that the task waits for.
const WORDS: usize = MAX_SLOTS / WORD + 1;

/// Which places were woken since the task last looked, and the task.
#[derive(Debug)]
struct Woken {
    words: [AtomicU64; WORDS],
    /// Guards the waker of the task. Never held across an await.
    task: Mutex<Option<Waker>>,
}

#[derive(Debug)]
struct PlaceWaker {
    woken: Arc<Woken>,
    place: usize,
}

impl Wake for PlaceWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let Some(word) = self.woken.words.get(self.place / WORD) else { return };
        // Whoever sets the first bit of a word wakes the task, which takes all bits of the word at once.
        if word.fetch_or(1 << (self.place % WORD), Ordering::AcqRel) == 0 {
            let task = self.woken.task.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(task) = task.as_ref() {
                task.wake_by_ref();
            }
        }
    }
}

struct Slot<F> {
    future: Pin<Box<Option<F>>>,
    waker: Waker,
}

/// The set.
pub(crate) struct Slots<F> {
    slots: Vec<Slot<F>>,
    free: Vec<usize>,
    woken: Arc<Woken>,
}

impl<F: Future> Slots<F> {
    pub(crate) fn new() -> Self {
        let words = std::array::from_fn(|_| AtomicU64::new(0));
        let woken = Arc::new(Woken { words, task: Mutex::new(None) });
        Self { slots: Vec::new(), free: Vec::new(), woken }
    }

    /// Futures that are not done.
    pub(crate) fn busy(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(crate) fn is_full(&self) -> bool {
        self.busy() >= MAX_SLOTS
    }

    /// Tells the set which task to wake. To be called at the start of each poll of the task.
    pub(crate) fn register(&self, task: &Waker) {
        let mut place = self.woken.task.lock().unwrap_or_else(PoisonError::into_inner);
        if !place.as_ref().is_some_and(|old| old.will_wake(task)) {
            *place = Some(task.clone());
        }
    }

    fn waker(&self, place: usize) -> Waker {
        Waker::from(Arc::new(PlaceWaker { woken: Arc::clone(&self.woken), place }))
    }

    /// A waker for something else that the task waits for; [`extra_woken`](Self::extra_woken) says that it was used.
    pub(crate) fn extra_waker(&self) -> Waker {
        self.waker(MAX_SLOTS)
    }

    /// Whether the extra waker was used since the last call.
    pub(crate) fn extra_woken(&self) -> bool {
        self.woken
            .words
            .last()
            .is_some_and(|word| word.load(Ordering::Relaxed) != 0 && word.swap(0, Ordering::AcqRel) != 0)
    }

    /// Starts a future. Its result comes back at once if it need not wait. The set must not be full.
    pub(crate) fn start(&mut self, future: F) -> Option<F::Output> {
        let place = self.free.pop().unwrap_or_else(|| {
            let waker = self.waker(self.slots.len());
            self.slots.push(Slot { future: Box::pin(None), waker });
            self.slots.len() - 1
        });
        let slot = self.slots.get_mut(place)?;
        slot.future.set(Some(future));
        self.poll(place)
    }

    fn poll(&mut self, place: usize) -> Option<F::Output> {
        let slot = self.slots.get_mut(place)?;
        let future = slot.future.as_mut().as_pin_mut()?;
        match future.poll(&mut Context::from_waker(&slot.waker)) {
            Poll::Pending => None,
            Poll::Ready(output) => {
                slot.future.set(None);
                self.free.push(place);
                Some(output)
            }
        }
    }

    /// Polls what was woken and hands each result to `done`; says whether there was any.
    pub(crate) fn poll_woken(&mut self, mut done: impl FnMut(F::Output)) -> bool {
        let mut any = false;
        for word in 0..WORDS - 1 {
            let Some(woken) = self.woken.words.get(word) else { continue };
            if woken.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let mut bits = woken.swap(0, Ordering::AcqRel);
            while bits != 0 {
                let bit = usize::try_from(bits.trailing_zeros()).unwrap_or(0);
                bits &= bits - 1;
                if let Some(output) = self.poll(word * WORD + bit) {
                    any = true;
                    done(output);
                }
            }
        }
        any
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::oneshot;

    #[tokio::test]
    async fn futures_complete_in_any_order_and_places_are_reused() {
        let mut slots = Slots::new();
        let wait = |rx: oneshot::Receiver<u32>| async move { rx.await.unwrap_or(0) };
        let (tx, rx) = oneshot::channel();
        tx.send(7).unwrap();
        assert_eq!(slots.start(wait(rx)), Some(7), "need not wait");
        assert_eq!(slots.busy(), 0);
        let mut senders = Vec::new();
        for _ in 0..MAX_SLOTS {
            let (tx, rx) = oneshot::channel();
            assert_eq!(slots.start(wait(rx)), None);
            senders.push(tx);
        }
        assert!(slots.is_full());
        let mut got = Vec::new();
        let expected: Vec<u32> = (0..128).rev().collect();
        std::future::poll_fn(|cx| {
            slots.register(cx.waker());
            // From the last place to the first, one each time that the task is woken.
            slots.poll_woken(|v| got.push(v));
            match senders.pop() {
                Some(tx) => tx.send(u32::try_from(senders.len()).unwrap()).unwrap(),
                None if got.len() == MAX_SLOTS => return Poll::Ready(()),
                None => {}
            }
            Poll::Pending
        })
        .await;
        assert_eq!(got, expected);
        assert_eq!((slots.busy(), slots.slots.len()), (0, MAX_SLOTS));
        assert!(!slots.extra_woken());
        slots.extra_waker().wake();
        assert!(slots.extra_woken() && !slots.extra_woken());
    }
}
