//! Where threads come from.
//!
//! Under a sandbox a thread can do no more than the one that started it. So that an IOThread, which may open nothing, can
//! have pool threads that may, one thread that serves nobody, the starter, starts all others; each takes the limits of its
//! [`Role`] on itself as its first act. Without a sandbox threads are started as usual.
//!
//! What the limits are is not known here: [`confine`] is told how to take them on.

use std::io;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread::Builder;

/// What a thread is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// The main thread: monitors, the command line, the graph; and requests, as an IOThread.
    Control,
    /// Requests of exports and jobs, on descriptors that are open.
    IoThread,
    /// Calls that can block: open, stat, ioctl.
    Worker,
    /// Makes sockets, and resolves names with modules that the system's configuration names.
    Connector,
    /// Talks to the helper for reservations.
    Reservations,
    /// Starts the others, and makes the rings of those that may not.
    Starter,
}

/// How a thread takes on the limits of its role.
type Enter = dyn Fn(Role) -> io::Result<()> + Send + Sync;

struct Starter {
    enter: Arc<Enter>,
    work: Sender<Work>,
}

/// What the starter does for another thread; it must not wait for anything.
type Work = Box<dyn FnOnce() + Send>;

static STARTER: OnceLock<Starter> = OnceLock::new();

/// From now on each thread takes on the limits of its role, by `take_on`. Once, before there is a second thread.
///
/// # Errors
/// The system has no thread, or the starter could not take on its limits.
pub fn confine(take_on: impl Fn(Role) -> io::Result<()> + Send + Sync + 'static) -> io::Result<()> {
    let enter: Arc<Enter> = Arc::new(take_on);
    let take_on = Arc::clone(&enter);
    let (work, queue) = channel::<Work>();
    let (tell, told) = channel();
    Builder::new().name("starter".into()).spawn(move || {
        let limited = take_on(Role::Starter);
        let stop = limited.is_err();
        // Whoever started this waits for the answer.
        let _ = tell.send(limited);
        if stop {
            return;
        }
        while let Ok(work) = queue.recv() {
            work();
        }
    })?;
    told.recv().map_err(io::Error::other)??;
    STARTER.set(Starter { enter, work }).map_err(|_| io::Error::other("threads are confined already"))
}

/// Has the starter do something that only it may, and waits for the result. Without a sandbox the caller does it.
///
/// # Errors
/// There is no starter any more: the process ends.
pub(crate) fn on_starter<T: Send + 'static>(make: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    let Some(starter) = STARTER.get() else { return Ok(make()) };
    let (tell, made) = channel();
    let gone = || io::Error::other("threads are not started any more");
    let work = Box::new(move || {
        // Nobody waits any more only at the end of the process.
        let _ = tell.send(make());
    });
    starter.work.send(work).map_err(|_| gone())?;
    made.recv().map_err(|_| gone())
}

/// The calling thread takes on the limits of `role`, if there are any.
///
/// # Errors
/// The kernel refuses them.
pub fn enter(role: Role) -> io::Result<()> {
    STARTER.get().map_or(Ok(()), |starter| (starter.enter)(role))
}

/// Starts a thread that has taken on the limits of `role` before it does its `work`.
///
/// # Errors
/// The system has no thread for it.
pub fn spawn(role: Role, name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    spawn_unlimited(name, None, move || match enter(role) {
        Ok(()) => work(),
        // A thread without its limits must not run, and one that never runs would be waited for.
        Err(_) => std::process::abort(),
    })
}

/// Starts a thread that itself calls [`enter`] when it is ready for it.
pub(crate) fn spawn_unlimited(
    name: &str,
    stack: Option<usize>,
    work: impl FnOnce() + Send + 'static,
) -> io::Result<()> {
    let builder = Builder::new().name(name.to_owned());
    let builder = match stack {
        Some(size) => builder.stack_size(size),
        None => builder,
    };
    on_starter(move || builder.spawn(work).map(drop))?
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    static ENTERED: Mutex<Vec<(String, Role)>> = Mutex::new(Vec::new());

    fn note(role: Role) -> io::Result<()> {
        let name = std::thread::current().name().unwrap_or_default().to_owned();
        ENTERED.lock().unwrap().push((name, role));
        Ok(())
    }

    // The one test of this process that confines threads: the others of this crate may or may not see it.
    #[test]
    fn each_thread_takes_on_its_role_before_it_works() {
        confine(note).unwrap();
        assert!(confine(note).is_err());
        let (tell, told) = channel();
        spawn(Role::Worker, "first", move || {
            let inner = tell.clone();
            spawn(Role::Connector, "second", move || inner.send(()).unwrap()).unwrap();
            tell.send(()).unwrap();
        })
        .unwrap();
        told.recv().unwrap();
        told.recv().unwrap();
        let entered = ENTERED.lock().unwrap();
        assert!(entered.contains(&("starter".into(), Role::Starter)));
        assert!(entered.contains(&("first".into(), Role::Worker)));
        assert!(entered.contains(&("second".into(), Role::Connector)));
    }
}
