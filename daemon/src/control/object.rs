//! Objects that the user makes, and the tree in which they and the character devices stand.
//!
//! The tree has two branches, `/objects` and `/chardevs`; what stands on them is computed from their owners, never stored.

use super::Control;
use io::IoThread;
use qapi::types::qom::{
    IothreadProperties, ObjectDel, ObjectOptions, ObjectPropertyInfo, ObjectTypeInfo, ObjectVariant, QomGet, QomList,
    QomListProperties, QomListTypes, QomSet,
};
use qapi::{Error, ErrorClass, Result, Value};
use std::sync::Arc;

/// Limits of the pool of an IOThread, as its properties.
#[derive(Clone, Copy)]
struct PoolLimits {
    min: i64,
    max: i64,
}

struct Iothread {
    id: String,
    thread: Arc<IoThread>,
    limits: PoolLimits,
}

/// The user's objects, oldest first.
#[derive(Default)]
pub(super) struct Objects {
    iothreads: Vec<Iothread>,
}

/// A type of objects: name, parent, whether it has no objects of its own, whether users make them.
struct Type {
    name: &'static str,
    parent: Option<&'static str>,
    is_abstract: bool,
    user_creatable: bool,
}

const fn plain(name: &'static str, parent: &'static str) -> Type {
    Type { name, parent: Some(parent), is_abstract: false, user_creatable: false }
}

/// All types of objects in the tree.
const TYPES: &[Type] = &[
    Type { name: "object", parent: None, is_abstract: true, user_creatable: false },
    plain("container", "object"),
    Type { name: "event-loop-base", parent: Some("object"), is_abstract: true, user_creatable: false },
    Type { name: "iothread", parent: Some("event-loop-base"), is_abstract: false, user_creatable: true },
    Type { name: "chardev", parent: Some("object"), is_abstract: true, user_creatable: false },
    plain("chardev-socket", "chardev"),
    plain("chardev-stdio", "chardev"),
];

/// Where a path leads.
enum Place<'a> {
    Root,
    Objects,
    Chardevs,
    Iothread(&'a Iothread),
    /// A character device: its type.
    Chardev(String),
}

impl Place<'_> {
    fn type_name(&self) -> String {
        match self {
            Place::Root | Place::Objects | Place::Chardevs => "container".to_owned(),
            Place::Iothread(_) => "iothread".to_owned(),
            Place::Chardev(ty) => ty.clone(),
        }
    }
}

fn property(name: impl Into<String>, ty: impl Into<String>) -> ObjectPropertyInfo {
    ObjectPropertyInfo { name: name.into(), ty: ty.into() }
}

/// Properties that objects of a type have, without those below them.
fn own_properties(type_name: &str) -> Vec<ObjectPropertyInfo> {
    let mut all = vec![property("type", "string")];
    if type_name == "iothread" {
        all.push(property("thread-pool-min", "int"));
        all.push(property("thread-pool-max", "int"));
    }
    all
}

/// The limits as the thread takes them.
fn pool_limits(limits: PoolLimits) -> Result<(usize, usize)> {
    let within = |name: &str, value: i64| {
        usize::try_from(value).map_err(|_| Error::generic(format!("{name} value must be in range [0, {}]", i64::MAX)))
    };
    let (min, max) = (within("thread-pool-min", limits.min)?, within("thread-pool-max", limits.max)?);
    if max == 0 || min > max {
        return Err(Error::generic("bad thread-pool-min/thread-pool-max values"));
    }
    Ok((min, max))
}

/// Starts the thread of an object of type `iothread`.
fn start(id: &str, properties: &IothreadProperties) -> Result<Iothread> {
    let defaults = io::Params::default();
    let limits = PoolLimits {
        min: properties.thread_pool_min.unwrap_or(i64::try_from(defaults.thread_pool_min).unwrap_or(0)),
        max: properties.thread_pool_max.unwrap_or(i64::try_from(defaults.thread_pool_max).unwrap_or(i64::MAX)),
    };
    let (thread_pool_min, thread_pool_max) = pool_limits(limits)?;
    let params = io::Params { thread_pool_min, thread_pool_max, ..defaults };
    // The thread's name is what `top` and `ps` show.
    let thread = IoThread::start(&format!("IO {id}"), params)
        .map_err(|error| Error::io(format!("Could not start iothread '{id}'"), error))?;
    Ok(Iothread { id: id.to_owned(), thread, limits })
}

impl Objects {
    /// The thread of that name.
    pub fn iothread(&self, id: &str) -> Result<Arc<IoThread>> {
        let found = self.iothreads.iter().find(|object| object.id == id);
        found
            .map(|object| Arc::clone(&object.thread))
            .ok_or_else(|| Error::generic(format!("iothread \"{id}\" not found")))
    }
}

