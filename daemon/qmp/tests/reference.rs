//! The installed qemu-storage-daemon as the oracle: the same bytes to it and to a session must bring the same replies.
//!
//! What is listed in docs as a defect of the reference (ids that are not JSON, a parameter called 'null') is left out of
//! the input. Where a message has several mistakes, the reference reports the one that comes first in its hash table;
//! which one that is does not count here.

#![allow(clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::thread;

use qapi::Error;
use qmp::{Session, Settings, Style};
use serde_json::{Value, json};

const REFERENCE: &str = "qemu-storage-daemon";

/// Odd input, each a case of its own.
const TABLE: &[&[u8]] = &[
    // Strays and how reading goes on after them.
    b"@",
    b"{@}",
    b"%",
    b"%d",
    b"{\"execute\":%s}",
    b"a\x01b",
    b"foo bar",
    b"@@@ @@ {}",
    b"{@{}",
    b"{\"a\":@}",
    b"{\"a\":@,\"b\":2}",
    b"{\"a\":[1,2,@,3],\"b\":2}",
    b"@\"a\"{}",
    b"@'}'",
    b"@\n\"a\"",
    b"@\t1",
    b"@\r1",
    b"@\n1",
    b"@\x0b1",
    b"@\x001",
    b"@\x1f1",
    b"@ 1",
    b"@\x7f{}",
    b"#\n{}",
    b"// {}\n",
    b"/* */",
    b"{\"a\":\x01}",
    b"{\"a\"\x00}",
    b"\x00",
    b"\x01\x02",
    b"\x1f{}",
    b"\x80",
    b"\x80\x80{}",
    b"\x7f",
    b"{\"a\":\"x\xff{\"execute\":\"query-version\",\"id\":1}",
    b"{\"a\":\xff{\"execute\":\"query-version\",\"id\":1}",
    b"\xff",
    b"\xfe",
    b"1\xff",
    b"tru\xff",
    b"@\xff",
    b"@ab\xff{}",
    b"[[[\xff]",
    b"\\",
    b"_",
    b"{}x",
    b"{}\x80x",
    b"\xc3\xa9",
    b"a\xc3\xa9b",
    b"foo{\"execute\":\"query-version\"}",
    b"x{}x{}",
    b"x\"y\"{}",
    b"x y,{}",
    b"x:1",
    // Top-level values.
    b"true",
    b"42 ",
    b"\"abc\"",
    b"'abc'",
    b"null",
    b"[]",
    b"{}",
    b"[{}]",
    b"1 2 3",
    b"1,2",
    b"[1],[2]",
    b"{},{}",
    b"[] []",
    b"\"a\" \"b\"",
    // Brackets that do not match.
    b"}",
    b"]",
    b"}}",
    b"]]",
    b"[}",
    b"{]",
    b"[[}]",
    b"{[}]",
    b"[{]}",
    b"{\"a\":{]}",
    b"{\"a\":1}}",
    b"{\"a\":1}]",
    b"{\"a\":1]",
    b"[\"a\"}",
    b"[1}",
    b"{\"a\":]",
    b"{{}:1}",
    b"{[1]:2}",
    b"{[}:2]}",
    // Objects and arrays.
    b"{\"a\"}",
    b"{\"a\":}",
    b"{\"a\":1,}",
    b"{,}",
    b"{\"a\":1,,\"b\":2}",
    b"[1,]",
    b"[,]",
    b"[,1]",
    b"[1 2]",
    b"[1:2]",
    b"{1:2}",
    b"{x:2}",
    b"{\"a\" 1}",
    b"{\"a\",1}",
    b"{\"a\":1 \"b\":2}",
    b"{\"a\":1:2}",
    b",",
    b":",
    b"{\"a\":1,\"a\":2}",
    b"{\"a\":1,\"a\":x}",
    b"{\"a\":[x,y]}",
    b"{\"execute\":\"x\",\"execute\":\"y\"}",
    b"{\"a\":{\"b\":1,\"b\":2}}",
    // Keywords and numbers.
    b"truex",
    b"True",
    b"nul",
    b"[nul]",
    b"[true1]",
    b"[true_]",
    b"tr-ue",
    b"NaN",
    b"01",
    b"-",
    b"-a",
    b"- 1",
    b"1.",
    b"1.e",
    b"1e",
    b"1e+",
    b"1.5x",
    b"0x10",
    b"+1",
    b".5",
    b"00",
    b"-00",
    b"-01",
    b"1a",
    b"[1a]",
    b"1.5.5",
    b"1e5e5",
    b"1-2",
    b"-1-2",
    b"0.",
    b"-0.0e-0 ",
    // Strings.
    b"\"\\x\"",
    b"\"\\q\"",
    b"\"\\U0041\"",
    b"\"\\u12\"",
    b"\"\\u12zz\"",
    b"\"\\u1\"",
    b"\"\\u\"",
    b"'\\u'",
    b"\"\\u 123\"",
    b"\"\\u-123\"",
    b"\"\\u+123\"",
    b"\"\\u0x12\"",
    b"\"\\u12\\\"45\"",
    b"\"\\ud800\"",
    b"\"\\ud800\\u0041\"",
    b"\"\\udc00\"",
    b"\"\\ud800\\uzzzz\"",
    b"\"\\ud800\\u12\"",
    b"\"\\ud800x\"",
    b"\"\\ud83f\\udffe\"",
    b"\"\\udbff\\udfff\"",
    b"\"\\udbff\\ud800\"",
    b"\"\\ud800\\ud800\"",
    b"\"\\u00e9\\u12\"",
    b"\"\\u12\xc3\xa9\"",
    b"\"\\u1\xc3\xa9\"",
    b"\"\\u123\xc3\xa9\"",
    b"\"\\ufffe\"",
    b"\"\\uffff\"",
    b"\"\\ufdd0\"",
    b"\"\\u0000\"",
    b"\"\\uD83D\\uDE00\"",
    b"\"\\ud800\\uDC00\"",
    b"\"\xc3\x28\"",
    b"\"\xff\"",
    b"\"\xfe\"",
    b"\"\x01\"",
    b"\"\n\"",
    b"\"\t\"",
    b"\"\x7f\"",
    b"\"\xed\xa0\x80\"",
    b"\"\xf4\x90\x80\x80\"",
    b"\"\xc0\x80\"",
    b"\"\xc1\x80\"",
    b"\"\xf5\x80\x80\x80\"",
    b"\"\xe2\x82\"",
    b"\"\xef\xbf\xbe\"",
    b"\"\xef\xb7\x90\"",
    b"\"\xf0\x9f\xbf\xbe\"",
    b"\"\xe0\x80\x80\"",
    b"\"\xf8\x88\x80\x80\x80\"",
    b"\"\xe2\x82\x01",
    b"\"\xed\xa0\x80\x01",
    b"\"\xf8\x88\x80\x80\x80\x01",
    b"\"\x80\x80\x01",
    b"\"\xc3\x01",
    b"\"\xf0\x9f\x01",
    b"\"\xe2a\x01",
    b"\"\xf4\x90\x80\x80\x01",
    b"\"a\x00b",
    b"\"\xc0\x80\x01",
    b"\"\xef\xbf\xbe\x01",
    b"\"\xfc\x84\x80\x80\x80\x80\x80\x01",
    b"\"b\\",
    b"\"",
    b"'",
    b"\"b",
    b"'a\"b'",
    b"\"a'b\"",
    b"'a\\'b'",
    b"'a\\\"b'",
    b"\"a\\'b\"",
    b"\"\\/\\b\\f\\n\\r\\t\\\\\"",
    b"\"%d\"",
    // Requests.
    b"{\"id\":7}",
    b"{\"execute\":1}",
    b"{\"execute\":null,\"id\":1}",
    b"{\"execute\":\"\"}",
    b"{\"execute\":\"a\\u0000b\"}",
    b"{\"execute\":\"\\u00e9\"}",
    b"{\"execute\":\"query-version\",\"arguments\":null}",
    b"{\"execute\":\"query-version\",\"arguments\":[]}",
    b"{\"execute\":\"query-version\",\"arguments\":{\"x\":1}}",
    b"{\"execute\":\"query-version\",\"arguments\":{}}",
    b"{\"execute\":\"qmp_capabilities\",\"id\":[]}",
    b"{\"execute\":\"query-version\",\"foo\":1,\"id\":8}",
    b"{\"exec-oob\":\"query-version\",\"id\":1}",
    b"{\"exec-oob\":\"query-version\",\"execute\":\"query-version\"}",
    b"{\"exec-oob\":1}",
    b"{\"exec-oob\":\"no-such\"}",
    b"{\"exec-oob\":\"qmp_capabilities\"}",
    b"{'execute':'query-version','id':{'a':[1,2.50,-0,1e3,{'b':null}],'c':''}}",
    b"{\"execute\":\"x\",\"id\":\"\\u00e9\\u007f\\ud83d\\ude00\"}",
    b"{\"execute\":\"x\",\"id\":18446744073709551615}",
    b"{\"execute\":\"x\",\"id\":18446744073709551616}",
    b"{\"execute\":\"x\",\"id\":-9223372036854775809}",
    b"{\"execute\":\"x\",\"id\":-9223372036854775808}",
    b"{\"execute\":\"x\",\"id\":1e-400}",
    b"{\"execute\":\"x\",\"id\":123456789012345678901234567890}",
    b"{ \"execute\" :\r\n\t\"query-version\"\n}",
    b"{\"execute\":\"query-version\"}{\"execute\":\"x\"}",
];

