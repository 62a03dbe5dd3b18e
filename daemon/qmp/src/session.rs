//! One conversation with one client [QMP spec §Protocol].
//!
//! A session owns what was received and not yet executed, and what was produced and not yet sent. Both are bounded:
//!
//! * at most [`MAX_QUEUED`] requests wait; then, or while more than [`HIGH_WATER`] bytes wait for a client that does not
//!   read, the session takes no further input and starts no further request;
//! * replies are never dropped, and there is at most one beyond the high-water mark;
//! * events for a client that does not read are kept up to [`MAX_EVENT_BYTES`]. What comes after that cannot be kept,
//!   and a client that misses an event without knowing it may wait for a job for ever: the session is
//!   [overrun](Session::is_overrun) and its owner closes the connection, so that the client reconnects and queries.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

use qapi::{Error, Result};
use serde_json::{Map, Value, json};

use crate::event::Event;
use crate::parser::Parser;
use crate::writer::{Style, to_line};

/// Requests that may wait while one is executed.
pub const MAX_QUEUED: usize = 8;
/// Bytes of output above which nothing is read or started.
pub const HIGH_WATER: usize = 64 * 1024;
/// Bytes of events that are kept for a client that does not read them.
pub const MAX_EVENT_BYTES: usize = 4 << 20;

const NEGOTIATE: &str = "qmp_capabilities";

/// What the owner of a session decides about it.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The `version` member of the greeting: `{"qemu": {"micro", "minor", "major"}, "package"}`.
    pub version: Value,
    /// Whether out-of-band execution is offered.
    pub oob: bool,
    /// How messages are laid out.
    pub style: Style,
    /// Whether a command of this name exists.
    pub is_command: fn(&str) -> bool,
}

/// A command to execute. Its reply goes to [`Session::reply`]; there is one at a time.
#[derive(Debug)]
pub struct Request {
    /// The name of the command, not yet looked up.
    pub name: String,
    /// Its arguments, empty if the client gave none.
    pub arguments: Map<String, Value>,
    /// The descriptors that the client passed with it, or last before it.
    pub descriptors: Vec<OwnedFd>,
}

/// The id that the client gave, if it did.
type Id = Option<Value>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// The client has not yet said which capabilities it uses.
    Negotiation,
    Commands {
        oob: bool,
    },
}

struct Queued {
    id: Id,
    /// What to execute, or why there is nothing to execute.
    request: Result<Request>,
}

struct Chunk {
    bytes: Vec<u8>,
    is_event: bool,
}

/// The state of one conversation.
pub struct Session {
    settings: Settings,
    parser: Parser,
    mode: Mode,
    queue: VecDeque<Queued>,
    /// Came with bytes of a request that is not complete. Bounded by what one message can carry.
    descriptors: Vec<OwnedFd>,
    /// The id of the request that is being executed.
    executing: Option<Id>,
    output: VecDeque<Chunk>,
    /// How much of the first chunk is sent.
    sent: usize,
    output_bytes: usize,
    event_bytes: usize,
    overrun: bool,
}

impl Session {
    /// A session whose first output is the greeting.
    pub fn new(settings: Settings) -> Session {
        let capabilities = if settings.oob { json!(["oob"]) } else { json!([]) };
        let greeting = json!({"QMP": {"version": settings.version, "capabilities": capabilities}});
        let mut session = Session {
            settings,
            parser: Parser::new(),
            mode: Mode::Negotiation,
            queue: VecDeque::new(),
            descriptors: Vec::new(),
            executing: None,
            output: VecDeque::new(),
            sent: 0,
            output_bytes: 0,
            event_bytes: 0,
            overrun: false,
        };
        session.send(&greeting, false);
        session
    }

    /// Whether [`Session::input`] would take anything. If not, the owner stops reading from the client.
    pub fn wants_input(&self) -> bool {
        self.queue.len() < MAX_QUEUED && self.output_bytes <= HIGH_WATER && !self.overrun
    }

