//! The request path against a flat model: whatever the driver's facts, a node behaves like a vector of bytes.
#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use block::disk::DiskOptions;
use block::perm::Bits;
use block::testing::{self, MemoryDriver};
use block::{Disk, Errno, Facts, Graph, NodeOptions, Perms, Span, Support, WriteFlags, ZeroFlags};
use buf::IoBuf;
use proptest::prelude::*;
use std::sync::atomic::Ordering;

const SIZE: usize = 64 << 10;

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

fn writer() -> DiskOptions {
    let perms = Perms { need: Bits::CONSISTENT_READ | Bits::WRITE, shared: Bits::ALL };
    DiskOptions { label: "a test".into(), perms, writethrough: false }
}

async fn disk(graph: &mut Graph, facts: Facts, options: NodeOptions) -> (Disk, std::sync::Arc<testing::Memory>) {
    let (driver, memory) = MemoryDriver::open(SIZE, facts);
    let node = graph.adopt("n", driver, options).await.unwrap();
    (graph.attach(&node, &writer()).await.unwrap(), memory)
}

fn facts() -> impl Strategy<Value = Facts> {
    let align = prop::sample::select(vec![1u32, 512, 4096]);
    let mem = prop::sample::select(vec![1u32, 512, 4096]);
    let transfer = prop::sample::select(vec![4096u32, 12288, 1 << 20]);
    let zero = prop::sample::select(vec![Support::None, Support::Native]);
    let fua = prop::sample::select(vec![Support::None, Support::Native]);
    let ends = prop::sample::select(vec![1u32, 512, 8192]);
    (align, mem, transfer, zero, fua, ends.clone(), ends, 1u64..40_000).prop_map(
        |(request_align, mem_align, max_transfer, zero, fua, zero_align, discard_align, longest)| Facts {
            request_align,
            mem_align,
            max_transfer,
            zero,
            fua,
            zero_align,
            discard_align,
            max_zero: longest.next_multiple_of(u64::from(zero_align.max(request_align))),
            max_discard: longest.next_multiple_of(u64::from(discard_align.max(request_align))),
            discard: Support::Native,
            ..Facts::default()
        },
    )
}

#[derive(Clone, Debug)]
enum Do {
    Read(usize, usize, usize),
    Write(usize, usize, usize, u8, bool),
    Zero(usize, usize, bool),
    Flush,
    Status(usize, usize),
}

fn work() -> impl Strategy<Value = Do> {
    let at = prop_oneof![0..SIZE, (0..SIZE / 512).prop_map(|s| s * 512)];
    let len = prop_oneof![1..20_000usize, (1..40usize).prop_map(|s| s * 512)];
    let skew = prop_oneof![Just(0usize), 1..600usize];
    prop_oneof![
        (at.clone(), len.clone(), skew.clone()).prop_map(|(a, l, s)| Do::Read(a, l, s)),
        (at.clone(), len.clone(), skew, 0u8..3, any::<bool>()).prop_map(|(a, l, s, b, f)| Do::Write(a, l, s, b, f)),
        (at.clone(), len.clone(), any::<bool>()).prop_map(|(a, l, f)| Do::Zero(a, l, f)),
        Just(Do::Flush),
        (at, len).prop_map(|(a, l)| Do::Status(a, l)),
    ]
}

fn span(at: usize, len: usize) -> Span {
    Span::new(at as u64, len as u64)
}

