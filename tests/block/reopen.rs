//! `blockdev-reopen` [drop-in A.3]: what changes, what is refused, and that a refusal changes nothing, also while clients write.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use serde_json::{Value, json};
use tests::image::Noise;
use tests::locks::read_locked_bytes;
use tests::nbd::{self, Headers, cmd};
use tests::{Daemon, Setup, known_defect, on_reference, qmp, tools};

use crate::{MIB, export, idle, names, node};

fn file(name: &str, image: &str) -> Value {
    json!({"driver": "file", "node-name": name, "filename": image})
}

fn raw(name: &str, child: &str) -> Value {
    json!({"driver": "raw", "node-name": name, "file": child})
}

fn with(mut options: Value, more: Value) -> Value {
    options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    options
}

fn add(qmp: &mut qmp::Client, options: Value) {
    qmp.ok("blockdev-add", options);
}

fn reopen(qmp: &mut qmp::Client, options: &[Value]) {
    qmp.ok("blockdev-reopen", json!({"options": options}));
}

fn refused(qmp: &mut qmp::Client, options: &[Value]) -> String {
    qmp.refused("blockdev-reopen", json!({"options": options}))
}

/// A daemon with the images `a.img` and `b.img`, no node yet.
fn two_images() -> Daemon {
    Setup::new().qmp().image("a.img", MIB).image("b.img", MIB).nbd_server().start()
}

#[test]
fn options_change_and_go_back_to_their_defaults() {
    let daemon = idle();
    let mut qmp = daemon.qmp();
    add(&mut qmp, file("f", "a.img"));
    let before = node(&mut qmp, "f");
    let new = json!({"read-only": true, "detect-zeroes": "on", "cache": {"no-flush": true}, "discard": "unmap"});
    reopen(&mut qmp, &[with(file("f", "a.img"), new)]);
    let changed = node(&mut qmp, "f");
    assert_eq!((&changed["ro"], &changed["detect_zeroes"]), (&json!(true), &json!("on")));
    assert_eq!(changed["cache"]["no-flush"], true);
    reopen(&mut qmp, &[file("f", "a.img")]);
    assert_eq!(node(&mut qmp, "f"), before);
}

#[test]
fn a_window_moves_under_its_client() {
    let daemon = idle();
    let mut qmp = daemon.qmp();
    add(&mut qmp, file("f", "a.img"));
    add(&mut qmp, raw("r", "f"));
    export(&mut qmp, "r");
    let (mut client, _) = daemon.nbd().open("r", Headers::Structured);
    assert_eq!(client.write(4096, 0, &[7; 512]), 0);
    reopen(&mut qmp, &[with(raw("r", "f"), json!({"offset": 4096, "size": MIB - 4096}))]);
    assert_eq!(client.read(0, 512), [7; 512]);
    reopen(&mut qmp, &[raw("r", "f")]);
    assert_eq!(client.read(4096, 512), [7; 512]);
}

#[test]
fn what_cannot_change_is_named() {
    let daemon = two_images();
    let mut qmp = daemon.qmp();
    add(&mut qmp, file("f", "a.img"));
    add(&mut qmp, file("g", "b.img"));
    add(&mut qmp, with(file("h", "b.img"), json!({"locking": "auto"})));
    add(&mut qmp, raw("r", "f"));
    let defined =
        |name: &str| json!({"driver": "raw", "node-name": name, "file": {"driver": "file", "filename": "b.img"}});
    for (options, text) in [
        (vec![file("nobody", "a.img")], "Failed to find node with node-name='nobody'"),
        (vec![json!({"driver": "file", "filename": "a.img"})], "node-name not specified"),
        (vec![file("f", "b.img")], "Cannot change the option 'filename'"),
        (vec![with(file("f", "a.img"), json!({"locking": "off"}))], "Cannot change the option 'locking'"),
        (vec![with(file("f", "a.img"), json!({"aio": "threads"}))], "Cannot change the option 'aio'"),
        (vec![with(file("f", "a.img"), json!({"aio-max-batch": 3}))], "Cannot change the option 'aio-max-batch'"),
        (vec![defined("r")], "Cannot change the option 'file.driver'"),
        (vec![raw("r", "nobody")], "Cannot find device='' nor node-name='nobody'"),
        (vec![raw("r", "r")], "Making 'r' a file child of 'r' would create a cycle"),
        (vec![raw("r", "g"), file("g", "a.img")], "Cannot change the option 'filename'"),
        // The default is no value of the option, and no value is the default.
        (vec![with(file("f", "a.img"), json!({"locking": "auto"}))], "Cannot change the option 'locking'"),
        (vec![file("h", "b.img")], "Option 'locking' cannot be reset to its default value"),
    ] {
        assert_eq!(refused(&mut qmp, &options), text, "{options:?}");
    }
}

