//! The dotted command line form: `driver=raw,file.driver=file,file.filename=x`.
//!
//! A list of `key=value` pairs becomes a tree: dots in keys separate levels, and a level whose keys are all numbers is a
//! list. `,,` in a value is one comma. The first pair may leave out its key where the option has an implied one. All
//! values are strings; [`Qapi::from_keyval`](crate::Qapi::from_keyval) reads them. A text that starts with `{` is JSON
//! instead, and `help` or `?` in place of a pair asks for help.
//!
//! The parser knows no types and does no I/O. [QAPI §keyval]

use std::collections::BTreeMap;

use crate::{Error, Map, Qapi, Result, Value, help};

/// The longest part of a key between two dots, in bytes.
const MAX_FRAGMENT: usize = 127;

/// How many levels a key may have: as deep as JSON may be nested.
const MAX_LEVELS: usize = 1024;

/// An option's argument in one of its forms.
#[derive(Debug, Clone, PartialEq)]
pub enum Parsed<'a> {
    /// JSON, not parsed yet: QMP's dialect has a lexer of its own.
    Json(&'a str),
    /// An object whose scalars are all strings.
    Keyval(Value),
    /// The user wants help, about what the other pairs (an object as well) say.
    Help(Value),
}

/// An option's argument, read.
#[derive(Debug, Clone, PartialEq)]
pub enum Argument<T> {
    /// What it says.
    Value(T),
    /// It asks for help: print this and leave.
    Help(String),
}

/// Reads the argument of an option. `json` parses QMP's dialect of JSON.
///
/// Fails with the parser's errors, and with those of [`Qapi::parse`].
pub fn read<T: Qapi>(
    text: &str,
    implied_key: Option<&str>,
    json: impl FnOnce(&str) -> Result<Value>,
) -> Result<Argument<T>> {
    match parse(text, implied_key)? {
        Parsed::Json(text) => T::from_value(&json(text)?).map(Argument::Value),
        Parsed::Keyval(value) => T::from_keyval(&value).map(Argument::Value),
        Parsed::Help(value) => Ok(Argument::Help(help::of_type(T::def(), &value))),
    }
}

/// Takes an option's argument apart. Fails with a message that quotes the key.
pub fn parse<'a>(text: &'a str, implied_key: Option<&str>) -> Result<Parsed<'a>> {
    if text.starts_with('{') {
        return Ok(Parsed::Json(text));
    }
    let mut root = Map::new();
    let mut help = false;
    let mut rest = text;
    let mut implied_key = implied_key;
    while !rest.is_empty() {
        rest = pair(rest, implied_key, &mut root, &mut help)?;
        implied_key = None;
    }
    let value = listify(root, "")?;
    Ok(if help { Parsed::Help(value) } else { Parsed::Keyval(value) })
}

/// Reads one pair into `root`. Returns the text behind it and its comma.
fn pair<'a>(
    text: &'a str,
    implied_key: Option<&str>,
    root: &mut Map<String, Value>,
    help: &mut bool,
) -> Result<&'a str> {
    let end = text.find(['=', ',']).unwrap_or(text.len());
    let (key, rest) = text.split_at(end);
    let has_value = rest.starts_with('=');
    if !has_value && matches!(key, "help" | "?") {
        *help = true;
        return Ok(rest.strip_prefix(',').unwrap_or(rest));
    }
    if !has_value
        && !key.is_empty()
        && let Some(implied) = implied_key
    {
        // The value of an implied key ends at the first comma: there is no escape in it.
        put(root, implied, key.to_owned())?;
        return Ok(rest.strip_prefix(',').unwrap_or(rest));
    }
    check_key(key)?;
    let Some(rest) = rest.strip_prefix('=') else {
        return Err(Error::generic(format!("Expected '=' after parameter '{key}'")));
    };
    let (value, rest) = value(rest);
    put(root, key, value)?;
    Ok(rest)
}

