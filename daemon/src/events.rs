//! Events on their way from where they happen to the monitors.
//!
//! `emit` never waits: each subscriber has a queue of its own and bounds it by itself. Kinds of events whose rate is limited
//! go through one throttle, whatever the number of monitors. Lives on the main thread.

use block::{Report, Reporter};
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
        self.emit_of(SystemTime::now(), event);
    }

    /// The same of something that happened at `time`.
    fn emit_of<E: qapi::Event>(&self, time: SystemTime, event: &E) {
        let data = match event.to_value() {
            Value::Object(members) => members,
            _ => qapi::Map::new(),
        };
        let event = Event { name: E::NAME, timestamp: time.into(), data };
        let passed = self.shared.throttle.borrow_mut().offer(event, self.shared.now());
        match passed {
            Some(event) => self.shared.deliver(&event),
            None => self.start_timer(),
        }
    }

    /// Tells all subscribers what drivers and exports report, for as long as the task that is returned runs.
    pub fn tell_reports(&self, reporter: Reporter) -> tokio::task::JoinHandle<()> {
        let events = self.clone();
        tokio::task::spawn_local(async move {
            let mut known_lost = 0;
            loop {
                let (time, report) = reporter.next().await;
                events.emit_report(time, &report);
                let lost = reporter.lost();
                if lost > known_lost {
                    tracing::warn!(target: "block_reports_lost", lost, "events of block nodes are lost: too many at once");
                    known_lost = lost;
                }
            }
        })
    }

    /// Tells all subscribers what is waiting to be told, before what the caller says next.
    pub fn flush_reports(&self, reporter: &Reporter) {
        while let Some((time, report)) = reporter.try_next() {
            self.emit_report(time, &report);
        }
    }

    fn emit_report(&self, time: SystemTime, report: &Report) {
        match report {
            Report::ImageCorrupted(event) => self.emit_of(time, event),
            Report::IoError(event) => self.emit_of(time, event),
            Report::QuorumFailure(event) => self.emit_of(time, event),
            Report::QuorumReportBad(event) => self.emit_of(time, event),
            Report::WriteThreshold(event) => self.emit_of(time, event),
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
    use qapi::types::block_event::QuorumFailure;

    fn failure(reference: &str) -> QuorumFailure {
        QuorumFailure { reference: reference.into(), sector_num: 0, sectors_count: 1 }
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
                    events.emit(&failure(reference));
                }
                let start = Instant::now();
                assert_eq!(told.recv().await.expect("an event")["reference"], "first");
                assert_eq!(start.elapsed(), Duration::ZERO);
                assert_eq!(told.recv().await.expect("an event")["reference"], "third");
                assert!(start.elapsed() >= Duration::from_secs(1));
                drop(subscription);
                events.emit(&failure("nobody listens"));
                assert_eq!(told.recv().await, None);
            })
            .await;
    }

    #[tokio::test(start_paused = true)]
    async fn what_any_thread_reports_is_told() {
        let local = tokio::task::LocalSet::new();
        local
            .run_until(async {
                let events = Events::default();
                let reporter = Reporter::default();
                let (sender, mut told) = tokio::sync::mpsc::unbounded_channel();
                let _subscription = events.subscribe(move |event| sender.send(event.clone()).expect("a listener"));
                let task = events.tell_reports(reporter.clone());
                let other = reporter.clone();
                let thread = std::thread::spawn(move || other.report(Report::QuorumFailure(failure("q"))));
                let event = told.recv().await.expect("an event");
                assert_eq!((event.name, event.data["reference"].as_str()), ("QUORUM_FAILURE", Some("q")));
                thread.join().expect("a thread that ends");
                task.abort();
            })
            .await;
    }
}
