//! QCOW2 images: opened, read, written to, checked and repaired, in memory. Errors are fine; a panic, an endless loop or memory
//! without bound is not. The seeds are made by qemu-img (`tests/fuzz/run`).
#![no_main]

use block::check::Fix;
use block::disk::DiskOptions;
use block::driver::Prealloc;
use block::perm::Bits;
use block::snapshot::SnapshotFacts;
use block::{
    Driver, Errno, Facts, Graph, IoResult, Mapping, NodeOptions, Perms, Span, WriteFlags, ZeroFlags,
};
use buf::IoBuf;
use libfuzzer_sys::fuzz_target;
use qapi::Qapi;
use qapi::types::block::BlockdevOptions;
use serde_json::json;
use std::sync::{Arc, Mutex};

/// The most bytes that an image may grow to.
const FULL: usize = 4 << 20;

/// A small disk.
struct Medium(Mutex<Vec<u8>>);

impl Driver for Medium {
    fn name(&self) -> &'static str {
        "medium"
    }

    fn facts(&self) -> Facts {
        Facts::default()
    }

    async fn length(&self) -> IoResult<u64> {
        Ok(self.0.lock().unwrap().len() as u64)
    }

    async fn read(&self, at: u64, buf: &IoBuf) -> IoResult {
        buf.fill(0);
        let bytes = self.0.lock().unwrap();
        let at = usize::try_from(at).unwrap_or(usize::MAX).min(bytes.len());
        buf.write_at(0, &bytes[at..at.saturating_add(buf.len()).min(bytes.len())]);
        Ok(())
    }

    async fn write(&self, at: u64, buf: &IoBuf, _: WriteFlags) -> IoResult {
        let mut bytes = self.0.lock().unwrap();
        let at = usize::try_from(at).unwrap_or(usize::MAX);
        let end = at.saturating_add(buf.len());
        if end > FULL {
            return Err(Errno::ENOSPC);
        }
        if end > bytes.len() {
            bytes.resize(end, 0);
        }
        buf.read_at(0, &mut bytes[at..end]);
        Ok(())
    }

    async fn flush(&self) -> IoResult {
        Ok(())
    }

    async fn map(&self, span: Span, _: bool) -> IoResult<Mapping> {
        Ok(Mapping::data(span.len, span.at))
    }

    async fn truncate(&self, size: u64, _: bool, _: Prealloc) -> qapi::Result<()> {
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        if size > FULL {
            return Err(qapi::Error::generic("the disk is full"));
        }
        self.0.lock().unwrap().resize(size, 0);
        Ok(())
    }
}

async fn work(image: &[u8]) {
    let choice = image.iter().fold(0u8, |sum, byte| sum.wrapping_mul(31).wrapping_add(*byte));
    let read_only = choice % 4 == 0;
    let mut graph = Graph::new(Arc::new(formats::Formats::new(drivers::Drivers::default(), formats::Workers::default())));
    let medium = Box::new(Medium(Mutex::new(image.to_vec())));
    graph.adopt("medium", medium, NodeOptions::default()).await.unwrap();
    let medium = Arc::clone(graph.get("medium").unwrap());
    let perms = |need| DiskOptions { label: "fuzz".into(), perms: Perms { need, shared: Bits::ALL }, writethrough: false };
    if choice % 3 == 0 {
        let need = Bits::CONSISTENT_READ | Bits::WRITE | Bits::RESIZE;
        let disk = graph.attach(&medium, &perms(need)).await.unwrap();
        let _ = formats::qcow2::check::check(Arc::clone(&medium), Fix::Nothing).await;
        if !read_only {
            let _ = formats::qcow2::check::check(Arc::clone(&medium), Fix::All).await;
        }
        graph.detach(disk).await;
    }
    let node = json!({
        "driver": "qcow2", "node-name": "q", "file": "medium", "backing": null, "discard": "unmap",
        "read-only": read_only, "cache-clean-interval": 0,
        "overlap-check": if choice % 5 == 0 { "all" } else { "cached" },
    });
    if graph.add(&BlockdevOptions::from_value(&node).unwrap()).await.is_ok() {
        let node = Arc::clone(graph.get("q").unwrap());
        let _ = node.driver().image_info().await;
        let need = Bits::CONSISTENT_READ | if read_only { Bits::NONE } else { Bits::WRITE };
        if let Ok(disk) = graph.attach(&node, &perms(need)).await {
            if choice % 7 == 0 {
                graph.outlive(&disk);
            }
            let size = disk.size().min(1 << 20);
            let step = (size / 12).max(512) / 512 * 512;
            for at in (0..size).step_by(step as usize) {
                let len = (size - at).min(9 << 10);
                let buf = IoBuf::zeroed(len as usize);
                let _ = disk.read(at, &buf).await;
                let _ = disk.status(Span::new(at, len)).await;
                if !read_only {
                    let _ = disk.write(at, &buf, WriteFlags::NONE).await;
                    let flags = ZeroFlags { may_unmap: at % 1024 == 0, ..ZeroFlags::default() };
                    let _ = disk.zero(Span::new(at + len / 2, len - len / 2), flags).await;
                    let _ = disk.discard(Span::new(at, len)).await;
                    let _ = disk.flush().await;
                }
            }
            graph.detach(disk).await;
        }
        if let Some(check) = node.driver().check_control() {
            let _ = check.check(if read_only { Fix::Nothing } else { Fix::All }).await;
        }
        if !read_only && let Some(snapshots) = node.driver().snapshots() {
            for snapshot in snapshots.list().await.unwrap_or_default() {
                let _ = snapshots.delete(&snapshot.id).await;
            }
            for id in ["a", "b"] {
                let facts = SnapshotFacts { id: id.to_owned(), name: id.to_owned(), ..SnapshotFacts::default() };
                let _ = snapshots.create(&facts).await;
            }
            let _ = snapshots.delete("a").await;
        }
        if !read_only {
            let _ = graph.resize(&node, node.size() / 2 / 512 * 512).await;
            let _ = graph.resize(&node, node.size().saturating_add(1 << 20)).await;
        }
    }
    graph.close_all().await;
}

fuzz_target!(|image: &[u8]| {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, work(image));
});
