//! qemu-storage-daemon: serves disk images without a virtual machine.
//!
//! Order of the start, which is also what a reader of this file should keep in mind: read the command line; go to the
//! background; open the trace; give up what serving does not need (`sandbox`); become an IOThread; take on the limits of
//! the control thread; carry out the options in order; write the pid file; tell the parent; serve. The end is the
//! same backwards: exports, nodes, objects, monitors, pid file.
#![forbid(unsafe_code)]

mod chardev;
mod cli;
mod control;
#[cfg(test)]
mod docs;
mod events;
mod monitor;
mod pidfile;
mod pr_manager;
mod sandbox;
mod service;
mod trace;
mod version;

use cli::{Invocation, Kind, Step};
use control::{Control, Message};
use events::Events;
use io::process::{Daemonized, Starting};
use io::threads::Role;
use pidfile::PidFile;
use qapi::keyval::Argument;
use qapi::opts::ChardevArgument;
use qapi::types::block::BlockdevOptions;
use qapi::types::control::{MonitorOptions, SandboxOptions};
use qapi::types::export::{BlockExportOptions, NbdServerOptions};
use qapi::types::qom::ObjectOptions;
use qapi::{Error, Qapi, Result};
use sandbox::{Confinement, InForce};
use std::fs::File;
use std::io::Write;
use std::process::ExitCode;
use tokio::signal::unix::{SignalKind, signal};

/// Why the start ended early.
enum Stop {
    /// The user asked for this text.
    Print(String),
    /// Something is wrong.
    Fail(Error),
    /// A signal came.
    Signal,
    /// Something is wrong and has been said by the process that found it.
    Failed,
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Fail(error)
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned()).collect();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Stop::Print(text)) => {
            // A reader that has gone needs no text.
            let _ = std::io::stdout().write_all(text.as_bytes());
            ExitCode::SUCCESS
        }
        Err(Stop::Signal) => ExitCode::SUCCESS,
        Err(Stop::Failed) => ExitCode::FAILURE,
        Err(Stop::Fail(error)) => {
            complain(&error);
            ExitCode::FAILURE
        }
    }
}

/// One line on standard error, and a hint below it if there is one.
fn complain(error: &Error) {
    let mut text = format!("qemu-storage-daemon: {error}\n");
    if let Some(hint) = &error.hint {
        text.push_str(hint);
        text.push('\n');
    }
    let _ = std::io::stderr().write_all(text.as_bytes());
}

fn run(arguments: &[String]) -> Result<(), Stop> {
    let (daemonize, pidfile, steps) = match cli::parse(arguments)? {
        Invocation::Help => return Err(Stop::Print(cli::command().render_long_help().to_string())),
        Invocation::Version => return Err(Stop::Print(version::text())),
        Invocation::Serve { daemonize, pidfile, steps } => (daemonize, pidfile, steps),
    };
    let starting = if daemonize {
        match io::process::daemonize().map_err(|error| Error::io("cannot daemonize", error))? {
            Daemonized::Parent(0) => return Ok(()),
            Daemonized::Parent(_) => return Err(Stop::Failed),
            Daemonized::Child(starting) => Some(starting),
        }
    } else {
        None
    };
    start_trace(&steps)?;
    let confinement = confinement(&steps, pidfile.as_deref())?;
    let prepared = pidfile.as_deref().filter(|_| confinement.is_strict()).and_then(PidFile::prepare);
    let sandbox = confinement.take_on()?;
    let pidfile = pidfile.map(|path| (path, prepared));
    // As long as its handle lives, the main thread is an IOThread that exports can use.
    let main = async |_thread| serve(steps, pidfile, starting, sandbox).await;
    io::run_main("main", io::Params::default(), main)
        .map_err(|error| Error::io("cannot start the event loop", error))?
}

/// Tracing comes first, so that the events of the other options are seen, wherever it stands.
fn start_trace(steps: &[Step]) -> Result<(), Stop> {
    let mut trace = trace::Trace::default();
    for step in steps.iter().filter(|step| step.kind == Kind::Trace) {
        if ["help", "?"].contains(&step.value.as_str()) {
            return Err(Stop::Print(trace::help()));
        }
        if let Some(warning) = trace.add(&step.value).map_err(|error| error.context(&step.text))? {
            complain(&Error::generic(warning).context(&step.text));
        }
    }
    Ok(trace.start()?)
}

/// What the process gives up, whatever the place of the option.
fn confinement(steps: &[Step], pidfile: Option<&str>) -> Result<Confinement, Stop> {
    let mut options = sandbox::DEFAULT;
    for step in steps.iter().filter(|step| step.kind == Kind::Sandbox) {
        options = read::<SandboxOptions>(step, Some("mode")).map_err(|stop| in_option(stop, step))?;
    }
    Ok(Confinement::new(&options, steps, pidfile))
}

