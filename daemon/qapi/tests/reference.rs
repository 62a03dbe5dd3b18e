//! The types against the installed reference: by structure, and text by text.
//!
//! Skips with a message where qemu-storage-daemon is not installed.
#![allow(missing_docs, clippy::expect_used, clippy::panic, clippy::print_stdout)]

use std::{
    io::{BufRead, BufReader, Write},
    process::{Command, Stdio},
};

use qapi::{
    Qapi, Value,
    keyval::{self, Argument},
    schema::{EntryKind, Schema, Status, compare},
    types::{block, block_query, chardev, control, export, qom},
};

const REFERENCE: &str = "qemu-storage-daemon";

/// Everything that has a type. What a daemon lists is its own choice.
fn everything() -> Schema {
    Schema::new()
        .command::<block::BlockResize>()
        .command::<block::BlockdevDel>()
        .command::<block::BlockdevOptions>()
        .command::<block_query::QueryBlock>()
        .command::<block_query::QueryBlockstats>()
        .command::<block_query::QueryNamedBlockNodes>()
        .command::<block_query::XDebugQueryBlockGraph>()
        .command::<chardev::ChardevAdd>()
        .command::<chardev::ChardevRemove>()
        .command::<chardev::QueryChardev>()
        .command::<chardev::QueryChardevBackends>()
        .command::<control::QmpCapabilities>()
        .command::<control::QueryCommands>()
        .command::<control::QueryQmpSchema>()
        .command::<control::QueryVersion>()
        .command::<control::Quit>()
        .command::<export::BlockExportDel>()
        .command::<export::BlockExportOptions>()
        .command::<export::NbdServerAddOptions>()
        .command::<export::NbdServerOptionsLegacy>()
        .command::<export::NbdServerRemove>()
        .command::<export::NbdServerStop>()
        .command::<export::QueryBlockExports>()
        .command::<qom::ObjectDel>()
        .command::<qom::ObjectOptions>()
        .command::<qom::QomGet>()
        .command::<qom::QomList>()
        .command::<qom::QomListProperties>()
        .command::<qom::QomListTypes>()
        .command::<qom::QomSet>()
        .event::<block::BlockIoError>()
        .event::<export::BlockExportDeleted>()
}

