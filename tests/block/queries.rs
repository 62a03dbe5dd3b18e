//! What the queries show.

use serde_json::json;

use crate::{MIB, export, idle, node};

#[test]
fn an_empty_daemon() {
    let daemon = idle();
    let mut qmp = daemon.qmp();
    for query in ["query-block", "query-named-block-nodes", "query-blockstats", "query-block-exports"] {
        assert_eq!(qmp.ok(query, json!({})), json!([]), "{query}");
    }
}

#[test]
fn query_block_stays_empty() {
    let daemon = idle();
    let mut qmp = daemon.qmp();
    qmp.ok("blockdev-add", json!({"driver": "null-co", "node-name": "n"}));
    export(&mut qmp, "n");
    assert_eq!(qmp.ok("query-block", json!({})), json!([]));
}

#[test]
fn a_node_has_every_member_of_the_reference() {
    let daemon = idle();
    let mut qmp = daemon.qmp();
    qmp.ok("blockdev-add", json!({"driver": "file", "node-name": "f", "filename": "a.img"}));
    let shown = node(&mut qmp, "f");
    let mut wanted = json!({
        "iops_rd": 0, "iops_wr": 0, "iops": 0, "bps": 0, "bps_rd": 0, "bps_wr": 0, "detect_zeroes": "off", "active": true,
        "ro": false, "node-name": "f", "backing_file_depth": 0, "drv": "file", "write_threshold": 0, "encrypted": false,
        "cache": {"no-flush": false, "direct": false, "writeback": true}, "file": "a.img",
    });
    for (member, value) in wanted.as_object_mut().unwrap() {
        if member == "active" {
            // A feature of newer releases; there, or not.
            continue;
        }
        assert_eq!(&shown[member.as_str()], value, "{member} of {shown}");
    }
    let image = &shown["image"];
    assert_eq!(image["virtual-size"], MIB);
    assert_eq!(image["filename"], "a.img");
    assert_eq!(image["format"], "file");
    assert_eq!(image["actual-size"], 0);
    assert_eq!(image["dirty-flag"], false);
}

#[test]
fn statistics_have_every_member() {
    let daemon = idle();
    let mut qmp = daemon.qmp();
    qmp.ok("blockdev-add", json!({"driver": "file", "node-name": "f", "filename": "a.img"}));
    let stats = qmp.ok("query-blockstats", json!({"query-nodes": true}));
    assert_eq!(stats[0]["node-name"], "f");
    for member in [
        "rd_bytes",
        "wr_bytes",
        "unmap_bytes",
        "rd_operations",
        "wr_operations",
        "flush_operations",
        "unmap_operations",
        "rd_total_time_ns",
        "wr_total_time_ns",
        "flush_total_time_ns",
        "unmap_total_time_ns",
        "wr_highest_offset",
        "rd_merged",
        "wr_merged",
        "unmap_merged",
        "failed_rd_operations",
        "failed_wr_operations",
        "failed_flush_operations",
        "failed_unmap_operations",
        "invalid_rd_operations",
        "invalid_wr_operations",
        "invalid_flush_operations",
        "invalid_unmap_operations",
    ] {
        assert!(stats[0]["stats"][member].is_u64(), "{member} of {stats}");
    }
    for member in ["account_invalid", "account_failed"] {
        assert!(stats[0]["stats"][member].is_boolean(), "{member} of {stats}");
    }
    assert!(stats[0]["stats"]["timed_stats"].is_array());
}

#[test]
fn the_graph_as_a_graph() {
    let daemon = idle();
    let mut qmp = daemon.qmp();
    qmp.ok("blockdev-add", json!({"driver": "file", "node-name": "f", "filename": "a.img"}));
    qmp.ok("blockdev-add", json!({"driver": "raw", "node-name": "r", "file": "f"}));
    export(&mut qmp, "r");
    let graph = qmp.ok("x-debug-query-block-graph", json!({}));
    let id = |name: &str| {
        graph["nodes"].as_array().unwrap().iter().find(|node| node["name"] == name).unwrap()["id"].as_u64().unwrap()
    };
    let edge = |parent: u64, child: u64| {
        let found =
            graph["edges"].as_array().unwrap().iter().find(|edge| edge["parent"] == parent && edge["child"] == child);
        found.unwrap_or_else(|| panic!("no edge {parent} to {child}: {graph}")).clone()
    };
    let user = graph["nodes"].as_array().unwrap().iter().find(|node| node["type"] == "block-backend").unwrap();
    let root = edge(user["id"].as_u64().unwrap(), id("r"));
    assert_eq!(root["name"], "root");
    let inner = edge(id("r"), id("f"));
    assert_eq!(inner["name"], "file");
    for edge in [root, inner] {
        let mut held: Vec<_> = edge["perm"].as_array().unwrap().iter().map(|perm| perm.as_str().unwrap()).collect();
        held.sort_unstable();
        assert_eq!(held, ["consistent-read", "write"], "{edge}");
    }
}

#[test]
fn a_list_of_nodes_with_and_without_their_images() {
    let daemon = idle();
    let mut qmp = daemon.qmp();
    qmp.ok("blockdev-add", json!({"driver": "file", "node-name": "f", "filename": "a.img"}));
    for arguments in [json!({}), json!({"flat": false}), json!({"flat": true})] {
        let nodes = qmp.ok("query-named-block-nodes", arguments);
        assert_eq!(nodes[0]["image"]["virtual-size"], MIB);
    }
}
