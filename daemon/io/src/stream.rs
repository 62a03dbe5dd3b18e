//! Stream sockets for the hot path: receive into and send from I/O buffers, many messages in one system call.
//!
//! A [`Stream`] belongs to the event loop of the thread that made it. To move a connection to another IOThread, turn it
//! into its descriptor, send that and make a stream of it there. One task may receive and one may send at a time; both
//! may be dropped at any await, what the socket took or gave until then is accounted for.
//!
//! After a receive or send that moved fewer bytes than it could, the socket is known to be empty or full, so the next call
//! waits for readiness instead of asking the kernel in vain. (Readiness that arrives meanwhile is not lost: it is
//! counted, and only what was seen before the call is cleared.)
//!
//! Descriptors that come with the bytes are none of a stream's protocols: the peer is hindered from sending any where the kernel
//! can (SO_PASSRIGHTS, Linux 6.16), and what comes all the same ends the connection and is closed elsewhere ([`crate::foreign`]).
//!
//! Room to send is only watched for while it is scarce: a unix socket reports it whenever its peer has taken something, which
//! would wake the thread once more for each reply.

use crate::polling::note_event;
use crate::send_queue::SendQueue;
use crate::socket::BoundPath;
use buf::IoBuf;
use nix::errno::Errno;
use nix::sys::socket::sockopt;
use std::cell::RefCell;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::task::{Context, Poll, ready};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Entries of one gathered send or scattered receive.
const BATCH: usize = 128;

/// A connected stream socket: unix, TCP or vsock.
#[derive(Debug)]
pub struct Stream {
    /// Watched for bytes to receive.
    fd: AsyncFd<OwnedFd>,
    /// Watches for room to send, since the socket was full.
    room: RefCell<Option<Room>>,
}

/// Sends in a row that found room, after which it is not watched for any more.
const CALM: u32 = 64;

#[derive(Debug)]
struct Room {
    /// Another descriptor of the same socket, for the event loop knows each only once.
    fd: AsyncFd<OwnedFd>,
    /// Sends that found room since the socket was last full.
    calm: u32,
}

