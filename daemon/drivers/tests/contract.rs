//! The contract of a driver, for each of them: random requests against a flat model, then the ends and the errors.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

mod common;

use block::{Disk, Errno, Graph, Span, WriteFlags, ZeroFlags};
use buf::IoBuf;
use common::{attach, graph, has_direct, image, on_thread, options, writer};
use io::RingUse;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Value, json};
use std::path::Path;

const SIZE: u64 = 256 << 10;

#[derive(Clone, Debug)]
enum Op {
    Read(u64, u64),
    Write(u64, u64, u8, bool),
    Zero(u64, u64, ZeroFlags),
    Discard(u64, u64),
    Flush,
    Status(u64, u64),
    Resize(u64),
}

/// Offsets and lengths of all kinds: aligned to blocks, to sectors, to nothing.
fn span() -> impl Strategy<Value = (u64, u64)> {
    (prop_oneof![Just(4096u64), Just(512), Just(1)], 0..SIZE, 1u64..40_000)
        .prop_map(|(unit, at, len)| (at / unit * unit, len.next_multiple_of(unit)))
}

fn op() -> impl Strategy<Value = Op> {
    let flags = (any::<bool>(), any::<bool>(), any::<bool>());
    prop_oneof![
        3 => span().prop_map(|(at, len)| Op::Read(at, len)),
        4 => (span(), 1u8.., any::<bool>()).prop_map(|((at, len), byte, fua)| Op::Write(at, len, byte, fua)),
        2 => (span(), flags).prop_map(|((at, len), (fua, may_unmap, no_fallback))| {
            Op::Zero(at, len, ZeroFlags { fua, may_unmap, no_fallback })
        }),
        1 => span().prop_map(|(at, len)| Op::Discard(at, len)),
        1 => Just(Op::Flush),
        2 => span().prop_map(|(at, len)| Op::Status(at, len)),
        1 => (1..SIZE / 512).prop_map(|sectors| Op::Resize(sectors * 512)),
    ]
}

/// The bytes as they must be; none where a discard left them open.
struct Model(Vec<Option<u8>>);

impl Model {
    /// Cuts a range to what is there; none if nothing is.
    fn cut(&self, at: u64, len: u64) -> Option<std::ops::Range<usize>> {
        let end = (at + len).min(self.0.len() as u64);
        (at < end).then_some(at as usize..end as usize)
    }

    fn check(&self, range: std::ops::Range<usize>, got: &[u8]) {
        for (i, (want, got)) in self.0[range.clone()].iter().zip(got).enumerate() {
            assert!(want.is_none_or(|want| want == *got), "byte {}: {want:?}, not {got}", range.start + i);
        }
    }
}

async fn apply(graph: &mut Graph, disk: &Disk, model: &mut Model, op: &Op, resizes: bool) {
    match *op {
        Op::Read(at, len) => {
            let Some(range) = model.cut(at, len) else { return };
            let buf = IoBuf::alloc(range.len());
            buf.fill(0xEE);
            disk.read(at, &buf).await.unwrap();
            model.check(range, &buf.to_vec());
        }
        Op::Write(at, len, byte, fua) => {
            let Some(range) = model.cut(at, len) else { return };
            let buf = IoBuf::alloc(range.len());
            buf.fill(byte);
            disk.write(at, &buf, WriteFlags { fua }).await.unwrap();
            model.0[range].fill(Some(byte));
        }
        Op::Zero(at, len, flags) => {
            let Some(range) = model.cut(at, len) else { return };
            match disk.zero(Span::new(at, range.len() as u64), flags).await {
                Ok(()) => model.0[range].fill(Some(0)),
                // It may have come half-way.
                Err(Errno::ENOTSUP) if flags.no_fallback => {
                    model.0[range].iter_mut().for_each(|byte| *byte = byte.filter(|byte| *byte == 0));
                }
                Err(e) => panic!("{e}"),
            }
        }
        Op::Discard(at, len) => {
            let Some(range) = model.cut(at, len) else { return };
            disk.discard(Span::new(at, range.len() as u64)).await.unwrap();
            model.0[range].fill(None);
        }
        Op::Flush => disk.flush().await.unwrap(),
        Op::Status(at, len) => {
            let Some(range) = model.cut(at, len) else { return };
            let found = disk.status(Span::new(at, range.len() as u64)).await.unwrap();
            assert!(found.len > 0 && found.len <= range.len() as u64);
            if found.zero {
                model.check(range.start..range.start + found.len as usize, &vec![0; found.len as usize]);
            }
        }
        Op::Resize(size) => {
            if resizes {
                graph.resize(&disk.node(), size).await.unwrap();
                model.0.resize(size as usize, Some(0));
                assert_eq!(disk.size(), size);
            }
        }
    }
}

