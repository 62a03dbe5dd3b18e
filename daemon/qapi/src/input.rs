//! A place in a value that is being read: what is there, how it is called, and in which syntax it was written.
//!
//! All messages about values are made here, so that they read alike and name the member by its whole path: `cache.direct`,
//! and `bitmaps[1].node` in JSON or `bitmaps.1.node` on the command line.

use std::fmt::{self, Display};

use crate::{
    Error, Map, Object, Qapi, Result, Value,
    def::{Builtin, Kind, TypeDef},
};

/// How deep objects and lists may be nested. The lexers stop at 1024, but a level here costs stack, and no configuration
/// comes near this.
const MAX_DEPTH: u32 = 128;

/// The syntax that a value was written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Syntax {
    /// JSON: scalars have types.
    Json,
    /// The dotted command line form: every scalar is a string.
    Keyval,
}

/// Where a value stands. Lives on the stack of the readers, innermost last.
#[derive(Clone, Copy)]
struct Path<'a> {
    parent: Option<&'a Path<'a>>,
    step: Step<'a>,
    syntax: Syntax,
    depth: u32,
}

#[derive(Clone, Copy)]
enum Step<'a> {
    Root,
    Member(&'a str),
    Index(usize),
}

impl<'a> Path<'a> {
    fn child(&'a self, step: Step<'a>) -> Path<'a> {
        Path { parent: Some(self), step, syntax: self.syntax, depth: self.depth.saturating_add(1) }
    }

    fn is_root(&self) -> bool {
        matches!(self.step, Step::Root)
    }
}

impl Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(parent) = self.parent {
            parent.fmt(f)?;
        }
        let first = self.parent.is_none_or(Path::is_root);
        match self.step {
            Step::Root => Ok(()),
            Step::Member(name) if first => f.write_str(name),
            Step::Member(name) => write!(f, ".{name}"),
            Step::Index(index) if first || self.syntax == Syntax::Json => write!(f, "[{index}]"),
            Step::Index(index) => write!(f, ".{index}"),
        }
    }
}

/// A value at its place.
#[derive(Clone, Copy)]
pub struct Input<'a> {
    value: &'a Value,
    path: Path<'a>,
}

impl<'a> Input<'a> {
    /// The whole value.
    pub fn root(value: &'a Value, syntax: Syntax) -> Input<'a> {
        Input { value, path: Path { parent: None, step: Step::Root, syntax, depth: 0 } }
    }

    /// The value as it stands.
    pub fn value(&self) -> &'a Value {
        self.value
    }

    /// The syntax it was written in.
    pub fn syntax(&self) -> Syntax {
        self.path.syntax
    }

