//! How much one process and one user may use at a time, so that nobody takes everything.
//!
//! A process has a fixed share. A user has three quarters of what there is: users multiply processes, not themselves.

use crate::foreign::Owner;
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex};
use tokio::sync::Semaphore;

/// Connections of one process.
const CONNECTIONS: usize = 32;

/// Requests of one process that are on their way; more wait, so that others get their share of the threads.
pub const REQUESTS: usize = 8;

/// Messages of one process whose descriptors are not closed yet, those included that it has not begun to send.
const DESCRIPTORS: usize = 4 * CONNECTIONS;

/// What a process may use.
#[derive(Debug)]
pub struct OfProcess {
    /// Connections.
    pub connections: Arc<Semaphore>,
    /// Requests on their way.
    pub requests: Semaphore,
    /// Messages whose descriptors are not closed yet.
    pub descriptors: Arc<Semaphore>,
}

/// What all processes of a user may use together.
#[derive(Debug)]
pub struct OfUser {
    /// Connections.
    pub connections: Arc<Semaphore>,
    /// Threads that wait for devices.
    pub threads: Arc<Semaphore>,
    /// Messages whose descriptors are not closed yet.
    pub descriptors: Arc<Semaphore>,
}

/// The processes and users that are connected, or have something on its way or unclosed.
#[derive(Debug)]
pub struct Shares {
    connections: usize,
    threads: usize,
    processes: Mutex<HashMap<i32, Arc<OfProcess>>>,
    users: Mutex<HashMap<u32, Arc<OfUser>>>,
}

/// A connection's process and user.
#[derive(Debug)]
pub struct Share {
    /// The process's.
    pub process: Arc<OfProcess>,
    /// The user's.
    pub user: Arc<OfUser>,
}

fn semaphore(permits: usize) -> Arc<Semaphore> {
    Arc::new(Semaphore::new(permits))
}

fn three_quarters(all: usize) -> usize {
    all - all / 4
}

impl Shares {
    /// Of so many connections and threads.
    pub fn new(connections: usize, threads: usize) -> Self {
        Self { connections, threads, processes: Mutex::default(), users: Mutex::default() }
    }

    /// The share of this process and its user.
    pub fn of(&self, owner: Owner) -> Share {
        let process = find(&self.processes, owner.pid, || OfProcess {
            connections: semaphore(CONNECTIONS),
            requests: Semaphore::new(REQUESTS),
            descriptors: semaphore(DESCRIPTORS),
        });
        let user = find(&self.users, owner.uid, || OfUser {
            connections: semaphore(three_quarters(self.connections)),
            threads: semaphore(three_quarters(self.threads)),
            // Two descriptors come with a message at most, and the process may have eight for each connection.
            descriptors: semaphore(3 * self.connections),
        });
        Share { process, user }
    }
}

/// The share of `key`, made anew if it has none; shares of which nothing is used are removed as others come.
fn find<K: Eq + Hash, T: Used>(all: &Mutex<HashMap<K, Arc<T>>>, key: K, new: impl FnOnce() -> T) -> Arc<T> {
    let mut all = all.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if let Some(found) = all.get(&key) {
        return found.clone();
    }
    all.retain(|_, share| Arc::strong_count(share) > 1 || share.used());
    let share = Arc::new(new());
    all.insert(key, share.clone());
    share
}

/// A share that outlives who asked for it while something of it is used.
trait Used {
    fn used(&self) -> bool;
}

/// What takes something holds the semaphore.
fn any_used<const N: usize>(semaphores: [&Arc<Semaphore>; N]) -> bool {
    semaphores.iter().any(|semaphore| Arc::strong_count(semaphore) > 1)
}

impl Used for OfProcess {
    fn used(&self) -> bool {
        any_used([&self.connections, &self.descriptors])
    }
}

impl Used for OfUser {
    fn used(&self) -> bool {
        any_used([&self.connections, &self.threads, &self.descriptors])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_of_many_processes_leaves_some_for_others() {
        let shares = Shares::new(256, 32);
        let mut held = Vec::new();
        let mut take = |pid, uid| {
            let share = shares.of(Owner { pid, uid });
            let one = share.process.connections.clone().try_acquire_owned();
            let both = one.and_then(|one| Ok((one, share.user.connections.clone().try_acquire_owned()?)));
            let taken = both.is_ok();
            held.extend(both);
            taken
        };
        // Sixteen processes of one user.
        assert_eq!((0..512).filter(|i| take(i / 32, 1)).count(), 192);
        assert!(!take(99, 1));
        assert!(take(100, 2));
        drop(held);
        assert_eq!(shares.of(Owner { pid: 99, uid: 1 }).user.connections.available_permits(), 192);
    }

    #[test]
    fn who_has_gone_is_forgotten() {
        let shares = Shares::new(4, 4);
        for pid in 0..100 {
            shares.of(Owner { pid, uid: 1 });
        }
        assert_eq!(shares.processes.lock().unwrap().len(), 1);
        // What is still being closed counts on, for a process that connects again as well.
        let unclosed = shares.of(Owner { pid: 7, uid: 1 }).process.descriptors.clone().try_acquire_owned();
        shares.of(Owner { pid: 8, uid: 1 });
        let again = shares.of(Owner { pid: 7, uid: 1 }).process;
        assert_eq!(again.descriptors.available_permits(), DESCRIPTORS - 1);
        drop(unclosed);
        assert_eq!(three_quarters(1), 1);
    }
}
