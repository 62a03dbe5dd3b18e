//! One client of a character device.

use std::cell::Cell;
use std::future::poll_fn;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::task::{Context, Poll};

use super::log::Log;
use super::transport::Transport;
use super::{Common, Label};

/// A client, from its arrival until this is dropped.
pub struct Connection {
    transport: Box<dyn Transport>,
    label: Rc<Label>,
    /// What the device is labelled with when the client has gone.
    label_after: String,
    log: Option<Rc<Log>>,
    /// Set once nothing more can come.
    ended: Rc<Cell<bool>>,
    /// What has to live as long as the client.
    _guard: Option<Box<dyn std::any::Any>>,
}

impl Connection {
    pub(super) fn new(transport: impl Transport + 'static, common: &Common, now: String, after: String) -> Connection {
        common.label.connected(now);
        Connection {
            transport: Box::new(transport),
            label: common.label.clone(),
            label_after: after,
            log: common.log.clone(),
            ended: Rc::default(),
            _guard: None,
        }
    }

    /// A client of a device that is always called the same.
    pub(super) fn plain(transport: impl Transport + 'static, common: &Common) -> Connection {
        let name = common.label.get();
        Self::new(transport, common, name.clone(), name)
    }

    pub(super) fn with_guard(mut self, guard: impl std::any::Any) -> Connection {
        self._guard = Some(Box::new(guard));
        self
    }

    /// Set once nothing more can come from this client.
    pub(super) fn ended(&self) -> Rc<Cell<bool>> {
        self.ended.clone()
    }

    /// Waits for bytes and reads them; 0 is the end. Descriptors that came with them are added to `passed`. Nothing is lost if
    /// this is dropped before it completes.
    ///
    /// # Errors
    /// The connection broke.
    pub async fn read(&self, buffer: &mut [u8], passed: &mut Vec<OwnedFd>) -> io::Result<usize> {
        poll_fn(|cx| self.poll_read(cx, buffer, passed)).await
    }

    /// As [`Connection::read`], without waiting.
    pub(super) fn poll_read(
        &self,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
        passed: &mut Vec<OwnedFd>,
    ) -> Poll<io::Result<usize>> {
        let result = self.transport.poll_read(cx, buffer, passed);
        if matches!(result, Poll::Ready(Ok(0) | Err(_))) {
            self.ended.set(true);
        }
        result
    }

    /// Waits until [`Connection::try_write`] may have something to do.
    ///
    /// # Errors
    /// The connection broke.
    pub async fn writable(&self) -> io::Result<()> {
        poll_fn(|cx| self.poll_writable(cx)).await
    }

    /// As [`Connection::writable`], without waiting.
    pub(super) fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.transport.poll_writable(cx)
    }

    /// Writes what can be written without waiting, perhaps nothing.
    ///
    /// # Errors
    /// The connection broke.
    pub fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.transport.try_write(bytes)?;
        if let (Some(log), Some(written)) = (&self.log, bytes.get(..count)) {
            log.write(written);
        }
        Ok(count)
    }

    /// Waits until everything that was written has left the process.
    ///
    /// # Errors
    /// The connection broke.
    pub async fn flushed(&self) -> io::Result<()> {
        poll_fn(|cx| self.transport.poll_flushed(cx)).await
    }

    /// Whether the client has closed both directions, and not just said that it will send nothing more. A TCP peer
    /// that closes cannot be told from one that only stops sending.
    pub fn is_gone(&self) -> bool {
        self.transport.is_gone()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.label.disconnected(std::mem::take(&mut self.label_after));
    }
}
