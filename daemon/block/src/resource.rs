//! The objects of the user that nodes can name in their options, and whether nodes use them.
//!
//! The control task owns the objects and tells the graph about each; a driver takes what it needs when it is opened. An
//! object that a node uses is not deleted.

use crate::reservation::{ManagerUse, ReservationManager};
use crate::throttle;
use qapi::{Error, Result};
use std::collections::BTreeMap;
use std::sync::Arc;

/// What an object is to nodes.
pub enum Resource {
    /// Nothing: no node can name it.
    None,
    /// A manager of persistent reservations.
    ReservationManager(Arc<dyn ReservationManager>),
    /// Bytes that nobody else should know.
    Secret(Arc<Secret>),
    /// Limits that nodes share. The group knows its members: they are who uses it.
    ThrottleGroup(Arc<throttle::Group>),
}

/// Bytes that nobody else should know: the memory is overwritten at the end. They have no way into a message or a log.
#[derive(PartialEq, Eq)]
pub struct Secret(Vec<u8>);

impl Secret {
    /// Takes the bytes.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    /// The bytes themselves.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.fill(0);
        // Or the compiler would see that nobody reads them any more.
        std::hint::black_box(&self.0);
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret")
    }
}

struct Provided {
    resource: Resource,
    /// One for this table and one for each node that uses the object.
    users: Arc<()>,
}

/// The objects of the user by id, as far as nodes need to know them. The control task adds and removes.
#[derive(Default)]
pub struct Resources {
    by_id: BTreeMap<String, Provided>,
}

impl Resources {
    /// Nodes can name the object from now on.
    pub fn add(&mut self, id: &str, resource: Resource) {
        self.by_id.insert(id.to_owned(), Provided { resource, users: Arc::new(()) });
    }

    /// Nodes cannot name the object any more.
    pub fn remove(&mut self, id: &str) {
        self.by_id.remove(id);
    }

    /// Whether a node uses the object.
    pub fn in_use(&self, id: &str) -> bool {
        self.by_id.get(id).is_some_and(|provided| match &provided.resource {
            Resource::ThrottleGroup(group) => group.members() > 0,
            _ => Arc::strong_count(&provided.users) > 1,
        })
    }

    /// The secret of that id. Who has it keeps it, whatever becomes of the object.
    ///
    /// # Errors
    /// There is no such object, or it is of another type.
    pub fn secret(&self, id: &str) -> Result<Arc<Secret>> {
        match self.by_id.get(id) {
            Some(Provided { resource: Resource::Secret(secret), .. }) => Ok(Arc::clone(secret)),
            Some(_) => Err(Error::generic(format!("Object with id '{id}' is not a secret"))),
            None => Err(Error::generic(format!("No secret with id '{id}'"))),
        }
    }

    /// The manager of that id, for a node.
    ///
    /// # Errors
    /// There is no such object, or it is of another type.
    pub fn reservation_manager(&self, id: &str) -> Result<ManagerUse> {
        match self.by_id.get(id) {
            Some(Provided { resource: Resource::ReservationManager(manager), users }) => {
                Ok(ManagerUse::new(Arc::clone(manager), Arc::clone(users)))
            }
            Some(_) => Err(Error::generic(format!("Object with id '{id}' is not a persistent reservation manager"))),
            None => Err(Error::generic(format!("No persistent reservation manager with id '{id}'"))),
        }
    }

    /// The throttle group of that id.
    ///
    /// # Errors
    /// There is none.
    pub fn throttle_group(&self, id: &str) -> Result<Arc<throttle::Group>> {
        match self.by_id.get(id) {
            Some(Provided { resource: Resource::ThrottleGroup(group), .. }) => Ok(Arc::clone(group)),
            _ => Err(Error::generic(format!("Throttle group '{id}' does not exist"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reservation::Executed;
    use ipc::scsi::{Command, Sense};
    use std::os::fd::OwnedFd;

    struct Nobody;

    impl ReservationManager for Nobody {
        fn execute(&self, _device: OwnedFd, _command: Command) -> Executed {
            Box::pin(async { Err(Sense::NOT_RESPONDING.into()) })
        }
    }

    #[test]
    fn secrets_are_found_and_not_shown() {
        let mut resources = Resources::default();
        resources.add("s", Resource::Secret(Arc::new(Secret::new(b"abc".to_vec()))));
        resources.add("x", Resource::None);
        let secret = resources.secret("s").unwrap();
        resources.remove("s");
        assert_eq!(secret.expose(), b"abc");
        assert_eq!(format!("{secret:?}"), "Secret");
        assert_eq!(resources.secret("s").unwrap_err().to_string(), "No secret with id 's'");
        assert_eq!(resources.secret("x").unwrap_err().to_string(), "Object with id 'x' is not a secret");
    }

    #[test]
    fn a_throttle_group_is_in_use_while_it_has_members() {
        let mut resources = Resources::default();
        let clock = Arc::new(crate::clock::SystemClock::default());
        resources.add("g", Resource::ThrottleGroup(throttle::Group::new("g", throttle::Limits::default(), clock)));
        resources.add("x", Resource::None);
        for wrong in ["x", "nobody"] {
            let error = resources.throttle_group(wrong).unwrap_err();
            assert_eq!(error.to_string(), format!("Throttle group '{wrong}' does not exist"));
        }
        let group = resources.throttle_group("g").unwrap();
        assert!(!resources.in_use("g"));
        let member = group.join();
        assert!(resources.in_use("g"));
        drop(member);
        assert!(!resources.in_use("g"));
    }

    #[test]
    fn a_manager_is_in_use_while_a_node_has_it() {
        let mut resources = Resources::default();
        let text = |result: Result<ManagerUse>| result.err().map(|error| error.to_string()).unwrap_or_default();
        assert_eq!(text(resources.reservation_manager("zz")), "No persistent reservation manager with id 'zz'");
        resources.add("zz", Resource::None);
        assert_eq!(
            text(resources.reservation_manager("zz")),
            "Object with id 'zz' is not a persistent reservation manager"
        );
        resources.add("m", Resource::ReservationManager(Arc::new(Nobody)));
        assert!(!resources.in_use("m") && !resources.in_use("nobody"));
        let used = resources.reservation_manager("m").ok();
        assert!(resources.in_use("m"));
        drop(used);
        assert!(!resources.in_use("m"));
        resources.remove("m");
        assert_eq!(text(resources.reservation_manager("m")), "No persistent reservation manager with id 'm'");
    }
}
