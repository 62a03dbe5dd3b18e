//! Filters: what a throttle node without limits and a copy-on-read node cost, and how exactly and evenly limits are kept.

use std::sync::Barrier;
use std::time::{Duration, Instant};

use tests::Daemon;

use crate::cells::drive;
use crate::load::{Connection, Load};
use crate::programs::{Image, Program};
use crate::report::median;

/// The filters, and the node below which they stand.
const FILTERS: [(&str, &str); 3] =
    [("none", ""), ("throttle", "throttle,throttle-group=g"), ("copy-on-read", "copy-on-read")];

/// The limit of a group, in requests a second.
const LIMIT: f64 = 2000.0;

/// Starts a program with the image below a filter.
fn serve(program: Program, image: &Image, filter: &str) -> Daemon {
    let aio = program.file_options();
    let file = format!("file,node-name=file,filename={}{aio}", image.path().display());
    let top = if filter.is_empty() { "raw" } else { filter };
    program
        .setup()
        .line("--object throttle-group,id=g")
        .arg("--blockdev")
        .arg(file)
        .arg("--blockdev")
        .arg(format!("{top},node-name=disk,file=file"))
        .qmp()
        .nbd_server()
        .arg("--export")
        .arg(format!("nbd,id=e,node-name=disk,name=disk,writable=on{}", program.export_options()))
        .start()
}

/// Prints both tables; with `only` those whose name contains it.
pub fn run(programs: &[Program], rounds: u32, image: &Image, time: Duration, only: Option<&str>) {
    let wanted = |name: &str| only.is_none_or(|only| name.contains(only));
    if wanted("filter-cost") {
        cost(programs, rounds, image, time);
    }
    if wanted("filter-limits") {
        limits(programs);
    }
}

fn cost(programs: &[Program], rounds: u32, image: &Image, time: Duration) {
    println!("\nRequests/s through a `raw` node, and what is left of that through another filter in its place:\n");
    print!("| cell |");
    for program in programs {
        print!(" {0}, requests/s | {0}, throttle ÷ raw | {0}, copy-on-read ÷ raw |", program.name());
    }
    println!("\n|---|{}", "---:|---:|---:|".repeat(programs.len()));
    for (name, block, write, depth) in [
        ("4k-randread-d1", 4096, false, 1),
        ("4k-randread-d32", 4096, false, 32),
        ("4k-randwrite-d32", 4096, true, 32),
        ("64k-randread-d16", 65536, false, 16),
    ] {
        let load = Load { block, random: true, write };
        let mut figures = vec![vec![Vec::new(); FILTERS.len()]; programs.len()];
        for round in 0..rounds as usize {
            for (program, figures) in programs.iter().zip(&mut figures) {
                // Each round starts with another filter.
                for turn in 0..FILTERS.len() {
                    let which = (turn + round) % FILTERS.len();
                    let daemon = serve(*program, image, FILTERS[which].1);
                    figures[which].push(drive(&daemon, load, depth, 1, image.size, time / 5, time).rate);
                }
            }
        }
        print!("| {name} |");
        for figures in figures {
            let rates: Vec<_> = figures.into_iter().map(median).collect();
            print!(" {:.0} | {:.3} | {:.3} |", rates[0], rates[1] / rates[0], rates[2] / rates[0]);
        }
        println!();
    }
}

/// Each client has a node and an export of its own, all in one group.
fn limits(programs: &[Program]) {
    let time = Duration::from_secs(10);
    println!(
        "\n{LIMIT} requests/s for a group, over {} s: what all its clients got of it, and how far the one that got most or least \
         is from an even share:\n",
        time.as_secs()
    );
    println!("| clients | {} |", programs.iter().map(|program| program.name()).collect::<Vec<_>>().join(" | "));
    println!("|---|{}", "---:|".repeat(programs.len()));
    for clients in [1_u32, 4, 16] {
        let row: Vec<_> = programs
            .iter()
            .map(|program| {
                let done = share(*program, clients, time);
                let total: f64 = done.iter().sum();
                let even = total / f64::from(clients);
                let worst = done.iter().map(|done| (done / even - 1.0).abs()).fold(0.0, f64::max);
                format!("{:.1} %, ±{:.1} %", total / LIMIT / time.as_secs_f64() * 100.0, worst * 100.0)
            })
            .collect();
        println!("| {clients} | {} |", row.join(" | "));
    }
}

/// The replies that each client got.
fn share(program: Program, clients: u32, time: Duration) -> Vec<f64> {
    let setup = program.setup().arg("--object").arg(format!("throttle-group,id=g,limits.iops-total={LIMIT}"));
    let setup = (0..clients).fold(setup.qmp().nbd_server(), |setup, client| {
        setup
            .arg("--blockdev")
            .arg(format!("throttle,node-name=n{client},throttle-group=g,file.driver=null-co,file.size=1073741824"))
            .arg("--export")
            .arg(format!("nbd,id=n{client},node-name=n{client},name=n{client}{}", program.export_options()))
    });
    let daemon = setup.start();
    let socket = daemon.path("nbd.sock");
    let load = Load { block: 4096, random: true, write: false };
    let ready = Barrier::new(clients as usize);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..clients)
            .map(|client| {
                let (ready, socket) = (&ready, &socket);
                scope.spawn(move || {
                    let name = format!("n{client}");
                    let mut connection =
                        Connection::open_export(socket, &name, load, 0, 1 << 30, u64::from(client) + 1);
                    // The burst that a group may begin with is over when the clock starts to run.
                    connection.run(8, Duration::from_secs(1));
                    ready.wait();
                    let start = Instant::now();
                    let done = connection.run(8, time);
                    // The last requests end after the time.
                    done as f64 * time.as_secs_f64() / start.elapsed().as_secs_f64()
                })
            })
            .collect();
        workers.into_iter().map(|worker| worker.join().expect("a client")).collect()
    })
}
