//! Descriptors that travel with bytes on a Unix socket (SCM_RIGHTS), counted.
//!
//! A message of these protocols carries exactly one descriptor or none. A peer can send as many as it likes with each
//! byte: [`Passed`] counts them, and whoever receives stops at the second. At most two come with one receive; those beyond
//! are closed by the kernel (MSG_CTRUNC), which counts as too many. All are owned, so nothing leaks whatever the peer does.

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// The descriptors that came with a message so far.
#[derive(Debug, Default)]
pub struct Passed {
    fds: Vec<OwnedFd>,
    truncated: bool,
}

impl Passed {
    /// Did none come?
    pub fn is_none(&self) -> bool {
        self.fds.is_empty() && !self.truncated
    }

    /// Did more than one come? Then nothing more should be received: it would only bring more.
    pub fn is_too_many(&self) -> bool {
        self.fds.len() > 1 || self.truncated
    }

    /// The one that came; `None`, and they all stay here, if it is none or too many.
    pub fn take_one(&mut self) -> Option<OwnedFd> {
        if self.is_too_many() { None } else { self.fds.pop() }
    }

    /// All of them.
    pub fn take_all(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.fds)
    }
}

/// Receives at most `buf.len()` bytes and adds what descriptors come with them to `passed`.
///
/// Returns the number of bytes, 0 at the end of the stream. Descriptors are close-on-exec. Errors are those of
/// recvmsg(2), `WouldBlock` on a non-blocking socket included.
pub fn receive(socket: impl AsFd, buf: &mut [u8], passed: &mut Passed) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(socket, &mut [IoSliceMut::new(buf)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            passed.fds.extend(fds);
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        passed.truncated = true;
    }
    Ok(received.bytes)
}

/// Sends bytes, and a descriptor with the first of them; returns how many bytes went. A closed peer is an error
/// (`BrokenPipe`), never a signal.
pub fn send(socket: impl AsFd, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = fd.map(|fd| [fd]);
    if let Some(fds) = &fds {
        // The buffer has room for exactly this message.
        if !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::Error::other("no room for a descriptor in the control message"));
        }
    }
    Ok(sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;

    fn send_many(socket: &UnixStream, bytes: &[u8], count: usize) {
        let fds = vec![socket.as_fd(); count];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::empty()).unwrap();
    }

    #[test]
    fn one_is_kept_more_are_closed() {
        for (count, many) in [(1, false), (2, true), (3, true), (253, true)] {
            let (a, b) = UnixStream::pair().unwrap();
            send_many(&a, b"x", count);
            let mut passed = Passed::default();
            assert_eq!(receive(&b, &mut [0; 8], &mut passed).unwrap(), 1);
            assert_eq!((passed.is_too_many(), passed.take_one().is_some()), (many, !many), "{count}");
            // None is left open: when our end is closed, nobody else holds the peer's socket.
            drop(passed);
            drop(a);
            assert_eq!(
                receive(&b, &mut [0; 8], &mut Passed::default()).unwrap(),
                0,
                "{count}: a copy of the peer's end lives"
            );
        }
    }

    #[test]
    fn a_second_message_counts() {
        let (a, b) = UnixStream::pair().unwrap();
        send_many(&a, b"x", 1);
        send_many(&a, b"y", 1);
        let mut passed = Passed::default();
        // The kernel does not merge messages that carry descriptors.
        assert_eq!(receive(&b, &mut [0; 8], &mut passed).unwrap(), 1);
        assert!(!passed.is_too_many() && !passed.is_none());
        assert_eq!(receive(&b, &mut [0; 8], &mut passed).unwrap(), 1);
        assert!(passed.is_too_many() && passed.take_one().is_none());
    }

    #[test]
    fn sent_descriptor_is_the_same_file() {
        let (a, b) = UnixStream::pair().unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(send(&a, b"hello", Some(file.as_fd())).unwrap(), 5);
        let (mut passed, mut buf) = (Passed::default(), [0; 5]);
        assert_eq!(receive(&b, &mut buf, &mut passed).unwrap(), 5);
        let got = passed.take_one().unwrap();
        assert_ne!(got.as_raw_fd(), file.as_raw_fd());
        let rdev = |fd: BorrowedFd<'_>| rustix::fs::fstat(fd).unwrap().st_rdev;
        assert_eq!(rdev(got.as_fd()), rdev(file.as_fd()));
        drop(b);
        assert_eq!(send(&a, b"x", None).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
