//! QCOW2 images in the daemon, as its clients see them [drop-in A.7, A.8].
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, reason = "a test")]

mod bounds;
mod damage;
mod full;
mod info;
mod kills;
mod matrix;
mod options;

use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;
use tests::{Daemon, qmp};

/// Runs `qemu-img`; its output.
fn qemu_img(dir: &Path, args: &[&str]) -> String {
    let out = Command::new("qemu-img").args(args).current_dir(dir).output().expect("qemu-img runs");
    assert!(out.status.success(), "qemu-img {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

/// Runs commands of `qemu-io` on an image.
fn qemu_io(dir: &Path, image: &str, commands: &[&str]) {
    let mut args = vec!["-f", "qcow2"];
    commands.iter().for_each(|command| args.extend(["-c", command]));
    args.push(image);
    let out = Command::new("qemu-io").args(&args).current_dir(dir).output().expect("qemu-io runs");
    assert!(out.status.success(), "qemu-io {args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

/// Changes bytes of a file.
fn poke(path: &Path, at: u64, bytes: &[u8]) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.write_all_at(bytes, at).unwrap();
}

/// The number at a place in a file.
fn peek(path: &Path, at: u64) -> u64 {
    use std::os::unix::fs::FileExt;
    let mut bytes = [0; 8];
    std::fs::File::open(path).unwrap().read_exact_at(&mut bytes, at).unwrap();
    u64::from_be_bytes(bytes)
}

/// Adds the node `q` of an image, and exports it.
fn serve(daemon: &Daemon, image: &str, extra: &Value) -> qmp::Client {
    let mut qmp = daemon.qmp();
    let mut node = json!({"driver": "qcow2", "node-name": "q", "file": {"driver": "file", "filename": image}});
    node.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    let writable = node["read-only"] != true;
    qmp.ok("blockdev-add", node);
    qmp.ok("block-export-add", json!({"type": "nbd", "id": "e", "node-name": "q", "name": "q", "writable": writable}));
    qmp
}

/// The description of a node.
fn node(qmp: &mut qmp::Client, name: &str) -> Value {
    let nodes = qmp.ok("query-named-block-nodes", json!({}));
    let found = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == name);
    found.unwrap_or_else(|| panic!("no node {name}: {nodes}")).clone()
}
