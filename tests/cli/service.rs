//! Under a service manager: sockets by their names, and what the manager hears [sd_listen_fds(3), sd_notify(3)].

use std::os::unix::net::{UnixDatagram, UnixListener};

use nix::sys::signal::Signal;
use serde_json::json;
use tests::nbd::Headers;
use tests::{DEADLINE, Setup, on_reference, skip};

/// The next words that the manager hears.
fn hear(manager: &UnixDatagram) -> String {
    let mut buffer = [0; 256];
    let length = manager.recv(&mut buffer).expect("a word from the daemon");
    String::from_utf8_lossy(&buffer[..length]).into_owned()
}

#[test]
fn sockets_have_names_and_the_manager_is_told() {
    if on_reference() {
        skip!("the reference knows no service manager");
    }
    let setup = Setup::new();
    let manager = UnixDatagram::bind(setup.path("notify")).unwrap();
    manager.set_read_timeout(Some(DEADLINE)).unwrap();
    let qmp = UnixListener::bind(setup.path("qmp.sock")).unwrap();
    let nbd = UnixListener::bind(setup.path("nbd.sock")).unwrap();
    let notify = setup.path("notify");
    let environment = format!(
        "exec 3<&0 4<&1 </dev/null >/dev/null; \
         export LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=qmp:nbd NOTIFY_SOCKET={} WATCHDOG_USEC=20000",
        notify.display()
    );
    let mut daemon = setup
        .limit(&environment)
        .stdio(qmp.into(), nbd.into())
        .line("--blockdev null-co,node-name=n,size=1048576,read-zeroes=on")
        .line("--nbd-server addr.type=fd,addr.str=nbd --export nbd,id=e,node-name=n")
        .line("--chardev socket,fd=qmp,server=on,wait=off,id=c --monitor c")
        .start();
    let first = hear(&manager);
    assert!(first.contains("READY=1"), "{first}");
    assert!(first.contains(&format!("MAINPID={}", daemon.pid())), "{first}");
    for _ in 0..3 {
        assert_eq!(hear(&manager).trim_end(), "WATCHDOG=1");
    }
    daemon.qmp().ok("query-version", json!({}));
    let (mut client, _) = daemon.nbd().open("n", Headers::Simple);
    assert_eq!(client.read(0, 512), [0; 512]);
    daemon.signal(Signal::SIGTERM);
    while hear(&manager).trim_end() != "STOPPING=1" {}
    assert_eq!(daemon.wait().code(), Some(0));
    // They are the manager's, who starts the next daemon with them.
    assert!(daemon.path("qmp.sock").exists() && daemon.path("nbd.sock").exists());
}

#[test]
fn a_name_that_nothing_was_passed_under() {
    let ended = Setup::new().line("--nbd-server addr.type=fd,addr.str=nbd").run();
    assert_eq!(ended.status.code(), Some(1));
    assert!(ended.stderr.contains("nbd"), "{}", ended.stderr);
}
