//! The older command line form, which `--chardev` still has: `socket,id=c,path=x,server=on,wait=off`.
//!
//! A flat list of options from a table: no dots, no lists, no JSON. A key without a value is a truth value: `server` is
//! `server=on` and `nowait` is `wait=off`; both are deprecated. Of several values for one key the last one counts.
//! This file takes the text apart; what the options of a character device mean is in `chardev`.

mod chardev;

use crate::{Error, Result, keyval};

pub use chardev::{ChardevArgument, chardev};

/// An option as it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Pair {
    key: String,
    value: String,
}

/// Options in the order they were written.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Opts {
    pairs: Vec<Pair>,
    /// What to tell the user although the options are right.
    pub warnings: Vec<String>,
    /// `help` or `?` stood among them.
    pub help: bool,
}

impl Opts {
    /// Takes a text apart. A first option without `=` is the value of `implied_key`.
    ///
    /// Fails if a key is empty.
    pub fn parse(text: &str, implied_key: &str) -> Result<Opts> {
        let mut opts = Opts::default();
        let mut rest = text;
        let mut first = true;
        while !rest.is_empty() {
            let end = rest.find(['=', ',']).unwrap_or(rest.len());
            let (key, behind) = rest.split_at(end);
            let (key, value) = if let Some(behind) = behind.strip_prefix('=') {
                let (value, behind) = keyval::value(behind);
                rest = behind;
                (key.to_owned(), value)
            } else {
                let (word, behind) = keyval::value(rest);
                rest = behind;
                if matches!(word.as_str(), "help" | "?") {
                    opts.help = true;
                    first = false;
                    continue;
                }
                if first { (implied_key.to_owned(), word) } else { opts.short_form(&word) }
            };
            if key.is_empty() {
                return Err(Error::generic("Invalid parameter ''"));
            }
            opts.pairs.push(Pair { key, value });
            first = false;
        }
        Ok(opts)
    }

    /// The key and the value of an option without a value.
    fn short_form(&mut self, word: &str) -> (String, String) {
        let (key, value) = match word.strip_prefix("no") {
            Some(key) => (key, "off"),
            None => (word, "on"),
        };
        self.warnings.push(format!("short-form boolean option '{word}' deprecated\nPlease use {key}={value} instead"));
        (key.to_owned(), value.to_owned())
    }

    /// The last value of an option.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.pairs.iter().rev().find(|pair| pair.key == key).map(|pair| pair.value.as_str())
    }

    /// Every option with its value, in the order they were written.
    pub fn into_pairs(self) -> impl Iterator<Item = (String, String)> {
        self.pairs.into_iter().map(|pair| (pair.key, pair.value))
    }

    fn string(&self, key: &str) -> Option<String> {
        self.get(key).map(str::to_owned)
    }

    /// The last value of an option that is a truth value.
    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.get(key)
            .map(|text| {
                crate::builtin::parse_bool(text)
                    .ok_or_else(|| Error::generic(format!("Parameter '{key}' expects 'on' or 'off'")))
            })
            .transpose()
    }

    /// The last value of an option that is a number.
    pub fn number<T: TryFrom<i128>>(&self, key: &str) -> Result<Option<T>> {
        self.get(key)
            .map(|text| {
                crate::builtin::parse_integer(text)
                    .and_then(|number| T::try_from(number).ok())
                    .ok_or_else(|| Error::generic(format!("Parameter '{key}' expects a number")))
            })
            .transpose()
    }

    /// The last value of an option that is a number of bytes, perhaps with a suffix.
    pub fn size(&self, key: &str) -> Result<Option<u64>> {
        let wrong = || {
            Error::generic(format!("Parameter '{key}' expects a non-negative number below 2^64")).with_hint(
                "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively.",
            )
        };
        self.get(key).map(|text| crate::builtin::parse_size(text).ok_or_else(wrong)).transpose()
    }
}

/// Whether a text can be the name of an object, a device or an export: a letter, then letters, digits, `-`, `.` and `_`.
pub fn is_identifier(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'))
}
