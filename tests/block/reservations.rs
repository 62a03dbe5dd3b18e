//! Persistent reservations through QMP, with the helpers that there are and with one that only pretends
//! [drop-in A.13, X2, X9, X13]. Real devices are in the VM suite.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;

use serde_json::{Value, json};
use tests::{DEADLINE, Daemon, Setup, on_reference, qmp, skip, wait_for};

use crate::MIB;

/// The helpers to test with: ours, where it has been built, and QEMU's, where it is installed.
fn helpers() -> Vec<PathBuf> {
    let own = std::env::current_exe().unwrap();
    let ours = own.ancestors().skip(1).take(2).map(|dir| dir.join("qemu-pr-helper"));
    let all: Vec<_> = ours.chain(["/usr/bin/qemu-pr-helper".into()]).filter(|path| path.is_file()).collect();
    tests::program::note("HELPERS", &format!("{all:?}"));
    all
}

/// A running helper.
struct Helper(Child);

impl Helper {
    fn start(program: &Path, socket: &Path) -> Self {
        let child = Command::new(program).arg("-k").arg(socket).stderr(Stdio::null()).spawn().unwrap();
        Self(child)
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        // The child is ours and not yet waited for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A daemon with a second monitor, a manager `m` whose helper is at `pr.sock`, and a node `d` that uses it.
fn daemon() -> Daemon {
    let second = "--chardev socket,path=second.sock,server=on,wait=off,id=second --monitor chardev=second";
    let nodes = "--object pr-manager-helper,id=m,path=pr.sock --blockdev file,node-name=d,filename=a.img,pr-manager=m";
    Setup::new().qmp().line(second).image("a.img", MIB).line(nodes).start()
}

fn second(daemon: &Daemon) -> qmp::Client {
    let mut client = qmp::Client::connect(&daemon.path("second.sock"));
    client.negotiate();
    client
}

fn managers(qmp: &mut qmp::Client) -> Value {
    qmp.ok("query-pr-managers", json!({}))
}

/// Waits for the event that says so.
fn wait_for_status(qmp: &mut qmp::Client, connected: bool) {
    loop {
        let data = qmp.event("PR_MANAGER_STATUS_CHANGED");
        assert_eq!(data["id"], "m");
        if data["connected"] == connected {
            return;
        }
    }
}

#[test]
fn what_is_no_device_has_the_sense_that_it_has() {
    if on_reference() {
        skip!("the reference has no such commands");
    }
    for program in helpers() {
        let daemon = daemon();
        let mut qmp = daemon.qmp();
        let _helper = Helper::start(&program, &daemon.path("pr.sock"));
        wait_for_status(&mut qmp, true);
        assert_eq!(managers(&mut qmp), json!([{"id": "m", "connected": true}]));
        let file = json!({"driver": "file", "filename": "a.img", "pr-manager": "m"});
        let add = |name: &str, more: Value| {
            let mut options = json!({"node-name": name});
            options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            options
        };
        let mut read_only = file.clone();
        read_only["read-only"] = true.into();
        qmp.ok("blockdev-add", add("ro", read_only));
        qmp.ok("blockdev-add", add("raw", json!({"driver": "raw", "file": "d"})));
        qmp.ok("blockdev-add", add("debug", json!({"driver": "blkdebug", "image": "raw"})));
        qmp.ok("object-add", json!({"qom-type": "throttle-group", "id": "g"}));
        qmp.ok("blockdev-add", add("slow", json!({"driver": "throttle", "file": "debug", "throttle-group": "g"})));
        qmp.ok("blockdev-add", add("part", json!({"driver": "raw", "file": "d", "offset": 512})));
        let terminated = "I/O process terminated, sense b/00/06";
        let unknown = "invalid command operation code, sense 5/20/00";
        for (node, said) in [("d", terminated), ("slow", terminated), ("ro", terminated)] {
            let text = qmp.refused("x-block-pr-in", json!({"node-name": node, "action": "read-keys"}));
            assert_eq!(text, format!("READ KEYS through the helper failed on node '{node}': {said}"));
        }
        for (node, said) in [("d", terminated), ("slow", terminated), ("ro", unknown)] {
            let text = qmp.refused("x-block-pr-out", json!({"node-name": node, "action": "clear", "key": 1}));
            assert_eq!(text, format!("CLEAR through the helper failed on node '{node}': {said}"));
        }
        let text = qmp.refused("x-block-pr-in", json!({"node-name": "part", "action": "read-keys"}));
        assert_eq!(
            text,
            format!("READ KEYS failed on node 'part': {unknown} (the node has no persistent reservations)")
        );
    }
}

#[test]
fn a_node_that_names_no_manager_changes_nothing() {
    let mut setup = Setup::new().qmp().image("a.img", MIB).line("--object iothread,id=t").start();
    let mut qmp = setup.qmp();
    let open = setup.open_fds();
    let add = |manager: &str| json!({"driver": "file", "node-name": "d", "filename": "a.img", "pr-manager": manager});
    for _ in 0..3 {
        let text = qmp.refused("blockdev-add", add("zz"));
        assert_eq!(text, "No persistent reservation manager with id 'zz'");
        let text = qmp.refused("blockdev-add", add("t"));
        assert_eq!(text, "Object with id 't' is not a persistent reservation manager");
    }
    if !tests::known_defect("X2") {
        assert_eq!(setup.open_fds(), open);
    }
    assert_eq!(qmp.ok("query-named-block-nodes", json!({})), json!([]));
    assert!(setup.alive());
}

#[test]
fn a_manager_comes_and_goes() {
    if on_reference() {
        skip!("the reference connects in object-add and lets used managers be deleted");
    }
    let daemon = daemon();
    let mut qmp = daemon.qmp();
    assert_eq!(managers(&mut qmp), json!([{"id": "m", "connected": false}]));
    assert_eq!(qmp.refused("object-del", json!({"id": "m"})), "object 'm' is in use, can not be deleted");
    qmp.ok("blockdev-del", json!({"node-name": "d"}));
    assert_eq!(qmp.ok("qom-get", json!({"path": "/objects/m", "property": "path"})), json!("pr.sock"));
    let types = qmp.ok("qom-list-types", json!({"implements": "pr-manager"}));
    assert_eq!(types, json!([{"name": "pr-manager-helper", "parent": "pr-manager"}]));
    // The helper may come later, and somewhere else.
    let listener = UnixListener::bind(daemon.path("other.sock")).unwrap();
    qmp.ok("qom-set", json!({"path": "m", "property": "path", "value": "other.sock"}));
    let peer = Peer::accept(&listener);
    wait_for_status(&mut qmp, true);
    drop(peer);
    wait_for_status(&mut qmp, false);
    qmp.ok("object-del", json!({"id": "m"}));
    assert_eq!(managers(&mut qmp), json!([]));
    assert_eq!(qmp.refused("object-del", json!({"id": "m"})), "object 'm' not found");
    qmp.ok("object-add", json!({"qom-type": "pr-manager-helper", "id": "m", "path": "pr.sock"}));
    assert_eq!(managers(&mut qmp), json!([{"id": "m", "connected": false}]));
}

#[test]
fn a_helper_is_killed_and_started_again_under_load() {
    if on_reference() {
        skip!("the reference has no such commands");
    }
    for program in helpers() {
        let daemon = daemon();
        let mut qmp = daemon.qmp();
        let (answered, done) = (AtomicU32::new(0), AtomicBool::new(false));
        let mut client = second(&daemon);
        thread::scope(|scope| {
            scope.spawn(|| {
                // Each request is answered, by the helper or in its place.
                while !done.load(Ordering::Relaxed) {
                    let text = client.refused("x-block-pr-in", json!({"node-name": "d", "action": "read-keys"}));
                    let by_helper = text.ends_with("I/O process terminated, sense b/00/06");
                    assert!(by_helper || text.contains("communication failure, sense b/08/00"), "{text}");
                    answered.fetch_add(u32::from(by_helper), Ordering::Relaxed);
                }
            });
            for _ in 0..5 {
                let _ = std::fs::remove_file(daemon.path("pr.sock"));
                let helper = Helper::start(&program, &daemon.path("pr.sock"));
                wait_for_status(&mut qmp, true);
                let before = answered.load(Ordering::Relaxed);
                wait_for("answers", || (answered.load(Ordering::Relaxed) > before + 3).then_some(()));
                drop(helper);
                wait_for_status(&mut qmp, false);
            }
            done.store(true, Ordering::Relaxed);
        });
        assert_eq!(managers(&mut qmp), json!([{"id": "m", "connected": false}]));
    }
}

/// The helper's end of a connection, in the classic protocol.
struct Peer(UnixStream);

impl Peer {
    fn accept(listener: &UnixListener) -> Self {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.write_all(&[0; 4]).unwrap();
        let mut wanted = [1; 4];
        stream.read_exact(&mut wanted).unwrap();
        assert_eq!(wanted, [0; 4]);
        Self(stream)
    }

    /// The next command: the first ten bytes of its CDB, and its parameters. Descriptors that come are not taken.
    fn command(&mut self) -> (Vec<u8>, Vec<u8>) {
        let mut cdb = vec![0; 16];
        self.0.read_exact(&mut cdb).unwrap();
        let length = if cdb[0] == 0x5f { usize::from(u16::from_be_bytes([cdb[7], cdb[8]])) } else { 0 };
        let mut parameters = vec![0; length];
        self.0.read_exact(&mut parameters).unwrap();
        cdb.truncate(10);
        (cdb, parameters)
    }

    fn answer(&mut self, status: u8, data: &[u8]) {
        let mut reply = vec![0, 0, 0, status];
        reply.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
        reply.extend([0; 96]);
        reply.extend(data);
        self.0.write_all(&reply).unwrap();
    }
}

fn send(qmp: &mut qmp::Client, command: &str, arguments: &Value) {
    qmp.send(&json!({"execute": command, "arguments": arguments}).to_string());
}

#[test]
fn nobody_waits_for_a_helper_that_hangs() {
    if on_reference() {
        skip!("the reference has no such commands");
    }
    let daemon = daemon();
    let listener = UnixListener::bind(daemon.path("pr.sock")).unwrap();
    let (mut waiting, mut qmp) = (second(&daemon), daemon.qmp());
    let mut peer = Peer::accept(&listener);
    send(&mut waiting, "x-block-pr-in", &json!({"node-name": "d", "action": "read-reservation"}));
    assert_eq!(peer.command().0, [0x5e, 1, 0, 0, 0, 0, 0, 0x20, 0, 0]);
    qmp.ok("query-version", json!({}));
    qmp.ok("blockdev-add", json!({"driver": "null-co", "node-name": "n"}));
    qmp.ok("query-named-block-nodes", json!({}));
    // The node of the request stays in its hands; its name is free.
    qmp.ok("blockdev-del", json!({"node-name": "d"}));
    assert_eq!(qmp.refused("object-del", json!({"id": "m"})), "object 'm' is in use, can not be deleted");
    peer.answer(0, &[0, 0, 0, 7, 0, 0, 0, 0]);
    let answer = waiting.answer();
    assert_eq!(answer["return"], json!({"route": "helper", "action": "read-reservation", "generation": 7}));
    wait_for("the manager to be unused", || qmp.execute("object-del", json!({"id": "m"})).ok());
}

#[test]
fn the_end_of_the_daemon_waits_for_no_helper() {
    if on_reference() {
        skip!("the reference has no such commands");
    }
    let mut daemon = daemon();
    let listener = UnixListener::bind(daemon.path("pr.sock")).unwrap();
    let mut qmp = daemon.qmp();
    let mut peer = Peer::accept(&listener);
    send(&mut qmp, "x-block-pr-in", &json!({"node-name": "d", "action": "read-keys"}));
    peer.command();
    assert_eq!(daemon.stop(), "");
}

#[test]
fn answers_are_decoded() {
    if on_reference() {
        skip!("the reference has no such commands");
    }
    let daemon = daemon();
    let listener = UnixListener::bind(daemon.path("pr.sock")).unwrap();
    let mut qmp = daemon.qmp();
    let mut peer = Peer::accept(&listener);
    let mut read = |action: &str, code: u8, status: u8, data: &[u8]| {
        send(&mut qmp, "x-block-pr-in", &json!({"node-name": "d", "action": action}));
        assert_eq!(peer.command().0, [0x5e, code, 0, 0, 0, 0, 0, 0x20, 0, 0]);
        peer.answer(status, data);
        let answer = qmp.answer();
        answer.get("return").unwrap_or(&answer["error"]["desc"]).clone()
    };
    let key = [0xff; 8];
    let keys = [&[0, 0, 0, 9, 0, 0, 0, 16][..], &key, &[0, 0, 0, 0, 0, 0, 0, 1]].concat();
    assert_eq!(
        read("read-keys", 0, 0, &keys),
        json!({"route": "helper", "action": "read-keys", "generation": 9, "keys": [u64::MAX, 1], "total": 2})
    );
    let held = [&[0, 0, 0, 9, 0, 0, 0, 16][..], &key, &[0, 0, 0, 0, 0, 5, 0, 0]].concat();
    assert_eq!(
        read("read-reservation", 1, 0, &held),
        json!({"route": "helper", "action": "read-reservation", "generation": 9,
            "holder": {"key": u64::MAX, "type": "write-exclusive-registrants-only"}})
    );
    assert_eq!(
        read("report-capabilities", 2, 0, &[0, 8, 0x8d, 0x81, 0xea, 1, 0, 0]),
        json!({"route": "helper", "action": "report-capabilities", "replace-lost-reservation": true,
            "compatible-reservations": false, "initiators": true, "all-target-ports": true, "persist": true,
            "persist-active": true, "allow-commands": 0, "types": ["write-exclusive", "exclusive-access",
                "write-exclusive-registrants-only", "exclusive-access-registrants-only",
                "write-exclusive-all-registrants", "exclusive-access-all-registrants"]})
    );
    let port = [&[0x45, 0, 0, 0x24][..], b"iqn.2000-01.test:a,i,0x00023d000001\0"].concat();
    let status =
        [&[0, 0, 0, 9, 0, 0, 0, 64][..], &key, &[0, 0, 0, 0, 1, 5, 0, 0, 0, 0, 0, 2, 0, 0, 0, 40], &port].concat();
    let hex: String = port.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(
        read("read-full-status", 3, 0, &status),
        json!({"route": "helper", "action": "read-full-status", "generation": 9, "truncated": false, "registrations": [{
            "key": u64::MAX, "all-target-ports": false, "target-port": 2, "type": "write-exclusive-registrants-only",
            "initiator": "iqn.2000-01.test:a,i,0x00023d000001", "transport-id": hex}]})
    );
    let text = |what: &str| json!(format!("READ KEYS through the helper failed on node 'd': {what}"));
    assert_eq!(read("read-keys", 0, 0x18, &[]), text("reservation conflict"));
    assert_eq!(read("read-keys", 0, 0x08, &[]), text("the device is busy"));
    let malformed = text("logical unit communication failure, sense b/08/00");
    assert_eq!(read("read-keys", 0, 0, &[1, 2, 3]), malformed);
}

#[test]
fn every_change_is_the_command_that_it_is_called() {
    if on_reference() {
        skip!("the reference has no such commands");
    }
    let daemon = daemon();
    let listener = UnixListener::bind(daemon.path("pr.sock")).unwrap();
    let mut qmp = daemon.qmp();
    let mut peer = Peer::accept(&listener);
    let id = "06".to_owned() + &"00".repeat(23);
    let kind = "exclusive-access";
    // Action, members, code, type, keys, the rest of the parameters.
    let cases = [
        ("register", json!({"key": 1, "new-key": 2}), 0, 0, (1, 2), "0000000001000000".to_owned()),
        (
            "register",
            json!({"new-key": 2, "persist": false, "all-target-ports": true, "initiators": [id, id]}),
            0,
            0,
            (0, 2),
            format!("000000000c00000000000030{id}{id}"),
        ),
        ("reserve", json!({"key": 1, "type": kind}), 1, 3, (1, 0), "0000000000000000".into()),
        ("release", json!({"key": 1, "type": kind}), 2, 3, (1, 0), "0000000000000000".into()),
        ("clear", json!({"key": 1}), 3, 0, (1, 0), "0000000000000000".into()),
        ("preempt", json!({"key": 1, "victim": 2, "type": kind}), 4, 3, (1, 2), "0000000000000000".into()),
        ("preempt-and-abort", json!({"key": 1, "victim": 2, "type": kind}), 5, 3, (1, 2), "0000000000000000".into()),
        ("register-and-ignore", json!({"new-key": 2}), 6, 0, (0, 2), "0000000001000000".into()),
        (
            "register-and-move",
            json!({"key": 1, "new-key": 2, "unregister": true, "target-port": 258, "initiator": id}),
            7,
            0,
            (1, 2),
            format!("0003010200000018{id}"),
        ),
        ("replace-lost-reservation", json!({"new-key": 2, "type": kind}), 8, 3, (0, 2), "0000000001000000".into()),
    ];
    for (action, mut arguments, code, kind, (key, other), rest) in cases {
        arguments["node-name"] = "d".into();
        arguments["action"] = action.into();
        send(&mut qmp, "x-block-pr-out", &arguments);
        let (cdb, parameters) = peer.command();
        let length = u8::try_from(parameters.len()).unwrap();
        assert_eq!(cdb, [0x5f, code, kind, 0, 0, 0, 0, 0, length, 0], "{action}");
        let shown: String = parameters.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(shown, format!("{key:016x}{other:016x}{rest}"), "{action}");
        peer.answer(0, &[]);
        assert_eq!(qmp.answer()["return"], json!({"route": "helper"}), "{action}");
    }
    let short = json!({"node-name": "d", "action": "register", "new-key": 1, "initiators": ["06"]});
    let text = qmp.refused("x-block-pr-out", short);
    assert_eq!(text, "Parameter 'initiators' expects a TransportID in hexadecimal digits");
}
