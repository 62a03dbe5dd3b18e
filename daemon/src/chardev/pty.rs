//! A pseudo terminal as a character device: whoever opens its other end is the client.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::task::{Context, Poll};
use std::time::Duration;

use ::io::Channel;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::termios::{FlushArg, SetArg, cfmakeraw, tcflush, tcgetattr, tcsetattr};
use qapi::types::chardev::ChardevPty;
use qapi::{Error, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::files::Link;
use super::transport::Transport;
use super::{Common, Connection};

/// Time between two looks whether somebody has opened the other end: the kernel does not tell.
const LOOK: Duration = Duration::from_millis(100);

/// The daemon's end.
pub(super) struct Pty {
    master: OwnedFd,
    name: String,
    common: Common,
    _link: Option<Link>,
}

impl Pty {
    /// A new terminal, and the link to it that the options ask for.
    ///
    /// # Errors
    /// The system refuses.
    pub(super) fn open(options: &ChardevPty, common: &Common) -> Result<Pty> {
        let failed = |error: nix::Error| Error::io("Failed to create PTY", error.into());
        let pty = nix::pty::openpty(None, None).map_err(failed)?;
        fcntl(&pty.master, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map_err(failed)?;
        let path = nix::unistd::ttyname(&pty.slave).map_err(failed)?;
        let mut mode = tcgetattr(&pty.slave).map_err(failed)?;
        cfmakeraw(&mut mode);
        tcsetattr(&pty.slave, SetArg::TCSANOW, &mode).map_err(failed)?;
        let link = options.path.as_deref().map(|link| Link::new(link, &path)).transpose();
        let link = link.map_err(|error| Error::io("Failed to create PTY symlink", error))?;
        let name = path.to_string_lossy().into_owned();
        common.label.set(format!("pty:{name}"));
        Ok(Pty { master: pty.master, name, common: common.clone(), _link: link })
    }

    /// The path of the other end.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The next client.
    pub(super) async fn connection(&mut self) -> Option<Connection> {
        while !self.has_client() {
            tokio::time::sleep(LOOK).await;
        }
        let made = self.master.try_clone().and_then(|guard| Ok((Channel::single(self.master.try_clone()?)?, guard)));
        match made {
            Ok((channel, guard)) => Some(Connection::plain(Terminal(channel), &self.common).with_guard(Flush(guard))),
            Err(error) => {
                tracing::warn!(target: "chardev_client_lost", "Character device {} lost a client: {error}", self.name);
                None
            }
        }
    }

    /// Whether the other end is open, or was and has left something to read.
    fn has_client(&self) -> bool {
        let mut fds = [PollFd::new(&self.master, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let polled = poll(&mut fds, Some(&now));
        let [fd] = fds;
        polled.is_ok() && (fd.revents().contains(PollFlags::IN) || !fd.revents().contains(PollFlags::HUP))
    }
}

/// What a client did not read is not for the next one.
struct Flush(OwnedFd);

impl Drop for Flush {
    fn drop(&mut self) {
        // Without a terminal there is nothing to throw away.
        let _ = tcflush(self.0.as_fd(), FlushArg::TCIOFLUSH);
    }
}

/// A terminal, whose end shows as an error.
struct Terminal(Channel);

impl Transport for Terminal {
    fn poll_read(&self, cx: &mut Context<'_>, buffer: &mut [u8], passed: &mut Vec<OwnedFd>) -> Poll<io::Result<usize>> {
        match self.0.poll_read(cx, buffer, passed) {
            Poll::Ready(Err(error)) if error.raw_os_error() == Some(nix::libc::EIO) => Poll::Ready(Ok(0)),
            other => other,
        }
    }

    fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.poll_writable(cx)
    }

    fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        self.0.try_write(bytes)
    }

    fn is_gone(&self) -> bool {
        // A terminal is closed in both directions at once.
        true
    }
}
