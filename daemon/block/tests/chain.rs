//! Reads down a chain of backing links, where the core goes from node to node without the drivers that only pass them on:
//! the bytes, the checks and the counters are those of a read that each driver does itself.
#![cfg(not(loom))]
#![expect(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test fails by panicking")]

use block::disk::DiskOptions;
use block::driver::LocalFuture;
use block::perm::Bits;
use block::stats::Op;
use block::testing::MemoryDriver;
use block::{
    CreateContext, Disk, Driver, DynDriver, Edge, Errno, Facts, Graph, IoResult, Mapping, Node, NodeOptions,
    OpenContext, Opener, Perms, Role, Span, WriteFlags,
};
use buf::IoBuf;
use proptest::prelude::*;
use qapi::Qapi;
use qapi::types::block::{BlockdevDriverOptions, BlockdevOptions};
use qapi::types::create::BlockdevCreateOptions;
use serde_json::json;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const UNIT: u64 = 4096;
/// The greatest length of a layer, in bytes.
const LEN: u64 = 16 * UNIT;

/// What a layer is.
#[derive(Clone, Debug)]
struct Shape {
    facts: Facts,
    len: u64,
    /// These bytes are its own, each of them 0x80.
    own: Range<u64>,
}

/// What a test sees of a layer, and says to it.
#[derive(Debug, Default)]
struct Seen {
    /// Reads that the driver has done itself.
    reads: AtomicU64,
    /// Reads that it has sent on.
    sent: AtomicU64,
    /// It does all reads itself.
    hides: AtomicBool,
}

struct Layer {
    shape: Shape,
    seen: Arc<Seen>,
    below: Arc<Edge>,
}

impl Layer {
    fn check(&self, span: Span) {
        let Facts { request_align, max_transfer, .. } = self.shape.facts;
        assert!(span.at.is_multiple_of(request_align.into()) && span.len.is_multiple_of(request_align.into()));
        assert!(span.len <= max_transfer.into(), "{span:?} is too long");
    }
}

impl Driver for Layer {
    fn name(&self) -> &'static str {
        "layer"
    }

    fn facts(&self) -> Facts {
        self.shape.facts.clone()
    }

    async fn length(&self) -> IoResult<u64> {
        Ok(self.shape.len)
    }

    async fn read(&self, at: u64, buf: &IoBuf) -> IoResult {
        self.seen.reads.fetch_add(1, Ordering::Relaxed);
        let end = at + buf.len() as u64;
        self.check(Span::new(at, buf.len() as u64));
        let own = &self.shape.own;
        let cuts = [at, own.start.clamp(at, end), own.end.clamp(at, end), end];
        for cut in cuts.windows(2).filter(|cut| cut[0] < cut[1]) {
            let part = buf.slice((cut[0] - at) as usize, (cut[1] - cut[0]) as usize);
            if own.contains(&cut[0]) { part.fill(0x80) } else { self.below.read(cut[0], &part).await? }
        }
        Ok(())
    }

    fn read_through(&self, span: Span) -> Option<Arc<Node>> {
        self.check(span);
        assert!(span.end() <= self.shape.len, "{span:?} is beyond the end");
        let own = &self.shape.own;
        let through = span.end() <= own.start || own.end <= span.at;
        let sends = through && !self.seen.hides.load(Ordering::Relaxed);
        self.seen.sent.fetch_add(u64::from(sends), Ordering::Relaxed);
        sends.then(|| self.below.node())
    }

    async fn write(&self, _at: u64, _buf: &IoBuf, _flags: WriteFlags) -> IoResult {
        Err(Errno::ENOTSUP)
    }

    async fn flush(&self) -> IoResult {
        Ok(())
    }

    async fn map(&self, span: Span, _precise: bool) -> IoResult<Mapping> {
        Ok(Mapping::data(span.len, span.at))
    }
}

/// `raw` is the next of these layers over its child.
struct Layers(Vec<(Shape, Arc<Seen>)>);

impl Opener for Layers {
    fn open<'a>(
        &'a self,
        cx: &'a mut OpenContext<'_>,
        options: &'a BlockdevOptions,
    ) -> LocalFuture<'a, qapi::Result<Box<dyn DynDriver>>> {
        Box::pin(async move {
            let BlockdevDriverOptions::Raw(raw) = &options.driver else {
                return Err(qapi::Error::generic("no such driver in this test"));
            };
            let (shape, seen) = self.0.get(usize::try_from(raw.offset.unwrap()).unwrap()).unwrap().clone();
            Ok(Box::new(Layer { shape, seen, below: cx.child("backing", Role::Backing, &raw.file).await? }) as Box<_>)
        })
    }

    fn create<'a>(
        &'a self,
        _cx: &'a mut dyn CreateContext,
        _options: &'a BlockdevCreateOptions,
    ) -> LocalFuture<'a, qapi::Result<()>> {
        Box::pin(async { Err(qapi::Error::generic("nothing is made in this test")) })
    }
}

