//! The control task: the one owner of nodes, exports, objects and character devices, and the one that changes them.
//!
//! Monitors send it requests, exports tell it that they have ended; it takes one message at a time and finishes it before
//! the next; while an image is checked it takes only those that change nothing. The command line is executed by the same
//! functions, before the task starts to listen.
//!
//! | file | commands |
//! | --- | --- |
//! | `monitor` | version, commands, schema, quit |
//! | `blockdev` | `blockdev-add`, `-del`, `block_resize` |
//! | `check` | checks of images |
//! | `fault` | the fault node of tests |
//! | `query` | what nodes are and did |
//! | `job` | jobs |
//! | `snapshot` | overlays, snapshots inside images, transactions |
//! | `export` | exports and the NBD server |
//! | `reservation` | persistent reservations of nodes, and their managers |
//! | `object` | objects and the tree of objects |
//! | `chardev` | character devices |
//! | `descriptors` | descriptors that clients pass |

mod blockdev;
mod chardev;
mod check;
mod descriptors;
mod export;
mod fault;
mod job;
mod monitor;
mod object;
mod query;
mod reservation;
mod snapshot;
mod table;

pub use descriptors::Caller;
pub use monitor::version_info;
#[cfg(test)]
pub use table::schema;

use crate::events::Events;
use crate::sandbox::InForce;
use block::Graph;
use qapi::{Error, Result, Value};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use table::Run;
use tokio::sync::{mpsc, oneshot};

/// Whether there is a command of that name.
pub fn command_exists(name: &str) -> bool {
    table::find(name).is_some()
}

/// What reaches the control task.
#[derive(Debug)]
pub enum Message {
    /// A command of a monitor. The reply may find nobody any more; the command is carried out all the same.
    Request {
        /// The command.
        name: String,
        /// Its arguments, an object.
        arguments: Value,
        /// Who wants it.
        caller: Caller,
        /// Where the result goes.
        reply: oneshot::Sender<Result<Value>>,
    },
    /// The export with this id has no client and no request left.
    ExportClosed(String),
    /// An export asks for another length of its node.
    ExportResize(export::ExportResize),
    /// A manager of persistent reservations has connected to its helper, or lost it.
    PrManagerStatus {
        /// The object.
        id: String,
        /// Whether it is connected.
        connected: bool,
    },
    /// The work of a job wants something of the graph.
    GraphWork(jobs::GraphWork),
    /// The work of a job, by its number, has something to say.
    JobReport(u64, jobs::Report),
    /// What an object is made of has been read.
    NewObject(object::NewObject),
    /// A check has ended, and so does its use of a node.
    CheckEnded {
        /// What it used, if not a node that checks itself.
        user: Option<block::Disk>,
        /// Told when others may change things again.
        over: oneshot::Sender<()>,
    },
    /// The process was asked to end, by a signal or because its only way in has gone.
    Shutdown,
}

/// The way to the control task; clones share it.
#[derive(Debug, Clone)]
pub struct Handle {
    sender: mpsc::UnboundedSender<Message>,
    /// How many monitors there have been.
    monitors: Arc<AtomicU64>,
}

impl Handle {
    /// A number for a new monitor, from 1 on.
    pub fn new_monitor(&self) -> u64 {
        self.monitors.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Carries out a command, after those that were sent before it.
    ///
    /// # Errors
    /// Those of the command; and when the daemon ends before it is its turn.
    pub async fn request(&self, name: String, arguments: Value, caller: Caller) -> Result<Value> {
        let (reply, result) = oneshot::channel();
        let gone = |()| Error::generic("The daemon is shutting down");
        self.sender.send(Message::Request { name, arguments, caller, reply }).map_err(|_| gone(()))?;
        result.await.map_err(|_| gone(()))?
    }

    /// Leaves a message.
    pub fn send(&self, message: Message) {
        // Nobody listens any more only when the daemon is about to exit, and then nothing needs to be said.
        let _ = self.sender.send(message);
    }
}

/// What became of a command.
enum Executed {
    /// Its result.
    Done(Value),
    /// It goes on by itself; the control task does not wait for it.
    Goes(table::Goes),
}

/// All state of the control path.
pub struct Control {
    graph: Graph,
    exports: export::Exports,
    jobs: jobs::Jobs,
    objects: object::Objects,
    chardevs: crate::chardev::Chardevs,
    descriptors: descriptors::Descriptors,
    events: Events,
    /// Turns what nodes and exports report into events.
    reports: tokio::task::JoinHandle<()>,
    sandbox: InForce,
    handle: Handle,
    inbox: mpsc::UnboundedReceiver<Message>,
    /// A command has the nodes for itself.
    alone: bool,
    /// What waits for its end, in order.
    waiting: VecDeque<Message>,
    quit: bool,
}

impl Control {
    /// An empty daemon, of a process that gave up nothing.
    pub fn new(events: Events) -> Self {
        let (sender, inbox) = mpsc::unbounded_channel();
        let drivers = drivers::Drivers::default();
        let objects = object::Objects::new(Arc::clone(&drivers.clock));
        let fdsets = drivers.fdsets.clone();
        let workers = formats::Workers::new(io::detach);
        let graph = Graph::new(Arc::new(formats::Formats::new(drivers, workers)));
        let handle = Handle { sender, monitors: Arc::default() };
        let quitter = handle.clone();
        Self {
            reports: events.tell_reports(graph.reporter().clone()),
            graph,
            exports: export::Exports::default(),
            jobs: job::none(&events),
            objects,
            chardevs: crate::chardev::Chardevs::new(fdsets.clone(), move || quitter.send(Message::Shutdown)),
            descriptors: descriptors::Descriptors::new(fdsets),
            events,
            sandbox: InForce::default(),
            handle,
            inbox,
            alone: false,
            waiting: VecDeque::new(),
            quit: false,
        }
    }