/// Runs random requests on the node `top` of `json`; `file` is compared with the model at the end.
fn check(ring: RingUse, json: Value, resizes: bool, file: Option<(&Path, u64)>) {
    let mut runner = TestRunner::new(Config { cases: 24, failure_persistence: None, ..Config::default() });
    let file = file.map(|(path, skip)| (path.to_owned(), skip as usize));
    runner
        .run(&prop::collection::vec(op(), 1..40), |ops| {
            let (json, file) = (json.clone(), file.clone());
            if let Some((path, _)) = &file {
                std::fs::write(path, []).unwrap();
                std::fs::OpenOptions::new().write(true).open(path).unwrap().set_len(2 * SIZE).unwrap();
            }
            on_thread(ring, move || async move {
                let mut graph = graph();
                graph.add(&options(&json)).await.unwrap();
                let disk = attach(&mut graph, "top", writer()).await.unwrap();
                let mut model = Model(vec![Some(0); disk.size() as usize]);
                for op in &ops {
                    apply(&mut graph, &disk, &mut model, op, resizes).await;
                }
                let all = IoBuf::alloc(disk.size() as usize);
                disk.read(0, &all).await.unwrap();
                model.check(0..model.0.len(), &all.to_vec());
                ends(&disk).await;
                graph.detach(disk).await;
                graph.close_all().await;
                if let Some((path, skip)) = file {
                    let bytes = std::fs::read(path).unwrap();
                    model.check(0..model.0.len(), &bytes[skip..skip + model.0.len()]);
                }
            });
            Ok(())
        })
        .unwrap();
}

async fn ends(disk: &Disk) {
    let byte = IoBuf::alloc(1);
    assert_eq!(disk.read(disk.size(), &byte).await, Err(Errno::EIO));
    assert_eq!(disk.write(disk.size(), &byte, WriteFlags::NONE).await, Err(Errno::EIO));
    assert_eq!(disk.zero(Span::new(disk.size(), 1), ZeroFlags::default()).await, Err(Errno::EIO));
    assert_eq!(disk.discard(Span::new(u64::MAX, 2)).await, Err(Errno::EIO));
}

fn file_options(path: &Path, more: &[(&str, Value)]) -> Value {
    let mut json = json!({ "driver": "file", "node-name": "top", "filename": path, "discard": "unmap" });
    for (name, value) in more {
        json[*name] = value.clone();
    }
    json
}

#[test]
fn file_on_the_ring() {
    let file = image(2 * SIZE);
    check(RingUse::Auto, file_options(file.path(), &[("aio", "io_uring".into())]), true, Some((file.path(), 0)));
}

#[test]
fn file_where_there_is_no_ring() {
    let file = image(2 * SIZE);
    check(RingUse::Off, file_options(file.path(), &[]), true, Some((file.path(), 0)));
}

#[test]
fn file_on_threads() {
    let file = image(2 * SIZE);
    let more = [("aio", "threads".into()), ("auto-read-only", true.into()), ("aio-max-batch", 4.into())];
    check(RingUse::Auto, file_options(file.path(), &more), true, Some((file.path(), 0)));
}

#[test]
fn file_past_the_cache() {
    if !has_direct() {
        return;
    }
    let file = image(2 * SIZE);
    for aio in ["native", "threads"] {
        let more = [("aio", aio.into()), ("cache", json!({ "direct": true }))];
        check(RingUse::Auto, file_options(file.path(), &more), false, Some((file.path(), 0)));
    }
}

#[test]
fn file_on_a_file_system_in_memory() {
    // Its abilities differ: no zero range.
    let Ok(file) = tempfile::NamedTempFile::new_in("/dev/shm") else {
        println!("skipped: no /dev/shm");
        return;
    };
    check(RingUse::Auto, file_options(file.path(), &[]), true, Some((file.path(), 0)));
}