/// Layers over `bottom`, the last of them the top, as a graph and a user of it.
async fn chain(shapes: &[Shape], bottom: Box<dyn DynDriver>) -> (Graph, Disk, Vec<Arc<Seen>>) {
    let layers: Vec<_> = shapes.iter().map(|shape| (shape.clone(), Arc::default())).collect();
    let seen = layers.iter().map(|(_, seen)| Arc::clone(seen)).collect();
    let mut graph = Graph::new(Arc::new(Layers(layers)));
    let mut below = "bottom".to_owned();
    let mut node = graph.adopt(&below, bottom, NodeOptions::default()).await.unwrap();
    for index in 0..shapes.len() {
        let name = format!("layer{index}");
        let options = json!({ "driver": "raw", "node-name": name, "file": below, "offset": index });
        node = graph.add(&BlockdevOptions::from_value(&options).unwrap()).await.unwrap();
        below = name;
    }
    let perms = Perms { need: Bits::CONSISTENT_READ, shared: Bits::ALL };
    let user = DiskOptions { label: "a test".into(), perms, writethrough: false };
    let disk = graph.attach(&node, &user).await.unwrap();
    (graph, disk, seen)
}

fn run<T>(future: impl Future<Output = T>) -> T {
    let local = tokio::task::LocalSet::new();
    local.block_on(&tokio::runtime::Builder::new_current_thread().build().unwrap(), future)
}

/// Bytes 1, 2, ... of the bottom.
fn pattern(at: u64) -> u8 {
    (at / 512 % 100) as u8 + 1
}

fn bottom(len: u64, facts: Facts) -> Box<dyn DynDriver> {
    let (driver, memory) = MemoryDriver::open(len as usize, facts);
    for (at, byte) in (0..).zip(memory.bytes.lock().unwrap().iter_mut()) {
        *byte = pattern(at);
    }
    driver
}

fn plain(len: u64) -> Shape {
    Shape { facts: Facts::default(), len, own: 0..0 }
}

/// Operations, bytes and failures of reads.
fn counted(graph: &Graph, name: &str) -> (u64, u64, u64) {
    let read = graph.get(name).unwrap().stats().read(Op::Read);
    (read.operations, read.bytes, read.failed)
}

#[test]
fn each_layer_counts_a_read_that_passes_it() {
    run(async {
        let shapes = vec![plain(LEN); 6];
        let (graph, disk, seen) = chain(&shapes, bottom(LEN, Facts::default())).await;
        let buf = IoBuf::zeroed(700);
        for at in [0, 5000] {
            disk.read(at, &buf).await.unwrap();
            assert!(buf.to_vec().iter().zip(at..).all(|(byte, at)| *byte == pattern(at)));
        }
        for index in 0..shapes.len() {
            assert_eq!(counted(&graph, &format!("layer{index}")), (2, 1400, 0));
        }
        assert_eq!(counted(&graph, "bottom"), (2, 1400, 0));
        // The driver at the top reads through its link, and the core goes down from there.
        let reads = |index: usize| seen[index].reads.load(Ordering::Relaxed);
        assert_eq!((0..6).map(reads).collect::<Vec<_>>(), [0, 0, 0, 0, 0, 2]);
        // A driver in the middle that wants to read itself does.
        seen[2].hides.store(true, Ordering::Relaxed);
        disk.read(0, &buf).await.unwrap();
        assert_eq!((0..6).map(reads).collect::<Vec<_>>(), [0, 0, 1, 0, 0, 3]);
        assert_eq!(counted(&graph, "layer1"), (3, 2100, 0));
        assert_eq!(counted(&graph, "layer4"), (3, 2100, 0));
    });
}

/// Reads nothing.
struct Broken;

