//! Lines to standard error, by a thread of their own: a full pipe must not hold up a request.
//!
//! Messages are text with the program's name; audit lines are JSON. When the queue is full, lines are dropped and
//! counted, and the count is the next line. Half of it is for the audit lines of what changes something or was refused, so
//! that nobody hides these behind a flood of others.

use crate::device::Number;
use crate::policy::Peer;
use crate::trace::{Event, Trace};
use ipc::classic::Reply;
use ipc::scsi::{Action, Key, Sense, status};
use serde::Serialize;
use std::fs::File;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Lines that may wait.
const QUEUE: usize = 1024;

/// Of these, lines that are no audit line of a change or a refusal.
const LESSER: usize = QUEUE / 2;

/// Which commands leave an audit line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Audit {
    /// None.
    Off,
    /// PERSISTENT RESERVE OUT, and what was refused.
    Changes,
    /// Every command.
    All,
}

/// Takes lines; any thread has one.
#[derive(Debug, Clone)]
pub struct Log {
    queue: SyncSender<Line>,
    counts: Arc<Counts>,
    audit: Audit,
    verbose: bool,
    events: Arc<[Event]>,
}

#[derive(Debug, Default)]
struct Counts {
    /// Since the last line that was written.
    dropped: AtomicU64,
    /// Lesser lines that wait.
    lesser: AtomicUsize,
}

/// A line, with its end.
#[derive(Debug)]
enum Line {
    /// For standard error, an audit line of a change or a refusal.
    Change(String),
    /// For standard error.
    Message(String),
    /// For where `--trace` says.
    Trace(String),
}

/// The other end: [`Writer::run`] on the thread that writes.
#[derive(Debug)]
pub struct Writer {
    queue: Receiver<Line>,
    counts: Arc<Counts>,
    trace: Option<File>,
}

/// A new log.
pub fn new(audit: Audit, verbose: bool, trace: Trace) -> (Log, Writer) {
    let (sender, receiver) = sync_channel(QUEUE);
    let counts = Arc::new(Counts::default());
    let log = Log { queue: sender, counts: counts.clone(), audit, verbose, events: trace.events.into() };
    (log, Writer { queue: receiver, counts, trace: trace.file })
}

impl Writer {
    /// Writes until the last [`Log`] is gone.
    pub fn run(self) {
        for line in self.queue {
            if !matches!(line, Line::Change(_)) {
                self.counts.lesser.fetch_sub(1, Ordering::Relaxed);
            }
            let dropped = self.counts.dropped.swap(0, Ordering::Relaxed);
            // Nobody can be told that standard error is gone.
            let mut stderr = std::io::stderr().lock();
            if dropped != 0 {
                let _ = stderr.write_all(format!("qemu-pr-helper: {dropped} lines lost\n").as_bytes());
            }
            let _ = match (&line, &self.trace) {
                (Line::Trace(text), Some(file)) => (&mut &*file).write_all(text.as_bytes()),
                (Line::Trace(text) | Line::Message(text) | Line::Change(text), _) => stderr.write_all(text.as_bytes()),
            };
        }
    }
}

/// One command, for its audit line.
#[derive(Debug)]
pub struct Entry<'a> {
    /// Who.
    pub peer: &'a Peer,
    /// On what; `None` if it was no device.
    pub device: Option<Number>,
    /// CDB byte 0 is PERSISTENT RESERVE OUT.
    pub is_out: bool,
    /// What.
    pub action: Option<Action>,
    /// With which keys.
    pub keys: Option<(Key, Key)>,
    /// Did the policy refuse it?
    pub denied: bool,
    /// The answer.
    pub reply: &'a Reply,
    /// From the complete request to its answer.
    pub duration: Duration,
}

/// The audit line, member by member.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct AuditLine<'a> {
    /// Seconds since 1970, to the microsecond.
    time: String,
    pid: i32,
    uid: u32,
    gid: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    unit: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<String>,
    action: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    action_key: Option<String>,
    denied: bool,
    status: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    sense: Option<String>,
    milliseconds: u64,
}