    /// The process gave this up.
    pub fn confined(self, sandbox: InForce) -> Self {
        Self { sandbox, ..self }
    }

    /// The way to this task.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// The character devices.
    pub fn chardevs(&mut self) -> &mut crate::chardev::Chardevs {
        &mut self.chardevs
    }

    /// Serves until `quit` or [`Message::Shutdown`].
    pub async fn serve(&mut self) {
        self.accept_clients();
        while !self.quit {
            let Some(message) = self.next().await else { return };
            self.take(message).await;
        }
    }

    /// The next message that may be taken now.
    async fn next(&mut self) -> Option<Message> {
        if !self.alone
            && let Some(message) = self.waiting.pop_front()
        {
            return Some(message);
        }
        loop {
            let message = self.inbox.recv().await?;
            let now = match &message {
                Message::Request { name, .. } => table::looks_on(name),
                Message::PrManagerStatus { .. } | Message::CheckEnded { .. } | Message::Shutdown => true,
                _ => false,
            };
            if now || !self.alone {
                return Some(message);
            }
            self.waiting.push_back(message);
        }
    }

    async fn take(&mut self, message: Message) {
        match message {
            Message::Request { name, arguments, caller, reply } => {
                self.descriptors.called_by(Some(caller));
                let executed = self.execute(&name, &arguments).await;
                self.descriptors.called_by(None);
                match executed {
                    Ok(Executed::Done(value)) => drop(reply.send(Ok(value))),
                    Ok(Executed::Goes(rest)) => {
                        tokio::task::spawn_local(async move { drop(reply.send(rest.await)) });
                    }
                    Err(error) => drop(reply.send(Err(error))),
                }
            }
            Message::PrManagerStatus { id, connected } => self.pr_manager_status(id, connected),
            Message::NewObject(new) => self.object_read(new),
            Message::ExportResize(wish) => self.export_resize(wish).await,
            Message::ExportClosed(id) => self.export_closed(&id).await,
            Message::GraphWork(work) => work.carry_out(&mut self.graph).await,
            Message::JobReport(serial, report) => self.job_report(serial, report).await,
            Message::CheckEnded { user, over } => self.check_ended(user, over).await,
            Message::Shutdown => self.quit = true,
        }
    }

    /// Carries out one command, or begins it.
    async fn execute(&mut self, name: &str, arguments: &Value) -> Result<Executed> {
        let Some(command) = table::find(name) else {
            return Err(Error::command_not_found(format!("The command {name} has not been found")));
        };
        tracing::trace!(target: "control_command", name);
        match command.run {
            Run::Here(run) => run(self, arguments).await.map(Executed::Done),
            Run::Beside(begin) => begin(self, arguments).map(Executed::Goes),
            Run::Alone(start) => start(self, arguments).await.map(Executed::Goes),
        }
    }

    /// Ends everything, users before what they use: exports and servers, nodes, objects.
    pub async fn shut_down(&mut self) {
        self.graph.release_all();
        self.end_check().await;
        self.close_exports().await;
        self.close_jobs().await;
        self.graph.close_all().await;
        self.close_objects().await;
        self.reports.abort();
        self.events.flush_reports(self.graph.reporter());
    }
}
