//! What the derive macro makes of the different sorts of types, and the messages for wrong values.
#![allow(missing_docs, clippy::expect_used)]

use qapi::{
    Command, Event, Null, Qapi, Size, Value,
    def::{Item, Kind},
};
use serde_json::json;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Qapi)]
enum Locking {
    Auto,
    On,
    /// The old way.
    #[qapi(rename = "OFF", deprecated)]
    Off,
}

#[derive(Debug, Clone, PartialEq, Qapi, Default)]
struct Cache {
    #[qapi(default)]
    direct: bool,
    no_flush: Option<bool>,
}

#[derive(Debug, Clone, PartialEq, Qapi)]
struct Base {
    node_name: Option<String>,
    cache: Option<Cache>,
}

/// A file.
#[derive(Debug, Clone, PartialEq, Qapi)]
#[qapi(name = "BlockdevOptionsFile", feature = "dynamic-auto-read-only")]
struct File {
    filename: String,
    #[qapi(default = Locking::Auto)]
    locking: Locking,
    to: Option<u16>,
}

#[derive(Debug, Clone, PartialEq, Qapi)]
struct Raw {
    file: Ref,
    children: Option<Vec<Ref>>,
    offset: Option<i64>,
    size: Option<Size>,
    time: Option<u64>,
}

/// Which driver.
#[derive(Debug, Clone, PartialEq, Qapi)]
#[qapi(variants, tag_enum = "Kinds")]
enum Driver {
    /// Files.
    File(File),
    Raw(Box<Raw>),
    #[qapi(rename = "null_co", unstable)]
    NullCo,
}

/// A node.
#[derive(Debug, Clone, PartialEq, Qapi)]
#[qapi(command = "blockdev-add", returns = "Vec<String>", unstable)]
struct Options {
    #[qapi(flatten)]
    base: Base,
    /// The driver.
    #[qapi(variants)]
    driver: Driver,
    read_only: Option<bool>,
}

#[derive(Debug, Clone, PartialEq, Qapi)]
#[qapi(alternate)]
enum Ref {
    Definition(Box<Options>),
    Reference(String),
    Nothing(Null),
}

#[derive(Debug, Clone, PartialEq, Qapi)]
#[qapi(event = "GONE")]
struct Gone {
    id: String,
    rate: f64,
    any: Value,
}

fn error<T: Qapi + std::fmt::Debug>(value: Value) -> String {
    T::from_value(&value).expect_err("it is wrong").to_string()
}

fn keyval_error<T: Qapi + std::fmt::Debug>(value: Value) -> String {
    T::from_keyval(&value).expect_err("it is wrong").to_string()
}

#[test]
fn a_union_in_an_alternate_in_a_union_survives_the_round_trip() {
    let value = json!({
        "node-name": "a",
        "driver": "raw",
        "read-only": true,
        "file": { "driver": "file", "filename": "x", "locking": "OFF" },
        "children": ["b", null, { "driver": "null_co" }],
        "offset": -1,
        "size": 18446744073709551615u64,
    });
    let options = Options::from_value(&value).expect("all is well");
    assert_eq!(options.to_value().to_string(), value.to_string(), "members keep the order of the definition");
    let Driver::Raw(raw) = &options.driver else { panic!("not raw") };
    assert_eq!(raw.size, Some(Size(u64::MAX)));
    let Ref::Definition(file) = &raw.file else { panic!("no definition") };
    assert_eq!(file.driver, Driver::File(File { filename: "x".into(), locking: Locking::Off, to: None }));
    assert_eq!(qapi::Variants::tag(&options.driver), Kinds::Raw);
    assert_eq!(Kinds::ALL.iter().map(Kinds::as_str).collect::<Vec<_>>(), ["file", "raw", "null_co"]);
}

#[test]
fn messages_name_the_member_by_its_path() {
    for (value, text) in [
        (json!({}), "Parameter 'driver' is missing"),
        (json!([]), "Invalid parameter type, expected: object"),
        (json!({"driver": 1}), "Invalid parameter type for 'driver', expected: string"),
        (json!({"driver": "foo"}), "Parameter 'driver' does not accept value 'foo'"),
        (json!({"driver": "null_co", "x": 1}), "Parameter 'x' is unexpected"),
        (json!({"driver": "null_co", "cache": 1}), "Invalid parameter type for 'cache', expected: object"),
        (json!({"driver": "null_co", "cache": {"x": 1}}), "Parameter 'cache.x' is unexpected"),
        (
            json!({"driver": "null_co", "cache": {"direct": 1}}),
            "Invalid parameter type for 'cache.direct', expected: boolean",
        ),
        (json!({"driver": "raw", "file": 1}), "Invalid parameter type for 'file', expected: Ref"),
        (json!({"driver": "raw", "file": {}}), "Parameter 'file.driver' is missing"),
        (json!({"driver": "raw", "file": {"driver": "file"}}), "Parameter 'file.filename' is missing"),
        (
            json!({"driver": "raw", "file": {"driver": "file", "filename": "x", "locking": 1}}),
            "Invalid parameter type for 'file.locking', expected: string",
        ),
        (
            json!({"driver": "raw", "file": {"driver": "file", "filename": "x", "locking": "z"}}),
            "Parameter 'file.locking' does not accept value 'z'",
        ),
        (
            json!({"driver": "raw", "file": "a", "children": "b"}),
            "Invalid parameter type for 'children', expected: array",
        ),
        (
            json!({"driver": "raw", "file": "a", "children": ["b", 1]}),
            "Invalid parameter type for 'children[1]', expected: Ref",
        ),
        (
            json!({"driver": "raw", "file": "a", "children": [{"driver": "file"}]}),
            "Parameter 'children[0].filename' is missing",
        ),
        (
            json!({"driver": "raw", "file": "a", "offset": 1.0}),
            "Invalid parameter type for 'offset', expected: integer",
        ),
        (
            json!({"driver": "raw", "file": "a", "offset": 18446744073709551615u64}),
            "Invalid parameter type for 'offset', expected: integer",
        ),
        (json!({"driver": "raw", "file": "a", "time": 1.5}), "Parameter 'time' expects uint64"),
        (json!({"driver": "raw", "file": "a", "time": -1}), "Parameter 'time' expects uint64"),
        (json!({"driver": "raw", "file": "a", "size": "1"}), "Parameter 'size' expects uint64"),
        (json!({"driver": "file", "filename": "x", "to": 65536}), "Parameter 'to' expects uint16_t"),
        (json!({"driver": "file", "filename": "x", "to": "1"}), "Invalid parameter type for 'to', expected: integer"),
    ] {
        assert_eq!(error::<Options>(value.clone()), text, "{value}");
    }
}