    /// The text of a string.
    pub fn string(&self) -> Result<&'a str> {
        match self.value {
            Value::String(text) => Ok(text),
            _ => Err(self.wrong_scalar("string")),
        }
    }

    /// Reads an object with nothing but the members of `T`.
    pub fn object<T: Object>(&self) -> Result<T> {
        let Value::Object(map) = self.value else { return Err(self.wrong_type("object")) };
        self.check_depth()?;
        let mut members = Members { map, path: &self.path, known: Vec::new() };
        let object = T::parse_members(&mut members)?;
        members.finish()?;
        Ok(object)
    }

    /// Reads a list of `T`.
    pub fn array<T: Qapi>(&self) -> Result<Vec<T>> {
        let Value::Array(elements) = self.value else { return Err(self.wrong_type("array")) };
        self.check_depth()?;
        let mut out = Vec::with_capacity(elements.len());
        for (index, value) in elements.iter().enumerate() {
            out.push(T::parse(Input { value, path: self.path.child(Step::Index(index)) })?);
        }
        Ok(out)
    }

    /// Whether the value has the JSON type of `def`. On the command line a string may be any scalar, so an alternate has its
    /// string branch first.
    pub fn may_be(&self, def: &TypeDef) -> bool {
        let scalar_text = self.value.is_string() && self.syntax() == Syntax::Keyval;
        match def.kind {
            Kind::Builtin(Builtin::Str) | Kind::Enum(_) => self.value.is_string(),
            Kind::Builtin(Builtin::Int | Builtin::Size) => self.value.is_i64() || self.value.is_u64() || scalar_text,
            Kind::Builtin(Builtin::Number) => self.value.is_number() || scalar_text,
            Kind::Builtin(Builtin::Bool) => self.value.is_boolean() || scalar_text,
            Kind::Builtin(Builtin::Null) => self.value.is_null(),
            Kind::Builtin(Builtin::Any) => true,
            Kind::Object(_) => self.value.is_object(),
            Kind::Array(_) => self.value.is_array(),
            Kind::Alternate(branches) => branches.iter().any(|branch| self.may_be((branch.ty)())),
        }
    }

    /// The error for a value of another type than `expected`.
    pub fn wrong_type(&self, expected: &str) -> Error {
        match self.path.is_root() {
            true => Error::generic(format!("Invalid parameter type, expected: {expected}")),
            false => Error::generic(format!("Invalid parameter type for '{}', expected: {expected}", self.path)),
        }
    }

    /// The error for something that is not the scalar `expected`. On the command line it is there because of keys below it.
    pub fn wrong_scalar(&self, expected: &str) -> Error {
        if self.syntax() == Syntax::Keyval && !self.path.is_root() && (self.value.is_object() || self.value.is_array())
        {
            return Error::generic(format!("Parameters '{}.*' are unexpected", self.path));
        }
        self.wrong_type(expected)
    }

    /// The error for a scalar that should have been written as `expected` says.
    pub fn expects(&self, expected: &str) -> Error {
        match self.path.is_root() {
            true => Error::generic(format!("Value expects {expected}")),
            false => Error::generic(format!("Parameter '{}' expects {expected}", self.path)),
        }
    }

    /// The error for a text that is none of an enum's values.
    pub fn does_not_accept(&self, text: &str) -> Error {
        match self.path.is_root() {
            true => Error::generic(format!("Value '{text}' is not accepted")),
            false => Error::generic(format!("Parameter '{}' does not accept value '{text}'", self.path)),
        }
    }

    fn check_depth(&self) -> Result<()> {
        if self.path.depth > MAX_DEPTH {
            return Err(Error::generic(format!("Parameter '{}' is nested too deeply", self.path)));
        }
        Ok(())
    }
}

/// The members of an object that is being read. Remembers which names were asked for; the rest is unexpected.
pub struct Members<'a> {
    map: &'a Map<String, Value>,
    path: &'a Path<'a>,
    known: Vec<&'static str>,
}

impl Members<'_> {
    /// Reads a member that must be there.
    pub fn required<T: Qapi>(&mut self, name: &'static str) -> Result<T> {
        match self.optional(name)? {
            Some(value) => Ok(value),
            None => Err(Error::generic(format!("Parameter '{}' is missing", self.path.child(Step::Member(name))))),
        }
    }

    /// Reads a member that may be left out.
    pub fn optional<T: Qapi>(&mut self, name: &'static str) -> Result<Option<T>> {
        self.known.push(name);
        match self.map.get(name) {
            Some(value) => T::parse(Input { value, path: self.path.child(Step::Member(name)) }).map(Some),
            None => Ok(None),
        }
    }

    /// The error for a value of a tag that has no variant here.
    pub fn no_variant(&self, tag: &str) -> Error {
        let name = self.known.iter().find(|name| self.map.get(**name).and_then(Value::as_str) == Some(tag));
        let path = self.path.child(Step::Member(name.copied().unwrap_or("type")));
        Error::generic(format!("Parameter '{path}' does not accept value '{tag}'"))
    }

    /// Refuses members that nobody asked for.
    fn finish(self) -> Result<()> {
        match self.map.keys().find(|name| !self.known.contains(&name.as_str())) {
            Some(name) => {
                Err(Error::generic(format!("Parameter '{}' is unexpected", self.path.child(Step::Member(name)))))
            }
            None => Ok(()),
        }
    }
}
