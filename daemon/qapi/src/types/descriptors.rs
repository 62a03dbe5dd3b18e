//! Descriptors that a client passes over the socket of its monitor.

use crate::Qapi;

/// Gives a name to the descriptor that came with the command, for this monitor. A descriptor of that name is closed.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "getfd", since = "0.14")]
pub struct Getfd {
    /// The name, which does not start with a digit.
    pub fdname: String,
}

/// Closes a descriptor that was named with `getfd`.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "closefd", since = "0.14")]
pub struct Closefd {
    /// The name.
    pub fdname: String,
}

/// Where a descriptor was added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Qapi)]
#[qapi(since = "1.2")]
pub struct AddfdInfo {
    /// The number of the set. `/dev/fdset/NUMBER` opens its files.
    pub fdset_id: i64,
    /// The number of the descriptor in the daemon.
    pub fd: i64,
}

/// Adds the descriptor that came with the command to a set of descriptors of the same file.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "add-fd", returns = "AddfdInfo", since = "1.2")]
pub struct AddFd {
    /// The number of the set, which is made if it is not there; the lowest free number if nothing is given.
    pub fdset_id: Option<i64>,
    /// A text that `query-fdsets` shows.
    pub opaque: Option<String>,
}

/// Removes descriptors from a set. Files that were opened through it stay open.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "remove-fd", since = "1.2")]
pub struct RemoveFd {
    /// The number of the set.
    pub fdset_id: i64,
    /// The number of the descriptor; all in the set if nothing is given.
    pub fd: Option<i64>,
}

/// A descriptor in a set.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(since = "1.2")]
pub struct FdsetFdInfo {
    /// Its number in the daemon.
    pub fd: i64,
    /// The text that came with it.
    pub opaque: Option<String>,
}

/// A set of descriptors.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(since = "1.2")]
pub struct FdsetInfo {
    /// Its number.
    pub fdset_id: i64,
    /// The descriptors in it. None are left where they were removed and files are still open.
    pub fds: Vec<FdsetFdInfo>,
}

/// Lists the sets of descriptors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Qapi)]
#[qapi(command = "query-fdsets", returns = "Vec<FdsetInfo>", since = "1.2")]
pub struct QueryFdsets;
