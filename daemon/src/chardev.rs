//! Character devices: where monitors find their clients.
//!
//! A device is made by `--chardev` or `chardev-add` and owned by [`Chardevs`]. What talks on it takes its [`ChardevPort`],
//! once and for ever, and gets one [`Connection`] after the other from it: a device has at most one client at a time, and
//! others wait in the kernel's queue until it has gone. What is said on a connection is not known here.
//! [QAPI §Character devices]

mod connection;
mod socket;
mod stdio;

use qapi::types::chardev::{ChardevBackend, ChardevBackendVariant, ChardevInfo, ChardevReturn};
use qapi::{Error, Result};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

pub use connection::Connection;

/// All character devices.
#[derive(Default)]
pub struct Chardevs {
    devices: BTreeMap<String, Device>,
    background: bool,
}

struct Device {
    sort: &'static str,
    label: Rc<Label>,
    /// Gone once something talks on the device.
    port: Option<ChardevPort>,
}

/// What a device is connected to, for people. Shared by the device and its connection.
#[derive(Default)]
struct Label(RefCell<String>);

impl Label {
    fn set(&self, text: String) {
        *self.0.borrow_mut() = text;
    }

    fn get(&self) -> String {
        self.0.borrow().clone()
    }
}

/// Where the clients of a device come from.
pub struct ChardevPort(Source);

enum Source {
    Socket(socket::Socket),
    /// The one client that there ever is.
    Stdio(Option<Connection>),
}

impl ChardevPort {
    /// The next client. `None` says that there will never be another. Must not be called before the last one is dropped.
    pub async fn connection(&mut self) -> Option<Connection> {
        match &mut self.0 {
            Source::Socket(socket) => socket.connection().await,
            Source::Stdio(connection) => connection.take(),
        }
    }
}

impl Chardevs {
    /// The process is about to leave its terminal: no device can use the standard streams.
    pub fn go_to_background(&mut self) {
        self.background = true;
    }

    /// Makes a device. One that is told to wait is made when its first client is there.
    ///
    /// # Errors
    /// The name is taken, options contradict each other, or the system refuses.
    pub async fn add(&mut self, id: &str, backend: &ChardevBackend) -> Result<ChardevReturn> {
        if self.devices.contains_key(id) {
            return Err(Error::generic(format!(
                "attempt to add duplicate property '{id}' to object (type 'container')"
            )));
        }
        let label = Rc::new(Label::default());
        let (sort, source) = match &backend.kind {
            ChardevBackendVariant::Socket(wrapper) => {
                ("socket", Source::Socket(socket::Socket::open(id, &wrapper.data, &label).await?))
            }
            ChardevBackendVariant::Stdio(wrapper) => {
                if self.background {
                    return Err(Error::generic("cannot use stdio with -daemonize"));
                }
                if self.devices.values().any(|device| device.sort == "stdio") {
                    return Err(Error::generic("cannot use stdio by multiple character devices"));
                }
                ("stdio", Source::Stdio(Some(stdio::open(wrapper.data.signal, &label)?)))
            }
        };
        self.devices.insert(id.to_owned(), Device { sort, label, port: Some(ChardevPort(source)) });
        Ok(ChardevReturn {})
    }

    /// Removes a device on which nothing talks.
    ///
    /// # Errors
    /// There is none of this name, or it is in use.
    pub async fn remove(&mut self, id: &str) -> Result<()> {
        match self.devices.get(id) {
            None => Err(Error::generic(format!("Chardev '{id}' not found"))),
            Some(device) if device.port.is_none() => Err(Error::generic(format!("Chardev '{id}' is busy"))),
            Some(_) => {
                self.devices.remove(id);
                Ok(())
            }
        }
    }

    /// What `query-chardev` tells, by name.
    pub fn query(&self) -> Vec<ChardevInfo> {
        let info = |(id, device): (&String, &Device)| ChardevInfo {
            label: id.clone(),
            filename: device.label.get(),
            frontend_open: device.port.is_none(),
        };
        self.devices.iter().map(info).collect()
    }

    /// The sort of a device, if it exists.
    pub fn type_of(&self, id: &str) -> Option<&'static str> {
        self.devices.get(id).map(|device| device.sort)
    }

    /// Names and sorts of all devices.
    pub fn list(&self) -> Vec<(String, &'static str)> {
        self.devices.iter().map(|(id, device)| (id.clone(), device.sort)).collect()
    }

    /// Hands the clients of a device to a monitor.
    ///
    /// # Errors
    /// There is no such device, or it has a monitor already.
    pub fn take_for_monitor(&mut self, id: &str) -> Result<ChardevPort> {
        let device = self.devices.get_mut(id).ok_or_else(|| Error::generic(format!("chardev \"{id}\" not found")))?;
        device.port.take().ok_or_else(|| Error::generic(format!("chardev '{id}' is already in use")))
    }
}

#[cfg(test)]
pub mod testing {
    //! Ports for the tests of what talks on them.

    use super::*;

    /// A port with one client.
    pub fn port(client: std::os::unix::net::UnixStream) -> ChardevPort {
        let channel = io::Channel::socket(client.into()).expect("a channel");
        let label = Rc::new(Label::default());
        ChardevPort(Source::Stdio(Some(Connection::new(channel, &label, String::new(), String::new()))))
    }
}
