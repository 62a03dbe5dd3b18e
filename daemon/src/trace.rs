//! `--trace`: events of the daemon's own, by name or pattern, written to standard error or a file.
//!
//! The code marks events with `tracing::trace!(target: "NAME", ...)`; the names and what they say are listed in [`EVENTS`].
//! Whether an event is wanted is decided once for each place in the code and remembered there, so an event that is not
//! wanted costs one load. Information, warnings and errors are always wanted and go to standard error as messages.

use qapi::opts::Opts;
use qapi::{Error, Result};
use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::sync::{Mutex, PoisonError};
use tracing::field::{Field, Visit};
use tracing::subscriber::Interest;
use tracing::{Event, Level, Metadata, Subscriber, span};

/// All events: name, and what it tells.
pub const EVENTS: &[(&str, &str)] = &[
    ("block_reports_lost", "more events of block nodes came at once than are kept (always shown)"),
    ("chardev_client_lost", "a character device cannot take a client (always shown)"),
    ("chardev_hub_client_closed", "a device of a hub has lost its client"),
    ("chardev_log_failed", "the log file of a character device cannot be written"),
    ("chardev_mux_client_closed", "a multiplexer has lost its client"),
    ("chardev_unable_to_connect", "a character device cannot connect and will try again (always shown)"),
    ("control_command", "a command is carried out"),
    ("fuse_ended", "the mount of a FUSE export has gone, by whoever's hand (always shown)"),
    ("fuse_error", "a request of a FUSE export failed; what else goes wrong with an export is always shown"),
    ("fuse_init", "the kernel has begun to use a FUSE export, and what it offers"),
    ("fuse_malformed", "a FUSE request makes no sense (always shown)"),
    ("fuse_reply_refused", "the kernel refuses the reply to a FUSE request (always shown)"),
    ("fuse_request", "a request of a FUSE export begins"),
    (
        "fuse_transport",
        "requests of a FUSE export come over io_uring, or why they do not although the kernel offers it",
    ),
    ("monitor_client_closed", "a conversation with a QMP client has ended, and why if it broke"),
    ("monitor_client_opened", "a QMP client has connected"),
    ("monitor_client_too_slow", "a QMP client is disconnected because it does not read its events (always shown)"),
    ("nbd_error", "a request of an NBD client failed"),
    ("nbd_negotiate_failed", "an NBD client left, or was sent away, before it had chosen an export"),
    ("nbd_negotiate_success", "an NBD client has chosen an export, and what was agreed on"),
    ("nbd_request", "a request of an NBD client begins"),
    ("nbd_server_accept", "the NBD server cannot take a client, or can again (always shown)"),
    ("nbd_trip", "an NBD client has left its export"),
    ("pr_manager_disconnected", "a pr-manager has no connection to its helper, and why"),
    ("vduse_broken", "the driver of a VDUSE device broke the rules (always shown)"),
    ("vduse_left", "a VDUSE device stays, as it is in use or cannot be removed (always shown)"),
    ("vduse_lost", "a VDUSE device cannot be served any more (always shown)"),
    ("vduse_message", "a message of the kernel to a VDUSE device has come in"),
    ("vduse_refused", "a message of the kernel to a VDUSE device was answered with an error (always shown)"),
    ("vduse_start", "a VDUSE device is served from now on"),
    ("vhost_user_blk_accept", "a vhost-user-blk export cannot take a front-end (always shown)"),
    ("vhost_user_blk_connected", "a vhost-user front-end has connected"),
    (
        "vhost_user_blk_dropped",
        "a vhost-user front-end, or its guest, broke the rules and is disconnected (always shown)",
    ),
    ("vhost_user_blk_left", "a vhost-user front-end has left"),
    ("vhost_user_blk_message", "a vhost-user message has come in"),
    ("vhost_user_blk_refused", "a vhost-user message was answered with an error (always shown)"),
    ("virtio_blk_ring_start", "a virtqueue starts, and how many requests of a former daemon it takes up"),
];

/// What `--trace` options ask for, collected in order.
#[derive(Debug, Default)]
pub struct Trace {
    patterns: Vec<String>,
    file: Option<String>,
}

