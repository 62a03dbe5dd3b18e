//! The client's side of both protocols, blocking, on one Unix stream socket.
//!
//! [`Classic`] has one command at a time. [`Frames`] numbers its requests; [`Frames::send`] and [`Frames::receive`] take
//! `&self`, so that one thread can receive for any number that send. Time limits are the socket's own
//! (`UnixStream::set_read_timeout`); after any error the connection is of no further use.

use crate::classic::{FEATURE_FRAMES, REPLY_HEADER, Reply};
use crate::fds::{self, Passed};
use crate::frame::{self, HEADER, Hello, Request, Response, Welcome};
use crate::scsi::{Cdb, Command};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;

/// Sends everything, the descriptor with the first byte.
fn send_all(socket: &UnixStream, bytes: &[u8], fd: BorrowedFd<'_>) -> io::Result<()> {
    let sent = fds::send(socket, bytes, Some(fd))?;
    let mut rest = socket;
    rest.write_all(bytes.get(sent..).unwrap_or_default())
}

/// Reads the helper's feature word and asks for `wanted`.
fn negotiate(mut socket: &UnixStream, wanted: u32) -> io::Result<()> {
    let mut offered = [0; 4];
    socket.read_exact(&mut offered)?;
    if u32::from_be_bytes(offered) & wanted != wanted {
        let text = format!("the helper offers features {:#x}, not {wanted:#x}", u32::from_be_bytes(offered));
        return Err(io::Error::new(io::ErrorKind::Unsupported, text));
    }
    socket.write_all(&wanted.to_be_bytes())
}

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// A connection that speaks the best protocol that the helper offers.
#[derive(Debug)]
pub enum Connection {
    /// The classic protocol: QEMU's helper.
    Classic(Classic),
    /// The frames protocol.
    Frames(Frames),
}

impl Connection {
    /// Negotiates on a fresh connection.
    pub fn new(mut socket: UnixStream) -> io::Result<Self> {
        let mut offered = [0; 4];
        socket.read_exact(&mut offered)?;
        if u32::from_be_bytes(offered) & FEATURE_FRAMES == 0 {
            socket.write_all(&[0; 4])?;
            return Ok(Self::Classic(Classic { socket }));
        }
        socket.write_all(&FEATURE_FRAMES.to_be_bytes())?;
        Ok(Self::Frames(Frames::greet(socket)?))
    }
}

/// A connection that speaks the classic protocol.
#[derive(Debug)]
pub struct Classic {
    socket: UnixStream,
}

impl Classic {
    /// Negotiates on a fresh connection.
    pub fn new(socket: UnixStream) -> io::Result<Self> {
        negotiate(&socket, 0)?;
        Ok(Self { socket })
    }

    /// Has the helper execute a CDB on a device, with the parameter list of PERSISTENT RESERVE OUT.
    pub fn execute(&mut self, device: BorrowedFd<'_>, cdb: &Cdb, parameters: &[u8]) -> io::Result<Reply> {
        send_all(&self.socket, cdb.bytes(), device)?;
        self.socket.write_all(parameters)?;
        let mut header = [0; REPLY_HEADER];
        self.socket.read_exact(&mut header)?;
        let (mut reply, size) = Reply::decode_header(&header)
            .ok_or_else(|| invalid("the helper's reply has no SCSI status or is too large"))?;
        reply.data.resize(size, 0);
        self.socket.read_exact(&mut reply.data)?;
        Ok(reply)
    }
}

/// A connection that speaks the frames protocol.
#[derive(Debug)]
pub struct Frames {
    socket: UnixStream,
    welcome: Welcome,
    /// Held while a frame is written, so that frames do not mix.
    sending: Mutex<()>,
    /// Held while a frame is read.
    receiving: Mutex<()>,
}

impl Frames {
    /// Negotiates on a fresh connection. The error is of kind `Unsupported` when the helper does not offer the
    /// protocol, or no version of it that this client speaks.
    pub fn new(socket: UnixStream) -> io::Result<Self> {
        negotiate(&socket, FEATURE_FRAMES)?;
        Self::greet(socket)
    }

    /// Both sides speak frames from here on: agrees on the version.
    fn greet(socket: UnixStream) -> io::Result<Self> {
        (&socket).write_all(&frame::encode(&Hello::OURS).map_err(invalid)?)?;
        let welcome: Welcome = receive_frame(&socket)?;
        if welcome.version != frame::VERSION {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "the helper speaks no version that this client speaks",
            ));
        }
        Ok(Self { socket, welcome, sending: Mutex::new(()), receiving: Mutex::new(()) })
    }

    /// How many requests may be open at a time; the helper closes the connection at one more.
    pub fn max_in_flight(&self) -> u16 {
        self.welcome.max_in_flight
    }

    /// Sends a request; the caller keeps ids apart and counts the open ones.
    pub fn send(&self, id: u64, device: BorrowedFd<'_>, command: Command) -> io::Result<()> {
        let bytes = frame::encode(&Request { id, command }).map_err(invalid)?;
        let _one = self.sending.lock().map_err(|_| io::Error::other("a sender panicked"))?;
        send_all(&self.socket, &bytes, device)
    }

    /// Waits for the next response, of whichever request.
    pub fn receive(&self) -> io::Result<Response> {
        let _one = self.receiving.lock().map_err(|_| io::Error::other("a receiver panicked"))?;
        receive_frame(&self.socket)
    }
}

fn receive_frame<T: frame::Message>(socket: &UnixStream) -> io::Result<T> {
    let mut header = [0; HEADER];
    // The helper sends no descriptors; what comes all the same is closed here, not kept.
    read_exact(socket, &mut header)?;
    let mut message = vec![0; frame::message_length(header).map_err(invalid)?];
    read_exact(socket, &mut message)?;
    frame::decode(&message).map_err(invalid)
}

fn read_exact(socket: &UnixStream, mut buf: &mut [u8]) -> io::Result<()> {
    while !buf.is_empty() {
        match fds::receive(socket.as_fd(), buf, &mut Passed::default()) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => buf = buf.get_mut(n..).unwrap_or_default(),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
