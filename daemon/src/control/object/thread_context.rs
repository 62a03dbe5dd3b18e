//! Objects of type `thread-context`: a thread on chosen processors, from which other threads inherit them.
//!
//! In the reference only memory of virtual machines is filled by such threads, and nothing in a storage daemon names one. The
//! object is here for configurations that make it all the same; its thread waits for its end.

use super::UserObject;
use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::{Pid, gettid};
use qapi::types::qom::ThreadContextProperties;
use qapi::{Error, Qapi, Result, Value};
use std::sync::mpsc::{Sender, channel};

/// Names and types of the properties.
pub const PROPERTIES: &[(&str, &str)] = &[("thread-id", "int"), ("node-affinity", "int"), ("cpu-affinity", "int")];

/// A thread of the user's.
pub struct ThreadContext {
    id: Pid,
    /// Ends the thread when it is dropped.
    _alive: Sender<()>,
}

impl ThreadContext {
    /// Starts the thread.
    ///
    /// # Errors
    /// The processors cannot be used, or the system has no thread.
    pub fn start(name: &str, properties: &ThreadContextProperties) -> Result<Self> {
        let processors = match (&properties.cpu_affinity, &properties.node_affinity) {
            (Some(_), Some(_)) => return Err(Error::generic("Mixing CPU and node affinity not supported")),
            (Some(processors), None) => Some(of_list(processors)?),
            (None, Some(nodes)) => Some(of_nodes(nodes)?),
            (None, None) => None,
        };
        let (alive, end) = channel();
        let (tell, told) = channel();
        let failed = |error| Error::io(format!("Could not start the thread of '{name}'"), error);
        io::threads::spawn(io::threads::Role::IoThread, &format!("TC {name}"), move || {
            let _ = tell.send(gettid());
            // Nothing is ever sent: the other end goes away.
            let _: std::result::Result<(), _> = end.recv();
        })
        .map_err(failed)?;
        let id = told.recv().map_err(|_| failed(std::io::Error::other("it ended at once")))?;
        let this = Self { id, _alive: alive };
        if let Some(processors) = processors {
            this.move_to(&processors)?;
        }
        Ok(this)
    }

    fn move_to(&self, processors: &CpuSet) -> Result<()> {
        sched_setaffinity(self.id, processors).map_err(|errno| Error::io("Setting CPU affinity failed", errno.into()))
    }

    fn processors(&self) -> Vec<usize> {
        let set = sched_getaffinity(self.id).unwrap_or_default();
        (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false)).collect()
    }
}

/// The processors of a list.
fn of_list(list: &[u16]) -> Result<CpuSet> {
    if list.is_empty() {
        return Err(Error::generic("CPU list is empty"));
    }
    let mut set = CpuSet::new();
    let mut any = false;
    // No system has those that do not fit, and the kernel leaves out those that this one does not have.
    for cpu in list {
        any |= set.set(usize::from(*cpu)).is_ok();
    }
    if any { Ok(set) } else { Err(Error::io("Setting CPU affinity failed", Errno::EINVAL.into())) }
}

/// The processors of nodes with memory of their own.
fn of_nodes(nodes: &[u16]) -> Result<CpuSet> {
    if nodes.is_empty() {
        return Err(Error::generic("Node list is empty"));
    }
    let mut set = CpuSet::new();
    let mut any = false;
    for node in nodes {
        let path = format!("/sys/devices/system/node/node{node}/cpulist");
        for cpu in parse(&std::fs::read_to_string(path).unwrap_or_default()) {
            any |= set.set(cpu).is_ok();
        }
    }
    if any { Ok(set) } else { Err(Error::generic("The nodes select no CPUs")) }
}

/// The numbers of a list like `0-3,8`. [Linux cpusets]
fn parse(list: &str) -> Vec<usize> {
    let number = |text: &str| text.trim().parse::<usize>().ok().filter(|number| *number < CpuSet::count());
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(number(first)?..=number(last)?)
    };
    list.split(',').filter_map(range).flatten().collect()
}

impl UserObject for ThreadContext {
    fn get(&self, name: &str) -> Option<Value> {
        match name {
            "thread-id" => Some(self.id.as_raw().into()),
            "cpu-affinity" => Some(self.processors().into()),
            // It is turned into processors when it is set.
            _ => None,
        }
    }

    fn set(&mut self, name: &str, value: &Value) -> Result<()> {
        // As a property of a new object, so that errors name the whole path.
        let change = |name: &str| ThreadContextProperties::from_value(&serde_json::json!({ name: value }));
        match name {
            "cpu-affinity" => self.move_to(&of_list(&change(name)?.cpu_affinity.unwrap_or_default())?),
            "node-affinity" => self.move_to(&of_nodes(&change(name)?.node_affinity.unwrap_or_default())?),
            _ => Err(Error::generic(format!("Property 'thread-context.{name}' is not writable"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_processors() {
        assert_eq!(parse("0-3,8\n"), [0, 1, 2, 3, 8]);
        assert_eq!(parse("5"), [5]);
        assert!(parse("").is_empty() && parse("x,1-,9999999-3").is_empty());
    }
}
