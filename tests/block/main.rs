//! The block graph through QMP [drop-in A.3, A.5, A.7].
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

mod activity;
mod data;
mod graph;
mod locking;
mod queries;
mod reopen;
mod reservations;

use serde_json::{Value, json};
use tests::{Daemon, Setup, qmp};

const MIB: u64 = 1 << 20;

/// A daemon with a monitor, an NBD server and the image `a.img` of 1 MiB, no node yet.
fn idle() -> Daemon {
    Setup::new().qmp().image("a.img", MIB).nbd_server().start()
}

/// Exports a node writable under its own name.
fn export(qmp: &mut qmp::Client, node: &str) {
    let id = format!("exp-{node}");
    qmp.ok("block-export-add", json!({"type": "nbd", "id": id, "node-name": node, "name": node, "writable": true}));
}

/// The description of a node.
fn node(qmp: &mut qmp::Client, name: &str) -> Value {
    let nodes = qmp.ok("query-named-block-nodes", json!({"flat": true}));
    let found = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == name);
    found.unwrap_or_else(|| panic!("no node {name}: {nodes}")).clone()
}

/// The names of all nodes, sorted.
fn names(qmp: &mut qmp::Client) -> Vec<String> {
    let nodes = qmp.ok("query-named-block-nodes", json!({}));
    let mut names: Vec<_> =
        nodes.as_array().unwrap().iter().map(|node| node["node-name"].as_str().unwrap().to_owned()).collect();
    names.sort();
    names
}
