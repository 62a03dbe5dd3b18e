//! The reference manual of the control interface, made from the definitions: as data, as Markdown and as a manual page.
//!
//! It describes what a [`Schema`] lists, in that order, and below it every type in use. The texts are the doc comments of
//! the definitions.

use std::{collections::BTreeMap, fmt::Write as _};

use crate::{
    Value,
    def::{Kind, Member, TypeDef},
    schema::Schema,
};

/// The manual as data.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Manual {
    /// The commands in the order of the schema.
    pub commands: Vec<Entry>,
    /// The events in the order of the schema.
    pub events: Vec<Entry>,
    /// The types in alphabetical order.
    pub types: Vec<Entry>,
}

/// A command, an event or a type.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// Its documentation, Markdown.
    pub doc: String,
    /// Where it comes from, and its features.
    pub notes: Vec<String>,
    /// Its members, values or branches.
    pub rows: Vec<Row>,
    /// The member that selects a variant.
    pub tag: Option<String>,
    /// The variants, with the types whose members they bring.
    pub variants: Vec<Row>,
    /// What a command returns, unless that is nothing.
    pub returns: Option<Ty>,
}

/// A member, a value, a branch or a variant.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Row {
    /// Its name.
    pub name: String,
    /// Its type, if it has one.
    pub ty: Option<Ty>,
    /// Its documentation.
    pub doc: String,
    /// Whether it may be left out, its default, where it comes from, its features.
    pub notes: Vec<String>,
}

/// A type as it is referred to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ty {
    /// The name of the type, or of an array's elements.
    pub name: String,
    /// It is an array of that type.
    pub array: bool,
    /// It has an entry of its own.
    pub has_entry: bool,
}

impl Ty {
    fn of(def: &TypeDef) -> Ty {
        match def.kind {
            Kind::Array(of) => Ty { array: true, ..Ty::of(of()) },
            Kind::Builtin(_) => Ty { name: def.name.to_owned(), ..Ty::default() },
            _ => Ty { name: def.name.to_owned(), has_entry: true, ..Ty::default() },
        }
    }

    fn plain(&self) -> String {
        if self.array { format!("[{}]", self.name) } else { self.name.clone() }
    }

    fn markdown(&self) -> String {
        let name = match self.has_entry {
            true => format!("[{}](#{})", self.name, anchor(&self.name)),
            false => self.name.clone(),
        };
        if self.array { format!("array of {name}") } else { name }
    }
}

/// The anchor that Markdown readers give to a heading.
fn anchor(heading: &str) -> String {
    heading.to_lowercase()
}

fn notes(since: Option<&str>, features: &[&str]) -> Vec<String> {
    since.map(|since| format!("since {since}")).into_iter().chain(features.iter().map(|f| (*f).to_owned())).collect()
}

impl Row {
    fn of(member: &Member) -> Row {
        let mut marks = Vec::new();
        match (member.optional, member.default) {
            (true, Some(default)) => marks.push(match default() {
                Value::String(text) => format!("default {text}"),
                other => format!("default {other}"),
            }),
            (true, None) => marks.push("optional".to_owned()),
            (false, _) => {}
        }
        marks.extend(notes(member.since, member.features));
        Row { name: member.name.to_owned(), ty: Some(Ty::of((member.ty)())), doc: member.doc.to_owned(), notes: marks }
    }
}

impl Manual {
    /// The manual for what the schema lists.
    pub fn new(schema: &Schema) -> Manual {
        let mut types = BTreeMap::new();
        let mut manual = Manual::default();
        for command in schema.commands() {
            let (args, ret) = ((command.args)(), (command.ret)());
            let mut entry = Entry {
                name: command.name.to_owned(),
                doc: command.doc.to_owned(),
                notes: notes(command.since, command.features),
                ..Entry::default()
            };
            contents(args, &mut entry, &mut types);
            if !matches!(ret.kind, Kind::Object([])) {
                gather(ret, &mut types);
                entry.returns = Some(Ty::of(ret));
            }
            manual.commands.push(entry);
        }
        for event in schema.events() {
            let mut entry = Entry {
                name: event.name.to_owned(),
                doc: event.doc.to_owned(),
                notes: notes(event.since, event.features),
                ..Entry::default()
            };
            contents((event.data)(), &mut entry, &mut types);
            manual.events.push(entry);
        }
        manual.types = types.into_values().collect();
        manual
    }

