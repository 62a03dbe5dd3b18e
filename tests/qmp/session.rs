//! A session: greeting, negotiation, capabilities, several monitors, events, clients that stall or vanish.

use std::net::Shutdown;

use serde_json::json;
use tests::{Setup, known_defect, on_reference, qmp, skip, wait_for};

use crate::monitored;

#[test]
fn the_greeting() {
    let daemon = monitored();
    let greeting = daemon.qmp_raw().negotiate();
    assert_eq!(greeting["QMP"]["capabilities"], json!(["oob"]));
    let version = &greeting["QMP"]["version"];
    assert!(version["qemu"]["major"].as_u64() >= Some(10), "{version}");
    assert!(version["qemu"]["minor"].is_u64() && version["qemu"]["micro"].is_u64(), "{version}");
    assert!(version["package"].is_string(), "{version}");
    assert_eq!(&daemon.qmp().ok("query-version", json!({})), version);
}

#[test]
fn negotiation_comes_first_and_once() {
    let daemon = monitored();
    let mut qmp = daemon.qmp_raw();
    qmp.recv();
    let first = qmp.execute("query-version", json!({})).unwrap_err();
    assert_eq!(first.class, "CommandNotFound");
    assert_eq!(first.desc, "Expecting capabilities negotiation with 'qmp_capabilities'");
    qmp.ok("qmp_capabilities", json!({}));
    let second = qmp.execute("qmp_capabilities", json!({})).unwrap_err();
    assert_eq!(second.class, "CommandNotFound");
    assert_eq!(second.desc, "Capabilities negotiation is already complete, command ignored");
}