/// How most conversations begin.
const NEGOTIATE: &[u8] = b"{\"execute\":\"qmp_capabilities\"}";
/// And how those begin in which commands may overtake each other.
const NEGOTIATE_OOB: &[u8] =
    b"{\"execute\":\"qmp_capabilities\",\"arguments\":{\"enable\":[\"oob\",\"oob\"]},\"id\":1}";

/// Arguments of the negotiation, each in a conversation of its own.
const NEGOTIATIONS: &[&str] = &[
    "{}",
    "{'enable':[]}",
    "{'enable':['oob']}",
    "{'enable':'oob'}",
    "{'enable':[1]}",
    "{'enable':['oob',1]}",
    "{'enable':{}}",
    "{'enable':null}",
    "{'foo':1}",
    "{'enable':[],'foo':1}",
    "[]",
    "null",
    "1",
];

/// The end of a case: reading starts afresh, and a reply that tells where we are.
fn marker(number: usize) -> Vec<u8> {
    let mut bytes = b"\n \xff ".to_vec();
    bytes.extend(format!("{{\"execute\":\"x-marker\",\"id\":\"case {number}\"}}").bytes());
    bytes
}

/// The replies of the reference to this input, or `None` where it is not installed.
fn reference(input: &[u8]) -> Option<Vec<Value>> {
    let mut child = Command::new(REFERENCE)
        .args(["--chardev", "stdio,id=c", "--monitor", "c"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .ok()?;
    let mut stdin = child.stdin.take().expect("a pipe");
    let mut stdout = child.stdout.take().expect("a pipe");
    let end = b"\xff{\"execute\":\"qmp_capabilities\"}{\"execute\":\"quit\"}";
    let input = [input, end].concat();
    let writer = thread::spawn(move || stdin.write_all(&input).map(|()| stdin));
    let mut output = String::new();
    stdout.read_to_string(&mut output).expect("replies");
    writer.join().expect("the writer ends").expect("the reference reads everything");
    let status = child.wait().expect("the reference ends");
    assert!(status.success(), "the reference ended with {status}");
    Some(output.lines().map(|line| serde_json::from_str(line).expect(line)).collect())
}

/// The replies of a session.
fn ours(input: &[u8], version: &Value) -> Vec<Value> {
    let mut session = Session::new(Settings {
        version: version.clone(),
        oob: true,
        style: Style::Compact,
        is_command: |name| name == "query-version",
    });
    let mut rest = input;
    let mut output = Vec::new();
    loop {
        session.input(&mut rest);
        while let Some(request) = session.next_request() {
            session.reply(match (request.name.as_str(), request.arguments.keys().next()) {
                ("query-version", None) => Ok(version.clone()),
                ("query-version", Some(name)) => Err(Error::generic(format!("Parameter '{name}' is unexpected"))),
                (name, _) => Err(Error::command_not_found(format!("The command {name} has not been found"))),
            });
        }
        output.extend_from_slice(session.output());
        if session.output().is_empty() && rest.is_empty() {
            break;
        }
        session.sent(session.output().len());
    }
    let output = String::from_utf8(output).expect("ASCII");
    output.lines().map(|line| serde_json::from_str(line).expect(line)).collect()
}

/// Makes replies comparable that may differ: which of several mistakes is reported, and how a number is written.
fn normalise(reply: &mut Value) {
    match reply {
        Value::String(text) if text.starts_with("QMP input ") && !text.ends_with("object") => {
            *text = "QMP input is wrong".into()
        }
        Value::Number(number) if number.as_f64().is_some_and(|f| f.abs() < 1e15) => *reply = json!(number.as_f64()),
        Value::Array(items) => items.iter_mut().for_each(normalise),
        Value::Object(members) => members.values_mut().for_each(normalise),
        _ => {}
    }
}

/// What the reference and a session reply to the same input, the greeting included.
fn both(input: &[u8]) -> Option<(Vec<Value>, Vec<Value>)> {
    let Some(mut expected) = reference(input) else {
        eprintln!("skipped: {REFERENCE} is not installed");
        return None;
    };
    let version = expected[0]["QMP"]["version"].clone();
    // What the end of the input brought.
    expected.truncate(expected.len() - 3);
    let mut found = ours(input, &version);
    expected.iter_mut().chain(&mut found).for_each(normalise);
    Some((expected, found))
}

/// Compares one conversation case by case.
fn compare(opening: &[u8], cases: &[Vec<u8>]) {
    let mut input = opening.to_vec();
    for (number, case) in cases.iter().enumerate() {
        input.extend(case);
        input.extend(marker(number));
    }
    let Some((expected, found)) = both(&input) else { return };
    let split = |replies: &[Value]| -> Vec<Vec<Value>> {
        replies
            .split_inclusive(|reply| reply["id"].as_str().is_some_and(|id| id.starts_with("case ")))
            .map(<[Value]>::to_vec)
            .collect()
    };
    let (expected, found) = (split(&expected), split(&found));
    for ((case, expected), found) in cases.iter().zip(&expected).zip(&found) {
        assert_eq!(found, expected, "input: {}", case.escape_ascii());
    }
    assert_eq!(found.len(), cases.len());
    assert_eq!(expected.len(), cases.len());
}

/// Compares a conversation of a single message, in which replies may come in any order. The reference cannot be given
/// many: with out-of-band execution enabled, an assertion fails in it when two messages end with the same byte while its
/// queue is nearly full.
fn compare_out_of_band(case: &[u8]) {
    let Some((mut expected, mut found)) = both(&[NEGOTIATE_OOB, case, b"\n"].concat()) else { return };
    expected.sort_by_key(Value::to_string);
    found.sort_by_key(Value::to_string);
    assert_eq!(found, expected, "input: {}", case.escape_ascii());
}

#[test]
fn odd_input_brings_the_replies_of_the_reference() {
    let cases: Vec<Vec<u8>> = TABLE.iter().map(|case| case.to_vec()).collect();
    compare(b"", &cases);
    compare(NEGOTIATE, &cases);
    for case in TABLE.iter().filter(|case| case.windows(8).any(|w| w == b"exec-oob")) {
        compare_out_of_band(case);
    }
}

#[test]
fn negotiations_end_as_with_the_reference() {
    for arguments in NEGOTIATIONS {
        let request = format!("{{'execute':'qmp_capabilities','arguments':{arguments},'id':'n'}}").into_bytes();
        compare(b"", &[request, b"{'execute':'query-version'}".to_vec()]);
    }
}

/// Pieces that random input is made of.
const PIECES: &[&[u8]] = &[
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b",",
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b",",
    b"\"",
    b"'",
    b"\\",
    b"\\u12",
    b"\\u0041",
    b"\\ud800\\udc00",
    b"\\ud800",
    b"\\n",
    b"1",
    b"-",
    b"0",
    b".5",
    b".5e+",
    b"true",
    b"null",
    b"x",
    b" ",
    b"\n",
    b"@",
    b"\xff",
    b"\x01",
    b"\x80",
    b"\xc3\xa9",
    b"\xe2\x82",
    b"\xc0\x80",
    b"\"a\"",
    b"'b'",
    b"\"a\":1",
    b"\"id\":2",
    b"\"execute\":\"query-version\"",
    b"'arguments':{}",
    b"\"exec-oob\":'x'",
    b"{\"execute\":\"x\",\"id\":[1]}",
    b"\x7f",
    b"A",
    b"%",
];

#[test]
fn random_input_brings_the_replies_of_the_reference() {
    // A linear congruential generator: the same cases in every run.
    let mut seed: u64 = 0x5EED;
    let mut random = |limit: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(seed >> 33).expect("31 bits") % limit
    };
    let cases: Vec<Vec<u8>> =
        (0..4000).map(|_| (0..random(14)).flat_map(|_| PIECES[random(PIECES.len())].to_vec()).collect()).collect();
    for chunk in cases.chunks(1000) {
        compare(NEGOTIATE, chunk);
    }
}
