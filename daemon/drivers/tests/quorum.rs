//! `quorum`: the contract, votes, corrections, reports.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "test code")]

mod common;

use block::report::Report;
use block::{Errno, Graph, Span, WriteFlags, ZeroFlags};
use buf::IoBuf;
use common::suite::{SIZE, check};
use common::{attach, graph, image, on_thread, options, refused, writer};
use io::RingUse;
use qapi::types::block_event::QuorumOpType;
use serde_json::{Value, json};

const LEN: u64 = 65536;

fn quorum(children: &[Value], threshold: i64, more: &Value) -> Value {
    let mut json = json!({ "driver": "quorum", "node-name": "top", "children": children, "vote-threshold": threshold });
    json.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    json
}

fn file(path: &std::path::Path) -> Value {
    json!({ "driver": "file", "filename": path })
}

#[test]
fn quorum_keeps_the_contract() {
    let files = [image(2 * SIZE), image(2 * SIZE), image(2 * SIZE)];
    for more in [json!({ "rewrite-corrupted": true }), json!({ "read-pattern": "fifo" })] {
        for other in &files[1..] {
            std::fs::write(other.path(), vec![0; 2 * SIZE as usize]).unwrap();
        }
        let first = files[0].path();
        // The others are made anew with every run of the contract: the nodes below start with zeroes.
        let window = |path| json!({ "driver": "raw", "size": 2 * SIZE, "file": file(path) });
        let null = || json!({ "driver": "null-co", "size": 2 * SIZE, "read-zeroes": true });
        let children = if more["read-pattern"] == "fifo" { vec![window(first), null()] } else { vec![window(first)] };
        check(RingUse::Auto, quorum(&children, 1, &more), false, Some((first, 0)));
    }
}

/// The bad children that were reported: what, error, name.
fn bad(g: &Graph) -> Vec<(QuorumOpType, bool, String)> {
    let mut all = Vec::new();
    while let Some((_, report)) = g.reporter().try_next() {
        match report {
            Report::QuorumReportBad(bad) => all.push((bad.kind, bad.error.is_some(), bad.node_name)),
            Report::QuorumFailure(failure) => {
                all.push((QuorumOpType::Read, false, format!("failure of {}", failure.reference)))
            }
            _ => {}
        }
    }
    all
}

fn named(name: &str, mut json: Value) -> Value {
    json["node-name"] = name.into();
    json
}

#[test]
fn the_majority_wins_and_the_rest_is_corrected_if_wanted() {
    for rewrite in [false, true] {
        let files = [image(LEN), image(LEN), image(LEN)];
        let paths = files.each_ref().map(|file| file.path().to_owned());
        on_thread(RingUse::Auto, move || async move {
            let mut g = graph();
            let children: Vec<_> = (0..3).map(|i| named(&format!("f{i}"), file(&paths[i]))).collect();
            g.add(&options(&quorum(&children, 2, &json!({ "rewrite-corrupted": rewrite })))).await.unwrap();
            let disk = attach(&mut g, "top", writer()).await.unwrap();
            disk.write(1000, &IoBuf::copy_of(&[7; 9000]), WriteFlags::NONE).await.unwrap();
            disk.zero(Span::new(2000, 100), ZeroFlags::default()).await.unwrap();
            disk.flush().await.unwrap();
            let good = std::fs::read(&paths[0]).unwrap();
            assert!(good == std::fs::read(&paths[1]).unwrap() && good[5000] == 7);
            let damage = |path, byte: u8| {
                let mut bytes = good.clone();
                bytes[5000] = byte;
                std::fs::write(path, bytes).unwrap();
            };
            damage(&paths[1], 8);
            let buf = IoBuf::alloc(LEN as usize);
            disk.read(0, &buf).await.unwrap();
            assert!(buf.to_vec() == good);
            assert_eq!(bad(&g), [(QuorumOpType::Read, false, "f1".into())]);
            assert_eq!(std::fs::read(&paths[1]).unwrap() == good, rewrite);
            // No two agree.
            damage(&paths[1], 8);
            damage(&paths[2], 9);
            assert_eq!(disk.read(4096, &IoBuf::alloc(4096)).await, Err(Errno::EIO));
            assert_eq!(bad(&g), [(QuorumOpType::Read, false, "failure of top".into())]);
            disk.read(8192, &IoBuf::alloc(4096)).await.unwrap();
            g.detach(disk).await;
        });
    }
}

