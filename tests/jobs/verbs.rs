//! The commands for jobs, on a job that is over and on none.

use serde_json::{Value, json};

use crate::{conclude, idle};
use tests::qmp::Client;
use tests::{Daemon, wait_for};

#[test]
fn states_and_their_events() {
    let daemon = idle();
    let mut qmp = daemon.qmp();
    let file = json!({"driver": "file", "filename": "a.img", "size": 65536});
    qmp.send(&json!({"execute": "blockdev-create", "arguments": {"job-id": "j", "options": file}}).to_string());
    // The first two come before the command's own return.
    let mut before = Vec::new();
    let mut states = Vec::new();
    while states.last() != Some(&json!("concluded")) {
        let message = qmp.recv();
        if message.get("return").is_some() {
            before = states.clone();
        } else {
            assert_eq!(message["event"], "JOB_STATUS_CHANGE");
            assert_eq!(message["data"]["id"], "j");
            states.push(message["data"]["status"].clone());
        }
    }
    assert_eq!(states, ["created", "running", "waiting", "pending", "concluded"]);
    assert!(before.starts_with(&[json!("created"), json!("running")]), "{before:?}");
    let jobs = qmp.ok("query-jobs", json!({}));
    let job = json!({"id": "j", "type": "create", "status": "concluded", "current-progress": 1, "total-progress": 1});
    assert_eq!(jobs, json!([job]));
    qmp.ok("job-dismiss", json!({"id": "j"}));
    assert_eq!(qmp.event("JOB_STATUS_CHANGE"), json!({"id": "j", "status": "null"}));
    assert_eq!(qmp.ok("query-jobs", json!({})), json!([]));
}

#[test]
fn a_job_that_fails_aborts() {
    let daemon = idle();
    let mut qmp = daemon.qmp();
    let file = json!({"driver": "file", "filename": "/nosuch/a.img", "size": 65536});
    qmp.ok("blockdev-create", json!({"job-id": "j", "options": file}));
    let states: Vec<_> = (0..4).map(|_| qmp.event("JOB_STATUS_CHANGE")["status"].clone()).collect();
    assert_eq!(states, ["created", "running", "aborting", "concluded"]);
    let jobs = qmp.ok("query-jobs", json!({}));
    assert_eq!(jobs[0]["error"], "Could not create '/nosuch/a.img': No such file or directory");
}

#[test]
fn texts_of_a_job_that_is_over() {
    let daemon = idle();
    let mut qmp = daemon.qmp();
    let file = json!({"driver": "file", "filename": "a.img", "size": 0});
    qmp.ok("blockdev-create", json!({"job-id": "j", "options": file}));
    while qmp.event("JOB_STATUS_CHANGE")["status"] != "concluded" {}
    for verb in ["cancel", "pause", "complete", "finalize"] {
        let text = qmp.refused(&format!("job-{verb}"), json!({"id": "j"}));
        assert_eq!(text, format!("Job 'j' in state 'concluded' cannot accept command verb '{verb}'"));
    }
    assert_eq!(qmp.refused("job-resume", json!({"id": "j"})), "Can't resume a job that was not paused");
    let again = qmp.refused("blockdev-create", json!({"job-id": "j", "options": file}));
    assert_eq!(again, "Job ID 'j' already in use");
    // What makes an image is no block job.
    for (verb, id) in [
        ("cancel", "device"),
        ("pause", "device"),
        ("resume", "device"),
        ("complete", "device"),
        ("finalize", "id"),
        ("dismiss", "id"),
    ] {
        let refusal = qmp.execute(&format!("block-job-{verb}"), json!({id: "j"})).unwrap_err();
        assert_eq!((&*refusal.class, &*refusal.desc), ("DeviceNotActive", "Block job 'j' not found"));
    }
    let refusal = qmp.execute("block-job-set-speed", json!({"device": "j", "speed": -1})).unwrap_err();
    assert_eq!((&*refusal.class, &*refusal.desc), ("DeviceNotActive", "Block job 'j' not found"));
    assert_eq!(qmp.ok("query-block-jobs", json!({})), json!([]));
}