    /// The manual as Markdown, without a title.
    pub fn to_markdown(&self) -> String {
        let mut out = String::new();
        for (heading, entries) in [("Commands", &self.commands), ("Events", &self.events), ("Types", &self.types)] {
            let _ = write!(out, "## {heading}\n\n");
            for entry in entries {
                entry.markdown(&mut out);
            }
        }
        // One line feed at the end is enough.
        out.truncate(out.trim_end().len());
        out.push('\n');
        out
    }

    /// The manual as the sections of a manual page, without the page's header.
    pub fn to_roff(&self) -> String {
        let mut out = String::new();
        for (heading, entries) in [("COMMANDS", &self.commands), ("EVENTS", &self.events), ("TYPES", &self.types)] {
            let _ = writeln!(out, ".SH {heading}");
            for entry in entries {
                entry.roff(&mut out);
            }
        }
        out
    }
}

/// Fills in the members of a type, and gathers the types they use.
fn contents(def: &'static TypeDef, entry: &mut Entry, types: &mut BTreeMap<String, Entry>) {
    match &def.kind {
        Kind::Builtin(_) => {}
        Kind::Array(of) => gather(of(), types),
        Kind::Enum(values) => {
            entry.rows = values
                .iter()
                .map(|value| Row {
                    name: value.name.to_owned(),
                    ty: None,
                    doc: value.doc.to_owned(),
                    notes: notes(value.since, value.features),
                })
                .collect();
        }
        Kind::Alternate(branches) => {
            for branch in *branches {
                gather((branch.ty)(), types);
                entry.rows.push(Row {
                    name: branch.name.to_owned(),
                    ty: Some(Ty::of((branch.ty)())),
                    doc: branch.doc.to_owned(),
                    notes: Vec::new(),
                });
            }
        }
        Kind::Object(_) => {
            for member in def.members() {
                gather((member.ty)(), types);
                entry.rows.push(Row::of(member));
            }
            let Some(variants) = def.variants() else { return };
            entry.tag = Some(variants.tag.name.to_owned());
            for case in (variants.cases)() {
                let ty = case.ty.map(|ty| ty());
                if let Some(ty) = ty {
                    gather(ty, types);
                }
                entry.variants.push(Row {
                    name: case.name.to_owned(),
                    ty: ty.map(Ty::of),
                    doc: case.doc.to_owned(),
                    notes: notes(case.since, case.features),
                });
            }
        }
    }
}

/// Makes the entry of a type, if it has none yet.
fn gather(def: &'static TypeDef, types: &mut BTreeMap<String, Entry>) {
    match def.kind {
        Kind::Array(of) => gather(of(), types),
        Kind::Builtin(_) => {}
        _ if types.contains_key(def.name) => {}
        _ => {
            // First a place holder: the type may contain itself.
            types.insert(def.name.to_owned(), Entry::default());
            let mut entry = Entry {
                name: def.name.to_owned(),
                doc: def.doc.to_owned(),
                notes: notes(def.since, def.features),
                ..Entry::default()
            };
            contents(def, &mut entry, types);
            types.insert(def.name.to_owned(), entry);
        }
    }
}

impl Entry {
    fn markdown(&self, out: &mut String) {
        let _ = write!(out, "### {}\n\n", self.name);
        if !self.doc.is_empty() {
            let _ = write!(out, "{}\n\n", self.doc);
        }
        if !self.notes.is_empty() {
            let _ = write!(out, "*{}*\n\n", self.notes.join(", "));
        }
        let line = |row: &Row, out: &mut String| {
            let _ = write!(out, "- `{}`", row.name);
            if let Some(ty) = &row.ty {
                let _ = write!(out, ": {}", ty.markdown());
            }
            if !row.notes.is_empty() {
                let _ = write!(out, " *({})*", row.notes.join(", "));
            }
            if !row.doc.is_empty() {
                let _ = write!(out, " — {}", row.doc.replace('\n', " "));
            }
            out.push('\n');
        };
        for row in &self.rows {
            line(row, out);
        }
        if let Some(tag) = &self.tag {
            let _ = write!(out, "\nThe other members depend on `{tag}`:\n\n");
            for row in &self.variants {
                line(row, out);
            }
        }
        if !self.rows.is_empty() {
            out.push('\n');
        }
        if let Some(returns) = &self.returns {
            let _ = write!(out, "Returns {}.\n\n", returns.markdown());
        }
    }

