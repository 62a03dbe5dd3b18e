//! The NBD server, newstyle, `[NBD]` being <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md> with the
//! extension of extended headers.
//!
//! | module | noun |
//! | --- | --- |
//! | `wire` | the numbers of the protocol |
//! | `options`, `negotiate`, `metacontext` | the handshake, without I/O |
//! | `request`, `reply` | the transmission phase, without I/O |
//! | `input` | received bytes of one connection |
//! | `serve` | one request against the disk |
//! | `connection` | one client |
//! | `export`, `server` | what clients choose from, and where they come in |
//!
//! Clients are hostile: nothing that one sends makes more of the server's memory its own than
//! the limits in `connection` and `negotiate` say, or ends anything but its own connection.

mod connection;
mod export;
mod input;
mod metacontext;
mod negotiate;
mod options;
mod reply;
mod request;
mod serve;
mod server;
mod wire;

#[cfg(any(test, fuzzing))]
pub mod fuzz;

pub use export::{NbdDriver, NbdExport, NbdExportOptions};
pub use server::{NbdServer, NbdServerParams};
