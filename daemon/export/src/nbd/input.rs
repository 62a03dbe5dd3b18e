//! What was received and not used yet, and where the next bytes go.
//!
//! Requests are read from one buffer, many from one receive. Small payloads are handed on as slices of it, without a
//! copy; from then on the part that was handed out is never received into again. A payload that does not fit gets
//! memory of its own, into which the rest of it is received directly. Partial requests stay here for as long as it takes.

use buf::IoBuf;

/// The first buffer of a connection, in bytes: enough for a hundred requests without payload.
const SMALL: usize = 4 << 10;
/// The largest buffer, in bytes.
const LARGE: usize = 64 << 10;
/// Payloads from this length, in bytes, get memory of their own rather than a larger buffer.
const OWN: usize = 16 << 10;
/// The buffer that follows such a payload: the next header and a little more, for what comes in with it has to be copied.
const AFTER_OWN: usize = 512;

/// See the module.
#[derive(Debug)]
pub(crate) struct Input {
    buf: IoBuf,
    /// The unused bytes are `buf[start..end]`.
    start: usize,
    end: usize,
    /// A slice of `buf` was handed out.
    shared: bool,
    /// The size of the next buffer.
    next: usize,
    own: Option<Own>,
}

/// A payload in memory of its own.
#[derive(Debug)]
struct Own {
    buf: IoBuf,
    have: usize,
}

impl Input {
    /// Starts with the bytes that came in before.
    pub(crate) fn new(early: &[u8]) -> Self {
        let buf = IoBuf::alloc(early.len().max(SMALL));
        buf.write_at(0, early);
        Self { buf, start: 0, end: early.len(), shared: false, next: SMALL, own: None }
    }

    /// Unused bytes in the buffer.
    pub(crate) fn len(&self) -> usize {
        self.end - self.start
    }

    /// Copies the first unused bytes without using them; false if there are too few.
    pub(crate) fn peek(&self, to: &mut [u8]) -> bool {
        self.len() >= to.len() && self.buf.read_at(self.start, to) == to.len()
    }

    /// Steps over at most `len` bytes; says over how many.
    pub(crate) fn skip(&mut self, len: usize) -> usize {
        let len = len.min(self.len());
        self.start += len;
        len
    }

    /// The next `len` bytes as a buffer for a driver, once they have all come in. `align` is what its memory has to be
    /// aligned to.
    pub(crate) fn payload(&mut self, len: usize, align: usize) -> Option<IoBuf> {
        if let Some(own) = self.own.take_if(|own| own.have >= len) {
            return Some(own.buf);
        }
        if self.own.is_some() {
            return None;
        }
        if self.len() < len {
            self.make_room(len);
            return None;
        }
        let slice = self.buf.slice(self.start, len);
        self.start += len;
        if slice.is_aligned(align, 1) {
            self.shared = true;
            return Some(slice);
        }
        let aligned = IoBuf::alloc(len);
        aligned.copy_from(0, &slice);
        Some(aligned)
    }

    /// Sees to it that the rest of a payload of `len` bytes has a place.
    fn make_room(&mut self, len: usize) {
        if len <= self.buf.len() - self.start {
            return;
        }
        if len < OWN {
            self.renew(LARGE);
            return;
        }
        let own = IoBuf::alloc(len);
        let have = own.copy_from(0, &self.buf.slice(self.start, self.len()));
        self.start = self.end;
        self.own = Some(Own { buf: own, have });
        self.renew(AFTER_OWN);
    }

    /// Another buffer of at least `size` bytes, with the unused bytes at its front.
    fn renew(&mut self, size: usize) {
        let unused = self.buf.slice(self.start, self.len());
        let size = size.max(unused.len());
        if self.shared || self.buf.len() != size {
            let buf = IoBuf::alloc(size);
            buf.copy_from(0, &unused);
            self.buf = buf;
            self.shared = false;
        } else {
            self.buf.copy_from(0, &unused);
        }
        self.end -= self.start;
        self.start = 0;
    }

