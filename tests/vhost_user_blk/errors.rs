//! The policy for requests that fail, `x-on-error`, with a guest behind it: a request that waits is done in the end, once, whatever
//! becomes of the front-end and of the daemon meanwhile.

use super::{MIB, export, socket};
use serde_json::{Value, json};
use tests::image::contents;
use tests::qmp::Client;
use tests::vhost::{FrontEnd, msg, protocol, req};
use tests::{Daemon, Setup, skip, wait_for};

/// A daemon with a disk whose writes fail as `rule` says.
fn failing(rule: &str, policy: &str) -> Daemon {
    Setup::new()
        .qmp()
        .image("disk.img", 8 * MIB)
        .line("--blockdev file,node-name=p,filename=disk.img")
        .line(&format!("--blockdev blkdebug,node-name=disk,image=p,inject-error.0.event=pwritev,{rule}"))
        .line(&export(&format!("writable=on,x-on-error={policy}")))
        .start()
}

/// A front-end that keeps a region for requests in flight.
fn client(daemon: &Daemon) -> FrontEnd {
    let mut front = FrontEnd::connect(&socket(daemon));
    front.negotiate(u64::MAX, u64::MAX);
    assert_ne!(front.protocol & protocol::INFLIGHT_SHMFD, 0);
    front.share_memory();
    front.make_inflight(1, 128);
    front.add_queue(0, 128);
    front
}

fn come_back(front: &mut FrontEnd, daemon: &Daemon) {
    front.reconnect(&socket(daemon));
    front.negotiate(u64::MAX, u64::MAX);
    front.share_memory();
    front.set_inflight();
    front.start_queue(0, 0);
    front.kick(0);
}

fn statistics(qmp: &mut Client) -> Value {
    qmp.ok("query-block-exports", json!({}))[0]["x-statistics"].take()
}

fn wait_until_one_waits(qmp: &mut Client) {
    wait_for("a request that waits", || (statistics(qmp)["waiting-operations"] == 1).then_some(()));
}

fn resume(qmp: &mut Client) {
    qmp.ok("x-block-export-resume", json!({"id": "e"}));
}

#[test]
fn a_write_without_space_waits_until_there_is_some() {
    if tests::on_reference() {
        skip!("the reference has no such policy");
    }
    for policy in ["stop", "enospc"] {
        let daemon = failing("inject-error.0.errno=28,inject-error.0.once=on", policy);
        let (mut qmp, mut front) = (daemon.qmp(), client(&daemon));
        front.submit(0, 0, req::OUT, 0, &[7; 4096], 0);
        let event = qmp.event("BLOCK_IO_ERROR");
        assert_eq!((&event["device"], &event["node-name"]), (&json!("e"), &json!("disk")));
        assert_eq!((&event["action"], &event["operation"]), (&json!("stop"), &json!("write")));
        assert_eq!(event["nospace"], true);
        wait_until_one_waits(&mut qmp);
        // Others are served meanwhile, and flushed.
        front.submit(0, 1, req::OUT, 8, &[8; 4096], 0);
        assert_eq!((front.wait_used(0).0, front.status(0, 1)), (3, 0));
        front.submit(0, 2, req::FLUSH, 0, &[], 0);
        assert_eq!((front.wait_used(0).0, front.status(0, 2)), (6, 0));
        assert_eq!(front.status(0, 0), 255, "the guest was told nothing of it");
        resume(&mut qmp);
        assert_eq!((front.wait_used(0).0, front.status(0, 0)), (0, 0));
        assert_eq!(front.read(0, 4096), [7; 4096]);
        let counted = statistics(&mut qmp);
        assert_eq!((&counted["waiting-operations"], &counted["failed-operations"]), (&json!(0), &json!(1)));
    }
}

#[test]
fn an_error_of_another_kind_is_the_guests() {
    if tests::on_reference() {
        skip!("the reference has no such policy");
    }
    for policy in ["report", "enospc"] {
        let daemon = failing("inject-error.0.errno=5,inject-error.0.once=on", policy);
        let (mut qmp, mut front) = (daemon.qmp(), client(&daemon));
        assert_eq!(front.request(0, req::OUT, 0, &[7; 4096], 0).0, 1);
        let event = qmp.event("BLOCK_IO_ERROR");
        assert_eq!((&event["action"], &event["nospace"]), (&json!("report"), &json!(false)));
        front.write(0, &[7; 4096]);
    }
}

