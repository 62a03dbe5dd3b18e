//! Character devices: being written; until then each is refused.

use qapi::types::chardev::{ChardevBackend, ChardevInfo, ChardevReturn};
use qapi::{Error, Result};

/// All character devices.
#[derive(Default)]
pub struct Chardevs;

/// What a monitor talks on.
pub struct ChardevPort;

impl Chardevs {
    pub async fn add(&mut self, _id: &str, _backend: &ChardevBackend) -> Result<ChardevReturn> {
        Err(Error::generic("Character devices are not supported"))
    }

    pub async fn remove(&mut self, id: &str) -> Result<()> {
        Err(Error::generic(format!("Chardev '{id}' not found")))
    }

    pub fn query(&self) -> Vec<ChardevInfo> {
        Vec::new()
    }

    pub fn type_of(&self, _id: &str) -> Option<&'static str> {
        None
    }

    pub fn list(&self) -> Vec<(String, &'static str)> {
        Vec::new()
    }

    pub fn take_for_monitor(&mut self, id: &str) -> Result<ChardevPort> {
        Err(Error::generic(format!("chardev \"{id}\" not found")))
    }
}
