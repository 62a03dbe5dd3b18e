//! Objects that the user makes, and the tree in which they and the character devices stand.
//!
//! The tree has two branches, `/objects` and `/chardevs`; what stands on them is computed from their owners, never stored.
//! Each type of object has a row in [`TYPES`], a variant of [`Object`] and a file of its own.

mod iothread;
mod main_loop;
mod pr_manager_helper;
mod secret;
mod thread_context;
mod throttle_group;

use super::{Control, Message};
use crate::pr_manager::PrManager;
use block::clock::Clock;
use block::driver::LocalFuture;
use block::resource::Resource;
use io::IoThread;
use iothread::Iothread;
use main_loop::MainLoop;
use pr_manager_helper::PrManagerHelper;
use qapi::types::qom::{
    ObjectDel, ObjectOptions, ObjectPropertiesValues, ObjectPropertyInfo, ObjectPropertyValue, ObjectTypeInfo,
    ObjectVariant, QomGet, QomList, QomListGet, QomListProperties, QomListTypes, QomSet,
};
use qapi::{Error, ErrorClass, Qapi, Result, Value};
use secret::Secret;
use std::collections::BTreeSet;
use std::sync::Arc;
use thread_context::ThreadContext;
use throttle_group::ThrottleGroup;
use tokio::sync::oneshot;

/// What every type of object does with its properties.
trait UserObject {
    /// The value of a property, none if it is not listed in [`TYPES`].
    fn get(&self, name: &str) -> Option<Value>;

    /// Changes a property that is listed in [`TYPES`]. After an error nothing has changed.
    fn set(&mut self, name: &str, value: &Value) -> Result<()>;

    /// Whether something needs the object, so that it cannot be deleted.
    fn is_in_use(&self) -> bool {
        false
    }
}

/// An object of the user's, by its type.
enum Object {
    Iothread(Iothread),
    MainLoop(MainLoop),
    PrManagerHelper(PrManagerHelper),
    Secret(Secret),
    SecretKeyring(Secret),
    ThreadContext(ThreadContext),
    ThrottleGroup(ThrottleGroup),
}

impl Object {
    fn type_name(&self) -> &'static str {
        match self {
            Object::Iothread(_) => "iothread",
            Object::MainLoop(_) => "main-loop",
            Object::PrManagerHelper(_) => "pr-manager-helper",
            Object::Secret(_) => "secret",
            Object::SecretKeyring(_) => "secret_keyring",
            Object::ThreadContext(_) => "thread-context",
            Object::ThrottleGroup(_) => "throttle-group",
        }
    }

    /// What the object is to nodes, beyond those that they find by themselves.
    fn resource(&self) -> Resource {
        match self {
            Object::Iothread(_) | Object::MainLoop(_) | Object::ThreadContext(_) => Resource::None,
            Object::Secret(object) | Object::SecretKeyring(object) => Resource::Secret(object.bytes().clone()),
            Object::PrManagerHelper(object) => Resource::ReservationManager(object.manager().clone()),
            Object::ThrottleGroup(object) => Resource::ThrottleGroup(object.group().clone()),
        }
    }

    fn as_user(&self) -> &dyn UserObject {
        match self {
            Object::Iothread(object) => object,
            Object::MainLoop(object) => object,
            Object::PrManagerHelper(object) => object,
            Object::Secret(object) | Object::SecretKeyring(object) => object,
            Object::ThreadContext(object) => object,
            Object::ThrottleGroup(object) => object,
        }
    }

    fn as_user_mut(&mut self) -> &mut dyn UserObject {
        match self {
            Object::Iothread(object) => object,
            Object::MainLoop(object) => object,
            Object::PrManagerHelper(object) => object,
            Object::Secret(object) | Object::SecretKeyring(object) => object,
            Object::ThreadContext(object) => object,
            Object::ThrottleGroup(object) => object,
        }
    }
}

struct Entry {
    id: String,
    object: Object,
}

/// The user's objects, oldest first.
pub(super) struct Objects {
    list: Vec<Entry>,
    /// The names of those that are about to be: what they are made of is being read.
    pending: BTreeSet<String>,
    /// The time of throttle groups.
    clock: Arc<dyn Clock>,
}

