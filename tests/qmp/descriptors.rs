//! Descriptors that clients pass: names, sets, and a daemon that can open nothing by itself. The reference's storage daemon
//! has none of the commands.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::IoSlice;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::{Value, json};
use tests::{Setup, on_reference, qmp, skip, wait_for};

/// Sends a request with descriptors, and gives the answer.
fn pass(client: &mut qmp::Client, request: &Value, fds: &[RawFd]) -> Value {
    let text = request.to_string();
    let control = [ControlMessage::ScmRights(fds)];
    let sent =
        sendmsg::<()>(client.stream().as_raw_fd(), &[IoSlice::new(text.as_bytes())], &control, MsgFlags::empty(), None);
    assert_eq!(sent.unwrap(), text.len());
    client.answer()
}

fn getfd(client: &mut qmp::Client, name: &str, fd: &impl AsRawFd) {
    let answer = pass(client, &json!({"execute": "getfd", "arguments": {"fdname": name}}), &[fd.as_raw_fd()]);
    assert_eq!(answer, json!({"return": {}}));
}

fn add_fd(client: &mut qmp::Client, set: Option<i64>, fd: &impl AsRawFd) -> Value {
    let arguments = set.map_or_else(|| json!({}), |set| json!({"fdset-id": set}));
    let mut answer = pass(client, &json!({"execute": "add-fd", "arguments": arguments}), &[fd.as_raw_fd()]);
    answer["return"].take()
}

fn null() -> File {
    File::open("/dev/null").unwrap()
}

#[test]
fn names_belong_to_a_monitor() {
    if on_reference() {
        skip!("the reference has no getfd here");
    }
    let daemon =
        Setup::new().qmp().line("--chardev socket,path=other.sock,server=on,wait=off,id=other --monitor other").start();
    let (mut qmp, mut other) = (daemon.qmp(), qmp::Client::connect(&daemon.path("other.sock")));
    other.negotiate();
    let before = daemon.open_fds();
    let name = |name: &str| json!({"fdname": name});
    assert_eq!(qmp.refused("getfd", name("a")), "No file descriptor supplied via SCM_RIGHTS");
    getfd(&mut qmp, "a", &null());
    getfd(&mut qmp, "a", &null());
    wait_for("the second one takes the first one's place", || (daemon.open_fds() == before + 1).then_some(()));
    let refusal = pass(&mut qmp, &json!({"execute": "getfd", "arguments": name("1a")}), &[null().as_raw_fd()]);
    assert_eq!(refusal["error"]["desc"], "Parameter 'fdname' expects a name not starting with a digit");
    assert_eq!(other.refused("closefd", name("a")), "File descriptor named 'a' not found");
    qmp.ok("closefd", name("a"));
    assert_eq!(qmp.refused("closefd", name("a")), "File descriptor named 'a' not found");
    wait_for("everything is closed", || (daemon.open_fds() == before).then_some(()));
    // What came with another command is kept until a command wants it; of several, the first one.
    pass(&mut qmp, &json!({"execute": "query-version"}), &[null().as_raw_fd(), null().as_raw_fd()]);
    qmp.ok("getfd", name("late"));
    assert_eq!(qmp.refused("getfd", name("later")), "No file descriptor supplied via SCM_RIGHTS");
    qmp.ok("closefd", name("late"));
    wait_for("descriptors to be closed", || (daemon.open_fds() == before).then_some(()));
    // A client that passes without end is bounded, and its end closes what it left.
    let many: Vec<File> = (0..16).map(|_| null()).collect();
    let numbers: Vec<RawFd> = many.iter().map(AsRawFd::as_raw_fd).collect();
    for _ in 0..100 {
        pass(&mut qmp, &json!({"execute": "query-version"}), &numbers);
    }
    let most = before + 2 * numbers.len();
    wait_for("descriptors to be closed", || (daemon.open_fds() <= most).then_some(()));
    // Half a request with descriptors, and then the end.
    sendmsg::<()>(
        qmp.stream().as_raw_fd(),
        &[IoSlice::new(b"{'execute'")],
        &[ControlMessage::ScmRights(&numbers)],
        MsgFlags::empty(),
        None,
    )
    .unwrap();
    drop(qmp);
    let mut qmp = daemon.qmp();
    qmp.ok("query-version", json!({}));
    let most = before + numbers.len();
    wait_for("descriptors to be closed", || (daemon.open_fds() <= most).then_some(()));
}

