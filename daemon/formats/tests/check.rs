//! Checks and repairs of damaged images, against `qemu-img check`: the same numbers are found, the same is repaired, and the
//! guest's bytes are the same afterwards. The reference finds nothing left in what was repaired here.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "a test")]

mod common;

use block::Perms;
use block::check::{Fix, Found};
use block::disk::DiskOptions;
use block::perm::Bits;
use common::{Random, attach, create, folder, graph, has_qemu, on_thread, options, qemu_io, run};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

/// The numbers that are compared.
const MEMBERS: [&str; 10] = [
    "check-errors",
    "corruptions",
    "leaks",
    "corruptions-fixed",
    "leaks-fixed",
    "total-clusters",
    "allocated-clusters",
    "fragmented-clusters",
    "compressed-clusters",
    "image-end-offset",
];

type Numbers = [u64; 10];

fn numbers(found: &Found) -> Numbers {
    [
        found.check_errors,
        found.corruptions,
        found.leaks,
        found.corruptions_fixed,
        found.leaks_fixed,
        found.total_clusters,
        found.allocated_clusters,
        found.fragmented_clusters,
        found.compressed_clusters,
        found.image_end_offset,
    ]
}

/// `qemu-img check`: the numbers and the exit status; none if the image cannot be checked at all.
fn reference(dir: &Path, image: &str, repair: Option<&str>) -> Option<(Numbers, i32)> {
    let mut args = vec!["check", "--output=json", "-f", "qcow2"];
    args.extend(repair.iter().flat_map(|what| ["-r", what]));
    args.push(image);
    let out = Command::new("qemu-img").args(&args).current_dir(dir).output().unwrap();
    let json: Value = serde_json::from_slice(&out.stdout).ok()?;
    Some((MEMBERS.map(|member| json[member].as_u64().unwrap_or(0)), out.status.code()?))
}

/// The check of this project on a file.
async fn ours(path: &Path, fix: Fix) -> Result<Found, String> {
    let mut graph = graph();
    let file = json!({ "driver": "file", "node-name": "f", "filename": path.to_str().unwrap() });
    let node = graph.add(&options(&file)).await.unwrap();
    let need = Bits::CONSISTENT_READ | Bits::WRITE | Bits::RESIZE;
    let perms = Perms { need, shared: Bits::NONE };
    let disk = graph.attach(&node, &DiskOptions { label: "a check".into(), perms, writethrough: false }).await.unwrap();
    let found = formats::qcow2::check::check(Arc::clone(&node), fix).await;
    graph.detach(disk).await;
    graph.close_all().await;
    found.map_err(|error| error.to_string())
}

/// The guest's bytes; none if some cannot be read.
fn content(dir: &Path, image: &str) -> Option<Vec<u8>> {
    let out = dir.join("content");
    let _ = std::fs::remove_file(&out);
    let args = ["convert", "-f", "qcow2", "-O", "raw", image, "content"];
    let done = Command::new("qemu-img").args(args).current_dir(dir).output().unwrap();
    done.status.success().then(|| std::fs::read(out).unwrap())
}

fn images(dir: &Path) -> Vec<&'static str> {
    let work = |image: &str| {
        qemu_io(dir, image, &["write -P 1 0 40k", "write -P 2 100k 30k", "write -z 200k 50k", "write -P 3 300k 5k"]);
        run(dir, "qemu-img", &["snapshot", "-c", "one", image]);
        qemu_io(dir, image, &["write -P 4 10k 20k", "discard 110k 10k", "write -P 5 400k 30k"]);
    };
    for (name, how) in [
        ("small", "-o cluster_size=512"),
        ("narrow", "-o cluster_size=4k,refcount_bits=1"),
        ("wide", "-o cluster_size=4k,refcount_bits=64"),
        ("old", "-o cluster_size=4k,compat=0.10"),
        ("extended", "-o cluster_size=16k,extended_l2=on"),
        ("bitmaps", "-o cluster_size=4k"),
    ] {
        create(dir, &format!("{how} {name} 512k"));
        if name == "narrow" {
            qemu_io(dir, name, &["write -P 1 0 40k", "write -P 2 100k 30k", "write -z 200k 50k"]);
        } else {
            work(name);
        }
    }
    // The reference's repair of an image with bitmaps loses its snapshots.
    run(dir, "qemu-img", &["snapshot", "-d", "one", "bitmaps"]);
    run(dir, "qemu-img", &["bitmap", "--add", "-g", "512", "bitmaps", "b"]);
    run(dir, "qemu-img", &["convert", "-c", "-f", "qcow2", "-O", "qcow2", "-o", "cluster_size=4k", "wide", "packed"]);
    vec!["small", "narrow", "wide", "old", "extended", "bitmaps", "packed"]
}

