//! `copy-on-read` over layers with backing files, which a driver of this test stands for.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "test code")]

mod common;

use block::driver::LocalFuture;
use block::{
    Driver, DynDriver, Edge, Facts, Graph, IoResult, Mapping, OpenContext, Opener, Perms, Role, Span, WriteFlags,
};
use buf::IoBuf;
use common::suite::{SIZE, check};
use common::{attach, image, on_thread, options, refused, writer};
use drivers::Drivers;
use io::RingUse;
use qapi::types::block::{BlockdevDriverOptions, BlockdevOptions};
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

const LEN: u64 = 64 << 10;

/// What a test sees of a layer: its own sectors.
type Sectors = Arc<Mutex<BTreeMap<u64, Vec<u8>>>>;

/// A layer that keeps what is written and shows its backing file elsewhere.
struct Layer {
    own: Sectors,
    backing: Arc<Edge>,
}

impl Driver for Layer {
    fn name(&self) -> &'static str {
        "layer"
    }

    fn facts(&self) -> Facts {
        Facts { request_align: 512, ..Facts::default() }
    }

    async fn length(&self) -> IoResult<u64> {
        Ok(LEN)
    }

    async fn read(&self, at: u64, buf: &IoBuf) -> IoResult {
        for (i, sector) in (0..buf.len() / 512).zip(at / 512..) {
            let part = buf.slice(i * 512, 512);
            let own = self.own.lock().unwrap().get(&sector).cloned();
            match own {
                Some(bytes) => drop(part.write_at(0, &bytes)),
                None => self.backing.read(sector * 512, &part).await?,
            }
        }
        Ok(())
    }

    async fn write(&self, at: u64, buf: &IoBuf, _flags: WriteFlags) -> IoResult {
        tokio::task::yield_now().await;
        for (bytes, sector) in buf.to_vec().chunks(512).zip(at / 512..) {
            self.own.lock().unwrap().insert(sector, bytes.to_vec());
        }
        Ok(())
    }

    async fn flush(&self) -> IoResult {
        Ok(())
    }

    fn child_perms(&self, _child: &Edge, _of_node: Perms) -> Perms {
        common::READER
    }

    async fn map(&self, span: Span, _precise: bool) -> IoResult<Mapping> {
        let allocated = self.own.lock().unwrap().contains_key(&(span.at / 512));
        Ok(Mapping { allocated, ..Mapping::data(512, span.at) })
    }
}

/// The real table, but `raw` with an offset is a [`Layer`] over its child.
struct Layers {
    drivers: Drivers,
    top: Sectors,
}

impl Opener for Layers {
    fn open<'a>(
        &'a self,
        cx: &'a mut OpenContext<'_>,
        options: &'a BlockdevOptions,
    ) -> LocalFuture<'a, qapi::Result<Box<dyn DynDriver>>> {
        Box::pin(async move {
            match &options.driver {
                BlockdevDriverOptions::Raw(raw) if raw.offset.is_some() => {
                    let backing = cx.child("backing", Role::Backing, &raw.file).await?;
                    let own = if raw.offset == Some(1) { Arc::clone(&self.top) } else { Sectors::default() };
                    Ok(Box::new(Layer { own, backing }) as Box<dyn DynDriver>)
                }
                _ => self.drivers.open(cx, options).await,
            }
        })
    }

    fn create<'a>(
        &'a self,
        _cx: &'a mut dyn block::CreateContext,
        _options: &'a qapi::types::create::BlockdevCreateOptions,
    ) -> LocalFuture<'a, qapi::Result<()>> {
        Box::pin(async { Err(qapi::Error::generic("nothing is made in this test")) })
    }
}

fn graph() -> (Graph, Sectors) {
    let top = Sectors::default();
    (Graph::new(Arc::new(Layers { drivers: Drivers::default(), top: Arc::clone(&top) })), top)
}

#[test]
fn keeps_the_contract() {
    let file = image(2 * SIZE);
    let json = json!({
        "driver": "copy-on-read", "node-name": "top", "discard": "unmap",
        "file": { "driver": "file", "filename": file.path() }
    });
    check(RingUse::Auto, json, true, Some((file.path(), 0)));
}