#[test]
fn failing_children_are_reported_and_outvoted() {
    on_thread(RingUse::Off, || async {
        let child = |name: &str, rules: Value| {
            let disk = json!({ "driver": "null-co", "size": LEN, "read-zeroes": true });
            json!({ "driver": "blkdebug", "node-name": name, "inject-error": rules, "image": disk })
        };
        let fails = |kind: &str, errno: i64| json!([{ "event": "none", "iotype": kind, "errno": errno }]);
        let data = IoBuf::copy_of(&[0; 512]);
        for (kind, op) in [
            ("read", QuorumOpType::Read),
            ("write", QuorumOpType::Write),
            ("write-zeroes", QuorumOpType::Write),
            ("flush", QuorumOpType::Flush),
        ] {
            for failing in [1, 2] {
                let mut g = graph();
                let second = if failing == 2 { fails(kind, 28) } else { json!([]) };
                let children = [child("a", fails(kind, 5)), child("b", second), child("c", json!([]))];
                g.add(&options(&quorum(&children, 2, &json!({})))).await.unwrap();
                let disk = attach(&mut g, "top", writer()).await.unwrap();
                let result = match kind {
                    "read" => disk.read(0, &data).await,
                    "write" => disk.write(0, &data, WriteFlags::NONE).await,
                    "flush" => disk.flush().await,
                    _ => disk.zero(Span::new(0, 512), ZeroFlags::default()).await,
                };
                let mut want = vec![(op, true, "a".to_owned())];
                if failing == 2 {
                    // Of errors with as many votes the last one.
                    assert_eq!(result, Err(Errno::ENOSPC), "{kind}");
                    want.push((op, true, "b".to_owned()));
                    if kind != "flush" {
                        want.push((QuorumOpType::Read, false, "failure of top".to_owned()));
                    }
                } else {
                    assert_eq!(result, Ok(()), "{kind}");
                }
                assert_eq!(bad(&g), want, "{kind}");
                g.detach(disk).await;
                g.close_all().await;
            }
        }
        // The first that can be read; the others are not asked.
        let mut g = graph();
        let children = [child("a", fails("read", 5)), child("b", json!([])), child("c", fails("read", 5))];
        g.add(&options(&quorum(&children, 2, &json!({ "read-pattern": "fifo" })))).await.unwrap();
        let disk = attach(&mut g, "top", writer()).await.unwrap();
        assert_eq!(disk.read(0, &data).await, Ok(()));
        assert_eq!(bad(&g), [(QuorumOpType::Read, true, "a".to_owned())]);
        g.detach(disk).await;
        g.close_all().await;
    });
}

/// Writes go to the children one after the other; a reader that sees one of them without the other waits for it, and blames
/// nobody.
#[test]
fn a_write_under_way_is_no_corruption() {
    on_thread(RingUse::Auto, || async {
        let local = tokio::task::LocalSet::new();
        local
            .run_until(async {
                let files = [image(LEN), image(LEN)];
                let mut g = graph();
                let children = files.each_ref().map(|f| file(f.path()));
                g.add(&options(&quorum(&children, 2, &json!({ "rewrite-corrupted": true })))).await.unwrap();
                let disk = attach(&mut g, "top", writer()).await.unwrap();
                let mut tasks = tokio::task::JoinSet::new();
                for task in 0..8_u8 {
                    let disk = disk.clone();
                    tasks.spawn_local(async move {
                        for round in 0..100_u8 {
                            if task < 4 {
                                let data = IoBuf::copy_of(&[task.wrapping_mul(50).wrapping_add(round); 4096]);
                                disk.write(u64::from(task) * 2048, &data, WriteFlags::NONE).await.unwrap();
                            } else {
                                disk.read(0, &IoBuf::alloc(16384)).await.unwrap();
                            }
                        }
                    });
                }
                while let Some(done) = tasks.join_next().await {
                    done.unwrap();
                }
                g.detach(disk).await;
            })
            .await;
    });
}

#[test]
fn options_are_checked_and_children_come_and_go() {
    on_thread(RingUse::Off, || async {
        let null = |len: u64| json!({ "driver": "null-co", "size": len, "read-zeroes": true });
        let mut g = graph();
        let two = [null(LEN), null(LEN)];
        for (children, threshold, more, text) in [
            (&two[..0], 1, json!({}), "Number of provided children must be 1 or more"),
            (&two[..], 0, json!({}), "Parameter 'vote-threshold' expects a value >= 1"),
            (&two[..], -1, json!({}), "Parameter 'vote-threshold' expects a value >= 1"),
            (&two[..], 3, json!({}), "threshold may not exceed children count"),
            (&[null(LEN), null(4096)], 1, json!({}), "Could not refresh total sector count: Input/output error"),
            (
                &two[..],
                1,
                json!({ "blkverify": true }),
                "blkverify=on can only be set if there are exactly two files and vote-threshold is 2",
            ),
            (
                &two[..],
                2,
                json!({ "blkverify": true, "rewrite-corrupted": true }),
                "rewrite-corrupted=on cannot be used with blkverify=on",
            ),
        ] {
            assert_eq!(refused(&mut g, &quorum(children, threshold, &more)).await, text);
        }
        g.add(&options(&quorum(&two, 2, &json!({})))).await.unwrap();
        g.add(&options(&named("n", null(LEN)))).await.unwrap();
        let (top, n) = (g.get("top").unwrap().clone(), g.get("n").unwrap().clone());
        let names = |top: &block::Node| top.children().iter().map(|edge| edge.name().to_owned()).collect::<Vec<_>>();
        let mut change = block::graph::Change::new();
        change.add_child(&top, &n).unwrap();
        g.change(change).await.unwrap();
        assert_eq!(names(&top), ["children.0", "children.1", "children.2"]);
        let mut change = block::graph::Change::new();
        change.remove_child(&top, &top.children()[0]).unwrap();
        g.change(change).await.unwrap();
        assert_eq!(names(&top), ["children.1", "children.2"]);
        let text = block::graph::Change::new().remove_child(&top, &top.children()[0]).unwrap_err().to_string();
        assert_eq!(text, "The number of children cannot be lower than the vote threshold 2");
        assert_eq!(top.driver().filename().matches("null-co").count(), 2);
        g.close_all().await;
    });
}