/// Reads a value up to the first comma that is not doubled. Returns it, and the text behind that comma.
pub(crate) fn value(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut rest = text;
    loop {
        let (before, behind) = match rest.split_once(',') {
            Some(parts) => parts,
            None => return (value + rest, ""),
        };
        value.push_str(before);
        match behind.strip_prefix(',') {
            Some(behind) => {
                value.push(',');
                rest = behind;
            }
            None => return (value, behind),
        }
    }
}

/// Checks the parts of a key: names of QAPI, and from the second part on also numbers.
fn check_key(key: &str) -> Result<()> {
    let mut levels = 0usize;
    for (position, fragment) in key.split('.').enumerate() {
        let number = position > 0 && is_index(fragment);
        if !number && !is_name(fragment) {
            return Err(Error::generic(format!("Invalid parameter '{key}'")));
        }
        if fragment.len() > MAX_FRAGMENT {
            let what = if fragment.len() == key.len() { "Parameter" } else { "Parameter fragment" };
            return Err(Error::generic(format!("{what} '{fragment}' is too long")));
        }
        levels = levels.saturating_add(1);
    }
    if levels > MAX_LEVELS {
        return Err(Error::generic("Parameter is nested too deeply"));
    }
    Ok(())
}

fn is_index(fragment: &str) -> bool {
    !fragment.is_empty() && fragment.bytes().all(|b| b.is_ascii_digit())
}

/// A name of QAPI: a letter, then letters, digits, `-` and `_`. Names with a vendor's domain in front are not used here.
fn is_name(fragment: &str) -> bool {
    fragment.starts_with(|c: char| c.is_ascii_alphabetic())
        && fragment.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
}

/// Puts a value at its place in the tree, the last one of several. A key that has a value cannot have keys below it.
fn put(root: &mut Map<String, Value>, key: &str, value: String) -> Result<()> {
    let inconsistent = |path: &str| Error::generic(format!("Parameters '{path}.*' used inconsistently"));
    let mut here = root;
    let mut from = 0;
    while let Some(length) = key.get(from..).and_then(|rest| rest.find('.')) {
        let end = from.saturating_add(length);
        let (Some(path), Some(fragment)) = (key.get(..end), key.get(from..end)) else { break };
        let child = here.entry(fragment.to_owned()).or_insert_with(|| Value::Object(Map::new()));
        here = match child {
            Value::Object(map) => map,
            _ => return Err(inconsistent(path)),
        };
        from = end.saturating_add(1);
    }
    let fragment = key.get(from..).unwrap_or_default();
    match here.get_mut(fragment) {
        Some(Value::Object(_)) => return Err(inconsistent(key)),
        Some(old) => *old = Value::String(value),
        None => {
            here.insert(fragment.to_owned(), Value::String(value));
        }
    }
    Ok(())
}