/// A buffer whose memory starts `skew` bytes off any alignment.
fn skewed(len: usize, skew: usize) -> IoBuf {
    IoBuf::alloc(len + skew).slice(skew, len)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn a_node_is_a_vector_of_bytes(
        facts in facts(),
        detect in any::<bool>(),
        todo in prop::collection::vec(work(), 1..40),
    ) {
        run(async move {
            let mut graph = testing::graph();
            let detect_zeroes = if detect { block::node::DetectZeroes::On } else { block::node::DetectZeroes::Off };
            let (disk, memory) = disk(&mut graph, facts, NodeOptions { detect_zeroes, ..NodeOptions::default() }).await;
            let mut model = vec![0u8; SIZE];
            for step in todo {
                match step {
                    Do::Read(at, len, skew) => {
                        let buf = skewed(len, skew);
                        buf.fill(0xEE);
                        let result = disk.read(at as u64, &buf).await;
                        if at + len > SIZE {
                            assert_eq!(result, Err(Errno::EIO));
                        } else {
                            assert_eq!(result, Ok(()));
                            assert!(buf.to_vec() == model[at..at + len], "read {at}+{len}");
                        }
                    }
                    Do::Write(at, len, skew, byte, fua) => {
                        let buf = skewed(len, skew);
                        buf.fill(byte);
                        let before = memory.flushes.load(Ordering::Relaxed);
                        let result = disk.write(at as u64, &buf, WriteFlags { fua }).await;
                        if at + len > SIZE {
                            assert_eq!(result, Err(Errno::EIO));
                        } else {
                            assert_eq!(result, Ok(()));
                            model[at..at + len].fill(byte);
                            if fua && disk.facts().fua == Support::None {
                                assert!(memory.flushes.load(Ordering::Relaxed) > before, "FUA without a flush");
                            }
                        }
                    }
                    Do::Zero(at, len, no_fallback) => {
                        let flags = ZeroFlags { no_fallback, ..ZeroFlags::default() };
                        let result = disk.zero(span(at, len), flags).await;
                        if at + len > SIZE {
                            assert_eq!(result, Err(Errno::EIO));
                        } else if result == Err(Errno::ENOTSUP) {
                            assert!(no_fallback);
                            // The fast part may have been done: take over what is there, but only zeroes may be new.
                            let now = memory.bytes.lock().unwrap().clone();
                            for i in 0..SIZE {
                                assert!(now[i] == model[i] || (now[i] == 0 && (at..at + len).contains(&i)));
                            }
                            model = now;
                        } else {
                            assert_eq!(result, Ok(()));
                            model[at..at + len].fill(0);
                        }
                    }
                    Do::Flush => assert_eq!(disk.flush().await, Ok(())),
                    Do::Status(at, len) if at + len <= SIZE => {
                        let status = disk.status(span(at, len)).await.unwrap();
                        let end = at + usize::try_from(status.len).unwrap();
                        assert!(status.len > 0 && end <= at + len);
                        assert!(!status.zero || model[at..end].iter().all(|b| *b == 0), "claimed zeroes");
                    }
                    Do::Status(..) => {}
                }
                assert!(*memory.bytes.lock().unwrap() == model);
            }
        });
    }

    /// Discards touch no byte outside their range.
    #[test]
    fn a_discard_stays_inside(facts in facts(), at in 0..SIZE, len in 1..30_000usize, unmap in any::<bool>()) {
        prop_assume!(at + len <= SIZE);
        run(async move {
            let mut graph = testing::graph();
            let (disk, memory) = disk(&mut graph, facts, NodeOptions { discard: unmap, ..NodeOptions::default() }).await;
            disk.discard(span(at, len)).await.unwrap();
            let bytes = memory.bytes.lock().unwrap();
            assert!(bytes[..at].iter().chain(&bytes[at + len..]).all(|b| *b == 0));
            assert!(unmap || bytes.iter().all(|b| *b == 0), "discard=ignore discards nothing");
        });
    }
}

/// Unaligned writes of neighbours at the same time lose nothing, whoever is first.
#[test]
fn read_modify_writes_are_serialised() {
    run(async {
        let mut graph = testing::graph();
        let facts = Facts { request_align: 4096, ..Facts::default() };
        let (disk, memory) = disk(&mut graph, facts, NodeOptions::default()).await;
        let local = tokio::task::LocalSet::new();
        local
            .run_until(async {
                let tasks: Vec<_> = (0..64u8)
                    .map(|i| {
                        let disk = disk.clone();
                        tokio::task::spawn_local(async move {
                            let buf = IoBuf::copy_of(&[i + 1; 100]);
                            disk.write(u64::from(i) * 100, &buf, WriteFlags::NONE).await
                        })
                    })
                    .collect();
                for task in tasks {
                    task.await.unwrap().unwrap();
                }
            })
            .await;
        let bytes = memory.bytes.lock().unwrap();
        for i in 0..64usize {
            assert!(bytes[i * 100..(i + 1) * 100].iter().all(|b| usize::from(*b) == i + 1), "write {i} was lost");
        }
    });
}

#[test]
fn a_flush_without_writes_since_the_last_is_free_but_the_first_is_not() {
    run(async {
        let mut graph = testing::graph();
        let (disk, memory) = disk(&mut graph, Facts::default(), NodeOptions::default()).await;
        let flushes = || memory.flushes.load(Ordering::Relaxed);
        disk.flush().await.unwrap();
        assert_eq!(flushes(), 1, "what an earlier process wrote becomes durable");
        disk.flush().await.unwrap();
        assert_eq!(flushes(), 1);
        disk.write(0, &IoBuf::zeroed(512), WriteFlags::NONE).await.unwrap();
        disk.flush().await.unwrap();
        assert_eq!(flushes(), 2);
        disk.discard(Span::new(0, 512)).await.unwrap();
        disk.flush().await.unwrap();
        assert_eq!(flushes(), 3);
    });
}

#[test]
fn a_failed_write_beyond_the_end_may_have_made_the_node_longer() {
    run(async {
        let mut graph = testing::graph();
        let (driver, memory) = MemoryDriver::open(SIZE, Facts::default());
        let node = graph.adopt("n", driver, NodeOptions::default()).await.unwrap();
        let perms = Perms { need: Bits::WRITE | Bits::RESIZE, shared: Bits::ALL };
        let _disk = graph.attach(&node, &DiskOptions { perms, ..writer() }).await.unwrap();
        memory.fails.store(true, Ordering::Relaxed);
        let written = node.write(SIZE as u64, &IoBuf::zeroed(4096), WriteFlags::NONE).await;
        assert_eq!((written, node.size()), (Err(Errno::ENOSPC), SIZE as u64 + 2048));
        memory.fails.store(false, Ordering::Relaxed);
        assert_eq!(node.write(SIZE as u64, &IoBuf::zeroed(4096), WriteFlags::NONE).await, Ok(()));
        assert_eq!(node.size(), SIZE as u64 + 4096);
    });
}
