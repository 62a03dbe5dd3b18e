//! The table, in Markdown.

use crate::cells::Figures;
use crate::programs::Program;

/// The middle one of the values.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// What the figures were measured on.
pub fn machine() {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo");
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map_or("?", |m| m.1);
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    println!("{cores} × {model}, Linux {}\n", read("/proc/sys/kernel/osrelease").trim());
}

/// The head of the table. The first program is what the others are compared with.
pub fn heading(programs: &[Program]) {
    let Some((first, others)) = programs.split_first() else { panic!("no program to measure") };
    print!("| cell | {}, requests/s | CPU µs/request |", first.name());
    for other in others {
        print!(" throughput ÷ {0} | CPU/request ÷ {0} |", other.name());
    }
    println!("\n|---|---:|---:|{}", "---:|---:|".repeat(others.len()));
}

/// One row: the medians of the rounds of each program.
pub fn row(name: &str, rounds: &[Vec<Figures>]) {
    let middle = |pick: fn(&Figures) -> f64| {
        rounds.iter().map(|rounds| median(rounds.iter().map(pick).collect())).collect::<Vec<_>>()
    };
    let (rates, cpus) = (middle(|figures| figures.rate), middle(|figures| figures.cpu));
    print!("| {name} | {:.0} | {:.2} |", rates[0], cpus[0]);
    for (rate, cpu) in rates.iter().zip(&cpus).skip(1) {
        print!(" {:.2} | {:.2} |", rates[0] / rate, cpus[0] / cpu);
    }
    println!();
}