impl Stream {
    /// Takes a connected socket into the event loop of the calling thread, and makes it non-blocking.
    ///
    /// # Errors
    /// The descriptor cannot be polled, or no event loop runs here.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        refuse_descriptors(&fd);
        Ok(Self { fd: register(fd, Interest::READABLE)?, room: RefCell::default() })
    }

    /// Gives the descriptor back, out of the event loop; it stays non-blocking.
    pub fn into_fd(self) -> OwnedFd {
        self.fd.into_inner()
    }

    /// Receives what is there, at most as much as fits, and waits if there is nothing. 0 is the end of the stream.
    ///
    /// # Errors
    /// The connection is broken, or the buffer is empty.
    pub async fn recv(&self, buf: &IoBuf) -> io::Result<usize> {
        self.recv_scattered(&[buf]).await
    }

    /// As [`recv`](Self::recv) into several buffers in order: the rest of a payload, then the next requests.
    ///
    /// # Errors
    /// As [`recv`](Self::recv).
    pub async fn recv_scattered(&self, bufs: &[&IoBuf]) -> io::Result<usize> {
        if bufs.iter().all(|buf| buf.is_empty()) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "no room to receive into"));
        }
        std::future::poll_fn(|cx| self.poll_recv(cx, bufs)).await
    }

    /// Receives until `buf` is full.
    ///
    /// # Errors
    /// As [`recv`](Self::recv); `UnexpectedEof` if the stream ends before.
    pub async fn recv_exact(&self, buf: &IoBuf) -> io::Result<()> {
        let mut done = 0;
        while done < buf.len() {
            match self.recv(&buf.slice(done, buf.len())).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => done += n,
            }
        }
        Ok(())
    }

    /// Sends all that waits in `queue`. If it fails or is dropped, the queue holds what was not sent.
    ///
    /// # Errors
    /// The connection is broken. No SIGPIPE is raised.
    pub async fn send(&self, queue: &mut SendQueue) -> io::Result<()> {
        while !queue.is_empty() {
            std::future::poll_fn(|cx| self.poll_send(cx, queue)).await?;
        }
        Ok(())
    }

    /// Sends what the socket takes now, without waiting; true if the queue is empty afterwards.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    pub fn try_send(&self, queue: &mut SendQueue) -> io::Result<bool> {
        while !queue.is_empty() {
            match self.send_once(queue) {
                Ok(_) => {}
                Err(Errno::EAGAIN) => return Ok(false),
                Err(e) => return Err(e.into()),
            }
        }
        Ok(true)
    }

    /// Ends the sending direction, so that the peer sees the end of the stream after what was sent.
    ///
    /// # Errors
    /// The connection is broken.
    pub fn shutdown_send(&self) -> io::Result<()> {
        Ok(nix::sys::socket::shutdown(self.fd.as_raw_fd(), nix::sys::socket::Shutdown::Write)?)
    }

    /// Ends both directions: whoever waits on either side wakes up.
    ///
    /// # Errors
    /// The connection is broken already.
    pub fn shutdown(&self) -> io::Result<()> {
        Ok(nix::sys::socket::shutdown(self.fd.as_raw_fd(), nix::sys::socket::Shutdown::Both)?)
    }

    /// Asks for kernel buffers of `bytes` in both directions, so that large transfers take fewer calls. A wish: the
    /// system's limits hold for the unprivileged, and TCP grows its buffers by itself and is left alone.
    pub fn raise_buffers(&self, bytes: usize) {
        use nix::sys::socket::{AddressFamily, SockaddrLike, SockaddrStorage, getsockname, setsockopt};
        let family = getsockname::<SockaddrStorage>(self.fd.as_raw_fd()).ok().and_then(|name| name.family());
        if family != Some(AddressFamily::Unix) {
            return;
        }
        if setsockopt(&self.fd, sockopt::SndBufForce, &bytes).is_err() {
            let _ = setsockopt(&self.fd, sockopt::SndBuf, &bytes);
        }
        if setsockopt(&self.fd, sockopt::RcvBufForce, &bytes).is_err() {
            let _ = setsockopt(&self.fd, sockopt::RcvBuf, &bytes);
        }
    }

    /// Sends each message at once (TCP_NODELAY). Without effect on sockets that know no delay.
    pub fn set_nodelay(&self) {
        let _ = nix::sys::socket::setsockopt(&self.fd, sockopt::TcpNoDelay, &true);
    }

    /// Receives what is there without waiting. 0 is the end of the stream, or that there is no room in `bufs`.
    ///
    /// # Errors
    /// `WouldBlock` if there is nothing; else the connection is broken.
    pub fn try_recv(&self, bufs: &[&IoBuf]) -> io::Result<usize> {
        loop {
            match self.recv_once(bufs) {
                Err(Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
                Ok((n, _)) => return Ok(n),
            }
        }
    }

    fn poll_recv(&self, cx: &mut Context<'_>, bufs: &[&IoBuf]) -> Poll<io::Result<usize>> {
        loop {
            let mut ready = ready!(self.fd.poll_read_ready(cx))?;
            match self.recv_once(bufs) {
                Ok((n, room)) => {
                    if n < room && n > 0 {
                        ready.clear_ready();
                    }
                    return Poll::Ready(Ok(n));
                }
                Err(Errno::EAGAIN) => ready.clear_ready(),
                Err(Errno::EINTR) => {}
                Err(e) => return Poll::Ready(Err(e.into())),
            }
        }
    }

    /// One scattered receive: the bytes received, and how many there was room for.
    fn recv_once(&self, bufs: &[&IoBuf]) -> Result<(usize, usize), Errno> {
        let mut room = 0;
        let mut segments = bufs.iter().flat_map(|buf| buf.segments());
        let mut iov = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; BATCH];
        let mut count = 0;
        for (place, segment) in iov.iter_mut().zip(&mut segments) {
            *place = libc::iovec { iov_base: segment.ptr.as_ptr().cast(), iov_len: segment.len };
            room += segment.len;
            count += 1;
        }
        // SAFETY: a plain structure, for which zeroes are a value.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        let mut control = [MaybeUninit::<u64>::uninit(); CONTROL];
        (message.msg_iov, message.msg_iovlen) = (iov.as_mut_ptr(), count);
        (message.msg_control, message.msg_controllen) = (control.as_mut_ptr().cast(), size_of_val(&control));
        // SAFETY: the first `count` entries name memory that `bufs` keep valid, there are BATCH at most, and `control` has the
        // length that is said.
        let result = unsafe { libc::recvmsg(self.fd.as_raw_fd(), &mut message, libc::MSG_CMSG_CLOEXEC) };
        let received = usize::try_from(result).map_err(|_| Errno::last())?;
        if message.msg_controllen != 0 {
            // SAFETY: the kernel has just filled it.
            let passed = unsafe { descriptors(&message) };
            if !passed.is_empty() {
                crate::foreign::dispose(passed);
                return Err(Errno::EPROTO);
            }
        }
        note_event();
        Ok((received, room))
    }

    fn poll_send(&self, cx: &mut Context<'_>, queue: &mut SendQueue) -> Poll<io::Result<()>> {
        let mut place = self.room.borrow_mut();
        let room = match &mut *place {
            Some(room) => room,
            none => match self.send_once(queue) {
                Ok(Sent::All) => return Poll::Ready(Ok(())),
                Ok(Sent::Some) | Err(Errno::EAGAIN) => {
                    let fd = register(self.fd.get_ref().try_clone()?, Interest::WRITABLE)?;
                    none.insert(Room { fd, calm: 0 })
                }
                Err(e) => return Poll::Ready(Err(e.into())),
            },
        };
        loop {
            let mut ready = ready!(room.fd.poll_write_ready(cx))?;
            match self.send_once(queue) {
                Ok(Sent::All) => {
                    room.calm += 1;
                    if room.calm >= CALM {
                        *place = None;
                    }
                    return Poll::Ready(Ok(()));
                }
                Ok(Sent::Some) | Err(Errno::EAGAIN) => {
                    ready.clear_ready();
                    room.calm = 0;
                }
                Err(e) => return Poll::Ready(Err(e.into())),
            }
        }
    }

    /// One gathered send from the front of the queue.
    fn send_once(&self, queue: &mut SendQueue) -> Result<Sent, Errno> {
        let mut iov = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; BATCH];
        let (count, bytes) = queue.gather(&mut iov);
        // SAFETY: msghdr is a plain structure, for which zeroes are a value.
        let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
        msg.msg_iov = iov.as_mut_ptr();
        msg.msg_iovlen = count;
        loop {
            // SAFETY: the entries name memory of the queue, which is not changed before the call returns.
            let result = unsafe { libc::sendmsg(self.fd.as_raw_fd(), &msg, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
            match usize::try_from(result) {
                Ok(n) => {
                    queue.consume(n);
                    return Ok(if n == bytes { Sent::All } else { Sent::Some });
                }
                Err(_) => match Errno::last() {
                    Errno::EINTR => {}
                    e => return Err(e),
                },
            }
        }
    }
}

