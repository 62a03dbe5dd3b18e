//! Images of all combinations of options: what `qemu-img` makes reads the same here, and what is written here passes
//! `qemu-img check` and compares equal.
//!
//! A part of the combinations, another one in each of four tests; `QCOW2_MATRIX=1` takes all of them.

use crate::{qemu_img, qemu_io, serve};
use serde_json::json;
use std::path::Path;
use std::process::Command;
use tests::Setup;

/// What an image is made with.
#[derive(Clone, Copy, Debug, Default)]
struct Shape {
    old: bool,
    cluster: u32,
    refcount_bits: u32,
    extended: bool,
    zstd: bool,
    /// 0 none, 1 external, 2 external and raw.
    data_file: u8,
    backing: bool,
    preallocation: &'static str,
    lazy: bool,
    compressed: bool,
}

impl Shape {
    /// Whether the reference makes such images.
    fn is_possible(&self) -> bool {
        let old =
            self.old && (self.refcount_bits != 16 || self.extended || self.zstd || self.data_file > 0 || self.lazy);
        let extended = self.extended && self.cluster < 16 << 10;
        let data_file = self.data_file > 0 && self.compressed || self.data_file == 2 && self.backing;
        let backing = self.backing && (self.preallocation != "off" && !self.extended || self.compressed);
        // A compressed image is made by a conversion, which shares clusters: one bit is too narrow for their counts.
        let narrow = self.compressed && (self.refcount_bits < 16 || self.preallocation != "off");
        !(old || extended || data_file || backing || narrow)
    }

    fn options(&self, dir: &Path) -> String {
        let mut options = format!(
            "compat={},cluster_size={},preallocation={}",
            if self.old { "0.10" } else { "1.1" },
            self.cluster,
            self.preallocation
        );
        if !self.old {
            options += &format!(",refcount_bits={}", self.refcount_bits);
        }
        for (wanted, option) in
            [(self.extended, "extended_l2=on"), (self.zstd, "compression_type=zstd"), (self.lazy, "lazy_refcounts=on")]
        {
            if wanted {
                options += &format!(",{option}");
            }
        }
        if self.data_file > 0 {
            let raw = if self.data_file == 2 { "on" } else { "off" };
            options += &format!(",data_file={},data_file_raw={raw}", dir.join("data").display());
        }
        options
    }
}

fn all() -> Vec<Shape> {
    let mut shapes = Vec::new();
    for old in [true, false] {
        for cluster in [512, 4 << 10, 64 << 10, 2 << 20] {
            for refcount_bits in [1, 8, 16, 64] {
                for (extended, zstd, lazy) in (0..8).map(|n| (n & 1 != 0, n & 2 != 0, n & 4 != 0)) {
                    for data_file in 0..3 {
                        for backing in [true, false] {
                            for preallocation in ["off", "metadata", "falloc"] {
                                for compressed in [true, false] {
                                    let preallocation: &'static str = preallocation;
                                    shapes.push(Shape {
                                        old,
                                        cluster,
                                        refcount_bits,
                                        extended,
                                        zstd,
                                        data_file,
                                        backing,
                                        preallocation,
                                        lazy,
                                        compressed,
                                    });
                                }
                            }
                        }
                    }
                }
            }
        }
    }
    shapes.retain(Shape::is_possible);
    shapes
}

/// Changes that are made through the daemon and to a plain file alike. None of them depends on what a discard leaves.
const CHANGES: [&str; 9] = [
    "write -P 0x21 0 3k",
    "write -P 0x22 60k 70k",
    "write -z 200k 40k",
    "write -zu 300k 100k",
    "write -f -P 0x23 310k 512",
    "write -P 0x24 1M 600k",
    "write -zu 1100k 64k",
    "write -P 0 1500k 10k",
    "write -P 0x25 2047k 1k",
];

fn qemu_io_raw(dir: &Path, target: &str, commands: &[&str]) {
    let mut args = vec!["-f", "raw"];
    commands.iter().for_each(|command| args.extend(["-c", command]));
    args.push(target);
    let out = Command::new("qemu-io").args(&args).current_dir(dir).output().expect("qemu-io runs");
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success() && !text.contains("failed"), "qemu-io {args:?}: {text}");
}

fn round_trip(shape: Shape) {
    let setup = Setup::new().qmp().nbd_server();
    let dir = setup.path(".").canonicalize().unwrap();
    let options = shape.options(&dir);
    let label = format!("{options} backing={} compressed={}", shape.backing, shape.compressed);
    qemu_img(&dir, &["create", "-q", "-f", "qcow2", "base", "1536k"]);
    qemu_io(&dir, "base", &["write -P 0x11 0 500k", "write -P 0x12 900k 300k"]);
    if shape.compressed {
        qemu_img(&dir, &["resize", "-q", "base", "2M"]);
        qemu_img(&dir, &["convert", "-c", "-f", "qcow2", "-O", "qcow2", "-o", &options, "base", "i.qcow2"]);
    } else if shape.backing {
        let args = ["create", "-q", "-f", "qcow2", "-o", &options, "-b", "base", "-F", "qcow2", "i.qcow2", "2M"];
        qemu_img(&dir, &args);
    } else {
        qemu_img(&dir, &["create", "-q", "-f", "qcow2", "-o", &options, "i.qcow2", "2M"]);
    }
    let mut first = vec!["write -P 0x13 30k 20k", "write -P 0x14 700k 130k"];
    if !shape.old {
        first.push("write -z 100k 50k");
    }
    if !shape.compressed {
        qemu_io(&dir, "i.qcow2", &first);
    }
    qemu_img(&dir, &["convert", "-f", "qcow2", "-O", "raw", "i.qcow2", "flat"]);
    let mut daemon = setup.start();
    let qmp = serve(&daemon, "i.qcow2", &json!({"discard": "unmap"}));
    let uri = daemon.uri("q");
    assert!(qemu_img(&dir, &["compare", "-f", "raw", "-F", "raw", &uri, "flat"]).contains("identical"), "{label}");
    qemu_io_raw(&dir, &uri, &CHANGES);
    qemu_io_raw(&dir, "flat", &CHANGES);
    assert!(qemu_img(&dir, &["compare", "-f", "raw", "-F", "raw", &uri, "flat"]).contains("identical"), "{label}");
    drop(qmp);
    daemon.stop();
    let checked =
        Command::new("qemu-img").args(["check", "-f", "qcow2", "i.qcow2"]).current_dir(&dir).output().unwrap();
    assert!(checked.status.success(), "{label}: {}", String::from_utf8_lossy(&checked.stdout));
    let same = qemu_img(&dir, &["compare", "-f", "qcow2", "-F", "raw", "i.qcow2", "flat"]);
    assert!(same.contains("identical"), "{label}: {same}");
    if shape.data_file == 2 {
        assert_eq!(std::fs::read(dir.join("data")).unwrap(), std::fs::read(dir.join("flat")).unwrap(), "{label}");
    }
}

/// Every image of a part of the combinations.
fn part(number: usize) {
    let shapes = all();
    let whole = std::env::var_os("QCOW2_MATRIX").is_some();
    // A prime as the step meets all values of each option.
    let step = if whole { 4 } else { 181 };
    shapes.iter().skip(number * if whole { 1 } else { 47 }).step_by(step).for_each(|shape| round_trip(*shape));
}

#[test]
fn first_part() {
    part(0);
}

#[test]
fn second_part() {
    part(1);
}

#[test]
fn third_part() {
    part(2);
}

#[test]
fn fourth_part() {
    part(3);
}