#[test]
fn on_the_command_line_scalars_are_strings() {
    let value = json!({
        "driver": "raw", "read-only": "y", "cache": {"direct": "off"}, "file": "a", "offset": "0x10", "time": " +010", "size": "1.5k",
    });
    let options = Options::from_keyval(&value).expect("all is well");
    assert_eq!(
        options.to_value(),
        json!({
            "driver": "raw", "read-only": true, "cache": {"direct": false}, "file": "a", "offset": 16, "time": 8, "size": 1536,
        })
    );
    for (value, text) in [
        (json!({"driver": "null_co", "read-only": "1"}), "Parameter 'read-only' expects 'on' or 'off'"),
        (json!({"driver": "null_co", "cache": "1"}), "Invalid parameter type for 'cache', expected: object"),
        (json!({"driver": "null_co", "cache": {"direct": {"x": "1"}}}), "Parameters 'cache.direct.*' are unexpected"),
        (json!({"driver": "null_co", "foo": {"x": "1"}}), "Parameter 'foo' is unexpected"),
        (json!({"driver": "raw", "file": ["a"]}), "Invalid parameter type for 'file', expected: Ref"),
        (json!({"driver": "raw", "file": "a", "offset": "09"}), "Parameter 'offset' expects integer"),
        (json!({"driver": "raw", "file": "a", "offset": "1K"}), "Parameter 'offset' expects integer"),
        (json!({"driver": "raw", "file": "a", "offset": "18446744073709551615"}), "Parameter 'offset' expects integer"),
        (json!({"driver": "raw", "file": "a", "time": "18446744073709551616"}), "Parameter 'time' expects integer"),
        (json!({"driver": "raw", "file": "a", "size": "1x"}), "Parameter 'size' expects size"),
        (json!({"driver": "file", "filename": "x", "to": "65536"}), "Parameter 'to' expects uint16_t"),
        (
            json!({"driver": "raw", "file": "a", "children": ["b", {"driver": "file"}]}),
            "Parameter 'children.1.filename' is missing",
        ),
    ] {
        assert_eq!(keyval_error::<Options>(value.clone()), text, "{value}");
    }
}

#[test]
fn definitions_carry_what_introspection_needs() {
    let def = Options::def();
    let members: Vec<_> = def.members().iter().map(|m| (m.name, m.optional)).collect();
    assert_eq!(members, [("node-name", true), ("cache", true), ("driver", false), ("read-only", true)]);
    assert!(def.features.is_empty(), "they are the command's");
    let variants = def.variants().expect("it is a union");
    assert_eq!((variants.tag.name, variants.tag.doc), ("driver", "The driver."));
    assert_eq!((variants.cases)().iter().map(|c| c.ty.is_some()).collect::<Vec<_>>(), [true, true, false]);
    assert_eq!((File::def().name, File::def().doc), ("BlockdevOptionsFile", "A file."));
    assert_eq!(File::def().features, ["dynamic-auto-read-only"]);
    assert_eq!(Kinds::def().doc, "Which driver.");
    assert_eq!(Kinds::def().values()[2].features, ["unstable"]);
    let Kind::Object([_, Item::Member(locking), _]) = &File::def().kind else { panic!("no object") };
    assert_eq!(locking.default.map(|value| value()), Some(json!("auto")));
    assert_eq!(Locking::def().values()[2].doc, "The old way.");

    let command = Options::command();
    assert_eq!((command.name, command.doc, command.features), (Options::NAME, "A node.", &["unstable"][..]));
    assert_eq!((Gone::event().name, Gone::NAME), ("GONE", "GONE"));
}

#[test]
fn enums_and_events_read_and_write() {
    assert_eq!("OFF".parse::<Locking>().expect("a value"), Locking::Off);
    assert_eq!(
        "x".parse::<Locking>().expect_err("no value").to_string(),
        "'x' is not a value of Locking, expected one of: auto, on, OFF"
    );
    let gone = Gone { id: "e".into(), rate: 0.5, any: json!([1]) };
    assert_eq!(gone.to_value(), json!({"id": "e", "rate": 0.5, "any": [1]}));
    assert_eq!(Gone::from_value(&gone.to_value()).expect("the same"), gone);
}

#[test]
fn nesting_stops_before_the_stack_does() {
    let mut value = json!("a");
    for _ in 0..1000 {
        value = json!({"driver": "raw", "file": value});
    }
    let text = std::thread::Builder::new()
        .stack_size(1 << 20)
        .spawn(move || error::<Options>(value))
        .expect("a thread")
        .join()
        .expect("no overflow");
    assert!(text.ends_with("is nested too deeply"), "{text}");
}
