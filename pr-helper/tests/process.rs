//! The process: options, sockets, pid file, background, signals, service manager, privileges.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs, reason = "a test fails by panicking")]
#![allow(dead_code, reason = "the support module serves several tests")]

mod support;

use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};
use support::{Client, Helper, OURS, connect, read, run};

#[test]
fn wrong_options_end_with_1_and_a_message() {
    for (options, message) in [
        (&["-k", "relative"][..], "qemu-pr-helper: socket path must be absolute\n"),
        (&["-k", "/tmp/x", "-u", "no such user"], "qemu-pr-helper: invalid user 'no such user'\n"),
        (&["-k", "/tmp/x", "-g", "no such group"], "qemu-pr-helper: invalid group 'no such group'\n"),
        (
            &["-k", "/nonexistent/x"],
            "qemu-pr-helper: Failed to bind socket to /nonexistent/x: No such file or directory",
        ),
        (&["-k", "/tmp/x", "--policy=/nonexistent"], "qemu-pr-helper: cannot read the policy: No such file"),
        (&["-k", "/tmp/x", "--deny=action=write"], "qemu-pr-helper: policy: invalid action 'write'\n"),
        (&["-T", "no_such_event"], "qemu-pr-helper: trace event 'no_such_event' does not exist\n"),
        (&["-Z"], "error: unexpected argument '-Z'"),
    ] {
        let output = run(options);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{options:?}: {text}");
        assert!(text.starts_with(message), "{options:?}: {text}");
    }
    for options in [&["--help"][..], &["-V"], &["-T", "help"]] {
        let output = run(options);
        assert!(output.status.success() && !output.stdout.is_empty(), "{options:?}");
    }
}

#[test]
fn signals_end_it_well_and_the_socket_goes() {
    for signal in ["-TERM", "-INT", "-HUP"] {
        let helper = Helper::start(&[]);
        assert!(helper.socket.symlink_metadata().unwrap().file_type().is_socket());
        // Neither an idle client nor one that never says anything holds it up.
        let (idle, silent) = (helper.negotiated(0), helper.connect());
        helper.signal(signal);
        helper.heard("STOPPING=1");
        let socket = helper.socket.clone();
        let (status, text) = helper.end();
        assert!(status.success(), "{signal}: {text}");
        assert!(!socket.exists(), "{signal}");
        drop((idle, silent));
    }
}

#[test]
fn pid_file_and_background() {
    let folder = tempfile::tempdir().unwrap();
    let (socket, pidfile) = (folder.path().join("s"), folder.path().join("p"));
    let options = ["-d", "-k", socket.to_str().unwrap(), "-f", pidfile.to_str().unwrap()];
    let output = run(&options);
    assert!(output.status.success(), "{output:?}");
    // It serves by the time the command is back.
    assert_eq!(read(&mut connect(&socket), 4), 0x4000_0000u32.to_be_bytes());
    let pid: i32 = std::fs::read_to_string(&pidfile).unwrap().trim().parse().unwrap();
    assert_eq!(std::fs::metadata(&pidfile).unwrap().permissions().mode() & 0o777, 0o600);
    for fd in 0..3 {
        assert_eq!(std::fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap().to_str(), Some("/dev/null"));
    }
    assert_eq!(std::fs::read_link(format!("/proc/{pid}/cwd")).unwrap().to_str(), Some("/"));
    // One process a pid file; the one that comes too late says so, and harms nothing.
    let second = run(&["-d", "-k", folder.path().join("other").to_str().unwrap(), "-f", pidfile.to_str().unwrap()]);
    assert_eq!(second.status.code(), Some(1));
    assert!(String::from_utf8(second.stderr).unwrap().contains("Could not lock"));
    assert_eq!(std::fs::read_to_string(&pidfile).unwrap().trim(), pid.to_string());
    let process = nix::sys::signal::kill;
    process(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGTERM).unwrap();
    // Not our child: gone when its lock on the pid file is.
    while socket.exists() || pidfile.exists() {
        std::thread::yield_now();
    }
}

#[test]
fn a_passed_socket_is_served_and_left() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let listener = UnixListener::bind(&socket).unwrap();
    let script = "LISTEN_FDS=1 LISTEN_PID=$$ exec \"$0\" \"$@\" 3<&0 0</dev/null";
    let activated = |options: &[&str], listener: &UnixListener| {
        let mut command = Command::new("sh");
        command.args(["-c", script, OURS]).args(options).stderr(Stdio::piped());
        command.stdin(OwnedFd::from(listener.try_clone().unwrap())).spawn().unwrap()
    };
    let child = activated(&["-k", "/tmp/x"], &listener).wait_with_output().unwrap();
    assert_eq!(child.status.code(), Some(1));
    let text = String::from_utf8(child.stderr).unwrap();
    assert_eq!(text, "qemu-pr-helper: Unix socket can't be set when using socket activation\n");
    let child = activated(&["--socket-mode=600"], &listener).wait_with_output().unwrap();
    let text = String::from_utf8(child.stderr).unwrap();
    assert!(text.starts_with("qemu-pr-helper: Owner, mode and label of the socket can't be set when"), "{text}");
    let mut child = activated(&[], &listener);
    let mut client = Client(connect(&socket));
    assert_eq!(read(&mut client.0, 4), 0x4000_0000u32.to_be_bytes());
    let pid = nix::unistd::Pid::from_raw(child.id().try_into().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert!(child.wait().unwrap().success());
    assert!(socket.exists());
    let script = script.replace("LISTEN_FDS=1", "LISTEN_FDS=2").replace("3<&0", "3<&0 4<&0");
    let two = Command::new("sh").args(["-c", &script, OURS]).stdin(Stdio::null()).output().unwrap();
    assert_eq!(two.status.code(), Some(1));
    let text = String::from_utf8(two.stderr).unwrap();
    assert_eq!(text, "qemu-pr-helper: qemu-pr-helper does not support socket activation with LISTEN_FDS > 1\n");
}

