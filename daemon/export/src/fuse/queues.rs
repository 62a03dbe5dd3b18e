//! [`Queues`]: requests that come over an io_uring. The data of reads and writes lie in memory that the kernel was given
//! once, and go from there to the image and back as they are.

use super::reply::Reply;
use super::request::{Operation, parse_parts};
use super::session::{Answer, End, Incoming, Next, Source};
use super::wire::OUT_HEADER;
use block::{Errno, IoResult};
use buf::IoBuf;
use io::{Fetched, FuseQueues};
use std::task::{Context, Poll, ready};

/// The queues of one thread.
pub(crate) struct Queues {
    queues: FuseQueues,
}

/// An entry whose request is served, and its memory.
pub(crate) struct Ticket {
    entry: usize,
    payload: IoBuf,
}

impl Queues {
    pub(crate) fn new(queues: FuseQueues) -> Self {
        Self { queues }
    }

    fn take(&mut self, fetched: Fetched) -> Option<Incoming<Ticket>> {
        let Fetched { entry, header, fixed, payload_len, payload } = fetched;
        let Some(request) = parse_parts(&header, &fixed, payload_len) else {
            let received = header.len() + payload_len;
            tracing::warn!(target: "fuse_malformed", received, "a FUSE request makes no sense, and fails");
            // The kernel goes by the entry here, not by the number.
            self.put(&Ticket { entry, payload }, &Reply::failed(1, Errno::EIO));
            return None;
        };
        let bytes = |len| usize::try_from(len).unwrap_or(usize::MAX);
        let room = match request.operation {
            Ok(Operation::Write { len, .. } | Operation::Read { len, .. }) => Some(payload.slice(0, bytes(len))),
            _ => None,
        };
        // The entries are what bounds the memory.
        Some(Incoming { request, room, cost: 0, ticket: Ticket { entry, payload } })
    }

    fn put(&self, Ticket { entry, payload }: &Ticket, reply: &Reply) {
        let (header, body) = reply.bytes().split_at_checked(OUT_HEADER).unwrap_or_default();
        payload.write_at(0, body);
        self.queues.reply(*entry, header, body.len());
    }
}

impl Source for Queues {
    type Ticket = Ticket;

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Next<Ticket>> {
        Poll::Ready(match ready!(self.queues.poll_next(cx)) {
            Ok(Some(fetched)) => Ok(self.take(fetched)),
            Ok(None) => {
                let errno = self.queues.refused().unwrap_or(Errno::ENOTCONN);
                tracing::debug!(target: "fuse_transport", %errno, "the kernel takes FUSE queues back");
                Err(End::Unmounted)
            }
            Err(error) => {
                tracing::warn!(target: "fuse_error", %error, "the ring of a FUSE export does not work any more");
                Err(End::Aborted)
            }
        })
    }

    fn look(&mut self, cx: &mut Context<'_>) -> Poll<Next<Ticket>> {
        self.poll_next(cx)
    }

    fn reply(&mut self, ticket: Ticket, unique: u64, answer: IoResult<Answer>) {
        match answer {
            Ok(Answer::Data(data)) => {
                // The room that a read was given is the payload.
                let header = Reply::data(unique, data.len());
                self.queues.reply(ticket.entry, header.bytes(), data.len());
            }
            Ok(Answer::Reply(reply)) => self.put(&ticket, &reply),
            // Nothing is a word too, or the entry would never be the kernel's again.
            Ok(Answer::Nothing) => self.put(&ticket, &Reply::done(unique)),
            Ok(Answer::Then(..)) => self.put(&ticket, &Reply::failed(unique, Errno::EIO)),
            Err(errno) => self.put(&ticket, &Reply::failed(unique, errno)),
        }
    }

    fn flush(&mut self) {
        // What is wrong with the ring shows when it is asked for requests.
        let _ = self.queues.flush();
    }
}
