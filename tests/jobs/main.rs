//! Jobs, images that they make, and snapshots, on both programs [drop-in A.3, A.4].
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

mod create;
mod snapshots;
mod verbs;

use serde_json::{Value, json};
use tests::qmp::Client;
use tests::{Daemon, Setup};

const MIB: u64 = 1 << 20;

/// A daemon with nothing but a monitor, and an NBD server.
fn idle() -> Daemon {
    Setup::new().qmp().nbd_server().start()
}

/// Waits until a job is over, dismisses it, and gives its error.
fn conclude(qmp: &mut Client, id: &str) -> Option<String> {
    while qmp.event("JOB_STATUS_CHANGE") != json!({"id": id, "status": "concluded"}) {}
    let jobs = qmp.ok("query-jobs", json!({}));
    let job = jobs.as_array().unwrap().iter().find(|job| job["id"] == id).unwrap().clone();
    qmp.ok("job-dismiss", json!({"id": id}));
    job.get("error").map(|error| error.as_str().unwrap().to_owned())
}

/// Makes an image; gives the error of the job.
fn create(qmp: &mut Client, options: &Value) -> Option<String> {
    qmp.ok("blockdev-create", json!({"job-id": "make", "options": options}));
    conclude(qmp, "make")
}
