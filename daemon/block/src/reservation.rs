//! Persistent reservations of a node's medium: the facet that a SCSI export and the control interface use.
//!
//! A driver whose medium has reservations implements [`Reservations`]; a filter that shows all of its child's bytes gives
//! the edge to its child, which forwards. What cannot be done is answered as a SCSI device would answer it, with the reason
//! for people beside it, so that there is one kind of failure.
//!
//! A [`ReservationManager`] is an object of the user's that carries out commands for processes that may not do so
//! themselves. `[SPC-4 §5.9]`

use crate::driver::LocalFuture;
use crate::edge::Edge;
use crate::node::Node;
use ipc::frame::Failure;
use ipc::scsi::{Command, Data, Sense, status};
use std::fmt;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;

/// The way that a command went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// The kernel's own interface, on the node's descriptor.
    Kernel,
    /// A reservation manager.
    Helper,
}

/// A command that was not done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// As a SCSI device says it.
    pub failure: Failure,
    /// Why, for people, where the sense does not say it all.
    pub reason: Option<String>,
}

impl Problem {
    /// CHECK CONDITION with this sense, and why.
    pub fn new(sense: Sense, reason: impl Into<String>) -> Self {
        Self { reason: Some(reason.into()), ..Self::from(sense) }
    }
}

impl From<Sense> for Problem {
    fn from(sense: Sense) -> Self {
        Failure { status: status::CHECK_CONDITION, sense: sense.to_fixed().to_vec() }.into()
    }
}

impl From<Failure> for Problem {
    fn from(failure: Failure) -> Self {
        Self { failure, reason: None }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.failure.status, self.failure.sense()) {
            (status::RESERVATION_CONFLICT, _) => f.write_str("reservation conflict")?,
            (status::CHECK_CONDITION, Some(sense)) => match sense.name() {
                Some(name) => write!(f, "{name}, sense {sense}")?,
                None => write!(f, "sense {sense}")?,
            },
            (status::CHECK_CONDITION, None) => f.write_str("check condition without sense")?,
            (status::BUSY, _) => f.write_str("the device is busy")?,
            (status::TASK_SET_FULL, _) => f.write_str("the device has no room for another command")?,
            (status::TASK_ABORTED, _) => f.write_str("aborted by another initiator")?,
            (other, _) => write!(f, "SCSI status {other:#04x}")?,
        }
        match &self.reason {
            Some(reason) => write!(f, " ({reason})"),
            None => Ok(()),
        }
    }
}

/// What came of a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Which way it went; none if it went nowhere.
    pub route: Option<Route>,
    /// What the device answered, or why it was not asked.
    pub result: Result<Data, Problem>,
}

impl Outcome {
    /// A command that went nowhere.
    pub fn nowhere(problem: Problem) -> Self {
        Self { route: None, result: Err(problem) }
    }

    fn unsupported() -> Self {
        Self::nowhere(Problem::new(Sense::INVALID_OPCODE, "the node has no persistent reservations"))
    }
}

/// A medium with persistent reservations.
pub trait Reservations: Send + Sync {
    /// Carries out a command. It may take as long as the device; many can be under way.
    fn execute<'a>(&'a self, command: Command) -> LocalFuture<'a, Outcome>;
}

impl Node {
    /// Carries out a command on the node's medium.
    pub async fn reserve(&self, command: Command) -> Outcome {
        match self.driver().reservations() {
            Some(medium) => medium.execute(command).await,
            None => Outcome::unsupported(),
        }
    }
}

/// Those of the child, for a filter.
impl Reservations for Edge {
    fn execute<'a>(&'a self, command: Command) -> LocalFuture<'a, Outcome> {
        Box::pin(async move { self.node().reserve(command).await })
    }
}

/// What a command that was handed on gives.
pub type Executed = Pin<Box<dyn Future<Output = Result<Data, Problem>> + Send>>;

/// Carries out commands for nodes that may not do so themselves.
pub trait ReservationManager: Send + Sync {
    /// Carries out a command on a device. From any thread; any number at a time.
    fn execute(&self, device: OwnedFd, command: Command) -> Executed;
}

/// A node's use of a manager; the object stays as long as this lives.
#[derive(Clone)]
pub struct ManagerUse {
    manager: Arc<dyn ReservationManager>,
    _user: Arc<()>,
}

impl ManagerUse {
    pub(crate) fn new(manager: Arc<dyn ReservationManager>, user: Arc<()>) -> Self {
        Self { manager, _user: user }
    }
}

impl fmt::Debug for ManagerUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ManagerUse")
    }
}

impl std::ops::Deref for ManagerUse {
    type Target = dyn ReservationManager;

    fn deref(&self) -> &Self::Target {
        &*self.manager
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn problems_read_well() {
        assert_eq!(Problem::from(Sense { key: 3, code: 0x11, qualifier: 0 }).to_string(), "sense 3/11/00");
        assert_eq!(
            Problem::new(Sense::TIMEOUT, "no answer").to_string(),
            "command timeout during processing, sense b/2e/02 (no answer)"
        );
        let conflict = Failure { status: status::RESERVATION_CONFLICT, sense: Vec::new() };
        assert_eq!(Problem::from(conflict).to_string(), "reservation conflict");
    }
}
