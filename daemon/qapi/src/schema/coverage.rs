//! Compares two replies to `query-qmp-schema` by structure: which commands, events, members, values and variants of the
//! reference are there, which are missing, which are more.
//!
//! Masked names of types mean nothing across programs, so the walk starts at the names of commands and events and follows
//! both schemas side by side. Two types are compared once, at the first place that has them.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    fmt::Write as _,
};

use crate::Value;

/// What a line of the comparison is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// A command.
    Command,
    /// An event.
    Event,
    /// A member of arguments, of a reply or of an event's data.
    Member,
    /// A value of an enum.
    Value,
    /// A variant of a union, or a branch of an alternate.
    Variant,
    /// A feature of any of these.
    Feature,
}

impl Kind {
    const ALL: [Kind; 6] = [Kind::Command, Kind::Event, Kind::Member, Kind::Value, Kind::Variant, Kind::Feature];

    fn heading(self) -> &'static str {
        match self {
            Kind::Command => "Commands",
            Kind::Event => "Events",
            Kind::Member => "Members",
            Kind::Value => "Enum values",
            Kind::Variant => "Variants",
            Kind::Feature => "Features",
        }
    }
}

/// How both sides stand to each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Status {
    /// Both have it, and a client cannot tell the difference.
    Covered,
    /// Only the reference has it.
    Missing,
    /// Only ours has it.
    Extra,
    /// Both have it and they differ: the reason.
    Mismatched(String),
}

/// A line of the comparison.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// What it is about.
    pub kind: Kind,
    /// The command or the event it belongs to.
    pub owner: String,
    /// The way from there, for instance `arguments.file.driver`; empty for the command itself.
    pub path: String,
    /// How both sides stand to each other.
    pub status: Status,
}

/// The comparison.
#[derive(Debug, Clone, Default)]
pub struct Coverage {
    /// Its lines, sorted by command and event, then in the order of the reference.
    pub entries: Vec<Entry>,
}

/// The entities of a schema by name.
type Entities<'a> = HashMap<&'a str, &'a Value>;

/// Who reads a value decides what may be more or less.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Direction {
    /// Clients write it: ours may accept more.
    Input,
    /// Clients read it: ours must say all that is certain in the reference's.
    Output,
}

/// Compares our schema with the reference's. Anything that is no schema counts as an empty one.
pub fn compare(ours: &Value, reference: &Value) -> Coverage {
    let (ours, reference) = (entities(ours), entities(reference));
    let mut walk = Walk { ours, reference, seen: HashSet::new(), coverage: Coverage::default(), owner: String::new() };
    let mut names = BTreeSet::new();
    for side in [&walk.ours, &walk.reference] {
        names.extend(side.values().filter(|e| is_root(e)).filter_map(|e| text(e, "name")).map(str::to_owned));
    }
    for name in names {
        walk.root(name);
    }
    walk.coverage
}

fn entities(schema: &Value) -> Entities<'_> {
    let list = schema.as_array().map(Vec::as_slice).unwrap_or_default();
    list.iter().filter_map(|entity| Some((text(entity, "name")?, entity))).collect()
}

fn text<'a>(value: &'a Value, key: &str) -> Option<&'a str> {
    value.get(key).and_then(Value::as_str)
}

fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value.get(key).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}

fn is_root(entity: &Value) -> bool {
    matches!(text(entity, "meta-type"), Some("command" | "event"))
}

struct Walk<'a> {
    ours: Entities<'a>,
    reference: Entities<'a>,
    /// Pairs of types that were compared already. Ends recursion.
    seen: HashSet<(String, String, Direction)>,
    coverage: Coverage,
    owner: String,
}

impl<'a> Walk<'a> {
    fn note(&mut self, kind: Kind, path: impl Into<String>, status: Status) {
        self.coverage.entries.push(Entry { kind, owner: self.owner.clone(), path: path.into(), status });
    }

    fn root(&mut self, name: String) {
        let (ours, reference) = (self.ours.get(name.as_str()).copied(), self.reference.get(name.as_str()).copied());
        self.owner = name;
        let kind = match ours.or(reference).and_then(|e| text(e, "meta-type")) {
            Some("event") => Kind::Event,
            _ => Kind::Command,
        };
        let (Some(ours), Some(reference)) = (ours, reference) else {
            let status = if ours.is_some() { Status::Extra } else { Status::Missing };
            return self.note(kind, "", status);
        };
        let same = text(ours, "meta-type") == text(reference, "meta-type");
        self.note(kind, "", if same { Status::Covered } else { Status::Mismatched("command or event".to_owned()) });
        self.features(ours, reference, "");
        let (arguments, direction) =
            if kind == Kind::Event { ("data", Direction::Output) } else { ("arguments", Direction::Input) };
        self.member_types(ours, reference, "arg-type", arguments, direction);
        self.member_types(ours, reference, "ret-type", "return", Direction::Output);
    }

