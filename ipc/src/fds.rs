//! Descriptors that travel with bytes on a Unix socket (SCM_RIGHTS), counted.
//!
//! A message of these protocols carries exactly one descriptor or none; of others, some. A peer can send as many as it likes with
//! each byte: [`Passed`] counts them, and whoever receives stops at the first too many. All are owned, so nothing leaks whatever
//! the peer does.
//!
//! The last close of a descriptor can hang for as long as its sender likes: a socket that lingers, a file of the
//! sender's own file system. So nothing here closes one, and neither does the kernel here: a message is looked at first
//! (MSG_PEEK), which leaves the kernel its own references, and taken off the socket only when every descriptor of it is
//! owned. What is still on a socket is closed with it, by whoever closes that.

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Descriptors with one message at most, whoever sends it. `[linux/net/scm.h SCM_MAX_FD]`
const MOST: usize = 253;

/// The descriptors that came with a message so far.
#[derive(Debug)]
pub struct Passed {
    fds: Vec<OwnedFd>,
    /// Copies of some that did not come yet.
    shown: Vec<OwnedFd>,
    truncated: bool,
    most: usize,
}

impl Default for Passed {
    fn default() -> Self {
        Self::up_to(1)
    }
}

impl Passed {
    /// None came yet, and there may be so many.
    pub fn up_to(most: usize) -> Self {
        Self { fds: Vec::new(), shown: Vec::new(), truncated: false, most }
    }

    /// Did none come?
    pub fn is_none(&self) -> bool {
        self.fds.is_empty() && !self.truncated
    }

    /// Did more come than may? Then nothing more should be received: it would only bring more.
    pub fn is_too_many(&self) -> bool {
        self.fds.len() > self.most || self.truncated
    }

    /// The one that came; `None`, and they all stay here, if it is none or more.
    pub fn take_one(&mut self) -> Option<OwnedFd> {
        if self.fds.len() > 1 || self.is_too_many() { None } else { self.fds.pop() }
    }

    /// Those that came.
    pub fn take_came(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.fds)
    }

    /// All of them, and all else that has to be closed.
    pub fn take_all(&mut self) -> Vec<OwnedFd> {
        let mut all = self.take_came();
        all.append(&mut self.shown);
        all
    }
}

/// Receives at most `buf.len()` bytes and adds what descriptors come with them to `passed`.
///
/// Returns the number of bytes, 0 at the end of the stream. Descriptors are close-on-exec. Only one thread at a time may
/// receive from a socket.
///
/// # Errors
/// Those of recvmsg(2), `WouldBlock` on a non-blocking socket included. `InvalidData`: more descriptors came so far than may;
/// nothing more should be received.
pub fn receive(socket: impl AsFd, buf: &mut [u8], passed: &mut Passed) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
    // One more than may come shows that there are too many, and more need not be owned.
    let room = rustix::cmsg_space!(ScmRights(passed.most.saturating_add(1).min(MOST)));
    let mut control = RecvAncillaryBuffer::new(space.get_mut(..room).unwrap_or_default());
    let look = RecvFlags::PEEK | RecvFlags::CMSG_CLOEXEC;
    let seen = recvmsg(&socket, &mut [IoSliceMut::new(buf)], &mut control, look)?;
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(some) = message {
            fds.extend(some);
        }
    }
    if fds.len() > passed.most || seen.flags.contains(ReturnFlags::CTRUNC) {
        // Not all of them may be owned, so the message stays where it is.
        passed.fds.extend(fds);
        passed.truncated = true;
        return Err(too_many(passed));
    }
    let buf = buf.get_mut(..seen.bytes).unwrap_or_default();
    if buf.is_empty() {
        return Ok(0);
    }
    // What was seen is there, so this neither waits nor brings other bytes.
    let mut none = RecvAncillaryBuffer::default();
    let taken = recvmsg(&socket, &mut [IoSliceMut::new(buf)], &mut none, RecvFlags::empty())?;
    // Linux shows with the last bytes of one message also the descriptors of the next. Those are still on the socket, but
    // each close of a file may hang, not only the last one.
    let came = taken.flags.contains(ReturnFlags::CTRUNC);
    if came { &mut passed.fds } else { &mut passed.shown }.extend(fds);
    if passed.is_too_many() { Err(too_many(passed)) } else { Ok(taken.bytes) }
}

fn too_many(passed: &Passed) -> io::Error {
    let text = if passed.most == 1 { "More than one file descriptor in request" } else { "too many file descriptors" };
    io::Error::new(io::ErrorKind::InvalidData, text)
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
            assert_eq!(receive(&b, &mut [0; 8], &mut passed).ok(), (!many).then_some(1));
            assert_eq!((passed.is_too_many(), passed.take_one().is_some()), (many, !many), "{count}");
            // None is left open: when our end is closed and the message gone, nobody else holds the peer's socket.
            drop(passed);
            drop(a);
            if many {
                rustix::net::recv(&b, &mut [0; 8], RecvFlags::empty()).unwrap();
            }
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
        let error = receive(&b, &mut [0; 8], &mut passed).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert!(passed.is_too_many() && passed.take_one().is_none());
    }

    #[test]
    fn bytes_come_in_pieces_with_the_descriptors_of_their_message() {
        let (a, b) = UnixStream::pair().unwrap();
        send_many(&a, b"abc", 1);
        send(&a, b"de", None).unwrap();
        send_many(&a, b"f", 1);
        let (mut got, mut passed) = (Vec::new(), Vec::new());
        while got.len() < 6 {
            let (mut buf, mut with) = ([0; 2], Passed::default());
            let n = receive(&b, &mut buf, &mut with).unwrap();
            got.extend_from_slice(&buf[..n]);
            passed.push((n, with.take_one().is_some()));
        }
        assert_eq!(got, b"abcdef");
        assert_eq!(passed.iter().filter(|row| row.1).count(), 2, "{passed:?}");
        assert!(passed[0].1, "{passed:?}");
    }

    #[test]
    fn a_descriptor_lives_on_until_its_owner_closes_it() {
        let (a, b) = UnixStream::pair().unwrap();
        let (reader, writer) = io::pipe().unwrap();
        let fds = [writer.as_fd(); 3];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        sendmsg(&a, &[IoSlice::new(b"x")], &mut control, SendFlags::empty()).unwrap();
        drop(writer);
        let mut passed = Passed::default();
        receive(&b, &mut [0; 8], &mut passed).unwrap_err();
        drop(passed);
        // The kernel has not closed the third, for which there was no room.
        rustix::io::ioctl_fionbio(&reader, true).unwrap();
        let read = || rustix::io::read(&reader, &mut [0; 1]);
        assert_eq!(read(), Err(rustix::io::Errno::AGAIN));
        drop(b);
        assert_eq!(read(), Ok(0));
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