/// Says which option an error is about.
fn in_option(stop: Stop, step: &Step) -> Stop {
    match stop {
        Stop::Fail(error) => Stop::Fail(error.context(step.shown())),
        other => other,
    }
}

async fn serve(
    steps: Vec<Step>,
    pidfile: Option<(String, Option<File>)>,
    starting: Option<Starting>,
    sandbox: InForce,
) -> Result<(), Stop> {
    io::threads::enter(Role::Control).map_err(|error| Error::io("cannot enter the sandbox", error))?;
    let events = Events::default();
    let mut control = Control::new(events.clone()).confined(sandbox);
    if starting.is_some() {
        control.chardevs().go_to_background();
    }
    let mut monitors = Vec::new();
    let stopped = stop_on_signals(&control)?;
    let set_up = async {
        for step in &steps {
            carry_out(step, &mut control, &events, &mut monitors).await.map_err(|stop| in_option(stop, step))?;
        }
        let pidfile = pidfile.map(|(path, prepared)| PidFile::create(&path, prepared)).transpose()?;
        if let Some(starting) = starting {
            starting.succeeded().map_err(|error| Error::io("cannot leave the foreground", error))?;
        }
        Ok(pidfile)
    };
    // Only the set-up can be left half-way, by a signal: nothing serves yet, and no request is in flight.
    let ready: Result<Option<PidFile>, Stop> = tokio::select! {
        done = set_up => done,
        () = stopped => Err(Stop::Signal),
    };
    if ready.is_ok() {
        service::ready();
        control.serve().await;
    }
    service::stopping();
    control.shut_down().await;
    let mut connections = Vec::new();
    for monitor in monitors {
        connections.push(monitor.close().await);
    }
    // A client that sees its connection end may rely on it that the daemon holds nothing any more, so that comes last.
    let result = ready.map(drop);
    drop(connections);
    result
}

/// SIGINT, SIGTERM and SIGHUP end the daemon in good order. The result completes at the first of them.
fn stop_on_signals(control: &Control) -> Result<impl Future<Output = ()> + use<>, Stop> {
    let (stop, mut stopped) = tokio::sync::watch::channel(false);
    for kind in [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()] {
        let mut signals = signal(kind).map_err(|error| Error::io("cannot catch signals", error))?;
        let (handle, stop) = (control.handle(), stop.clone());
        tokio::task::spawn_local(async move {
            while signals.recv().await.is_some() {
                stop.send_replace(true);
                handle.send(Message::Shutdown);
            }
        });
    }
    Ok(async move {
        // An error says that nobody can send any more: no signal will come.
        if stopped.wait_for(|stop| *stop).await.is_err() {
            std::future::pending::<()>().await;
        }
    })
}

/// Reads the value of an option; a request for help ends the start.
fn read<T: Qapi>(step: &Step, implied_key: Option<&str>) -> Result<T, Stop> {
    match qapi::keyval::read(&step.value, implied_key, qmp::parser::parse) {
        Ok(Argument::Value(value)) => Ok(value),
        Ok(Argument::Help(text)) => Err(Stop::Print(text)),
        Err(error) => Err(explained(step, implied_key, error).into()),
    }
}

/// Adds where a person can read what the option takes.
fn explained(step: &Step, implied_key: Option<&str>, error: Error) -> Error {
    let hint = step.where_to_look(implied_key, &error);
    error.with_hint(hint)
}

async fn carry_out(
    step: &Step,
    control: &mut Control,
    events: &Events,
    monitors: &mut Vec<monitor::Monitor>,
) -> Result<(), Stop> {
    match step.kind {
        Kind::Blockdev => control.blockdev_add(read::<BlockdevOptions>(step, Some("driver"))?).await?,
        Kind::Export => control.block_export_add(read::<BlockExportOptions>(step, Some("type"))?).await?,
        Kind::NbdServer => control.start_nbd_server(read::<NbdServerOptions>(step, None)?).await?,
        Kind::Object => control.make_object(read::<ObjectOptions>(step, Some("qom-type"))?).await?,
        Kind::Chardev => {
            match qapi::opts::chardev(&step.value).map_err(|error| explained(step, Some("backend"), error))? {
                ChardevArgument::Help(text) => return Err(Stop::Print(text)),
                ChardevArgument::Add(devices, warnings) => {
                    for warning in warnings {
                        complain(&Error::generic(format!("warning: {warning}")).context(&step.text));
                    }
                    for device in devices {
                        control.chardevs().add(&device.id, device.backend)?.await?;
                    }
                }
            }
        }
        Kind::Monitor => {
            let options = read::<MonitorOptions>(step, Some("chardev"))?;
            let port = control.chardevs().take_for_monitor(&options.chardev)?;
            monitors.push(monitor::start(port, &options, control.handle(), events)?);
        }
        Kind::Trace | Kind::Sandbox => {}
        Kind::Unexpected => return Err(Error::generic("Unexpected argument").into()),
    }
    Ok(())
}