/// An object whose content has been read beside the control task.
#[derive(Debug)]
pub struct NewObject {
    options: ObjectOptions,
    content: Result<Vec<u8>>,
    reply: oneshot::Sender<Result<()>>,
}

/// A type of objects.
struct Type {
    name: &'static str,
    parent: Option<&'static str>,
    /// There are no objects of this type itself.
    is_abstract: bool,
    user_creatable: bool,
    /// Names and types of the properties that it adds to `type`, which all have.
    properties: &'static [(&'static str, &'static str)],
}

const fn plain(name: &'static str, parent: &'static str) -> Type {
    Type { name, parent: Some(parent), is_abstract: false, user_creatable: false, properties: &[] }
}

const fn base(name: &'static str, parent: Option<&'static str>) -> Type {
    Type { name, parent, is_abstract: true, user_creatable: false, properties: &[] }
}

const fn made_by_users(
    name: &'static str,
    parent: &'static str,
    properties: &'static [(&'static str, &'static str)],
) -> Type {
    Type { name, parent: Some(parent), is_abstract: false, user_creatable: true, properties }
}

/// All types of objects in the tree.
const TYPES: &[Type] = &[
    base("object", None),
    plain("container", "object"),
    base("event-loop-base", Some("object")),
    made_by_users("iothread", "event-loop-base", iothread::PROPERTIES),
    base("pr-manager", Some("object")),
    made_by_users("main-loop", "event-loop-base", main_loop::PROPERTIES),
    Type {
        name: "secret_common",
        parent: Some("object"),
        is_abstract: true,
        user_creatable: false,
        properties: secret::COMMON,
    },
    made_by_users("secret", "secret_common", secret::PROPERTIES),
    made_by_users("secret_keyring", "secret_common", secret::KEYRING_PROPERTIES),
    made_by_users("thread-context", "object", thread_context::PROPERTIES),
    made_by_users("pr-manager-helper", "pr-manager", &[("path", "string")]),
    made_by_users("throttle-group", "object", throttle_group::PROPERTIES),
    base("chardev", Some("object")),
    base("chardev-fd", Some("chardev")),
    plain("chardev-file", "chardev-fd"),
    plain("chardev-hub", "chardev"),
    plain("chardev-memory", "chardev-ringbuf"),
    plain("chardev-mux", "chardev"),
    plain("chardev-null", "chardev"),
    plain("chardev-parallel", "chardev"),
    plain("chardev-pipe", "chardev-fd"),
    plain("chardev-pty", "chardev"),
    plain("chardev-ringbuf", "chardev"),
    plain("chardev-serial", "chardev-fd"),
    Type {
        name: "chardev-socket",
        parent: Some("chardev"),
        is_abstract: false,
        user_creatable: false,
        properties: &[("connected", "bool"), ("addr", "SocketAddress")],
    },
    plain("chardev-stdio", "chardev-fd"),
    plain("chardev-udp", "chardev"),
];

/// Where a path leads.
enum Place<'a> {
    Root,
    Objects,
    Chardevs,
    Object(&'a Entry),
    /// A character device: its name and type.
    Chardev(String, String),
}

impl Place<'_> {
    fn type_name(&self) -> String {
        match self {
            Place::Root | Place::Objects | Place::Chardevs => "container".to_owned(),
            Place::Object(entry) => entry.object.type_name().to_owned(),
            Place::Chardev(_, ty) => ty.clone(),
        }
    }
}

fn property(name: impl Into<String>, ty: impl Into<String>) -> ObjectPropertyInfo {
    ObjectPropertyInfo { name: name.into(), ty: ty.into(), description: None, default_value: None }
}

/// Properties that objects of a type have, without those below them.
fn own_properties(type_name: &str) -> Vec<ObjectPropertyInfo> {
    let ty = TYPES.iter().find(|ty| ty.name == type_name);
    let own = ty.map_or(&[][..], |ty| ty.properties).iter().map(|(name, ty)| property(*name, *ty));
    std::iter::once(property("type", "string")).chain(own).collect()
}

/// The value of a property that is a number.
fn integer(name: &str, value: &Value) -> Result<i64> {
    value.as_i64().ok_or_else(|| Error::generic(format!("Invalid parameter type for '{name}', expected: integer")))
}

