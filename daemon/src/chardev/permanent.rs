//! Devices that have their one client from the beginning: files, the standard streams, datagrams, memory.

use std::cell::Cell;
use std::io;
use std::rc::Rc;

use super::Connection;

/// A source of the same client, again and again until it has nothing more to say.
pub(super) struct Permanent {
    make: Box<dyn Fn() -> io::Result<Connection>>,
    ended: Option<Rc<Cell<bool>>>,
}

impl Permanent {
    pub(super) fn new(make: impl Fn() -> io::Result<Connection> + 'static) -> Self {
        Self { make: Box::new(make), ended: None }
    }

    /// The client. Nothing once it has ended.
    pub(super) fn connection(&mut self) -> Option<Connection> {
        if self.ended.as_ref().is_some_and(|ended| ended.get()) {
            return None;
        }
        match (self.make)() {
            Ok(connection) => {
                self.ended = Some(connection.ended());
                Some(connection)
            }
            Err(error) => {
                tracing::warn!(target: "chardev_client_lost", "A character device lost its client: {error}");
                None
            }
        }
    }
}
