//! vhost-user-blk: the same front-end, the crate virtio-driver with a thread for each queue, on both programs. Both have an
//! IOThread for the export; this daemon has one for each queue where there are several, which the reference cannot.

use std::sync::Barrier;
use std::time::{Duration, Instant};

use tests::Daemon;
use tests::blkdriver::{Disk, Op, Queue};
use tests::image::Noise;

use crate::cells::{Backend, Figures};
use crate::programs::{Image, Program, cpu_time};
use crate::report;

struct Cell {
    name: &'static str,
    backend: Backend,
    op: Op,
    block: usize,
    /// Requests in flight on each queue.
    depth: usize,
    queues: usize,
}

const fn cell(name: &'static str, backend: Backend, op: Op, block: usize, depth: usize, queues: usize) -> Cell {
    Cell { name, backend, op, block, depth, queues }
}

const CELLS: [Cell; 12] = [
    cell("vhost-cache-4k-randread-d1", Backend::Cache, Op::Read, 4096, 1, 1),
    cell("vhost-cache-4k-randread-d32", Backend::Cache, Op::Read, 4096, 32, 1),
    cell("vhost-cache-4k-randread-d32-q2", Backend::Cache, Op::Read, 4096, 32, 2),
    cell("vhost-cache-4k-randwrite-d32", Backend::Cache, Op::Write, 4096, 32, 1),
    cell("vhost-direct-4k-randread-d32", Backend::Direct, Op::Read, 4096, 32, 1),
    cell("vhost-null-4k-randread-d32", Backend::Null, Op::Read, 4096, 32, 1),
    cell("vhost-null-4k-randread-d32-q2", Backend::Null, Op::Read, 4096, 32, 2),
    cell("vhost-cache-1m-randread-d4", Backend::Cache, Op::Read, 1 << 20, 4, 1),
    cell("vhost-qcow2-4k-randread-d32", Backend::Qcow2, Op::Read, 4096, 32, 1),
    cell("vhost-qcow2-4k-randwrite-d32", Backend::Qcow2, Op::Write, 4096, 32, 1),
    cell("vhost-overlay-4k-write-d32", Backend::Overlay, Op::Write, 4096, 32, 1),
    cell("vhost-overlay-of-nothing-4k-write-d32", Backend::OverlayOfNothing, Op::Write, 4096, 32, 1),
];

/// The names of the cells.
pub fn names() -> impl Iterator<Item = &'static str> {
    CELLS.iter().map(|cell| cell.name)
}

fn serve(cell: &Cell, program: Program, image: &Image) -> Daemon {
    let node = program.node(cell.backend, image);
    let threads = if program.is_reference() { 1 } else { cell.queues };
    let mut setup = program.setup();
    for thread in 0..threads {
        setup = setup.line(&format!("--object iothread,id=v{thread}"));
    }
    let list: String = match threads {
        1 => ",iothread=v0".to_owned(),
        _ => (0..threads).map(|thread| format!(",iothread.{thread}=v{thread}")).collect(),
    };
    setup
        .arg("--blockdev")
        .arg(node)
        .arg("--export")
        .arg(format!(
            "vhost-user-blk,id=e,node-name=disk,writable=on,addr.type=unix,addr.path=vhost.sock,num-queues={}{list}",
            cell.queues
        ))
        .start()
}

/// Where requests go.
struct Places {
    noise: Noise,
    /// Overlays get a cluster with each request, one after the other.
    cluster: Option<u64>,
}

impl Places {
    fn next(&mut self, size: u64, block: u64) -> u64 {
        match &mut self.cluster {
            Some(cluster) => {
                *cluster += 1;
                (*cluster << 16) % size + self.noise.below((1 << 16) / block) * block
            }
            None => self.noise.below(size / block) * block,
        }
    }
}

/// Keeps `depth` requests in flight for `time`; returns how many were done.
fn load(queue: &mut Queue, cell: &Cell, size: u64, places: &mut Places, time: Duration) -> u64 {
    let mut at = || places.next(size, cell.block as u64);
    for slot in 0..cell.depth {
        queue.submit(slot, cell.op, at());
    }
    queue.kick();
    let end = Instant::now() + time;
    let (mut done, mut count, mut busy) = (Vec::new(), 0, cell.depth);
    while busy > 0 {
        queue.wait(&mut done);
        let more = Instant::now() < end;
        for (slot, result) in done.drain(..) {
            assert_eq!(result, 0, "a request failed");
            count += 1;
            if more {
                queue.submit(slot, cell.op, at());
            } else {
                busy -= 1;
            }
        }
        if more {
            queue.kick();
        }
    }
    count
}

fn round(cell: &Cell, program: Program, image: &Image, time: Duration) -> Figures {
    let daemon = serve(cell, program, image);
    let mut disk = Disk::open(&daemon.path("vhost.sock"), cell.queues, cell.depth, cell.block);
    let (ready, go) = (Barrier::new(cell.queues + 1), Barrier::new(cell.queues + 1));
    let size = disk.size;
    std::thread::scope(|scope| {
        let workers: Vec<_> = disk
            .queues
            .iter_mut()
            .enumerate()
            .map(|(index, queue)| {
                let (ready, go) = (&ready, &go);
                scope.spawn(move || {
                    let overlay = matches!(cell.backend, Backend::Overlay | Backend::OverlayOfNothing);
                    let mut places = Places { noise: Noise::new(index as u64 + 1), cluster: overlay.then_some(0) };
                    load(queue, cell, size, &mut places, time / 5);
                    ready.wait();
                    go.wait();
                    load(queue, cell, size, &mut places, time)
                })
            })
            .collect();
        ready.wait();
        let (cpu, start) = (cpu_time(&daemon), Instant::now());
        go.wait();
        let done: u64 = workers.into_iter().map(|worker| worker.join().expect("a queue")).sum();
        let (elapsed, cpu) = (start.elapsed(), cpu_time(&daemon).saturating_sub(cpu));
        let done = done as f64;
        Figures { rate: done / elapsed.as_secs_f64(), cpu: cpu.as_secs_f64() * 1e6 / done }
    })
}

/// Runs the cells whose name contains `only`.
pub fn run(programs: &[Program], rounds: u32, image: &Image, time: Duration, only: Option<&str>) {
    let cells: Vec<_> = CELLS.iter().filter(|cell| only.is_none_or(|text| cell.name.contains(text))).collect();
    if cells.is_empty() {
        return;
    }
    println!("\nvhost-user-blk: the crate virtio-driver as front-end, a thread for each queue\n");
    report::heading(programs);
    for cell in cells {
        let mut figures = vec![Vec::new(); programs.len()];
        for turn in 0..rounds as usize * programs.len() {
            // Each round starts with another program.
            let which = (turn + turn / programs.len()) % programs.len();
            figures[which].push(round(cell, programs[which], image, time));
        }
        report::row(cell.name, &figures);
    }
}