#[test]
fn requests_in_a_row_keep_their_descriptors() {
    if on_reference() {
        skip!("the reference has no getfd here");
    }
    let daemon = super::monitored();
    let mut qmp = daemon.qmp();
    let files: Vec<File> =
        (0..6).map(|n| OpenOptions::new().read(n % 2 == 0).write(n % 2 == 1).open("/dev/null").unwrap()).collect();
    for (number, file) in files.iter().enumerate() {
        let text = json!({"execute": "add-fd", "arguments": {"fdset-id": number}}).to_string();
        let control = [ControlMessage::ScmRights(&[file.as_raw_fd()])];
        sendmsg::<()>(qmp.stream().as_raw_fd(), &[IoSlice::new(text.as_bytes())], &control, MsgFlags::empty(), None)
            .unwrap();
    }
    for number in 0..files.len() {
        assert_eq!(qmp.answer()["return"]["fdset-id"], number);
    }
    for number in 0..files.len() {
        let out = json!({"out": format!("/dev/fdset/{number}")});
        let add = json!({"id": format!("c{number}"), "backend": {"type": "file", "data": out}});
        // Each set got its own: only every second one can be written to.
        assert_eq!(qmp.execute("chardev-add", add).is_ok(), number % 2 == 1, "{number}");
    }
}

#[test]
fn sets_open_the_file_with_the_right_access() {
    if on_reference() {
        skip!("the reference has no add-fd here");
    }
    let daemon = Setup::new().qmp().image("d.img", 1 << 20).start();
    let mut qmp = daemon.qmp();
    let before = daemon.open_fds();
    let path = daemon.path("d.img");
    let (reader, writer) = (File::open(&path).unwrap(), OpenOptions::new().read(true).write(true).open(&path).unwrap());
    assert_eq!(qmp.refused("add-fd", json!({})), "No file descriptor supplied via SCM_RIGHTS");
    let wrong = pass(&mut qmp, &json!({"execute": "add-fd", "arguments": {"fdset-id": -1}}), &[reader.as_raw_fd()]);
    assert_eq!(wrong["error"]["desc"], "Parameter 'fdset-id' expects a non-negative value");
    assert_eq!(add_fd(&mut qmp, None, &reader)["fdset-id"], 0);
    let read_only = add_fd(&mut qmp, Some(5), &reader)["fd"].clone();
    let add = |node: &str, set: &str, read_only: bool| json!({"driver": "file", "node-name": node, "filename": format!("/dev/fdset/{set}"), "read-only": read_only});
    let no_match = "Failed to find file descriptor with matching flags=0x2";
    assert_eq!(qmp.refused("blockdev-add", add("n", "5", false)), no_match);
    add_fd(&mut qmp, Some(5), &writer);
    qmp.ok("blockdev-add", add("n", "5", false));
    qmp.ok(
        "blockdev-add",
        json!({"driver": "file", "node-name": "auto", "filename": "/dev/fdset/0", "auto-read-only": true}),
    );
    assert_eq!(qmp.refused("blockdev-add", add("x", "77", true)), "Failed to find fdset /dev/fdset/77");
    assert_eq!(qmp.refused("blockdev-add", add("x", "x", true)), "Could not parse fdset /dev/fdset/x");
    assert_eq!(
        qmp.refused("remove-fd", json!({"fdset-id": 5, "fd": 9999})),
        "File descriptor named 'fdset-id:5, fd:9999' not found"
    );
    assert_eq!(qmp.refused("remove-fd", json!({"fdset-id": 9})), "File descriptor named 'fdset-id:9' not found");
    qmp.ok("remove-fd", json!({"fdset-id": 5, "fd": read_only}));
    qmp.ok("remove-fd", json!({"fdset-id": 5}));
    qmp.ok("remove-fd", json!({"fdset-id": 0}));
    // A set that files are open through is remembered without members.
    assert_eq!(qmp.ok("query-fdsets", json!({})), json!([{"fdset-id": 5, "fds": []}, {"fdset-id": 0, "fds": []}]));
    qmp.ok("blockdev-del", json!({"node-name": "n"}));
    qmp.ok("blockdev-del", json!({"node-name": "auto"}));
    assert_eq!(qmp.ok("query-fdsets", json!({})), json!([]));
    wait_for("all to be closed", || (daemon.open_fds() == before).then_some(()));
}

