//! `--sandbox` and `x-query-sandbox`: what each mode leaves, shown by the system's own account of the process.

use std::fs;

use serde_json::{Value, json};
use tests::{Daemon, Setup, on_reference, skip};

/// A field of the main thread's status. [proc(5)]
fn status(daemon: &Daemon, field: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).unwrap();
    line.trim().to_owned()
}

fn add(daemon: &Daemon, name: &str, file: &str) -> Result<Value, String> {
    let arguments = json!({"driver": "file", "node-name": name, "filename": file});
    daemon.qmp().execute("blockdev-add", arguments).map_err(|refusal| refusal.desc)
}

macro_rules! not_on_reference {
    () => {
        if on_reference() {
            skip!("the reference has no such sandbox");
        }
    };
}

#[test]
fn default_is_on_and_takes_what_serving_does_not_need() {
    not_on_reference!();
    let mut daemon = Setup::new().qmp().start();
    let told = daemon.qmp().ok("x-query-sandbox", json!({}));
    assert_eq!(
        (&told["mode"], &told["system-calls"], &told["no-new-privileges"]),
        (&json!("default"), &json!(true), &json!(true))
    );
    assert_eq!((&told["files"], &told["refused"]), (&json!("unrestricted"), &json!([])));
    assert_eq!((status(&daemon, "Seccomp"), status(&daemon, "NoNewPrivs")), ("2".into(), "1".into()));
    // DAC_OVERRIDE 1, DAC_READ_SEARCH 2, FOWNER 3, NET_BIND_SERVICE 10, IPC_LOCK 14, SYS_RAWIO 17, and no others.
    let allowed = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 10 | 1 << 14 | 1 << 17;
    for set in ["CapPrm", "CapEff", "CapInh", "CapAmb"] {
        assert_eq!(u64::from_str_radix(&status(&daemon, set), 16).unwrap() & !allowed, 0, "{set}");
    }
    assert_eq!(daemon.stop(), "", "nothing was refused");
}

#[test]
fn strict_knows_the_files_of_the_command_line_and_no_others() {
    not_on_reference!();
    let setup = Setup::new();
    for (folder, file) in [("images", "images/named.img"), ("more", "more/late.img")] {
        fs::create_dir(setup.path(folder)).unwrap();
        fs::File::create(setup.path(file)).unwrap().set_len(1 << 20).unwrap();
    }
    fs::write(setup.path("images/other.img"), [0; 4096]).unwrap();
    let mut daemon = setup
        .line("--sandbox strict,paths.0=more")
        .qmp()
        .nbd_server()
        .line("--blockdev file,node-name=n,filename=images/named.img,read-only=on,auto-read-only=on")
        .line("--export nbd,id=e,node-name=n")
        .start();
    assert!(add(&daemon, "other", "images/other.img").unwrap_err().contains("Permission denied"));
    assert!(add(&daemon, "other", "/etc/hostname").unwrap_err().contains("Permission denied"));
    add(&daemon, "late", "more/late.img").unwrap();
    add(&daemon, "again", "images/named.img").unwrap();
    let told = daemon.qmp().ok("x-query-sandbox", json!({}));
    assert_eq!((&told["mode"], &told["capabilities"]), (&json!("strict"), &json!([])));
    assert_eq!(u64::from_str_radix(&status(&daemon, "CapPrm"), 16).unwrap(), 0);
    assert_eq!(status(&daemon, "Seccomp"), "2");
    // The server's socket, and the folder of its own.
    assert!(daemon.path("nbd.sock").exists());
    daemon.stop();
    assert!(
        !daemon.path("nbd.sock").exists() && !daemon.path("qmp.sock").exists() && !daemon.path("ready.pid").exists()
    );
}

#[test]
fn strict_has_no_network_unless_the_command_line_asks_for_it() {
    not_on_reference!();
    let start = |line: &str| {
        Setup::new().with_refusals().line("--sandbox strict --object iothread,id=i").qmp().line(line).start()
    };
    let server = json!({"addr": {"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}}});
    let mut closed = start("");
    closed.qmp_raw().negotiate();
    let mut client = closed.qmp();
    client.send(&json!({"execute": "nbd-server-start", "arguments": server}).to_string());
    assert_eq!(closed.wait().code(), Some(159), "strict ends the process");
    assert!(closed.stderr().contains("system call socket (41) refused in thread 'connector'"), "{}", closed.stderr());
    let mut open = start("--nbd-server addr.type=inet,addr.host=127.0.0.1,addr.port=0");
    open.stop();
}

#[test]
fn off_takes_nothing() {
    not_on_reference!();
    let mut daemon = Setup::new().line("--sandbox off").qmp().start();
    assert_eq!(daemon.qmp().ok("x-query-sandbox", json!({}))["mode"], json!("off"));
    assert_eq!((status(&daemon, "Seccomp"), status(&daemon, "NoNewPrivs")), ("0".into(), "0".into()));
    daemon.stop();
}

#[test]
fn a_mode_that_does_not_exist() {
    not_on_reference!();
    let ended = Setup::new().line("--sandbox maybe").run();
    assert_eq!(ended.status.code(), Some(1));
    assert!(
        ended.stderr.contains("--sandbox maybe: Parameter 'mode' does not accept value 'maybe'"),
        "{}",
        ended.stderr
    );
}

#[test]
fn sockets_names_and_threads_come_late() {
    not_on_reference!();
    let mut daemon = Setup::new().qmp().start();
    let server = json!({"addr": {"type": "inet", "data": {"host": "localhost", "port": "0"}}});
    daemon.qmp().ok("nbd-server-start", server);
    let socket =
        json!({"type": "socket", "data": {"addr": {"type": "unix", "data": {"path": "late.sock"}}, "wait": false}});
    daemon.qmp().ok("chardev-add", json!({"id": "late", "backend": socket}));
    assert!(daemon.path("late.sock").exists());
    daemon.qmp().ok("object-add", json!({"qom-type": "iothread", "id": "late"}));
    assert_eq!(daemon.stop(), "", "nothing was refused");
}
