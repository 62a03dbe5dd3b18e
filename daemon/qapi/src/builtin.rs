//! The built-in types of QAPI, lists and boxes.

use crate::{
    Error, Map, Object, Qapi, Result, Value,
    def::{Builtin, Kind, TypeDef},
    input::{Input, Members, Syntax},
};

/// A number of bytes. On the command line it may end in `b`, `K`, `M`, `G`, `T`, `P` or `E` (powers of 1024) and have a
/// fraction before that letter; in JSON it is an integer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Size(pub u64);

/// JSON's `null`, as a branch of an alternate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Null;

/// The definition of a built-in type.
const fn builtin(name: &'static str, doc: &'static str, builtin: Builtin) -> TypeDef {
    TypeDef { name, doc, since: None, features: &[], kind: Kind::Builtin(builtin) }
}

impl Qapi for String {
    fn def() -> &'static TypeDef {
        static DEF: TypeDef = builtin("str", "A string.", Builtin::Str);
        &DEF
    }

    fn parse(input: Input<'_>) -> Result<Self> {
        input.string().map(str::to_owned)
    }

    fn to_value(&self) -> Value {
        Value::String(self.clone())
    }
}

impl Qapi for bool {
    fn def() -> &'static TypeDef {
        static DEF: TypeDef = builtin("bool", "A truth value.", Builtin::Bool);
        &DEF
    }

    fn parse(input: Input<'_>) -> Result<Self> {
        match (input.syntax(), input.value()) {
            (Syntax::Json, Value::Bool(value)) => Ok(*value),
            (Syntax::Keyval, Value::String(text)) => parse_bool(text).ok_or_else(|| input.expects("'on' or 'off'")),
            _ => Err(input.wrong_scalar("boolean")),
        }
    }

    fn to_value(&self) -> Value {
        Value::Bool(*self)
    }
}

/// The words for a truth value on the command line.
pub(crate) fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "on" | "yes" | "true" | "y" => Some(true),
        "off" | "no" | "false" | "n" => Some(false),
        _ => None,
    }
}

/// An integer as strtoll(3) with base 0 reads it: space, sign, then decimal, `0x` hexadecimal or `0` octal.
pub(crate) fn parse_integer(text: &str) -> Option<i128> {
    let text = text.trim_start_matches([' ', '\t', '\n', '\x0b', '\x0c', '\r']);
    let (negative, digits) = match text.as_bytes().first()? {
        b'-' => (true, text.get(1..)?),
        b'+' => (false, text.get(1..)?),
        _ => (false, text),
    };
    let (radix, digits) = match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        Some(hex) => (16, hex),
        None if digits.len() > 1 && digits.starts_with('0') => (8, digits),
        None => (10, digits),
    };
    // from_str_radix would take a second sign.
    if !digits.starts_with(|c: char| c.is_digit(radix)) {
        return None;
    }
    let magnitude = i128::from_str_radix(digits, radix).ok()?;
    Some(if negative { -magnitude } else { magnitude })
}

macro_rules! integers {
    ($($ty:ty, $range:literal, $doc:literal;)*) => { $(
        impl Qapi for $ty {
            fn def() -> &'static TypeDef {
                static DEF: TypeDef = builtin("int", $doc, Builtin::Int);
                &DEF
            }

            fn parse(input: Input<'_>) -> Result<Self> {
                let value = match (input.syntax(), input.value()) {
                    (Syntax::Json, Value::Number(number)) => {
                        number.as_i64().map(i128::from).or_else(|| number.as_u64().map(i128::from))
                    }
                    (Syntax::Keyval, Value::String(text)) => match parse_integer(text) {
                        // Beyond 64 bits nothing tells the width of the member from any other.
                        Some(value) if (i128::from(i64::MIN)..=i128::from(u64::MAX)).contains(&value) => Some(value),
                        _ => return Err(input.expects("integer")),
                    },
                    (Syntax::Keyval, _) => return Err(input.wrong_scalar("integer")),
                    (Syntax::Json, _) => None,
                };
                match value.map(<$ty>::try_from) {
                    Some(Ok(value)) => Ok(value),
                    Some(Err(_)) => Err(out_of_range(&input, $range)),
                    None if $range == "uint64" => Err(input.expects($range)),
                    None => Err(input.wrong_type("integer")),
                }
            }

            fn to_value(&self) -> Value {
                Value::from(*self)
            }
        }
    )* };
}