#[test]
fn a_daemon_that_may_open_nothing_is_given_everything() {
    if on_reference() {
        skip!("the reference has no getfd here");
    }
    let (ours, theirs) = UnixStream::pair().unwrap();
    let theirs = std::os::fd::OwnedFd::from(theirs);
    let line = format!("--chardev socket,fd={},id=c --monitor c --sandbox strict", theirs.as_raw_fd());
    let daemon = Setup::new().image("d.img", 1 << 20).line(&line).inherit(theirs).spawn();
    let mut qmp = qmp::Client::over(ours);
    qmp.negotiate();
    // Nothing can be found or made in its folder any more, and the sandbox would not let it either.
    let image = OpenOptions::new().read(true).write(true).open(daemon.path("d.img")).unwrap();
    let listener = UnixListener::bind(daemon.path("nbd.sock")).unwrap();
    let folder = daemon.path("").to_path_buf();
    let plain = json!({"driver": "file", "node-name": "n", "filename": "d.img"});
    let refusal = qmp.refused("blockdev-add", plain);
    assert!(refusal.starts_with("Could not open 'd.img'"), "{refusal}");
    add_fd(&mut qmp, Some(1), &image);
    qmp.ok("blockdev-add", json!({"driver": "file", "node-name": "n", "filename": "/dev/fdset/1"}));
    getfd(&mut qmp, "nbd", &listener);
    qmp.ok("nbd-server-start", json!({"addr": {"type": "fd", "data": {"str": "nbd"}}}));
    assert_eq!(qmp.refused("closefd", json!({"fdname": "nbd"})), "File descriptor named 'nbd' not found");
    drop((image, listener));
    qmp.ok("block-export-add", json!({"type": "nbd", "id": "e", "node-name": "n", "name": "n", "writable": true}));
    let (mut client, _) = daemon.nbd().open("n", tests::nbd::Headers::Simple);
    assert_eq!(client.write(0, 0, b"written"), 0);
    drop(client);
    assert_eq!(fs::read(folder.join("d.img")).unwrap()[..7], *b"written");
    qmp.ok("quit", json!({}));
}

#[test]
fn named_sockets_become_character_devices() {
    if on_reference() {
        skip!("the reference has no getfd here");
    }
    let daemon = super::monitored();
    let mut qmp = daemon.qmp();
    let add = |name: &str, server: bool| {
        let mut data = json!({"addr": {"type": "fd", "data": {"str": name}}, "server": server});
        if server {
            data["wait"] = false.into();
        }
        json!({"id": "c", "backend": {"type": "socket", "data": data}})
    };
    let failed = "Failed to add chardev 'c': File descriptor";
    assert_eq!(qmp.refused("chardev-add", add("nope", true)), format!("{failed} named 'nope' has not been found"));
    getfd(&mut qmp, "null", &null());
    assert_eq!(qmp.refused("chardev-add", add("null", true)), format!("{failed} 'null' is not a socket"));
    let listener = UnixListener::bind(daemon.path("l.sock")).unwrap();
    getfd(&mut qmp, "l", &listener);
    qmp.ok("chardev-add", add("l", true));
    let shown = qmp.ok("query-chardev", json!({}));
    let path = daemon.path("l.sock");
    let name = format!("disconnected:unix:{},server=on", path.display());
    assert!(shown.as_array().unwrap().iter().any(|device| device["filename"] == name), "{shown}");
    fs::set_permissions(path, Permissions::from_mode(0o700)).unwrap();
}