#[test]
fn names_and_none() {
    let daemon = idle();
    let mut qmp = daemon.qmp();
    let file = json!({"driver": "file", "filename": "a.img", "size": 0});
    for name in ["", "1j", "a b", "ä"] {
        let text = qmp.refused("blockdev-create", json!({"job-id": name, "options": file}));
        assert_eq!(text, format!("Invalid job ID '{name}'"));
    }
    for verb in ["cancel", "pause", "complete", "finalize", "dismiss", "resume"] {
        assert_eq!(qmp.refused(&format!("job-{verb}"), json!({"id": "j"})), "Job not found");
    }
    for driver in ["null-co", "raw", "throttle"] {
        let text = qmp.refused("blockdev-create", json!({"job-id": "j", "options": {"driver": driver}}));
        assert_eq!(text, "Driver does not support blockdev-create");
    }
    assert_eq!(qmp.ok("query-jobs", json!({})), json!([]));
}

#[test]
fn the_youngest_job_is_shown_first() {
    let daemon = idle();
    let mut qmp = daemon.qmp();
    for id in ["a", "b", "c"] {
        let file = json!({"driver": "file", "filename": format!("{id}.img"), "size": 512});
        qmp.ok("blockdev-create", json!({"job-id": id, "options": file}));
        while qmp.event("JOB_STATUS_CHANGE")["status"] != "concluded" {}
    }
    let jobs = qmp.ok("query-jobs", json!({}));
    let ids: Vec<_> = jobs.as_array().unwrap().iter().map(|job| job["id"].clone()).collect();
    assert_eq!(ids, ["c", "b", "a"]);
    for id in ["b", "a", "c"] {
        qmp.ok("job-dismiss", json!({"id": id}));
    }
    // A name can be used again.
    let file = json!({"driver": "file", "filename": "a.img", "size": 512});
    qmp.ok("blockdev-create", json!({"job-id": "a", "options": file}));
    assert_eq!(conclude(&mut qmp, "a"), None);
}

#[test]
fn the_end_of_the_daemon_ends_jobs() {
    let mut daemon = idle();
    let mut qmp = daemon.qmp();
    for id in ["a", "b"] {
        let file =
            json!({"driver": "file", "filename": format!("{id}.img"), "size": 16 << 20, "preallocation": "full"});
        qmp.ok("blockdev-create", json!({"job-id": id, "options": file}));
    }
    daemon.stop();
}

/// A node that takes years for a header; lifting its limit lets what waits go on.
fn slow(daemon: &Daemon, qmp: &mut Client) {
    std::fs::write(daemon.path("slow.img"), vec![0; 1 << 20]).unwrap();
    qmp.ok("object-add", json!({"qom-type": "throttle-group", "id": "g", "limits": {"bps-write": 1}}));
    let file = json!({"driver": "file", "filename": "slow.img"});
    qmp.ok("blockdev-add", json!({"driver": "throttle", "node-name": "t", "throttle-group": "g", "file": file}));
    let options = json!({"driver": "qcow2", "file": "t", "size": 1 << 20});
    qmp.ok("blockdev-create", json!({"job-id": "j", "options": options}));
}

fn let_go(qmp: &mut Client) {
    qmp.ok("qom-set", json!({"path": "/objects/g", "property": "limits", "value": {"bps-write": 0}}));
    // The reference lets what waits already go with a drain.
    let file = json!({"driver": "file", "filename": "slow.img"});
    let node = json!({"driver": "throttle", "node-name": "t", "throttle-group": "g", "file": file});
    qmp.ok("blockdev-reopen", json!({"options": [node]}));
}

fn state(qmp: &mut Client) -> Value {
    qmp.ok("query-jobs", json!({}))[0]["status"].clone()
}

