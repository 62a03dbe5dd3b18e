//! Builds values from tokens, one top-level value at a time [QMP spec §Input].
//!
//! The parser owns the value under construction and the limits on it. It never looks ahead and never recurses: a stack
//! of open containers takes one token after another, so a message costs the memory of its value and nothing for
//! its text.
//!
//! A message ends when its braces and its brackets balance, each counted for itself, or when one of the two is closed
//! more often than opened. The first mistake of a message is reported when the message ends; the rest of it is
//! only counted. A stray byte or a passed limit ends the message at once.

use qapi::{Error, Result};
use serde_json::{Map, Number, Value};

use crate::lexer::{Kind, Lexer};
use crate::utf8;

/// Bytes of all tokens of one message together, white space not counted, plus one.
pub const MAX_BYTES: usize = 64 << 20;
/// Tokens of one message.
pub const MAX_TOKENS: usize = 2 << 20;
/// Containers open at a time.
pub const MAX_NESTING: usize = 1024;

/// A container that is not yet closed.
#[derive(Debug)]
enum Open {
    Array(Vec<Value>),
    Object {
        members: Map<String, Value>,
        /// The name of the member whose value comes next.
        key: Option<String>,
    },
}

/// What may come next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Expect {
    /// A value or the name of a member.
    #[default]
    Value,
    /// The same, or the end of the container that was just opened.
    ValueOrClose,
    /// The colon after a name.
    Colon,
    /// A comma or the end of the container.
    CommaOrClose,
    /// Nothing: the message is complete.
    Nothing,
}

/// The message under construction.
#[derive(Debug, Default)]
struct Message {
    braces: isize,
    brackets: isize,
    tokens: usize,
    bytes: usize,
    open: Vec<Open>,
    expect: Expect,
    value: Option<Value>,
    error: Option<Error>,
}

/// Reads values from a byte stream.
#[derive(Debug, Default)]
pub struct Parser {
    lexer: Lexer,
    message: Message,
}

impl Parser {
    /// A parser at the start of a stream.
    pub fn new() -> Parser {
        Parser::default()
    }

    /// Takes bytes from the front of `input` until one value or one error is complete. `None`: all bytes are used up
    /// and more are needed. After an error the stream goes on; there is nothing to reset.
    pub fn next(&mut self, input: &mut &[u8]) -> Option<Result<Value>> {
        loop {
            let budget = MAX_BYTES.saturating_sub(self.message.bytes + 1);
            let kind = self.lexer.next(input, budget)?;
            if self.message.token(kind, self.lexer.text()) {
                return Some(std::mem::take(&mut self.message).result());
            }
        }
    }

    /// Ends the stream: what was not complete is a value if it can be one, else an error. `None` if there was nothing.
    fn end(&mut self) -> Option<Result<Value>> {
        let complete = match self.lexer.end() {
            Some(kind) => self.message.token(kind, self.lexer.text()),
            None => false,
        };
        let message = std::mem::take(&mut self.message);
        (complete || message.tokens > 0).then(|| message.result())
    }
}

/// Reads the one value that a text is, as it stands on a command line.
///
/// # Errors
/// The text is not in the dialect, or it is more or less than one value.
pub fn parse(text: &str) -> Result<Value> {
    let mut parser = Parser::new();
    let mut rest = text.as_bytes();
    let first = parser.next(&mut rest).or_else(|| parser.end());
    let value = first.ok_or_else(|| Error::generic("Expecting a JSON value"))??;
    match parser.next(&mut rest).or_else(|| parser.end()) {
        None => Ok(value),
        Some(_) => Err(Error::generic("Expecting at most one JSON value")),
    }
}

fn syntax(what: impl std::fmt::Display) -> Error {
    Error::generic(format!("JSON parse error, {what}"))
}

impl Message {
    /// What the message is, or what is wrong with it.
    fn result(self) -> Result<Value> {
        match (self.error, self.value) {
            (Some(error), _) => Err(error),
            (None, Some(value)) => Ok(value),
            (None, None) => Err(syntax("premature EOI")),
        }
    }