#[test]
fn a_named_socket_for_datagrams_becomes_a_character_device() {
    if on_reference() {
        skip!("the reference has no getfd here");
    }
    let daemon = super::monitored();
    let mut qmp = daemon.qmp();
    let udp = |more: serde_json::Value| {
        let mut data = json!({"remote": {"type": "fd", "data": {"str": "u"}}});
        data.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({"id": "c", "backend": {"type": "udp", "data": data}})
    };
    let (stream, _other) = UnixStream::pair().unwrap();
    getfd(&mut qmp, "u", &stream);
    let text = qmp.refused("chardev-add", udp(json!({})));
    assert!(text.ends_with("is not a socket for datagrams"), "{text}");
    let (ours, theirs) = std::os::unix::net::UnixDatagram::pair().unwrap();
    let local = json!({"local": {"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}}});
    getfd(&mut qmp, "u", &theirs);
    assert_eq!(
        qmp.refused("chardev-add", udp(local)),
        "Failed to add chardev 'c': socket type unsupported for datagram"
    );
    getfd(&mut qmp, "u", &theirs);
    qmp.ok("chardev-add", udp(json!({})));
    drop(theirs);
    assert_eq!(ours.send(b"to the device").unwrap(), 13);
    qmp.ok("chardev-remove", json!({"id": "c"}));
    wait_for("the device to let go", || ours.send(b"to nobody").is_err().then_some(()));
}

#[test]
fn a_named_socket_serves_vhost_user() {
    if on_reference() {
        skip!("the reference has no getfd here");
    }
    let daemon = super::monitored();
    let mut qmp = daemon.qmp();
    qmp.ok("blockdev-add", json!({"driver": "null-co", "node-name": "disk", "size": 1 << 20}));
    let add = json!({
        "type": "vhost-user-blk", "id": "v", "node-name": "disk", "addr": {"type": "fd", "str": "l"}, "writable": true,
    });
    assert_eq!(qmp.refused("block-export-add", add.clone()), "File descriptor named 'l' has not been found");
    let path = daemon.path("l.sock");
    let listener = UnixListener::bind(&path).unwrap();
    getfd(&mut qmp, "l", &listener);
    drop(listener);
    qmp.ok("block-export-add", add);
    let mut front = tests::vhost::FrontEnd::connect(&path);
    front.negotiate(u64::MAX, u64::MAX);
    assert_eq!(qmp.refused("closefd", json!({"fdname": "l"})), "File descriptor named 'l' not found");
}

#[test]
fn thousands_of_descriptors_leave_nothing() {
    if on_reference() {
        skip!("the reference has no getfd here");
    }
    let daemon = super::monitored();
    let mut qmp = daemon.qmp();
    let before = daemon.open_fds();
    let null = null();
    for round in 0..2000 {
        getfd(&mut qmp, &format!("n{}", round % 7), &null);
        if round % 2 == 0 {
            let set = add_fd(&mut qmp, None, &null)["fdset-id"].clone();
            qmp.ok("remove-fd", json!({"fdset-id": set}));
        }
    }
    for name in 0..7 {
        qmp.ok("closefd", json!({"fdname": format!("n{name}")}));
    }
    wait_for("descriptors to be closed", || (daemon.open_fds() == before).then_some(()));
}

/// The Python program of the book's page, as it stands there.
fn program_of_the_book() -> String {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/book/src/chardevs.md");
    let page = fs::read_to_string(page).unwrap();
    let (_, behind) = page.split_once("```python\n").unwrap();
    behind.split_once("```\n").unwrap().0.to_owned()
}

#[test]
fn the_books_program_runs() {
    if on_reference() {
        skip!("the reference has no getfd here");
    }
    let daemon = Setup::new().qmp().image("d.img", 1 << 20).start();
    fs::write(daemon.path("passed.py"), program_of_the_book()).unwrap();
    let run = std::process::Command::new("python3")
        .arg(daemon.path("passed.py"))
        .args([daemon.path("qmp.sock"), daemon.path("d.img"), daemon.path("served.sock")])
        .output();
    let Ok(run) = run else { skip!("there is no Python") };
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    let uri = String::from_utf8(run.stdout).unwrap();
    assert_eq!(uri.trim_end(), format!("nbd+unix:///disk?socket={}", daemon.path("served.sock").display()));
    let mut client = tests::nbd::Client::connect_unix(&daemon.path("served.sock"));
    client.greet();
    assert!(client.go("disk").is_ok());
}

/// Every option that names a file takes one that was passed.
#[test]
fn all_file_names_can_be_sets() {
    if on_reference() {
        skip!("the reference has no add-fd here");
    }
    let daemon = Setup::new().qmp().image("d.img", 1 << 20).start();
    let mut qmp = daemon.qmp();
    let path = |name: &str| daemon.path(name);
    fs::write(path("rules"), "[inject-error]\nevent = \"none\"\n").unwrap();
    fs::write(path("secret"), "passed").unwrap();
    // How each is opened: a set has descriptors for one kind of access or for several.
    let (read, write, both) = ((true, false), (false, true), (true, true));
    for (set, name, (reads, writes)) in [
        (1, "rules", read),
        (2, "secret", read),
        (3, "d.img", both),
        (4, "out", write),
        (5, "log", write),
        (6, "new.img", both),
    ] {
        let mut options = OpenOptions::new();
        let file = options.read(reads).write(writes).create(writes).truncate(false).open(path(name)).unwrap();
        add_fd(&mut qmp, Some(set), &file);
    }
    let ends = nix::unistd::pipe().unwrap();
    add_fd(&mut qmp, Some(7), &ends.0);
    let image = json!({"driver": "null-co"});
    qmp.ok("blockdev-add", json!({"driver": "blkdebug", "node-name": "d", "image": image, "config": "/dev/fdset/1"}));
    qmp.ok("object-add", json!({"qom-type": "secret", "id": "s", "file": "/dev/fdset/2"}));
    qmp.ok("blockdev-add", json!({"driver": "file", "node-name": "f", "filename": "/dev/fdset/3"}));
    let data = json!({"out": "/dev/fdset/4", "logfile": "/dev/fdset/5"});
    qmp.ok("chardev-add", json!({"id": "c", "backend": {"type": "file", "data": data}}));
    let create = json!({"driver": "file", "filename": "/dev/fdset/6", "size": 65536});
    qmp.ok("blockdev-create", json!({"job-id": "j", "options": create}));
    wait_for("the image", || (fs::metadata(path("new.img")).unwrap().len() == 65536).then_some(()));
    // A pipe that was passed: the secret is all that comes through it.
    nix::unistd::write(&ends.1, b"through a pipe").unwrap();
    drop(ends.1);
    qmp.ok("object-add", json!({"qom-type": "secret", "id": "p", "file": "/dev/fdset/7"}));
    let refused = qmp.refused(
        "blockdev-add",
        json!({"driver": "blkdebug", "node-name": "x", "image": image, "config": "/dev/fdset/9"}),
    );
    assert_eq!(refused, "Could not read blkdebug config file: Failed to find fdset /dev/fdset/9");
}