    fn member_types(&mut self, ours: &'a Value, reference: &'a Value, key: &str, path: &str, direction: Direction) {
        if let (Some(ours), Some(reference)) = (text(ours, key), text(reference, key))
            && let Some(why) = self.types(ours, reference, path, direction)
        {
            self.note(Kind::Member, path, Status::Mismatched(why));
        }
    }

    /// Compares two types. Returns why they do not fit, if they do not; differences inside are noted.
    fn types(&mut self, ours: &'a str, reference: &'a str, path: &str, direction: Direction) -> Option<String> {
        let (Some(o), Some(r)) = (self.ours.get(ours).copied(), self.reference.get(reference).copied()) else {
            return Some("unknown type".to_owned());
        };
        let (our_kind, their_kind) = (text(o, "meta-type"), text(r, "meta-type"));
        if our_kind != their_kind {
            // A type where the reference has another: it fits if it is an alternate with that type among its branches.
            let alternate = direction == Direction::Input && our_kind == Some("alternate");
            let branch = list(o, "members")
                .iter()
                .filter_map(|m| text(m, "type"))
                .find(|name| alternate && self.ours.get(name).is_some_and(|e| json_type(e) == json_type(r)));
            return match branch {
                Some(branch) => self.types(branch, reference, path, direction),
                None => Some(format!("{} instead of {}", describe(o), describe(r))),
            };
        }
        if !self.seen.insert((ours.to_owned(), reference.to_owned(), direction)) {
            return None;
        }
        match our_kind {
            Some("builtin") if ours != reference => return Some(format!("{} instead of {}", describe(o), describe(r))),
            Some("enum") => self.values(o, r, path),
            Some("array") => {
                if let (Some(ours), Some(reference)) = (text(o, "element-type"), text(r, "element-type")) {
                    return self.types(ours, reference, &format!("{path}[]"), direction);
                }
            }
            Some("object") => self.objects(o, r, path, direction),
            Some("alternate") => self.branches(o, r, path, direction),
            _ => {}
        }
        None
    }

    fn values(&mut self, ours: &'a Value, reference: &'a Value, path: &str) {
        for (name, o, r) in pairs(list(ours, "members"), list(reference, "members"), "name") {
            let path = format!("{path}={name}");
            self.note(Kind::Value, path.clone(), presence(o, r));
            if let (Some(o), Some(r)) = (o, r) {
                self.features(o, r, &path);
            }
        }
    }

    fn objects(&mut self, ours: &'a Value, reference: &'a Value, path: &str, direction: Direction) {
        self.features(ours, reference, path);
        let tag = text(reference, "tag");
        if tag != text(ours, "tag") {
            self.note(Kind::Member, path, Status::Mismatched("another tag".to_owned()));
        }
        for (name, o, r) in pairs(list(ours, "members"), list(reference, "members"), "name") {
            let path = format!("{path}.{name}");
            let (Some(o), Some(r)) = (o, r) else {
                self.note(Kind::Member, path, presence(o, r));
                continue;
            };
            self.features(o, r, &path);
            let (our_optional, their_optional) = (o.get("default").is_some(), r.get("default").is_some());
            let mut why = match direction {
                Direction::Input if their_optional && !our_optional => Some("mandatory".to_owned()),
                Direction::Output if our_optional && !their_optional => Some("optional".to_owned()),
                _ => None,
            };
            // The values of a tag are compared as variants.
            if tag != Some(name)
                && let (Some(o), Some(r)) = (text(o, "type"), text(r, "type"))
            {
                why = self.types(o, r, &path, direction).or(why);
            }
            self.note(Kind::Member, path, why.map_or(Status::Covered, Status::Mismatched));
        }
        for (name, o, r) in pairs(list(ours, "variants"), list(reference, "variants"), "case") {
            let path = format!("{path}.{}={name}", tag.unwrap_or_default());
            self.note(Kind::Variant, path.clone(), presence(o, r));
            if let (Some(o), Some(r)) = (o.and_then(|o| text(o, "type")), r.and_then(|r| text(r, "type")))
                && let Some(why) = self.types(o, r, &path, direction)
            {
                self.note(Kind::Variant, path, Status::Mismatched(why));
            }
        }
    }

