//! One client of a character device.

use std::ops::Deref;
use std::rc::Rc;

use io::Channel;

use super::Label;
use super::stdio::KeysWithoutSignals;

/// A client, from its arrival until this is dropped.
pub struct Connection {
    channel: Channel,
    label: Rc<Label>,
    /// What the device is labelled with when the client has gone.
    label_after: String,
    _keys: Option<KeysWithoutSignals>,
}

impl Connection {
    pub(super) fn new(channel: Channel, label: &Rc<Label>, now: String, after: String) -> Connection {
        label.set(now);
        Connection { channel, label: label.clone(), label_after: after, _keys: None }
    }

    pub(super) fn with_keys(mut self, keys: Option<KeysWithoutSignals>) -> Connection {
        self._keys = keys;
        self
    }
}

impl Deref for Connection {
    type Target = Channel;

    fn deref(&self) -> &Channel {
        &self.channel
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.label.set(std::mem::take(&mut self.label_after));
    }
}
