//! What waits to be sent on a stream: small pieces that are copied, and buffers that are not.

use buf::IoBuf;
use std::collections::VecDeque;

/// Consumed bytes of small pieces after which their store is compacted.
const COMPACT: usize = 64 << 10;

/// Bytes to send, in order. Small pieces (headers) are copied into one store; [`IoBuf`]s are kept until they are sent.
///
/// Built by whoever produces replies, emptied by [`Stream::send`](crate::Stream::send). To go on producing while a send waits,
/// swap the queue for an empty one (`std::mem::swap`; both keep their memory) and send that.
#[derive(Default)]
pub struct SendQueue {
    parts: VecDeque<Part>,
    small: Vec<u8>,
    /// Bytes at the front of `small` that were sent.
    small_sent: usize,
    len: usize,
}

enum Part {
    /// This many of the next bytes of `small`.
    Small(usize),
    Buf(IoBuf),
}

impl std::fmt::Debug for SendQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SendQueue").field("len", &self.len).field("parts", &self.parts.len()).finish_non_exhaustive()
    }
}

impl SendQueue {
    /// An empty queue.
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes that wait.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends a copy of `bytes`: for headers and other small pieces.
    pub fn push_bytes(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        self.small.extend_from_slice(bytes);
        self.len += bytes.len();
        match self.parts.back_mut() {
            Some(Part::Small(len)) => *len += bytes.len(),
            _ => self.parts.push_back(Part::Small(bytes.len())),
        }
    }

    /// Appends a buffer without copying it. Its bytes go out as they are at the time of the send.
    pub fn push_buf(&mut self, buf: IoBuf) {
        if buf.is_empty() {
            return;
        }
        self.len += buf.len();
        self.parts.push_back(Part::Buf(buf));
    }

    /// Drops everything that waits.
    pub fn clear(&mut self) {
        self.parts.clear();
        self.small.clear();
        self.small_sent = 0;
        self.len = 0;
    }

    /// Fills `iov` from the front; returns the entries filled and the bytes they name. They are valid until the queue
    /// changes.
    pub(crate) fn gather(&self, iov: &mut [libc::iovec]) -> (usize, usize) {
        let mut small = self.small.get(self.small_sent..).unwrap_or_default();
        let mut bytes = 0;
        let mut places = iov.iter_mut();
        let total = places.len();
        'parts: for part in &self.parts {
            match part {
                Part::Small(len) => {
                    let Some(place) = places.next() else { break };
                    let (now, later) = small.split_at_checked(*len).unwrap_or((small, &[]));
                    small = later;
                    *place = libc::iovec { iov_base: now.as_ptr().cast_mut().cast(), iov_len: now.len() };
                    bytes += now.len();
                }
                Part::Buf(buf) => {
                    for segment in buf.segments() {
                        let Some(place) = places.next() else { break 'parts };
                        *place = libc::iovec { iov_base: segment.ptr.as_ptr().cast(), iov_len: segment.len };
                        bytes += segment.len;
                    }
                }
            }
        }
        (total - places.len(), bytes)
    }

    /// Removes the first `sent` bytes.
    pub(crate) fn consume(&mut self, sent: usize) {
        let mut left = sent.min(self.len);
        self.len -= left;
        while left > 0 {
            match self.parts.front_mut() {
                Some(Part::Small(len)) if *len > left => {
                    *len -= left;
                    self.small_sent += left;
                    left = 0;
                }
                Some(Part::Buf(buf)) if buf.len() > left => {
                    *buf = buf.slice(left, buf.len());
                    left = 0;
                }
                Some(Part::Small(len)) => {
                    left -= *len;
                    self.small_sent += *len;
                    self.parts.pop_front();
                }
                Some(Part::Buf(buf)) => {
                    left -= buf.len();
                    self.parts.pop_front();
                }
                None => break,
            }
        }
        if self.small_sent == self.small.len() {
            self.small.clear();
            self.small_sent = 0;
        } else if self.small_sent > COMPACT {
            self.small.drain(..self.small_sent);
            self.small_sent = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn flat(queue: &SendQueue, entries: usize) -> Vec<u8> {
        let mut iov = vec![libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; entries];
        let (n, bytes) = queue.gather(&mut iov);
        let out: Vec<u8> = iov[..n]
            .iter()
            // SAFETY: the entries name memory of the queue, which is not changed meanwhile.
            .flat_map(|v| unsafe { std::slice::from_raw_parts(v.iov_base.cast::<u8>(), v.iov_len) }.to_vec())
            .collect();
        assert_eq!(out.len(), bytes);
        out
    }

    proptest! {
        #[test]
        fn sends_what_was_pushed_in_order(
            steps in prop::collection::vec((prop::collection::vec(any::<u8>(), 0..50), any::<bool>(), 0usize..70, 1usize..6), 0..60),
        ) {
            let mut queue = SendQueue::new();
            let (mut pushed, mut sent) = (Vec::new(), Vec::new());
            for (bytes, as_buf, take, entries) in steps {
                pushed.extend_from_slice(&bytes);
                if as_buf { queue.push_buf(IoBuf::copy_of(&bytes)) } else { queue.push_bytes(&bytes) }
                let now = flat(&queue, entries);
                prop_assert!(!now.is_empty() || queue.is_empty());
                let take = take.min(now.len());
                sent.extend_from_slice(&now[..take]);
                queue.consume(take);
                prop_assert_eq!(queue.len(), pushed.len() - sent.len());
            }
            sent.extend(flat(&queue, 1000));
            prop_assert_eq!(sent, pushed);
        }
    }
}
