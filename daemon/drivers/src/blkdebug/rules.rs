//! Rules: which requests fail, from which event on, in which state.

use super::errno_of;
use block::{BlkdebugEvent, Errno};
use qapi::types::block_filters::{BlkdebugIOType as IoType, BlkdebugInjectErrorOptions, BlkdebugSetStateOptions};
use qapi::{Error, Result};

/// Bytes in a sector of a rule.
const SECTOR: u64 = 512;

#[derive(Clone, Debug)]
struct ErrorRule {
    event: BlkdebugEvent,
    /// 0 is any.
    state: i64,
    kind: Option<IoType>,
    errno: Option<Errno>,
    /// First byte of the sector; none is all.
    at: Option<u64>,
    once: bool,
    immediately: bool,
    delay_ns: u64,
    /// In force.
    active: bool,
}

#[derive(Clone, Debug)]
struct StateRule {
    event: BlkdebugEvent,
    state: i64,
    new_state: i64,
}

/// All rules of a node, and its state.
#[derive(Debug)]
pub struct Rules {
    state: i64,
    errors: Vec<ErrorRule>,
    states: Vec<StateRule>,
}

impl Default for Rules {
    fn default() -> Self {
        Self { state: 1, errors: Vec::new(), states: Vec::new() }
    }
}

/// What happens to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hit {
    /// What it fails with; none if it goes on.
    pub errno: Option<Errno>,
    /// Nanoseconds to wait before that.
    pub delay_ns: u64,
    /// Without giving others their turn.
    pub immediately: bool,
}

impl Rules {
    /// Adds a rule that lets requests fail.
    ///
    /// # Errors
    /// A number out of range.
    pub fn add_error(&mut self, rule: &BlkdebugInjectErrorOptions) -> Result<()> {
        let range =
            |name: &str, value: i64| Error::generic(format!("Value '{value}' is out of range for parameter '{name}'"));
        let at = match rule.sector {
            None | Some(-1) => None,
            Some(sector) => {
                let bytes = u64::try_from(sector).ok().and_then(|sector| sector.checked_mul(SECTOR));
                Some(bytes.ok_or_else(|| range("sector", sector))?)
            }
        };
        let delay = rule.delay_ns.unwrap_or(0);
        self.errors.push(ErrorRule {
            event: rule.event,
            state: rule.state.unwrap_or(0),
            kind: rule.iotype,
            errno: errno_of(rule.errno.unwrap_or(i64::from(Errno::EIO as i32)))?,
            at,
            once: rule.once.unwrap_or(false),
            immediately: rule.immediately.unwrap_or(false),
            delay_ns: u64::try_from(delay).map_err(|_| range("delay-ns", delay))?,
            active: false,
        });
        Ok(())
    }

    /// Adds a rule that changes the state.
    pub fn add_state(&mut self, rule: &BlkdebugSetStateOptions) {
        self.states.push(StateRule { event: rule.event, state: rule.state.unwrap_or(0), new_state: rule.new_state });
    }

    /// Something happened: rules that wait for it in this state come into force, in place of all others; then the state
    /// changes.
    pub fn event(&mut self, event: BlkdebugEvent) {
        let state = self.state;
        let matches = |of: BlkdebugEvent, wanted: i64| of == event && (wanted == 0 || wanted == state);
        if self.errors.iter().any(|rule| matches(rule.event, rule.state)) {
            for rule in &mut self.errors {
                rule.active = matches(rule.event, rule.state);
            }
        }
        if let Some(rule) = self.states.iter().rev().find(|rule| matches(rule.event, rule.state)) {
            self.state = rule.new_state;
        }
    }

    /// What the rules in force do to a request of `len` bytes at `at`.
    pub fn check(&mut self, kind: IoType, at: u64, len: u64) -> Option<Hit> {
        let hits = |rule: &ErrorRule| {
            let kind_fits = rule.kind.map_or(kind != IoType::BlockStatus, |of| of == kind);
            let place_fits = rule.at.is_none_or(|byte| byte >= at && byte - at < len);
            rule.active && kind_fits && place_fits
        };
        let found = self.errors.iter().position(hits)?;
        let rule = self.errors.get(found)?;
        let hit = Hit { errno: rule.errno, delay_ns: rule.delay_ns, immediately: rule.immediately };
        if rule.once {
            self.errors.remove(found);
        }
        Some(hit)
    }
}