#[test]
fn every_verb_on_a_job_that_runs() {
    let daemon = idle();
    let mut qmp = daemon.qmp();
    slow(&daemon, &mut qmp);
    for verb in ["complete", "finalize", "dismiss"] {
        let text = qmp.refused(&format!("job-{verb}"), json!({"id": "j"}));
        assert_eq!(text, format!("Job 'j' in state 'running' cannot accept command verb '{verb}'"));
    }
    let verb = |qmp: &mut Client, verb: &str, refusal: Option<&str>| {
        let command = format!("job-{verb}");
        match refusal {
            None => assert_eq!(qmp.ok(&command, json!({"id": "j"})), json!({})),
            Some(text) => assert_eq!(qmp.refused(&command, json!({"id": "j"})), text),
        }
        // It reaches no point where it could change: it waits for a write.
        assert_eq!(state(qmp), "running");
    };
    let not_paused = Some("Can't resume a job that was not paused");
    verb(&mut qmp, "resume", not_paused);
    verb(&mut qmp, "pause", None);
    verb(&mut qmp, "pause", Some("Job is already paused"));
    verb(&mut qmp, "resume", None);
    verb(&mut qmp, "resume", not_paused);
    verb(&mut qmp, "pause", None);
    // Cancelling ends a pause.
    verb(&mut qmp, "cancel", None);
    verb(&mut qmp, "resume", not_paused);
    verb(&mut qmp, "cancel", None);
    let again =
        qmp.refused("blockdev-create", json!({"job-id": "j", "options": {"driver": "qcow2", "file": "t", "size": 0}}));
    assert_eq!(again, "Job ID 'j' already in use");
    let_go(&mut qmp);
    let mut states = Vec::new();
    while states.last() != Some(&json!("concluded")) {
        states.push(qmp.event("JOB_STATUS_CHANGE")["status"].clone());
    }
    assert_eq!(states, ["created", "running", "aborting", "concluded"]);
    let jobs = qmp.ok("query-jobs", json!({}));
    assert_eq!(jobs[0]["error"], "Operation canceled");
}

#[test]
fn a_paused_job_that_runs_through_stays_paused_nowhere() {
    let daemon = idle();
    let mut qmp = daemon.qmp();
    slow(&daemon, &mut qmp);
    qmp.ok("job-pause", json!({"id": "j"}));
    let_go(&mut qmp);
    // Nothing of it can be paused: it ends.
    assert_eq!(conclude(&mut qmp, "j"), None);
}

#[test]
fn the_end_of_the_daemon_ends_a_job_that_waits() {
    if tests::on_reference() {
        tests::skip!("the reference may wait for the job");
    }
    let mut daemon = idle();
    let mut qmp = daemon.qmp();
    slow(&daemon, &mut qmp);
    daemon.stop();
}

/// Holding a request is what a disk does that hangs; it must not keep the process from ending.
#[test]
fn the_end_of_the_daemon_ends_what_a_fault_node_holds() {
    if tests::on_reference() {
        tests::skip!("the reference has no such node");
    }
    let mut daemon = idle();
    let mut qmp = daemon.qmp();
    std::fs::write(daemon.path("held.img"), vec![0; 1 << 20]).unwrap();
    let file = json!({"driver": "file", "filename": "held.img"});
    let rule = json!({"action": "hold", "iotype": "write"});
    qmp.ok("blockdev-add", json!({"driver": "x-fault", "node-name": "d", "file": file, "rules": [rule]}));
    let options = json!({"driver": "qcow2", "file": "d", "size": 1 << 20});
    qmp.ok("blockdev-create", json!({"job-id": "j", "options": options}));
    wait_for("a request to be held", || {
        (qmp.ok("x-query-fault", json!({"node-name": "d"}))["held"] == 1).then_some(())
    });
    assert_eq!(state(&mut qmp), "running");
    daemon.stop();
}