#[test]
fn an_empty_list_changes_nothing() {
    // It ends the reference.
    if on_reference() {
        return;
    }
    let daemon = idle();
    let mut qmp = daemon.qmp();
    reopen(&mut qmp, &[]);
}

#[test]
fn a_child_is_replaced_and_a_child_made_inside_its_parent_goes() {
    let daemon = two_images();
    let mut qmp = daemon.qmp();
    add(&mut qmp, file("g", "b.img"));
    add(
        &mut qmp,
        json!({"driver": "raw", "node-name": "r", "file": {"driver": "file", "node-name": "f", "filename": "a.img"}}),
    );
    export(&mut qmp, "r");
    let (mut client, _) = daemon.nbd().open("r", Headers::Structured);
    assert_eq!(client.write(0, 0, &[1; 512]), 0);
    reopen(&mut qmp, &[raw("r", "g")]);
    assert_eq!(client.read(0, 512), [0; 512], "the other image");
    assert_eq!(client.write(0, 0, &[2; 512]), 0);
    assert_eq!(names(&mut qmp), ["g", "r"], "nobody uses f any more");
    assert!(read_locked_bytes(&daemon.path("a.img")).is_empty());
    assert!(!read_locked_bytes(&daemon.path("b.img")).is_empty());
    let first = |name: &str| tests::image::contents(&daemon.path(name))[0];
    assert_eq!((first("a.img"), first("b.img")), (1, 2));
}

#[test]
fn what_a_child_takes_over_changes_with_its_parent() {
    let daemon = idle();
    let mut qmp = daemon.qmp();
    let make = |more: Value| {
        with(
            json!({"driver": "raw", "node-name": "r", "file": {"driver": "file", "node-name": "f", "filename": "a.img"}}),
            more,
        )
    };
    add(&mut qmp, make(json!({})));
    reopen(&mut qmp, &[make(json!({"read-only": true, "cache": {"no-flush": true}}))]);
    let child = node(&mut qmp, "f");
    assert_eq!((&child["ro"], &child["cache"]["no-flush"]), (&json!(true), &json!(true)));
    reopen(&mut qmp, &[make(json!({}))]);
    let child = node(&mut qmp, "f");
    assert_eq!((&child["ro"], &child["cache"]["no-flush"]), (&json!(false), &json!(false)));
}

