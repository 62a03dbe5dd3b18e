//! Prints values as QMP sends them: ASCII only, either on one line or indented by four spaces [QMP spec §General].
//!
//! Everything outside printable ASCII is written as `\uXXXX`, DEL included, so that no terminal and no client with
//! another idea of the encoding can misread a line. Lines end with CR LF.

use std::io;

use serde::Serialize;
use serde_json::Value;
use serde_json::ser::{CharEscape, CompactFormatter, Formatter, Serializer};

/// How values are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Style {
    /// One line, with a space after each comma and colon.
    #[default]
    Compact,
    /// Each member on a line of its own (`pretty=on`).
    Pretty,
}

/// The value as text, without a line end after it.
pub fn to_bytes(value: &Value, style: Style) -> Vec<u8> {
    let mut bytes = Vec::new();
    let layout = match style {
        Style::Compact => Layout { indent: None },
        Style::Pretty => Layout { indent: Some(0) },
    };
    // Writing a value into memory has no way to fail: every key is a string and a vector takes every write.
    if value.serialize(&mut Serializer::with_formatter(&mut bytes, layout)).is_err() {
        bytes.clear();
        bytes.extend_from_slice(b"null");
    }
    bytes
}

/// The value with CR LF at its end, as it goes to a client.
pub(crate) fn to_line(value: &Value, style: Style) -> Vec<u8> {
    let mut bytes = to_bytes(value, style);
    bytes.extend_from_slice(b"\r\n");
    bytes
}

struct Layout {
    /// The depth, where every member has a line of its own.
    indent: Option<usize>,
}

impl Layout {
    fn open<W: ?Sized + io::Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.indent = self.indent.map(|depth| depth + 1);
        writer.write_all(bracket)
    }

    fn item<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        match (first, self.indent) {
            (true, None) => Ok(()),
            (false, None) => writer.write_all(b", "),
            (true, Some(_)) => self.line(writer),
            (false, Some(_)) => {
                writer.write_all(b",")?;
                self.line(writer)
            }
        }
    }

    fn close<W: ?Sized + io::Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        if let Some(depth) = self.indent {
            self.indent = Some(depth.saturating_sub(1));
            self.line(writer)?;
        }
        writer.write_all(bracket)
    }

    fn line<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b"\r\n")?;
        for _ in 0..self.indent.unwrap_or(0) {
            writer.write_all(b"    ")?;
        }
        Ok(())
    }
}

fn unicode_escape<W: ?Sized + io::Write>(writer: &mut W, character: char) -> io::Result<()> {
    for unit in character.encode_utf16(&mut [0; 2]) {
        write!(writer, "\\u{unit:04X}")?;
    }
    Ok(())
}

impl Formatter for Layout {
    fn write_f64<W: ?Sized + io::Write>(&mut self, writer: &mut W, value: f64) -> io::Result<()> {
        // A whole number is written without a fraction, as clients of integer members expect it.
        if value.fract() == 0.0 && value.abs() < 1e17 {
            write!(writer, "{value:.0}")
        } else {
            CompactFormatter.write_f64(writer, value)
        }
    }

    fn write_string_fragment<W: ?Sized + io::Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        let mut rest = fragment;
        while let Some(at) = rest.find(|c: char| !(' '..='~').contains(&c)) {
            let (plain, tail) = rest.split_at(at);
            writer.write_all(plain.as_bytes())?;
            let mut characters = tail.chars();
            if let Some(character) = characters.next() {
                unicode_escape(writer, character)?;
            }
            rest = characters.as_str();
        }
        writer.write_all(rest.as_bytes())
    }

    fn write_char_escape<W: ?Sized + io::Write>(&mut self, writer: &mut W, escape: CharEscape) -> io::Result<()> {
        match escape {
            CharEscape::Quote => writer.write_all(b"\\\""),
            CharEscape::ReverseSolidus => writer.write_all(b"\\\\"),
            CharEscape::Solidus => writer.write_all(b"/"),
            CharEscape::Backspace => writer.write_all(b"\\b"),
            CharEscape::FormFeed => writer.write_all(b"\\f"),
            CharEscape::LineFeed => writer.write_all(b"\\n"),
            CharEscape::CarriageReturn => writer.write_all(b"\\r"),
            CharEscape::Tab => writer.write_all(b"\\t"),
            CharEscape::AsciiControl(byte) => unicode_escape(writer, char::from(byte)),
        }
    }

    fn begin_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b"[")
    }

    fn end_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"]")
    }

    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.item(writer, first)
    }

    fn begin_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b"{")
    }

    fn end_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"}")
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.item(writer, first)
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn compact(value: Value) -> String {
        String::from_utf8(to_bytes(&value, Style::Compact)).expect("the output is ASCII")
    }

    #[test]
    fn the_output_is_ascii() {
        assert_eq!(
            compact(json!("é😀\u{7f}\u{80}\0/\u{8}\u{c}\n\r\t\u{1f}\\\"'&<>")),
            r#""\u00E9\uD83D\uDE00\u007F\u0080\u0000/\b\f\n\r\t\u001F\\\"'&<>""#
        );
        assert_eq!(compact(json!({"ä": []})), r#"{"\u00E4": []}"#);
    }

    #[test]
    fn numbers_have_no_needless_fraction() {
        let table = [
            (json!(1.0), "1"),
            (json!(2.5), "2.5"),
            (json!(-0.0), "-0"),
            (json!(1e16), "10000000000000000"),
            (json!(1e22), "1e+22"),
            (json!(0.1), "0.1"),
            (json!(u64::MAX), "18446744073709551615"),
            (json!(i64::MIN), "-9223372036854775808"),
            (json!(f64::MAX), "1.7976931348623157e+308"),
        ];
        for (value, text) in table {
            assert_eq!(compact(value), text);
        }
    }

    #[test]
    fn both_layouts() {
        let value = json!({"return": {"a": [1, {}], "b": []}, "id": null});
        assert_eq!(compact(value.clone()), r#"{"return": {"a": [1, {}], "b": []}, "id": null}"#);
        let pretty = to_bytes(&value, Style::Pretty);
        let expected = "{\r\n    \"return\": {\r\n        \"a\": [\r\n            1,\r\n            {\r\n            }\r\n        ],\
                        \r\n        \"b\": [\r\n        ]\r\n    },\r\n    \"id\": null\r\n}";
        assert_eq!(String::from_utf8(pretty).expect("ASCII"), expected);
    }
}