    /// Takes descriptors that came with the bytes which are taken next. They belong to the next request that ends there, unless
    /// others come before; then they come back, to be closed.
    #[must_use]
    pub fn passed(&mut self, descriptors: Vec<OwnedFd>) -> Vec<OwnedFd> {
        if descriptors.is_empty() { descriptors } else { std::mem::replace(&mut self.descriptors, descriptors) }
    }

    /// Takes bytes from the front of `input`, all of them unless the session stops wanting input on the way.
    pub fn input(&mut self, input: &mut &[u8]) {
        while self.wants_input() {
            let Some(message) = self.parser.next(input) else { break };
            let (id, message) = match message {
                Ok(Value::Object(mut members)) => (members.shift_remove("id"), Ok(members)),
                Ok(_) => (None, Err(Error::generic("QMP input must be a JSON object"))),
                Err(error) => (None, Err(error)),
            };
            match self.mode {
                Mode::Negotiation => {
                    let result = message.and_then(|m| check(m, false)).and_then(|(request, _)| self.negotiate(request));
                    self.answer(id, result);
                }
                Mode::Commands { oob } => match message.and_then(|m| check(m, oob)) {
                    // No command can be executed out of band, so there is nothing to do but to say so, and to say it
                    // now.
                    Ok((request, true)) => self.answer(id, Err(self.refuse_oob(&request.name))),
                    Ok((mut request, false)) => {
                        request.descriptors = std::mem::take(&mut self.descriptors);
                        self.queue.push_back(Queued { id, request: Ok(request) });
                    }
                    Err(error) => self.queue.push_back(Queued { id, request: Err(error) }),
                },
            }
            self.answer_failures();
        }
    }

    /// The next command to execute, when the last one is replied to and the client reads its replies.
    pub fn next_request(&mut self) -> Option<Request> {
        self.answer_failures();
        if self.executing.is_some() || self.output_bytes > HIGH_WATER || self.overrun {
            return None;
        }
        let Queued { id, request } = self.queue.pop_front()?;
        let request = request.ok()?;
        self.executing = Some(id);
        Some(request)
    }

    /// The result of the request that [`Session::next_request`] gave last.
    pub fn reply(&mut self, result: Result<Value>) {
        if let Some(id) = self.executing.take() {
            self.answer(id, result);
        }
    }

    /// Tells the client about an event, unless it is still negotiating.
    pub fn event(&mut self, event: &Event) {
        if self.mode == Mode::Negotiation || self.overrun {
            return;
        }
        if self.event_bytes > MAX_EVENT_BYTES {
            self.overrun = true;
            return;
        }
        self.send(&event.to_value(), true);
    }

    /// Whether an event had to be left out because the client does not read. The connection is then to be closed.
    pub fn is_overrun(&self) -> bool {
        self.overrun
    }

    /// Bytes to send, empty when there are none. There may be more after these are [sent](Session::sent).
    pub fn output(&self) -> &[u8] {
        self.output.front().and_then(|chunk| chunk.bytes.get(self.sent..)).unwrap_or_default()
    }

    /// Removes what was sent from the front of the output.
    pub fn sent(&mut self, mut bytes: usize) {
        while bytes > 0
            && let Some(chunk) = self.output.front()
        {
            let step = bytes.min(chunk.bytes.len() - self.sent);
            bytes -= step;
            self.sent += step;
            self.output_bytes -= step;
            if self.sent == chunk.bytes.len() {
                if chunk.is_event {
                    self.event_bytes -= chunk.bytes.len();
                }
                self.output.pop_front();
                self.sent = 0;
            }
        }
    }

    /// Answers what cannot be executed as soon as it is its turn.
    fn answer_failures(&mut self) {
        while self.executing.is_none()
            && let Some(Queued { id, request }) = self.queue.pop_front()
        {
            let failure = match request {
                Ok(request) if request.name == NEGOTIATE => {
                    Error::command_not_found("Capabilities negotiation is already complete, command ignored")
                }
                Err(error) => error,
                Ok(request) => {
                    self.queue.push_front(Queued { id, request: Ok(request) });
                    return;
                }
            };
            self.answer(id, Err(failure));
        }
    }