/// Three images: `base` and `other` full of different bytes, and `over`, which names `base`.
fn chain() -> Daemon {
    let setup = Setup::new();
    let dir = setup.path("");
    for (name, pattern) in [("base", "0x11"), ("other", "0x22")] {
        tools::run_in(&dir, "qemu-img", ["create", "-q", "-f", "qcow2", name, "1M"]);
        tools::run_in(&dir, "qemu-io", ["-f", "qcow2", "-c", &format!("write -P {pattern} 0 1M"), name]);
    }
    tools::run_in(&dir, "qemu-img", ["create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "over"]);
    setup.qmp().nbd_server().start()
}

fn qcow2(name: &str, child: &str, backing: Value) -> Value {
    json!({"driver": "qcow2", "node-name": name, "file": child, "backing": backing})
}

/// The number of backing files below a node.
fn depth(qmp: &mut qmp::Client, name: &str) -> Value {
    let nodes = qmp.ok("query-named-block-nodes", json!({}));
    nodes.as_array().unwrap().iter().find(|node| node["node-name"] == name).unwrap()["backing_file_depth"].clone()
}

#[test]
fn backing_files_come_and_go_under_a_client() {
    let daemon = chain();
    let mut qmp = daemon.qmp();
    for name in ["base", "other", "over"] {
        add(&mut qmp, file(&format!("{name}-file"), name));
    }
    for name in ["base", "other"] {
        add(&mut qmp, json!({"driver": "qcow2", "node-name": name, "file": format!("{name}-file"), "read-only": true}));
    }
    add(&mut qmp, qcow2("over", "over-file", json!("base")));
    export(&mut qmp, "over");
    let (mut client, _) = daemon.nbd().open("over", Headers::Structured);
    assert_eq!(client.read(0, 4), [0x11; 4]);
    let missing = json!({"driver": "qcow2", "node-name": "over", "file": "over-file"});
    assert_eq!(refused(&mut qmp, &[missing]), "backing is missing for 'over'");
    reopen(&mut qmp, &[qcow2("over", "over-file", Value::Null)]);
    assert_eq!(client.read(0, 4), [0; 4], "nothing shows through");
    assert_eq!(depth(&mut qmp, "over"), 0);
    reopen(&mut qmp, &[qcow2("over", "over-file", json!("other"))]);
    assert_eq!(client.read(0, 4), [0x22; 4]);
    assert_eq!(depth(&mut qmp, "over"), 1);
    assert!(node(&mut qmp, "over")["backing_file"].as_str().unwrap().ends_with("other"));
    assert_eq!(client.write(0, 0, &[0x33; 512]), 0);
    reopen(&mut qmp, &[qcow2("over", "over-file", json!("base"))]);
    assert_eq!(client.read(0, 512), [0x33; 512]);
    assert_eq!(client.read(512, 4), [0x22; 4], "the rest of the cluster was copied, from other");
}

#[test]
fn an_image_becomes_read_only_and_writable_again() {
    let daemon = chain();
    let mut qmp = daemon.qmp();
    for name in ["base", "other", "over"] {
        add(&mut qmp, file(&format!("{name}-file"), name));
    }
    for name in ["base", "other"] {
        add(&mut qmp, json!({"driver": "qcow2", "node-name": name, "file": format!("{name}-file"), "read-only": true}));
    }
    add(&mut qmp, qcow2("over", "over-file", json!("base")));
    let making = |backing: &str| with(qcow2("over", "over-file", json!(backing)), json!({"read-only": true}));
    reopen(&mut qmp, &[making("other")]);
    assert_eq!(node(&mut qmp, "over")["ro"], true);
    assert_eq!(
        qmp.refused("block-export-add", json!({"type": "nbd", "id": "e", "node-name": "over", "writable": true})),
        "Cannot export read-only node as writable"
    );
    reopen(&mut qmp, &[qcow2("over", "over-file", json!("base"))]);
    export(&mut qmp, "over");
    let (mut client, _) = daemon.nbd().open("over", Headers::Structured);
    assert_eq!(client.write(65536, 0, &[9; 512]), 0);
    assert_eq!(client.simple(cmd::FLUSH, 0, 0, 0), 0);
    assert_eq!(client.read(65536 + 512, 4), [0x11; 4]);
    assert_eq!(refused(&mut qmp, &[making("base")]), "Read-only block node 'over' cannot support read-write users");
}

#[test]
fn the_last_word_on_a_node_holds() {
    // The reference drains the node for good: its clients hang.
    if on_reference() {
        return;
    }
    let daemon = chain();
    let mut qmp = daemon.qmp();
    for name in ["base", "other", "over"] {
        add(&mut qmp, file(&format!("{name}-file"), name));
    }
    for name in ["base", "other"] {
        add(&mut qmp, json!({"driver": "qcow2", "node-name": name, "file": format!("{name}-file"), "read-only": true}));
    }
    add(&mut qmp, qcow2("over", "over-file", Value::Null));
    export(&mut qmp, "over");
    let (mut client, _) = daemon.nbd().open("over", Headers::Structured);
    reopen(&mut qmp, &[qcow2("over", "over-file", json!("base")), qcow2("over", "over-file", json!("other"))]);
    assert_eq!(client.read(0, 4), [0x22; 4]);
    assert_eq!(depth(&mut qmp, "over"), 1);
    qmp.ok("block-export-del", json!({"id": "exp-over", "mode": "hard"}));
    for name in ["over", "other", "base"] {
        qmp.ok("blockdev-del", json!({"node-name": name}));
    }
}

/// Everything that a failed change must leave as it was.
fn state(daemon: &Daemon, qmp: &mut qmp::Client) -> (Value, Value, Vec<u64>, Vec<u64>) {
    let locks = |name: &str| read_locked_bytes(&daemon.path(name)).into_iter().collect();
    (
        qmp.ok("query-named-block-nodes", json!({})),
        qmp.ok("x-debug-query-block-graph", json!({})),
        locks("a.img"),
        locks("b.img"),
    )
}

#[test]
fn a_failure_at_any_step_changes_nothing() {
    let daemon = two_images();
    let mut qmp = daemon.qmp();
    add(&mut qmp, file("f", "a.img"));
    add(&mut qmp, file("g", "b.img"));
    add(&mut qmp, with(raw("idle", "g"), json!({"read-only": true})));
    add(&mut qmp, raw("r", "f"));
    export(&mut qmp, "r");
    let (mut client, _) = daemon.nbd().open("r", Headers::Structured);
    assert_eq!(client.write(0, 0, &[5; 512]), 0);
    // Somebody else has b.img and lets nobody write to it.
    let image = daemon.path("b.img");
    let other = Setup::new()
        .qmp()
        .nbd_server()
        .line(&format!("--blockdev file,node-name=b,read-only=on,filename={}", image.display()))
        .line("--blockdev blkdebug,node-name=d,read-only=on,image=b,unshare-child-perms.0=write")
        .line("--export nbd,id=d,node-name=d")
        .start();
    let before = state(&daemon, &mut qmp);
    // The first change of each list is possible; what follows is not: at the look at options, at permissions, at locks.
    let harmless = with(file("f", "a.img"), json!({"detect-zeroes": "on", "cache": {"no-flush": true}}));
    for (step, failing) in [
        ("an option", with(file("g", "b.img"), json!({"aio-max-batch": 1}))),
        ("a driver's check", with(raw("r", "f"), json!({"offset": 2 * MIB}))),
        ("a circle", raw("r", "r")),
        ("read-only with a writer", with(raw("r", "f"), json!({"read-only": true}))),
        ("the image lock", raw("r", "g")),
    ] {
        let text = refused(&mut qmp, &[harmless.clone(), failing]);
        assert_eq!(state(&daemon, &mut qmp), before, "{step}: {text}");
        assert_eq!(client.read(0, 512), [5; 512], "{step}");
        assert_eq!(client.write(512, 0, &[6; 512]), 0, "{step}");
    }
    drop(other);
    reopen(&mut qmp, &[harmless, raw("r", "g")]);
    assert_eq!(client.read(0, 512), [0; 512], "nobody has it any more");
}

#[test]
fn data_that_cannot_be_flushed_keeps_its_place() {
    // The reference forgets it: a later flush goes to the other node and succeeds.
    if on_reference() {
        return;
    }
    let daemon = two_images();
    let mut qmp = daemon.qmp();
    add(&mut qmp, file("g", "b.img"));
    let rule = json!([{"event": "flush_to_disk", "errno": 5, "once": true}]);
    add(&mut qmp, json!({"driver": "blkdebug", "node-name": "d", "image": file("f", "a.img"), "inject-error": rule}));
    add(&mut qmp, raw("r", "d"));
    export(&mut qmp, "r");
    let (mut client, _) = daemon.nbd().open("r", Headers::Structured);
    assert_eq!(client.write(0, 0, &[5; 512]), 0);
    let before = state(&daemon, &mut qmp);
    assert_eq!(refused(&mut qmp, &[raw("r", "g")]), "Could not flush node 'd': Input/output error");
    assert_eq!(state(&daemon, &mut qmp), before);
    assert_eq!(client.read(0, 512), [5; 512]);
    reopen(&mut qmp, &[raw("r", "g")]);
    assert_eq!(client.read(0, 512), [0; 512]);
}

/// Writes and reads back until told to stop; every block has bytes of its own. Returns the number of rounds.
fn hammer(mut client: nbd::Client, stop: &AtomicBool, from: u64, seed: u64) -> u64 {
    let mut noise = Noise::new(seed);
    let mut rounds = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        let at = from + noise.below(MIB / 2 / 4096) * 4096;
        let data = noise.bytes(4096);
        assert_eq!(client.write(at, 0, &data), 0);
        if rounds.is_multiple_of(16) {
            assert_eq!(client.simple(cmd::FLUSH, 0, 0, 0), 0);
        }
        assert!(client.read(at, 4096) == data, "round {rounds} at {at}");
        rounds += 1;
    }
    rounds
}

/// Runs `work` while two clients write to and read from the export `r`.
fn under_load(daemon: &Daemon, work: impl FnOnce()) {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let clients: Vec<_> = (0..2)
            .map(|n| {
                let (client, _) = daemon.nbd().open("r", Headers::Structured);
                let stop = &stop;
                scope.spawn(move || hammer(client, stop, n * MIB / 2, n))
            })
            .collect();
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        stop.store(true, Ordering::Relaxed);
        for client in clients {
            assert!(client.join().unwrap() > 0, "it did not get to write");
        }
        done.unwrap();
    });
}

