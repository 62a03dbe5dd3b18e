//! qcow2 against the reference's, and against this daemon's own raw: images that are full, that fill up, long chains.
//!
//! The reference's `qemu-img` makes all images, so that both programs work on the same ones. Cells that allocate begin
//! with a new image in each round.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::json;
use tests::image::Noise;
use tests::tools;

use crate::cells::{Backend, Figures, drive};
use crate::load::Load;
use crate::programs::{Image, Program, pss};
use crate::report::{self, median};

/// What the load meets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Every cluster is allocated.
    Full,
    /// Nothing is allocated yet.
    Empty,
    /// Fifty images without data, over one with all of it.
    Chain,
    /// The same with a cluster here and there, so that each has all its L2 tables.
    Patched,
    /// Every cluster is compressed, and compressible to about a half.
    Compressed,
    /// A disk of 1 TiB, allocated and never written, whose L2 tables are four times the cache.
    Wide,
}

struct Cell {
    name: &'static str,
    kind: Kind,
    load: Load,
    depth: u32,
    connections: u32,
}

const fn cell(name: &'static str, kind: Kind, block: u32, random: bool, write: bool, depth: u32) -> Cell {
    Cell { name, kind, load: Load { block, random, write }, depth, connections: 1 }
}

const CELLS: [Cell; 11] = [
    cell("qcow2-4k-randread-d1", Kind::Full, 4096, true, false, 1),
    cell("qcow2-4k-randread-d32", Kind::Full, 4096, true, false, 32),
    cell("qcow2-4k-randwrite-d32", Kind::Full, 4096, true, true, 32),
    cell("qcow2-1m-seqread-d4", Kind::Full, 1 << 20, false, false, 4),
    cell("qcow2-alloc-64k-seqwrite-d16", Kind::Empty, 65536, false, true, 16),
    cell("qcow2-alloc-4k-randwrite-d32", Kind::Empty, 4096, true, true, 32),
    cell("qcow2-chain50-4k-randread-d32", Kind::Chain, 4096, true, false, 32),
    cell("qcow2-chain50-patched-4k-randread-d32", Kind::Patched, 4096, true, false, 32),
    cell("qcow2-1t-4k-randread-d32", Kind::Wide, 4096, true, false, 32),
    cell("qcow2-zlib-64k-randread-d16", Kind::Compressed, 65536, true, false, 16),
    cell("qcow2-zlib-4k-seqread-d16", Kind::Compressed, 4096, false, false, 16),
];

/// Guest bytes of an image that fills up.
const ROOM: u64 = 64 << 30;
/// Overlays of the long chains: of the one that is read, and of the one that is opened.
const READ_CHAIN: usize = 50;
const OPEN_CHAIN: usize = 100;
/// Bytes from one cluster of an overlay to the next, where it has any: what one slice of an L2 table maps.
const PATCHES: usize = 32 << 20;

/// The images, made when they are first needed.
struct Images<'a> {
    dir: PathBuf,
    raw: &'a Image,
}

fn create(path: &Path, options: &[&str]) {
    let path = path.display().to_string();
    let args = ["create", "-q", "-f", "qcow2"].iter().chain(options.iter()).copied();
    // The size comes last, behind the name.
    let (size, options): (Vec<_>, Vec<_>) = args.partition(|arg| arg.starts_with("size:"));
    let size = size.iter().map(|size| size.trim_start_matches("size:"));
    tools::ok("qemu-img", options.into_iter().chain([path.as_str()]).chain(size));
}

