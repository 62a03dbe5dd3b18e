//! The life of the process, in order.
//!
//! Nothing that a client sends is read before the last step of the sandbox, and what the options name is opened before
//! the first.

use crate::device::Executor;
use crate::foreign::{self, Closer};
use crate::listen::{self, Made};
use crate::log;
use crate::notify::Manager;
use crate::options::{Options, Sandbox};
use crate::policy::Policy;
use crate::pool::{self, Workers};
use crate::server::Server;
use crate::shares::Shares;
use crate::trace::{self, Trace};
use listenfd::ListenFd;
use sandbox::files::{Files, Rule};
use sandbox::identity::Identity;
use sandbox::syscall::{Filters, Mode, PR_HELPER, Refusal};
use sandbox::{Capability, Plan};
use sd_notify::NotifyState;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;
use tokio::net::UnixListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Semaphore, watch};

/// Descriptors beside connections and requests: standard ones, sockets, the event loop.
const OWN_FILES: u64 = 64;

/// How long the process waits at its end for its last lines to be written.
const LAST_LINES: Duration = Duration::from_secs(1);

/// The stack of a thread that waits for a device.
const WORKER_STACK: usize = 256 * 1024;

/// Serves until a signal ends it; the error is a message for standard error.
pub fn run(options: &Options) -> Result<(), String> {
    // What the options say, before anything is touched.
    if trace::help(&options.trace, &mut std::io::stdout()).map_err(|e| e.to_string())? {
        return Ok(());
    }
    let trace = Trace::new(&options.trace)?;
    let identity = identity(options)?;
    let text = options.policy.as_ref().map(std::fs::read_to_string).transpose();
    let text = text.map_err(|e| format!("cannot read the policy: {e}"))?;
    let policy = Policy::new(text.as_deref(), &options.allow, &options.deny).map_err(|e| format!("policy: {e}"))?;

    // 1. What was inherited: its useful part is read, the rest goes.
    let passed = ListenFd::from_env();
    sandbox::process::close_inherited(listen::first_unannounced(&passed)).map_err(|e| e.to_string())?;
    let manager = Manager::connect().map_err(|e| format!("cannot connect to the service manager: {e}"))?;
    let (listener, socket) = listen::listener(options, passed)?;
    sandbox::process::clear_environment().map_err(|e| e.to_string())?;

    // 2. What the options name. The process that goes on in the background is the one that opens the rest.
    let pidfile = options.pidfile().map(std::path::absolute).transpose().map_err(|e| format!("pid file: {e}"))?;
    let background = options.daemon.then(sandbox::process::background).transpose().map_err(|e| e.to_string())?;
    let pidfile = pidfile.as_deref().map(listen::pidfile).transpose()?;
    let (log, writer) = log::new(options.audit(), options.verbose, trace);
    let deadline = Duration::from_secs(options.timeout);
    // The kernel gives up first, so that a thread is free again when its client has its answer.
    let executor = Executor::new(deadline * 3 / 4).map_err(|e| format!("cannot open /proc/devices: {e}"))?;
    let threads = usize::from(options.max_commands);
    let closer = Arc::new(Closer::default());
    let (pool, workers) = pool::new(Arc::new(executor), threads, deadline);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|e| format!("cannot start the event loop: {e}"))?;
    let entered = runtime.enter();
    let ends = Ends::new().map_err(|e| format!("cannot watch for signals: {e}"))?;
    listener.set_nonblocking(true).map_err(|e| format!("cannot use the socket: {e}"))?;
    let listener = UnixListener::from_std(listener).map_err(|e| format!("cannot use the socket: {e}"))?;
    drop(entered);

    // 3. to 7. Limits, user, capabilities, privileges, files.
    let made: Vec<&Made> = socket.iter().chain(pidfile.iter().map(|(_, made)| made)).collect();
    let files = Files { rules: file_rules(&policy, &made), ..Files::default() };
    let report = sandbox::confine(&Plan {
        open_files: Some(OWN_FILES + u64::from(options.max_connections) * 8 + u64::from(options.max_commands)),
        secret: true,
        identity,
        capabilities: &[Capability::CAP_SYS_RAWIO],
        files: (options.sandbox != Sandbox::Off).then_some(&files),
    });
    let report = report.map_err(|e| e.to_string())?;
    // 8. System calls: each thread enters its filter as its first act, this one last.
    let filters = Arc::new(filters(options, &policy, &made)?);
    let written = start_threads(writer, &closer, workers, threads, &filters)?;
    enter(&filters, "wire")?;
    log.verbose(|| {
        format!(
            "capabilities {:?}, Landlock {:?}, system calls {:?}",
            report.capabilities, report.files, options.sandbox
        )
    });

    // Service.
    let server = Arc::new(Server {
        log: log.clone(),
        policy,
        pool,
        closer,
        idle: (options.idle_timeout != 0).then(|| Duration::from_secs(options.idle_timeout)),
        connections: Arc::new(Semaphore::new(usize::from(options.max_connections))),
        shares: Shares::new(usize::from(options.max_connections), threads),
    });
    if let Some(background) = background {
        background.ready().map_err(|e| e.to_string())?;
    }
    manager.say(&[NotifyState::Ready, NotifyState::Status("serving")]);
    runtime.block_on(serve(server, listener, ends, &manager));

    for (made, what) in socket.iter().map(|m| (m, "socket")).chain(pidfile.iter().map(|(_, m)| (m, "pid file"))) {
        if let Err(message) = made.remove(what) {
            log.message(&message);
        }
    }
    // The last lines are written when the last of those that write is gone; whoever reads them may be gone too.
    drop(log);
    let _ = written.recv_timeout(LAST_LINES);
    Ok(())
}