#[test]
fn clients_notice_nothing() {
    let daemon = idle();
    let mut qmp = daemon.qmp();
    qmp.ok("object-add", json!({"qom-type": "throttle-group", "id": "t1"}));
    qmp.ok("object-add", json!({"qom-type": "throttle-group", "id": "t2"}));
    add(&mut qmp, file("f", "a.img"));
    let throttle = |group: &str| json!({"driver": "throttle", "node-name": "t", "throttle-group": group, "file": "f"});
    add(&mut qmp, throttle("t1"));
    add(&mut qmp, raw("r", "t"));
    export(&mut qmp, "r");
    under_load(&daemon, || {
        for n in 0..100_u32 {
            let direct = json!({"cache": {"direct": n.is_multiple_of(2)}, "discard": "unmap"});
            let zeroes = json!({"detect-zeroes": if n.is_multiple_of(3) { "on" } else { "off" }});
            let group = if n.is_multiple_of(2) { "t2" } else { "t1" };
            let child = if n % 4 < 2 { "f" } else { "t" };
            reopen(&mut qmp, &[with(file("f", "a.img"), direct), throttle(group), with(raw("r", child), zeroes)]);
            refused(&mut qmp, &[with(raw("r", "f"), json!({"read-only": true}))]);
        }
    });
}

