//! Properties that hold for every type: what the definition allows is read and written alike, in JSON and on the command
//! line; and nothing that comes in makes a reader panic.
#![allow(missing_docs, clippy::expect_used, clippy::panic)]

use proptest::{collection::vec, prelude::*};
use qapi::{
    Map, Object, Qapi, Value,
    def::{Builtin, Item, Kind, TypeDef},
    keyval::{self, Parsed},
    opts,
    types::{block, block_query, chardev, control, export, introspect, qom},
};

/// A source of decisions that proptest can shrink.
struct Entropy<'a>(std::slice::Iter<'a, u32>);

impl Entropy<'_> {
    fn below(&mut self, limit: usize) -> usize {
        let next = self.0.next().copied().unwrap_or(0);
        usize::try_from(next).unwrap_or(0).checked_rem(limit).unwrap_or(0)
    }
}

/// A value that the definition allows. `text` keeps to what the command line form can say.
fn value_of(def: &TypeDef, entropy: &mut Entropy<'_>, text: bool, depth: usize) -> Value {
    match &def.kind {
        Kind::Builtin(Builtin::Str) => ["", "a", "b,c", "{", "é=x", "on", "7", "a.b"][entropy.below(8)].into(),
        // Every width holds these.
        Kind::Builtin(Builtin::Int | Builtin::Size) => Value::from(entropy.below(128)),
        Kind::Builtin(Builtin::Number) => Value::from(0.5),
        Kind::Builtin(Builtin::Bool) => Value::Bool(entropy.below(2) == 1),
        Kind::Builtin(Builtin::Null) => Value::Null,
        Kind::Builtin(Builtin::Any) if text => "any".into(),
        Kind::Builtin(Builtin::Any) => serde_json::json!([1, {"x": null}]),
        Kind::Enum(values) => values[entropy.below(values.len())].name.into(),
        Kind::Array(of) => {
            let length = entropy.below(3) + usize::from(text);
            Value::Array((0..length).map(|_| value_of(of(), entropy, text, depth + 1)).collect())
        }
        Kind::Alternate(branches) => {
            // The last branch of an alternate that contains itself is the end of the recursion.
            let branch = if depth > 3 { branches.len() - 1 } else { entropy.below(branches.len()) };
            value_of((branches[branch].ty)(), entropy, text, depth + 1)
        }
        Kind::Object(_) => {
            let mut map = Map::new();
            members_of(def, entropy, text, depth, &mut map);
            Value::Object(map)
        }
    }
}

fn members_of(def: &TypeDef, entropy: &mut Entropy<'_>, text: bool, depth: usize, map: &mut Map<String, Value>) {
    let Kind::Object(items) = &def.kind else { panic!("{} is no object", def.name) };
    for item in *items {
        match item {
            Item::Flatten(base) => members_of(base(), entropy, text, depth, map),
            Item::Member(member) => {
                if member.optional && (depth > 3 || entropy.below(2) == 0) {
                    continue;
                }
                let value = value_of((member.ty)(), entropy, text, depth + 1);
                // The command line has no empty object.
                if text && value.as_object().is_some_and(Map::is_empty) {
                    continue;
                }
                map.insert(member.name.to_owned(), value);
            }
            Item::Variants(variants) => {
                let cases = (variants.cases)();
                let case = &cases[entropy.below(cases.len())];
                map.insert(variants.tag.name.to_owned(), case.name.into());
                if let Some(ty) = case.ty {
                    members_of(ty(), entropy, text, depth, map);
                }
            }
        }
    }
}

/// The value as a command line argument.
fn as_text(value: &Value, path: &str, out: &mut Vec<String>) {
    let below = |key: &str| if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
    match value {
        Value::Object(map) => map.iter().for_each(|(key, value)| as_text(value, &below(key), out)),
        Value::Array(list) => {
            list.iter().enumerate().for_each(|(i, value)| as_text(value, &below(&i.to_string()), out))
        }
        Value::String(text) => out.push(format!("{path}={}", text.replace(',', ",,"))),
        Value::Bool(on) => out.push(format!("{path}={}", if *on { "on" } else { "off" })),
        other => out.push(format!("{path}={other}")),
    }
}

/// Everything in `part` is also in `whole`: a value that was read and written again may have gained defaults.
fn contains(whole: &Value, part: &Value) -> bool {
    match (whole, part) {
        (Value::Object(whole), Value::Object(part)) => {
            part.iter().all(|(key, value)| whole.get(key).is_some_and(|there| contains(there, value)))
        }
        (Value::Array(whole), Value::Array(part)) => {
            whole.len() == part.len() && whole.iter().zip(part).all(|(whole, part)| contains(whole, part))
        }
        _ => whole == part,
    }
}

