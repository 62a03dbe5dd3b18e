//! Start, readiness, end: help, version, pid file, daemonize, signals, quit.

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use tests::nbd::Client;
use tests::{Daemon, Setup, qmp, wait_for};

#[test]
fn version_is_two_lines() {
    for option in ["-V", "--version"] {
        let ended = Setup::new().arg(option).run();
        assert_eq!(ended.status.code(), Some(0));
        let lines: Vec<&str> = ended.stdout.lines().collect();
        assert_eq!(lines.len(), 2, "{lines:?}");
        assert!(lines[0].starts_with("qemu-storage-daemon version "), "{lines:?}");
    }
}

#[test]
fn help_names_every_option() {
    for option in ["-h", "--help"] {
        let ended = Setup::new().arg(option).run();
        assert_eq!((ended.status.code(), ended.stderr.as_str()), (Some(0), ""));
        for name in
            "--blockdev --chardev --daemonize --export --help --monitor --nbd-server --object --pidfile --trace --version"
                .split(' ')
        {
            assert!(ended.stdout.contains(name), "{name}: {}", ended.stdout);
        }
    }
}

#[test]
fn help_and_version_come_before_everything() {
    let ended = Setup::new().line("--blockdev driver=nosuch --version").run();
    assert_eq!(ended.status.code(), Some(0), "{}", ended.stderr);
    assert!(ended.stdout.starts_with("qemu-storage-daemon version "));
}

#[test]
fn lists_of_help() {
    let ended = Setup::new().line("--chardev help").run();
    assert_eq!(ended.status.code(), Some(0), "{}", ended.stderr);
    assert!(ended.stdout.contains("socket") && ended.stdout.contains("stdio"), "{}", ended.stdout);
    let ended = Setup::new().line("--object help").run();
    assert_eq!(ended.status.code(), Some(0), "{}", ended.stderr);
    assert!(ended.stdout.contains("iothread"), "{}", ended.stdout);
    let ended = Setup::new().line("--object iothread,help").run();
    assert_eq!(ended.status.code(), Some(0), "{}", ended.stderr);
    assert!(ended.stdout.contains("thread-pool-max=<int>"), "{}", ended.stdout);
    let ended = Setup::new().line("--trace help").run();
    assert_eq!(ended.status.code(), Some(0), "{}", ended.stderr);
    assert!(ended.stdout.lines().count() > 3, "{}", ended.stdout);
}

#[test]
fn every_ending_signal_ends_it_cleanly() {
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        let mut daemon = Setup::new().qmp().serving("disk", 1 << 20).start();
        daemon.signal(signal);
        let status = daemon.wait();
        assert_eq!(status.code(), Some(0), "{signal}: {}", daemon.stderr());
        assert!(!daemon.path("ready.pid").exists(), "{signal}: the pid file stays");
        assert!(!daemon.path("qmp.sock").exists(), "{signal}: the monitor's socket stays");
    }
}

#[test]
fn quit_answers_and_ends() {
    let mut daemon = Setup::new().qmp().serving("disk", 1 << 20).start();
    let mut qmp = daemon.qmp();
    assert_eq!(qmp.ok("quit", json!({})), json!({}));
    let events: Vec<_> = std::iter::from_fn(|| qmp.recv_or_end()).collect();
    assert!(events.iter().all(|message| message.get("event").is_some()), "{events:?}");
    assert_eq!(daemon.wait().code(), Some(0));
}

#[test]
fn sigpipe_is_ignored() {
    let mut daemon = Setup::new().qmp().serving("disk", 1 << 20).start();
    daemon.signal(Signal::SIGPIPE);
    daemon.qmp().ok("query-version", json!({}));
    daemon.stop();
}

#[test]
fn the_pid_file_appears_when_everything_serves() {
    let daemon = Setup::new().qmp().serving("disk", 1 << 20).start();
    let pid = fs::read_to_string(daemon.path("ready.pid")).unwrap();
    assert_eq!(pid, format!("{}\n", daemon.pid()));
    for socket in ["qmp.sock", "nbd.sock"] {
        assert!(fs::symlink_metadata(daemon.path(socket)).unwrap().file_type().is_socket());
        UnixStream::connect(daemon.path(socket)).unwrap();
    }
}