impl Control {
    /// `object-add` and `--object`.
    pub async fn object_add(&mut self, options: ObjectOptions) -> Result<()> {
        if !qapi::opts::is_identifier(&options.id) {
            return Err(Error::generic("Parameter 'id' expects an identifier"));
        }
        if self.objects.iothreads.iter().any(|object| object.id == options.id) {
            let id = options.id;
            return Err(Error::generic(format!(
                "attempt to add duplicate property '{id}' to object (type 'container')"
            )));
        }
        let ObjectVariant::Iothread(properties) = &options.object;
        self.objects.iothreads.push(start(&options.id, properties)?);
        Ok(())
    }

    /// The thread goes on for the exports that have it, and ends with the last of them.
    pub(super) async fn object_del(&mut self, args: ObjectDel) -> Result<()> {
        let found = self.objects.iothreads.iter().position(|object| object.id == args.id);
        let at = found.ok_or_else(|| Error::generic(format!("object '{}' not found", args.id)))?;
        self.objects.iothreads.remove(at);
        Ok(())
    }

    /// Stops all threads. No export is left.
    pub(super) async fn close_objects(&mut self) {
        for object in self.objects.iothreads.drain(..) {
            object.thread.stop().await;
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
        self.objects.iothreads.iter().find(|object| object.id == id).map(Place::Iothread)
    }

    fn chardev(&self, id: &str) -> Option<Place<'_>> {
        self.chardevs.type_of(id).map(|ty| Place::Chardev(format!("chardev-{ty}")))
    }

    pub(super) async fn qom_list(&mut self, args: QomList) -> Result<Vec<ObjectPropertyInfo>> {
        let place = self.place(&args.path)?;
        let mut all = own_properties(&place.type_name());
        let child = |name: &str, ty: &str| property(name, format!("child<{ty}>"));
        match place {
            Place::Root => all.extend([child("objects", "container"), child("chardevs", "container")]),
            Place::Objects => all.extend(self.objects.iothreads.iter().map(|object| child(&object.id, "iothread"))),
            Place::Chardevs => {
                all.extend(self.chardevs.list().iter().map(|(id, ty)| child(id, &format!("chardev-{ty}"))));
            }
            Place::Iothread(_) | Place::Chardev(_) => {}
        }
        Ok(all)
    }

    pub(super) async fn qom_get(&mut self, args: QomGet) -> Result<Value> {
        let place = self.place(&args.path)?;
        let name = args.property.as_str();
        let below = |branch: &str| Value::from(format!("/{branch}/{name}"));
        match &place {
            _ if name == "type" => return Ok(place.type_name().into()),
            Place::Root if name == "objects" || name == "chardevs" => return Ok(format!("/{name}").into()),
            Place::Objects if self.object(name).is_some() => return Ok(below("objects")),
            Place::Chardevs if self.chardev(name).is_some() => return Ok(below("chardevs")),
            Place::Iothread(object) if name == "thread-pool-min" => return Ok(object.limits.min.into()),
            Place::Iothread(object) if name == "thread-pool-max" => return Ok(object.limits.max.into()),
            _ => {}
        }
        Err(no_property(&place, name))
    }

    pub(super) async fn qom_set(&mut self, args: QomSet) -> Result<()> {
        let name = args.property.as_str();
        let place = self.place(&args.path)?;
        let Place::Iothread(object) = &place else {
            return Err(if self.has_property(&place, name) {
                read_only(&place, name)
            } else {
                no_property(&place, name)
            });
        };
        let mut limits = object.limits;
        let id = object.id.clone();
        let slot = match name {
            "thread-pool-min" => &mut limits.min,
            "thread-pool-max" => &mut limits.max,
            "type" => return Err(read_only(&place, name)),
            _ => return Err(no_property(&place, name)),
        };
        let Some(value) = args.value.as_i64() else {
            return Err(Error::generic(format!("Invalid parameter type for '{name}', expected: integer")));
        };
        *slot = value;
        let (min, max) = pool_limits(limits)?;
        if let Some(object) = self.objects.iothreads.iter_mut().find(|object| object.id == id) {
            object.thread.set_thread_pool(min, max);
            object.limits = limits;
        }
        Ok(())
    }

    fn has_property(&self, place: &Place<'_>, name: &str) -> bool {
        name == "type"
            || match place {
                Place::Root => name == "objects" || name == "chardevs",
                Place::Objects => self.object(name).is_some(),
                Place::Chardevs => self.chardev(name).is_some(),
                Place::Iothread(_) | Place::Chardev(_) => false,
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
