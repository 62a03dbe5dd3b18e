//! The standard streams as a character device.

use std::os::fd::AsFd;
use std::rc::Rc;

use qapi::{Error, Result};

use super::{Connection, Label};

/// Takes standard input and output. With `signal` the keys of a terminal that send signals do so.
///
/// # Errors
/// A stream is closed.
pub(super) fn open(signal: bool, label: &Rc<Label>) -> Result<Connection> {
    if !signal {
        // Nothing would give the terminal its keys back if the process is killed, so the user had better do it.
        return Err(Error::generic("Parameter 'signal' can only be on")
            .with_hint("'stty -isig' before the start turns the signals of the terminal's keys off."));
    }
    let failed = |error| Error::io("cannot use the standard streams", error);
    let input = std::io::stdin().as_fd().try_clone_to_owned().map_err(failed)?;
    let output = std::io::stdout().as_fd().try_clone_to_owned().map_err(failed)?;
    let channel = io::Channel::pair(input, output).map_err(failed)?;
    Ok(Connection::new(channel, label, "stdio".into(), "stdio".into()))
}
