//! QMP monitors: a session for each client of a character device, one after the other.
//!
//! A monitor is a task on the main thread. It moves bytes between a [`Connection`] and a [`qmp::Session`], passes commands to the
//! control task and replies back. All state of a conversation is in the session, which is dropped with its client; a
//! command that was passed on is carried out all the same. A client that does not read stops being read and served, and
//! is disconnected when the events that wait for it pass the session's bound. [QMP spec]

use std::cell::RefCell;
use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use qapi::types::control::{MonitorMode, MonitorOptions};
use qapi::{Error, Qapi, Result, Value};
use qmp::{Event, Session, Settings, Style};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

use crate::chardev::{ChardevPort, Connection};
use crate::control::{Caller, Handle, command_exists, version_info};
use crate::events::Events;

/// How much is read at once.
const READ: usize = 16 * 1024;
/// How long a client may take to read what is left for it when the daemon ends.
const FAREWELL: Duration = Duration::from_secs(1);

/// A running monitor.
pub struct Monitor {
    task: JoinHandle<Option<Connection>>,
    closing: watch::Sender<bool>,
}

impl Monitor {
    /// Sends the replies that are there and lets go of the character device. The connection with the client that there is
    /// comes back: it ends when it is dropped.
    pub async fn close(self) -> Option<Connection> {
        self.closing.send_replace(true);
        // It ends by itself, whatever its client does. That it was aborted with the event loop is an end as well.
        self.task.await.unwrap_or_default()
    }
}

/// Serves the clients that come through `port` until [`Monitor::close`].
///
/// # Errors
/// The options ask for a monitor for people, which talks to a virtual machine.
pub fn start(port: ChardevPort, options: &MonitorOptions, control: Handle, events: &Events) -> Result<Monitor> {
    if options.mode == MonitorMode::Readline {
        return Err(Error::generic("Only QMP is supported"));
    }
    let settings = Settings {
        version: version_info().to_value(),
        oob: port.offers_oob(),
        style: if options.pretty { Style::Pretty } else { Style::Compact },
        is_command: command_exists,
    };
    let (closing, closed) = watch::channel(false);
    let caller = Caller::new(control.new_monitor());
    let task = Task { settings, control, caller, events: events.clone(), closing: closed };
    Ok(Monitor { task: tokio::task::spawn_local(task.run(port)), closing })
}

struct Task {
    settings: Settings,
    control: Handle,
    caller: Caller,
    events: Events,
    closing: watch::Receiver<bool>,
}

type Running = Pin<Box<dyn Future<Output = Result<Value>>>>;

impl Task {
    async fn run(self, mut port: ChardevPort) -> Option<Connection> {
        loop {
            let connection = tokio::select! {
                biased;
                () = self.closing() => return None,
                connection = port.connection() => connection?,
            };
            tracing::trace!(target: "monitor_client_opened", "");
            let client = Client::new(self.settings.clone(), connection, &self.events);
            match client.serve(&self).await {
                Ok(Some(connection)) => return Some(connection),
                Ok(None) => tracing::trace!(target: "monitor_client_closed", ""),
                Err(error) => tracing::trace!(target: "monitor_client_closed", %error),
            }
        }
    }

