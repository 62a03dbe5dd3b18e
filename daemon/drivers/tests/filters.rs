//! The drivers that stand above other nodes: the contract for each of them, and what each adds.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "test code")]

mod common;

use block::testing::{ManualClock, ManualHandle};
use block::{Errno, Graph, WriteFlags};
use buf::IoBuf;
use common::suite::{SIZE, check};
use common::{attach, graph, image, on_thread, options, refused, writer};
use drivers::Drivers;
use io::RingUse;
use serde_json::json;
use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;

#[test]
fn throttle_keeps_the_contract() {
    let file = image(2 * SIZE);
    for group in ["fast", "unlimited"] {
        let json = json!({
            "driver": "throttle", "node-name": "top", "throttle-group": group, "discard": "unmap",
            "file": { "driver": "file", "filename": file.path() }
        });
        check(RingUse::Auto, json, true, Some((file.path(), 0)));
    }
}

#[test]
fn throttle_joins_and_leaves_its_group() {
    on_thread(RingUse::Off, || async {
        let mut g = graph();
        let throttle = |group: &str, file| json!({ "driver": "throttle", "node-name": "t", "throttle-group": group, "file": file });
        assert_eq!(
            refused(&mut g, &throttle("nope", json!({ "driver": "null-co" }))).await,
            "Throttle group 'nope' does not exist"
        );
        let group = g.resources().throttle_group("fast").unwrap();
        assert!(refused(&mut g, &throttle("fast", json!("nope"))).await.contains("nope"));
        assert_eq!(group.members(), 0);
        let json = throttle("fast", json!({ "driver": "null-co", "size": 65536 }));
        g.add(&options(&json)).await.unwrap();
        assert_eq!(group.members(), 1);
        let name = g.get("t").unwrap().driver().filename();
        let shown: serde_json::Value = serde_json::from_str(name.strip_prefix("json:").unwrap()).unwrap();
        let mut want = json.clone();
        want.as_object_mut().unwrap().remove("node-name");
        assert_eq!(shown, want);
        // Deleted from under a user that still holds the group: the driver is gone and so is the member.
        let disk = attach(&mut g, "t", writer()).await.unwrap();
        g.detach(disk).await;
        g.delete("t").await.unwrap();
        assert_eq!(group.members(), 0);
    });
}

#[test]
fn blkdebug_keeps_the_contract() {
    let file = image(2 * SIZE);
    for (align, max_transfer) in [(1, 0), (512, 0), (4096, 8192)] {
        let json = json!({
            "driver": "blkdebug", "node-name": "top", "discard": "unmap", "align": align, "max-transfer": max_transfer,
            "opt-write-zero": 2 * align, "opt-discard": 4 * align, "max-discard": 64 * align,
            "image": { "driver": "file", "filename": file.path() }
        });
        check(RingUse::Auto, json, align == 1, Some((file.path(), 0)));
    }
}

#[test]
fn blkdebug_delays_by_the_clock() {
    on_thread(RingUse::Off, || async {
        let clock = ManualClock::new();
        let mut g = Graph::new(Arc::new(Drivers::with_clock(Arc::new(ManualHandle(Arc::clone(&clock))))));
        let json = json!({
            "driver": "blkdebug", "node-name": "top", "image": { "driver": "null-co", "size": 65536 },
            "inject-error": [
                { "event": "none", "iotype": "read", "errno": 0, "delay-ns": 1000 },
                { "event": "none", "iotype": "write", "errno": 28, "delay-ns": 5000, "once": true }
            ]
        });
        g.add(&options(&json)).await.unwrap();
        let disk = attach(&mut g, "top", writer()).await.unwrap();
        let buf = IoBuf::zeroed(512);
        let (mut read, mut write) = (pin!(disk.read(0, &buf)), pin!(disk.write(0, &buf, WriteFlags::NONE)));
        let pending =
            poll_fn(|cx| Poll::Ready(read.as_mut().poll(cx).is_pending() && write.as_mut().poll(cx).is_pending()));
        assert!(pending.await);
        assert_eq!((clock.timers(), clock.next()), (2, Some(1000)));
        clock.advance_to(1000);
        assert_eq!(read.await, Ok(()));
        clock.advance_to(5000);
        assert_eq!(write.await, Err(Errno::ENOSPC));
        assert_eq!(disk.write(0, &buf, WriteFlags::NONE).await, Ok(()));
    });
}

#[test]
fn blkverify_writes_both_and_sees_every_difference() {
    let (test, raw) = (image(2 * SIZE), image(2 * SIZE));
    let json = json!({
        "driver": "blkverify", "node-name": "top", "test": { "driver": "file", "filename": test.path() },
        "raw": { "driver": "file", "filename": raw.path() }
    });
    std::fs::write(test.path(), vec![0; 65536]).unwrap();
    std::fs::write(raw.path(), vec![0; 65536]).unwrap();
    let (test_path, raw_path) = (test.path().to_owned(), raw.path().to_owned());
    on_thread(RingUse::Auto, move || async move {
        let mut g = graph();
        g.add(&options(&json)).await.unwrap();
        let disk = attach(&mut g, "top", writer()).await.unwrap();
        disk.write(1000, &IoBuf::copy_of(&[3; 5000]), WriteFlags::NONE).await.unwrap();
        disk.flush().await.unwrap();
        let buf = IoBuf::alloc(8192);
        disk.read(0, &buf).await.unwrap();
        assert_eq!(buf.to_vec()[1000..6000], [3; 5000]);
        // Both have it.
        assert_eq!(std::fs::read(&test_path).unwrap(), std::fs::read(&raw_path).unwrap());
        let mut bytes = std::fs::read(&raw_path).unwrap();
        bytes[5000] = 4;
        std::fs::write(&raw_path, bytes).unwrap();
        assert_eq!(disk.read(0, &buf).await, Err(Errno::EIO));
        assert_eq!(disk.read(5001, &IoBuf::alloc(100)).await, Ok(()));
        g.detach(disk).await;
    });
}
