//! The standard streams as a character device.

use std::os::fd::{AsFd, OwnedFd};

use nix::sys::termios::{LocalFlags, SetArg, Termios, tcgetattr, tcsetattr};
use qapi::{Error, Result};

use super::{Common, Connection};

/// A terminal whose keys send no signals, until this is dropped.
pub(super) struct KeysWithoutSignals {
    terminal: OwnedFd,
    before: Termios,
}

impl KeysWithoutSignals {
    /// `None` where the descriptor is no terminal and there is nothing to do.
    fn new(terminal: OwnedFd) -> Result<Option<KeysWithoutSignals>> {
        let Ok(before) = tcgetattr(&terminal) else { return Ok(None) };
        let mut without = before.clone();
        without.local_flags.remove(LocalFlags::ISIG);
        tcsetattr(&terminal, SetArg::TCSANOW, &without)
            .map_err(|errno| Error::io("cannot change the terminal's mode", errno.into()))?;
        Ok(Some(KeysWithoutSignals { terminal, before }))
    }
}

impl Drop for KeysWithoutSignals {
    fn drop(&mut self) {
        // A terminal that has gone needs no mode.
        let _ = tcsetattr(&self.terminal, SetArg::TCSANOW, &self.before);
    }
}

/// Takes standard input and output. Without `signal` the keys of a terminal send no signals.
///
/// # Errors
/// A stream is closed, or the terminal refuses.
pub(super) fn open(signal: bool, common: &Common) -> Result<Connection> {
    let failed = |error| Error::io("cannot use the standard streams", error);
    let input = std::io::stdin().as_fd().try_clone_to_owned().map_err(failed)?;
    let output = std::io::stdout().as_fd().try_clone_to_owned().map_err(failed)?;
    let keys = if signal { None } else { KeysWithoutSignals::new(input.try_clone().map_err(failed)?)? };
    let channel = ::io::Channel::pair(input, output).map_err(failed)?;
    Ok(Connection::plain(channel, common).with_guard(keys))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_gets_its_mode_back() {
        let pty = nix::pty::openpty(None, None).expect("a pseudo terminal");
        let has_signals = || tcgetattr(&pty.slave).expect("a mode").local_flags.contains(LocalFlags::ISIG);
        assert!(has_signals());
        let keys = KeysWithoutSignals::new(pty.slave.try_clone().expect("a descriptor")).expect("no error");
        assert!(keys.is_some() && !has_signals());
        drop(keys);
        assert!(has_signals());
        let (pipe, _) = nix::unistd::pipe().expect("a pipe");
        assert!(KeysWithoutSignals::new(pipe).expect("no error").is_none());
    }
}
