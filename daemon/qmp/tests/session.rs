//! What a session owes its client whatever the bytes: order, bounds, ids, and that it does not matter how the bytes
//! were cut up on their way.

#![allow(clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

use proptest::prelude::*;
use qapi::Error;
use qmp::session::{HIGH_WATER, MAX_EVENT_BYTES, MAX_QUEUED};
use qmp::{Event, Parser, Session, Settings, Style, Timestamp};
use serde_json::{Map, Value, json};

fn session() -> Session {
    Session::new(Settings {
        version: json!({"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": ""}),
        oob: true,
        style: Style::Compact,
        is_command: |name| name == "query-version",
    })
}

fn negotiated() -> Session {
    let mut session = session();
    feed(&mut session, br#"{"execute": "qmp_capabilities"}"#);
    let lines = take(&mut session);
    assert_eq!(lines.last(), Some(&json!({"return": {}})));
    session
}

fn feed(session: &mut Session, mut bytes: &[u8]) {
    session.input(&mut bytes);
    assert!(bytes.is_empty(), "the session took everything");
}

/// All output so far as messages.
fn take(session: &mut Session) -> Vec<Value> {
    let mut text = Vec::new();
    while !session.output().is_empty() {
        let part = session.output().to_vec();
        session.sent(part.len());
        text.extend(part);
    }
    let text = String::from_utf8(text).expect("the output is ASCII");
    assert!(text.is_empty() || text.ends_with("\r\n"), "{text:?}");
    text.lines().map(|line| serde_json::from_str(line).expect(line)).collect()
}

/// Executes whatever there is: a command returns its own name.
fn run(session: &mut Session) {
    while let Some(request) = session.next_request() {
        let result = match request.name.as_str() {
            "fail" => Err(Error::device_not_active("no such job")),
            name => Ok(json!({"name": name, "arguments": request.arguments})),
        };
        session.reply(result);
    }
}

fn event(size: usize) -> Event {
    let mut data = Map::new();
    data.insert("id".into(), Value::from("x".repeat(size)));
    Event { name: "JOB_STATUS_CHANGE", timestamp: Timestamp { seconds: 1, microseconds: 2 }, data }
}

#[test]
fn greeting_negotiation_commands() {
    let mut session = session();
    let greeting = take(&mut session);
    assert_eq!(
        greeting,
        [json!({"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": ""},
                        "capabilities": ["oob"]}})]
    );
    session.event(&event(1));
    feed(
        &mut session,
        br#"{"execute":"foo","id":1} {"execute":"qmp_capabilities","arguments":{"enable":["no"]}}
            {"execute":"qmp_capabilities","id":2}{"execute":"foo","arguments":{"a":[1]},"id":3}{"execute":"fail"}"#,
    );
    session.event(&event(1));
    run(&mut session);
    let expected = [
        json!({"id": 1, "error": {"class": "CommandNotFound",
                                  "desc": "Expecting capabilities negotiation with 'qmp_capabilities'"}}),
        json!({"error": {"class": "GenericError", "desc": "Parameter 'enable[0]' does not accept value 'no'"}}),
        json!({"return": {}, "id": 2}),
        json!({"timestamp": {"seconds": 1, "microseconds": 2}, "event": "JOB_STATUS_CHANGE", "data": {"id": "x"}}),
        json!({"return": {"name": "foo", "arguments": {"a": [1]}}, "id": 3}),
        json!({"error": {"class": "DeviceNotActive", "desc": "no such job"}}),
    ];
    assert_eq!(take(&mut session), expected);
}

