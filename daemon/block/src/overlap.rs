//! Serialises requests on overlapping bytes, where a read-modify-write could lose somebody else's bytes.
//!
//! Writes register as ordinary, a read-modify-write as exclusive over the alignment units that it touches. An exclusive one
//! waits for all overlapping ones that came before it, an ordinary one for the overlapping exclusive ones before it. Each
//! waits only for older ones, so there is no deadlock as long as nobody waits for a second place while it holds one in the same
//! list. Of the nodes only those with a request alignment above one byte use it.
//!
//! The lock guards the list of requests in flight; never across an await.

use crate::driver::Span;
use std::future::poll_fn;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

struct Entry {
    id: u64,
    span: Span,
    exclusive: bool,
    waiters: Vec<Waker>,
}

#[derive(Default)]
struct State {
    next: u64,
    list: Vec<Entry>,
}

/// The requests in flight on one node, or on one table of a format.
#[derive(Default)]
pub struct Overlap {
    state: Mutex<State>,
}

impl std::fmt::Debug for Overlap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Overlap").field("in_flight", &self.lock().list.len()).finish()
    }
}

impl std::fmt::Debug for Reservation<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reservation").field("id", &self.id).finish()
    }
}

/// A place in the list; leaving it lets the next ones go.
pub struct Reservation<'a> {
    overlap: &'a Overlap,
    id: u64,
}

impl Overlap {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nothing older conflicts, then holds `span` until the reservation is dropped.
    pub async fn reserve(&self, span: Span, exclusive: bool) -> Reservation<'_> {
        let id = {
            let mut state = self.lock();
            let id = state.next;
            state.next += 1;
            state.list.push(Entry { id, span, exclusive, waiters: Vec::new() });
            id
        };
        let mine = Reservation { overlap: self, id };
        poll_fn(|cx| {
            let mut state = self.lock();
            let older = state
                .list
                .iter_mut()
                .find(|e| e.id < id && (exclusive || e.exclusive) && e.span.at < span.end() && span.at < e.span.end());
            match older {
                Some(entry) => {
                    if !entry.waiters.iter().any(|w| w.will_wake(cx.waker())) {
                        entry.waiters.push(cx.waker().clone());
                    }
                    Poll::Pending
                }
                None => Poll::Ready(()),
            }
        })
        .await;
        mine
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        let waiters = {
            let mut state = self.overlap.lock();
            match state.list.iter().position(|e| e.id == self.id) {
                Some(i) => state.list.swap_remove(i).waiters,
                None => Vec::new(),
            }
        };
        waiters.into_iter().for_each(Waker::wake);
    }
}
