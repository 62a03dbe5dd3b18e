//! Events and the limits on their rate [QMP spec §Asynchronous events].
//!
//! A [`Throttle`] stands once in the daemon, before the events are handed to the sessions, and holds back kinds of events
//! that a broken disk could raise thousands of times a second. It owns the events that wait; time is an argument.

use std::collections::HashMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

/// When something happened, in the time of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp {
    /// Whole seconds since 1970. -1 where the host could not tell.
    pub seconds: i64,
    /// The rest, 0 to 999999. -1 where the host could not tell.
    pub microseconds: i64,
}

impl From<SystemTime> for Timestamp {
    fn from(time: SystemTime) -> Timestamp {
        const UNKNOWN: Timestamp = Timestamp { seconds: -1, microseconds: -1 };
        let Ok(since) = time.duration_since(UNIX_EPOCH) else { return UNKNOWN };
        match i64::try_from(since.as_secs()) {
            Ok(seconds) => Timestamp { seconds, microseconds: i64::from(since.subsec_micros()) },
            Err(_) => UNKNOWN,
        }
    }
}

/// Something that every client is told without asking.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Its name in the schema, such as `JOB_STATUS_CHANGE`.
    pub name: &'static str,
    /// When it happened, which may be well before it is sent.
    pub timestamp: Timestamp,
    /// The members of `data`; an event without any has no `data`.
    pub data: Map<String, Value>,
}

impl Event {
    /// The message as it is sent.
    pub fn to_value(&self) -> Value {
        let Timestamp { seconds, microseconds } = self.timestamp;
        let mut message = Map::new();
        message.insert("timestamp".into(), json!({"seconds": seconds, "microseconds": microseconds}));
        message.insert("event".into(), Value::from(self.name));
        if !self.data.is_empty() {
            message.insert("data".into(), Value::Object(self.data.clone()));
        }
        Value::Object(message)
    }
}

/// One kind of event whose rate is limited.
struct Limit {
    name: &'static str,
    /// Events that differ in this member do not hold back each other.
    key: Option<&'static str>,
    /// Events with this member and value are always sent at once.
    except: Option<(&'static str, &'static str)>,
}

/// At most one event per kind and key in this time.
const PERIOD: Duration = Duration::from_secs(1);

/// The limits. Events that are not listed are sent as they happen.
const LIMITS: &[Limit] = &[
    // One failing disk must not silence another. An error that stops somebody's I/O waits for a person or a program to
    // react to it, so none of those may be lost.
    Limit { name: "BLOCK_IO_ERROR", key: Some("qom-path"), except: Some(("action", "stop")) },
    Limit { name: "QUORUM_REPORT_BAD", key: Some("node-name"), except: None },
    Limit { name: "QUORUM_FAILURE", key: None, except: None },
    Limit { name: "VSERPORT_CHANGE", key: Some("id"), except: None },
];

