//! What a type, a command or an event is, as data.
//!
//! The derive macro writes these as statics; introspection, help and the reference manual read them. Types refer to each
//! other by function, so that a type can contain itself.

use crate::{Error, Value};

/// The definition of a type, reached through [`Qapi::def`](crate::Qapi::def).
pub type TypeFn = fn() -> &'static TypeDef;

/// A type.
#[derive(Debug)]
pub struct TypeDef {
    /// Its QAPI name; arrays have none of their own.
    pub name: &'static str,
    /// Its documentation, Markdown.
    pub doc: &'static str,
    /// The release that brought it, if somebody said so.
    pub since: Option<&'static str>,
    /// Names of its features, `deprecated` and `unstable` among them.
    pub features: &'static [&'static str],
    /// What sort of type it is, and what it consists of.
    pub kind: Kind,
}

/// The sorts of types.
#[derive(Debug)]
pub enum Kind {
    /// A type that JSON knows.
    Builtin(Builtin),
    /// One of several names.
    Enum(&'static [EnumValue]),
    /// Members, bases and perhaps variants.
    Object(&'static [Item]),
    /// One of several types.
    Alternate(&'static [Branch]),
    /// Any number of another type.
    Array(TypeFn),
}

/// The built-in types.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Builtin {
    /// A string.
    Str,
    /// An integer, whatever its width. Introspection does not tell the widths apart.
    Int,
    /// An integer of bytes, with `K`, `M`, `G`, ... on the command line.
    Size,
    /// A number.
    Number,
    /// A truth value.
    Bool,
    /// Nothing.
    Null,
    /// Any JSON value.
    Any,
}

/// One value of an enum.
#[derive(Debug)]
pub struct EnumValue {
    /// Its name on the wire.
    pub name: &'static str,
    /// Its documentation.
    pub doc: &'static str,
    /// Its features.
    pub features: &'static [&'static str],
    /// The release that brought it.
    pub since: Option<&'static str>,
}

/// A part of an object.
#[derive(Debug)]
pub enum Item {
    /// A member.
    Member(Member),
    /// The members of another object.
    Flatten(TypeFn),
    /// A tag, and the members that its value brings.
    Variants(Variants),
}

/// A member of an object.
#[derive(Debug)]
pub struct Member {
    /// Its name on the wire.
    pub name: &'static str,
    /// Its documentation.
    pub doc: &'static str,
    /// Its type.
    pub ty: TypeFn,
    /// It may be left out.
    pub optional: bool,
    /// What a member that is left out means, where that is one value.
    pub default: Option<fn() -> Value>,
    /// Its features.
    pub features: &'static [&'static str],
    /// The release that brought it.
    pub since: Option<&'static str>,
}

/// The variant part of an object.
#[derive(Debug)]
pub struct Variants {
    /// The member that selects the variant.
    pub tag: Member,
    /// The variants.
    pub cases: fn() -> &'static [Case],
}

/// A variant of an object.
#[derive(Debug)]
pub struct Case {
    /// The value of the tag.
    pub name: &'static str,
    /// The documentation of the value.
    pub doc: &'static str,
    /// The members it brings; none if it brings none.
    pub ty: Option<TypeFn>,
    /// The features of the value.
    pub features: &'static [&'static str],
    /// The release that brought it.
    pub since: Option<&'static str>,
}

/// A branch of an alternate.
#[derive(Debug)]
pub struct Branch {
    /// What the branch is called, for documentation only.
    pub name: &'static str,
    /// Its documentation.
    pub doc: &'static str,
    /// Its type.
    pub ty: TypeFn,
}

/// A command.
#[derive(Debug)]
pub struct CommandDef {
    /// Its name.
    pub name: &'static str,
    /// Its documentation.
    pub doc: &'static str,
    /// The release that brought it.
    pub since: Option<&'static str>,
    /// Its features.
    pub features: &'static [&'static str],
    /// Its arguments.
    pub args: TypeFn,
    /// What it returns.
    pub ret: TypeFn,
}

/// An event.
#[derive(Debug)]
pub struct EventDef {
    /// Its name.
    pub name: &'static str,
    /// Its documentation.
    pub doc: &'static str,
    /// The release that brought it.
    pub since: Option<&'static str>,
    /// Its features.
    pub features: &'static [&'static str],
    /// Its data.
    pub data: TypeFn,
}

impl TypeDef {
    /// Every member of an object with its bases' members, in order, tags included; nothing for other types.
    pub fn members(&self) -> Vec<&'static Member> {
        let mut out = Vec::new();
        if let Kind::Object(items) = &self.kind {
            for item in *items {
                match item {
                    Item::Member(member) => out.push(member),
                    Item::Flatten(base) => out.extend(base().members()),
                    Item::Variants(variants) => out.push(&variants.tag),
                }
            }
        }
        out
    }

    /// The variant part of an object, its own or that of a base.
    pub fn variants(&self) -> Option<&'static Variants> {
        let Kind::Object(items) = &self.kind else { return None };
        items.iter().find_map(|item| match item {
            Item::Variants(variants) => Some(variants),
            Item::Flatten(base) => base().variants(),
            Item::Member(_) => None,
        })
    }

    /// The values of an enum; nothing for other types.
    pub fn values(&self) -> &'static [EnumValue] {
        match self.kind {
            Kind::Enum(values) => values,
            _ => &[],
        }
    }
}

/// A text that is no value of the enum.
pub fn unknown_value(def: &TypeDef, text: &str) -> Error {
    let names: Vec<_> = def.values().iter().map(|v| v.name).collect();
    Error::generic(format!("'{text}' is not a value of {}, expected one of: {}", def.name, names.join(", ")))
}
