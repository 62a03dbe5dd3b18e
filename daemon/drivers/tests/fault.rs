//! The fault node: the contract, what is durable when, and requests that are held, torn and failed.
#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation, reason = "test code")]

mod common;

use block::{Disk, Errno, Graph, Node, Span, WriteFlags, ZeroFlags};
use buf::IoBuf;
use common::suite::{SIZE, check};
use common::{attach, graph, image, on_thread, options, writer};
use io::RingUse;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use qapi::types::fault::{XFaultInfo, XFaultKeep};
use serde_json::{Value, json};
use std::future::poll_fn;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;

const LEN: u64 = 64 << 10;

fn fault(path: &Path, rules: Value) -> Value {
    json!({ "driver": "x-fault", "node-name": "top", "file": { "driver": "file", "filename": path }, "rules": rules })
}

async fn open(json: &Value) -> (Graph, Disk) {
    let mut graph = graph();
    graph.add(&options(json)).await.unwrap();
    let disk = attach(&mut graph, "top", writer()).await.unwrap();
    (graph, disk)
}

fn info(node: &Arc<Node>) -> XFaultInfo {
    node.driver().fault_control().unwrap().info()
}

fn bytes(byte: u8, len: usize) -> IoBuf {
    let buf = IoBuf::alloc(len);
    buf.fill(byte);
    buf
}

/// Whether a future waits after a turn.
async fn waits(mut future: std::pin::Pin<&mut impl Future>) -> bool {
    for _ in 0..3 {
        if poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx).is_ready())).await {
            return false;
        }
        tokio::task::yield_now().await;
    }
    true
}

#[test]
fn keeps_the_contract() {
    let file = image(2 * SIZE);
    check(RingUse::Auto, fault(file.path(), json!([])), false, Some((file.path(), 0)));
}

/// Random writes, durable writes and flushes, then a loss of power: what was flushed is there, and each sector holds one
/// of the versions that it had since.
#[test]
fn nothing_that_was_flushed_is_lost_and_nothing_else_is_invented() {
    let op = prop_oneof![
        5 => (0u64..32, 1u64..16, any::<bool>()).prop_map(|(at, len, fua)| (at, len, fua)),
        1 => Just((u64::MAX, 0, false)),
    ];
    let case = (prop::collection::vec(op, 1..40), any::<u64>(), prop_oneof![Just(512u32), Just(4096)], 0..3usize);
    let mut runner = TestRunner::new(Config { cases: 48, failure_persistence: None, ..Config::default() });
    runner
        .run(&case, |(ops, seed, atomic, keep)| {
            let file = image(LEN);
            let keep = [XFaultKeep::None, XFaultKeep::Random, XFaultKeep::All][keep];
            on_thread(RingUse::Auto, move || async move {
                let (mut graph, disk) = open(&fault(file.path(), json!([]))).await;
                // The versions that each sector may have; the last is the newest.
                let mut versions: Vec<Vec<u8>> = vec![vec![0]; (LEN / 512) as usize];
                for (i, (at, len, fua)) in ops.into_iter().enumerate() {
                    if at == u64::MAX {
                        disk.flush().await.unwrap();
                        versions.iter_mut().for_each(|v| *v = vec![*v.last().unwrap()]);
                        continue;
                    }
                    let byte = (i + 1) as u8;
                    disk.write(at * 512, &bytes(byte, (len * 512) as usize), WriteFlags { fua }).await.unwrap();
                    for v in &mut versions[at as usize..(at + len) as usize] {
                        if fua { *v = vec![byte] } else { v.push(byte) }
                    }
                }
                // The client sees the newest.
                let all = IoBuf::alloc(LEN as usize);
                disk.read(0, &all).await.unwrap();
                for (sector, v) in all.to_vec().chunks(512).zip(&versions) {
                    assert!(sector.iter().all(|byte| byte == v.last().unwrap()));
                }
                let node = disk.node();
                let control = node.driver().fault_control().unwrap();
                control.crash(keep, seed, atomic).await.unwrap();
                assert_eq!(disk.read(0, &all).await, Err(Errno::EIO));
                assert_eq!(disk.write(0, &all, WriteFlags::NONE).await, Err(Errno::EIO));
                assert_eq!(disk.flush().await, Err(Errno::EIO));
                let durable = std::fs::read(file.path()).unwrap();
                for (sector, v) in durable.chunks(512).zip(&versions) {
                    let byte = sector[0];
                    assert!(sector.iter().all(|b| *b == byte), "a sector is whole");
                    // The cache keeps the newest of what was not flushed.
                    let allowed = match keep {
                        XFaultKeep::None => byte == v[0],
                        XFaultKeep::All => byte == *v.last().unwrap(),
                        XFaultKeep::Random => byte == v[0] || byte == *v.last().unwrap(),
                    };
                    assert!(allowed, "{byte} is none of {v:?} with {keep:?}");
                }
                control.restart();
                disk.read(0, &all).await.unwrap();
                assert_eq!(all.to_vec(), durable);
                graph.detach(disk).await;
                graph.close_all().await;
            });
            Ok(())
        })
        .unwrap();
}

