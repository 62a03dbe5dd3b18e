//! The one error of the control path.
//!
//! Everything that a command line option or a QMP command can fail with is an [`Error`]: a class that clients match, a
//! description that says what failed, on what and why, an optional hint for a person, and the chain of causes. It is
//! turned into a QMP `{class, desc}` or into one line of text in one place, by [`Error::to_qmp`] and [`Display`].
//!
//! The data path does not use it: requests fail with an errno.

use std::error::Error as StdError;
use std::fmt::{self, Display};

use serde_json::{Value, json};

/// The result of anything on the control path.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What a QMP client may tell apart without reading the description.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum ErrorClass {
    /// Everything that has no class of its own.
    #[default]
    GenericError,
    /// The command does not exist, or may not be used now.
    CommandNotFound,
    /// The device (today: the block job) that the command names is not active.
    DeviceNotActive,
    /// The device that the command names does not exist.
    DeviceNotFound,
    /// A capability of the host's virtualisation is missing.
    KVMMissingCap,
}

impl ErrorClass {
    /// The name as it stands in `error.class` of a QMP reply.
    pub const fn as_str(self) -> &'static str {
        match self {
            ErrorClass::GenericError => "GenericError",
            ErrorClass::CommandNotFound => "CommandNotFound",
            ErrorClass::DeviceNotActive => "DeviceNotActive",
            ErrorClass::DeviceNotFound => "DeviceNotFound",
            ErrorClass::KVMMissingCap => "KVMMissingCap",
        }
    }
}

impl Display for ErrorClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A failure on the control path. [`Display`] writes the description alone; the hint is for a terminal.
#[derive(Debug, Default)]
pub struct Error {
    /// What a client may match on.
    pub class: ErrorClass,
    /// What failed, on what, and why. One line, no full stop.
    pub desc: String,
    /// What a person could do about it. Shown on a terminal, never sent over QMP.
    pub hint: Option<String>,
    /// The failure below, if there is one. Its text is normally part of `desc` already.
    pub source: Option<Box<dyn StdError + Send + Sync + 'static>>,
}

impl Error {
    /// An error of the given class.
    pub fn new(class: ErrorClass, desc: impl Into<String>) -> Error {
        Error { class, desc: desc.into(), hint: None, source: None }
    }

    /// An error without a class of its own; nearly all are.
    pub fn generic(desc: impl Into<String>) -> Error {
        Error::new(ErrorClass::GenericError, desc)
    }

    /// An unknown or, at this moment, unusable command.
    pub fn command_not_found(desc: impl Into<String>) -> Error {
        Error::new(ErrorClass::CommandNotFound, desc)
    }

    /// A parameter whose value names something new has one that cannot be a name.
    pub fn identifier_expected(parameter: &str) -> Error {
        Error::generic(format!("Parameter '{parameter}' expects an identifier"))
            .with_hint("Identifiers consist of letters, digits, '-', '.', '_', starting with a letter.")
    }

    /// The named job or device is not active.
    pub fn device_not_active(desc: impl Into<String>) -> Error {
        Error::new(ErrorClass::DeviceNotActive, desc)
    }

    /// The named device does not exist.
    pub fn device_not_found(desc: impl Into<String>) -> Error {
        Error::new(ErrorClass::DeviceNotFound, desc)
    }

    /// A failed operation of the operating system: `desc: text of the errno`, as in
    /// `Could not open 'x.img': No such file or directory`.
    pub fn io(desc: impl Display, source: std::io::Error) -> Error {
        let text = errno_text(&source);
        Error {
            class: ErrorClass::GenericError,
            desc: format!("{desc}: {text}"),
            hint: None,
            source: Some(source.into()),
        }
    }

    /// Adds what a person could do about it. A second hint goes on a line of its own.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Error {
        let hint = hint.into();
        self.hint = Some(match self.hint.take() {
            Some(before) => format!("{before}\n{hint}"),
            None => hint,
        });
        self
    }

    /// Remembers the failure below without changing the text.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn StdError + Send + Sync + 'static>>) -> Error {
        self.source = Some(source.into());
        self
    }

    /// Puts `prefix: ` in front of the description: what was being done, and on what.
    #[must_use]
    pub fn context(mut self, prefix: impl Display) -> Error {
        self.desc = format!("{prefix}: {}", self.desc);
        self
    }

    /// The `error` member of a QMP reply: `{"class": ..., "desc": ...}`.
    pub fn to_qmp(&self) -> Value {
        json!({ "class": self.class.as_str(), "desc": self.desc })
    }
}

/// The text of an I/O error without Rust's `(os error N)` at its end, as every other program of the field prints it.
pub fn errno_text(error: &std::io::Error) -> String {
    let text = error.to_string();
    match error.raw_os_error() {
        Some(code) => text.strip_suffix(&format!(" (os error {code})")).map(str::to_owned).unwrap_or(text),
        None => text,
    }
}

impl Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.desc)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|s| s as &(dyn StdError + 'static))
    }
}

/// Context for results: `open(path).context(format!("node '{name}'"))?`.
pub trait ResultExt<T> {
    /// Puts `prefix: ` in front of the description of the error, if there is one.
    fn context(self, prefix: impl Display) -> Result<T>;
    /// The same, with a text that is made only when there is an error.
    fn with_context<D: Display>(self, prefix: impl FnOnce() -> D) -> Result<T>;
}

impl<T> ResultExt<T> for Result<T, Error> {
    fn context(self, prefix: impl Display) -> Result<T> {
        self.map_err(|e| e.context(prefix))
    }

    fn with_context<D: Display>(self, prefix: impl FnOnce() -> D) -> Result<T> {
        self.map_err(|e| e.context(prefix()))
    }
}

impl<T> ResultExt<T> for Result<T, std::io::Error> {
    fn context(self, prefix: impl Display) -> Result<T> {
        self.map_err(|e| Error::io(prefix, e))
    }

    fn with_context<D: Display>(self, prefix: impl FnOnce() -> D) -> Result<T> {
        self.map_err(|e| Error::io(prefix(), e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_read_as_one_line_and_as_qmp() {
        let io = std::io::Error::from_raw_os_error(2);
        let error: Error = Err::<(), _>(io).context("Could not open 'x.img'").expect_err("it failed");
        assert_eq!(error.to_string(), "Could not open 'x.img': No such file or directory");
        assert!(StdError::source(&error).is_some(), "the errno stays reachable");
        let error = error.context("node 'a'").with_hint("Is it there?");
        assert_eq!(error.to_string(), "node 'a': Could not open 'x.img': No such file or directory");
        assert_eq!(
            error.to_qmp().to_string(),
            r#"{"class":"GenericError","desc":"node 'a': Could not open 'x.img': No such file or directory"}"#
        );
        assert_eq!(error.hint.as_deref(), Some("Is it there?"));
        assert_eq!(Error::device_not_active("Block job 'q' not found").class.as_str(), "DeviceNotActive");
    }
}
