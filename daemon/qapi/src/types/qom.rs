//! Objects that the user makes, and the tree they stand in.

use crate::types::throttle::ThrottleGroupProperties;
use crate::{Qapi, Value};

/// A thread that runs requests of exports.
#[derive(Debug, Clone, PartialEq, Eq, Default, Qapi)]
#[qapi(since = "2.0")]
pub struct IothreadProperties {
    /// Requests that gather before they are handed to the kernel, at most; 0, the default, lets the daemon decide.
    #[qapi(since = "6.1")]
    pub aio_max_batch: Option<i64>,
    /// Threads that are kept ready for blocking operations.
    #[qapi(since = "7.1")]
    pub thread_pool_min: Option<i64>,
    /// Threads for blocking operations at most.
    #[qapi(since = "7.1")]
    pub thread_pool_max: Option<i64>,
    /// Nanoseconds to look for events before the thread sleeps, at most; 0 sleeps at once. If it is not given, 32768 while the thread
    /// serves a queue in memory (vhost-user-blk, vduse-blk), and else 0.
    #[qapi(since = "2.9")]
    pub poll_max_ns: Option<i64>,
    /// The factor by which that time grows when a longer look would have caught the event; 0, the default, is 2.
    #[qapi(since = "2.9")]
    pub poll_grow: Option<i64>,
    /// The divisor by which that time shrinks when no look would have; 0, the default, is 2, and stops looking where so little is left
    /// that it is not worth it, until a sleep is short again.
    #[qapi(since = "2.9")]
    pub poll_shrink: Option<i64>,
}

/// Carries out commands about persistent reservations through a helper process that may do so.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(since = "2.11")]
pub struct PrManagerHelperProperties {
    /// The socket of the helper, `qemu-pr-helper`. It need not be there yet.
    pub path: String,
}

/// Properties of the thread on which everything runs that has no thread of its own.
#[derive(Debug, Clone, PartialEq, Eq, Default, Qapi)]
#[qapi(since = "7.1")]
pub struct MainLoopProperties {
    /// Requests that gather before they are handed to the kernel, at most; 0, the default, lets the daemon decide.
    pub aio_max_batch: Option<i64>,
    /// Threads that are kept ready for blocking operations.
    pub thread_pool_min: Option<i64>,
    /// Threads for blocking operations at most.
    pub thread_pool_max: Option<i64>,
}

/// How the bytes of a secret are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Qapi)]
#[qapi(since = "2.6")]
pub enum SecretFormat {
    /// As they are.
    #[default]
    Raw,
    /// In base64.
    Base64,
}

/// What all secrets have.
#[derive(Debug, Clone, PartialEq, Eq, Default, Qapi)]
#[qapi(since = "2.6")]
pub struct SecretCommon {
    /// How the bytes are written; `raw` if nothing is given.
    pub format: Option<SecretFormat>,
    /// The secret with the key, 32 bytes, for one that is encrypted with AES-256 in CBC mode.
    pub keyid: Option<String>,
    /// The initialization vector for that, 16 bytes in base64.
    pub iv: Option<String>,
}

/// Bytes that nobody else should know, in a file or here.
#[derive(Debug, Clone, PartialEq, Eq, Default, Qapi)]
#[qapi(since = "2.6")]
pub struct SecretProperties {
    /// Format and encryption.
    #[qapi(flatten)]
    pub common: SecretCommon,
    /// The bytes. Who sees the command line or the tree of objects sees them too.
    pub data: Option<String>,
    /// The file with the bytes, at most 1 MiB.
    pub file: Option<String>,
}

/// Bytes that nobody else should know, in the kernel's keyring.
#[derive(Debug, Clone, PartialEq, Eq, Default, Qapi)]
#[qapi(since = "5.1")]
pub struct SecretKeyringProperties {
    /// Format and encryption.
    #[qapi(flatten)]
    pub common: SecretCommon,
    /// The serial number of the key.
    pub serial: i32,
}

/// A thread from which others inherit the processors that they run on.
#[derive(Debug, Clone, PartialEq, Eq, Default, Qapi)]
#[qapi(since = "7.2")]
pub struct ThreadContextProperties {
    /// The processors; all that the process may use if nothing is given.
    pub cpu_affinity: Option<Vec<u16>>,
    /// The nodes of memory whose processors are meant.
    pub node_affinity: Option<Vec<u16>>,
}

