//! What `query-qmp-schema` returns. [QAPI §Client JSON Protocol introspection]

use crate::{Qapi, Value};

/// An entity of the schema. Commands, events and built-in types go by their names; all other types have numbers, which mean
/// nothing beyond one reply.
#[derive(Debug, Clone, PartialEq, Qapi)]
pub struct SchemaInfo {
    /// The name that other entities refer to.
    pub name: String,
    /// What sort of entity it is.
    #[qapi(variants, tag = "meta-type")]
    pub meta_type: SchemaInfoKind,
    /// Names of features: properties of the entity that no member shows.
    #[qapi(since = "4.1")]
    pub features: Option<Vec<String>>,
}

/// The sorts of entities.
#[derive(Debug, Clone, PartialEq, Qapi)]
#[qapi(variants, tag_enum = "SchemaMetaType")]
pub enum SchemaInfoKind {
    /// A type that JSON knows.
    Builtin(SchemaInfoBuiltin),
    /// One of several names.
    Enum(SchemaInfoEnum),
    /// Any number of another type.
    Array(SchemaInfoArray),
    /// An object.
    Object(SchemaInfoObject),
    /// One of several types.
    Alternate(SchemaInfoAlternate),
    /// A command.
    Command(SchemaInfoCommand),
    /// An event.
    Event(SchemaInfoEvent),
}

/// The types that JSON values have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Qapi)]
pub enum JSONType {
    /// A string.
    String,
    /// A number.
    Number,
    /// A number without a fraction.
    Int,
    /// `true` or `false`.
    Boolean,
    /// `null`.
    Null,
    /// An object.
    Object,
    /// An array.
    Array,
    /// Any of them.
    Value,
}

/// A built-in type.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct SchemaInfoBuiltin {
    /// What it is in JSON.
    pub json_type: JSONType,
}

/// An enum.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct SchemaInfoEnum {
    /// Its values.
    #[qapi(since = "6.2")]
    pub members: Vec<SchemaInfoEnumMember>,
    /// The names of its values.
    #[qapi(deprecated)]
    pub values: Vec<String>,
}

/// A value of an enum.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct SchemaInfoEnumMember {
    /// Its name.
    pub name: String,
    /// Names of its features.
    #[qapi(since = "8.0")]
    pub features: Option<Vec<String>>,
}

/// An array.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct SchemaInfoArray {
    /// The type of its elements.
    pub element_type: String,
}

/// An object.
#[derive(Debug, Clone, PartialEq, Qapi)]
pub struct SchemaInfoObject {
    /// Its common members.
    pub members: Vec<SchemaInfoObjectMember>,
    /// The member that selects the variant.
    pub tag: Option<String>,
    /// The variants.
    pub variants: Option<Vec<SchemaInfoObjectVariant>>,
}

/// A member of an object.
#[derive(Debug, Clone, PartialEq, Qapi)]
pub struct SchemaInfoObjectMember {
    /// Its name.
    pub name: String,
    /// Its type.
    #[qapi(rename = "type")]
    pub ty: String,
    /// There only for optional members, and then null.
    pub default: Option<Value>,
    /// Names of its features.
    #[qapi(since = "5.0")]
    pub features: Option<Vec<String>>,
}

/// A variant of an object.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct SchemaInfoObjectVariant {
    /// The value of the tag.
    pub case: String,
    /// The type whose members it brings.
    #[qapi(rename = "type")]
    pub ty: String,
}

/// An alternate.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct SchemaInfoAlternate {
    /// Its branches.
    pub members: Vec<SchemaInfoAlternateMember>,
}

/// A branch of an alternate.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct SchemaInfoAlternateMember {
    /// Its type.
    #[qapi(rename = "type")]
    pub ty: String,
}

/// A command.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct SchemaInfoCommand {
    /// The object that its arguments are.
    pub arg_type: String,
    /// What it returns.
    pub ret_type: String,
    /// It may be sent with `exec-oob`.
    #[qapi(since = "2.12")]
    pub allow_oob: Option<bool>,
}

/// An event.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct SchemaInfoEvent {
    /// The object that its data are.
    pub arg_type: String,
}
