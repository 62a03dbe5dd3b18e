//! The policy for requests that fail, `x-on-error`, with NBD clients, and what an export counts of them.

use serde_json::{Value, json};
use tests::nbd::{Headers, Request, cmd};
use tests::qmp::Client;
use tests::{Daemon, Setup, on_reference, skip, wait_for};

const MIB: u64 = 1 << 20;
const ENOSPC: u32 = 28;
const EIO: u32 = 5;

/// A daemon whose writes fail as `rule` says.
fn failing(rule: &str, policy: &str) -> Daemon {
    Setup::new()
        .qmp()
        .nbd_server()
        .image("a.img", MIB)
        .line("--blockdev file,node-name=p,filename=a.img")
        .line(&format!("--blockdev blkdebug,node-name=f,image=p,inject-error.0.event=pwritev,{rule}"))
        .line(&format!("--export nbd,id=e,node-name=f,name=disk,writable=on,x-on-error={policy}"))
        .start()
}

fn statistics(qmp: &mut Client) -> Value {
    qmp.ok("query-block-exports", json!({}))[0]["x-statistics"].take()
}

fn wait_until_one_waits(qmp: &mut Client) {
    wait_for("a request that waits", || (statistics(qmp)["waiting-operations"] == 1).then_some(()));
}

fn write() -> Request {
    Request { cmd: cmd::WRITE, offset: 8192, len: 4096, payload: vec![7; 4096], ..Request::default() }
}

#[test]
fn a_write_waits_until_somebody_has_seen_to_it() {
    if on_reference() {
        skip!("the reference has no such policy");
    }
    for policy in ["stop", "enospc"] {
        let daemon = failing("inject-error.0.errno=28,inject-error.0.once=on", policy);
        let mut qmp = daemon.qmp();
        let (mut client, _) = daemon.nbd().open("disk", Headers::Structured);
        let written = client.send(&write());
        let event = qmp.event("BLOCK_IO_ERROR");
        assert_eq!((&event["device"], &event["node-name"]), (&json!("e"), &json!("f")));
        assert_eq!(
            (&event["action"], &event["operation"], &event["nospace"]),
            (&json!("stop"), &json!("write"), &json!(true))
        );
        wait_until_one_waits(&mut qmp);
        // Others go on, of the same client and of another one.
        let read = client.send(&Request { cmd: cmd::READ, len: 512, ..Request::default() });
        let reply = client.reply();
        assert_eq!((reply.cookie, reply.error), (read, 0));
        let (mut other, _) = daemon.nbd().open("disk", Headers::Simple);
        assert_eq!(other.write(0, 0, &[1; 512]), 0);
        qmp.ok("x-block-export-resume", json!({"id": "e"}));
        let reply = client.reply();
        assert_eq!((reply.cookie, reply.error), (written, 0), "the second time it succeeds");
        assert_eq!(client.read(8192, 4096), vec![7; 4096]);
        let counted = statistics(&mut qmp);
        for (name, number) in [
            ("waiting-operations", 0),
            ("failed-operations", 1),
            ("wr-operations", 2),
            ("wr-bytes", 4096 + 512),
            ("rd-operations", 2),
        ] {
            assert_eq!(counted[name], number, "{name}");
        }
    }
}

#[test]
fn what_waits_fails_when_the_export_goes() {
    if on_reference() {
        skip!("the reference has no such policy");
    }
    for quits in [true, false] {
        let mut daemon = failing("inject-error.0.errno=5", "stop");
        let mut qmp = daemon.qmp();
        let (mut client, _) = daemon.nbd().open("disk", Headers::Simple);
        client.send(&write());
        wait_until_one_waits(&mut qmp);
        if quits {
            daemon.stop();
        } else {
            qmp.ok("block-export-del", json!({"id": "e", "mode": "hard"}));
            assert_eq!(client.reply().error, EIO);
            qmp.event("BLOCK_EXPORT_DELETED");
        }
    }
}

#[test]
fn other_errors_go_to_the_client_and_are_told() {
    if on_reference() {
        skip!("the reference has no such policy");
    }
    for (policy, errno, expected) in [("report", 28, ENOSPC), ("enospc", 5, EIO)] {
        let daemon = failing(&format!("inject-error.0.errno={errno},inject-error.0.once=on"), policy);
        let mut qmp = daemon.qmp();
        let (mut client, _) = daemon.nbd().open("disk", Headers::Simple);
        assert_eq!(client.call(&write()).error, expected);
        let event = qmp.event("BLOCK_IO_ERROR");
        assert_eq!((&event["action"], &event["nospace"]), (&json!("report"), &json!(errno == 28)));
        assert_eq!(client.call(&write()).error, 0);
    }
}