#[test]
fn a_request_that_waits_outlives_its_front_end() {
    if tests::on_reference() {
        skip!("the reference has no such policy");
    }
    let daemon = failing("inject-error.0.errno=5,inject-error.0.once=on", "stop");
    let (mut qmp, mut front) = (daemon.qmp(), client(&daemon));
    front.submit(0, 0, req::OUT, 0, &[7; 4096], 0);
    wait_until_one_waits(&mut qmp);
    // The next one is served when this request is done.
    std::thread::scope(|scope| {
        scope.spawn(|| come_back(&mut front, &daemon));
        resume(&mut qmp);
    });
    assert_eq!((front.wait_used(0).0, front.status(0, 0)), (0, 0));
    assert_eq!(front.poll_used(0), None, "done once");
    assert_eq!(front.read(0, 4096), [7; 4096]);
}

#[test]
fn a_request_that_waits_outlives_its_daemon() {
    if tests::on_reference() {
        skip!("the reference has no such policy");
    }
    let mut daemon = failing("inject-error.0.errno=5", "stop");
    let (mut qmp, mut front) = (daemon.qmp(), client(&daemon));
    front.submit(0, 0, req::OUT, 0, &[7; 4096], 0);
    wait_until_one_waits(&mut qmp);
    daemon.crash();
    let image = daemon.path("disk.img");
    assert_eq!(contents(&image)[..4096], [0; 4096]);
    wait_for("the image to be free", || tests::locks::read_locked_bytes(&image).is_empty().then_some(()));
    let healed = Setup::new()
        .arg("--blockdev")
        .arg(format!("driver=file,node-name=disk,filename={}", image.display()))
        .line(&export("writable=on"))
        .start();
    come_back(&mut front, &healed);
    assert_eq!((front.wait_used(0).0, front.status(0, 0)), (0, 0));
    assert_eq!(front.poll_used(0), None, "done once");
    assert_eq!(contents(&image)[..4096], [7; 4096]);
}

#[test]
fn what_waits_fails_when_the_export_goes() {
    if tests::on_reference() {
        skip!("the reference has no such policy");
    }
    for quits in [true, false] {
        let mut daemon = failing("inject-error.0.errno=5", "stop");
        let (mut qmp, mut front) = (daemon.qmp(), client(&daemon));
        front.submit(0, 0, req::OUT, 0, &[7; 4096], 0);
        wait_until_one_waits(&mut qmp);
        // Tried again, it fails again.
        resume(&mut qmp);
        qmp.event("BLOCK_IO_ERROR");
        qmp.event("BLOCK_IO_ERROR");
        wait_until_one_waits(&mut qmp);
        if quits {
            daemon.stop();
        } else {
            qmp.ok("block-export-del", json!({"id": "e", "mode": "hard"}));
        }
        assert_eq!((front.wait_used(0).0, front.status(0, 0)), (0, 1));
        assert!(front.closed());
    }
}

#[test]
fn a_queue_with_a_request_that_waits_stops_when_it_is_done() {
    if tests::on_reference() {
        skip!("the reference has no such policy");
    }
    let daemon = failing("inject-error.0.errno=28,inject-error.0.once=on", "stop");
    let (mut qmp, mut front) = (daemon.qmp(), client(&daemon));
    front.submit(0, 0, req::OUT, 0, &[7; 4096], 0);
    wait_until_one_waits(&mut qmp);
    front.send(msg::GET_VRING_BASE, 0, &[0; 8], &[]);
    resume(&mut qmp);
    let reply = front.receive().unwrap();
    assert_eq!((reply.request, &reply.payload[4..]), (msg::GET_VRING_BASE, &[1, 0, 0, 0][..]));
    assert_eq!((front.wait_used(0).0, front.status(0, 0)), (0, 0));
}