#[test]
fn requests_are_held_torn_and_failed_by_range() {
    let file = image(LEN);
    on_thread(RingUse::Off, move || async move {
        let rules = json!([
            { "action": "hold", "iotype": "write", "offset": 4096, "length": 4096, "count": 1 },
            { "action": "tear", "iotype": "write", "offset": 8192, "length": 4096, "torn-bytes": 1500, "errno": 28 },
            { "action": "fail", "iotype": "read", "offset": 12288, "length": 512, "skip": 1, "count": 1 },
            { "action": "fail", "iotype": "flush", "count": 1 },
            { "action": "fail", "iotype": "write-zeroes", "offset": 32768 }
        ]);
        let (mut graph, disk) = open(&fault(file.path(), rules)).await;
        let node = disk.node();
        {
            let data = bytes(1, 512);
            let mut held = pin!(disk.write(4608, &data, WriteFlags::NONE));
            assert!(waits(held.as_mut()).await);
            assert_eq!(info(&node), XFaultInfo { held: 1, volatile_bytes: 0, crashed: false });
            // Others pass, also in the same range, for the rule was for one.
            disk.write(5120, &data, WriteFlags::NONE).await.unwrap();
            node.driver().fault_control().unwrap().release();
            held.await.unwrap();
            assert_eq!(info(&node), XFaultInfo { held: 0, volatile_bytes: 1024, crashed: false });
        }
        assert_eq!(disk.write(8192, &bytes(2, 4096), WriteFlags::NONE).await, Err(Errno::ENOSPC));
        let torn = IoBuf::alloc(4096);
        disk.read(8192, &torn).await.unwrap();
        assert_eq!(torn.to_vec().iter().filter(|byte| **byte == 2).count(), 1024, "whole sectors of 1500 bytes");
        let sector = IoBuf::alloc(512);
        for want in [Ok(()), Err(Errno::EIO), Ok(())] {
            assert_eq!(disk.read(12288, &sector).await, want);
        }
        disk.zero(Span::new(0, 512), ZeroFlags::default()).await.unwrap();
        assert_eq!(disk.zero(Span::new(32768, 512), ZeroFlags::default()).await, Err(Errno::EIO));
        assert_eq!(disk.flush().await, Err(Errno::EIO));
        assert!(std::fs::read(file.path()).unwrap().iter().all(|byte| *byte == 0), "nothing is durable yet");
        disk.flush().await.unwrap();
        assert_eq!(std::fs::read(file.path()).unwrap()[4608..5632], [1; 1024]);
        assert_eq!(info(&node).volatile_bytes, 0);
        drop(node);
        graph.detach(disk).await;
    });
}

#[test]
fn a_loss_of_power_ends_what_is_held() {
    let file = image(LEN);
    on_thread(RingUse::Off, move || async move {
        let (mut graph, disk) = open(&fault(file.path(), json!([{ "action": "hold", "iotype": "write" }]))).await;
        let node = disk.node();
        let control = node.driver().fault_control().unwrap();
        {
            let data = bytes(1, 512);
            let mut held = pin!(disk.write(0, &data, WriteFlags::NONE));
            assert!(waits(held.as_mut()).await);
            control.crash(XFaultKeep::All, 0, 512).await.unwrap();
            assert_eq!(held.await, Err(Errno::EIO));
        }
        assert!(control.crash(XFaultKeep::All, 0, 512).await.is_err());
        assert!(control.crash(XFaultKeep::All, 0, 100).await.is_err());
        control.restart();
        control.set_rules(&[]).unwrap();
        disk.write(0, &bytes(3, 512), WriteFlags::FUA).await.unwrap();
        assert_eq!(std::fs::read(file.path()).unwrap()[..512], [3; 512]);
        graph.detach(disk).await;
    });
}