    /// Branches belong together when their values look alike in JSON.
    fn branches(&mut self, ours: &'a Value, reference: &'a Value, path: &str, direction: Direction) {
        let find = |entities: &Entities<'a>, side: &'a Value| -> Vec<(&'a str, &'a str)> {
            let names = list(side, "members").iter().filter_map(|m| text(m, "type"));
            names.filter_map(|name| Some((json_type(entities.get(name)?), name))).collect()
        };
        let (ours, reference) = (find(&self.ours, ours), find(&self.reference, reference));
        for (json, r) in &reference {
            let path = format!("{path}:{json}");
            let Some((_, o)) = ours.iter().find(|(ours, _)| ours == json) else {
                self.note(Kind::Variant, path, Status::Missing);
                continue;
            };
            let why = self.types(o, r, &path, direction);
            self.note(Kind::Variant, path, why.map_or(Status::Covered, Status::Mismatched));
        }
        for (json, _) in ours.iter().filter(|(json, _)| !reference.iter().any(|(theirs, _)| theirs == json)) {
            self.note(Kind::Variant, format!("{path}:{json}"), Status::Extra);
        }
    }

    fn features(&mut self, ours: &Value, reference: &Value, path: &str) {
        let (ours, reference) = (list(ours, "features"), list(reference, "features"));
        for feature in reference {
            let status = if ours.contains(feature) { Status::Covered } else { Status::Missing };
            self.note(Kind::Feature, format!("{path} {}", feature.as_str().unwrap_or_default()).trim(), status);
        }
        for feature in ours.iter().filter(|feature| !reference.contains(feature)) {
            self.note(Kind::Feature, format!("{path} {}", feature.as_str().unwrap_or_default()).trim(), Status::Extra);
        }
    }
}

/// The elements of two lists that have the same name, the reference's first, then those that only ours has.
fn pairs<'a>(
    ours: &'a [Value],
    reference: &'a [Value],
    key: &str,
) -> Vec<(&'a str, Option<&'a Value>, Option<&'a Value>)> {
    let find = |side: &'a [Value], name: &str| side.iter().find(|e| text(e, key) == Some(name));
    let theirs = reference.iter().filter_map(|r| text(r, key).map(|name| (name, find(ours, name), Some(r))));
    let more = ours
        .iter()
        .filter_map(|o| text(o, key).map(|name| (name, Some(o), None)))
        .filter(|(name, ..)| find(reference, name).is_none());
    theirs.chain(more).collect()
}

fn presence(ours: Option<&Value>, reference: Option<&Value>) -> Status {
    match (ours, reference) {
        (Some(_), Some(_)) => Status::Covered,
        (None, _) => Status::Missing,
        (_, None) => Status::Extra,
    }
}

/// What a value of the type looks like in JSON.
fn json_type(entity: &Value) -> &str {
    match text(entity, "meta-type") {
        Some("builtin") => text(entity, "json-type").unwrap_or_default(),
        Some("enum") => "string",
        Some(other) => other,
        None => "",
    }
}

fn describe(entity: &Value) -> String {
    match text(entity, "meta-type") {
        Some("builtin") => text(entity, "name").unwrap_or_default().to_owned(),
        other => other.unwrap_or_default().to_owned(),
    }
}

impl Coverage {
    /// The lines of one sort with one status; the reason of a mismatch makes no difference.
    pub fn of(&self, kind: Kind, status: &Status) -> impl Iterator<Item = &Entry> {
        let wanted = std::mem::discriminant(status);
        self.entries.iter().filter(move |e| e.kind == kind && std::mem::discriminant(&e.status) == wanted)
    }

    /// The lines whose sides differ: what has to be explained or corrected.
    pub fn mismatches(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter().filter(|e| matches!(e.status, Status::Mismatched(_)))
    }