#[test]
fn an_id_is_echoed_as_json_whatever_it_is() {
    let table = [
        ("1e400", json!(f64::MAX)),
        ("-1e400", json!(f64::MIN)),
        ("18446744073709551615", json!(u64::MAX)),
        ("-0", json!(0)),
        ("2.50", json!(2.5)),
        (r#"{"b": [null], "a": 'q"'}"#, json!({"b": [null], "a": "q\""})),
        ("null", Value::Null),
    ];
    for (id, echo) in table {
        let mut session = negotiated();
        feed(&mut session, format!("{{'execute': 'x', 'id': {id}}}\n").as_bytes());
        run(&mut session);
        let reply = take(&mut session);
        assert_eq!(reply[0].get("id"), Some(&echo), "{id}: {reply:?}");
    }
}

#[test]
fn a_failure_waits_for_its_turn_and_out_of_band_does_not() {
    let mut session = session();
    feed(&mut session, br#"{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}"#);
    take(&mut session);
    feed(&mut session, br#"{"execute":"slow","id":1}"#);
    let slow = session.next_request().expect("a request");
    assert_eq!(slow.name, "slow");
    feed(&mut session, b"@ {'execute':'next','id':2}{'exec-oob':'query-version','id':3}");
    assert!(session.next_request().is_none(), "one at a time");
    let now = take(&mut session);
    assert_eq!(
        now,
        [json!({"id": 3, "error": {"class": "GenericError",
                                   "desc": "The command query-version does not support OOB"}})]
    );
    session.reply(Ok(json!({})));
    run(&mut session);
    let then = take(&mut session);
    assert_eq!(then[0], json!({"return": {}, "id": 1}));
    assert_eq!(then[1]["error"]["desc"], "JSON parse error, stray '@'");
    assert_eq!(then[2]["id"], 2);
}

#[test]
fn a_session_takes_eight_requests_and_no_more() {
    let mut session = negotiated();
    let flood = "{'execute':'x'}".repeat(100);
    let mut bytes = flood.as_bytes();
    session.input(&mut bytes);
    assert_eq!(flood.len() - bytes.len(), MAX_QUEUED * "{'execute':'x'}".len());
    assert!(!session.wants_input());
    let mut replies = 0;
    while let Some(request) = session.next_request() {
        assert_eq!(request.name, "x");
        session.reply(Ok(Value::Null));
        session.input(&mut bytes);
        replies += take(&mut session).len();
    }
    assert_eq!(replies, 100);
}

#[test]
fn a_client_that_does_not_read_stops_being_served() {
    let mut session = negotiated();
    feed(&mut session, b"{'execute':'x'}{'execute':'y'}");
    session.next_request().expect("a request");
    session.reply(Ok(Value::from("x".repeat(HIGH_WATER))));
    assert!(!session.wants_input());
    assert!(session.next_request().is_none());
    session.sent(100);
    assert!(session.wants_input());
    assert_eq!(session.next_request().expect("the next").name, "y");

    // Events are kept up to their bound, whatever waits beside them.
    session.reply(Ok(Value::Null));
    let mut kept = 0;
    while !session.is_overrun() {
        session.event(&event(1000));
        kept += 1;
    }
    assert!((MAX_EVENT_BYTES / 1200..MAX_EVENT_BYTES / 1000).contains(&kept), "{kept}");
    assert!(session.next_request().is_none());
    assert!(!session.wants_input());
}

fn parse_all(pieces: &[&[u8]]) -> Vec<Result<Value, String>> {
    let mut parser = Parser::new();
    let mut found = Vec::new();
    for piece in pieces {
        let mut rest = *piece;
        while let Some(value) = parser.next(&mut rest) {
            found.push(value.map_err(|error| error.to_string()));
        }
    }
    found
}

#[test]
fn limits() {
    let nested = |n| [vec![b'['; n], vec![b']'; n]].concat();
    assert!(parse_all(&[&nested(1024)])[0].is_ok());
    let found = parse_all(&[&nested(1025)]);
    assert_eq!(found[0], Err("JSON nesting depth limit exceeded".into()));
    assert_eq!(found.len(), 1026);

    let tokens = |n| [b"[1".to_vec(), b",1".repeat(n), b"]{}".to_vec()].concat();
    let most = (2 << 20) / 2 - 2;
    assert!(parse_all(&[&tokens(most)])[0].is_ok(), "2 Mi tokens less one");
    let found = parse_all(&[&tokens(most + 1)]);
    assert_eq!(found, [Err("JSON token count limit exceeded".into()), Ok(json!({}))]);

    let text = |n| [b"[\"".to_vec(), vec![b'a'; n], b"\"] 'b' {}".to_vec()].concat();
    let most = (64 << 20) - "[\"\"]".len() - 1;
    assert!(parse_all(&[&text(most)])[0].is_ok());
    let found = parse_all(&[&text(most + 1)]);
    assert_eq!(found[0], Err("JSON token size limit exceeded".into()), "at the closing bracket");
    let found = parse_all(&[&text(65 << 20)]);
    assert_eq!(found[0], Err("JSON token size limit exceeded".into()), "in the string");
    assert_eq!(found.last(), Some(&Ok(json!({}))), "and what follows is read");
}

/// Text that is nearly JSON, or anything.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        4 => prop::sample::select(vec![
            "{", "}", "[", "]", ":", ",", "\"", "'", "\\", "\\u12", "\\ud800\\udc00", "\\ud800", "1", "-", "0", ".5", "e+",
            "true", "nul", "x", " ", "\n", "@", "{'execute':'x'}", "{\"execute\":\"qmp_capabilities\"}", "\"id\":1e400",
            "'execute':", "'exec-oob':", "'arguments':{}", "é", "😀",
        ]).prop_map(|text| text.as_bytes().to_vec()),
        1 => prop::collection::vec(any::<u8>(), 0..4),
    ];
    prop::collection::vec(piece, 0..40).prop_map(|pieces| pieces.concat())
}

