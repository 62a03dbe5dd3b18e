//! The control side: start-up, idle memory, QMP round trips, a thousand nodes.

use std::io::{BufRead, BufReader};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::cells::Backend;
use crate::programs::{Image, Program, pss};
use crate::report::median;

const TRIPS: u32 = 3000;
const NODES: u32 = 1000;

/// One measurement of one program.
type Measure = fn(Program, &Image) -> f64;

/// Measures and prints the second table.
pub fn run(programs: &[Program], rounds: u32, image: &Image) {
    println!("\n| | {} |", programs.iter().map(|program| program.name()).collect::<Vec<_>>().join(" | "));
    println!("|---|{}", "---:|".repeat(programs.len()));
    let measures: [(&str, Measure); 7] = [
        ("start to serving, ms", start_up),
        ("idle memory, PSS in MiB", memory),
        ("QMP round trips/s", trips),
        ("1000 nodes added, ms", nodes_added),
        ("1000 nodes queried, ms", nodes_queried),
        ("1000 nodes reopened one by one, ms", nodes_reopened),
        ("1000 nodes reopened at once, and queried, ms", nodes_reopened_at_once),
    ];
    for (name, measure) in measures {
        let mut values = vec![Vec::new(); programs.len()];
        for _ in 0..rounds.max(3) {
            for (program, values) in programs.iter().zip(&mut values) {
                values.push(measure(*program, image));
            }
        }
        let row: Vec<_> = values.into_iter().map(|values| format!("{:.2}", median(values))).collect();
        println!("| {name} | {} |", row.join(" | "));
    }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// From the start of the program to its pid file, polled closely.
fn start_up(program: Program, image: &Image) -> f64 {
    let setup = program
        .setup()
        .arg("--blockdev")
        .arg(format!("file,node-name=disk,filename={}", image.path().display()))
        .qmp()
        .nbd_server()
        .line("--export nbd,id=e,node-name=disk,name=disk,writable=on --pidfile up");
    let path = setup.path("up");
    let start = Instant::now();
    let mut daemon = setup.spawn();
    while !path.exists() {
        assert!(daemon.alive(), "{}: {}", program.name(), daemon.stderr());
        std::thread::yield_now();
    }
    milliseconds(start.elapsed())
}

fn memory(program: Program, image: &Image) -> f64 {
    let daemon = program.serve(Backend::Cache, image);
    daemon.qmp().ok("query-block-exports", json!({}));
    pss(&daemon) as f64 / 1024.0
}

fn trips(program: Program, image: &Image) -> f64 {
    let daemon = program.serve(Backend::Null, image);
    let mut qmp = daemon.qmp();
    let start = Instant::now();
    for _ in 0..TRIPS {
        qmp.ok("query-version", json!({}));
    }
    f64::from(TRIPS) / start.elapsed().as_secs_f64()
}

fn add_nodes(qmp: &mut tests::qmp::Client) {
    for index in 0..NODES {
        qmp.ok("blockdev-add", json!({"driver": "null-co", "node-name": format!("node{index}"), "size": 1 << 20}));
    }
}

fn nodes_added(program: Program, image: &Image) -> f64 {
    let daemon = program.serve(Backend::Null, image);
    let mut qmp = daemon.qmp();
    let start = Instant::now();
    add_nodes(&mut qmp);
    milliseconds(start.elapsed())
}

fn nodes_queried(program: Program, image: &Image) -> f64 {
    let daemon = program.serve(Backend::Null, image);
    let mut qmp = daemon.qmp();
    add_nodes(&mut qmp);
    let start = Instant::now();
    query(&mut qmp);
    milliseconds(start.elapsed())
}

/// Asks for all nodes and takes the answer, whose parsing is the client's work.
fn query(qmp: &mut tests::qmp::Client) {
    qmp.send(r#"{"execute": "query-named-block-nodes", "arguments": {"flat": true}}"#);
    let mut answer = Vec::new();
    BufReader::new(qmp.stream()).read_until(b'\n', &mut answer).expect("read from the monitor");
    assert!(answer.starts_with(br#"{"return": ["#), "{}", String::from_utf8_lossy(&answer));
}

/// All nodes with other options than before.
fn other_options() -> Vec<serde_json::Value> {
    let options = |index| {
        json!({"driver": "null-co", "node-name": format!("node{index}"), "size": 1 << 20, "read-only": true,
            "detect-zeroes": "on"})
    };
    (0..NODES).map(options).collect()
}

fn nodes_reopened(program: Program, image: &Image) -> f64 {
    let daemon = program.serve(Backend::Null, image);
    let mut qmp = daemon.qmp();
    add_nodes(&mut qmp);
    let start = Instant::now();
    for options in other_options() {
        qmp.ok("blockdev-reopen", json!({"options": [options]}));
    }
    milliseconds(start.elapsed())
}

fn nodes_reopened_at_once(program: Program, image: &Image) -> f64 {
    let daemon = program.serve(Backend::Null, image);
    let mut qmp = daemon.qmp();
    add_nodes(&mut qmp);
    let start = Instant::now();
    qmp.ok("blockdev-reopen", json!({"options": other_options()}));
    query(&mut qmp);
    milliseconds(start.elapsed())
}
