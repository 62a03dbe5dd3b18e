//! What is JSON to the monitor, what is a request, and the texts of its refusals.

use serde_json::{Value, json};

use crate::monitored;

/// Asks with one line and checks class and text of the error.
fn refused(lines: &[(&str, &str)]) {
    let daemon = monitored();
    let mut qmp = daemon.qmp();
    for (line, text) in lines {
        let answer = qmp.ask(line);
        assert_eq!(answer, json!({"error": {"class": "GenericError", "desc": text}}), "{line}");
    }
    qmp.ok("query-version", json!({}));
}

#[test]
fn requests_that_are_not() {
    refused(&[
        ("[]", "QMP input must be a JSON object"),
        ("\"x\"", "QMP input must be a JSON object"),
        ("1", "QMP input must be a JSON object"),
        ("{}", "QMP input lacks member 'execute'"),
        (r#"{"execute":1}"#, "QMP input member 'execute' must be a string"),
        (r#"{"execute":"query-version","foo":1}"#, "QMP input member 'foo' is unexpected"),
        (r#"{"execute":"query-version","arguments":{"x":1}}"#, "Parameter 'x' is unexpected"),
        (r#"{"execute":"query-version","arguments":[]}"#, "QMP input member 'arguments' must be an object"),
        (r#"{"execute":"query-version","arguments":null}"#, "QMP input member 'arguments' must be an object"),
        (r#"{"exec-oob":"query-version"}"#, "QMP input member 'exec-oob' is unexpected"),
    ]);
}

#[test]
fn arguments_that_do_not_fit() {
    let resize = |rest: &str| format!(r#"{{"execute":"block_resize","arguments":{{"node-name":"n"{rest}}}}}"#);
    let wrong = "Invalid parameter type for 'size', expected: integer";
    refused(&[
        (&resize(r#","size":1.0"#), wrong),
        (&resize(r#","size":"1""#), wrong),
        (&resize(r#","size":99999999999999999999999"#), wrong),
        (&resize(r#","size":null"#), wrong),
        (&resize(""), "Parameter 'size' is missing"),
        (&resize(r#","size":-1"#), "Parameter 'size' expects a >0 size"),
        (&resize(r#","size":1,"x":2"#), "Parameter 'x' is unexpected"),
    ]);
}

#[test]
fn text_that_is_not_json() {
    let id = |id: &str| format!(r#"{{"execute":"query-version","id":{id}}}"#);
    refused(&[
        ("foo", "JSON parse error, invalid keyword 'foo'"),
        (r#"{"execute":"query-version","id":1,"id":2}"#, "JSON parse error, duplicate key"),
        (r#"{"execute":"query-version",}"#, "JSON parse error, expecting value"),
        (r#"{"execute":"query-version" "id":1}"#, "JSON parse error, expected separator in dict"),
        (&id(r#""\ud800""#), "JSON parse error, \\ud800 is not a valid Unicode character"),
        (&id(r#""\q""#), "JSON parse error, invalid escape sequence in string"),
    ]);
}

#[test]
fn percent_signs_are_not_interpolated() {
    let daemon = monitored();
    let mut qmp = daemon.qmp();
    qmp.send(r#"{"execute":"query-version","id":%d}"#);
    assert_eq!(qmp.answer()["error"]["desc"], "JSON parse error, stray '%'");
    // The lexer starts again at what follows; a reset byte leaves nothing of it.
    qmp.send_raw(b"\xff");
    let answer = qmp_answer_with_id(&mut qmp, r#"{"execute":"query-version","id":"%d"}"#);
    assert_eq!(answer["id"], "%d");
}

/// Sends a line and skips the parse errors that are still to come before the answer that has an id.
fn qmp_answer_with_id(qmp: &mut tests::qmp::Client, line: &str) -> Value {
    qmp.send(line);
    loop {
        let answer = qmp.answer();
        if answer.get("id").is_some() {
            return answer;
        }
    }
}

#[test]
fn ids_come_back() {
    let daemon = monitored();
    let mut qmp = daemon.qmp();
    for (sent, back) in [
        (r#"{"a":[1,null,true,"x"]}"#, json!({"a": [1, null, true, "x"]})),
        (r#"'it\'s'"#, json!("it's")),
        ("[1,-0,2.50]", json!([1, 0, 2.5])),
        ("12345678901234567890", json!(12_345_678_901_234_567_890_u64)),
        ("-9223372036854775808", json!(i64::MIN)),
        ("1e3", json!(1000)),
        ("null", json!(null)),
        (r#""\u0000""#, json!("\0")),
        ("\"\u{e9}\\u007f\\ud83d\\ude00\"", json!("\u{e9}\u{7f}\u{1f600}")),
    ] {
        let answer = qmp.ask(&format!(r#"{{"execute":"query-version","id":{sent}}}"#));
        assert!(answer.get("return").is_some(), "{answer}");
        assert_eq!(answer["id"].to_string().replace(".0", ""), back.to_string(), "{sent}");
    }
    let answer = qmp.ask(r#"{"execute":"nosuch","id":7}"#);
    let class = json!({"class": "CommandNotFound", "desc": "The command nosuch has not been found"});
    assert_eq!(answer, json!({"id": 7, "error": class}));
}

#[test]
fn a_huge_number_as_id_is_still_json() {
    let daemon = monitored();
    let mut qmp = daemon.qmp();
    qmp.send(r#"{"execute":"query-version","id":1e400}"#);
    if tests::known_defect("X8") {
        return;
    }
    // Whatever it answers parses, and the monitor goes on.
    let answer = qmp.answer();
    assert!(answer.get("return").is_some() || answer.get("error").is_some(), "{answer}");
    qmp.ok("query-version", json!({}));
}

#[test]
fn output_is_ascii() {
    let daemon = monitored();
    let mut qmp = daemon.qmp();
    qmp.ask("{\"execute\":\"query-version\",\"id\":\"\u{e9}\u{1f600}\\u007f\\n\"}");
    let wire = String::from_utf8(qmp.transcript.clone()).unwrap();
    assert!(wire.is_ascii() && !wire.contains('\u{7f}'), "{wire:?}");
    assert!(wire.to_ascii_uppercase().contains(r"\U00E9\UD83D\UDE00\U007F\N"), "{wire}");
}

#[test]
fn lines_end_with_crlf() {
    let daemon = monitored();
    let mut qmp = daemon.qmp();
    qmp.ok("query-version", json!({}));
    let wire = String::from_utf8(qmp.transcript.clone()).unwrap();
    assert_eq!(wire.matches("\r\n").count(), 3, "{wire:?}");
    assert_eq!(wire.matches('\n').count(), 3, "{wire:?}");
}

#[test]
fn requests_are_not_lines() {
    let daemon = monitored();
    let mut qmp = daemon.qmp();
    qmp.send(r#"{"execute":"query-version","id":1} {"execute":"query-version","id":2}"#);
    assert_eq!(qmp.answer()["id"], 1);
    assert_eq!(qmp.answer()["id"], 2);
    for part in ["{\n\"execute\"", "\r\n:\t", "\"query-ver", "sion\", \"id\"\n:", "3}"] {
        qmp.send_raw(part.as_bytes());
    }
    assert_eq!(qmp.answer()["id"], 3);
}

#[test]
fn garbage_between_requests_is_one_error_each() {
    let daemon = monitored();
    let mut qmp = daemon.qmp();
    qmp.send(r#"{"execute":"query-version","id":1} trailing"#);
    assert_eq!(qmp.answer()["id"], 1);
    qmp.send("");
    assert_eq!(qmp.answer()["error"]["desc"], "JSON parse error, invalid keyword 'trailing'");
    assert_eq!(qmp.ask(r#"{"execute":"query-version","id":2}"#)["id"], 2);
}

#[test]
fn bytes_that_are_not_text() {
    let daemon = monitored();
    let mut qmp = daemon.qmp();
    qmp.send_raw(b"{\"execute\":\"query-version\",\"id\":\"\xc3\"}\n");
    assert_eq!(qmp.answer()["error"]["desc"], "JSON parse error, invalid UTF-8 sequence in string");
    // Half a request, then the byte that resets the lexer.
    qmp.send_raw(b"{\"execute\":\"query-vers\xff");
    let answer = qmp_answer_with_id(&mut qmp, r#"{"execute":"query-version","id":9}"#);
    assert_eq!(answer["id"], 9);
}

#[test]
fn nesting_has_a_limit() {
    let daemon = monitored();
    let mut qmp = daemon.qmp();
    let deep = |n: usize| format!("{{\"execute\":\"query-version\",\"id\":{}{}}}", "[".repeat(n), "]".repeat(n));
    let answer = qmp.ask(&deep(100));
    assert!(answer.get("return").is_some(), "{answer}");
    let mut qmp = daemon_again(qmp, &daemon);
    qmp.send(&deep(2000));
    assert!(qmp.answer().get("error").is_some());
    qmp.send_raw(b"\xff");
    let answer = qmp_answer_with_id(&mut qmp, r#"{"execute":"query-version","id":1}"#);
    assert_eq!(answer["id"], 1);
}

/// Leaves one session and starts another: a monitor has one client at a time.
fn daemon_again(old: tests::qmp::Client, daemon: &tests::Daemon) -> tests::qmp::Client {
    drop(old);
    daemon.qmp()
}

#[test]
fn a_long_string_is_fine() {
    let daemon = monitored();
    let mut qmp = daemon.qmp();
    let long = "x".repeat(1 << 20);
    let answer = qmp.ask(&format!(r#"{{"execute":"query-version","id":"{long}"}}"#));
    assert_eq!(answer["id"], long.as_str());
}
