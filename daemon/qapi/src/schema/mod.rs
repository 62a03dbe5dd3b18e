//! What `query-qmp-schema` answers, made from the commands and events that the daemon has.
//!
//! The list that goes in is the list that comes out: a type is in the schema because a command or an event in it uses that
//! type. Names of types are masked by numbers, as in the reference, since they are no part of the interface.
//!
//! [QAPI §Client JSON Protocol introspection]

mod coverage;

pub use coverage::{Coverage, Entry, Kind as EntryKind, Status, compare};

use std::collections::HashMap;

use crate::{
    Command, Event, Qapi, Value,
    def::{Builtin, CommandDef, EventDef, Kind, Member, TypeDef},
    types::introspect::{
        JSONType, SchemaInfo, SchemaInfoAlternate, SchemaInfoAlternateMember, SchemaInfoArray, SchemaInfoBuiltin,
        SchemaInfoCommand, SchemaInfoEnum, SchemaInfoEnumMember, SchemaInfoEvent, SchemaInfoKind, SchemaInfoObject,
        SchemaInfoObjectMember, SchemaInfoObjectVariant,
    },
};

/// The commands and events that exist.
#[derive(Debug, Default, Clone)]
pub struct Schema {
    commands: Vec<&'static CommandDef>,
    events: Vec<&'static EventDef>,
}

impl Schema {
    /// Nothing yet.
    pub fn new() -> Schema {
        Schema::default()
    }

    /// Adds a command.
    #[must_use]
    pub fn command<C: Command>(self) -> Schema {
        self.add_command(C::command())
    }

    /// Adds an event.
    #[must_use]
    pub fn event<E: Event>(self) -> Schema {
        self.add_event(E::event())
    }

    /// Adds a command by its definition.
    #[must_use]
    pub fn add_command(mut self, command: &'static CommandDef) -> Schema {
        self.commands.push(command);
        self
    }

    /// Adds an event by its definition.
    #[must_use]
    pub fn add_event(mut self, event: &'static EventDef) -> Schema {
        self.events.push(event);
        self
    }

    /// The commands in the order they were added.
    pub fn commands(&self) -> &[&'static CommandDef] {
        &self.commands
    }

    /// The events in the order they were added.
    pub fn events(&self) -> &[&'static EventDef] {
        &self.events
    }

    /// The reply to `query-qmp-schema`.
    pub fn build(&self) -> Vec<SchemaInfo> {
        let mut builder = Builder::default();
        let mut out = Vec::new();
        for command in &self.commands {
            let kind = SchemaInfoKind::Command(SchemaInfoCommand {
                arg_type: builder.refer((command.args)()),
                ret_type: builder.refer((command.ret)()),
                allow_oob: None,
            });
            out.push(entity(command.name, kind, command.features));
        }
        for event in &self.events {
            let kind = SchemaInfoKind::Event(SchemaInfoEvent { arg_type: builder.refer((event.data)()) });
            out.push(entity(event.name, kind, event.features));
        }
        // Describing a type can name further types, which queue up behind it.
        let mut next = 0;
        while let Some((name, def)) = builder.queue.get(next).cloned() {
            next = next.saturating_add(1);
            out.push(builder.describe(name, def));
        }
        out
    }

    /// The reply to `query-qmp-schema` as JSON.
    pub fn to_value(&self) -> Value {
        self.build().to_value()
    }
}

fn entity(name: &str, kind: SchemaInfoKind, features: &[&str]) -> SchemaInfo {
    SchemaInfo { name: name.to_owned(), meta_type: kind, features: names(features) }
}

/// A list that is left out when it is empty.
fn names(features: &[&str]) -> Option<Vec<String>> {
    (!features.is_empty()).then(|| features.iter().map(|name| (*name).to_owned()).collect())
}

/// Gives out names for types, and remembers which still have to be described.
#[derive(Default)]
struct Builder {
    masked: HashMap<String, String>,
    queue: Vec<(String, &'static TypeDef)>,
    numbers: usize,
}

impl Builder {
    /// The name to refer to a type by.
    fn refer(&mut self, def: &'static TypeDef) -> String {
        let key = key(def);
        if let Some(name) = self.masked.get(&key) {
            return name.clone();
        }
        let name = match def.kind {
            Kind::Builtin(_) => key.clone(),
            Kind::Array(of) => format!("[{}]", self.refer(of())),
            _ => {
                let number = self.numbers;
                self.numbers = number.saturating_add(1);
                number.to_string()
            }
        };
        self.masked.insert(key, name.clone());
        self.queue.push((name.clone(), def));
        name
    }