#[test]
fn capabilities() {
    let daemon = monitored();
    let mut qmp = daemon.qmp_raw();
    qmp.recv();
    let refusal = qmp.execute("qmp_capabilities", json!({"enable": ["nosuch"]})).unwrap_err();
    if !known_defect("X8") {
        assert!(refusal.desc.contains("enable"), "the error names the member: {refusal:?}");
    }
    assert!(refusal.desc.contains("nosuch"), "{refusal:?}");
    qmp.ok("qmp_capabilities", json!({"enable": ["oob", "oob"]}));
    let oob = qmp.ask(r#"{"exec-oob":"query-version","id":1}"#);
    assert_eq!(oob["error"]["desc"], "The command query-version does not support OOB");
    let both = qmp.ask(r#"{"execute":"query-version","exec-oob":"query-version"}"#);
    assert_eq!(both["error"]["desc"], "QMP input member 'execute' clashes with 'exec-oob'");
}

#[test]
fn commands_are_listed_and_described() {
    let daemon = monitored();
    let mut qmp = daemon.qmp();
    let listed = qmp.ok("query-commands", json!({}));
    let schema = qmp.ok("query-qmp-schema", json!({}));
    let mut commands: Vec<_> = listed.as_array().unwrap().iter().map(|c| c["name"].as_str().unwrap()).collect();
    let mut described: Vec<_> = schema
        .as_array()
        .unwrap()
        .iter()
        .filter(|entity| entity["meta-type"] == "command")
        .map(|entity| entity["name"].as_str().unwrap())
        .collect();
    commands.sort_unstable();
    described.sort_unstable();
    assert_eq!(commands, described);
    for name in ["blockdev-add", "block-export-add", "nbd-server-start", "query-block-exports", "quit"] {
        assert!(commands.binary_search(&name).is_ok(), "{name}");
    }
    // Every type that an entity names is there.
    let names: Vec<_> = schema.as_array().unwrap().iter().map(|entity| entity["name"].as_str().unwrap()).collect();
    for entity in schema.as_array().unwrap() {
        for member in ["arg-type", "ret-type"] {
            if let Some(name) = entity.get(member) {
                assert!(names.contains(&name.as_str().unwrap()), "{entity}");
            }
        }
        for member in entity.get("members").and_then(|members| members.as_array()).into_iter().flatten() {
            if let Some(name) = member.get("type") {
                assert!(names.contains(&name.as_str().unwrap()), "{entity}");
            }
        }
    }
}

#[test]
fn pretty_is_many_lines() {
    let daemon = Setup::new()
        .line("--chardev socket,path=qmp.sock,server=on,wait=off,id=c --monitor chardev=c,pretty=on")
        .start();
    let mut qmp = daemon.qmp();
    qmp.ok("query-version", json!({}));
    let wire = String::from_utf8(qmp.transcript.clone()).unwrap();
    assert!(wire.contains("\n    \"QMP\": {"), "{wire}");
    assert!(wire.ends_with("}\r\n"), "{wire:?}");
}

#[test]
fn several_monitors_see_the_same_events() {
    let daemon = Setup::new()
        .qmp()
        .line("--chardev socket,path=two.sock,server=on,wait=off,id=two --monitor two")
        .line("--blockdev null-co,node-name=n,size=1048576")
        .nbd_server()
        .line("--export nbd,id=e,node-name=n")
        .start();
    let (mut one, mut two) = (daemon.qmp(), qmp::Client::connect(&daemon.path("two.sock")));
    two.negotiate();
    one.ok("block-export-del", json!({"id": "e"}));
    for qmp in [&mut one, &mut two] {
        assert_eq!(qmp.event("BLOCK_EXPORT_DELETED"), json!({"id": "e"}));
    }
}

#[test]
fn no_events_before_the_negotiation() {
    let daemon = Setup::new()
        .qmp()
        .line("--chardev socket,path=two.sock,server=on,wait=off,id=two --monitor two")
        .line("--blockdev null-co,node-name=n,size=1048576")
        .nbd_server()
        .line("--export nbd,id=e,node-name=n --export nbd,id=e2,node-name=n,name=e2")
        .start();
    let (mut one, mut late) = (daemon.qmp(), qmp::Client::connect(&daemon.path("two.sock")));
    late.recv();
    one.ok("block-export-del", json!({"id": "e"}));
    one.event("BLOCK_EXPORT_DELETED");
    late.ok("qmp_capabilities", json!({}));
    one.ok("block-export-del", json!({"id": "e2"}));
    assert_eq!(late.event("BLOCK_EXPORT_DELETED"), json!({"id": "e2"}));
}

#[test]
fn a_client_after_another() {
    let daemon = monitored();
    for _ in 0..5 {
        daemon.qmp().ok("query-version", json!({}));
    }
}

#[test]
fn a_second_client_waits_for_the_first_to_leave() {
    let daemon = monitored();
    let mut first = daemon.qmp();
    let mut second = daemon.qmp_raw();
    second.send(r#"{"execute":"qmp_capabilities"}"#);
    first.ok("query-version", json!({}));
    drop(first);
    assert!(second.recv().get("QMP").is_some());
    assert_eq!(second.recv(), json!({"return": {}}));
}

#[test]
fn a_client_that_vanishes_in_mid_message() {
    let daemon = monitored();
    for half in
        [&b"{\"execute\":\"query-ver"[..], b"{", b"\"", b"[[[[", b"{\"execute\":\"query-version\",\"id\":\"\xc3"]
    {
        let mut qmp = daemon.qmp();
        qmp.send_raw(half);
        drop(qmp);
        daemon.qmp().ok("query-version", json!({}));
    }
    // One that sends a whole request and does not stay for the answer.
    let mut qmp = daemon.qmp();
    qmp.send(r#"{"execute":"query-qmp-schema"}"#);
    drop(qmp);
    daemon.qmp().ok("query-version", json!({}));
}

#[test]
fn a_client_that_stops_sending_still_gets_its_answers() {
    let daemon = monitored();
    let mut qmp = daemon.qmp();
    qmp.send(r#"{"execute":"query-version","id":1}"#);
    qmp.stream().shutdown(Shutdown::Write).unwrap();
    // The reference treats the half-closed connection as closed and may drop the answer.
    if !on_reference() {
        assert_eq!(qmp.recv_or_end().map(|answer| answer["id"].clone()), Some(json!(1)));
    }
    drop(qmp);
    daemon.qmp().ok("query-version", json!({}));
}

#[test]
fn a_client_that_does_not_read_holds_up_nobody() {
    if on_reference() {
        skip!("the reference takes requests without end and grows");
    }
    let daemon =
        Setup::new().qmp().line("--chardev socket,path=two.sock,server=on,wait=off,id=two --monitor two").start();
    let mut slow = daemon.qmp();
    slow.stream().set_nonblocking(true).unwrap();
    // Requests with large answers until the daemon stops taking them.
    // Each with a long id, so that not many fit into the socket's buffer.
    let request = format!("{{\"execute\":\"query-qmp-schema\",\"id\":\"{}\"}}\n", "x".repeat(2000));
    let request = request.as_bytes();
    let mut sent = 0_u32;
    let mut stuck = 0;
    while stuck < 50 && sent < 5000 {
        match std::io::Write::write(&mut slow.stream(), request) {
            Ok(n) => {
                // A part of a request would spoil the stream for the count below.
                assert_eq!(n, request.len());
                sent += 1;
                stuck = 0;
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                // The other monitor answers while this one is stuck.
                let mut other = qmp::Client::connect(&daemon.path("two.sock"));
                other.negotiate();
                other.ok("query-version", json!({}));
                stuck += 1;
            }
            Err(error) => panic!("{error}"),
        }
    }
    assert!(sent < 5000, "the daemon takes requests without end");
    let rss = daemon.usage().memory_kib;
    assert!(rss < 200 * 1024, "{rss} kB for a client that does not read");
    slow.stream().set_nonblocking(false).unwrap();
    for _ in 0..sent {
        assert!(slow.answer()["return"].is_array());
    }
    slow.ok("query-version", json!({}));
}

#[test]
fn many_requests_in_one_write() {
    let daemon = monitored();
    let mut qmp = daemon.qmp();
    let many: String = (0..200).map(|i| format!("{{\"execute\":\"query-version\",\"id\":{i}}}")).collect();
    qmp.send_raw(many.as_bytes());
    for i in 0..200 {
        assert_eq!(qmp.answer()["id"], i);
    }
}

#[test]
fn chardevs_come_and_go() {
    let daemon = monitored();
    let mut qmp = daemon.qmp();
    let backend = json!({"type": "socket", "data": {
        "addr": {"type": "unix", "data": {"path": daemon.path("extra.sock")}}, "server": true, "wait": false}});
    qmp.ok("chardev-add", json!({"id": "extra", "backend": backend}));
    let labels = |qmp: &mut qmp::Client| {
        let listed = qmp.ok("query-chardev", json!({}));
        let mut labels: Vec<_> =
            listed.as_array().unwrap().iter().map(|dev| dev["label"].as_str().unwrap().to_owned()).collect();
        labels.sort_unstable();
        labels
    };
    assert_eq!(labels(&mut qmp), ["extra", "qmp"]);
    let text = qmp.refused("chardev-add", json!({"id": "extra", "backend": backend}));
    assert!(text.contains("extra"), "{text}");
    qmp.ok("chardev-remove", json!({"id": "extra"}));
    assert_eq!(labels(&mut qmp), ["qmp"]);
    let text = qmp.refused("chardev-remove", json!({"id": "qmp"}));
    assert_eq!(text, "Chardev 'qmp' is busy");
    let text = qmp.refused("chardev-remove", json!({"id": "nosuch"}));
    assert_eq!(text, "Chardev 'nosuch' not found");
}

#[test]
fn objects_come_and_go() {
    let daemon = monitored();
    let mut qmp = daemon.qmp();
    qmp.ok("object-add", json!({"qom-type": "iothread", "id": "t"}));
    let threads = || std::fs::read_dir(format!("/proc/{}/task", daemon.pid())).unwrap().count();
    let with = threads();
    let text = qmp.refused("object-add", json!({"qom-type": "iothread", "id": "t"}));
    assert_eq!(text, "attempt to add duplicate property 't' to object (type 'container')");
    qmp.ok("object-del", json!({"id": "t"}));
    wait_for("the thread to end", || (threads() < with).then_some(()));
    assert_eq!(qmp.refused("object-del", json!({"id": "t"})), "object 't' not found");
}

#[test]
fn a_failed_open_closes_no_descriptor_of_others() {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let out = theirs.try_clone().unwrap();
    let mut daemon = Setup::new()
        .image("a.img", 1 << 20)
        .stdio(theirs.into(), out.into())
        .line("--chardev stdio,id=c --monitor c")
        .spawn();
    let mut qmp = qmp::Client::over(ours);
    qmp.negotiate();
    if known_defect("X2") {
        return;
    }
    for options in [json!({"pr-manager": "nosuch"}), json!({"aio": "native"}), json!({"filename": "nosuch"})] {
        let mut arguments = json!({"driver": "file", "node-name": "f", "filename": "a.img"});
        arguments.as_object_mut().unwrap().extend(options.as_object().unwrap().clone());
        qmp.refused("blockdev-add", arguments);
        qmp.ok("query-version", json!({}));
    }
    qmp.ok("quit", json!({}));
    assert_eq!(daemon.wait().code(), Some(0));
}

#[test]
fn an_authorisation_without_credentials_is_an_error() {
    let daemon = monitored();
    let mut qmp = daemon.qmp();
    let start = json!({"addr": {"type": "unix", "data": {"path": daemon.path("n.sock")}}, "tls-authz": "nosuch"});
    let started = qmp.execute("nbd-server-start", start);
    if known_defect("X6") {
        return;
    }
    let text = started.unwrap_err().desc;
    assert!(text.contains("tls-authz") || text.contains("nosuch") || text.contains("TLS"), "{text}");
    assert_eq!(qmp.refused("nbd-server-stop", json!({})), "NBD server not running");
}

#[test]
fn properties_of_an_iothread_change_while_it_runs() {
    let daemon = monitored();
    let mut qmp = daemon.qmp();
    let given = json!({
        "qom-type": "iothread", "id": "t", "poll-max-ns": 32768, "poll-grow": 3, "poll-shrink": 4, "aio-max-batch": 5
    });
    qmp.ok("object-add", given);
    let names = ["poll-max-ns", "poll-grow", "poll-shrink", "aio-max-batch"];
    qmp.ok("object-add", json!({"qom-type": "iothread", "id": "d"}));
    for (name, value) in names.into_iter().zip([32768i64, 0, 0, 0]) {
        assert_eq!(qmp.ok("qom-get", json!({"path": "/objects/d", "property": name})), json!(value));
    }
    for (name, value) in names.into_iter().zip([32768i64, 3, 4, 5]) {
        let place = json!({"path": "/objects/t", "property": name});
        assert_eq!(qmp.ok("qom-get", place.clone()), json!(value));
        let set = |value: serde_json::Value| json!({"path": "/objects/t", "property": name, "value": value});
        let text = qmp.refused("qom-set", set(json!(-1)));
        assert_eq!(text, format!("{name} value must be in range [0, 9223372036854775807]"));
        let text = qmp.refused("qom-set", set(json!(1.5)));
        assert_eq!(text, format!("Invalid parameter type for '{name}', expected: integer"));
        assert_eq!(qmp.ok("qom-get", place.clone()), json!(value), "nothing has changed");
        for good in [i64::MAX, 1, 0] {
            qmp.ok("qom-set", set(json!(good)));
            assert_eq!(qmp.ok("qom-get", place.clone()), json!(good));
        }
        let text = qmp.refused("object-add", json!({"qom-type": "iothread", "id": "u", name: -1}));
        assert_eq!(text, format!("{name} value must be in range [0, 9223372036854775807]"));
    }
    let text = qmp.refused("object-add", json!({"qom-type": "iothread", "id": "u", "thread-pool-max": 1i64 << 31}));
    assert_eq!(text, "bad thread-pool-min/thread-pool-max values");
    let listed = qmp.ok("qom-list-properties", json!({"typename": "iothread"}));
    let mut listed: Vec<_> = listed.as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap()).collect();
    listed.sort_unstable();
    let all =
        ["aio-max-batch", "poll-grow", "poll-max-ns", "poll-shrink", "thread-pool-max", "thread-pool-min", "type"];
    assert_eq!(listed, all);
}
