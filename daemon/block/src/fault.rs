//! [`FaultControl`]: the facet of a driver that fails on purpose, for tests of durability.

use crate::driver::LocalFuture;
use qapi::Result;
use qapi::types::fault::{XFaultInfo, XFaultKeep, XFaultRule};

/// How a fault node is steered.
pub trait FaultControl: Send + Sync {
    /// Replaces the rules.
    ///
    /// # Errors
    /// A rule that makes no sense.
    fn set_rules(&self, rules: &[XFaultRule]) -> Result<()>;

    /// Lets go what is held.
    fn release(&self);

    /// The same, and from now on nothing is held: the process ends.
    fn let_all_go(&self);

    /// Loses power, keeping what `keep` says in pieces of `atomic_size` bytes.
    fn crash(&self, keep: XFaultKeep, seed: u64, atomic_size: u32) -> LocalFuture<'_, Result<()>>;

    /// Power comes back.
    fn restart(&self);

    /// What it holds.
    fn info(&self) -> XFaultInfo;
}
