//! The file with rules: sections in brackets, a name in quotes perhaps, and lines `member = "value"`; `#` starts a
//! comment line.

use super::rules::Rules;
use io::FdSets;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use qapi::types::block_filters::{BlkdebugEvent, BlkdebugInjectErrorOptions, BlkdebugSetStateOptions};
use qapi::{Error, Result};
use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::str::FromStr;

/// What the file may hold, in bytes.
const MAX_FILE: u64 = 1 << 20;

const INJECT_ERROR: (&str, &[&str]) =
    ("inject-error", &["event", "state", "errno", "sector", "once", "immediately", "delay-ns"]);
const SET_STATE: (&str, &[&str]) = ("set-state", &["event", "state", "new_state"]);

struct Section<'a> {
    kind: (&'static str, &'static [&'static str]),
    members: HashMap<&'a str, &'a str>,
}

/// The text of the file, which may be one that was passed. Blocks.
///
/// # Errors
/// It cannot be opened or read, is too long or no text.
pub fn load(path: &Path, fdsets: &FdSets) -> std::io::Result<String> {
    let opened = fdsets.open(path, OFlag::O_RDONLY, Mode::empty())?;
    let mut text = String::new();
    let length = File::from(opened.fd).take(MAX_FILE + 1).read_to_string(&mut text)?;
    if u64::try_from(length).is_ok_and(|length| length <= MAX_FILE) {
        Ok(text)
    } else {
        Err(std::io::Error::other(format!("It has more than {MAX_FILE} bytes")))
    }
}

/// Adds the rules of a file's text.
///
/// # Errors
/// A line or a value that makes no sense; the text names it.
pub fn read(text: &str, rules: &mut Rules) -> Result<()> {
    let mut sections: Vec<Section<'_>> = Vec::new();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        if let Some(inside) = line.strip_prefix('[') {
            let name = inside.trim_end_matches(']').split('"').next().unwrap_or_default().trim();
            let kind = [INJECT_ERROR, SET_STATE].into_iter().find(|(known, _)| *known == name);
            let kind = kind.ok_or_else(|| Error::generic(format!("There is no option group '{name}'")))?;
            sections.push(Section { kind, members: HashMap::new() });
            continue;
        }
        let Some(section) = sections.last_mut() else { return Err(Error::generic("no group defined")) };
        let member = line
            .split_once(" = ")
            .and_then(|(name, value)| Some((name.trim(), value.trim().strip_prefix('"')?.strip_suffix('"')?)));
        let Some((name, value)) = member else { return Err(Error::generic(format!("Invalid parameter '{line}'"))) };
        if !section.kind.1.contains(&name) {
            return Err(Error::generic(format!("Invalid parameter '{name}'")));
        }
        section.members.insert(name, value);
    }
    sections.iter().try_for_each(|section| section.add_to(rules))
}

impl Section<'_> {
    fn number(&self, name: &str) -> Result<Option<i64>> {
        let text = self.members.get(name);
        let expects = |_| Error::generic(format!("Parameter '{name}' expects a number"));
        text.map(|text| text.parse().map_err(expects)).transpose()
    }

    fn switch(&self, name: &str) -> Result<Option<bool>> {
        match self.members.get(name).copied() {
            None => Ok(None),
            Some("on") => Ok(Some(true)),
            Some("off") => Ok(Some(false)),
            Some(_) => Err(Error::generic(format!("Parameter '{name}' expects 'on' or 'off'"))),
        }
    }

    fn add_to(&self, rules: &mut Rules) -> Result<()> {
        let name = self.members.get("event").ok_or_else(|| Error::generic("Missing event name for rule"))?;
        let event =
            BlkdebugEvent::from_str(name).map_err(|_| Error::generic(format!("invalid parameter value: {name}")))?;
        let state = self.number("state")?;
        if self.kind == SET_STATE {
            let new_state = self.number("new_state")?.unwrap_or(0);
            rules.add_state(&BlkdebugSetStateOptions { event, state, new_state });
            return Ok(());
        }
        rules.add_error(&BlkdebugInjectErrorOptions {
            event,
            state,
            iotype: None,
            errno: self.number("errno")?,
            sector: self.number("sector")?,
            once: self.switch("once")?,
            immediately: self.switch("immediately")?,
            delay_ns: self.number("delay-ns")?,
        })
    }
}
