//! Character devices: where monitors find their clients.
//!
//! A device is made by `--chardev` or `chardev-add` and owned by [`Chardevs`]. What talks on it takes its [`ChardevPort`],
//! once and for ever, and gets one [`Connection`] after the other from it: a device has at most one client at a time, and
//! others wait in the kernel's queue until it has gone. What is said on a connection is not known here.
//! [QAPI §Character devices]
//!
//! | file | devices |
//! | --- | --- |
//! | `socket`, with `telnet` and `websocket` on `framed` | `socket` |
//! | `files` | `file`, `pipe`, `serial`, `parallel` |
//! | `stdio`, `pty`, `udp`, `ringbuf` | those |
//! | `mux`, `hub`, with `queue` between them and what is above | those |
//! | `permanent` | what those share that have their client from the beginning |
//! | `registry` | the devices by name: making, changing, removing |

mod connection;
mod files;
mod framed;
mod hub;
mod log;
mod mux;
mod permanent;
mod pty;
mod queue;
mod registry;
mod ringbuf;
mod socket;
mod stdio;
mod telnet;
mod transport;
mod udp;
mod websocket;

use std::cell::{Cell, RefCell};
use std::future::pending;
use std::rc::Rc;

pub use connection::Connection;
pub use registry::Chardevs;

/// What a device is connected to, for people, and whether it is. Shared by the device and its connection.
#[derive(Default)]
struct Label {
    text: RefCell<String>,
    has_client: Cell<bool>,
}

impl Label {
    fn set(&self, text: String) {
        *self.text.borrow_mut() = text;
    }

    fn connected(&self, text: String) {
        self.set(text);
        self.has_client.set(true);
    }

    fn disconnected(&self, text: String) {
        self.set(text);
        self.has_client.set(false);
    }

    fn get(&self) -> String {
        self.text.borrow().clone()
    }
}

/// What all devices have.
#[derive(Clone, Default)]
struct Common {
    label: Rc<Label>,
    log: Option<Rc<log::Log>>,
}

/// Where the clients of a device come from.
pub struct ChardevPort(Source);

enum Source {
    Socket(socket::Socket),
    Permanent(permanent::Permanent),
    Pty(pty::Pty),
    /// The one client of the standard streams.
    Stdio(Option<Connection>),
    /// Of a ring buffer.
    Ring(permanent::Permanent),
    /// Nobody ever comes.
    Nobody(#[expect(dead_code, reason = "open as long as the device lives")] Option<files::ParallelPort>),
    /// One user of a multiplexer or a hub.
    Slot {
        slot: Rc<queue::Slot>,
        oob: bool,
    },
    /// A hub that nobody uses yet.
    Hub(hub::Hub),
}

impl ChardevPort {
    /// The next client. `None` says that there will never be another. Must not be called before the last one is dropped.
    pub async fn connection(&mut self) -> Option<Connection> {
        match &mut self.0 {
            Source::Socket(socket) => socket.connection().await,
            Source::Permanent(device) | Source::Ring(device) => device.connection(),
            Source::Pty(pty) => pty.connection().await,
            Source::Stdio(connection) => connection.take(),
            Source::Nobody(_) => pending().await,
            Source::Slot { slot, .. } => slot.connection().await,
            // It is started when it is taken.
            Source::Hub(_) => None,
        }
    }

    /// Whether a monitor on the device offers to execute commands out of band: the reference does not where nothing can
    /// be received.
    pub fn offers_oob(&self) -> bool {
        match &self.0 {
            Source::Ring(_) | Source::Nobody(_) => false,
            Source::Slot { oob, .. } => *oob,
            Source::Hub(hub) => hub.offers_oob(),
            Source::Socket(_) | Source::Permanent(_) | Source::Pty(_) | Source::Stdio(_) => true,
        }
    }

    /// The port as it is used: a hub begins to serve its devices.
    fn started(self) -> Self {
        match self.0 {
            Source::Hub(hub) => {
                let oob = hub.offers_oob();
                Self(Source::Slot { slot: hub.start(), oob })
            }
            _ => self,
        }
    }

    /// Whether the device has its client from the beginning.
    fn is_permanent(&self) -> bool {
        matches!(self.0, Source::Permanent(_) | Source::Ring(_) | Source::Stdio(_) | Source::Nobody(_))
    }
}

#[cfg(test)]
pub mod testing {
    //! Ports for the tests of what talks on them.

    use super::*;

    /// A port with one client.
    pub fn port(client: std::os::unix::net::UnixStream) -> ChardevPort {
        let channel = ::io::Channel::single(client.into()).expect("a channel");
        ChardevPort(Source::Stdio(Some(Connection::plain(channel, &Common::default()))))
    }
}
