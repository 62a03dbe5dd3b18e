//! The drivers that stand above other nodes: the contract for each of them, and what each adds.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "test code")]

mod common;

use common::suite::{SIZE, check};
use common::{attach, graph_with, image, on_thread, options, refused, writer};
use io::RingUse;
use serde_json::json;

#[test]
fn throttle_keeps_the_contract() {
    let file = image(2 * SIZE);
    for group in ["fast", "unlimited"] {
        let json = json!({
            "driver": "throttle", "node-name": "top", "throttle-group": group, "discard": "unmap",
            "file": { "driver": "file", "filename": file.path() }
        });
        check(RingUse::Auto, json, true, Some((file.path(), 0)));
    }
}

#[test]
fn throttle_joins_and_leaves_its_group() {
    on_thread(RingUse::Off, || async {
        let (mut g, drivers) = graph_with();
        let throttle = |group: &str, file| json!({ "driver": "throttle", "node-name": "t", "throttle-group": group, "file": file });
        assert_eq!(
            refused(&mut g, &throttle("nope", json!({ "driver": "null-co" }))).await,
            "Throttle group 'nope' does not exist"
        );
        let group = drivers.throttle_groups.get("fast").unwrap();
        assert!(refused(&mut g, &throttle("fast", json!("nope"))).await.contains("nope"));
        assert_eq!(group.members(), 0);
        let json = throttle("fast", json!({ "driver": "null-co", "size": 65536 }));
        g.add(&options(&json)).await.unwrap();
        assert_eq!(group.members(), 1);
        let name = g.get("t").unwrap().driver().filename();
        let shown: serde_json::Value = serde_json::from_str(name.strip_prefix("json:").unwrap()).unwrap();
        let mut want = json.clone();
        want.as_object_mut().unwrap().remove("node-name");
        assert_eq!(shown, want);
        // Deleted from under a user that still holds the group: the driver is gone and so is the member.
        let disk = attach(&mut g, "t", writer()).await.unwrap();
        g.detach(disk).await;
        g.delete("t").await.unwrap();
        assert_eq!(group.members(), 0);
    });
}
