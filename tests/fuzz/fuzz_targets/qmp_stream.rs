//! What a QMP client sends: however it is cut, the answers are the same; whatever is answered is JSON in ASCII lines.
#![no_main]

use libfuzzer_sys::fuzz_target;
use qmp::{Parser, Session, Settings, Style, to_bytes};
use serde_json::{Value, json};

fn settings() -> Settings {
    let version = json!({"qemu": {"micro": 0, "minor": 0, "major": 0}, "package": ""});
    // Without commands out of band: when they overtake others is a matter of time.
    Settings { version, oob: false, style: Style::Compact, is_command: |name| name != "nosuch" }
}

/// The answers to a stream that arrives in pieces of a length.
fn converse(bytes: &[u8], piece: usize) -> Vec<u8> {
    let mut session = Session::new(settings());
    let mut answers = Vec::new();
    for mut input in bytes.chunks(piece) {
        loop {
            session.input(&mut input);
            let request = session.next_request();
            let idle = request.is_none() && session.output().is_empty();
            if request.is_some() {
                session.reply(Ok(json!({})));
            }
            while !session.output().is_empty() {
                let part = session.output().to_vec();
                session.sent(part.len());
                answers.extend(part);
            }
            if idle && (input.is_empty() || !session.wants_input()) {
                break;
            }
        }
    }
    answers
}

fuzz_target!(|bytes: &[u8]| {
    let Some((cut, bytes)) = bytes.split_first() else { return };
    let whole = converse(bytes, bytes.len().max(1));
    assert_eq!(whole, converse(bytes, usize::from(*cut) + 1), "the answers depend on how the bytes arrive");
    assert!(whole.is_ascii(), "an answer that is not ASCII");
    for line in whole.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        serde_json::from_slice::<Value>(line).expect("an answer that is not JSON");
    }
    // What is written can be read again, and from then on is the same: numbers may change their form once.
    let mut parser = Parser::new();
    let mut input = bytes;
    while let Some(value) = parser.next(&mut input) {
        if let Ok(value) = value {
            let once = to_bytes(&reread(&value), Style::Compact);
            assert_eq!(to_bytes(&reread(&reread(&value)), Style::Compact), once);
        }
    }
});

/// A value written and read.
fn reread(value: &Value) -> Value {
    let mut parser = Parser::new();
    let text = to_bytes(value, Style::Compact);
    let back = parser.next(&mut &text[..]).or_else(|| parser.next(&mut &b"\n"[..]));
    back.expect("what was written is not complete").expect("what was written cannot be read")
}
