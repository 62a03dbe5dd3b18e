//! Jobs: what runs in the background, and can be paused, cancelled, completed, finalized and dismissed.
//!
//! | module | noun |
//! | --- | --- |
//! | [`status`] | the states of a job, its verbs, and the one table of what may follow what |
//! | [`list`] | [`Jobs`]: all jobs, owned by the control task; carries out the verbs |
//! | [`ctl`] | [`JobCtl`]: what the work of a job sees: pause points, cancellation, progress, the graph |
//! | [`create`] | `blockdev-create` |
//!
//! A job's work runs as a task of its own and owns the job meanwhile. Whatever it has to say comes to the control task as a
//! [`Report`]; whatever it wants of the graph is carried out there, between other commands ([`JobCtl::graph`]). States
//! change on the control task alone, and every change is told in an event before anything else happens.
#![forbid(unsafe_code)]

pub mod create;
pub mod ctl;
pub mod list;
pub mod status;

pub use create::CreateJob;
pub use ctl::{GraphWork, JobCtl, Owner, Report};
pub use list::{JobEvent, JobOptions, Jobs};

use block::Graph;
use block::driver::LocalFuture;
use qapi::Result;

/// What a job does. The author writes the work and how its results become real.
///
/// `run` → all jobs of the transaction have run → `prepare` of all → `commit` of all; or `abort`, after whatever failed or
/// when the job was cancelled. Exactly one of `commit` and `abort` is called.
pub trait Job: Send + 'static {
    /// The work. Rests at its pause points, and ends soon when [`JobCtl::is_cancelled`].
    fn run<'a>(&'a mut self, ctl: &'a JobCtl) -> LocalFuture<'a, Result<()>>;

    /// The last chance to fail. On the control task, with nothing changed yet.
    fn prepare<'a>(&'a mut self, graph: &'a mut Graph) -> LocalFuture<'a, Result<()>>;

    /// The results become real. Cannot fail.
    fn commit<'a>(self: Box<Self>, graph: &'a mut Graph) -> LocalFuture<'a, ()>;

    /// Everything is taken back.
    fn abort<'a>(self: Box<Self>, graph: &'a mut Graph) -> LocalFuture<'a, ()>;

    /// Whether the job can be told to complete when it is ready.
    fn completes(&self) -> bool;
}
