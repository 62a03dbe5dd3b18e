//! The contract of a driver: random requests against a flat model, then the ends.
#![allow(clippy::panic, clippy::cast_possible_truncation, reason = "test code")]

use super::{attach, graph, on_thread, options, writer};
use block::{Disk, Errno, Graph, Span, WriteFlags, ZeroFlags};
use buf::IoBuf;
use io::RingUse;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::Value;
use std::path::Path;

pub const SIZE: u64 = 256 << 10;

#[derive(Clone, Debug)]
pub enum Op {
    Read(u64, u64),
    Write(u64, u64, u8, bool),
    Zero(u64, u64, ZeroFlags),
    Discard(u64, u64),
    Flush,
    Status(u64, u64),
    Resize(u64),
}

/// Offsets and lengths of all kinds: aligned to blocks, to sectors, to nothing.
pub fn span() -> impl Strategy<Value = (u64, u64)> {
    (prop_oneof![Just(4096u64), Just(512), Just(1)], 0..SIZE, 1u64..40_000)
        .prop_map(|(unit, at, len)| (at / unit * unit, len.next_multiple_of(unit)))
}

pub fn op() -> impl Strategy<Value = Op> {
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
pub struct Model(pub Vec<Option<u8>>);

impl Model {
    /// Cuts a range to what is there; none if nothing is.
    fn cut(&self, at: u64, len: u64) -> Option<std::ops::Range<usize>> {
        let end = (at + len).min(self.0.len() as u64);
        (at < end).then_some(at as usize..end as usize)
    }

    pub fn check(&self, range: std::ops::Range<usize>, got: &[u8]) {
        for (i, (want, got)) in self.0[range.clone()].iter().zip(got).enumerate() {
            assert!(want.is_none_or(|want| want == *got), "byte {}: {want:?}, not {got}", range.start + i);
        }
    }
}

pub async fn apply(graph: &mut Graph, disk: &Disk, model: &mut Model, op: &Op, resizes: bool) {
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
pub fn check(ring: RingUse, json: Value, resizes: bool, file: Option<(&Path, u64)>) {
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

pub async fn ends(disk: &Disk) {
    let byte = IoBuf::alloc(1);
    assert_eq!(disk.read(disk.size(), &byte).await, Err(Errno::EIO));
    assert_eq!(disk.write(disk.size(), &byte, WriteFlags::NONE).await, Err(Errno::EIO));
    assert_eq!(disk.zero(Span::new(disk.size(), 1), ZeroFlags::default()).await, Err(Errno::EIO));
    assert_eq!(disk.discard(Span::new(u64::MAX, 2)).await, Err(Errno::EIO));
}
