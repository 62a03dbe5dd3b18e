//! QAPI types: one definition for JSON, the command line, introspection and documentation.
//!
//! A type that derives [`Qapi`] can be read from JSON ([`Qapi::from_value`]) and from the dotted command line form
//! ([`Qapi::from_keyval`]), written as JSON ([`Qapi::to_value`]), listed by `query-qmp-schema` and described in the
//! generated reference. There is no second description of it anywhere: what the definition lacks does not exist, and
//! nothing is accepted and then ignored.
//!
//! The crate does no I/O and keeps no state. It must not know how a command works, only what it is called with; and its
//! readers are total: whatever bytes come in, the answer is a value or an [`Error`] that names the member.
//!
//! [QAPI §Schema syntax], [QMP §Introspection]
#![forbid(unsafe_code)]

// The derive macro names its crate by path; inside the crate that path has to exist too.
extern crate self as qapi;

mod builtin;
pub mod def;
pub mod error;
pub mod help;
pub mod input;
pub mod keyval;
pub mod manual;
pub mod opts;
pub mod schema;
pub mod types;

pub use builtin::{Null, Size};
pub use error::{Error, ErrorClass, Result, ResultExt};
pub use qapi_derive::Qapi;
pub use serde_json::{Map, Value};

use def::{Case, CommandDef, EventDef, TypeDef};
use input::{Input, Members, Syntax};

/// A type of the control interface.
///
/// Derive it. On the type: `name = "..."` (if the QAPI name is not the Rust name), `rename_all = "snake_case"` (kebab-case
/// otherwise), `since = "..."`, `deprecated`, `unstable`, `feature = "..."`. On members, values and variants: `rename =
/// "..."`, `since`, `deprecated`, `unstable`, `feature`. Doc comments become the reference manual.
///
/// | Rust | QAPI |
/// |---|---|
/// | struct | object; `Option<T>` is an optional member, `#[qapi(default = expr)]` an optional one with a default |
/// | field with `#[qapi(flatten)]` | base: its members stand among the struct's own |
/// | field with `#[qapi(variants, tag = "driver")]` | the variant part of a union, and its tag |
/// | enum with `#[qapi(variants, tag_enum = "BlockdevDriver")]` | the variants; makes the tag enum, or uses `tag_type`; `refuse = "..."` is the message for its other values |
/// | enum with `#[qapi(alternate)]` | alternate: a branch for each JSON type, tried in order |
/// | enum without data | enum, with `ALL`, `as_str`, `Display` and `FromStr` |
/// | `String` `bool` `i8..i64` `u8..u64` `f64` [`Size`] [`Value`] [`Null`] `Vec<T>` `Box<T>` | the built-in types |
///
/// `#[qapi(command = "block_resize", returns = "T")]` on a struct makes it the arguments of a [`Command`],
/// `#[qapi(event = "BLOCK_IO_ERROR")]` the data of an [`Event`].
pub trait Qapi: Sized + 'static {
    /// What the type is: for introspection, help and the reference manual.
    fn def() -> &'static TypeDef;

    /// Reads the value at `input`. Fails with a message that names the member by its path.
    fn parse(input: Input<'_>) -> Result<Self>;

    /// The value as JSON, members in the order of the definition.
    fn to_value(&self) -> Value;

    /// Reads a JSON value.
    fn from_value(value: &Value) -> Result<Self> {
        Self::parse(Input::root(value, Syntax::Json))
    }

    /// Reads what [`keyval`] made of a command line option: all scalars are strings.
    fn from_keyval(value: &Value) -> Result<Self> {
        Self::parse(Input::root(value, Syntax::Keyval))
    }
}

/// An object type: its members can be read from, and written into, an object that has others as well.
pub trait Object: Qapi {
    /// Reads the members of this type, leaving the others.
    fn parse_members(members: &mut Members<'_>) -> Result<Self>;

    /// Adds the members of this type.
    fn write_members(&self, map: &mut Map<String, Value>);
}

/// The variant part of a union: an enum with a struct for each value of the tag. Derived by `#[qapi(variants, ...)]`.
pub trait Variants: Sized + 'static {
    /// The enum that selects the variant.
    type Tag: Qapi;

    /// The value of the tag for this variant.
    fn tag(&self) -> Self::Tag;

    /// The variants in the order of the definition.
    fn cases() -> &'static [Case];

    /// Reads the members of the variant that the tag selects.
    fn parse_variant(tag: Self::Tag, members: &mut Members<'_>) -> Result<Self>;

    /// Adds the members of this variant, without the tag.
    fn write_variant(&self, map: &mut Map<String, Value>);
}

/// The arguments of a command; the type stands for the command itself.
pub trait Command: Object {
    /// Its name on the wire.
    const NAME: &'static str;

    /// What it returns when it succeeds; `()` is the empty object.
    type Ret: Qapi;

    /// What the command is: for introspection and the reference manual.
    fn command() -> &'static CommandDef;
}

/// The data of an event; the type stands for the event itself.
pub trait Event: Object {
    /// Its name on the wire.
    const NAME: &'static str;

    /// What the event is: for introspection and the reference manual.
    fn event() -> &'static EventDef;
}
