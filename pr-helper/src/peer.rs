//! Who a client is: the kernel's word on its process, user and group, and the systemd unit that the process is in.

use crate::policy::{Peer, unit_of_cgroup};
use nix::sys::socket::{getsockopt, sockopt::PeerPidfd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io;
use std::os::fd::OwnedFd;
use tokio::net::UnixStream;

/// The peer of a connection; its unit only if `with_unit`.
pub fn of(stream: &UnixStream, with_unit: bool) -> io::Result<Peer> {
    let credentials = stream.peer_cred()?;
    let pid = credentials.pid().unwrap_or(0);
    let unit = if with_unit { unit(stream, pid) } else { None };
    Ok(Peer { pid, uid: credentials.uid(), gid: credentials.gid(), unit })
}

/// The unit of the process that connected; `None` if it cannot be told for certain.
///
/// A number can pass to another process. The process itself is held by a descriptor (SO_PEERPIDFD, Linux 6.5): if it
/// still runs after its cgroup was read, the cgroup was its own.
fn unit(stream: &UnixStream, pid: i32) -> Option<String> {
    let process: OwnedFd = getsockopt(stream, PeerPidfd).ok()?;
    let cgroup = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let mut ended = [PollFd::new(&process, PollFlags::IN)];
    match poll(&mut ended, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
        Ok(0) => unit_of_cgroup(&cgroup),
        _ => None,
    }
}