impl Log {
    fn put(&self, line: Line) {
        let lesser = !matches!(line, Line::Change(_));
        if lesser && self.counts.lesser.fetch_add(1, Ordering::Relaxed) >= LESSER || self.queue.try_send(line).is_err()
        {
            if lesser {
                self.counts.lesser.fetch_sub(1, Ordering::Relaxed);
            }
            self.counts.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// An error or a warning.
    pub fn message(&self, text: &str) {
        self.put(Line::Message(format!("qemu-pr-helper: {text}\n")));
    }

    /// A message for `--verbose`.
    pub fn verbose(&self, text: impl FnOnce() -> String) {
        if self.verbose {
            self.message(&text());
        }
    }

    /// The line of an event, if it is on.
    pub fn trace(&self, event: Event, text: impl FnOnce() -> String) {
        if self.events.contains(&event) {
            self.put(Line::Trace(format!("{} {}\n", event.name(), text())));
        }
    }

    /// The audit line of a command.
    pub fn command(&self, entry: &Entry<'_>) {
        let wanted = if entry.is_out || entry.denied { Audit::Changes } else { Audit::All };
        if self.audit < wanted {
            return;
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let sense = (entry.reply.status == status::CHECK_CONDITION)
            .then(|| Sense::decode(&entry.reply.sense).map(|s| s.to_string()))
            .flatten();
        let line = AuditLine {
            time: format!("{}.{:06}", now.as_secs(), now.subsec_micros()),
            pid: entry.peer.pid,
            uid: entry.peer.uid,
            gid: entry.peer.gid,
            unit: entry.peer.unit.as_deref(),
            device: entry.device.map(|d| d.to_string()),
            action: entry.action.map_or("unknown", Action::name),
            key: entry.keys.map(|k| k.0.to_string()),
            action_key: entry.keys.map(|k| k.1.to_string()),
            denied: entry.denied,
            status: format!("{:#04x}", entry.reply.status),
            sense,
            milliseconds: u64::try_from(entry.duration.as_millis()).unwrap_or(u64::MAX),
        };
        if let Ok(text) = serde_json::to_string(&line) {
            let kind = if wanted == Audit::Changes { Line::Change } else { Line::Message };
            self.put(kind(text + "\n"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry<'a>(peer: &'a Peer, reply: &'a Reply, is_out: bool) -> Entry<'a> {
        let action = Some(if is_out { Action::Clear } else { Action::ReadKeys });
        let keys = is_out.then_some((Key(1), Key(0)));
        let device = Some(Number { major: 8, minor: 0 });
        Entry { peer, device, is_out, action, keys, denied: false, reply, duration: Duration::from_millis(3) }
    }

    #[test]
    fn audit_lines() {
        let peer = Peer { pid: 1, uid: 2, gid: 3, unit: Some("a\"b.service".into()) };
        let reply = Reply::check(Sense::ACCESS_DENIED);
        for (audit, expected) in [(Audit::Off, 0), (Audit::Changes, 1), (Audit::All, 2)] {
            let (log, writer) = new(audit, false, Trace::default());
            log.command(&entry(&peer, &reply, true));
            log.command(&entry(&peer, &reply, false));
            drop(log);
            let text = |line| match line {
                Line::Message(text) | Line::Trace(text) | Line::Change(text) => text,
            };
            let lines: Vec<serde_json::Value> =
                writer.queue.iter().map(|line| serde_json::from_str(&text(line)).unwrap()).collect();
            assert_eq!(lines.len(), expected);
            if let Some(line) = lines.first() {
                assert_eq!(line["action"], "clear");
                assert_eq!(line["key"], "0x0000000000000001");
                assert_eq!(line["status"], "0x02");
                assert_eq!(line["sense"], "5/20/02");
                assert_eq!(line["unit"], "a\"b.service");
            }
        }
    }

    #[test]
    fn a_full_queue_does_not_block_and_keeps_room_for_changes() {
        let (log, writer) = new(Audit::All, true, Trace::default());
        for _ in 0..LESSER + 5 {
            log.message("x");
        }
        assert_eq!(writer.counts.dropped.load(Ordering::Relaxed), 5);
        let peer = Peer { pid: 1, uid: 2, gid: 3, unit: None };
        let reply = Reply::status(status::GOOD);
        log.command(&entry(&peer, &reply, false));
        assert_eq!(writer.counts.dropped.load(Ordering::Relaxed), 6);
        for _ in 0..QUEUE - LESSER + 1 {
            log.command(&entry(&peer, &reply, true));
        }
        assert_eq!(writer.counts.dropped.load(Ordering::Relaxed), 7);
        assert_eq!(writer.counts.lesser.load(Ordering::Relaxed), LESSER);
    }
}
