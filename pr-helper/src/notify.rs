//! What the service manager hears: READY, STOPPING, WATCHDOG, on a socket that is connected before the sandbox closes.

use sd_notify::NotifyState;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// The service manager, if there is one.
#[derive(Debug)]
pub struct Manager {
    socket: Option<UnixDatagram>,
    /// Half of what WATCHDOG_USEC allows between two signs of life.
    watchdog: Option<Duration>,
}

impl Manager {
    /// Connects to NOTIFY_SOCKET; reads the environment.
    pub fn connect() -> io::Result<Self> {
        let watchdog = sd_notify::watchdog_enabled().map(|time| time / 2);
        let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return Ok(Self { socket: None, watchdog: None }) };
        let socket = UnixDatagram::unbound()?;
        let address = match name.as_bytes().strip_prefix(b"@") {
            Some(name) => SocketAddr::from_abstract_name(name)?,
            None => SocketAddr::from_pathname(&name)?,
        };
        socket.connect_addr(&address)?;
        Ok(Self { socket: Some(socket), watchdog })
    }

    /// Sends these states. A manager that does not listen is not the client's problem.
    pub fn say(&self, states: &[NotifyState<'_>]) {
        if let Some(socket) = &self.socket {
            let text: String = states.iter().map(|state| format!("{state}\n")).collect();
            let _ = socket.send(text.as_bytes());
        }
    }

    /// Gives signs of life for ever, from the loop that serves clients; returns at once if nobody asks for them.
    pub async fn keep_alive(&self) {
        let Some(period) = self.watchdog else { return };
        loop {
            self.say(&[NotifyState::Watchdog]);
            tokio::time::sleep(period).await;
        }
    }
}
