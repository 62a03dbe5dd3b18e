//! Events on their way from where they happen to the monitors.
//!
//! `emit` never waits: each subscriber has a queue of its own and bounds it by itself. Kinds of events whose rate is limited
//! go through one throttle, whatever the number of monitors. Lives on the main thread.

use qapi::Value;
use qmp::{Event, Throttle};
use std::cell::RefCell;
use std::rc::{Rc, Weak};
use std::time::{Duration, SystemTime};
use tokio::time::Instant;

type Listener = dyn Fn(&Event);

/// The way to all subscribers; clones share it.
#[derive(Clone)]
pub struct Events {
    shared: Rc<Shared>,
}

struct Shared {
    listeners: RefCell<Vec<Weak<Listener>>>,
    throttle: RefCell<Throttle>,
    /// Where the throttle's clock starts.
    start: Instant,
    /// Sends what the throttle holds back. There as long as it holds back something.
    timer: RefCell<Option<tokio::task::JoinHandle<()>>>,
}

impl Default for Events {
    fn default() -> Events {
        Events {
            shared: Rc::new(Shared {
                listeners: RefCell::default(),
                throttle: RefCell::default(),
                start: Instant::now(),
                timer: RefCell::default(),
            }),
        }
    }
}

impl Events {
    /// Tells all subscribers, now or when the limit on this kind of event allows it. Must be called from a local task.
    pub fn emit<E: qapi::Event>(&self, event: &E) {
        let data = match event.to_value() {
            Value::Object(members) => members,
            _ => qapi::Map::new(),
        };
        let event = Event { name: E::NAME, timestamp: SystemTime::now().into(), data };
        let passed = self.shared.throttle.borrow_mut().offer(event, self.shared.now());
        match passed {
            Some(event) => self.shared.deliver(&event),
            None => self.start_timer(),
        }
    }

    /// Has `listener` called for each event from now on, as long as the caller keeps the result.
    #[must_use = "the subscription ends when the result is dropped"]
    pub fn subscribe(&self, listener: impl Fn(&Event) + 'static) -> Rc<dyn Fn(&Event)> {
        let listener: Rc<Listener> = Rc::new(listener);
        self.shared.listeners.borrow_mut().push(Rc::downgrade(&listener));
        listener
    }

    fn start_timer(&self) {
        let mut timer = self.shared.timer.borrow_mut();
        if timer.as_ref().is_some_and(|task| !task.is_finished()) {
            return;
        }
        let shared = Rc::downgrade(&self.shared);
        *timer = Some(tokio::task::spawn_local(async move {
            loop {
                let Some(deadline) = shared.upgrade().and_then(|shared| shared.deadline()) else { return };
                tokio::time::sleep_until(deadline).await;
                let Some(shared) = shared.upgrade() else { return };
                let due = shared.throttle.borrow_mut().due(shared.now());
                for event in &due {
                    shared.deliver(event);
                }
            }
        }));
    }
}

impl Shared {
    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    fn deadline(&self) -> Option<Instant> {
        self.throttle.borrow().deadline().map(|deadline| self.start + deadline)
    }

    fn deliver(&self, event: &Event) {
        // A listener may subscribe or emit, so none is called while the list is borrowed.
        let listeners: Vec<_> = {
            let mut all = self.listeners.borrow_mut();
            all.retain(|listener| listener.strong_count() > 0);
            all.iter().filter_map(Weak::upgrade).collect()
        };
        for listener in listeners {
            listener(event);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use qapi::Qapi;

    /// Stands for the event of the same name.
    #[derive(Debug, Clone, PartialEq, Qapi)]
    #[qapi(event = "QUORUM_FAILURE")]
    struct QuorumFailure {
        /// Tells the events apart.
        reference: String,
    }

    #[tokio::test(start_paused = true)]
    async fn a_burst_is_told_by_its_first_and_its_newest() {
        let local = tokio::task::LocalSet::new();
        local
            .run_until(async {
                let events = Events::default();
                let (sender, mut told) = tokio::sync::mpsc::unbounded_channel();
                let subscription = events.subscribe(move |event| sender.send(event.data.clone()).expect("a listener"));
                for reference in ["first", "second", "third"] {
                    events.emit(&QuorumFailure { reference: reference.into() });
                }
                let start = Instant::now();
                assert_eq!(told.recv().await.expect("an event")["reference"], "first");
                assert_eq!(start.elapsed(), Duration::ZERO);
                assert_eq!(told.recv().await.expect("an event")["reference"], "third");
                assert!(start.elapsed() >= Duration::from_secs(1));
                drop(subscription);
                events.emit(&QuorumFailure { reference: "nobody listens".into() });
                assert_eq!(told.recv().await, None);
            })
            .await;
    }
}