impl Driver for Broken {
    fn name(&self) -> &'static str {
        "broken"
    }
    fn facts(&self) -> Facts {
        Facts::default()
    }
    async fn length(&self) -> IoResult<u64> {
        Ok(LEN)
    }
    async fn read(&self, _at: u64, _buf: &IoBuf) -> IoResult {
        Err(Errno::ENOMEDIUM)
    }
    async fn write(&self, _at: u64, _buf: &IoBuf, _flags: WriteFlags) -> IoResult {
        Err(Errno::ENOTSUP)
    }
    async fn flush(&self) -> IoResult {
        Ok(())
    }
    async fn map(&self, span: Span, _precise: bool) -> IoResult<Mapping> {
        Ok(Mapping::data(span.len, span.at))
    }
}

#[test]
fn each_layer_counts_a_failure_below_it() {
    run(async {
        let (graph, disk, _) = chain(&[plain(LEN), plain(LEN), plain(LEN), plain(LEN)], Box::new(Broken)).await;
        assert_eq!(disk.read(0, &IoBuf::zeroed(512)).await, Err(Errno::ENOMEDIUM));
        for name in ["layer3", "layer2", "layer1", "layer0", "bottom"] {
            assert_eq!(counted(&graph, name), (0, 0, 1), "{name}");
        }
    });
}

#[test]
fn behind_the_end_of_a_layer_is_zero() {
    run(async {
        // The second is shorter than what is below it and above it.
        let shapes = [plain(LEN), plain(LEN), plain(4 * UNIT), plain(LEN), plain(LEN)];
        let (graph, disk, seen) = chain(&shapes, bottom(LEN, Facts::default())).await;
        let buf = IoBuf::alloc(UNIT as usize);
        for (at, inside) in [(0, 4096), (3 * UNIT, 4096), (4 * UNIT - 512, 512), (4 * UNIT, 0), (9 * UNIT, 0)] {
            buf.fill(0xEE);
            disk.read(at, &buf).await.unwrap();
            let expected: Vec<u8> = (at..at + UNIT).map(|b| if b < at + inside { pattern(b) } else { 0 }).collect();
            assert!(buf.to_vec() == expected, "from {at}");
        }
        // Above it all of each read has been read, below it only what it has.
        for (name, bytes) in [("layer3", 5 * UNIT), ("layer2", 5 * UNIT), ("layer1", 2 * UNIT + 512)] {
            assert_eq!(counted(&graph, name).1, bytes, "{name}");
        }
        assert_eq!(counted(&graph, "layer2").0, 5);
        assert_eq!(counted(&graph, "bottom").0, 3);
        assert_eq!(seen[3].sent.load(Ordering::Relaxed), 5);
        assert_eq!(seen[2].sent.load(Ordering::Relaxed), 2, "only those that end inside");
    });
}

fn shape() -> impl Strategy<Value = Shape> {
    let align = prop::sample::select(vec![1u32, 512, 4096]);
    let mem = prop::sample::select(vec![1u32, 512]);
    let transfer = prop::sample::select(vec![4096u32, 12288, 1 << 20]);
    (align, mem, transfer, 1..=LEN / UNIT, 0..LEN / 512, 0..20u64).prop_map(
        |(request_align, mem_align, max_transfer, len, from, own)| Shape {
            facts: Facts { request_align, mem_align, max_transfer, ..Facts::default() },
            len: len * UNIT,
            own: from * 512..(from + own) * 512,
        },
    )
}

/// What byte `at` of the topmost of these layers is.
fn byte(shapes: &[Shape], at: u64) -> u8 {
    match shapes.split_last() {
        None => pattern(at),
        Some((top, _)) if at >= top.len => 0,
        Some((top, _)) if top.own.contains(&at) => 0x80,
        Some((_, below)) => byte(below, at),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever the layers' lengths and limits: the core asks a driver only within them, and the bytes are right.
    #[test]
    fn the_limits_of_each_layer_hold(
        shapes in prop::collection::vec(shape(), 1..6),
        bottom_facts in shape(),
        reads in prop::collection::vec((0..LEN, 1..20_000usize, 0..3usize), 1..20),
    ) {
        run(async move {
            let (_graph, disk, _) = chain(&shapes, bottom(LEN, bottom_facts.facts)).await;
            for (at, len, skew) in reads {
                let len = len.min(disk.size().saturating_sub(at) as usize);
                if len == 0 {
                    continue;
                }
                let buf = IoBuf::alloc(len + skew).slice(skew, len);
                buf.fill(0xEE);
                disk.read(at, &buf).await.unwrap();
                let expected: Vec<u8> = (at..at + len as u64).map(|at| byte(&shapes, at)).collect();
                assert!(buf.to_vec() == expected, "{len} bytes from {at}");
            }
        });
    }
}