/// Where the tables are: damage there is worth more than elsewhere.
fn targets(image: &[u8]) -> Vec<usize> {
    let be64 = |at: usize| image.get(at..at + 8).map_or(0, |b| u64::from_be_bytes(b.try_into().unwrap()));
    let at = |at: usize| usize::try_from(be64(at) & 0x00ff_ffff_ffff_fe00).unwrap();
    let cluster = 1usize << image[23];
    let (l1, reftable) = (at(40), at(48));
    let mut found = Vec::new();
    let mut table =
        |start: usize| found.extend((start..start + cluster).filter(|i| image.get(*i).is_some_and(|b| *b != 0)));
    table(l1);
    table(reftable);
    for entry in 0..4 {
        for start in [at(l1 + entry * 8), at(reftable + entry * 8)] {
            // Header damage is for the tests of hostile images.
            if start != 0 {
                table(start);
            }
        }
    }
    found
}

fn mutate(image: &mut Vec<u8>, random: &mut Random) {
    let targets = targets(image);
    for _ in 0..1 + random.next(3) {
        let at = targets[random.next(targets.len())];
        match random.next(4) {
            0 => image[at] = 0,
            1 => image[at] ^= 1 << random.next(8),
            2 => {
                let from = targets[random.next(targets.len())] & !7;
                let entry: Vec<u8> = image[from..from + 8].to_vec();
                image[at & !7..(at & !7) + 8].copy_from_slice(&entry);
            }
            _ => image[at] = image[at].wrapping_add(1),
        }
    }
    if random.next(12) == 0 {
        let len = image.len();
        image.truncate(len - random.next(len / 2));
    }
    if image.get(4..8) == Some(&[0, 0, 0, 3]) && random.next(6) == 0 {
        image[79] |= u8::try_from(1 + random.next(2)).unwrap();
    }
}

#[derive(Default)]
struct Tally {
    images: usize,
    same_check: usize,
    same_repair: usize,
    clean: usize,
    both: usize,
}

async fn compare(dir: &Path, tally: &mut Tally, label: &str, image: &[u8]) {
    for name in ["a", "b", "c"] {
        std::fs::write(dir.join(name), image).unwrap();
    }
    let path = |name: &str| -> PathBuf { dir.join(name) };
    let found = ours(&path("a"), Fix::Nothing).await;
    assert_eq!(std::fs::read(path("a")).unwrap(), image, "{label}: a check changes nothing");
    let expected = reference(dir, "a", None);
    let (Ok(found), Some((expected, _))) = (&found, &expected) else {
        println!("{label}: {found:?} against {expected:?}");
        return;
    };
    tally.images += 1;
    if numbers(found) == *expected {
        tally.same_check += 1;
    } else {
        println!("{label}: check\n  {:?}\n  {expected:?}", numbers(found));
    }
    let repaired = ours(&path("b"), Fix::All).await;
    let expected = reference(dir, "c", Some("all"));
    let after = reference(dir, "b", None);
    let theirs_after = reference(dir, "c", None);
    let clean = |result: &Option<(Numbers, i32)>| result.is_some_and(|(_, code)| code == 0);
    if clean(&after) {
        tally.clean += 1;
    }
    if clean(&theirs_after) {
        assert!(clean(&after), "{label}: the reference repairs it: {repaired:?} leaves {after:?}");
        tally.both += 1;
        assert_eq!(content(dir, "b"), content(dir, "c"), "{label}: other bytes than the reference's repair leaves");
    }
    let fixed = |n: &Numbers| (n[1], n[2], n[3], n[4]);
    match (&repaired, &expected) {
        (Ok(ours), Some((theirs, _))) if fixed(&numbers(ours)) == fixed(theirs) => tally.same_repair += 1,
        _ => {
            if let Some(keep) = std::env::var_os("QCOW2_KEEP") {
                std::fs::write(Path::new(&keep).join(label.replace(' ', "_")), image).unwrap();
            }
            println!("{label}: repair\n  {:?}\n  {expected:?}", repaired.as_ref().map(numbers));
        }
    }
}

