//! The objects of the user that nodes can name in their options, and whether nodes use them.
//!
//! The control task owns the objects and tells the graph about each; a driver takes what it needs when it is opened. An
//! object that a node uses is not deleted.

use crate::reservation::{ManagerUse, ReservationManager};
use qapi::{Error, Result};
use std::collections::BTreeMap;
use std::sync::Arc;

/// What an object is to nodes.
pub enum Resource {
    /// Nothing: no node can name it.
    None,
    /// A manager of persistent reservations.
    ReservationManager(Arc<dyn ReservationManager>),
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
        self.by_id.get(id).is_some_and(|provided| Arc::strong_count(&provided.users) > 1)
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
