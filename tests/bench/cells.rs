//! The cells of the table: what is asked of the programs.

use std::sync::Barrier;
use std::time::{Duration, Instant};

use tests::Daemon;

use crate::load::{Connection, Load};
use crate::programs::{Image, Program, cpu_time};

/// What is below the export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// A file through the page cache.
    Cache,
    /// A file past the page cache.
    Direct,
    /// Nothing.
    Null,
    /// A qcow2 image in which every cluster is allocated.
    Qcow2,
    /// A new overlay of a full file through the page cache.
    Overlay,
    /// A new overlay of an image of the same length that is empty.
    OverlayOfNothing,
}

/// One cell.
#[derive(Debug, Clone, Copy)]
pub struct Cell {
    backend: Backend,
    load: Load,
    /// Requests in flight, over all connections.
    depth: u32,
    connections: u32,
}

impl Cell {
    /// Its name: `cache-4k-randread-d32-c1`.
    pub fn name(&self) -> String {
        let backend = match self.backend {
            Backend::Cache => "cache",
            Backend::Direct => "direct",
            Backend::Null => "null",
            Backend::Qcow2 => "qcow2",
            Backend::Overlay => "overlay",
            Backend::OverlayOfNothing => "overlay-of-nothing",
        };
        let size = if self.load.block >= 1 << 20 { "1m".to_owned() } else { format!("{}k", self.load.block >> 10) };
        let order = if self.load.random { "rand" } else { "seq" };
        let op = if self.load.write { "write" } else { "read" };
        format!("{backend}-{size}-{order}{op}-d{}-c{}", self.depth, self.connections)
    }
}

/// All cells, in the order of the table.
pub fn all() -> Vec<Cell> {
    let mut cells = Vec::new();
    for backend in [Backend::Cache, Backend::Direct, Backend::Null] {
        let mut add = |block, random, write, depth, connections| {
            let load = Load { block, random, write };
            cells.push(Cell { backend, load, depth, connections });
        };
        for write in [false, true] {
            for depth in [1, 32, 64] {
                add(4096, true, write, depth, 1);
            }
            add(4096, true, write, 32, 4);
            add(65536, true, write, 16, 1);
            add(1 << 20, false, write, 4, 1);
        }
        add(65536, true, false, 16, 4);
        add(1 << 20, false, false, 4, 4);
    }
    cells
}

/// What one round of a cell gave.
#[derive(Debug, Clone, Copy)]
pub struct Figures {
    /// Requests in a second.
    pub rate: f64,
    /// Processor time of the daemon for a request, in microseconds.
    pub cpu: f64,
}

/// Runs one round of a cell on one program.
pub fn run(cell: &Cell, program: Program, image: &Image, time: Duration) -> Figures {
    let daemon = program.serve(cell.backend, image);
    // The page cache, pools and branch predictors are warm before the clock runs.
    drive(&daemon, cell.load, cell.depth, cell.connections, image.size, time / 5, time)
}

/// Puts a load on the export `disk` of a daemon, first for `warm` and then for `time`, which is measured.
pub fn drive(
    daemon: &Daemon,
    load: Load,
    depth: u32,
    connections: u32,
    size: u64,
    warm: Duration,
    time: Duration,
) -> Figures {
    let socket = daemon.path("nbd.sock");
    let depth = depth.div_ceil(connections);
    let (ready, go) = (Barrier::new(connections as usize + 1), Barrier::new(connections as usize + 1));
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..connections)
            .map(|index| {
                let (ready, go, socket) = (&ready, &go, &socket);
                let part = size / u64::from(connections) / (1 << 20) * (1 << 20);
                let from = if load.random { 0 } else { part * u64::from(index) };
                let len = if load.random { size } else { part };
                scope.spawn(move || {
                    let mut connection = Connection::open(socket, load, from, len, u64::from(index) + 1);
                    if !warm.is_zero() {
                        connection.run(depth, warm);
                    }
                    ready.wait();
                    go.wait();
                    connection.run(depth, time)
                })
            })
            .collect();
        ready.wait();
        let (cpu, start) = (cpu_time(daemon), Instant::now());
        go.wait();
        let done: u64 = workers.into_iter().map(|worker| worker.join().expect("a connection")).sum();
        let (elapsed, cpu) = (start.elapsed(), cpu_time(daemon).saturating_sub(cpu));
        let done = std::hint::black_box(done) as f64;
        Figures { rate: done / elapsed.as_secs_f64(), cpu: cpu.as_secs_f64() * 1e6 / done }
    })
}
