//! A channel on which the bytes of the conversation are wrapped in a protocol: telnet or WebSocket.
//!
//! What the protocol itself has to say goes out between the bytes of the conversation. All buffers are bounded: a client that
//! does not take what it is sent is not read from either.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::task::{Context, Poll, ready};

use ::io::Channel;

use super::transport::Transport;

/// How much of the conversation is wrapped at once.
const STEP: usize = 16 * 1024;

/// A protocol around the bytes of a conversation.
pub(super) trait Codec {
    /// Unwraps what came from the client. Returns true at the end of the conversation.
    ///
    /// # Errors
    /// The client does not keep to the protocol; what is in `reply` is the last that it is told.
    fn decode(&mut self, raw: &[u8], bytes: &mut VecDeque<u8>, reply: &mut Vec<u8>) -> io::Result<bool>;

    /// Wraps what goes to the client.
    fn encode(&mut self, bytes: &[u8], raw: &mut Vec<u8>);
}

/// A channel and the protocol on it.
pub(super) struct Framed<C> {
    channel: Channel,
    /// Never borrowed across an await.
    state: RefCell<State<C>>,
}

struct State<C> {
    codec: C,
    /// Unwrapped and not yet read.
    input: VecDeque<u8>,
    /// Wrapped and not yet written.
    output: Vec<u8>,
    at_end: bool,
}

impl<C: Codec> Framed<C> {
    /// `greeting` is what the protocol begins with.
    pub(super) fn new(channel: Channel, codec: C, greeting: Vec<u8>) -> Self {
        let state = State { codec, input: VecDeque::new(), output: greeting, at_end: false };
        Self { channel, state: RefCell::new(state) }
    }

    /// Takes bytes as if they had come from the client.
    ///
    /// # Errors
    /// They are not of the protocol.
    pub(super) fn begin_with(&self, raw: &[u8]) -> io::Result<()> {
        self.state.borrow_mut().take(raw)
    }

    fn poll_drain(&self, cx: &mut Context<'_>, state: &mut State<C>) -> Poll<io::Result<()>> {
        while !state.output.is_empty() {
            let count = self.channel.try_write(&state.output)?;
            state.output.drain(..count);
            if count == 0 {
                ready!(self.channel.poll_writable(cx))?;
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl<C: Codec> State<C> {
    fn take(&mut self, raw: &[u8]) -> io::Result<()> {
        let ended = self.codec.decode(raw, &mut self.input, &mut self.output);
        self.at_end = !matches!(ended, Ok(false));
        ended.map(drop)
    }
}

impl<C: Codec> Transport for Framed<C> {
    fn poll_read(&self, cx: &mut Context<'_>, buffer: &mut [u8], passed: &mut Vec<OwnedFd>) -> Poll<io::Result<usize>> {
        let mut state = self.state.borrow_mut();
        loop {
            if !state.input.is_empty() {
                let count = io::Read::read(&mut state.input, buffer)?;
                return Poll::Ready(Ok(count));
            }
            ready!(self.poll_drain(cx, &mut state))?;
            if state.at_end {
                return Poll::Ready(Ok(0));
            }
            let mut raw = [0; 4096];
            let count = ready!(self.channel.poll_read(cx, &mut raw, passed))?;
            if count == 0 {
                state.at_end = true;
                continue;
            }
            let result = state.take(raw.get(..count).unwrap_or_default());
            if let Err(error) = result {
                // It is told why, as far as that goes without waiting.
                let _ = self.poll_drain(cx, &mut state);
                return Poll::Ready(Err(error));
            }
        }
    }

    fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_drain(cx, &mut self.state.borrow_mut()))?;
        self.channel.poll_writable(cx)
    }

    fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = self.state.borrow_mut();
        let mut none = Context::from_waker(std::task::Waker::noop());
        if self.poll_drain(&mut none, &mut state)?.is_pending() {
            return Ok(0);
        }
        let step = bytes.get(..bytes.len().min(STEP)).unwrap_or_default();
        let State { codec, output, .. } = &mut *state;
        codec.encode(step, output);
        let _ = self.poll_drain(&mut none, &mut state)?;
        Ok(step.len())
    }

    fn poll_flushed(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_drain(cx, &mut self.state.borrow_mut())
    }

    fn is_gone(&self) -> bool {
        self.state.borrow().at_end || self.channel.is_gone()
    }
}