fn survives<T: Object>(entropy: &[u32]) {
    let value = value_of(T::def(), &mut Entropy(entropy.iter()), false, 0);
    let written = T::from_value(&value).unwrap_or_else(|e| panic!("{value}: {e}")).to_value();
    assert!(contains(&written, &value), "{value} became {written}");
    let again = T::from_value(&written).unwrap_or_else(|e| panic!("{written}: {e}")).to_value();
    assert_eq!(written.to_string(), again.to_string());
}

/// Whether a null stands anywhere: the command line has no way to write one.
fn has_null(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Object(map) => map.values().any(has_null),
        Value::Array(list) => list.iter().any(has_null),
        _ => false,
    }
}

fn reads_alike<T: Object>(entropy: &[u32]) {
    let value = value_of(T::def(), &mut Entropy(entropy.iter()), true, 0);
    if has_null(&value) {
        return;
    }
    let from_json = T::from_value(&value).unwrap_or_else(|e| panic!("{value}: {e}")).to_value();
    let mut pairs = Vec::new();
    as_text(&value, "", &mut pairs);
    let text = pairs.join(",");
    let Ok(Parsed::Keyval(parsed)) = keyval::parse(&text, None) else { panic!("{text}") };
    let from_text = T::from_keyval(&parsed).unwrap_or_else(|e| panic!("{text}: {e}")).to_value();
    assert_eq!(from_json, from_text, "{text}");
}

fn any_json() -> impl Strategy<Value = Value> {
    let key = prop_oneof![
        Just("driver"),
        Just("file"),
        Just("node-name"),
        Just("cache"),
        Just("type"),
        Just("data"),
        Just("addr"),
        Just("x")
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        prop_oneof![Just("raw"), Just("file"), Just("unix"), Just("nbd"), Just("")].prop_map(Value::from),
        ".{0,8}".prop_map(Value::from),
    ];
    leaf.prop_recursive(5, 40, 6, move |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Value::Array),
            vec((key.clone(), inner), 0..6)
                .prop_map(|pairs| Value::Object(pairs.into_iter().map(|(k, v)| (k.to_owned(), v)).collect())),
        ]
    })
}

fn try_everything(value: &Value) {
    macro_rules! each {
        ($($ty:ty),*) => { $( let _ = <$ty>::from_value(value); let _ = <$ty>::from_keyval(value); )* };
    }
    each!(
        block::BlockdevOptions,
        block_query::BlockStats,
        chardev::ChardevAdd,
        control::MonitorOptions,
        export::BlockExportOptions,
        export::NbdServerOptions,
        export::NbdServerOptionsLegacy,
        introspect::SchemaInfo,
        qom::ObjectOptions
    );
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_written_reads_back(entropy in vec(any::<u32>(), 0..64)) {
        survives::<block::BlockdevOptions>(&entropy);
        survives::<block::BlockIoError>(&entropy);
        survives::<block_query::BlockStats>(&entropy);
        survives::<block_query::BlockDeviceInfo>(&entropy);
        survives::<chardev::ChardevAdd>(&entropy);
        survives::<export::BlockExportOptions>(&entropy);
        survives::<export::NbdServerOptionsLegacy>(&entropy);
        survives::<introspect::SchemaInfo>(&entropy);
        survives::<qom::QomSet>(&entropy);
    }

    #[test]
    fn the_command_line_says_the_same_as_json(entropy in vec(any::<u32>(), 0..64)) {
        reads_alike::<block::BlockdevOptions>(&entropy);
        reads_alike::<control::MonitorOptions>(&entropy);
        reads_alike::<export::BlockExportOptions>(&entropy);
        reads_alike::<export::NbdServerOptions>(&entropy);
        reads_alike::<qom::ObjectOptions>(&entropy);
    }

    #[test]
    fn no_json_is_too_strange(value in any_json()) {
        try_everything(&value);
    }

    #[test]
    fn no_text_is_too_strange(text in "([a-c0-2]{0,3}[.,=?]{0,2}){0,12}|\\PC{0,40}|.{0,40}") {
        for implied in [None, Some("driver")] {
            if let Ok(Parsed::Keyval(value) | Parsed::Help(value)) = keyval::parse(&text, implied) {
                try_everything(&value);
            }
        }
        let _ = opts::chardev(&text);
        let _ = opts::chardev(&format!("socket,id=a,{text}"));
        let _ = keyval::read::<block::BlockdevOptions>(&text, Some("driver"), |_| Ok(Value::Null));
        let _ = keyval::read::<export::BlockExportOptions>(&format!("nbd,help,{text}"), Some("type"), |_| Ok(Value::Null));
    }
}
