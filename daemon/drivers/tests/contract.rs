//! The contract of a driver, for each of them: random requests against a flat model, then the ends and the errors.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

mod common;

use block::{Span, WriteFlags, ZeroFlags};
use buf::IoBuf;
use common::suite::{Model, SIZE, apply, check, ends, op};
use common::{attach, graph, has_direct, image, on_thread, options, writer};
use io::RingUse;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Value, json};
use std::path::Path;

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