#[test]
fn a_locked_pid_file_is_refused() {
    let first = Setup::new().start();
    let ended = Setup::new().arg("--pidfile").arg(first.path("ready.pid")).run();
    assert_eq!(ended.status.code(), Some(1), "{}", ended.stderr);
    assert!(ended.stderr.contains("cannot create PID file"), "{}", ended.stderr);
    let pid = fs::read_to_string(first.path("ready.pid")).unwrap();
    assert_eq!(pid.trim(), first.pid().to_string(), "the first one's pid file changed");
}

#[test]
fn a_stale_pid_file_is_taken_over() {
    let setup = Setup::new();
    fs::write(setup.path("ready.pid"), "1234567\n").unwrap();
    let path = setup.path("ready.pid");
    let mut daemon = setup.spawn_ready(|daemon: &Daemon| {
        fs::read_to_string(daemon.path("ready.pid")).is_ok_and(|text| text == format!("{}\n", daemon.pid()))
    });
    daemon.stop();
    assert!(!path.exists());
}

#[test]
fn daemonize_returns_when_it_serves() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let ended = Setup::new()
        .line("--blockdev null-co,node-name=n,size=1048576")
        .arg("--nbd-server")
        .arg(format!("addr.type=unix,addr.path={}", at("nbd.sock").display()))
        .line("--export nbd,id=e,node-name=n,name=n")
        .arg("--chardev")
        .arg(format!("socket,path={},server=on,wait=off,id=c", at("qmp.sock").display()))
        .line("--monitor c --daemonize --pidfile")
        .arg(at("pid"))
        .run();
    assert_eq!(ended.status.code(), Some(0), "{}", ended.stderr);
    let pid: i32 = fs::read_to_string(at("pid")).unwrap().trim().parse().unwrap();
    // Both sockets accept at once: the parent left only when all was up.
    UnixStream::connect(at("nbd.sock")).unwrap();
    let mut qmp = qmp::Client::over(UnixStream::connect(at("qmp.sock")).unwrap());
    qmp.negotiate();
    qmp.ok("quit", json!({}));
    wait_for("the daemonized process to end", || (!at("pid").exists()).then_some(()));
    wait_for("the daemonized process to be gone", || {
        // Gone, or a zombie of an init process that is slow to collect it.
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        (kill(Pid::from_raw(pid), None).is_err() || stat.contains(") Z ")).then_some(())
    });
}

#[test]
fn daemonize_reports_a_failed_start() {
    let ended = Setup::new().line("--daemonize --blockdev file,node-name=f,filename=/nonexistent").run();
    assert_eq!(ended.status.code(), Some(1));
    assert!(ended.stderr.contains("Could not open '/nonexistent'"), "{}", ended.stderr);
}

#[test]
fn the_same_options_twice_come_in_order() {
    let daemon = Setup::new()
        .qmp()
        .line("--blockdev null-co,node-name=a,size=1048576 --blockdev null-co,node-name=b,size=2097152")
        .line("--blockdev raw,node-name=c,file=b")
        .start();
    let nodes = daemon.qmp().ok("query-named-block-nodes", json!({"flat": true}));
    let mut names: Vec<_> = nodes.as_array().unwrap().iter().map(|node| node["node-name"].as_str().unwrap()).collect();
    names.sort_unstable();
    assert_eq!(names, ["a", "b", "c"]);
}

#[test]
fn dotted_and_json_forms_mean_the_same() {
    let json = r#"{"driver":"raw","node-name":"j","read-only":true,"offset":512,"size":1024,"file":{"driver":"file","filename":"a.img","node-name":"jf"}}"#;
    let dotted =
        "raw,node-name=d,read-only=on,offset=512,size=1024,file.driver=file,file.filename=a.img,file.node-name=df";
    let daemon =
        Setup::new().image("a.img", 4096).qmp().arg("--blockdev").arg(json).arg("--blockdev").arg(dotted).start();
    let nodes = daemon.qmp().ok("query-named-block-nodes", json!({"flat": true}));
    let node = |name: &str| nodes.as_array().unwrap().iter().find(|node| node["node-name"] == name).unwrap().clone();
    for (a, b) in [("j", "d"), ("jf", "df")] {
        let (a, b) = (node(a), node(b));
        for member in ["ro", "drv", "cache", "detect_zeroes"] {
            assert_eq!(a[member], b[member]);
        }
        assert_eq!(a["image"]["virtual-size"], b["image"]["virtual-size"]);
    }
    assert_eq!(node("d")["image"]["virtual-size"], 1024);
}