/// Words of room for all descriptors that one message can have, so that the kernel closes none. `[linux/net/scm.h SCM_MAX_FD]`
const CONTROL: usize = 2 + 253 / 2 + 1;

/// The descriptors that came with a message.
///
/// # Safety
/// recvmsg(2) has filled it, and nobody else takes them.
unsafe fn descriptors(message: &libc::msghdr) -> Vec<OwnedFd> {
    let mut found = Vec::new();
    // SAFETY: by the contract.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(message) };
    while let Some(header) = NonNull::new(next) {
        // SAFETY: the macros give places in the filled room, or null, which is the end.
        unsafe {
            let one = header.read();
            if (one.cmsg_level, one.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
                let numbers = libc::CMSG_DATA(header.as_ptr()).cast::<RawFd>();
                let count = one.cmsg_len.saturating_sub(libc::CMSG_LEN(0) as usize) / size_of::<RawFd>();
                found.extend((0..count).map(|at| OwnedFd::from_raw_fd(numbers.add(at).read_unaligned())));
            }
            next = libc::CMSG_NXTHDR(message, header.as_ptr());
        }
    }
    found
}

/// `[linux/asm-generic/socket.h]`
const SO_PASSRIGHTS: libc::c_int = 83;

/// Hinders peers from sending descriptors to this socket, or to those that it will accept, if the kernel can.
pub(crate) fn refuse_descriptors(fd: &OwnedFd) {
    let off: libc::c_int = 0;
    // A socket that is none of unix, and an older kernel, say no.
    // SAFETY: the value is a variable of that length.
    unsafe {
        libc::setsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, SO_PASSRIGHTS, (&raw const off).cast(), 4);
    }
}

enum Sent {
    /// All that was offered.
    All,
    /// Less: the socket is full.
    Some,
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A listening stream socket of any family.
#[derive(Debug)]
pub struct Listener {
    fd: AsyncFd<OwnedFd>,
    /// Removed when the listener goes.
    _path: Option<BoundPath>,
}

impl Listener {
    /// Takes a listening socket into the event loop of the calling thread, and makes it non-blocking.
    ///
    /// # Errors
    /// The descriptor cannot be polled, or no event loop runs here.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        Ok(Self { fd: register(fd, Interest::READABLE)?, _path: None })
    }

    /// Removes the socket's path when the listener is dropped.
    pub(crate) fn unlink_at_end(self, path: Option<BoundPath>) -> Self {
        Self { _path: path, ..self }
    }

    /// Hinders whoever connects from sending descriptors, if the kernel can (Linux 6.16).
    pub fn refuse_descriptors(&self) {
        refuse_descriptors(self.fd.get_ref());
    }

    /// Waits for a connection: a non-blocking descriptor that is closed on exec, for [`Stream::new`] on any thread.
    ///
    /// # Errors
    /// What accept(2) says. `EMFILE`, `ENFILE`, `ENOBUFS` and `ENOMEM` say that the system is short of something: the
    /// connection stays pending and the next call fails at once, so wait a little before it.
    pub async fn accept(&self) -> io::Result<OwnedFd> {
        loop {
            let mut ready = self.fd.readable().await?;
            // SAFETY: a null address asks for none.
            let result = unsafe {
                libc::accept4(
                    self.fd.as_raw_fd(),
                    std::ptr::null_mut(),
                    std::ptr::null_mut(),
                    libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC,
                )
            };
            match Errno::result(result) {
                // SAFETY: accept4 returned a new descriptor that nobody else owns.
                Ok(fd) => return Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
                Err(Errno::EAGAIN) => ready.clear_ready(),
                // The peer gave up before it was served.
                Err(Errno::EINTR | Errno::ECONNABORTED) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Gives the descriptor back, out of the event loop; it stays non-blocking. A path of its own is removed.
    pub fn into_fd(self) -> OwnedFd {
        self.fd.into_inner()
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

pub(crate) fn register(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    if tokio::runtime::Handle::try_current().is_err() {
        return Err(io::Error::other("no event loop runs on this thread"));
    }
    let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
    fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    // SAFETY: the AsyncFd owns the descriptor, and nothing replaces it.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}
