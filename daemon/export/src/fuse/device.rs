//! [`Device`]: requests that are read from `/dev/fuse`, one at a time, and replies that are written to it.
//!
//! The fixed part of a write goes to a buffer of its own, so that its data lie at the start of an aligned buffer.

use super::reply::Reply;
use super::request::{HEAD, Operation, parse};
use super::session::{Answer, End, Incoming, Next, Source};
use super::wire::{IN_HEADER, MAX_TRANSFER, WRITE_IN};
use block::{Errno, IoResult};
use buf::IoBuf;
use io::FuseDevice;
use std::task::{Context, Poll, ready};

/// Data of a write up to this length are copied, so that the large buffer serves for the next request, and stays warm.
const COPY_UP_TO: usize = 16 << 10;

/// The kernel wants room for the longest write whatever it sends.
fn body_len() -> usize {
    usize::try_from(MAX_TRANSFER).unwrap_or(usize::MAX)
}

/// One descriptor of a mount, and where the next request is put.
pub(crate) struct Device {
    device: FuseDevice,
    /// Where the fixed part of a write goes; and the front of everything else.
    head: IoBuf,
    body: IoBuf,
}

impl Device {
    pub(crate) fn new(device: FuseDevice) -> Self {
        Self { device, head: IoBuf::alloc(IN_HEADER + WRITE_IN), body: IoBuf::alloc(body_len()) }
    }

    fn received(&mut self, received: Result<usize, Errno>) -> Next<()> {
        match received {
            Ok(received) => Ok(self.take(received)),
            // Its caller gave up meanwhile.
            Err(Errno::ENOENT) => Ok(None),
            Err(Errno::ECONNABORTED) => Err(End::Aborted),
            Err(_) => Err(End::Unmounted),
        }
    }

    /// The request that lies in the buffers.
    fn take(&mut self, received: usize) -> Option<Incoming<()>> {
        let mut raw = [0; HEAD];
        let front = self.head.read_at(0, &mut raw);
        self.body.read_at(0, raw.get_mut(front..).unwrap_or_default());
        let Some(request) = parse(raw.get(..received.min(HEAD)).unwrap_or_default(), received) else {
            tracing::warn!(target: "fuse_malformed", received, "a FUSE request makes no sense, and is left without a reply");
            return None;
        };
        let bytes = |len| usize::try_from(len).unwrap_or(usize::MAX);
        let (room, cost) = match request.operation {
            Ok(Operation::Write { len, .. }) => {
                let (data, held) = self.data(bytes(len));
                (Some(data), held)
            }
            Ok(Operation::Read { len, .. }) => (None, bytes(len)),
            _ => (None, 0),
        };
        Some(Incoming { request, room, cost, ticket: () })
    }

    /// The data of a write, and the bytes of memory that they hold.
    fn data(&mut self, len: usize) -> (IoBuf, usize) {
        if len <= COPY_UP_TO {
            let copy = IoBuf::alloc(len);
            copy.copy_from(0, &self.body.slice(0, len));
            return (copy, len);
        }
        let mut whole = std::mem::replace(&mut self.body, IoBuf::alloc(body_len()));
        whole.truncate(len);
        (whole, body_len())
    }

    fn send(&self, unique: u64, answer: IoResult<Answer>) -> Result<(), Errno> {
        match answer {
            Ok(Answer::Reply(reply)) => self.device.reply(reply.bytes(), None),
            Ok(Answer::Data(data)) => self.device.reply(Reply::data(unique, data.len()).bytes(), Some(&data)),
            Ok(Answer::Nothing) => Ok(()),
            Ok(Answer::Then(reply, then)) => {
                self.device.reply(reply.bytes(), None)?;
                then();
                Ok(())
            }
            Err(errno) => self.device.reply(Reply::failed(unique, errno).bytes(), None),
        }
    }
}

impl Source for Device {
    type Ticket = ();

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Next<()>> {
        let received = ready!(self.device.poll_receive(cx, &[&self.head, &self.body]));
        Poll::Ready(self.received(received))
    }

    fn look(&mut self, _: &mut Context<'_>) -> Poll<Next<()>> {
        match self.device.receive(&[&self.head, &self.body]) {
            Err(Errno::EAGAIN | Errno::EINTR) => Poll::Pending,
            received => Poll::Ready(self.received(received)),
        }
    }

    fn reply(&mut self, (): (), unique: u64, answer: IoResult<Answer>) {
        match self.send(unique, answer) {
            // Nobody waits for it any more, or the mount is gone.
            Ok(()) | Err(Errno::ENOENT | Errno::ENODEV | Errno::ECONNABORTED | Errno::EPERM) => {}
            Err(errno) => {
                tracing::warn!(target: "fuse_reply_refused", unique, %errno, "the kernel refuses a FUSE reply");
                // Whoever waits shall not wait for ever.
                let _ = self.send(unique, Err(Errno::EIO));
            }
        }
    }

    fn flush(&mut self) {}
}