integers! {
    i8, "int8_t", "An integer from -128 to 127.";
    i16, "int16_t", "An integer from -32768 to 32767.";
    i32, "int32_t", "An integer from -2147483648 to 2147483647.";
    i64, "int64", "An integer of 64 bits with sign.";
    u8, "uint8_t", "An integer from 0 to 255.";
    u16, "uint16_t", "An integer from 0 to 65535.";
    u32, "uint32_t", "An integer from 0 to 4294967295.";
    u64, "uint64", "An integer of 64 bits without sign.";
}

/// An integer that its member cannot hold. The type without a range of its own is `int64`.
fn out_of_range(input: &Input<'_>, range: &str) -> Error {
    match (range, input.syntax()) {
        ("int64", Syntax::Json) => input.wrong_type("integer"),
        ("int64", Syntax::Keyval) => input.expects("integer"),
        _ => input.expects(range),
    }
}

impl Qapi for Size {
    fn def() -> &'static TypeDef {
        static DEF: TypeDef =
            builtin("size", "A number of bytes; K, M, G, T, P, E on the command line.", Builtin::Size);
        &DEF
    }

    fn parse(input: Input<'_>) -> Result<Self> {
        match (input.syntax(), input.value()) {
            (Syntax::Json, _) => u64::parse(input).map(Size),
            (Syntax::Keyval, Value::String(text)) => parse_size(text).map(Size).ok_or_else(|| input.expects("size")),
            (Syntax::Keyval, _) => Err(input.wrong_scalar("size")),
        }
    }

    fn to_value(&self) -> Value {
        Value::from(self.0)
    }
}

/// A number of bytes on the command line. None if it is not one, or not below 2^64.
pub(crate) fn parse_size(text: &str) -> Option<u64> {
    let text = text.trim_start_matches([' ', '\t', '\n', '\x0b', '\x0c', '\r']);
    let text = text.strip_prefix('+').unwrap_or(text);
    if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        // `B` and `E` are digits here, so no letter follows.
        return match hex.starts_with('+') {
            true => None,
            false => u64::from_str_radix(hex, 16).ok(),
        };
    }
    let (number, shift) = match text.chars().next_back()? {
        'b' | 'B' => (text.get(..text.len().checked_sub(1)?)?, Some(0)),
        'k' | 'K' => (text.get(..text.len().checked_sub(1)?)?, Some(10)),
        'm' | 'M' => (text.get(..text.len().checked_sub(1)?)?, Some(20)),
        'g' | 'G' => (text.get(..text.len().checked_sub(1)?)?, Some(30)),
        't' | 'T' => (text.get(..text.len().checked_sub(1)?)?, Some(40)),
        'p' | 'P' => (text.get(..text.len().checked_sub(1)?)?, Some(50)),
        'e' | 'E' => (text.get(..text.len().checked_sub(1)?)?, Some(60)),
        _ => (text, None),
    };
    let (whole, fraction) = match number.split_once('.') {
        Some((whole, fraction)) => (whole, fraction),
        None => (number, ""),
    };
    let all_digits = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
    if whole.is_empty() && fraction.is_empty() || !all_digits(whole) || !all_digits(fraction) {
        return None;
    }
    let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
    let shift: u32 = shift.unwrap_or(0);
    let bytes = u128::from(whole) << shift;
    // A fraction counts in bytes, rounded to the nearest; a fraction of a byte is refused.
    let mut part: u128 = 0;
    for digit in fraction.bytes().rev() {
        // Seventeen digits more than settle the bits of an exbibyte; the ones behind them are lost here by division.
        part = (part + (u128::from(digit.saturating_sub(b'0')) << 64)) / 10;
    }
    if part != 0 && shift == 0 {
        return None;
    }
    u64::try_from(bytes.checked_add(((part << shift) + (1 << 63)) >> 64)?).ok()
}