impl Images<'_> {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// A chain of overlays over the full image, with a cluster of their own every so many bytes; the path of its end.
    fn chain(&self, name: &str, len: usize, patches: Option<usize>) -> PathBuf {
        let mut below = self.full();
        for index in 0..len {
            let path = self.path(&format!("{name}{index}"));
            if !path.exists() {
                create(&path, &["-F", "qcow2", "-b", &below.display().to_string()]);
                if let Some(step) = patches {
                    let writes =
                        (0..self.raw.size).step_by(step).flat_map(|at| ["-c".into(), format!("write {at} 64k")]);
                    let args = ["-f".into(), "qcow2".into(), path.display().to_string()].into_iter().chain(writes);
                    tools::ok("qemu-io", args);
                }
            }
            below = path;
        }
        below
    }

    fn convert(&self, name: &str, options: &[&str], from: &Path) -> PathBuf {
        let path = self.path(name);
        if !path.exists() {
            let (from, to) = (from.display().to_string(), path.display().to_string());
            let args = ["convert", "-f", "raw", "-O", "qcow2"].iter().chain(options).copied();
            tools::ok("qemu-img", args.chain([from.as_str(), to.as_str()]));
        }
        path
    }

    fn full(&self) -> PathBuf {
        self.convert("full", &[], self.raw.path())
    }

    fn compressed(&self) -> PathBuf {
        let raw = self.path("compressible");
        if !raw.exists() {
            let mut bytes = Vec::new();
            let mut noise = Noise::new(7);
            while bytes.len() < 256 << 20 {
                bytes.extend(noise.bytes(512));
                bytes.extend(std::iter::repeat_n(0x5a, 512));
            }
            std::fs::write(&raw, bytes).expect("write an image");
        }
        self.convert("compressed", &["-c"], &raw)
    }

    fn wide(&self) -> PathBuf {
        let path = self.path("wide");
        if !path.exists() {
            create(&path, &["-o", "preallocation=metadata", "size:1T"]);
        }
        path
    }

    /// The image of a cell and its size in bytes.
    fn of(&self, kind: Kind) -> (PathBuf, u64) {
        match kind {
            Kind::Full => (self.full(), self.raw.size),
            Kind::Chain => (self.chain("chain", READ_CHAIN, None), self.raw.size),
            Kind::Patched => (self.chain("patched", READ_CHAIN, Some(PATCHES)), self.raw.size),
            Kind::Compressed => (self.compressed(), 256 << 20),
            Kind::Wide => (self.wide(), 1 << 40),
            Kind::Empty => {
                let path = self.path("empty");
                let _ = std::fs::remove_file(&path);
                create(&path, &[&format!("size:{ROOM}")]);
                (path, ROOM)
            }
        }
    }
}

fn nodes(program: Program, path: &Path) -> [String; 2] {
    [
        format!("file,node-name=file,filename={}{}", path.display(), program.file_options()),
        "qcow2,node-name=disk,file=file".into(),
    ]
}

fn run_cell(cell: &Cell, program: Program, images: &Images, time: Duration) -> Figures {
    let (path, size) = images.of(cell.kind);
    let daemon = program.serve_nodes(&nodes(program, &path));
    let warm = if cell.kind == Kind::Empty { Duration::ZERO } else { time / 5 };
    drive(&daemon, cell.load, cell.depth, cell.connections, size, warm, time)
}

/// The same load on a raw image: on the full one, or on a new and sparse one.
fn run_raw(cell: &Cell, program: Program, images: &Images, time: Duration) -> Figures {
    if cell.kind == Kind::Full {
        let daemon = program.serve(Backend::Cache, images.raw);
        return drive(&daemon, cell.load, cell.depth, cell.connections, images.raw.size, time / 5, time);
    }
    let path = images.path("empty");
    let _ = std::fs::remove_file(&path);
    let file = std::fs::File::create(&path).expect("make an image");
    file.set_len(ROOM).expect("make a sparse image");
    let node = format!("file,node-name=disk,filename={}{}", path.display(), program.file_options());
    drive(&program.serve_nodes(&[node]), cell.load, cell.depth, cell.connections, ROOM, Duration::ZERO, time)
}

/// Milliseconds to open an image over QMP.
fn open(program: Program, path: &Path) -> f64 {
    let daemon = program.setup().qmp().start();
    let mut qmp = daemon.qmp();
    let file = json!({"driver": "file", "filename": path});
    let start = Instant::now();
    qmp.ok("blockdev-add", json!({"driver": "qcow2", "node-name": "disk", "file": file}));
    start.elapsed().as_secs_f64() * 1e3
}