#[test]
fn damaged_images_are_repaired_as_by_the_reference() {
    if !has_qemu() {
        return;
    }
    let dir = folder();
    let path = dir.path().to_owned();
    let names = images(&path);
    let images: Vec<_> = names.iter().map(|name| std::fs::read(path.join(name)).unwrap()).collect();
    let rounds = std::env::var("QCOW2_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(60);
    let (sender, receiver) = std::sync::mpsc::channel();
    on_thread(move || async move {
        let mut tally = Tally::default();
        let mut random = Random(20_261_121);
        for (name, image) in names.iter().zip(&images) {
            compare(&path, &mut tally, name, image).await;
        }
        for round in 0..rounds {
            let mut image = images[round % images.len()].clone();
            mutate(&mut image, &mut random);
            compare(&path, &mut tally, &format!("{round} {}", names[round % images.len()]), &image).await;
        }
        sender.send(tally).unwrap();
    });
    let tally = receiver.recv().unwrap();
    println!(
        "{} images: same numbers of checks {}, of repairs {}; clean after repair {}, by both {}",
        tally.images, tally.same_check, tally.same_repair, tally.clean, tally.both
    );
    assert!(tally.images > rounds / 2);
    assert!(tally.same_check * 10 >= tally.images * 9, "checks that find something else");
}

fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

/// Where the entries of the table of snapshots are, which have names of three letters and 24 bytes of extra data.
fn entry(image: &[u8], index: usize) -> usize {
    let table = usize::try_from(u64::from_be_bytes(image[64..72].try_into().unwrap())).unwrap();
    table + index * 72
}

/// An entry with more extra data than there may be, one with none, and with so much that the rest of the table is nowhere.
#[test]
fn flawed_tables_of_snapshots() {
    if !has_qemu() {
        return;
    }
    let dir = folder();
    create(dir.path(), "-o cluster_size=4k base 1M");
    for name in ["one", "two", "six"] {
        qemu_io(dir.path(), "base", &["write -P 7 0 40k"]);
        run(dir.path(), "qemu-img", &["snapshot", "-c", name, "base"]);
    }
    let path = dir.path().to_owned();
    let base = std::fs::read(path.join("base")).unwrap();
    on_thread(move || async move {
        for (what, extra) in [("overlong", 2000u32), ("endless", 0xffff_fff0), ("none", 0)] {
            let mut image = base.clone();
            let at = entry(&base, if what == "none" { 2 } else { 1 });
            put(&mut image, at + 36, &extra.to_be_bytes());
            if what == "none" {
                let names = base[at + 64..at + 68].to_vec();
                put(&mut image, at + 40, &names);
            }
            for name in ["ours", "theirs"] {
                std::fs::write(path.join(name), &image).unwrap();
            }
            let found = ours(&path.join("ours"), Fix::Nothing).await;
            match reference(&path, "theirs", None) {
                Some((expected, _)) => assert_eq!(numbers(&found.unwrap()), expected, "{what}"),
                None => assert_eq!(found.unwrap_err(), "Too much extra metadata in snapshot table entry 1", "{what}"),
            }
            let fixed = ours(&path.join("ours"), Fix::All).await.unwrap();
            let (theirs, _) = reference(&path, "theirs", Some("all")).unwrap();
            let ours = numbers(&fixed);
            // Where the table ends up is the repairer's own affair.
            assert_eq!(ours[..9], theirs[..9], "{what}");
            let list = |image: &str| run(&path, "qemu-img", &["snapshot", "-l", image]);
            assert_eq!(list("ours"), list("theirs"), "{what}");
            assert_eq!(content(&path, "ours"), content(&path, "theirs"), "{what}");
            let (after, code) = reference(&path, "ours", None).unwrap();
            assert_eq!((after[1], after[2], code), (0, 0, 0), "{what}");
        }
    });
}

/// The reference, killed while it defers refcounts, leaves an image dirty.
#[test]
fn images_that_were_left_dirty_open() {
    if !has_qemu() {
        return;
    }
    let dir = folder();
    create(dir.path(), "-o lazy_refcounts=on dirty 64M");
    // Ends the way of a crash.
    let commands = ["-f", "qcow2", "-c", "write -P 7 1M 3M", "-c", "flush", "-c", "abort", "dirty"];
    Command::new("qemu-io").args(commands).current_dir(dir.path()).output().unwrap();
    let info = |name: &str| run(dir.path(), "qemu-img", &["info", "-U", "--output=json", name]);
    assert!(info("dirty").contains("\"dirty-flag\": true"));
    let path = dir.path().to_owned();
    on_thread(move || async move {
        let node = |read_only: bool| {
            let file = json!({ "driver": "file", "filename": path.join("dirty").to_str().unwrap() });
            options(&json!({ "driver": "qcow2", "node-name": "q", "file": file, "read-only": read_only }))
        };
        for read_only in [true, false, false] {
            let mut graph = graph();
            graph.add(&node(read_only)).await.unwrap();
            let disk = attach(&mut graph, "q", !read_only).await;
            let buf = buf::IoBuf::alloc(3 << 20);
            disk.read(1 << 20, &buf).await.unwrap();
            assert!(buf.to_vec().iter().all(|byte| *byte == 7));
            graph.detach(disk).await;
            graph.close_all().await;
        }
    });
    assert!(info("dirty").contains("\"dirty-flag\": false"));
    run(dir.path(), "qemu-img", &["check", "-q", "-f", "qcow2", "dirty"]);
}
