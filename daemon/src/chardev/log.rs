//! The log file of a character device: a copy of everything that is sent on it.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use ::io::{FdSetUse, FdSets};
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use qapi::types::chardev::ChardevCommon;
use qapi::{Error, Result};

/// An open log file. What cannot be written is left out: the device goes on.
pub(super) struct Log {
    file: RefCell<File>,
    timestamps: bool,
    at_line_start: Cell<bool>,
    _from_set: Option<FdSetUse>,
}

impl Log {
    /// Opens the log file that the options ask for.
    ///
    /// # Errors
    /// The system refuses.
    pub(super) async fn open(common: &ChardevCommon, fdsets: &FdSets) -> Result<Option<Log>> {
        let Some(name) = common.logfile.clone() else { return Ok(None) };
        // Nobody waits for a pipe's reader.
        let mut flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_NONBLOCK;
        flags |= if common.logappend { OFlag::O_APPEND } else { OFlag::O_TRUNC };
        let could_not = |error| Error::io(format!("Could not create '{name}'"), error);
        let (path, fdsets) = (PathBuf::from(&name), fdsets.clone());
        let work = move || fdsets.open(&path, flags, Mode::from_bits_truncate(0o666));
        let opened = ::io::blocking(work).await.and_then(|opened| opened).map_err(could_not)?;
        Ok(Some(Log {
            file: RefCell::new(opened.fd.into()),
            timestamps: common.logtimestamp,
            at_line_start: Cell::new(true),
            _from_set: opened.from_set,
        }))
    }

    pub(super) fn write(&self, bytes: &[u8]) {
        let result = if self.timestamps { self.write_lines(bytes) } else { self.file.borrow_mut().write_all(bytes) };
        if let Err(error) = result {
            tracing::trace!(target: "chardev_log_failed", %error);
        }
    }

    fn write_lines(&self, bytes: &[u8]) -> io::Result<()> {
        let mut out = Vec::with_capacity(bytes.len() + 32);
        for line in bytes.split_inclusive(|byte| *byte == b'\n') {
            if self.at_line_start.get() {
                out.extend_from_slice(timestamp(SystemTime::now()).as_bytes());
            }
            out.extend_from_slice(line);
            self.at_line_start.set(line.ends_with(b"\n"));
        }
        self.file.borrow_mut().write_all(&out)
    }
}

/// The time as lines start with it: in UTC, with milliseconds, and a space behind it. `[ISO 8601]`
fn timestamp(now: SystemTime) -> String {
    let since = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let (days, seconds) = (since.as_secs() / 86400, since.as_secs() % 86400);
    let (year, month, day) = date(days);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:03}Z ", since.subsec_millis())
}

/// Year, month and day of the Gregorian calendar, so many days after the start of 1970.
fn date(days: u64) -> (u64, u64, u64) {
    let mut year = 1970;
    let mut rest = days;
    let is_leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    loop {
        let length = if is_leap(year) { 366 } else { 365 };
        if rest < length {
            break;
        }
        rest -= length;
        year += 1;
    }
    let february = if is_leap(year) { 29 } else { 28 };
    for (month, length) in (1..).zip([31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]) {
        if rest < length {
            return (year, month, rest + 1);
        }
        rest -= length;
    }
    (year, 12, 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000Z "),
            (951_782_400, "2000-02-29T00:00:00.000Z "),
            (1_700_000_000, "2023-11-14T22:13:20.000Z "),
            (4_107_542_399, "2100-02-28T23:59:59.000Z "),
            (4_107_542_400, "2100-03-01T00:00:00.000Z "),
        ] {
            assert_eq!(timestamp(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
    }
}
