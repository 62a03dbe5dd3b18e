//! A cross-check of the load generator: some cells again, with fio's engine for NBD.

use std::time::Duration;

use serde_json::Value;
use tests::tools;

use crate::cells::{Backend, Figures};
use crate::programs::{Image, Program, cpu_time};
use crate::report;

/// Runs the cells and prints a table like the first.
pub fn run(programs: &[Program], rounds: u32, image: &Image, time: Duration) {
    if !tools::installed("fio") || !tools::ok("fio", ["--enghelp"]).contains("nbd") {
        eprintln!("no fio with the nbd engine: no cross-check");
        return;
    }
    println!("\nWith fio:\n");
    report::heading(programs);
    for (rw, bs, depth) in [("randread", "4k", 1), ("randread", "4k", 32), ("randwrite", "4k", 32), ("read", "1m", 4)] {
        let mut figures = vec![Vec::new(); programs.len()];
        for _ in 0..rounds {
            for (program, figures) in programs.iter().zip(&mut figures) {
                figures.push(one(*program, image, rw, bs, depth, time));
            }
        }
        report::row(&format!("fio-cache-{bs}-{rw}-d{depth}"), &figures);
    }
}

fn one(program: Program, image: &Image, rw: &str, bs: &str, depth: u32, time: Duration) -> Figures {
    let daemon = program.serve(Backend::Cache, image);
    let args = [
        "--name=bench".to_owned(),
        "--ioengine=nbd".to_owned(),
        format!("--uri={}", daemon.uri("disk")),
        format!("--rw={rw}"),
        format!("--bs={bs}"),
        format!("--iodepth={depth}"),
        format!("--size={}", image.size),
        "--time_based".to_owned(),
        format!("--runtime={}", time.as_secs().max(1)),
        "--output-format=json".to_owned(),
    ];
    let before = cpu_time(&daemon);
    let text = tools::ok("fio", args);
    let cpu = cpu_time(&daemon).saturating_sub(before);
    let json = text.find('{').map_or("", |at| &text[at..]);
    let result: Value = serde_json::from_str(json).expect("fio's output");
    let direction = if rw.contains("write") { "write" } else { "read" };
    let part = &result["jobs"][0][direction];
    let done = part["total_ios"].as_f64().expect("a number of requests");
    Figures { rate: part["iops"].as_f64().expect("a rate"), cpu: cpu.as_secs_f64() * 1e6 / done }
}
