//! QMP as a sans-I/O state machine: JSON stream to requests, responses and events to bytes.
//!
//! One [`Session`] is one conversation with one client, from the greeting to the end of the connection. Bytes go in and
//! [`Request`]s come out; replies and events go in and bytes come out. Nothing here reads a clock, touches a descriptor
//! or knows a command: who owns the session does, and drops it with the connection, so that a client which vanishes in
//! the middle of a message leaves nothing behind for the next one.
//!
//! The layers below can be used alone: [`Lexer`] cuts a byte stream into tokens, [`Parser`] builds values from them,
//! [`writer`] prints values, [`Throttle`] limits the rate of events before they are handed to the sessions.
#![forbid(unsafe_code)]

pub mod event;
pub mod lexer;
pub mod parser;
pub mod session;
mod utf8;
pub mod writer;

pub use event::{Event, Throttle, Timestamp};
pub use lexer::Lexer;
pub use parser::Parser;
pub use session::{Request, Session, Settings};
pub use writer::{Style, to_bytes};