/// What the reference answers to one command, or nothing if it is not there.
fn ask_reference(command: &str) -> Option<Value> {
    let child = Command::new(REFERENCE)
        .args(["--chardev", "stdio,id=c", "--monitor", "c"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let Ok(mut child) = child else {
        println!("skipped: {REFERENCE} is not installed");
        return None;
    };
    let mut stdin = child.stdin.take().expect("it is piped");
    write!(stdin, "{{'execute':'qmp_capabilities'}}{command}").expect("it reads");
    // Read before it is told to end: it does not wait for what the pipe does not hold.
    let mut lines = BufReader::new(child.stdout.take().expect("it is piped")).lines();
    let reply = lines.nth(2).expect("greeting, negotiation, reply").expect("it is ASCII");
    write!(stdin, "{{'execute':'quit'}}").expect("it reads");
    child.wait().expect("it ends");
    Some(serde_json::from_str(&reply).expect("JSON"))
}

#[test]
fn the_schema_fits_into_the_references() {
    let Some(reply) = ask_reference("{'execute':'query-qmp-schema'}") else { return };
    let coverage = compare(&everything().to_value(), &reply["return"]);
    println!("{}", coverage.to_markdown());
    let mismatches: Vec<_> = coverage.mismatches().collect();
    assert!(mismatches.is_empty(), "{mismatches:#?}");
    assert_eq!(coverage.of(EntryKind::Command, &Status::Covered).count(), 30);
    assert_eq!(coverage.of(EntryKind::Command, &Status::Extra).count(), 0);
    // What newer releases have, the driver of our own tests, and nothing else.
    let mut extra: Vec<_> = [EntryKind::Member, EntryKind::Value, EntryKind::Variant, EntryKind::Feature]
        .into_iter()
        .flat_map(|kind| coverage.of(kind, &Status::Extra))
        .map(|e| format!("{} {}", e.owner, e.path))
        .collect();
    extra.sort();
    assert_eq!(
        extra,
        [
            "block-export-add arguments.type=vhost-user-blk.addr.type=inet.keep-alive-count",
            "block-export-add arguments.type=vhost-user-blk.addr.type=inet.keep-alive-idle",
            "block-export-add arguments.type=vhost-user-blk.addr.type=inet.keep-alive-interval",
            "block-export-add arguments.type=vhost-user-blk.serial",
            "block-export-add arguments.x-on-error",
            "blockdev-add arguments.driver=blkdebug.inject-error[].delay-ns",
            "blockdev-add arguments.driver=x-fault",
            "chardev-add arguments.backend.type=file.data.logtimestamp",
            "chardev-add arguments.backend.type=hub.data.logtimestamp",
            "chardev-add arguments.backend.type=mux.data.logtimestamp",
            "chardev-add arguments.backend.type=null.data.logtimestamp",
            "chardev-add arguments.backend.type=pty.data.logtimestamp",
            "chardev-add arguments.backend.type=ringbuf.data.logtimestamp",
            "chardev-add arguments.backend.type=serial.data.logtimestamp",
            "chardev-add arguments.backend.type=socket.data.logtimestamp",
            "chardev-add arguments.backend.type=stdio.data.logtimestamp",
            "chardev-add arguments.backend.type=udp.data.logtimestamp",
            "query-block arguments.flat",
            "query-block return[].inserted.children",
            "query-block return[].inserted.image.limits",
            "query-block-exports return[].x-statistics",
            "query-block-exports return[].x-transport",
            "query-blockstats return[].driver-specific.driver=x-fault",
        ]
    );
}

/// Reads an argument as our daemon does. JSON here is plain JSON; the dialect belongs to the monitor.
fn ours<T: Qapi>(text: &str, implied: Option<&str>) -> Result<(), String> {
    let json = |text: &str| serde_json::from_str(text).map_err(|e| qapi::Error::generic(e.to_string()));
    match keyval::read::<T>(text, implied, json) {
        Ok(Argument::Value(_)) => Ok(()),
        Ok(Argument::Help(_)) => Err("help".to_owned()),
        Err(error) => Err(error.desc),
    }
}

/// What the reference says about an option, without the program's name and the option itself. `Unexpected argument` is what
/// it says next if the option is right.
fn theirs(option: &str, text: &str) -> Option<String> {
    let output = Command::new(REFERENCE).args([option, text, "END"]).stdin(Stdio::null()).output().ok()?;
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    let first = message.lines().next().unwrap_or_default();
    let prefix = format!("{REFERENCE}: {option} {text}: ");
    Some(first.strip_prefix(&prefix).unwrap_or(first).to_owned())
}

#[test]
fn wrong_options_get_the_words_of_the_reference() {
    let blockdev = [
        "foo",
        "filename=x",
        "driver=file",
        "file,filename=x,x=1",
        "file,filename=x,node-name=a,locking=foo",
        "file,filename=x,node-name=a,cache=foo",
        "file,filename=x,node-name=a,cache.direct=foo",
        "file,filename=x,node-name=a,cache.foo=on",
        "file,filename=x,node-name=a,cache.direct.x=on",
        "file,foo.x=1,filename=x",
        "null-co,node-name=a,read-only=1",
        "null-co,node-name=a,read-only=ON",
        "null-co,node-name=a,size=1K",
        "null-co,node-name=a,size=09",
        "null-co,node-name=a,size=9 ",
        "null-co,node-name=a,size=99999999999999999999",
        "null-co,node-name=a,latency-ns=1.0",
        "null-co,node-name=a,latency-ns=",
        "null-co,node-name=a,latency-ns=18446744073709551616",
        "raw,file.filename=x",
        "raw,file=foo,file.driver=x",
        "raw,file.0=foo",
        "raw,file.0.x=foo,file.driver=file",
        "raw,file.driver=file,file.filename=x,file.x=1",
        "",
        "file,",
        "file,,filename=x",
        "file,filename",
        "file,x..y=1",
        "[1]",
        "driver=help",
        r#"{"driver":"null-co","node-name":"a","size":"1"}"#,
        r#"{"driver":"null-co","node-name":"a","size":1.0}"#,
        r#"{"driver":"null-co","node-name":"a","size":99999999999999999999}"#,
        r#"{"driver":"null-co","latency-ns":1.5}"#,
        r#"{"driver":"null-co","latency-ns":"5"}"#,
        r#"{"driver":"null-co","node-name":1}"#,
        r#"{"driver":null}"#,
        r#"{"driver":"raw","file":1}"#,
        r#"{"driver":"raw","file":{}}"#,
        r#"{"driver":"raw","file":{"driver":"file","filename":"x","locking":1}}"#,
        r#"{"driver":"raw","file":{"driver":"file","filename":"x","cache":{"direct":1}}}"#,
        r#"{"driver":"raw","file":{"driver":"file","filename":"x","cache":{"direct":true,"x":2}}}"#,
        "{}",
    ];
    let object = [
        "iothread",
        "id=a",
        "iothread,id=a,poll-max-ns=x",
        "iothread,id=a,foo=1",
        "foo,id=a",
        r#"{"qom-type":"iothread","id":"a","poll-max-ns":1e3}"#,
    ];
    let nbd_server = [
        "x",
        "addr.type=unix",
        "addr.type=unix,addr.path=/nowhere/s,addr.x=4",
        "addr.type=inet,addr.host=1,addr.port=x,addr.to=7a",
        "addr.type=inet,addr.host=1,max-connections=4294967296",
    ];
    let export = ["nbd,id=e", "foo,id=e,node-name=a", r#"{"type":"nbd","id":"e","node-name":"a","writable":"on"}"#];
    let monitor = ["chardev=foo,mode=x", "chardev=foo,x=y", "mode=control"];
    type Reader = fn(&str) -> Result<(), String>;
    let tables: [(&str, Reader, &[&str]); 5] = [
        ("--blockdev", |text| ours::<block::BlockdevOptions>(text, Some("driver")), &blockdev),
        ("--object", |text| ours::<qom::ObjectOptions>(text, Some("qom-type")), &object),
        ("--nbd-server", |text| ours::<export::NbdServerOptions>(text, None), &nbd_server),
        ("--export", |text| ours::<export::BlockExportOptions>(text, Some("type")), &export),
        ("--monitor", |text| ours::<control::MonitorOptions>(text, Some("chardev")), &monitor),
    ];
    for (option, read, texts) in tables {
        for text in texts {
            let Some(theirs) = theirs(option, text) else {
                println!("skipped: {REFERENCE} is not installed");
                return;
            };
            assert_eq!(read(text), Err(theirs), "{option} {text}");
        }
    }
}