impl Objects {
    /// No objects yet; throttle groups will have the time of `clock`.
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        Self { list: Vec::new(), pending: BTreeSet::new(), clock }
    }

    fn find(&self, id: &str) -> Option<&Entry> {
        self.list.iter().find(|entry| entry.id == id)
    }

    /// The managers of persistent reservations.
    pub fn pr_managers(&self) -> impl Iterator<Item = (&str, &PrManager)> {
        self.list.iter().filter_map(|entry| match &entry.object {
            Object::PrManagerHelper(object) => Some((entry.id.as_str(), &**object.manager())),
            _ => None,
        })
    }

    /// The thread of that name.
    pub fn iothread(&self, id: &str) -> Result<Arc<IoThread>> {
        match self.find(id).map(|entry| &entry.object) {
            Some(Object::Iothread(object)) => Ok(Arc::clone(object.thread())),
            _ => Err(Error::generic(format!("iothread \"{id}\" not found"))),
        }
    }
}

impl Control {
    /// `--object`: done when it is there.
    pub async fn make_object(&mut self, options: ObjectOptions) -> Result<()> {
        self.check_new_id(&options.id)?;
        let content = match secret::file_of(&options.object) {
            Some(name) => Some(secret::read_file(name, self.descriptors.sets().clone()).await?),
            None => None,
        };
        self.add_object(options, content)
    }