/// Who to become. With a user and no group, the user's own group: root's would open doors.
fn identity(options: &Options) -> Result<Option<Identity>, String> {
    let user = options.user.as_deref().map(listen::user).transpose()?;
    let group = options.group.as_deref().map(listen::group).transpose()?;
    if user.is_none() && group.is_none() {
        return Ok(None);
    }
    Ok(Some(Identity { user: user.map(|u| u.0), group: group.or(user.and_then(|u| u.1)) }))
}

/// The files that are needed while serving: none, but for what goes at the end and what a rule asks for.
fn file_rules(policy: &Policy, made: &[&Made]) -> Vec<Rule> {
    let folder = |made: &&Made| Some(Rule::Remove(made.0.parent()?.to_owned()));
    let mut rules: Vec<Rule> = made.iter().filter_map(folder).collect();
    if policy.asks_for_units() {
        rules.push(Rule::Read(PathBuf::from("/proc")));
    }
    rules
}

/// The filters of all threads, with the sections that these options need; none with `--sandbox=off`.
fn filters(options: &Options, policy: &Policy, made: &[&Made]) -> Result<Option<Filters>, String> {
    let mode = match options.sandbox {
        Sandbox::Default => Mode::Enforce,
        Sandbox::Log => Mode::Log,
        Sandbox::Off => return Ok(None),
    };
    let mut needs = Vec::new();
    needs.extend((!made.is_empty()).then_some("remove"));
    needs.extend(policy.asks_for_units().then_some("cgroup"));
    needs.extend(options.daemon.then_some("background"));
    sandbox::syscall::name_refused_calls(Refusal::End).map_err(|e| e.to_string())?;
    Ok(Some(PR_HELPER.filters(&needs, mode)))
}

fn enter(filters: &Option<Filters>, role: &'static str) -> Result<(), String> {
    filters.as_ref().map_or(Ok(()), |filters| filters.enter(role)).map_err(|e| e.to_string())
}

/// Starts the logger and the workers; returns when all are under their filters. What it returns disconnects when the
/// logger has written everything.
fn start_threads(
    writer: log::Writer,
    closer: &Arc<Closer>,
    workers: Workers,
    threads: usize,
    filters: &Arc<Option<Filters>>,
) -> Result<Receiver<()>, String> {
    type Entered = Sender<Result<(), String>>;
    let (entered, all) = channel();
    let start = |role: &'static str, entered: Entered, work: Box<dyn FnOnce() + Send>| {
        let filters = filters.clone();
        let builder = std::thread::Builder::new().name(role.into()).stack_size(WORKER_STACK);
        let thread = builder.spawn(move || {
            let result = enter(&filters, role);
            let go_on = result.is_ok();
            // The receiver waits for every thread.
            let _ = entered.send(result);
            drop(entered);
            if go_on {
                work();
            }
        });
        thread.map(drop).map_err(|e| format!("cannot start a thread: {e}"))
    };
    let (writing, written) = channel();
    let log = move || {
        writer.run();
        drop(writing);
    };
    start("logger", entered.clone(), Box::new(log))?;
    for _ in 0..foreign::THREADS {
        let closer = closer.clone();
        start("closer", entered.clone(), Box::new(move || closer.run()))?;
    }
    for _ in 0..threads {
        let workers = workers.clone();
        start("worker", entered.clone(), Box::new(|| workers.run()))?;
    }
    drop(entered);
    all.into_iter().collect::<Result<(), String>>()?;
    Ok(written)
}

/// The signals that end the process.
struct Ends([Signal; 3]);

impl Ends {
    fn new() -> std::io::Result<Self> {
        Ok(Self([signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?, signal(SignalKind::hangup())?]))
    }

    async fn wait(&mut self) {
        let [terminate, interrupt, hangup] = &mut self.0;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}

/// Serves until a signal comes, then answers what is in progress.
async fn serve(server: Arc<Server>, listener: UnixListener, mut ends: Ends, manager: &Manager) {
    let (stop, stopped) = watch::channel(false);
    let serving = server.run(listener, stopped);
    let ending = async {
        ends.wait().await;
        manager.say(&[NotifyState::Stopping]);
        // Nobody listens only if the server has ended already.
        let _ = stop.send(true);
    };
    let alive = async {
        manager.keep_alive().await;
        std::future::pending::<()>().await;
    };
    tokio::select! {
        ((), ()) = async { tokio::join!(serving, ending) } => {}
        () = alive => {}
    }
}