/// KiB that the daemon has grown by after reads all over a full image of 1 TiB, whose L2 tables would fill 128 MiB.
fn memory(program: Program, path: &Path, time: Duration) -> f64 {
    let daemon = program.serve_nodes(&nodes(program, path));
    let before = pss(&daemon);
    let load = Load { block: 4096, random: true, write: false };
    drive(&daemon, load, 32, 1, 1 << 40, Duration::ZERO, time);
    (pss(&daemon).saturating_sub(before)) as f64 / 1024.0
}

/// Measures and prints the tables.
pub fn run(programs: &[Program], rounds: u32, raw: &Image, time: Duration, only: Option<&str>) {
    if !tools::installed("qemu-img") {
        println!("\nqcow2: left out, qemu-img is not installed");
        return;
    }
    let cells: Vec<_> = CELLS.iter().filter(|cell| only.is_none_or(|text| cell.name.contains(text))).collect();
    if cells.is_empty() {
        return;
    }
    let dir = tempfile::Builder::new().prefix("qsd-bench-").tempdir().expect("make a directory");
    let images = Images { dir: dir.path().to_owned(), raw };
    println!();
    report::heading(programs);
    for cell in &cells {
        let mut figures = vec![Vec::new(); programs.len()];
        for round in 0..rounds {
            for turn in 0..programs.len() {
                let which = (turn + round as usize) % programs.len();
                figures[which].push(run_cell(cell, programs[which], &images, time));
            }
        }
        report::row(cell.name, &figures);
    }
    against_raw(programs, rounds, &images, time, only);
    if only.is_some() {
        return;
    }
    let tebibyte = images.wide();
    let chain = images.chain("chain", OPEN_CHAIN, None);
    println!("\n| | {} |", programs.iter().map(|program| program.name()).collect::<Vec<_>>().join(" | "));
    println!("|---|{}", "---:|".repeat(programs.len()));
    type Measure<'a> = &'a dyn Fn(Program) -> f64;
    let measures: [(&str, Measure); 3] = [
        ("open an image of 1 TiB, ms", &|program| open(program, &tebibyte)),
        ("open a chain of 100 images, ms", &|program| open(program, &chain)),
        ("memory after reads all over 1 TiB, MiB more", &|program| memory(program, &tebibyte, time)),
    ];
    for (name, measure) in measures {
        let mut values = vec![Vec::new(); programs.len()];
        for _ in 0..rounds.max(3) {
            for (program, values) in programs.iter().zip(&mut values) {
                values.push(measure(*program));
            }
        }
        let row: Vec<_> = values.into_iter().map(|values| format!("{:.2}", median(values))).collect();
        println!("| {name} | {} |", row.join(" | "));
    }
}

/// The first program's qcow2 next to its own raw.
fn against_raw(programs: &[Program], rounds: u32, images: &Images, time: Duration, only: Option<&str>) {
    let Some(&program) = programs.first() else { return };
    println!("\n| {} | qcow2, requests/s | raw | qcow2 ÷ raw | CPU/request ÷ raw |", program.name());
    println!("|---|---:|---:|---:|---:|");
    for cell in CELLS.iter().filter(|cell| matches!(cell.kind, Kind::Full | Kind::Empty)) {
        if only.is_some_and(|text| !cell.name.contains(text)) {
            continue;
        }
        let (mut ours, mut raw) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            ours.push(run_cell(cell, program, images, time));
            raw.push(run_raw(cell, program, images, time));
        }
        let rate = |figures: &[Figures]| median(figures.iter().map(|figures| figures.rate).collect());
        let cpu = |figures: &[Figures]| median(figures.iter().map(|figures| figures.cpu).collect());
        println!(
            "| {} | {:.0} | {:.0} | {:.2} | {:.2} |",
            cell.name,
            rate(&ours),
            rate(&raw),
            rate(&ours) / rate(&raw),
            cpu(&ours) / cpu(&raw)
        );
    }
}
