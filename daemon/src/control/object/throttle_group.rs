//! Objects of type `throttle-group`: limits by name. The group itself is in [`block::throttle`].

use super::UserObject;
use block::clock::Clock;
use block::throttle::{Group, Limits};
use qapi::types::throttle::ThrottleGroupProperties;
use qapi::{Error, Qapi, Result, Value};
use std::sync::Arc;

/// `limits`, and each of its members alone, which can only be set while the object is made.
pub const PROPERTIES: &[(&str, &str)] = &[
    ("limits", "ThrottleLimits"),
    ("x-iops-total", "int"),
    ("x-iops-total-max", "int"),
    ("x-iops-total-max-length", "int"),
    ("x-iops-read", "int"),
    ("x-iops-read-max", "int"),
    ("x-iops-read-max-length", "int"),
    ("x-iops-write", "int"),
    ("x-iops-write-max", "int"),
    ("x-iops-write-max-length", "int"),
    ("x-bps-total", "int"),
    ("x-bps-total-max", "int"),
    ("x-bps-total-max-length", "int"),
    ("x-bps-read", "int"),
    ("x-bps-read-max", "int"),
    ("x-bps-read-max-length", "int"),
    ("x-bps-write", "int"),
    ("x-bps-write-max", "int"),
    ("x-bps-write-max-length", "int"),
    ("x-iops-size", "int"),
];

/// A group of the user's; drivers find it in [`block::resource`].
pub struct ThrottleGroup {
    group: Arc<Group>,
}

impl ThrottleGroup {
    /// A new group with the limits of `properties`, and the time of `clock`.
    ///
    /// # Errors
    /// Limits that contradict each other.
    pub fn new(id: &str, properties: &ThrottleGroupProperties, clock: Arc<dyn Clock>) -> Result<Self> {
        Ok(Self { group: Group::new(id, Limits::of_properties(properties)?, clock) })
    }

    /// The group itself.
    pub fn group(&self) -> &Arc<Group> {
        &self.group
    }
}

impl UserObject for ThrottleGroup {
    fn get(&self, name: &str) -> Option<Value> {
        let limits = self.group.limits().to_qapi().to_value();
        match name.strip_prefix("x-") {
            Some(member) => limits.get(member).cloned(),
            None => (name == "limits").then_some(limits),
        }
    }

    fn set(&mut self, name: &str, value: &Value) -> Result<()> {
        if name != "limits" {
            return Err(Error::generic("Property cannot be set after initialization"));
        }
        // As a property of a new object, so that errors name the whole path.
        let change = ThrottleGroupProperties::from_value(&serde_json::json!({ name: value }))?;
        let limits = self.group.limits().with(&change.limits.unwrap_or_default())?;
        self.group.set_limits(limits);
        Ok(())
    }
}
