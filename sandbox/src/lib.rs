//! Takes from a process what it does not need: descriptors, identity, capabilities, files, system calls.
//!
//! The order, one step a line; each relies on those before it, and none can be undone:
//!
//! 1. [`process::close_inherited`], [`process::clear_environment`]: what nobody announced goes.
//! 2. The program opens what its options name: sockets, pid file, policy.
//! 3. limits: open files, no core file, no debugger.
//! 4. [`identity::Identity::assume`]: groups, group, user; needs the capabilities that the next step takes.
//! 5. [`capability::keep`]: all sets, the bounding set first since emptying it needs a capability.
//! 6. `no_new_privs`: no executable can give anything back (and step 8 needs it).
//! 7. [`files::restrict`]: Landlock; later threads inherit it.
//! 8. [`syscall::Filters::enter`]: seccomp last, since each step before needs calls that no list allows. One filter
//!    for each role of a thread; a thread enters its own as its first act.
//!
//! [`confine`] does steps 3 to 7. The lists of step 8 are data, `policies/*.json`, a reason in each row; the build script
//! makes them the programs that the kernel takes.
//!
//! This crate decides nothing about when and for whom; it knows neither options nor protocols.
#![expect(unsafe_code, reason = "fork, closing inherited descriptors, the SIGSYS handler: no safe wrapper exists")]

pub mod capability;
pub mod files;
pub mod identity;
mod names;
#[cfg(test)]
#[path = "../build/policy.rs"]
mod policy;
pub mod process;
pub mod syscall;

pub use caps::Capability;

/// A step that failed.
#[derive(Debug, thiserror::Error)]
#[error("sandbox: {step}: {reason}")]
pub struct Error {
    /// Which step.
    pub step: &'static str,
    /// Why.
    pub reason: String,
}

impl Error {
    fn new(step: &'static str, reason: impl std::fmt::Display) -> Self {
        Self { step, reason: reason.to_string() }
    }
}

/// What a process keeps.
#[derive(Debug)]
pub struct Plan<'a> {
    /// The most descriptors it may have open at a time, lowered only as far as the hard limit allows; `None` leaves that.
    pub open_files: Option<u64>,
    /// Whether its memory is nobody's business: no core file, no debugger.
    pub secret: bool,
    /// Who it becomes; `None` stays who it is.
    pub identity: Option<identity::Identity>,
    /// Capabilities it keeps, if it has them.
    pub capabilities: &'a [Capability],
    /// Files it may still open; `None` leaves Landlock out.
    pub files: Option<&'a files::Files>,
}

/// What is in force after [`confine`].
#[derive(Debug, Clone)]
pub struct Report {
    /// The capabilities left.
    pub capabilities: Vec<Capability>,
    /// Landlock.
    pub files: files::Enforcement,
}

/// Steps 3 to 7. Call it while the process has one thread.
pub fn confine(plan: &Plan<'_>) -> Result<Report, Error> {
    if let Some(open_files) = plan.open_files {
        process::limit_files(open_files)?;
    }
    if plan.secret {
        process::no_core_file()?;
    }
    let keep_through_setuid = plan.identity.is_some();
    if keep_through_setuid {
        nix::sys::prctl::set_keepcaps(true).map_err(|e| Error::new("keep capabilities", e))?;
    }
    capability::empty_bounding_set()?;
    if let Some(identity) = &plan.identity {
        identity.assume()?;
    }
    let capabilities = capability::keep(plan.capabilities)?;
    nix::sys::prctl::set_no_new_privs().map_err(|e| Error::new("no new privileges", e))?;
    if plan.secret {
        // Changing the user turned dumping off already; who runs as one user from the start needs it said.
        nix::sys::prctl::set_dumpable(false).map_err(|e| Error::new("no debugger", e))?;
    }
    let files = plan.files.map_or(Ok(files::Enforcement::None), files::restrict)?;
    Ok(Report { capabilities, files })
}