    fn roff(&self, out: &mut String) {
        let _ = writeln!(out, ".SS {}", roff(&self.name));
        if !self.doc.is_empty() {
            let _ = writeln!(out, "{}", roff(&self.doc));
        }
        if !self.notes.is_empty() {
            let _ = write!(out, ".PP\n\\fI{}\\fR\n", roff(&self.notes.join(", ")));
        }
        let line = |row: &Row, out: &mut String| {
            let _ = write!(out, ".TP\n\\fB{}\\fR", roff(&row.name));
            if let Some(ty) = &row.ty {
                let _ = write!(out, ": {}", roff(&ty.plain()));
            }
            if !row.notes.is_empty() {
                let _ = write!(out, " \\fI({})\\fR", roff(&row.notes.join(", ")));
            }
            let _ = write!(out, "\n{}\n", roff(&row.doc));
        };
        for row in &self.rows {
            line(row, out);
        }
        if let Some(tag) = &self.tag {
            let _ = write!(out, ".PP\nThe other members depend on \\fB{}\\fR:\n", roff(tag));
            for row in &self.variants {
                line(row, out);
            }
        }
        if let Some(returns) = &self.returns {
            let _ = write!(out, ".PP\nReturns {}.\n", roff(&returns.plain()));
        }
    }
}

/// A text for a manual page: no Markdown code marks, no requests by accident, paragraphs as requests.
fn roff(text: &str) -> String {
    let escaped = text.replace('\\', "\\e").replace('-', "\\-").replace('`', "");
    let lines: Vec<_> = escaped
        .lines()
        .map(|line| match line {
            "" => ".PP".to_owned(),
            line if line.starts_with(['.', '\'']) => format!("\\&{line}"),
            line => line.to_owned(),
        })
        .collect();
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{block, control, export};

    #[test]
    fn the_manual_has_commands_members_and_types() {
        let schema = Schema::new()
            .command::<block::BlockdevOptions>()
            .command::<control::QueryVersion>()
            .event::<export::BlockExportDeleted>();
        let manual = Manual::new(&schema);
        assert_eq!(manual.commands[1].returns.as_ref().map(Ty::plain).as_deref(), Some("VersionInfo"));
        assert!(manual.types.iter().any(|entry| entry.name == "BlockdevRef"));
        let markdown = manual.to_markdown();
        for line in [
            "### blockdev-add\n",
            "*since 2.9*\n",
            "- `driver`: [BlockdevDriver](#blockdevdriver) — The driver.\n",
            "- `drop-cache`: bool *(default true, since 4.0)* — ",
            "The other members depend on `driver`:\n",
            "- `file`: [BlockdevOptionsFile](#blockdevoptionsfile) — A regular file.\n",
            "Returns [VersionInfo](#versioninfo).\n",
            "### BLOCK_EXPORT_DELETED\n",
            "### OnOffAuto\n",
        ] {
            assert!(markdown.contains(line), "{line} is not in\n{markdown}");
        }
        let roff = manual.to_roff();
        assert!(
            roff.contains(".SS blockdev\\-add\n") && roff.contains("\\fBnode\\-name\\fR: str \\fI(optional)\\fR\n")
        );
        assert!(roff.lines().all(|line| !line.starts_with('.') || [".SH", ".SS", ".TP", ".PP"].contains(&&line[..3])));
    }

    /// What has no documentation would be an empty line in the manual.
    #[test]
    fn everything_is_documented() {
        let schema = Schema::new()
            .command::<block::BlockdevOptions>()
            .command::<block::BlockResize>()
            .command::<crate::types::block_query::QueryBlock>()
            .command::<crate::types::block_query::QueryBlockstats>()
            .command::<crate::types::block_query::XDebugQueryBlockGraph>()
            .command::<crate::types::chardev::ChardevAdd>()
            .command::<control::QmpCapabilities>()
            .command::<control::QueryQmpSchema>()
            .command::<export::BlockExportOptions>()
            .command::<export::NbdServerOptionsLegacy>()
            .command::<crate::types::qom::ObjectOptions>()
            .event::<block::BlockIoError>();
        let manual = Manual::new(&schema);
        for entry in manual.commands.iter().chain(&manual.events).chain(&manual.types) {
            assert!(!entry.doc.is_empty(), "{}", entry.name);
            for row in entry.rows.iter().chain(&entry.variants) {
                assert!(!row.doc.is_empty(), "{}: {}", entry.name, row.name);
            }
        }
    }
}
