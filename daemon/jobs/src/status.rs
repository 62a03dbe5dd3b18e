//! The states of a job and the table of what may follow what. [QMP §JobStatus, §JobVerb]
//!
//! The table is data; nothing else decides about states.

use qapi::types::job::{JobStatus, JobVerb};
use qapi::{Error, Result};

use JobStatus::{Aborting, Concluded, Created, Null, Paused, Pending, Ready, Running, Standby, Undefined, Waiting};

/// State by state: those that may follow it.
pub const TRANSITIONS: &[(JobStatus, &[JobStatus])] = &[
    (Undefined, &[Created]),
    // A job can fail before it has begun, and be forgotten.
    (Created, &[Running, Aborting, Null]),
    (Running, &[Paused, Ready, Waiting, Aborting]),
    (Paused, &[Running]),
    (Ready, &[Standby, Waiting, Aborting]),
    (Standby, &[Ready]),
    (Waiting, &[Pending, Aborting]),
    (Pending, &[Aborting, Concluded]),
    // Cancelled once more while it cleans up.
    (Aborting, &[Aborting, Concluded]),
    (Concluded, &[Null]),
    (Null, &[]),
];

const ALIVE: &[JobStatus] = &[Created, Running, Paused, Ready, Standby];

/// Verb by verb: the states in which it is accepted.
pub const VERBS: &[(JobVerb, &[JobStatus])] = &[
    (JobVerb::Cancel, &[Created, Running, Paused, Ready, Standby, Waiting, Pending]),
    (JobVerb::Pause, ALIVE),
    (JobVerb::Resume, ALIVE),
    (JobVerb::SetSpeed, ALIVE),
    (JobVerb::Complete, &[Ready, Standby]),
    (JobVerb::Finalize, &[Pending]),
    (JobVerb::Dismiss, &[Concluded]),
    (JobVerb::Change, ALIVE),
];

/// Whether a job in state `from` may come to state `to`.
pub fn may_follow(from: JobStatus, to: JobStatus) -> bool {
    TRANSITIONS.iter().any(|(state, next)| *state == from && next.contains(&to))
}

/// Whether a verb is accepted in a state.
///
/// # Errors
/// It is not; the message names the job.
pub fn accept(id: &str, state: JobStatus, verb: JobVerb) -> Result<()> {
    if VERBS.iter().any(|(v, states)| *v == verb && states.contains(&state)) {
        return Ok(());
    }
    Err(Error::generic(format!("Job '{id}' in state '{state}' cannot accept command verb '{verb}'")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(letter: &str) -> JobStatus {
        match letter {
            "U" => Undefined,
            "C" => Created,
            "R" => Running,
            "P" => Paused,
            "Y" => Ready,
            "S" => Standby,
            "W" => Waiting,
            "D" => Pending,
            "X" => Aborting,
            "E" => Concluded,
            "N" => Null,
            other => unreachable!("{other}"),
        }
    }

    /// The published letters of the reference's table, compared pair by pair.
    #[test]
    fn transitions_are_the_published_ones() {
        let published = "U:C C:RXN R:PYWX P:R Y:SWX S:Y W:DX D:XE X:XE E:N N:";
        let mut allowed = std::collections::HashSet::new();
        for row in published.split(' ') {
            let (from, to) = row.split_once(':').unwrap();
            allowed.extend(to.chars().map(|to| (state(from), state(&to.to_string()))));
        }
        for from in JobStatus::ALL {
            for to in JobStatus::ALL {
                assert_eq!(may_follow(*from, *to), allowed.contains(&(*from, *to)), "{from} -> {to}");
            }
        }
    }

    #[test]
    fn verbs_are_the_published_ones() {
        let published =
            "cancel:CRPYSWD pause:CRPYS resume:CRPYS set-speed:CRPYS complete:YS dismiss:E finalize:D change:CRPYS";
        for row in published.split(' ') {
            let (verb, states) = row.split_once(':').unwrap();
            let verb: JobVerb = verb.parse().unwrap();
            let states: Vec<_> = states.chars().map(|c| state(&c.to_string())).collect();
            for at in JobStatus::ALL {
                let accepted = accept("j", *at, verb);
                assert_eq!(accepted.is_ok(), states.contains(at), "{verb} at {at}");
                if let Err(error) = accepted {
                    assert_eq!(error.desc, format!("Job 'j' in state '{at}' cannot accept command verb '{verb}'"));
                }
            }
        }
        assert_eq!(VERBS.len(), JobVerb::ALL.len());
    }
}
