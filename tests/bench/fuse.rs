//! FUSE exports: the same file, mounted by each program in turn, under fio with asynchronous direct I/O.
//!
//! Direct, so that the requests reach the daemon: without it the reference's clients are served by the kernel's page cache,
//! which exports of this project's bypass. The cells with four jobs give this daemon two IOThreads, which the reference
//! does not take.

use std::fs::File;
use std::time::Duration;

use nix::mount::{MntFlags, umount2};
use serde_json::Value;
use tests::{Daemon, tools};

use crate::cells::Figures;
use crate::programs::{Image, Program, cpu_time};
use crate::report;

/// Order and direction, bytes, requests in flight of each job, jobs.
const CELLS: &[(&str, &str, u32, u32)] = &[
    ("randread", "4k", 1, 1),
    ("randread", "4k", 32, 1),
    ("randwrite", "4k", 32, 1),
    ("randread", "4k", 8, 4),
    ("randwrite", "4k", 8, 4),
    ("read", "1m", 1, 1),
    ("write", "1m", 1, 1),
    ("read", "1m", 4, 1),
    ("write", "1m", 4, 1),
];

/// Runs the cells whose names contain `only` and prints a table.
pub fn run(programs: &[Program], rounds: u32, image: &Image, time: Duration, only: Option<&str>) {
    let name = |(rw, bs, depth, jobs): &(&str, &str, u32, u32)| format!("fuse-{bs}-{rw}-d{depth}-j{jobs}");
    let wanted: Vec<_> = CELLS.iter().filter(|cell| only.is_none_or(|text| name(cell).contains(text))).collect();
    if wanted.is_empty() {
        return;
    }
    if File::open("/dev/fuse").is_err() || !tools::installed("fio") {
        eprintln!("no /dev/fuse or no fio: no FUSE cells");
        return;
    }
    println!("\nFUSE:\n");
    report::heading(programs);
    for cell in wanted {
        let mut figures = vec![Vec::new(); programs.len()];
        for round in 0..rounds {
            for turn in 0..programs.len() {
                let which = (turn + round as usize) % programs.len();
                figures[which].push(one(programs[which], image, cell, time));
            }
        }
        report::row(&name(cell), &figures);
    }
}

/// The image as the file `mnt` in the directory of a daemon.
fn serve(program: Program, image: &Image, jobs: u32) -> Daemon {
    let setup = program.setup();
    File::create(setup.path("mnt")).expect("make the mount point");
    let several = jobs > 1 && !program.is_reference();
    let (objects, threads) = match (several, program.has_thread()) {
        (true, true) => ("--object iothread,id=t1", ",iothread.0=t0,iothread.1=t1"),
        (true, false) => ("--object iothread,id=t0 --object iothread,id=t1", ",iothread.0=t0,iothread.1=t1"),
        (false, true) => ("", ",iothread=t0"),
        (false, false) => ("", ""),
    };
    let node = format!("file,node-name=disk,filename={}{}", image.path().display(), program.file_options());
    setup
        .line(objects)
        .arg("--blockdev")
        .arg(node)
        .line(&format!("--export fuse,id=e,node-name=disk,mountpoint=mnt,writable=on{threads}"))
        .start()
}

fn one(program: Program, image: &Image, cell: &(&str, &str, u32, u32), time: Duration) -> Figures {
    let (rw, bs, depth, jobs) = cell;
    let mut daemon = serve(program, image, *jobs);
    let mountpoint = daemon.path("mnt");
    let args = [
        "--name=bench".to_owned(),
        "--ioengine=libaio".to_owned(),
        "--direct=1".to_owned(),
        format!("--filename={}", mountpoint.display()),
        "--allow_file_create=0".to_owned(),
        format!("--rw={rw}"),
        format!("--bs={bs}"),
        format!("--iodepth={depth}"),
        format!("--numjobs={jobs}"),
        "--group_reporting".to_owned(),
        format!("--size={}", image.size),
        "--time_based".to_owned(),
        format!("--runtime={}", time.as_secs().max(1)),
        "--output-format=json".to_owned(),
    ];
    let before = cpu_time(&daemon);
    let text = tools::ok("fio", args);
    let cpu = cpu_time(&daemon).saturating_sub(before);
    daemon.stop();
    // Gone already, unless the daemon left it.
    let _ = umount2(&mountpoint, MntFlags::MNT_DETACH);
    let json = text.find('{').map_or("", |at| &text[at..]);
    let result: Value = serde_json::from_str(json).expect("fio's output");
    let direction = if rw.contains("write") { "write" } else { "read" };
    let part = &result["jobs"][0][direction];
    let done = part["total_ios"].as_f64().expect("a number of requests");
    Figures { rate: part["iops"].as_f64().expect("a rate"), cpu: cpu.as_secs_f64() * 1e6 / done }
}