impl Qapi for f64 {
    fn def() -> &'static TypeDef {
        static DEF: TypeDef = builtin("number", "A number.", Builtin::Number);
        &DEF
    }

    fn parse(input: Input<'_>) -> Result<Self> {
        match (input.syntax(), input.value()) {
            (Syntax::Json, Value::Number(number)) => number.as_f64().ok_or_else(|| input.wrong_type("number")),
            (Syntax::Keyval, Value::String(text)) => match text.trim_start().parse::<f64>() {
                Ok(number) if number.is_finite() => Ok(number),
                _ => Err(input.wrong_type("number")),
            },
            _ => Err(input.wrong_scalar("number")),
        }
    }

    fn to_value(&self) -> Value {
        // JSON has no infinities; they become null rather than something that no reader takes.
        serde_json::Number::from_f64(*self).map_or(Value::Null, Value::Number)
    }
}

impl Qapi for Value {
    fn def() -> &'static TypeDef {
        static DEF: TypeDef = builtin("any", "Any JSON value.", Builtin::Any);
        &DEF
    }

    fn parse(input: Input<'_>) -> Result<Self> {
        Ok(input.value().clone())
    }

    fn to_value(&self) -> Value {
        self.clone()
    }
}

impl Qapi for Null {
    fn def() -> &'static TypeDef {
        static DEF: TypeDef = builtin("null", "Nothing.", Builtin::Null);
        &DEF
    }

    fn parse(input: Input<'_>) -> Result<Self> {
        match input.value() {
            Value::Null => Ok(Null),
            _ => Err(input.wrong_scalar("null")),
        }
    }

    fn to_value(&self) -> Value {
        Value::Null
    }
}

impl Qapi for () {
    fn def() -> &'static TypeDef {
        static DEF: TypeDef = TypeDef {
            name: "q_empty",
            doc: "An object without members.",
            since: None,
            features: &[],
            kind: Kind::Object(&[]),
        };
        &DEF
    }

    fn parse(input: Input<'_>) -> Result<Self> {
        input.object()
    }

    fn to_value(&self) -> Value {
        Value::Object(Map::new())
    }
}

impl Object for () {
    fn parse_members(_members: &mut Members<'_>) -> Result<Self> {
        Ok(())
    }

    fn write_members(&self, _map: &mut Map<String, Value>) {}
}

impl<T: Qapi> Qapi for Vec<T> {
    fn def() -> &'static TypeDef {
        const { &TypeDef { name: "", doc: "", since: None, features: &[], kind: Kind::Array(<T as Qapi>::def) } }
    }

    fn parse(input: Input<'_>) -> Result<Self> {
        input.array()
    }

    fn to_value(&self) -> Value {
        Value::Array(self.iter().map(Qapi::to_value).collect())
    }
}

impl<T: Qapi> Qapi for Box<T> {
    fn def() -> &'static TypeDef {
        T::def()
    }

    fn parse(input: Input<'_>) -> Result<Self> {
        T::parse(input).map(Box::new)
    }

    fn to_value(&self) -> Value {
        T::to_value(self)
    }
}

impl<T: Object> Object for Box<T> {
    fn parse_members(members: &mut Members<'_>) -> Result<Self> {
        T::parse_members(members).map(Box::new)
    }

    fn write_members(&self, map: &mut Map<String, Value>) {
        T::write_members(self, map);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_as_the_reference_reads_them() {
        for (text, bytes) in [
            ("0", Some(0)),
            ("1k", Some(1024)),
            ("1K", Some(1024)),
            ("1.5K", Some(1536)),
            ("0.5M", Some(512 * 1024)),
            ("1e", Some(1 << 60)),
            ("16E", None),
            ("15.9E", Some(18331451923248866918)),
            ("0.3K", Some(307)),
            (".7K", Some(717)),
            ("0.333M", Some(349176)),
            ("0.9999999999999999999999K", Some(1024)),
            ("1.0B", Some(1)),
            ("1.", Some(1)),
            (" +0X1", Some(1)),
            ("010", Some(10)),
            ("1e3", None),
            ("1 K", None),
            ("1K ", None),
            ("0x1K", None),
            ("0x", None),
            ("-0", None),
            (".5", None),
            (".k", None),
            ("1.1.K", None),
            ("0x10", Some(16)),
            ("18446744073709551615", Some(u64::MAX)),
            ("18446744073709551616", None),
            ("99999999999999999999", None),
            ("", None),
            ("k", None),
            (".", None),
            ("-1", None),
            ("1x", None),
            ("1kb", None),
            ("1.5", None),
            ("0x1.5", None),
            ("1.-5k", None),
            ("0x+5", None),
            ("1é", None),
        ] {
            assert_eq!(parse_size(text), bytes, "{text}");
        }
    }
}