    /// Takes one token and says whether the message ends with it.
    fn token(&mut self, kind: Kind, text: &[u8]) -> bool {
        match kind {
            Kind::BraceOpen => self.braces += 1,
            Kind::BraceClose => self.braces -= 1,
            Kind::BracketOpen => self.brackets += 1,
            Kind::BracketClose => self.brackets -= 1,
            _ => {}
        }
        let at_once = match kind {
            Kind::Stray => Some(syntax(format_args!("stray '{}'", utf8::lossy(text)))),
            Kind::TooLong => Some(Error::generic("JSON token size limit exceeded")),
            _ if self.tokens >= MAX_TOKENS => Some(Error::generic("JSON token count limit exceeded")),
            _ if self.braces + self.brackets > isize::try_from(MAX_NESTING).unwrap_or(isize::MAX) => {
                Some(Error::generic("JSON nesting depth limit exceeded"))
            }
            _ => None,
        };
        if at_once.is_some() {
            self.error = at_once;
            return true;
        }
        self.tokens += 1;
        self.bytes += text.len();
        if self.error.is_none()
            && let Err(error) = self.build(kind, text)
        {
            self.error = Some(error);
            self.open = Vec::new();
        }
        let inside = self.braces > 0 || self.brackets > 0;
        let sound = self.braces >= 0 && self.brackets >= 0;
        !(inside && sound)
    }

    /// Adds the token to the value under construction.
    fn build(&mut self, kind: Kind, text: &[u8]) -> Result<()> {
        match (self.expect, kind, self.open.last_mut()) {
            (Expect::Colon, Kind::Colon, _) => self.expect = Expect::Value,
            (Expect::Colon, ..) => return Err(syntax("missing : in object pair")),

            (Expect::CommaOrClose, Kind::Comma, _) => self.expect = Expect::Value,
            (Expect::ValueOrClose | Expect::CommaOrClose, Kind::BraceClose, Some(Open::Object { .. }))
            | (Expect::ValueOrClose | Expect::CommaOrClose, Kind::BracketClose, Some(Open::Array(_))) => {
                match self.open.pop() {
                    Some(Open::Array(items)) => self.complete(Value::Array(items))?,
                    Some(Open::Object { members, .. }) => self.complete(Value::Object(members))?,
                    None => {}
                }
            }
            (Expect::CommaOrClose, _, Some(Open::Array(_))) => return Err(syntax("expected separator in list")),
            (Expect::CommaOrClose, ..) => return Err(syntax("expected separator in dict")),

            (Expect::Value | Expect::ValueOrClose, Kind::BraceOpen, _) => {
                self.open.push(Open::Object { members: Map::new(), key: None });
                self.expect = Expect::ValueOrClose;
            }
            (Expect::Value | Expect::ValueOrClose, Kind::BracketOpen, _) => {
                self.open.push(Open::Array(Vec::new()));
                self.expect = Expect::ValueOrClose;
            }
            (Expect::Value | Expect::ValueOrClose, ..) => self.complete(scalar(kind, text)?)?,

            (Expect::Nothing, ..) => return Err(syntax("expecting value")),
        }
        Ok(())
    }

    /// Puts a finished value where it belongs.
    fn complete(&mut self, value: Value) -> Result<()> {
        self.expect = Expect::CommaOrClose;
        match self.open.last_mut() {
            None => {
                self.value = Some(value);
                self.expect = Expect::Nothing;
            }
            Some(Open::Array(items)) => items.push(value),
            Some(Open::Object { members, key }) => match key.take() {
                Some(name) if members.contains_key(&name) => return Err(syntax("duplicate key")),
                Some(name) => {
                    members.insert(name, value);
                }
                None => {
                    let Value::String(name) = value else {
                        return Err(syntax("key is not a string in object"));
                    };
                    *key = Some(name);
                    self.expect = Expect::Colon;
                }
            },
        }
        Ok(())
    }
}

fn scalar(kind: Kind, text: &[u8]) -> Result<Value> {
    match kind {
        Kind::Keyword => match text {
            b"true" => Ok(Value::Bool(true)),
            b"false" => Ok(Value::Bool(false)),
            b"null" => Ok(Value::Null),
            _ => Err(syntax(format_args!("invalid keyword '{}'", utf8::lossy(text)))),
        },
        Kind::Integer | Kind::Float => number(kind, text).ok_or_else(|| syntax("expecting value")),
        Kind::String => string(text).map(Value::String),
        _ => Err(syntax("expecting value")),
    }
}

/// An integer is an i64, else a u64, else it is as inexact as a number with a fraction.
///
/// JSON has no infinity: what is beyond the range of a double becomes the largest double, so that an id of `1e400`
/// comes back as a number that every client can read.
fn number(kind: Kind, text: &[u8]) -> Option<Value> {
    let text = std::str::from_utf8(text).ok()?;
    if kind == Kind::Integer {
        if let Ok(small) = text.parse::<i64>() {
            return Some(Value::from(small));
        }
        if let Ok(large) = text.parse::<u64>() {
            return Some(Value::from(large));
        }
    }
    let double: f64 = text.parse().ok()?;
    Number::from_f64(double.clamp(f64::MIN, f64::MAX)).map(Value::Number)
}

