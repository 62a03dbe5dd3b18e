//! The fault node through QMP: only this project's daemon has it.

use serde_json::json;
use tests::nbd::{Headers, Request, cmd};
use tests::{Setup, on_reference, skip};

use crate::MIB;

#[test]
fn only_what_was_flushed_survives_a_kill() {
    if on_reference() {
        skip!("the reference has no fault node");
    }
    let mut daemon = Setup::new().qmp().nbd_server().image("a.img", MIB).start();
    let image = daemon.path("a.img");
    let mut qmp = daemon.qmp();
    let file = json!({ "driver": "file", "filename": image });
    let rule = json!({ "action": "hold", "iotype": "write", "offset": 65536, "length": 512 });
    qmp.ok("blockdev-add", json!({ "driver": "x-fault", "node-name": "d", "file": file, "rules": [rule] }));
    qmp.ok("block-export-add", json!({ "type": "nbd", "id": "e", "node-name": "d", "writable": true }));
    let (mut client, _) = daemon.nbd().open("d", Headers::Structured);
    assert_eq!(client.write(0, 0, &[1; 4096]), 0);
    assert_eq!(client.simple(cmd::FLUSH, 0, 0, 0), 0);
    assert_eq!(client.write(0, 0, &[2; 8192]), 0);
    assert_eq!(client.read(0, 512), [2; 512]);
    let held =
        client.send(&Request { cmd: cmd::WRITE, offset: 65536, len: 512, payload: vec![3; 512], ..Request::default() });
    let info = tests::wait_for("the write to be held", || {
        let info = qmp.ok("x-query-fault", json!({ "node-name": "d" }));
        (info["held"] == 1).then_some(info)
    });
    assert_eq!(info, json!({ "held": 1, "volatile-bytes": 8192, "crashed": false }));
    qmp.ok("x-fault-release", json!({ "node-name": "d" }));
    assert_eq!(client.reply().cookie, held);
    assert_eq!(qmp.refused("x-query-fault", json!({ "node-name": "x" })), "Cannot find device='' nor node-name='x'");
    daemon.crash();
    let bytes = std::fs::read(image).unwrap();
    assert!(bytes[..4096] == [1; 4096] && bytes[4096..].iter().all(|byte| *byte == 0));
}