#[test]
fn a_doubled_comma_is_one_comma() {
    let daemon =
        Setup::new().image("a,b.img", 4096).qmp().line("--blockdev file,node-name=f,filename=a,,b.img").start();
    let nodes = daemon.qmp().ok("query-named-block-nodes", json!({"flat": true}));
    assert_eq!(nodes[0]["file"], "a,b.img");
}

#[test]
fn stdio_monitor() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let out = theirs.try_clone().unwrap();
    let mut daemon = Setup::new().stdio(theirs.into(), out.into()).line("--chardev stdio,id=c --monitor c").spawn();
    let mut qmp = qmp::Client::over(ours);
    qmp.negotiate();
    qmp.ok("query-version", json!({}));
    qmp.ok("quit", json!({}));
    assert_eq!(daemon.wait().code(), Some(0), "{}", daemon.stderr());
}

#[test]
fn nothing_is_left_of_a_failed_start() {
    let setup = Setup::new()
        .qmp()
        .serving("disk", 1 << 20)
        .line("--pidfile p --blockdev file,node-name=f,filename=/nonexistent");
    let dir = setup.path("");
    let mut daemon = setup.spawn();
    assert_eq!(daemon.wait().code(), Some(1));
    let left: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name == "p"), "{left:?}");
}

#[test]
fn traces_go_to_a_file() {
    let mut daemon = Setup::new().serving("disk", 1 << 20).line("--trace enable=*,file=trace.log").start();
    let (mut client, _) = daemon.nbd().open("disk", tests::nbd::Headers::Structured);
    client.read(0, 512);
    drop(client);
    daemon.stop();
    let log = fs::read_to_string(daemon.path("trace.log")).unwrap();
    assert!(log.lines().count() > 2, "{log}");
    assert_eq!(daemon.stdout(), "");
}

#[test]
fn a_list_of_traces_in_a_file() {
    let setup = Setup::new();
    let ended = Setup::new().line("--trace help").run();
    let first = ended.stdout.split_whitespace().next().unwrap_or_default().to_owned();
    fs::write(setup.path("events"), format!("# a comment\n\n{first}\n")).unwrap();
    setup.line("--trace events=events").start().stop();
    let ended = Setup::new().line("--trace events=nosuch").run();
    assert_eq!(ended.status.code(), Some(1));
    assert!(ended.stderr.contains("nosuch"), "{}", ended.stderr);
}

/// A client that comes early waits, and then finds what the rest of the command line makes.
#[test]
fn clients_are_let_in_when_everything_is_there() {
    let daemon = Setup::new()
        .line("--nbd-server addr.type=unix,addr.path=nbd.sock")
        .line("--chardev socket,path=held.sock,server=on,wait=on,id=c")
        .line("--blockdev null-co,node-name=disk,size=65536 --export nbd,id=e,node-name=disk")
        .spawn();
    let (nbd, held) = (daemon.path("nbd.sock"), daemon.path("held.sock"));
    wait_for("the daemon to wait in the middle of its command line", || held.exists().then_some(()));
    let early = UnixStream::connect(&nbd).unwrap();
    // That nothing comes can only be seen by looking for a while.
    early.set_read_timeout(Some(std::time::Duration::from_millis(100))).unwrap();
    let silence = std::io::Read::read(&mut &early, &mut [0; 8]).map_err(|error| error.kind());
    assert_eq!(silence, Err(std::io::ErrorKind::WouldBlock), "a client is served before its export is there");
    let mut client = Client::connect_unix(&nbd);
    let _first = UnixStream::connect(&held).unwrap();
    client.greet();
    assert!(client.go("disk").is_ok());
}
