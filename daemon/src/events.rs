//! Events on their way from where they happen to the monitors.
//!
//! `emit` never waits: each subscriber has a queue of its own and bounds it by itself. Lives on the main thread.

use qapi::{Event, Value};
use std::cell::RefCell;
use std::rc::{Rc, Weak};
use std::time::SystemTime;

/// Something that happened.
#[derive(Debug, Clone)]
pub struct Happened {
    /// Its name on the wire.
    pub name: &'static str,
    /// Its data, an object.
    pub data: Value,
    /// When.
    pub time: SystemTime,
}

type Listener = dyn Fn(&Happened);

/// The way to all subscribers; clones share it.
#[derive(Clone, Default)]
pub struct Events {
    listeners: Rc<RefCell<Vec<Weak<Listener>>>>,
}

impl Events {
    /// Tells all subscribers.
    pub fn emit<E: Event>(&self, event: &E) {
        let happened = Happened { name: E::NAME, data: event.to_value(), time: SystemTime::now() };
        let listeners: Vec<_> = {
            let mut all = self.listeners.borrow_mut();
            all.retain(|listener| listener.strong_count() > 0);
            all.iter().filter_map(Weak::upgrade).collect()
        };
        for listener in listeners {
            listener(&happened);
        }
    }

    /// Has `listener` called for each event from now on, as long as the caller keeps the result.
    #[must_use = "the subscription ends when the result is dropped"]
    pub fn subscribe(&self, listener: impl Fn(&Happened) + 'static) -> Rc<dyn Fn(&Happened)> {
        let listener: Rc<Listener> = Rc::new(listener);
        self.listeners.borrow_mut().push(Rc::downgrade(&listener));
        listener
    }
}