    /// Where to receive next: buffers in order, none of them empty. `header` is what is needed at least.
    pub(crate) fn room(&mut self, header: usize) -> (Option<IoBuf>, IoBuf) {
        let own = self.own.as_ref().map(|own| own.buf.slice(own.have, own.buf.len()));
        let used_up = self.start == self.end && self.own.is_none();
        let (size, tail) = (self.buf.len(), self.buf.len() - self.end);
        if used_up && !self.shared && size >= self.next {
            (self.start, self.end) = (0, 0);
        } else if size - self.start < header || (used_up && (tail < size / 4 || size < self.next)) {
            self.renew(self.next.max(header));
        }
        let own = own.filter(|own| !own.is_empty());
        (own, self.buf.slice(self.end, self.buf.len()))
    }

    /// `count` bytes were received into what [`room`](Self::room) returned.
    pub(crate) fn received(&mut self, count: usize) {
        let mut left = count;
        if let Some(own) = &mut self.own {
            let into = left.min(own.buf.len() - own.have);
            own.have += into;
            left -= into;
        }
        self.end = (self.end + left).min(self.buf.len());
        if self.own.is_none() && self.end == self.buf.len() {
            // It was filled: there is more where that came from.
            self.next = LARGE;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Receives at most `at_most` bytes of `wire`; returns what is left of it.
    fn receive<'a>(input: &mut Input, header: usize, wire: &'a [u8], at_most: usize) -> &'a [u8] {
        let (own, rest) = input.room(header);
        assert!(!rest.is_empty());
        let mut taken = 0;
        for place in own.iter().chain([&rest]) {
            let now = place.len().min(at_most - taken).min(wire.len() - taken);
            place.write_at(0, &wire[taken..taken + now]);
            taken += now;
        }
        input.received(taken);
        &wire[taken..]
    }

    proptest! {
        /// Whatever the pieces in which bytes come in, all items come out whole, and stay as they were.
        #[test]
        fn items_come_out_as_they_were_sent(
            sizes in prop::collection::vec((0usize..3, 0usize..70_000), 1..40),
            pieces in prop::collection::vec(1usize..100_000, 1..20),
            early in 0usize..6000,
            align in prop::sample::select(vec![1usize, 512]),
        ) {
            const HEADER: usize = 28;
            let mut wire = Vec::new();
            let mut payloads = Vec::new();
            for (i, (kind, size)) in sizes.iter().enumerate() {
                let size = match kind { 0 => 0, 1 => size % 5000, _ => *size };
                let tag = u8::try_from(i).unwrap();
                wire.extend_from_slice(&[tag; HEADER]);
                payloads.push((0..size).map(|at| tag ^ u8::try_from(at % 251).unwrap()).collect::<Vec<u8>>());
                wire.extend_from_slice(&payloads[i]);
            }
            let (first, mut wire) = wire.split_at(early.min(wire.len()));
            let mut input = Input::new(first);
            let mut pieces = pieces.into_iter().cycle();
            let mut taken = Vec::new();
            for (i, payload) in payloads.iter().enumerate() {
                let mut header = [0; HEADER];
                while !input.peek(&mut header) {
                    wire = receive(&mut input, HEADER, wire, pieces.next().unwrap());
                }
                prop_assert_eq!(header, [u8::try_from(i).unwrap(); HEADER]);
                prop_assert_eq!(input.skip(HEADER), HEADER);
                if payload.is_empty() {
                    continue;
                }
                let buf = loop {
                    if let Some(buf) = input.payload(payload.len(), align) {
                        break buf;
                    }
                    wire = receive(&mut input, 1, wire, pieces.next().unwrap());
                };
                prop_assert!(buf.is_aligned(align, 1));
                taken.push((i, buf));
            }
            prop_assert_eq!((wire.len(), input.len()), (0, 0));
            for (i, buf) in taken {
                prop_assert_eq!(buf.to_vec(), payloads[i].clone());
            }
        }
    }
}
