//! Who the process is: user, group, supplementary groups.

use crate::Error;
use nix::unistd::{Gid, Group, Uid, User, setgroups, setresgid, setresuid};

/// A user and a group to become. Supplementary groups are dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// The user; `None` keeps it.
    pub user: Option<Uid>,
    /// The group; `None` keeps it.
    pub group: Option<Gid>,
}

/// A user by name or number: its id, and its primary group if the name is known.
pub fn user(name: &str) -> Option<(Uid, Option<Gid>)> {
    match User::from_name(name) {
        Ok(Some(user)) => Some((user.uid, Some(user.gid))),
        _ => name.parse().ok().map(|id| (Uid::from_raw(id), None)),
    }
}

/// A group by name or number.
pub fn group(name: &str) -> Option<Gid> {
    match Group::from_name(name) {
        Ok(Some(group)) => Some(group.gid),
        _ => name.parse().ok().map(Gid::from_raw),
    }
}

impl Identity {
    /// Becomes it, for good: real, effective and saved ids.
    pub fn assume(&self) -> Result<(), Error> {
        let error = |e| Error::new("user and group", e);
        setgroups(&[]).map_err(error)?;
        if let Some(gid) = self.group {
            setresgid(gid, gid, gid).map_err(error)?;
        }
        if let Some(uid) = self.user {
            setresuid(uid, uid, uid).map_err(error)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers() {
        assert_eq!(user("root"), Some((Uid::from_raw(0), Some(Gid::from_raw(0)))));
        assert_eq!(user("123456"), Some((Uid::from_raw(123_456), None)));
        assert_eq!(user("no such user"), None);
        assert_eq!(user(""), None);
        assert_eq!(user("-1"), None);
        assert_eq!(group("99999999999"), None);
        assert_eq!(group("root"), Some(Gid::from_raw(0)));
    }
}
