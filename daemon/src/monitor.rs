//! Monitors: being written, along with the character devices that they talk on.

use crate::chardev::ChardevPort;
use crate::control::Handle;
use crate::events::Events;

/// A running monitor.
pub struct Monitor;

impl Monitor {
    pub async fn close(self) {}
}

pub fn start(
    _port: ChardevPort,
    _options: &qapi::types::control::MonitorOptions,
    _control: Handle,
    _events: &Events,
) -> Monitor {
    Monitor
}
