//! Objects of type `pr-manager-helper`: a [`PrManager`] and its property.

use super::UserObject;
use crate::control::{Handle, Message};
use crate::pr_manager::{Limits, PrManager};
use qapi::types::qom::PrManagerHelperProperties;
use qapi::{Error, Result, Value};
use std::path::Path;
use std::sync::Arc;

/// A manager of the user's.
pub struct PrManagerHelper {
    manager: Arc<PrManager>,
}

impl PrManagerHelper {
    /// Starts the manager of the object `id`. It connects in the background.
    pub fn start(id: &str, properties: &PrManagerHelperProperties, control: Handle) -> Result<Self> {
        let name = id.to_owned();
        let on_status = move |connected| control.send(Message::PrManagerStatus { id: name.clone(), connected });
        let manager = PrManager::start(id, Path::new(&properties.path), Limits::default(), Box::new(on_status))?;
        Ok(Self { manager: Arc::new(manager) })
    }

    /// The manager.
    pub fn manager(&self) -> &Arc<PrManager> {
        &self.manager
    }
}

impl UserObject for PrManagerHelper {
    fn get(&self, name: &str) -> Option<Value> {
        (name == "path").then(|| self.manager.path().to_string_lossy().into())
    }

    fn set(&mut self, name: &str, value: &Value) -> Result<()> {
        let path = value.as_str();
        let wrong = || Error::generic(format!("Invalid parameter type for '{name}', expected: string"));
        self.manager.set_path(Path::new(path.ok_or_else(wrong)?));
        Ok(())
    }
}
