//! Files: Landlock denies every path that no rule names; descriptors that are open already are not touched.

use crate::Error;
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, NetPort, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetStatus, Scope,
};
use std::path::PathBuf;

/// What may still be done beneath a path.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Rule {
    /// Open for reading.
    Read(PathBuf),
    /// Remove files of this folder (a socket, a pid file), nothing else.
    Remove(PathBuf),
    /// Open for reading and writing, change the size, send ioctls.
    Use(PathBuf),
    /// Make names of sockets and files in this folder, and remove them, without opening what is there.
    Name(PathBuf),
    /// Use all in this folder; make and remove files and sockets there.
    Keep(PathBuf),
}

impl Rule {
    fn access(&self) -> (&PathBuf, BitFlags<AccessFs>) {
        let using = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate | AccessFs::IoctlDev;
        match self {
            Self::Read(path) => (path, AccessFs::ReadFile | AccessFs::ReadDir),
            Self::Remove(path) => (path, AccessFs::RemoveFile.into()),
            Self::Use(path) => (path, using | AccessFs::ReadDir),
            Self::Name(path) => (path, AccessFs::MakeSock | AccessFs::MakeReg | AccessFs::RemoveFile),
            Self::Keep(path) => {
                let making = AccessFs::MakeReg | AccessFs::MakeSock | AccessFs::MakeSym | AccessFs::Refer;
                (path, using | AccessFs::ReadDir | making | AccessFs::RemoveFile)
            }
        }
    }
}

/// All that may still be reached by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Files {
    /// Files and folders.
    pub rules: Vec<Rule>,
    /// TCP ports to listen on.
    pub listen: Vec<u16>,
    /// TCP ports of others to connect to.
    pub connect: Vec<u16>,
    /// Whether abstract sockets of other programs may be connected to.
    pub abstract_sockets: bool,
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

/// Denies all files and TCP ports but these, signals to outside, and abstract sockets unless they are allowed; for this
/// thread and those it starts. A path that does not exist is an error.
pub fn restrict(files: &Files) -> Result<Enforcement, Error> {
    let error = |e: &dyn std::fmt::Display| Error::new("files", e);
    let all = Scope::from_all(ABI::V6);
    let scopes = if files.abstract_sockets { all & !BitFlags::from(Scope::AbstractUnixSocket) } else { all };
    let mut set = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI::V6))
        .and_then(|s| s.handle_access(AccessNet::from_all(ABI::V6)))
        .and_then(|s| s.scope(scopes))
        .and_then(Ruleset::create)
        .map_err(|e| error(&e))?;
    for rule in &files.rules {
        let (path, access) = rule.access();
        let beneath = PathFd::new(path).map_err(|e| error(&e))?;
        // A regular file has no folder to list; such rights are left out.
        let access = if path.is_dir() { access } else { access & AccessFs::from_file(ABI::V6) };
        set = set.add_rule(PathBeneath::new(beneath, access)).map_err(|e| error(&e))?;
    }
    for (ports, access) in [(&files.listen, AccessNet::BindTcp), (&files.connect, AccessNet::ConnectTcp)] {
        for port in ports {
            set = set.add_rule(NetPort::new(*port, access)).map_err(|e| error(&e))?;
        }
    }
    Ok(match set.restrict_self().map_err(|e| error(&e))?.ruleset {
        RulesetStatus::FullyEnforced => Enforcement::Full,
        RulesetStatus::PartiallyEnforced => Enforcement::Partial,
        RulesetStatus::NotEnforced => Enforcement::None,
    })
}
