//! Files: Landlock denies every path that no rule names; descriptors that are open already are not touched.

use crate::Error;
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope,
};
use std::path::PathBuf;

/// What may still be done beneath a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rule {
    /// Open for reading.
    Read(PathBuf),
    /// Remove files of this folder (a socket, a pid file), nothing else.
    Remove(PathBuf),
}

impl Rule {
    fn access(&self) -> (&PathBuf, BitFlags<AccessFs>) {
        match self {
            Self::Read(path) => (path, AccessFs::ReadFile | AccessFs::ReadDir),
            Self::Remove(path) => (path, AccessFs::RemoveFile.into()),
        }
    }
}

/// How far the kernel goes along.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Enforcement {
    /// All that this version of the program asks for.
    Full,
    /// An older kernel: files, but not all of network, signals and abstract sockets.
    Partial,
    /// The kernel has no Landlock.
    None,
}

/// Denies all files but these, all of TCP, and signals and abstract sockets to outside; for this thread and those it
/// starts. A path that does not exist is an error.
pub fn restrict(rules: &[Rule]) -> Result<Enforcement, Error> {
    let error = |e: &dyn std::fmt::Display| Error::new("files", e);
    let mut set = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI::V6))
        .and_then(|s| s.handle_access(AccessNet::from_all(ABI::V6)))
        .and_then(|s| s.scope(Scope::from_all(ABI::V6)))
        .and_then(Ruleset::create)
        .map_err(|e| error(&e))?;
    for rule in rules {
        let (path, access) = rule.access();
        let beneath = PathFd::new(path).map_err(|e| error(&e))?;
        // A regular file has no folder to list; such rights are left out.
        let access = if path.is_dir() { access } else { access & AccessFs::from_file(ABI::V6) };
        set = set.add_rule(PathBeneath::new(beneath, access)).map_err(|e| error(&e))?;
    }
    Ok(match set.restrict_self().map_err(|e| error(&e))?.ruleset {
        RulesetStatus::FullyEnforced => Enforcement::Full,
        RulesetStatus::PartiallyEnforced => Enforcement::Partial,
        RulesetStatus::NotEnforced => Enforcement::None,
    })
}
