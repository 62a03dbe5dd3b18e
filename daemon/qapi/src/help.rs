//! What `help` in an option's argument prints, made from the definitions.
//!
//! The forms are the reference's: `List of user creatable objects:`, `iothread options:` with a line
//! `  name=<type>` for each member. Behind it stands the first sentence of the member's documentation.

use crate::{
    Value,
    def::{Item, Kind, Member, TypeDef},
};

/// Help about a type. If it is a union and `chosen` has a value for its tag, help about that variant.
pub fn of_type(def: &TypeDef, chosen: &Value) -> String {
    let Some(variants) = def.variants() else { return options(def) };
    let tag = variants.tag.name;
    let cases = (variants.cases)();
    if let Some(name) = chosen.get(tag).and_then(Value::as_str)
        && let Some(case) = cases.iter().find(|case| case.name == name)
    {
        let mut out = format!("{name} options:\n");
        if let Some(ty) = case.ty {
            members(ty(), "", &mut out);
        }
        let mut common = String::new();
        members(def, "", &mut common);
        if !common.is_empty() {
            out.push_str("Common options:\n");
            out.push_str(&common);
        }
        return out;
    }
    // Programs read the list of objects: it has names and nothing else.
    if tag == "qom-type" {
        let names = cases.iter().map(|case| line(case.name, "", None));
        return std::iter::once("List of user creatable objects:\n".to_owned()).chain(names).collect();
    }
    let names = cases.iter().map(|case| line(case.name, summary(case.doc), None));
    std::iter::once(format!("Possible values of '{tag}':\n")).chain(names).collect()
}

/// The members of a type, one a line.
fn options(def: &TypeDef) -> String {
    let mut out = "Options:\n".to_owned();
    members(def, "", &mut out);
    out
}

/// The lines for the members of an object, in alphabetical order as in the reference. Objects that are members show theirs,
/// dotted; a union shows its tag, and help about it has to be asked for with a value.
fn members(def: &TypeDef, prefix: &str, out: &mut String) {
    let mut lines = Vec::new();
    collect(def, prefix, &mut lines);
    lines.sort();
    out.extend(lines.into_iter().map(|(_, line)| line));
}

fn collect(def: &TypeDef, prefix: &str, lines: &mut Vec<(String, String)>) {
    let Kind::Object(items) = &def.kind else { return };
    for item in *items {
        match item {
            Item::Flatten(base) => collect(base(), prefix, lines),
            // The tag at the top is what the user already chose.
            Item::Variants(variants) if !prefix.is_empty() => lines.push(member(&variants.tag, prefix)),
            Item::Variants(_) => {}
            Item::Member(m) => {
                let ty = (m.ty)();
                match ty.kind {
                    Kind::Object(_) => collect(ty, &format!("{prefix}{}.", m.name), lines),
                    _ => lines.push(member(m, prefix)),
                }
            }
        }
    }
}

fn member(member: &Member, prefix: &str) -> (String, String) {
    let ty = (member.ty)();
    let suffix = if matches!(ty.kind, Kind::Array(_)) { ".0" } else { "" };
    let name = format!("{prefix}{}{suffix}", member.name);
    let default = member.default.map(|value| match value() {
        Value::String(text) => text,
        Value::Bool(on) => if on { "on" } else { "off" }.to_owned(),
        other => other.to_string(),
    });
    let text = line(&format!("{name}=<{}>", type_name(ty)), summary(member.doc), default.as_deref());
    (name, text)
}

fn line(what: &str, summary: &str, default: Option<&str>) -> String {
    let default = default.map(|value| format!(" (default: {value})")).unwrap_or_default();
    match summary.is_empty() && default.is_empty() {
        true => format!("  {what}\n"),
        // A terminal has no use for the marks of Markdown.
        false => format!("  {what:<22} - {}{default}\n", summary.replace('`', "").replace('\n', " ")),
    }
}

/// What to write for a value of the type.
fn type_name(def: &TypeDef) -> String {
    match &def.kind {
        Kind::Builtin(_) => def.name.to_owned(),
        Kind::Enum(values) => values.iter().map(|v| v.name).collect::<Vec<_>>().join("|"),
        Kind::Array(of) => type_name(of()),
        Kind::Object(_) | Kind::Alternate(_) => def.name.to_owned(),
    }
}

/// The first sentence of a documentation.
pub(crate) fn summary(doc: &str) -> &str {
    let paragraph = doc.split("\n\n").next().unwrap_or_default();
    let end = paragraph.find(". ").or_else(|| paragraph.find(".\n")).unwrap_or(paragraph.len());
    let sentence = paragraph.get(..end).unwrap_or_default();
    sentence.trim_end_matches('.')
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Qapi,
        types::{block::BlockdevOptions, export::NbdServerOptions, qom::ObjectOptions},
    };
    use serde_json::json;

    #[test]
    fn help_names_values_and_members() {
        let list = of_type(ObjectOptions::def(), &json!({"qom-type": "foo"}));
        // As the reference prints it.
        let names = crate::types::qom::ObjectType::ALL.iter().map(|ty| format!("  {ty}\n"));
        assert_eq!(list, format!("List of user creatable objects:\n{}", names.collect::<String>()));
        let iothread = of_type(ObjectOptions::def(), &json!({"qom-type": "iothread"}));
        assert!(iothread.starts_with("iothread options:\n  "), "{iothread}");
        let file = of_type(BlockdevOptions::def(), &json!({"driver": "file"}));
        for line in
            ["file options:\n", "  locking=<auto|on|off>  - ", "Common options:\n", "  cache.direct=<bool>    - "]
        {
            assert!(file.contains(line), "{line} is not in\n{file}");
        }
        assert!(!file.contains('`'), "{file}");
        let server = of_type(NbdServerOptions::def(), &json!({}));
        assert!(server.starts_with("Options:\n  addr.type=<inet|unix|vsock|fd> - "), "{server}");
        assert!(server.contains("(default: 100)\n"), "{server}");
    }

    #[test]
    fn a_summary_is_the_first_sentence() {
        for (doc, first) in
            [("One. Two.", "One"), ("One.", "One"), ("One.\nTwo.", "One"), ("One\n\nTwo.", "One"), ("", "")]
        {
            assert_eq!(summary(doc), first, "{doc}");
        }
    }
}