/// An object to make.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "object-add", since = "2.0")]
pub struct ObjectOptions {
    /// The type of the object.
    #[qapi(variants, tag = "qom-type")]
    pub object: ObjectVariant,
    /// Its name.
    pub id: String,
}

/// The types of objects that a user can make.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(variants, tag_enum = "ObjectType")]
pub enum ObjectVariant {
    /// A thread that runs requests of exports.
    Iothread(IothreadProperties),
    /// Properties of the first thread.
    MainLoop(MainLoopProperties),
    /// Carries out commands about persistent reservations.
    PrManagerHelper(PrManagerHelperProperties),
    /// Bytes that nobody else should know.
    Secret(SecretProperties),
    /// The same in the kernel's keyring.
    #[qapi(rename = "secret_keyring")]
    SecretKeyring(SecretKeyringProperties),
    /// A thread from which others inherit their processors.
    ThreadContext(ThreadContextProperties),
    /// Limits of throughput that several nodes share.
    ThrottleGroup(Box<ThrottleGroupProperties>),
}

/// Deletes an object that nothing uses.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "object-del", since = "2.0")]
pub struct ObjectDel {
    /// Its name.
    pub id: String,
}

/// A property of an object.
#[derive(Debug, Clone, PartialEq, Qapi)]
#[qapi(since = "1.2")]
pub struct ObjectPropertyInfo {
    /// Its name.
    pub name: String,
    /// Its type: `bool`, `int`, `string`, ..., or `child<TYPE>` for an object below this one.
    #[qapi(rename = "type")]
    pub ty: String,
    /// What it is for, where there is more to say than the name does.
    pub description: Option<String>,
    /// Its value in a new object, where that is known.
    #[qapi(since = "5.0")]
    pub default_value: Option<Value>,
}

/// Lists the properties of an object, the objects below it among them.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "qom-list", returns = "Vec<ObjectPropertyInfo>", since = "1.2")]
pub struct QomList {
    /// Where the object stands, for instance `/objects`. Without a slash in front: the one object whose path ends so.
    pub path: String,
}

/// A property of an object with its value.
#[derive(Debug, Clone, PartialEq, Qapi)]
#[qapi(since = "10.1")]
pub struct ObjectPropertyValue {
    /// Its name.
    pub name: String,
    /// Its type, as `qom-list` has it.
    #[qapi(rename = "type")]
    pub ty: String,
    /// Its value. Left out if it cannot be read.
    pub value: Option<Value>,
}

/// The properties of one object with their values.
#[derive(Debug, Clone, PartialEq, Qapi)]
#[qapi(since = "10.1")]
pub struct ObjectPropertiesValues {
    /// Its properties.
    pub properties: Vec<ObjectPropertyValue>,
}

/// Reads all properties of several objects at once, in their order.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "qom-list-get", returns = "Vec<ObjectPropertiesValues>", since = "10.1")]
pub struct QomListGet {
    /// Where the objects stand, as for `qom-list`.
    pub paths: Vec<String>,
}

/// Reads a property of an object.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "qom-get", returns = "Value", since = "1.2")]
pub struct QomGet {
    /// Where the object stands.
    pub path: String,
    /// The name of the property.
    pub property: String,
}

/// Changes a property of an object.
#[derive(Debug, Clone, PartialEq, Qapi)]
#[qapi(command = "qom-set", since = "1.2")]
pub struct QomSet {
    /// Where the object stands.
    pub path: String,
    /// The name of the property.
    pub property: String,
    /// Its new value.
    pub value: Value,
}

/// A type of objects.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(since = "1.1")]
pub struct ObjectTypeInfo {
    /// Its name.
    pub name: String,
    /// There are no objects of this type itself, only of types below it. Left out where it is false.
    #[qapi(rename = "abstract", since = "2.10")]
    pub is_abstract: Option<bool>,
    /// The type above it.
    #[qapi(since = "2.10")]
    pub parent: Option<String>,
}

/// Lists the types of objects.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "qom-list-types", returns = "Vec<ObjectTypeInfo>", since = "1.1")]
pub struct QomListTypes {
    /// Only types that are this one or below it.
    pub implements: Option<String>,
    /// Abstract types as well.
    #[qapi(rename = "abstract", default)]
    pub include_abstract: bool,
}

/// Lists the properties that objects of a type have.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "qom-list-properties", returns = "Vec<ObjectPropertyInfo>", since = "2.12")]
pub struct QomListProperties {
    /// The name of the type.
    pub typename: String,
}