/// A kind of event and the value of its key.
type Kind = (&'static str, Option<Value>);

struct Window {
    /// When the period that began with the last event sent is over.
    end: Duration,
    /// The newest event that came in this period.
    waiting: Option<Event>,
}

/// Holds back events that come too often. Of those that come within a second of one that was sent, the newest is sent
/// when the second is over and the others are dropped.
#[derive(Default)]
pub struct Throttle {
    windows: HashMap<Kind, Window>,
}

impl Throttle {
    /// A throttle that has seen nothing.
    pub fn new() -> Throttle {
        Throttle::default()
    }

    /// Gives the event back if it is to be sent now, else keeps it. `now` is any clock that only goes forward, the same
    /// for all calls.
    pub fn offer(&mut self, event: Event, now: Duration) -> Option<Event> {
        let Some(limit) = LIMITS.iter().find(|limit| limit.name == event.name) else { return Some(event) };
        if let Some((member, value)) = limit.except
            && event.data.get(member).is_some_and(|found| found == value)
        {
            return Some(event);
        }
        let kind = (limit.name, limit.key.and_then(|key| event.data.get(key).cloned()));
        match self.windows.get_mut(&kind) {
            Some(window) if window.waiting.is_some() || now < window.end => {
                window.waiting = Some(event);
                None
            }
            _ => {
                self.windows.insert(kind, Window { end: now + PERIOD, waiting: None });
                Some(event)
            }
        }
    }

    /// When [`Throttle::due`] is to be called next, if at all.
    pub fn deadline(&self) -> Option<Duration> {
        self.windows.values().map(|window| window.end).min()
    }

    /// The events whose time has come, oldest first.
    pub fn due(&mut self, now: Duration) -> Vec<Event> {
        let mut due = Vec::new();
        self.windows.retain(|_, window| {
            if now < window.end {
                return true;
            }
            window.end = now + PERIOD;
            match window.waiting.take() {
                Some(event) => {
                    due.push(event);
                    true
                }
                None => false,
            }
        });
        due.sort_by_key(|event| event.timestamp);
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(name: &'static str, data: Value, seconds: i64) -> Event {
        let Value::Object(data) = data else { panic!("data is an object") };
        Event { name, timestamp: Timestamp { seconds, microseconds: 0 }, data }
    }

    #[test]
    fn an_event_has_its_members_in_the_usual_order() {
        let with = event("JOB_STATUS_CHANGE", json!({"status": "created", "id": "j"}), 7).to_value().to_string();
        assert_eq!(
            with,
            r#"{"timestamp":{"seconds":7,"microseconds":0},"event":"JOB_STATUS_CHANGE","data":{"status":"created","id":"j"}}"#
        );
        assert!(!event("SHUTDOWN", json!({}), 7).to_value().to_string().contains("data"));
        let before = UNIX_EPOCH - Duration::from_secs(1);
        assert_eq!(Timestamp::from(before), Timestamp { seconds: -1, microseconds: -1 });
        let after = UNIX_EPOCH + Duration::from_nanos(1_000_002_999);
        assert_eq!(Timestamp::from(after), Timestamp { seconds: 1, microseconds: 2 });
    }

    #[test]
    fn the_newest_of_a_burst_is_sent_when_the_second_is_over() {
        let mut throttle = Throttle::new();
        let at = Duration::from_millis;
        let error = |path: &str, n| event("BLOCK_IO_ERROR", json!({"qom-path": path, "action": "report"}), n);
        assert_eq!(throttle.deadline(), None);
        assert_eq!(throttle.offer(error("/a", 1), at(0)), Some(error("/a", 1)));
        assert_eq!(throttle.offer(error("/b", 2), at(10)), Some(error("/b", 2)), "another key has a window of its own");
        assert_eq!(throttle.offer(error("/a", 3), at(20)), None);
        assert_eq!(throttle.offer(error("/a", 4), at(30)), None);
        assert_eq!(throttle.deadline(), Some(at(1000)));
        assert_eq!(throttle.due(at(999)), []);
        assert_eq!(throttle.due(at(1000)), [error("/a", 4)]);
        assert_eq!(throttle.offer(error("/a", 5), at(1500)), None, "what was held back opens a window too");
        assert_eq!(throttle.due(at(5000)), [error("/a", 5)]);
        assert_eq!(throttle.due(at(9000)), []);
        assert_eq!(throttle.deadline(), None, "nothing is kept for kinds that fell silent");
    }

    #[test]
    fn what_stops_somebody_and_what_has_no_limit_is_never_held_back() {
        let mut throttle = Throttle::new();
        for n in 0..3 {
            let stop = event("BLOCK_IO_ERROR", json!({"qom-path": "/a", "action": "stop"}), n);
            assert_eq!(throttle.offer(stop.clone(), Duration::ZERO), Some(stop));
            let job = event("JOB_STATUS_CHANGE", json!({"id": "j", "status": "null"}), n);
            assert_eq!(throttle.offer(job.clone(), Duration::ZERO), Some(job));
        }
        assert_eq!(throttle.deadline(), None);
    }
}