    /// `object-add`. A file may be a pipe whose other end takes its time: only the monitor that asked waits for it.
    pub(super) fn object_add(&mut self, options: ObjectOptions) -> Result<LocalFuture<'static, Result<()>>> {
        self.check_new_id(&options.id)?;
        let Some(name) = secret::file_of(&options.object).map(str::to_owned) else {
            self.add_object(options, None)?;
            return Ok(Box::pin(async { Ok(()) }));
        };
        self.objects.pending.insert(options.id.clone());
        let (handle, fdsets) = (self.handle(), self.descriptors.sets().clone());
        Ok(Box::pin(async move {
            let content = secret::read_file(&name, fdsets).await;
            let (reply, result) = oneshot::channel();
            handle.send(Message::NewObject(NewObject { options, content, reply }));
            result.await.map_err(|_| Error::generic("The daemon is shutting down"))?
        }))
    }

    /// What an object is made of has been read, or could not be.
    pub(super) fn object_read(&mut self, new: NewObject) {
        self.objects.pending.remove(&new.options.id);
        let added = new.content.and_then(|content| self.add_object(new.options, Some(content)));
        drop(new.reply.send(added));
    }

    fn check_new_id(&self, id: &str) -> Result<()> {
        if !qapi::opts::is_identifier(id) {
            return Err(Error::identifier_expected("id"));
        }
        if self.objects.find(id).is_some() || self.objects.pending.contains(id) {
            return Err(Error::generic(format!(
                "attempt to add duplicate property '{id}' to object (type 'container')"
            )));
        }
        Ok(())
    }

    /// Makes an object; `content` is that of the file that it names.
    fn add_object(&mut self, options: ObjectOptions, content: Option<Vec<u8>>) -> Result<()> {
        let ObjectOptions { id, object } = options;
        let object = match &object {
            ObjectVariant::MainLoop(properties) => {
                if self.objects.list.iter().any(|entry| matches!(entry.object, Object::MainLoop(_))) {
                    return Err(Error::generic("only one main-loop instance allowed"));
                }
                Object::MainLoop(MainLoop::take(properties)?)
            }
            ObjectVariant::Secret(properties) => {
                Object::Secret(Secret::read(properties, content, self.graph.resources())?)
            }
            ObjectVariant::SecretKeyring(properties) => {
                Object::SecretKeyring(Secret::read_key(properties, self.graph.resources())?)
            }
            ObjectVariant::ThreadContext(properties) => Object::ThreadContext(ThreadContext::start(&id, properties)?),
            ObjectVariant::Iothread(properties) => Object::Iothread(Iothread::start(&id, properties)?),
            ObjectVariant::PrManagerHelper(properties) => {
                Object::PrManagerHelper(PrManagerHelper::start(&id, properties, self.handle())?)
            }
            ObjectVariant::ThrottleGroup(properties) => {
                Object::ThrottleGroup(ThrottleGroup::new(&id, properties, Arc::clone(&self.objects.clock))?)
            }
        };
        self.graph.resources_mut().add(&id, object.resource());
        self.objects.list.push(Entry { id, object });
        Ok(())
    }

    /// Who has an object may go on with it: a thread ends with the last export that runs on it.
    pub(super) async fn object_del(&mut self, args: ObjectDel) -> Result<()> {
        let found = self.objects.list.iter().position(|entry| entry.id == args.id);
        let at = found.ok_or_else(|| Error::generic(format!("object '{}' not found", args.id)))?;
        let by_others = self.objects.list.get(at).is_some_and(|entry| entry.object.as_user().is_in_use());
        if by_others || self.graph.resources().in_use(&args.id) {
            return Err(Error::generic(format!("object '{}' is in use, can not be deleted", args.id)));
        }
        self.graph.resources_mut().remove(&args.id);
        self.objects.list.remove(at);
        Ok(())
    }

    /// Ends all objects. No export and no node is left.
    pub(super) async fn close_objects(&mut self) {
        for entry in self.objects.list.drain(..) {
            match entry.object {
                Object::Iothread(object) => object.thread().stop().await,
                Object::PrManagerHelper(object) => object.manager().stop(),
                Object::MainLoop(_)
                | Object::Secret(_)
                | Object::SecretKeyring(_)
                | Object::ThreadContext(_)
                | Object::ThrottleGroup(_) => {}
            }
        }
    }

    fn place(&self, path: &str) -> Result<Place<'_>> {
        let not_found = || Error::new(ErrorClass::DeviceNotFound, format!("Device '{path}' not found"));
        let parts: Vec<_> = path.split('/').filter(|part| !part.is_empty()).collect();
        if path.starts_with('/') {
            return match parts[..] {
                [] => Ok(Place::Root),
                ["objects"] => Ok(Place::Objects),
                ["chardevs"] => Ok(Place::Chardevs),
                ["objects", id] => self.object(id).ok_or_else(not_found),
                ["chardevs", id] => self.chardev(id).ok_or_else(not_found),
                _ => Err(not_found()),
            };
        }
        // A partial path names whatever single thing ends so.
        let mut found = match parts[..] {
            [] => return Err(Error::generic(format!("Path '{path}' is ambiguous"))),
            ["objects"] => vec![Some(Place::Objects), self.object("objects"), self.chardev("objects")],
            ["chardevs"] => vec![Some(Place::Chardevs), self.object("chardevs"), self.chardev("chardevs")],
            [id] => vec![self.object(id), self.chardev(id)],
            ["objects", id] => vec![self.object(id)],
            ["chardevs", id] => vec![self.chardev(id)],
            _ => Vec::new(),
        }
        .into_iter()
        .flatten();
        match (found.next(), found.next()) {
            (Some(place), None) => Ok(place),
            (Some(_), Some(_)) => Err(Error::generic(format!("Path '{path}' is ambiguous"))),
            (None, _) => Err(not_found()),
        }
    }

    fn object(&self, id: &str) -> Option<Place<'_>> {
        self.objects.find(id).map(Place::Object)
    }

    fn chardev(&self, id: &str) -> Option<Place<'_>> {
        self.chardevs.type_of(id).map(|ty| Place::Chardev(id.to_owned(), format!("chardev-{ty}")))
    }

    fn chardev_property(&self, id: &str, name: &str) -> Option<Value> {
        let socket = self.chardevs.socket(id)?;
        match name {
            "connected" => Some(socket.connected.into()),
            "addr" => Some(socket.address.to_value()),
            _ => None,
        }
    }

    pub(super) async fn qom_list(&mut self, args: QomList) -> Result<Vec<ObjectPropertyInfo>> {
        self.properties(&args.path)
    }

    pub(super) async fn qom_list_get(&mut self, args: QomListGet) -> Result<Vec<ObjectPropertiesValues>> {
        let mut objects = Vec::new();
        for path in &args.paths {
            let with_value = |info: ObjectPropertyInfo| {
                let value = self.value_of(path, &info.name).ok();
                ObjectPropertyValue { name: info.name, ty: info.ty, value }
            };
            let properties = self.properties(path)?.into_iter().map(with_value).collect();
            objects.push(ObjectPropertiesValues { properties });
        }
        Ok(objects)
    }

    fn properties(&self, path: &str) -> Result<Vec<ObjectPropertyInfo>> {
        let place = self.place(path)?;
        let mut all = own_properties(&place.type_name());
        let child = |name: &str, ty: &str| property(name, format!("child<{ty}>"));
        match place {
            Place::Root => all.extend([child("objects", "container"), child("chardevs", "container")]),
            Place::Objects => {
                all.extend(self.objects.list.iter().map(|entry| child(&entry.id, entry.object.type_name())));
            }
            Place::Chardevs => {
                all.extend(self.chardevs.list().iter().map(|(id, ty)| child(id, &format!("chardev-{ty}"))));
            }
            Place::Object(_) | Place::Chardev(..) => {}
        }
        Ok(all)
    }

    pub(super) async fn qom_get(&mut self, args: QomGet) -> Result<Value> {
        self.value_of(&args.path, &args.property)
    }

    fn value_of(&self, path: &str, name: &str) -> Result<Value> {
        let place = self.place(path)?;
        let below = |branch: &str| Value::from(format!("/{branch}/{name}"));
        let own = match &place {
            _ if name == "type" => return Ok(place.type_name().into()),
            Place::Root if name == "objects" || name == "chardevs" => return Ok(format!("/{name}").into()),
            Place::Objects if self.object(name).is_some() => return Ok(below("objects")),
            Place::Chardevs if self.chardev(name).is_some() => return Ok(below("chardevs")),
            Place::Object(entry) => entry.object.as_user().get(name),
            Place::Chardev(id, _) => self.chardev_property(id, name),
            _ => None,
        };
        own.ok_or_else(|| match self.has_property(&place, name) {
            true => Error::generic(format!("Property '{}.{name}' is not readable", place.type_name())),
            false => no_property(&place, name),
        })
    }

    pub(super) async fn qom_set(&mut self, args: QomSet) -> Result<()> {
        let name = args.property.as_str();
        let place = self.place(&args.path)?;
        if !self.has_property(&place, name) {
            return Err(no_property(&place, name));
        }
        let id = match &place {
            Place::Object(entry) if name != "type" => entry.id.clone(),
            _ => return Err(read_only(&place, name)),
        };
        match self.objects.list.iter_mut().find(|entry| entry.id == id) {
            Some(entry) => entry.object.as_user_mut().set(name, &args.value),
            None => Ok(()),
        }
    }

    fn has_property(&self, place: &Place<'_>, name: &str) -> bool {
        name == "type"
            || match place {
                Place::Root => name == "objects" || name == "chardevs",
                Place::Objects => self.object(name).is_some(),
                Place::Chardevs => self.chardev(name).is_some(),
                Place::Object(entry) => {
                    own_properties(entry.object.type_name()).iter().any(|property| property.name == name)
                }
                Place::Chardev(id, _) => self.chardev_property(id, name).is_some(),
            }
    }

    pub(super) async fn qom_list_types(&mut self, args: QomListTypes) -> Result<Vec<ObjectTypeInfo>> {
        let wanted = |ty: &Type| match args.implements.as_deref() {
            None => true,
            Some("user-creatable") => ty.user_creatable,
            Some(name) => is_or_is_below(ty, name),
        };
        Ok(TYPES
            .iter()
            .filter(|ty| wanted(ty) && (args.include_abstract || !ty.is_abstract))
            .map(|ty| ObjectTypeInfo {
                name: ty.name.to_owned(),
                is_abstract: ty.is_abstract.then_some(true),
                parent: ty.parent.map(str::to_owned),
            })
            .collect())
    }

    pub(super) async fn qom_list_properties(&mut self, args: QomListProperties) -> Result<Vec<ObjectPropertyInfo>> {
        if TYPES.iter().any(|ty| ty.name == args.typename) {
            Ok(own_properties(&args.typename))
        } else {
            Err(Error::new(ErrorClass::DeviceNotFound, format!("Class '{}' not found", args.typename)))
        }
    }
}

fn is_or_is_below(ty: &Type, name: &str) -> bool {
    ty.name == name
        || ty.parent.is_some_and(|parent| TYPES.iter().any(|above| above.name == parent && is_or_is_below(above, name)))
}

fn no_property(place: &Place<'_>, name: &str) -> Error {
    Error::generic(format!("Property '{}.{name}' not found", place.type_name()))
}

fn read_only(place: &Place<'_>, name: &str) -> Error {
    Error::generic(format!("Property '{}.{name}' is not writable", place.type_name()))
}
