//! A QMP client for tests: it sends what it is told to, also what no client should send.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use serde_json::{Value, json};

use crate::{DEADLINE, wait_for};

/// An error that the daemon answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The error class.
    pub class: String,
    /// The text for people.
    pub desc: String,
}

/// A connection to a monitor.
pub struct Client {
    stream: UnixStream,
    buffer: Vec<u8>,
    events: VecDeque<Value>,
    /// Every byte received, for tests of the form on the wire.
    pub transcript: Vec<u8>,
}

impl Client {
    /// Connects; the daemon may still be on its way to listen.
    pub fn connect(path: &Path) -> Self {
        Self::over(wait_for("a monitor's socket", || UnixStream::connect(path).ok()))
    }

    /// Speaks over a connected socket.
    pub fn over(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(DEADLINE)).expect("set a time limit");
        Self { stream, buffer: Vec::new(), events: VecDeque::new(), transcript: Vec::new() }
    }

    /// The socket itself, for tests that stall, shut down or flood it.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Gives up the connection and keeps its descriptor.
    pub fn into_fd(self) -> OwnedFd {
        self.stream.into()
    }

    /// Takes the greeting and enters command mode; gives the greeting.
    pub fn negotiate(&mut self) -> Value {
        let greeting = self.recv();
        assert!(greeting.get("QMP").is_some(), "no greeting: {greeting}");
        self.execute("qmp_capabilities", json!({})).expect("the negotiation");
        greeting
    }

    /// Sends bytes as they are.
    pub fn send_raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("send to the monitor");
    }

    /// Sends one text line.
    pub fn send(&mut self, line: &str) {
        self.send_raw(format!("{line}\n").as_bytes());
    }

    /// The next message of any kind; fails the test at the end of the stream.
    pub fn recv(&mut self) -> Value {
        self.recv_or_end().expect("the monitor closed the connection")
    }

    /// The next message of any kind, or `None` at the end of the stream.
    pub fn recv_or_end(&mut self) -> Option<Value> {
        loop {
            let mut values = serde_json::Deserializer::from_slice(&self.buffer).into_iter::<Value>();
            match values.next() {
                Some(Ok(value)) => {
                    let used = values.byte_offset();
                    self.buffer.drain(..used);
                    return Some(value);
                }
                Some(Err(error)) if !error.is_eof() => {
                    panic!("not JSON: {error}: {}", String::from_utf8_lossy(&self.buffer));
                }
                Some(Err(_)) | None => {}
            }
            let mut chunk = [0; 65536];
            match self.stream.read(&mut chunk) {
                Ok(0) => return None,
                Ok(n) => {
                    self.buffer.extend_from_slice(&chunk[..n]);
                    self.transcript.extend_from_slice(&chunk[..n]);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return None,
                Err(error) => panic!("receive from the monitor: {error}"),
            }
        }
    }

    /// The next message that is not an event; events on the way are kept for [`Client::event`].
    pub fn answer(&mut self) -> Value {
        loop {
            let message = self.recv();
            if message.get("event").is_none() {
                return message;
            }
            self.events.push_back(message);
        }
    }

    /// Sends a line and gives the answer to it.
    pub fn ask(&mut self, line: &str) -> Value {
        self.send(line);
        self.answer()
    }

    /// Runs a command with arguments.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, Refusal> {
        let mut request = json!({ "execute": command });
        if arguments.as_object().is_none_or(|members| !members.is_empty()) {
            request["arguments"] = arguments;
        }
        let answer = self.ask(&request.to_string());
        if let Some(value) = answer.get("return") {
            return Ok(value.clone());
        }
        assert!(answer.get("error").is_some(), "neither a result nor an error: {answer}");
        let member = |name: &str| answer["error"][name].as_str().unwrap_or_default().to_owned();
        Err(Refusal { class: member("class"), desc: member("desc") })
    }

    /// Runs a command that must succeed.
    pub fn ok(&mut self, command: &str, arguments: Value) -> Value {
        match self.execute(command, arguments.clone()) {
            Ok(value) => value,
            Err(refusal) => panic!("{command} {arguments}: {refusal:?}"),
        }
    }

    /// Runs a command that must fail; gives the text of the error.
    pub fn refused(&mut self, command: &str, arguments: Value) -> String {
        match self.execute(command, arguments.clone()) {
            Ok(value) => panic!("{command} {arguments} should fail, but returned {value}"),
            Err(refusal) => refusal.desc,
        }
    }

    /// Waits for an event of a name, and drops the events before it; gives its data.
    pub fn event(&mut self, name: &str) -> Value {
        let end = Instant::now() + DEADLINE;
        loop {
            let message = match self.events.pop_front() {
                Some(message) => message,
                None => self.recv(),
            };
            if message["event"] == name {
                let stamp = &message["timestamp"];
                assert!(stamp["seconds"].is_i64() && stamp["microseconds"].is_i64(), "no time: {message}");
                return message.get("data").cloned().unwrap_or(Value::Null);
            }
            assert!(Instant::now() < end, "no event {name}");
        }
    }

    /// The events that arrived while answers were awaited and that nobody has asked for, oldest first.
    pub fn seen_events(&self) -> impl Iterator<Item = &Value> {
        self.events.iter()
    }
}
