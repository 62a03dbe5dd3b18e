//! [`Lifetime`]: the end of an export, which has the same two steps in each kind: it is asked for, and then all who are part of the
//! export leave.
//!
//! An export owns one. Who is part of it, a client or a task, holds an [`Inside`] from [`Lifetime::enter`] for as long as it uses the disk,
//! and watches [`Lifetime::ending`]. [`crate::Export::request_shutdown`] is [`Lifetime::end`], [`crate::Export::closed`] is
//! [`Lifetime::ended`]. What is awaited here does not need the export to live.

use crate::Closed;
use tokio::sync::watch;

/// Whether the end was asked for, and how many are part of the export.
#[derive(Debug)]
pub struct Lifetime {
    ending: watch::Sender<bool>,
    inside: watch::Sender<usize>,
}

/// One who is part of an export, counted as long as this lives.
#[derive(Debug)]
pub(crate) struct Inside(watch::Sender<usize>);

impl Lifetime {
    /// An export with nobody inside.
    pub(crate) fn new() -> Self {
        Self { ending: watch::Sender::new(false), inside: watch::Sender::new(0) }
    }

    /// One more is inside.
    pub(crate) fn enter(&self) -> Inside {
        self.inside.send_modify(|inside| *inside += 1);
        Inside(self.inside.clone())
    }

    /// How many are inside.
    pub(crate) fn inside(&self) -> usize {
        *self.inside.borrow()
    }

    /// Waits until so few are inside.
    pub(crate) fn at_most(&self, count: usize) -> impl Future<Output = ()> + use<> {
        until(self.inside.subscribe(), move |inside| *inside <= count)
    }

    /// Asks for the end.
    pub(crate) fn end(&self) {
        self.ending.send_replace(true);
    }

    /// Whether the end was asked for.
    pub(crate) fn is_ending(&self) -> bool {
        *self.ending.borrow()
    }

    /// Waits until the end is asked for.
    pub(crate) fn ending(&self) -> impl Future<Output = ()> + use<> {
        until(self.ending.subscribe(), |ending| *ending)
    }

    /// True once the end was asked for.
    pub(crate) fn watch(&self) -> watch::Receiver<bool> {
        self.ending.subscribe()
    }

    /// Waits until the end is asked for, and then until nobody is inside.
    pub(crate) fn ended(&self) -> Closed {
        let (ending, empty) = (self.ending(), self.at_most(0));
        Box::pin(async move {
            ending.await;
            empty.await;
        })
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        self.0.send_modify(|inside| *inside -= 1);
    }
}

async fn until<T>(mut receiver: watch::Receiver<T>, so: impl FnMut(&T) -> bool) {
    // An error means that the export is gone, with all who were inside.
    let _ = receiver.wait_for(so).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::task::{Context, Waker};

    fn is_over(closed: &mut Closed) -> bool {
        closed.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready()
    }

    #[test]
    fn an_export_has_ended_when_the_last_one_left_after_the_end_was_asked_for() {
        let lifetime = Lifetime::new();
        let mut closed = lifetime.ended();
        drop(lifetime.enter());
        assert!(!is_over(&mut closed), "nobody asked for the end");
        let (one, two) = (lifetime.enter(), lifetime.enter());
        assert_eq!(lifetime.inside(), 2);
        lifetime.end();
        assert!(lifetime.is_ending() && !is_over(&mut closed));
        drop(one);
        assert!(!is_over(&mut closed));
        drop(lifetime);
        assert!(!is_over(&mut closed), "who is inside outlives the export");
        drop(two);
        assert!(is_over(&mut closed));
    }
}
