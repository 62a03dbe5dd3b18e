//! The documents that are made from the code: manual pages, the QMP reference, the table of what is covered.
//!
//! They are committed so that they can be read without a build. The tests fail when a document is not what the code says;
//! `make docs` (which sets `UPDATE_DOCS=1`) writes them anew.

mod manual;

use crate::control;
use qapi::schema::{Schema, compare};
use qapi::{Value, manual::Manual};
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// Compares or, when told to, writes a document below `docs/`.
fn document(name: &str, text: &str) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs").join(name);
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        return;
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(found == text, "docs/{name} is not what the code says: run `make docs` and commit the result");
}

fn schema() -> Schema {
    control::schema()
}

#[test]
fn the_manual_page_is_current() {
    document("man/qemu-storage-daemon.1", &manual::page());
}

#[test]
fn the_qmp_reference_is_current() {
    let manual = Manual::new(&schema());
    let about = "What a client can send over the QEMU Monitor Protocol, what it gets back, and what it is told by itself. \
                 Made from the definitions of the types.";
    document("qmp-reference.md", &format!("# QMP reference\n\n{about}\n\n{}", manual.to_markdown()));
    let header = format!(
        ".TH QEMU-STORAGE-DAEMON-QMP-REF 7 \"\" \"qemu-storage-daemon\" \"Storage suite\"\n.SH NAME\n\
         qemu\\-storage\\-daemon\\-qmp\\-ref \\- QMP reference of qemu\\-storage\\-daemon\n.SH DESCRIPTION\n{about}\n"
    );
    document("man/qemu-storage-daemon-qmp-ref.7", &(header + &manual.to_roff()));
}

/// The reference's schema, none where that very release is not installed.
fn reference_schema() -> Option<Value> {
    let started = Command::new("qemu-storage-daemon")
        .args(["--chardev", "stdio,id=m", "--monitor", "m"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let mut child = started.ok()?;
    let commands = "{\"execute\": \"qmp_capabilities\"} {\"execute\": \"query-qmp-schema\"} {\"execute\": \"quit\"}\n";
    child.stdin.take()?.write_all(commands.as_bytes()).ok()?;
    let output = child.wait_with_output().ok()?;
    let replies = String::from_utf8(output.stdout).ok()?;
    let mut replies = replies.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let (major, minor, micro) = crate::version::QEMU;
    let version = serde_json::json!({"major": major, "minor": minor, "micro": micro});
    if replies.next()?["QMP"]["version"]["qemu"] != version {
        return None;
    }
    replies.find_map(|mut reply| reply.get_mut("return").filter(|value| value.is_array()).map(Value::take))
}

#[test]
fn the_coverage_table_is_current() {
    let Some(reference) = reference_schema() else {
        println!("skipped: the reference, qemu-storage-daemon 10.0.2, is not installed");
        return;
    };
    let coverage = compare(&schema().to_value(), &reference);
    let mismatches: Vec<_> = coverage.mismatches().collect();
    assert!(mismatches.is_empty(), "{mismatches:#?}");
    let about = "What of the interface of QEMU 10.0.2's qemu-storage-daemon this daemon has, by comparison of what the two answer to \
                 `query-qmp-schema`. *Extra* is what newer releases of QEMU have, or this daemon alone. Made by `make docs`.";
    document("coverage.md", &format!("# Coverage of the interface\n\n{about}\n\n{}", coverage.to_markdown()));
}
