//! `--trace`: which events leave a line, and where.
//!
//! `[[enable=]PATTERN][,events=FILE][,file=FILE]`, or `help`. A pattern may have `*`, and `-` before it turns off. A
//! file of events has one pattern a line, `#` begins a comment. Without `file`, lines go to standard error.

use std::fs::{File, OpenOptions};
use std::io::Write;

/// The events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A client connected.
    Connect,
    /// A client's connection ended.
    Disconnect,
    /// A request is complete and goes to its device.
    Request,
    /// A request has its answer.
    Reply,
}

/// All events, with the names that patterns match.
const EVENTS: [(Event, &str); 4] = [
    (Event::Connect, "pr_helper_connect"),
    (Event::Disconnect, "pr_helper_disconnect"),
    (Event::Request, "pr_helper_request"),
    (Event::Reply, "pr_helper_reply"),
];

impl Event {
    /// The name.
    pub fn name(self) -> &'static str {
        EVENTS.iter().find(|row| row.0 == self).map_or("", |row| row.1)
    }
}

/// What the options ask for.
#[derive(Debug, Default)]
pub struct Trace {
    /// The events that are on.
    pub events: Vec<Event>,
    /// Where lines go, if not to standard error.
    pub file: Option<File>,
}

/// Prints the names of all events if one of the options is `help`; the answer is whether it did.
pub fn help(options: &[String], out: &mut impl Write) -> std::io::Result<bool> {
    let asked = options.iter().any(|option| option == "help");
    if asked {
        EVENTS.iter().try_for_each(|row| writeln!(out, "{}", row.1))?;
    }
    Ok(asked)
}

impl Trace {
    /// Understands the options, in order, and opens what they name; the error is a message.
    pub fn new(options: &[String]) -> Result<Self, String> {
        let mut trace = Self::default();
        for option in options {
            for (i, part) in option.split(',').enumerate() {
                match part.split_once('=') {
                    Some(("enable", pattern)) => trace.pattern(pattern)?,
                    Some(("events", path)) => trace.patterns_of(path)?,
                    Some(("file", path)) => {
                        let file = OpenOptions::new().append(true).create(true).open(path);
                        trace.file = Some(file.map_err(|e| format!("cannot open '{path}': {e}"))?);
                    }
                    None if i == 0 => trace.pattern(part)?,
                    _ => return Err(format!("Invalid parameter '{part}' of --trace")),
                }
            }
        }
        Ok(trace)
    }

    fn patterns_of(&mut self, path: &str) -> Result<(), String> {
        let text = std::fs::read_to_string(path).map_err(|e| format!("cannot read '{path}': {e}"))?;
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        lines.into_iter().try_for_each(|line| self.pattern(line))
    }

    fn pattern(&mut self, text: &str) -> Result<(), String> {
        let (on, pattern) = text.strip_prefix('-').map_or((true, text), |rest| (false, rest));
        let matched: Vec<Event> = EVENTS.iter().filter(|row| matches(pattern, row.1)).map(|row| row.0).collect();
        // A pattern may match nothing; a name that does not exist is a mistake.
        if matched.is_empty() && !pattern.contains('*') {
            return Err(format!("trace event '{pattern}' does not exist"));
        }
        self.events.retain(|event| !matched.contains(event));
        if on {
            self.events.extend(matched);
        }
        Ok(())
    }
}

/// Does the name match a pattern with `*`?
fn matches(pattern: &str, name: &str) -> bool {
    let Some((start, rest)) = pattern.split_once('*') else { return pattern == name };
    let Some(name) = name.strip_prefix(start) else { return false };
    // Whatever `*` stands for, the rest must match after it.
    name.char_indices().map(|(i, _)| i).chain([name.len()]).any(|i| name.get(i..).is_some_and(|n| matches(rest, n)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(options: &[&str]) -> Result<Vec<Event>, String> {
        let options: Vec<String> = options.iter().map(|s| (*s).to_owned()).collect();
        Trace::new(&options).map(|t| t.events)
    }

    #[test]
    fn patterns() {
        assert_eq!(events(&["enable=pr_helper_re*"]), Ok(vec![Event::Request, Event::Reply]));
        assert_eq!(events(&["pr_helper_connect"]), Ok(vec![Event::Connect]));
        assert_eq!(events(&["*connect", "-*dis*"]), Ok(vec![Event::Connect]));
        assert_eq!(events(&["qcow2_*"]), Ok(vec![]));
        assert!(events(&["qcow2_write"]).is_err());
        assert!(events(&["pr_helper_connect,what=x"]).is_err());
        assert!(events(&["events=/nonexistent"]).is_err());
    }

    #[test]
    fn files() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        writeln!(file, "# events\n\npr_helper_reply").unwrap();
        assert_eq!(events(&[&format!("events={}", file.path().display())]), Ok(vec![Event::Reply]));
        let mut out = Vec::new();
        assert!(help(&["help".into()], &mut out).unwrap());
        assert_eq!(String::from_utf8(out).unwrap().lines().count(), EVENTS.len());
        assert!(!help(&["*".into()], &mut Vec::new()).unwrap());
    }
}