impl Trace {
    /// Adds one option: `[[enable=]PATTERN][,events=FILE][,file=FILE]`. Returns a warning if a name does not exist.
    ///
    /// # Errors
    /// An unknown key, or an events file that cannot be read.
    pub fn add(&mut self, text: &str) -> Result<Option<String>> {
        let mut warning = None;
        for (key, value) in Opts::parse(text, "enable")?.into_pairs() {
            match key.as_str() {
                "enable" => warning = self.enable(&value).or(warning),
                "events" => {
                    let list = fs::read_to_string(&value)
                        .map_err(|error| Error::io(format!("could not open trace events file '{value}'"), error))?;
                    for line in list.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
                        warning = self.enable(line).or(warning);
                    }
                }
                "file" => self.file = Some(value),
                _ => return Err(Error::generic(format!("Invalid parameter '{key}'"))),
            }
        }
        Ok(warning)
    }

    fn enable(&mut self, pattern: &str) -> Option<String> {
        let bare = pattern.strip_prefix('-').unwrap_or(pattern);
        let known = EVENTS.iter().any(|(name, _)| matches(bare, name));
        self.patterns.push(pattern.to_owned());
        (!known && !bare.contains(['*', '?'])).then(|| format!("warning: trace event '{bare}' does not exist"))
    }

    /// Puts the choice in force for the rest of the process.
    ///
    /// # Errors
    /// The file cannot be created.
    pub fn start(self) -> Result<()> {
        let out: Box<dyn Write + Send> = match &self.file {
            None => Box::new(std::io::stderr()),
            Some(path) => {
                let file = OpenOptions::new().create(true).append(true).open(path);
                Box::new(file.map_err(|error| Error::io(format!("could not open trace file '{path}'"), error))?)
            }
        };
        let lines = Lines { patterns: self.patterns, out: Mutex::new(out) };
        tracing::subscriber::set_global_default(lines).map_err(|_| Error::generic("tracing is already in use"))
    }
}

/// The list of events for `--trace help`.
pub fn help() -> String {
    let mut text = String::new();
    for (name, description) in EVENTS {
        // Writing to a String does not fail.
        let _ = writeln!(text, "{name:<32} {description}");
    }
    text
}

/// Whether `name` matches `pattern`, in which `*` stands for any text and `?` for any one character.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.chars().next() {
        None => name.is_empty(),
        Some('*') => {
            let rest = &pattern[1..];
            name.char_indices().map(|(i, _)| i).chain([name.len()]).any(|i| matches(rest, &name[i..]))
        }
        Some(p) => match name.chars().next() {
            Some(n) if p == '?' || p == n => matches(&pattern[p.len_utf8()..], &name[n.len_utf8()..]),
            _ => false,
        },
    }
}

/// Writes an event as a line: its name, then its fields.
struct Lines {
    patterns: Vec<String>,
    /// Guards the order of lines; held for one write.
    out: Mutex<Box<dyn Write + Send>>,
}

impl Lines {
    /// The last pattern that matches decides; `-PATTERN` takes events out.
    fn wants(&self, name: &str) -> bool {
        self.patterns.iter().fold(false, |wanted, pattern| match pattern.strip_prefix('-') {
            Some(pattern) => wanted && !matches(pattern, name),
            None => wanted || matches(pattern, name),
        })
    }
}

impl Subscriber for Lines {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        if self.enabled(metadata) { Interest::always() } else { Interest::never() }
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let ours = EVENTS.iter().any(|(name, _)| *name == metadata.target());
        ours && (is_message(metadata) || self.wants(metadata.target()))
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        let metadata = event.metadata();
        let mut fields = String::new();
        event.record(&mut Fields(&mut fields));
        if is_message(metadata) {
            let _ = std::io::stderr().write_all(format!("qemu-storage-daemon:{fields}\n").as_bytes());
        }
        if !self.wants(metadata.target()) {
            return;
        }
        let line = format!("{}{fields}\n", metadata.target());
        let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        // A full disk or a closed terminal must not stop the daemon.
        let _ = out.write_all(line.as_bytes());
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

/// Whether the operator has to see it without asking.
fn is_message(metadata: &Metadata<'_>) -> bool {
    *metadata.level() <= Level::INFO
}

struct Fields<'a>(&'a mut String);

impl Visit for Fields<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        // Writing to a String does not fail.
        let _ = match field.name() {
            "message" => write!(self.0, " {value:?}"),
            name => write!(self.0, " {name}={value:?}"),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns() {
        assert!(matches("nbd_*", "nbd_request"));
        assert!(matches("*", ""));
        assert!(matches("n?d_*t", "nbd_request"));
        assert!(!matches("nbd", "nbd_request"));
        assert!(!matches("nbd_?", "nbd_"));
    }

    #[test]
    fn every_event_in_the_code_is_listed_and_every_listed_one_is_in_the_code() {
        let mut found = std::collections::BTreeSet::new();
        let mut todo = vec![std::path::PathBuf::from(env!("CARGO_MANIFEST_DIR"))];
        while let Some(dir) = todo.pop() {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    todo.push(path);
                } else if path.extension().is_some_and(|e| e == "rs") && !path.ends_with("src/trace.rs") {
                    let text = fs::read_to_string(&path).unwrap();
                    found
                        .extend(text.split("target: \"").skip(1).filter_map(|s| Some(s.split_once('"')?.0.to_owned())));
                }
            }
        }
        let listed: std::collections::BTreeSet<_> = EVENTS.iter().map(|(name, _)| (*name).to_owned()).collect();
        assert_eq!(found, listed);
    }
}