    async fn closing(&self) {
        // If nobody can tell any more, the event loop is about to end and drops this task.
        if self.closing.clone().wait_for(|closing| *closing).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// One conversation.
struct Client {
    connection: Connection,
    /// Also used by the subscription to events; never borrowed across an await.
    session: Rc<RefCell<Session>>,
    /// An event has come.
    woken: Rc<Notify>,
    _subscription: Rc<dyn Fn(&Event)>,
}

impl Client {
    fn new(settings: Settings, connection: Connection, events: &Events) -> Client {
        let session = Rc::new(RefCell::new(Session::new(settings)));
        let woken = Rc::new(Notify::new());
        let subscription = {
            let (session, woken) = (session.clone(), woken.clone());
            events.subscribe(move |event| {
                session.borrow_mut().event(event);
                woken.notify_one();
            })
        };
        Client { connection, session, woken, _subscription: subscription }
    }

    /// Talks until the client has gone or the daemon ends. Where it is the daemon, the connection is still there.
    ///
    /// # Errors
    /// The connection broke.
    async fn serve(self, task: &Task) -> io::Result<Option<Connection>> {
        let mut buffer = vec![0; READ];
        let mut unread: Range<usize> = 0..0;
        let mut passed = Vec::new();
        let mut running: Option<Running> = None;
        let mut at_end = false;
        loop {
            let (wants_input, has_output) = {
                let mut session = self.session.borrow_mut();
                let former = session.passed(std::mem::take(&mut passed));
                if !former.is_empty() {
                    ::io::dispose(former);
                }
                if let Some(mut rest) = buffer.get(unread.clone()) {
                    session.input(&mut rest);
                    unread.start = unread.end - rest.len();
                }
                if running.is_none()
                    && let Some(request) = session.next_request()
                {
                    let (control, caller) = (task.control.clone(), task.caller.clone());
                    // What an earlier request brought is kept until somebody wants it or others come.
                    if !request.descriptors.is_empty() {
                        caller.pass(request.descriptors);
                    }
                    let arguments = Value::Object(request.arguments);
                    running = Some(Box::pin(async move { control.request(request.name, arguments, caller).await }));
                }
                if session.is_overrun() {
                    tracing::warn!(target: "monitor_client_too_slow", "a monitor's client does not read its events: disconnected");
                    return Ok(None);
                }
                (session.wants_input(), !session.output().is_empty())
            };
            if at_end && running.is_none() && !has_output && unread.is_empty() {
                self.connection.flushed().await?;
                return Ok(None);
            }
            tokio::select! {
                biased;
                () = task.closing() => break,
                writable = self.connection.writable(), if has_output => {
                    writable?;
                    self.write()?;
                }
                result = complete(&mut running) => self.session.borrow_mut().reply(result),
                count = self.connection.read(&mut buffer, &mut passed), if wants_input && unread.is_empty() && !at_end => {
                    unread = 0..count?;
                    if unread.is_empty() {
                        at_end = true;
                        if self.connection.is_gone() {
                            return Ok(None);
                        }
                    }
                }
                () = self.woken.notified() => {}
            }
        }
        self.say_farewell(running).await?;
        Ok(Some(self.connection))
    }

    /// Sends what is there, in particular the reply to `quit`.
    async fn say_farewell(&self, mut running: Option<Running>) -> io::Result<()> {
        let reply = tokio::select! {
            biased;
            result = complete(&mut running) => Some(result),
            () = std::future::ready(()) => None,
        };
        if let Some(result) = reply {
            self.session.borrow_mut().reply(result);
        }
        let flush = async {
            while !self.session.borrow().output().is_empty() {
                self.connection.writable().await?;
                self.write()?;
            }
            self.connection.flushed().await
        };
        tokio::time::timeout(FAREWELL, flush).await.unwrap_or(Ok(()))
    }

    fn write(&self) -> io::Result<()> {
        let mut session = self.session.borrow_mut();
        let count = self.connection.try_write(session.output())?;
        session.sent(count);
        Ok(())
    }
}

/// The result of the command that is carried out; never completes where there is none.
async fn complete(running: &mut Option<Running>) -> Result<Value> {
    let result = std::future::poll_fn(|context| match running {
        Some(future) => future.as_mut().poll(context),
        None => Poll::Pending,
    })
    .await;
    *running = None;
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::{Control, Message};
    use qapi::types::export::BlockExportDeleted;
    use qmp::session::MAX_EVENT_BYTES;
    use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
    use tokio::net::UnixStream;
    use tokio::task::LocalSet;

    type Peer = BufReader<UnixStream>;

    /// A client of a monitor, and what is needed to end the monitor.
    fn monitor(events: &Events, control: &Control) -> (Peer, Monitor) {
        let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
        let options = MonitorOptions { id: None, mode: MonitorMode::Control, pretty: false, chardev: "c".to_owned() };
        let port = crate::chardev::testing::port(theirs.into_std().expect("a socket"));
        (BufReader::new(ours), start(port, &options, control.handle(), events).expect("a monitor"))
    }

    async fn line(client: &mut Peer) -> Value {
        let mut text = Vec::new();
        while !text.ends_with(b"\r\n") {
            client.read_until(b'\n', &mut text).await.expect("more of a line");
        }
        serde_json::from_slice(&text).expect("JSON")
    }

    async fn negotiate(client: &mut Peer) {
        assert!(line(client).await.get("QMP").is_some());
        client.write_all(b"{'execute':'qmp_capabilities'}").await.expect("a request");
        assert_eq!(line(client).await, serde_json::json!({"return": {}}));
    }

    #[tokio::test]
    async fn a_client_that_reads_no_events_is_let_go_and_others_are_not() {
        let work = async {
            let events = Events::default();
            let control = Control::new(events.clone());
            let (mut deaf, first) = monitor(&events, &control);
            let (mut reader, second) = monitor(&events, &control);
            negotiate(&mut deaf).await;
            negotiate(&mut reader).await;
            let event = BlockExportDeleted { id: "e".repeat(1000) };
            let mut told = 0;
            while !first.task.is_finished() {
                events.emit(&event);
                told += 1;
                assert_eq!(line(&mut reader).await["event"], "BLOCK_EXPORT_DELETED", "{told}");
            }
            assert!(told > MAX_EVENT_BYTES / 1200, "{told} events are fewer than there is room for");
            // What fitted is still there, whole lines but for the last one, and then the end.
            let mut rest = Vec::new();
            deaf.read_to_end(&mut rest).await.expect("the end");
            assert!(rest.starts_with(b"{\"timestamp\""));
            events.emit(&event);
            line(&mut reader).await;
            drop(second.close().await);
        };
        LocalSet::new().run_until(work).await;
    }

    #[tokio::test]
    async fn the_last_reply_comes_before_the_end_and_the_end_after_everything() {
        let work = async {
            let events = Events::default();
            let mut control = Control::new(events.clone());
            let (mut client, monitor) = monitor(&events, &control);
            negotiate(&mut client).await;
            client.write_all(b"{'execute':'quit','id':1}").await.expect("a request");
            control.serve().await;
            let connection = monitor.close().await;
            assert_eq!(line(&mut client).await, serde_json::json!({"return": {}, "id": 1}));
            assert!(client.get_ref().try_read(&mut [0]).is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock));
            drop(connection);
            assert_eq!(client.read(&mut [0]).await.expect("the end"), 0);
        };
        LocalSet::new().run_until(work).await;
    }

    #[tokio::test]
    async fn a_monitor_ends_whatever_its_client_and_its_command_do() {
        let work = async {
            let events = Events::default();
            let control = Control::new(events.clone());
            // Nobody serves: the command never ends.
            let (mut client, monitor) = monitor(&events, &control);
            negotiate(&mut client).await;
            client.write_all(b"{'execute':'query-version'}{'exec").await.expect("a request and a half");
            tokio::task::yield_now().await;
            control.handle().send(Message::Shutdown);
            drop(monitor.close().await);
            // The half request may still be unread, which makes it a reset.
            assert_eq!(client.read(&mut [0]).await.unwrap_or(0), 0);
        };
        LocalSet::new().run_until(work).await;
    }
}
