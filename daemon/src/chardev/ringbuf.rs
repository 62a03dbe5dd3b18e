//! A device that keeps what was written last, for `ringbuf-read`. Nothing is ever received from it.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::task::{Context, Poll};

use qapi::{Error, Result};

use super::transport::Transport;

/// What is kept if nothing else is asked for, in bytes.
const DEFAULT_SIZE: usize = 65536;
/// What can be kept at most. The memory is taken as it is filled.
const MAX_SIZE: usize = 1 << 30;

/// The bytes that were written last.
pub(super) struct Ring {
    size: usize,
    bytes: RefCell<VecDeque<u8>>,
}

impl Ring {
    /// An empty ring of that many bytes; 0 or nothing is the default.
    ///
    /// # Errors
    /// The size is no power of two, or too large.
    pub(super) fn new(size: Option<i64>) -> Result<Ring> {
        let size = match size.unwrap_or(0) {
            0 => DEFAULT_SIZE,
            size => usize::try_from(size).unwrap_or_default(),
        };
        if !size.is_power_of_two() {
            return Err(Error::generic("size of ringbuf chardev must be power of two"));
        }
        if size > MAX_SIZE {
            return Err(Error::generic(format!("size of ringbuf chardev must be at most {MAX_SIZE}")));
        }
        Ok(Ring { size, bytes: RefCell::default() })
    }

    /// Adds bytes; the oldest ones make room.
    pub(super) fn write(&self, bytes: &[u8]) {
        let last = bytes.get(bytes.len().saturating_sub(self.size)..).unwrap_or_default();
        let mut kept = self.bytes.borrow_mut();
        let excess = (kept.len() + last.len()).saturating_sub(self.size);
        kept.drain(..excess);
        kept.extend(last);
    }

    /// Takes the oldest bytes, at most `count`.
    pub(super) fn read(&self, count: usize) -> Vec<u8> {
        let mut kept = self.bytes.borrow_mut();
        let count = count.min(kept.len());
        let taken = kept.drain(..count).collect();
        kept.shrink_to(self.size.min(DEFAULT_SIZE));
        taken
    }
}

/// The client that the ring is to whatever uses the device.
pub(super) struct RingClient(pub(super) Rc<Ring>);

impl Transport for RingClient {
    fn poll_read(&self, _: &mut Context<'_>, _: &mut [u8], _: &mut Vec<OwnedFd>) -> Poll<io::Result<usize>> {
        Poll::Pending
    }

    fn poll_writable(&self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes);
        Ok(bytes.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_bytes_are_kept() {
        let ring = Ring::new(Some(8)).unwrap();
        ring.write(b"0123456789");
        assert_eq!(ring.read(3), b"234");
        ring.write(b"abcdef");
        assert_eq!(ring.read(100), b"89abcdef");
        assert!(ring.read(1).is_empty());
        let text = |size| Ring::new(Some(size)).err().map(|error| error.to_string()).unwrap_or_default();
        assert_eq!(text(100), "size of ringbuf chardev must be power of two");
        assert_eq!(text(-4), "size of ringbuf chardev must be power of two");
        assert_eq!(text(1 << 40), "size of ringbuf chardev must be at most 1073741824");
        assert_eq!(text(0), "");
    }
}