/// The text of a string token, which has its quotes.
fn string(token: &[u8]) -> Result<String> {
    let content = token.get(1..token.len().saturating_sub(1)).unwrap_or_default();
    let mut text = String::with_capacity(content.len());
    // Positions are of the token, because a message about a broken escape quotes up to the closing quote.
    let mut at = 1;
    let end = content.len() + 1;
    while at < end {
        let rest = token.get(at..).unwrap_or_default();
        if rest.first() == Some(&b'\\') {
            let (character, length) = escape(rest)?;
            text.push(character);
            at += length;
        } else {
            let plain = rest.iter().take_while(|&&b| (0x20..0x7F).contains(&b) && b != b'\\').count().min(end - at);
            match rest.get(..plain).map(std::str::from_utf8) {
                Some(Ok(run)) if plain > 0 => {
                    text.push_str(run);
                    at += plain;
                }
                _ => {
                    let (character, length) = utf8::decode(rest);
                    text.push(character.ok_or_else(|| syntax("invalid UTF-8 sequence in string"))?);
                    at += length.max(1);
                }
            }
        }
    }
    Ok(text)
}

/// The escape at the front of `rest` and its length.
fn escape(rest: &[u8]) -> Result<(char, usize)> {
    let character = match rest.get(1) {
        Some(&quoted @ (b'"' | b'\'' | b'\\' | b'/')) => char::from(quoted),
        Some(b'b') => '\u{8}',
        Some(b'f') => '\u{c}',
        Some(b'n') => '\n',
        Some(b'r') => '\r',
        Some(b't') => '\t',
        Some(b'u') => return unicode_escape(rest),
        _ => return Err(syntax("invalid escape sequence in string")),
    };
    Ok((character, 2))
}

fn unicode_escape(rest: &[u8]) -> Result<(char, usize)> {
    const LENGTH: usize = r"\u0000".len();
    let first = hex(rest);
    let low = rest.get(LENGTH..).filter(|next| next.starts_with(b"\\u")).and_then(hex);
    let (code, length) = match (first, low) {
        (Some(high @ 0xD800..=0xDBFF), Some(low @ 0xDC00..=0xDFFF)) => {
            (Some(0x1_0000 + ((high - 0xD800) << 10) + (low - 0xDC00)), 2 * LENGTH)
        }
        (first, _) => (first, LENGTH),
    };
    let character = code.and_then(utf8::character).ok_or_else(|| {
        let quoted = utf8::lossy(rest.get(..length).unwrap_or(rest));
        syntax(format_args!("{quoted} is not a valid Unicode character"))
    })?;
    Ok((character, length))
}

/// The four hexadecimal digits after `\u`.
fn hex(escape: &[u8]) -> Option<u32> {
    escape.get(2..6)?.iter().try_fold(0, |code, &digit| Some(code << 4 | char::from(digit).to_digit(16)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The texts are the reference's, as it says them about an option.
    #[test]
    fn a_text_is_one_value() {
        for (text, expected) in [
            ("{'a': [1, {}]}", Ok(serde_json::json!({"a": [1, {}]}))),
            ("{}  \n", Ok(serde_json::json!({}))),
            ("12", Ok(Value::from(12))),
            ("null", Ok(Value::Null)),
            ("", Err("Expecting a JSON value")),
            ("{} x", Err("Expecting at most one JSON value")),
            ("{}{}", Err("Expecting at most one JSON value")),
            ("{}}", Err("Expecting at most one JSON value")),
            ("{},", Err("Expecting at most one JSON value")),
            ("{", Err("JSON parse error, premature EOI")),
            ("{'a'", Err("JSON parse error, premature EOI")),
            ("{'a':1", Err("JSON parse error, premature EOI")),
            ("{x", Err("JSON parse error, invalid keyword 'x'")),
            ("{'a':tru", Err("JSON parse error, invalid keyword 'tru'")),
            ("{'a':@", Err("JSON parse error, stray '@'")),
            ("{'a':\"x", Err("JSON parse error, stray '\"x'")),
        ] {
            let found = parse(text).map_err(|error| error.to_string());
            assert_eq!(found, expected.map_err(str::to_owned), "{text}");
        }
    }
}