#[test]
fn raw_as_it_is() {
    let file = image(2 * SIZE);
    let json = json!({
        "driver": "raw", "node-name": "top", "discard": "unmap",
        "file": { "driver": "file", "filename": file.path() }
    });
    check(RingUse::Auto, json, true, Some((file.path(), 0)));
}

#[test]
fn raw_with_a_window() {
    let file = image(2 * SIZE);
    for (offset, size) in [(512u64, SIZE), (100, SIZE), (4096, 512 * 3)] {
        let json = json!({
            "driver": "raw", "node-name": "top", "offset": offset, "size": size, "discard": "unmap",
            "file": { "driver": "file", "filename": file.path(), "cache": { "direct": has_direct() } }
        });
        check(RingUse::Auto, json, false, Some((file.path(), offset)));
    }
}

#[test]
fn raw_with_an_offset() {
    let file = image(2 * SIZE);
    let json = json!({
        "driver": "raw", "node-name": "top", "offset": 4096, "discard": "unmap",
        "file": { "driver": "file", "filename": file.path() }
    });
    check(RingUse::Auto, json, true, Some((file.path(), 4096)));
}

#[test]
fn host_device() {
    let Some(dev) = common::Loop::new(2 * SIZE) else { return };
    for direct in [false, true] {
        let json = json!({
            "driver": "host_device", "node-name": "top", "filename": dev.device, "discard": "unmap",
            "cache": { "direct": direct }
        });
        // Each case starts with zeroes.
        let zero = {
            let mut json = json.clone();
            json["node-name"] = "zero".into();
            json
        };
        let mut runner = TestRunner::new(Config { cases: 24, failure_persistence: None, ..Config::default() });
        runner
            .run(&prop::collection::vec(op(), 1..40), |ops| {
                let (json, zero) = (json.clone(), zero.clone());
                on_thread(RingUse::Auto, move || async move {
                    let mut graph = graph();
                    graph.add(&options(&zero)).await.unwrap();
                    let disk = attach(&mut graph, "zero", writer()).await.unwrap();
                    assert_eq!(disk.size(), 2 * SIZE);
                    disk.zero(Span::new(0, 2 * SIZE), ZeroFlags::default()).await.unwrap();
                    graph.detach(disk).await;
                    graph.delete("zero").await.unwrap();

                    graph.add(&options(&json)).await.unwrap();
                    let disk = attach(&mut graph, "top", writer()).await.unwrap();
                    let mut model = Model(vec![Some(0); disk.size() as usize]);
                    for op in &ops {
                        apply(&mut graph, &disk, &mut model, op, false).await;
                    }
                    let all = IoBuf::alloc(disk.size() as usize);
                    disk.read(0, &all).await.unwrap();
                    model.check(0..model.0.len(), &all.to_vec());
                    ends(&disk).await;
                    graph.detach(disk).await;
                    graph.close_all().await;
                });
                Ok(())
            })
            .unwrap();
    }
}

#[test]
fn null_keeps_nothing_and_shows_nothing() {
    for driver in ["null-co", "null-aio"] {
        for read_zeroes in [false, true] {
            let json = json!({ "driver": driver, "node-name": "top", "size": 65536, "read-zeroes": read_zeroes });
            on_thread(RingUse::Auto, move || async move {
                let mut graph = graph();
                graph.add(&options(&json)).await.unwrap();
                let disk = attach(&mut graph, "top", writer()).await.unwrap();
                let secret = IoBuf::alloc(4096);
                secret.fill(0x55);
                disk.write(0, &secret, WriteFlags::FUA).await.unwrap();
                disk.flush().await.unwrap();
                disk.zero(Span::new(0, 65536), ZeroFlags { no_fallback: true, ..ZeroFlags::default() }).await.unwrap();
                drop(secret);
                // The same memory, from the pool, with what the writer had in it.
                let buf = IoBuf::alloc(4096);
                disk.read(0, &buf).await.unwrap();
                assert!(buf.is_zero());
                let found = disk.status(Span::new(0, 65536)).await.unwrap();
                assert_eq!((found.len, found.zero, found.data), (65536, read_zeroes, false));
                ends(&disk).await;
                let text = graph.resize(&disk.node(), 512).await.unwrap_err().to_string();
                assert_eq!(text, "Image format driver does not support resize");
            });
        }
    }
}