fn converse(pieces: &[&[u8]]) -> Vec<Value> {
    let mut session = session();
    let mut output = take(&mut session);
    for piece in pieces {
        let mut rest = *piece;
        while !rest.is_empty() {
            session.input(&mut rest);
            run(&mut session);
            output.extend(take(&mut session));
        }
    }
    run(&mut session);
    output.extend(take(&mut session));
    output
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn how_the_bytes_are_cut_does_not_matter(text in bytes(), cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8)) {
        let mut at: Vec<usize> = cuts.iter().map(|cut| cut.index(text.len() + 1)).collect();
        at.extend([0, text.len()]);
        at.sort_unstable();
        let pieces: Vec<&[u8]> = at.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect();
        let single: Vec<&[u8]> = text.chunks(1).collect();
        prop_assert_eq!(parse_all(&pieces), parse_all(&[&text]));
        prop_assert_eq!(parse_all(&single), parse_all(&[&text]));
        prop_assert_eq!(converse(&pieces), converse(&[&text]));
    }

    #[test]
    fn what_serde_json_reads_is_read_the_same(value in json_value()) {
        let text = value.to_string();
        prop_assert_eq!(parse_all(&[text.as_bytes(), b"\n"]), vec![Ok(value.clone())]);
        for style in [Style::Compact, Style::Pretty] {
            let printed = qmp::to_bytes(&value, style);
            prop_assert!(printed.iter().all(|b| b.is_ascii_graphic() || b" \r\n".contains(b)));
            prop_assert_eq!(parse_all(&[&printed, b"\n"]), vec![Ok(value.clone())]);
        }
    }
}

fn json_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        // Whole doubles come back as integers.
        any::<f64>().prop_filter("finite and not whole", |f| f.is_finite() && f.fract() != 0.0).prop_map(Value::from),
        any::<String>().prop_filter("no noncharacter", |s| !s.chars().any(is_noncharacter)).prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 64, 8, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..8).prop_map(Value::from),
            prop::collection::hash_map("[a-z\"\\\\é]*", inner, 0..8)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

fn is_noncharacter(c: char) -> bool {
    let code = u32::from(c);
    (0xFDD0..=0xFDEF).contains(&code) || code & 0xFFFE == 0xFFFE
}