#[test]
fn a_thousand_nodes_change_at_once() {
    let daemon = idle();
    let mut qmp = daemon.qmp();
    let null = |n: u32| json!({"driver": "null-co", "node-name": format!("n{n}"), "size": MIB});
    for n in 0..1000 {
        add(&mut qmp, null(n));
    }
    let count = |qmp: &mut qmp::Client| {
        let nodes = qmp.ok("query-named-block-nodes", json!({"flat": true}));
        nodes.as_array().unwrap().iter().filter(|node| node["ro"] == true).count()
    };
    let mut all: Vec<_> = (0..1000).map(|n| with(null(n), json!({"read-only": true}))).collect();
    reopen(&mut qmp, &all);
    assert_eq!(count(&mut qmp), 1000);
    all = (0..1000).map(null).collect();
    all.push(with(null(0), json!({"size": 1})));
    refused(&mut qmp, &all);
    assert_eq!(count(&mut qmp), 1000);
    all.pop();
    reopen(&mut qmp, &all);
    assert_eq!(count(&mut qmp), 0);
}

/// Its last sector is only partly there, so direct I/O has to go around.
#[test]
fn a_file_of_odd_length_goes_on_without_the_cache_and_back() {
    if known_defect("reads and writes of the last part of a file fail after cache.direct came on") {
        return;
    }
    let daemon = idle();
    let image = daemon.path("a.img");
    let bytes = Noise::new(1).bytes(1_000_100);
    std::fs::write(&image, &bytes).unwrap();
    let mut qmp = daemon.qmp();
    add(&mut qmp, file("f", "a.img"));
    export(&mut qmp, "f");
    let (mut client, _) = daemon.nbd().open("f", Headers::Structured);
    let (start, tail) = (999_936, &bytes[999_936..]);
    for direct in [true, false, true] {
        reopen(&mut qmp, &[with(file("f", "a.img"), json!({"cache": {"direct": direct}}))]);
        assert_eq!(node(&mut qmp, "f")["cache"]["direct"], direct);
        let last = client.read(start, 512);
        assert_eq!((&last[..tail.len()], &last[tail.len()..]), (tail, &vec![0; 512 - tail.len()][..]));
    }
    assert_eq!(client.write(start, 0, &[5; 512]), 0);
    reopen(&mut qmp, &[file("f", "a.img")]);
    assert_eq!(client.read(start, 512), [5; 512]);
    assert_eq!(client.read(start - 512, 512), bytes[999_424..999_936]);
}