    fn negotiate(&mut self, request: Request) -> Result<Value> {
        if request.name != NEGOTIATE {
            return Err(Error::command_not_found(format!("Expecting capabilities negotiation with '{NEGOTIATE}'")));
        }
        let mut oob = false;
        for (name, value) in &request.arguments {
            if name != "enable" {
                return Err(Error::generic(format!("Parameter '{name}' is unexpected")));
            }
            let wrong_type = |which: &str, wanted| {
                Error::generic(format!("Invalid parameter type for '{which}', expected: {wanted}"))
            };
            let list = value.as_array().ok_or_else(|| wrong_type("enable", "array"))?;
            for (index, capability) in list.iter().enumerate() {
                let which = format!("enable[{index}]");
                let capability = capability.as_str().ok_or_else(|| wrong_type(&which, "string"))?;
                if capability != "oob" {
                    return Err(Error::generic(format!("Parameter '{which}' does not accept value '{capability}'")));
                }
                if !self.settings.oob {
                    return Err(Error::generic("Capability oob is not available"));
                }
                oob = true;
            }
        }
        self.mode = Mode::Commands { oob };
        Ok(json!({}))
    }

    fn refuse_oob(&self, name: &str) -> Error {
        if name == NEGOTIATE || (self.settings.is_command)(name) {
            Error::generic(format!("The command {name} does not support OOB"))
        } else {
            Error::command_not_found(format!("The command {name} has not been found"))
        }
    }

    fn answer(&mut self, id: Id, result: Result<Value>) {
        let mut message = Map::new();
        match result {
            Ok(value) => {
                message.insert("return".into(), value);
                message.extend(id.map(|id| ("id".to_owned(), id)));
            }
            Err(error) => {
                message.extend(id.map(|id| ("id".to_owned(), id)));
                message.insert("error".into(), error.to_qmp());
            }
        }
        self.send(&Value::Object(message), false);
    }

    fn send(&mut self, message: &Value, is_event: bool) {
        let bytes = to_line(message, self.settings.style);
        self.output_bytes += bytes.len();
        if is_event {
            self.event_bytes += bytes.len();
        }
        self.output.push_back(Chunk { bytes, is_event });
    }
}

/// The request in a message without its id, and whether it is to be executed out of band.
fn check(members: Map<String, Value>, oob_enabled: bool) -> Result<(Request, bool)> {
    let mut command: Option<(String, bool)> = None;
    let mut arguments = None;
    for (member, value) in members {
        match (member.as_str(), value) {
            ("execute", Value::String(name)) => claim(&mut command, name, false)?,
            ("exec-oob", Value::String(name)) if oob_enabled => claim(&mut command, name, true)?,
            ("execute", _) => return Err(must_be(&member, "a string")),
            ("exec-oob", _) if oob_enabled => return Err(must_be(&member, "a string")),
            ("arguments", Value::Object(members)) => arguments = Some(members),
            ("arguments", _) => return Err(must_be(&member, "an object")),
            _ => return Err(Error::generic(format!("QMP input member '{member}' is unexpected"))),
        }
    }
    let (name, out_of_band) = command.ok_or_else(|| Error::generic("QMP input lacks member 'execute'"))?;
    let arguments = arguments.unwrap_or_default();
    Ok((Request { name, arguments, descriptors: Vec::new() }, out_of_band))
}

fn claim(command: &mut Option<(String, bool)>, name: String, out_of_band: bool) -> Result<()> {
    match command.replace((name, out_of_band)) {
        None => Ok(()),
        Some(_) => Err(Error::generic("QMP input member 'execute' clashes with 'exec-oob'")),
    }
}

fn must_be(member: &str, what: &str) -> Error {
    Error::generic(format!("QMP input member '{member}' must be {what}"))
}