#[test]
fn what_is_read_is_copied_once_and_down_to_the_bottom() {
    let file = image(LEN);
    std::fs::write(file.path(), vec![7; LEN as usize]).unwrap();
    for (bottom, copied) in [(None, true), (Some("base"), true), (Some("middle"), false), (Some("upper"), false)] {
        let path = file.path().to_owned();
        on_thread(RingUse::Auto, move || async move {
            let (mut g, top) = graph();
            g.add(&options(&json!({ "driver": "file", "node-name": "base", "filename": path, "read-only": true })))
                .await
                .unwrap();
            let layer = |name: &str, offset: u32, below: &str| json!({ "driver": "raw", "node-name": name, "offset": offset, "file": below });
            g.add(&options(&layer("middle", 2, "base"))).await.unwrap();
            g.add(&options(&layer("upper", 1, "middle"))).await.unwrap();
            let mut cor = json!({ "driver": "copy-on-read", "node-name": "top", "file": "upper" });
            if let Some(bottom) = bottom {
                cor["bottom"] = bottom.into();
            }
            g.add(&options(&cor)).await.unwrap();
            let disk = attach(&mut g, "top", writer()).await.unwrap();
            let nine = IoBuf::copy_of(&[9; 512]);
            disk.write(1024, &nine, WriteFlags::NONE).await.unwrap();
            // A read that crosses what is there and what is not, off the sectors.
            let buf = IoBuf::alloc(2000);
            disk.read(300, &buf).await.unwrap();
            let mut want = vec![7; 2000];
            want[724..1236].fill(9);
            assert_eq!(buf.to_vec(), want);
            let own: Vec<u64> = top.lock().unwrap().keys().copied().collect();
            let all: &[u64] = if copied { &[0, 1, 2, 3, 4] } else { &[2] };
            assert_eq!(own, all, "bottom {bottom:?}");
            // Again: nothing is left to copy.
            let writes = g.get("upper").unwrap().stats().read(block::stats::Op::Write).operations;
            disk.read(300, &buf).await.unwrap();
            assert_eq!(buf.to_vec(), want);
            assert_eq!(g.get("upper").unwrap().stats().read(block::stats::Op::Write).operations, writes);
            g.detach(disk).await;
        });
    }
}

/// Reads that copy and writes of the same bytes at the same time: no write is lost, whatever the order.
#[test]
fn a_copy_never_takes_the_place_of_a_write() {
    let file = image(LEN);
    let path = file.path().to_owned();
    on_thread(RingUse::Auto, move || async move {
        let (mut g, _top) = graph();
        g.add(&options(&json!({ "driver": "file", "node-name": "base", "filename": path, "read-only": true })))
            .await
            .unwrap();
        let json = json!({
            "driver": "copy-on-read", "node-name": "top",
            "file": { "driver": "raw", "offset": 1, "file": "base" }
        });
        g.add(&options(&json)).await.unwrap();
        let disk = attach(&mut g, "top", writer()).await.unwrap();
        let mut tasks = Vec::new();
        for i in 0..32_u64 {
            let (reader, user) = (disk.clone(), disk.clone());
            tasks.push(tokio::task::spawn_local(async move {
                reader.read(i * 1024, &IoBuf::alloc(1024)).await.unwrap();
            }));
            tasks.push(tokio::task::spawn_local(async move {
                user.write(i * 1024 + 512, &IoBuf::copy_of(&[5; 512]), WriteFlags::NONE).await.unwrap();
            }));
        }
        for task in tasks {
            task.await.unwrap();
        }
        let all = IoBuf::alloc(32 * 1024);
        disk.read(0, &all).await.unwrap();
        for pair in all.to_vec().chunks(1024) {
            assert!(pair[..512].iter().all(|b| *b == 0) && pair[512..].iter().all(|b| *b == 5));
        }
        g.detach(disk).await;
    });
}

#[test]
fn the_bottom_is_checked() {
    on_thread(RingUse::Off, || async {
        let (mut g, _) = graph();
        g.add(&options(&json!({ "driver": "null-co", "node-name": "other" }))).await.unwrap();
        let cor = |bottom: &str| json!({ "driver": "copy-on-read", "node-name": "c", "file": { "driver": "null-co", "node-name": "n" }, "bottom": bottom });
        assert_eq!(refused(&mut g, &cor("nope")).await, "Bottom node 'nope' not found");
        assert_eq!(refused(&mut g, &cor("other")).await, "Bottom node 'other' is not in the chain of node 'n'");
        g.add(&options(&json!({ "driver": "null-co", "node-name": "ro", "read-only": true }))).await.unwrap();
        let text = refused(&mut g, &json!({ "driver": "copy-on-read", "node-name": "c", "file": "ro" })).await;
        assert_eq!(text, "Block node is read-only");
    });
}