    /// The numbers, and below them what is missing, more and different in each command and event: Markdown.
    pub fn to_markdown(&self) -> String {
        let mut out = String::from("| | covered | missing | extra | mismatched |\n|---|---:|---:|---:|---:|\n");
        let statuses = [Status::Covered, Status::Missing, Status::Extra, Status::Mismatched(String::new())];
        for kind in Kind::ALL {
            let [covered, missing, extra, different] = statuses.each_ref().map(|s| self.of(kind, s).count());
            // Writing to a String cannot fail.
            let _ = writeln!(out, "| {} | {covered} | {missing} | {extra} | {different} |", kind.heading());
        }
        for (heading, kind, status) in [
            ("Missing commands", Kind::Command, Status::Missing),
            ("Missing events", Kind::Event, Status::Missing),
            ("Commands of our own", Kind::Command, Status::Extra),
            ("Events of our own", Kind::Event, Status::Extra),
        ] {
            let names: Vec<_> = self.of(kind, &status).map(|e| format!("`{}`", e.owner)).collect();
            if !names.is_empty() {
                let _ = write!(out, "\n{heading}: {}.\n", names.join(", "));
            }
        }
        let mut owner = "";
        let mut open_group = None;
        for entry in self.entries.iter().filter(|e| !e.path.is_empty() && e.status != Status::Covered) {
            // Values and variants of one type share a line.
            let (group, name) = match (entry.kind, entry.path.rsplit_once('=')) {
                (Kind::Value | Kind::Variant, Some((group, name))) => (group, Some(name)),
                _ => (entry.path.as_str(), None),
            };
            let status = match &entry.status {
                Status::Covered => "covered",
                Status::Missing => "missing",
                Status::Extra => "extra",
                Status::Mismatched(why) => why,
            };
            let key = (entry.owner.as_str(), group, status);
            if let Some(name) = name
                && open_group == Some(key)
            {
                let _ = write!(out, ", `{name}`");
                continue;
            }
            if open_group.take().is_some() {
                out.push('\n');
            }
            if entry.owner != owner {
                owner = &entry.owner;
                let _ = write!(out, "\n### {owner}\n\n");
            }
            match name {
                Some(name) => {
                    let _ = write!(out, "- `{group}`: {status} `{name}`");
                    open_group = Some(key);
                }
                None => {
                    let _ = writeln!(out, "- `{group}`: {status}");
                }
            }
        }
        if open_group.is_some() {
            out.push('\n');
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn schema(members: Value, more: Value) -> Value {
        let mut list = vec![
            json!({"name": "c", "meta-type": "command", "arg-type": "0", "ret-type": "0"}),
            json!({"name": "0", "meta-type": "object", "members": members}),
            json!({"name": "str", "meta-type": "builtin", "json-type": "string"}),
            json!({"name": "int", "meta-type": "builtin", "json-type": "int"}),
        ];
        list.extend(more.as_array().cloned().unwrap_or_default());
        Value::Array(list)
    }

    fn lines(coverage: &Coverage) -> Vec<String> {
        coverage.entries.iter().map(|e| format!("{:?} {} {} {:?}", e.kind, e.owner, e.path, e.status)).collect()
    }

    #[test]
    fn names_of_types_make_no_difference() {
        let ours = schema(
            json!([{"name": "x", "type": "7"}]),
            json!([{"name": "7", "meta-type": "enum", "members": [{"name": "a"}]}]),
        );
        let reference = schema(
            json!([{"name": "x", "type": "9"}]),
            json!([{"name": "9", "meta-type": "enum", "members": [{"name": "a"}]}]),
        );
        let coverage = compare(&ours, &reference);
        assert!(coverage.entries.iter().all(|e| e.status == Status::Covered), "{:?}", lines(&coverage));
        assert!(lines(&coverage).contains(&"Value c arguments.x=a Covered".to_owned()));
    }

    #[test]
    fn differences_are_named() {
        let ours = schema(
            json!([{"name": "x", "type": "7"}, {"name": "y", "type": "str", "default": null}, {"name": "u", "type": "int"},
                {"name": "new", "type": "str"}]),
            json!([{"name": "7", "meta-type": "alternate", "members": [{"type": "str"}, {"type": "int"}]},
                {"name": "own", "meta-type": "event", "arg-type": "0"}]),
        );
        let reference = schema(
            json!([{"name": "x", "type": "str"}, {"name": "y", "type": "str", "features": ["deprecated"]},
                {"name": "u", "type": "str"}, {"name": "old", "type": "str"}]),
            json!([{"name": "gone", "meta-type": "command", "arg-type": "0", "ret-type": "0"}]),
        );
        let coverage = compare(&ours, &reference);
        let lines = lines(&coverage);
        for line in [
            "Command gone  Missing",
            "Event own  Extra",
            "Member c arguments.x Covered",
            "Member c arguments.y Covered",
            "Feature c arguments.y deprecated Missing",
            "Member c arguments.u Mismatched(\"int instead of str\")",
            "Member c arguments.old Missing",
            "Member c arguments.new Extra",
            "Member c return.x Mismatched(\"alternate instead of builtin\")",
            "Member c return.y Mismatched(\"optional\")",
        ] {
            let line = line.replace("alternate instead of builtin", "alternate instead of str");
            assert!(lines.contains(&line), "{line} is not in {lines:#?}");
        }
        assert_eq!(coverage.mismatches().count(), 4);
        let markdown = coverage.to_markdown();
        assert!(markdown.contains("| Commands | 1 | 1 | 0 | 0 |"), "{markdown}");
        assert!(markdown.contains("Missing commands: `gone`."), "{markdown}");
        assert!(markdown.contains("- `arguments.old`: missing"), "{markdown}");
    }

    #[test]
    fn recursion_ends_and_nonsense_is_empty() {
        let more = json!([{"name": "1", "meta-type": "object", "members": [{"name": "next", "type": "1"}]}]);
        let both = schema(json!([{"name": "x", "type": "1"}]), more);
        assert!(compare(&both, &both).mismatches().next().is_none());
        assert!(compare(&json!(1), &json!({"a": []})).entries.is_empty());
    }
}