    fn describe(&mut self, name: String, def: &'static TypeDef) -> SchemaInfo {
        let meta_type = match &def.kind {
            Kind::Builtin(builtin) => SchemaInfoKind::Builtin(SchemaInfoBuiltin {
                json_type: match builtin {
                    Builtin::Str => JSONType::String,
                    Builtin::Int | Builtin::Size => JSONType::Int,
                    Builtin::Number => JSONType::Number,
                    Builtin::Bool => JSONType::Boolean,
                    Builtin::Null => JSONType::Null,
                    Builtin::Any => JSONType::Value,
                },
            }),
            Kind::Enum(values) => SchemaInfoKind::Enum(SchemaInfoEnum {
                members: values
                    .iter()
                    .map(|v| SchemaInfoEnumMember { name: v.name.to_owned(), features: names(v.features) })
                    .collect(),
                values: values.iter().map(|v| v.name.to_owned()).collect(),
            }),
            Kind::Array(of) => SchemaInfoKind::Array(SchemaInfoArray { element_type: self.refer(of()) }),
            Kind::Alternate(branches) => SchemaInfoKind::Alternate(SchemaInfoAlternate {
                members: branches.iter().map(|b| SchemaInfoAlternateMember { ty: self.refer((b.ty)()) }).collect(),
            }),
            Kind::Object(_) => {
                let members = def.members().into_iter().map(|member| self.member(member)).collect();
                let (tag, variants) = match def.variants() {
                    None => (None, None),
                    Some(variants) => {
                        let cases = (variants.cases)();
                        // Each value of the tag has its case, be it one that brings no members.
                        let values = (variants.tag.ty)().values();
                        let variants_of = values.iter().map(|value| {
                            let case = cases.iter().find(|case| case.name == value.name);
                            let ty = case.and_then(|case| case.ty).map_or_else(<() as Qapi>::def, |ty| ty());
                            SchemaInfoObjectVariant { case: value.name.to_owned(), ty: self.refer(ty) }
                        });
                        (Some(variants.tag.name.to_owned()), Some(variants_of.collect()))
                    }
                };
                SchemaInfoKind::Object(SchemaInfoObject { members, tag, variants })
            }
        };
        SchemaInfo { name, meta_type, features: names(def.features) }
    }

    fn member(&mut self, member: &Member) -> SchemaInfoObjectMember {
        SchemaInfoObjectMember {
            name: member.name.to_owned(),
            ty: self.refer((member.ty)()),
            default: member.optional.then_some(Value::Null),
            features: names(member.features),
        }
    }
}

/// What tells types apart: their names, which are unique; all integers are one.
fn key(def: &TypeDef) -> String {
    match def.kind {
        Kind::Builtin(Builtin::Int | Builtin::Size) => "int".to_owned(),
        Kind::Array(of) => format!("[{}]", key(of())),
        _ => def.name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{block::BlockdevOptions, block_query::QueryBlockstats, control, export};
    use serde_json::json;

    fn find<'a>(schema: &'a Value, name: &str) -> &'a Value {
        let entities = schema.as_array().expect("a list");
        entities.iter().find(|e| e["name"] == name).unwrap_or_else(|| panic!("no {name}"))
    }

    #[test]
    fn commands_bring_their_types() {
        let schema = Schema::new()
            .command::<BlockdevOptions>()
            .command::<control::QueryQmpSchema>()
            .command::<export::NbdServerRemove>()
            .command::<QueryBlockstats>()
            .event::<export::BlockExportDeleted>()
            .to_value();
        let add = find(&schema, "blockdev-add");
        let args = find(&schema, add["arg-type"].as_str().expect("a name"));
        assert_eq!((args["meta-type"].as_str(), args["tag"].as_str()), (Some("object"), Some("driver")));
        let member = |name: &str| {
            let members = args["members"].as_array().expect("members");
            members.iter().find(|m| m["name"] == name).expect("a member").clone()
        };
        assert_eq!(member("node-name"), json!({"name": "node-name", "type": "str", "default": null}));
        assert!(member("driver").get("default").is_none());
        let file = args["variants"].as_array().expect("variants").iter().find(|v| v["case"] == "file").expect("a case");
        let file = find(&schema, file["type"].as_str().expect("a name"));
        assert_eq!(file["features"], json!(["dynamic-auto-read-only"]));
        let reply = find(&schema, "query-qmp-schema");
        assert!(reply["ret-type"].as_str().is_some_and(|name| name.starts_with('[')));
        assert_eq!(find(&schema, "nbd-server-remove")["features"], json!(["deprecated"]));
        assert_eq!(find(&schema, "BLOCK_EXPORT_DELETED")["meta-type"], "event");
        assert_eq!(find(&schema, "int"), &json!({"name": "int", "meta-type": "builtin", "json-type": "int"}));
        // A tag value without members has its case too.
        let stats = schema
            .as_array()
            .expect("a list")
            .iter()
            .find(|e| e["tag"] == "driver" && e["members"].as_array().is_some_and(|members| members.len() == 1));
        let drivers = crate::types::block::BlockdevDriver::ALL.len();
        assert_eq!(stats.expect("BlockStatsSpecific")["variants"].as_array().map(Vec::len), Some(drivers));
    }

    #[test]
    fn the_schema_is_of_the_types_it_describes() {
        let schema = Schema::new().command::<control::QueryQmpSchema>().to_value();
        let read = Vec::<SchemaInfo>::from_value(&schema).expect("our own reply");
        assert_eq!(read.to_value(), schema);
        let mut names: Vec<_> = read.iter().map(|info| info.name.clone()).collect();
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count, "every entity is there once");
    }
}