/// Turns the objects whose keys are all numbers into lists. `path` is the key of `map`, with a dot behind it unless empty.
fn listify(map: Map<String, Value>, path: &str) -> Result<Value> {
    let indices = map.keys().filter(|key| is_index(key)).count();
    let is_list = indices > 0 && !path.is_empty();
    if is_list && indices != map.len() {
        return Err(Error::generic(format!("Parameters '{path}*' used inconsistently")));
    }
    let mut out = Map::new();
    for (key, value) in map {
        let value = match value {
            Value::Object(inner) => listify(inner, &format!("{path}{key}."))?,
            scalar => scalar,
        };
        out.insert(key, value);
    }
    if !is_list {
        return Ok(Value::Object(out));
    }
    // A number that is too large to count to leaves a gap anyway. Of `1` and `01` the last one counts.
    let elements: BTreeMap<u64, Value> =
        out.into_iter().map(|(key, value)| (key.parse().unwrap_or(u64::MAX), value)).collect();
    match elements.keys().zip(0u64..).find(|(index, expected)| *index != expected) {
        Some((_, missing)) => Err(Error::generic(format!("Parameter '{path}{missing}' missing"))),
        None => Ok(Value::Array(elements.into_values().collect())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn keyval(text: &str) -> Value {
        match parse(text, Some("implied")).unwrap_or_else(|e| panic!("{text}: {e}")) {
            Parsed::Keyval(value) => value,
            other => panic!("{text}: {other:?}"),
        }
    }

    fn error(text: &str) -> String {
        parse(text, Some("driver")).expect_err(text).to_string()
    }

    #[test]
    fn pairs_become_a_tree() {
        for (text, value) in [
            ("", json!({})),
            ("x", json!({"implied": "x"})),
            ("x,", json!({"implied": "x"})),
            ("a.b.c", json!({"implied": "a.b.c"})),
            ("[1]", json!({"implied": "[1]"})),
            ("x,implied=y", json!({"implied": "y"})),
            ("a=1,a=2", json!({"a": "2"})),
            ("a=", json!({"a": ""})),
            ("a=b=c", json!({"a": "b=c"})),
            ("a=b,,c,,,d=e", json!({"a": "b,c,", "d": "e"})),
            ("a=,,", json!({"a": ","})),
            ("a.b=1,a.c.d=2,e=3", json!({"a": {"b": "1", "c": {"d": "2"}}, "e": "3"})),
            ("a.0=x,a.1.b=y", json!({"a": ["x", {"b": "y"}]})),
            ("a.1=x,a.0=y,a.00=z", json!({"a": ["z", "x"]})),
            ("implied=help", json!({"implied": "help"})),
        ] {
            assert_eq!(keyval(text), value, "{text}");
        }
        assert_eq!(parse("{'a':1}", None).expect("JSON"), Parsed::Json("{'a':1}"));
        for (text, value) in [
            ("help", json!({})),
            ("?", json!({})),
            ("x,help", json!({"implied": "x"})),
            ("x,a=b,?,c=d", json!({"implied": "x", "a": "b", "c": "d"})),
        ] {
            assert_eq!(parse(text, Some("implied")).expect("help"), Parsed::Help(value), "{text}");
        }
    }

    /// The right-hand sides are what the reference prints.
    #[test]
    fn wrong_texts_are_refused_in_the_words_of_the_reference() {
        for (text, message) in [
            ("file,,filename=x", "Invalid parameter ''"),
            ("file,=x", "Invalid parameter ''"),
            (",driver=foo", "Invalid parameter ''"),
            ("=foo", "Invalid parameter ''"),
            ("file,filename", "Expected '=' after parameter 'filename'"),
            ("file,.x=1", "Invalid parameter '.x'"),
            ("file,x.=1", "Invalid parameter 'x.'"),
            ("file,1x=1", "Invalid parameter '1x'"),
            ("file,x..y=1", "Invalid parameter 'x..y'"),
            ("file,cache.-x=1", "Invalid parameter 'cache.-x'"),
            ("file,cache._xa=1", "Invalid parameter 'cache._xa'"),
            ("file,cache.x y=1", "Invalid parameter 'cache.x y'"),
            ("raw,file=foo,file.driver=x", "Parameters 'file.*' used inconsistently"),
            ("raw,file.driver=x,file=foo", "Parameters 'file.*' used inconsistently"),
            ("raw,file.0.x=foo,file.driver=file", "Parameters 'file.*' used inconsistently"),
            ("bitmaps.1=a,bitmaps.0=b,bitmaps.0.node=1", "Parameters 'bitmaps.0.*' used inconsistently"),
            ("bitmaps.0=a,bitmaps.2=b", "Parameter 'bitmaps.1' missing"),
            ("bitmaps.0=a,bitmaps.00=b,bitmaps.5=c", "Parameter 'bitmaps.1' missing"),
            ("bitmaps.99999999999999999999=a", "Parameter 'bitmaps.0' missing"),
        ] {
            assert_eq!(error(text), message, "{text}");
        }
        let long = "abcdefgh".repeat(16);
        assert_eq!(error(&format!("x,{long}=1")), format!("Parameter '{long}' is too long"));
        assert_eq!(error(&format!("x,a.{long}=1")), format!("Parameter fragment '{long}' is too long"));
        let deep = "a.".repeat(5000);
        assert_eq!(error(&format!("x,{deep}a=1")), "Parameter is nested too deeply");
    }
}