#[test]
fn the_watchdog_is_fed() {
    let mut command = Command::new(OURS);
    command.env("WATCHDOG_USEC", "100000");
    let helper = Helper::start_by(command, &[]);
    for _ in 0..3 {
        helper.heard("WATCHDOG=1");
    }
}

#[test]
fn inherited_descriptors_and_environment_are_gone() {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$0\" \"$@\" 7<&0 0</dev/null", OURS]).stdin(writer).env("SECRET", "x");
    let helper = Helper::start_by(command, &[]);
    // Our copies went with the command; the helper's went at its start, so this does not wait.
    let mut rest = Vec::new();
    reader.read_to_end(&mut rest).unwrap();
    assert!(rest.is_empty());
    drop(helper);
}

#[test]
fn socket_mode_and_owner() {
    let helper = Helper::start(&["--socket-mode=640", "--socket-group=0"]);
    let meta = std::fs::metadata(&helper.socket).unwrap();
    assert_eq!((meta.permissions().mode() & 0o777, meta.gid()), (0o640, 0));
}

#[test]
fn socket_label() {
    let label = "system_u:object_r:virt_var_run_t:s0";
    let helper = |socket: &std::path::Path| {
        Command::new(OURS)
            .arg("-k")
            .arg(socket)
            .arg(format!("--socket-label={label}"))
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let folder = tempfile::tempdir().unwrap();
    // Labels need CAP_SYS_ADMIN where SELinux does not decide; who has not, hears of it, and no socket is left to anybody.
    let probe = folder.path().join("probe");
    std::fs::write(&probe, "").unwrap();
    let may = rustix::fs::setxattr(&probe, "security.selinux", b"x", rustix::fs::XattrFlags::empty()).is_ok();
    let socket = folder.path().join("s");
    if !may {
        let output = helper(&socket).wait_with_output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(text.starts_with("qemu-pr-helper: Failed to bind socket to "), "{text}");
        assert!(!socket.exists());
        return;
    }
    let helper = Helper::start(&[&format!("--socket-label={label}"), "--socket-mode=660"]);
    let mut value = [0; 64];
    let length = rustix::fs::lgetxattr(&helper.socket, "security.selinux", &mut value[..]).unwrap();
    assert_eq!(value[..length], [label.as_bytes(), &[0]].concat());
    assert_eq!(std::fs::metadata(&helper.socket).unwrap().permissions().mode() & 0o777, 0o660);
    helper.negotiated(0);
}

#[test]
fn privileges_are_what_the_manual_says() {
    let root = nix::unistd::geteuid().is_root();
    let options: &[&str] = if root { &["-u", "65534", "-g", "65534"] } else { &[] };
    let helper = Helper::start(options);
    let everywhere = |name: &str, value: &str| {
        let values = helper.status(name);
        assert!(values.len() > 2 && values.iter().all(|v| v == value), "{name}: {values:?}");
    };
    everywhere("NoNewPrivs", "1");
    everywhere("Seccomp", "2");
    everywhere("CapInh", "0000000000000000");
    everywhere("CapAmb", "0000000000000000");
    if root {
        everywhere("Uid", "65534\t65534\t65534\t65534");
        everywhere("Gid", "65534\t65534\t65534\t65534");
        everywhere("Groups", " ");
        everywhere("CapPrm", "0000000000020000");
        everywhere("CapEff", "0000000000020000");
        everywhere("CapBnd", "0000000000000000");
    }
    // It still serves like this.
    let mut client = helper.negotiated(0);
    let cdb = ipc::scsi::Cdb::build(ipc::scsi::Action::ReadKeys, 0, 8);
    client.send(cdb.bytes(), Some(std::fs::File::open("/dev/null").unwrap().as_fd()));
    assert_eq!(client.reply()[..4], [0, 0, 0, 2]);
}

#[test]
fn audit_and_trace_lines() {
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("trace");
    let helper = Helper::start(&["-T", &format!("pr_helper_re*,file={}", trace.display())]);
    let mut client = helper.negotiated(0);
    let cdb = ipc::scsi::Cdb::build(ipc::scsi::Action::ReadKeys, 0, 8);
    client.send(cdb.bytes(), Some(std::fs::File::open("/dev/null").unwrap().as_fd()));
    client.reply();
    let (status, text) = helper.end();
    assert!(status.success());
    assert!(text.contains(r#""action":"read-keys","denied":false,"status":"0x02","sense":"b/00/06""#), "{text}");
    let trace = std::fs::read_to_string(trace).unwrap();
    assert!(trace.starts_with("pr_helper_request pid ") && trace.contains("\npr_helper_reply pid "), "{trace}");
}