/// QEMU goes on with the counts as they are, and gives clusters with data to somebody else.
#[test]
fn an_image_that_was_left_dirty_does_not_become_writable() {
    if known_defect("a dirty image is made writable without a repair, and damaged") {
        return;
    }
    let daemon = idle();
    let path = daemon.path("q.qcow2").display().to_string();
    tools::ok("qemu-img", ["create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", &path, "1M"]);
    tools::run("qemu-io", ["-c", "write -P 7 0 64k", "-c", "abort", &path]);
    let mut qmp = daemon.qmp();
    add(&mut qmp, file("f", &path));
    let image = |read_only: bool| json!({"driver": "qcow2", "node-name": "q", "read-only": read_only, "file": "f"});
    add(&mut qmp, image(true));
    let before = node(&mut qmp, "q");
    let text = refused(&mut qmp, &[image(false)]);
    assert!(text.contains("not closed properly"), "{text}");
    assert_eq!(node(&mut qmp, "q"), before);
    // The way out: opened for writing it is repaired.
    qmp.ok("blockdev-del", json!({"node-name": "q"}));
    add(&mut qmp, image(false));
    tools::ok("qemu-img", ["check", "-q", "-U", &path]);
}

#[test]
fn nothing_is_left_of_what_came_and_went() {
    let daemon = two_images();
    let mut qmp = daemon.qmp();
    add(&mut qmp, file("f", "a.img"));
    add(&mut qmp, raw("r", "f"));
    export(&mut qmp, "r");
    let round = |qmp: &mut qmp::Client, n: u32| {
        add(qmp, json!({"driver": "raw", "node-name": "x", "file": file("y", "b.img")}));
        reopen(qmp, &[with(file("f", "a.img"), json!({"cache": {"direct": n.is_multiple_of(2)}}))]);
        reopen(qmp, &[with(raw("x", "y"), json!({"read-only": true}))]);
        qmp.ok("blockdev-del", json!({"node-name": "x"}));
    };
    under_load(&daemon, || {
        // Pools and caches fill first.
        (0..100).for_each(|n| round(&mut qmp, n));
        let before = daemon.usage();
        (0..400).for_each(|n| round(&mut qmp, n));
        // Clients hold no more than before; pool threads come and go with the load.
        let after = daemon.usage();
        assert_eq!(after.descriptors, before.descriptors);
        assert!(after.memory_kib < before.memory_kib + 8 * 1024, "{before:?} has become {after:?}");
    });
    let threads = daemon.usage().threads;
    assert!(threads < 80, "{threads} threads");
    assert_eq!(names(&mut qmp), ["f", "r"]);
}
