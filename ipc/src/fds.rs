//! Descriptors that travel with bytes on a Unix socket (SCM_RIGHTS), counted.
//!
//! A message of these protocols carries exactly one descriptor or none. A peer can send as many as it likes with each
//! byte: [`Passed`] keeps one and closes all when a second comes, so nothing leaks whatever the peer does. Descriptors
//! beyond the control buffer are closed by the kernel (MSG_CTRUNC), which counts as a second one.

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// The descriptors that came with a message so far.
#[derive(Debug, Default)]
pub enum Passed {
    /// No descriptor.
    #[default]
    None,
    /// The one that the message needs.
    One(OwnedFd),
    /// More than one came; all are closed.
    TooMany,
}

impl Passed {
    fn push(&mut self, fd: OwnedFd) {
        *self = match std::mem::take(self) {
            Self::None => Self::One(fd),
            Self::One(_) | Self::TooMany => Self::TooMany,
        };
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
            fds.for_each(|fd| passed.push(fd));
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        *passed = Passed::TooMany;
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
            let mut passed = Passed::None;
            assert_eq!(receive(&b, &mut [0; 8], &mut passed).unwrap(), 1);
            assert_eq!(matches!(passed, Passed::TooMany), many, "{count}");
            assert_eq!(matches!(passed, Passed::One(_)), !many, "{count}");
            // None is left open: when our end is closed, nobody else holds the peer's socket.
            drop(passed);
            drop(a);
            assert_eq!(
                receive(&b, &mut [0; 8], &mut Passed::None).unwrap(),
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
        let mut passed = Passed::None;
        // The kernel does not merge messages that carry descriptors.
        assert_eq!(receive(&b, &mut [0; 8], &mut passed).unwrap(), 1);
        assert!(matches!(passed, Passed::One(_)));
        assert_eq!(receive(&b, &mut [0; 8], &mut passed).unwrap(), 1);
        assert!(matches!(passed, Passed::TooMany));
    }

    #[test]
    fn sent_descriptor_is_the_same_file() {
        let (a, b) = UnixStream::pair().unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(send(&a, b"hello", Some(file.as_fd())).unwrap(), 5);
        let (mut passed, mut buf) = (Passed::None, [0; 5]);
        assert_eq!(receive(&b, &mut buf, &mut passed).unwrap(), 5);
        let Passed::One(got) = passed else { panic!("no descriptor") };
        assert_ne!(got.as_raw_fd(), file.as_raw_fd());
        let rdev = |fd: BorrowedFd<'_>| rustix::fs::fstat(fd).unwrap().st_rdev;
        assert_eq!(rdev(got.as_fd()), rdev(file.as_fd()));
        drop(b);
        assert_eq!(send(&a, b"x", None).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
