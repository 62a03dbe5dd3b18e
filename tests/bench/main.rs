//! The benchmark: this daemon and the installed reference in turn over the same image, with one load generator, and the
//! ratios of throughput and of processor time for a request as a Markdown table.
//!
//! Nothing here asserts anything about speed. Rounds alternate between the programs, so that what else the machine does
//! falls on all of them; a figure is the median of its rounds.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a program for developers: it prints a table, and an error ends it"
)]

mod cells;
mod control;
mod filters;
mod fio;
mod fuse;
mod load;
mod programs;
mod qcow2;
mod report;
mod vhost;

use std::time::Duration;

use programs::Program;

/// What the command line asks for.
struct Options {
    rounds: u32,
    time: Duration,
    only: Option<String>,
    control: bool,
    filters: bool,
    raw: bool,
    fio: bool,
    programs: Vec<Program>,
    size: u64,
}

const HELP: &str = "\
Usage: bench [options]
  --quick            one short round of each cell
  --rounds N         rounds of each cell (3)
  --seconds S        length of a round (1.0)
  --only TEXT        cells whose name contains TEXT, and nothing else; `control`: start-up, memory, QMP and nodes
  --programs A,B     of ours, ours-iothread, ref, ref-uring (all but ours-iothread)
  --size MIB         size of the image (512)
  --no-control       leave out start-up, memory, QMP and nodes
  --no-filters       leave out throttling and copy-on-read
  --no-raw           leave out the cells without a format
  --fio              cross-check some cells with fio
  --list             list the cells
Environment: QSD_OURS (the release binary beside this program), QSD_REFERENCE (/usr/bin/qemu-storage-daemon)
";

fn options() -> Options {
    let mut options = Options {
        rounds: 3,
        time: Duration::from_secs(1),
        only: None,
        control: true,
        filters: true,
        raw: true,
        fio: false,
        programs: vec![Program::Ours, Program::Reference, Program::ReferenceRing],
        size: 512 << 20,
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().unwrap_or_else(|| panic!("{arg} needs a value"));
        match arg.as_str() {
            "--quick" => (options.rounds, options.time) = (1, Duration::from_millis(250)),
            "--rounds" => options.rounds = value().parse().expect("a number of rounds"),
            "--seconds" => options.time = Duration::from_secs_f64(value().parse().expect("a number of seconds")),
            "--only" => {
                let text = value();
                options.control = text == "control";
                options.only = Some(text);
            }
            "--no-filters" => options.filters = false,
            "--programs" => options.programs = value().split(',').map(Program::named).collect(),
            "--size" => options.size = value().parse::<u64>().expect("a number of MiB") << 20,
            "--no-control" => options.control = false,
            "--no-raw" => options.raw = false,
            "--fio" => options.fio = true,
            "--list" => {
                cells::all().iter().for_each(|cell| println!("{}", cell.name()));
                vhost::names().for_each(|name| println!("{name}"));
                std::process::exit(0);
            }
            _ => {
                println!("{HELP}");
                std::process::exit(i32::from(arg != "--help" && arg != "-h"));
            }
        }
    }
    options.programs.retain(|program| {
        let there = program.path().is_some();
        if !there {
            eprintln!("{}: not installed, left out", program.name());
        }
        there
    });
    options
}

fn main() {
    let options = options();
    report::machine();
    let image = programs::Image::new(options.size);
    let cells: Vec<_> = cells::all()
        .into_iter()
        .filter(|_| options.raw)
        .filter(|cell| options.only.as_ref().is_none_or(|text| cell.name().contains(text.as_str())))
        .collect();
    if !cells.is_empty() {
        report::heading(&options.programs);
    }
    for cell in &cells {
        let mut rounds = vec![Vec::new(); options.programs.len()];
        for round in 0..options.rounds {
            for turn in 0..options.programs.len() {
                // Each round starts with another program.
                let which = (turn + round as usize) % options.programs.len();
                rounds[which].push(cells::run(cell, options.programs[which], &image, options.time));
            }
        }
        report::row(&cell.name(), &rounds);
    }
    qcow2::run(&options.programs, options.rounds, &image, options.time, options.only.as_deref());
    vhost::run(&options.programs, options.rounds, &image, options.time, options.only.as_deref());
    if options.filters {
        filters::run(&options.programs, options.rounds, &image, options.time, options.only.as_deref());
    }
    fuse::run(&options.programs, options.rounds, &image, options.time, options.only.as_deref());
    if options.control {
        control::run(&options.programs, options.rounds, &image);
    }
    if options.fio {
        fio::run(&options.programs, options.rounds, &image, options.time);
    }
}
