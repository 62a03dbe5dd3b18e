//! `preallocate`: the contract, and what it does to the length of the file below.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "test code")]

mod common;

use block::perm::Bits;
use block::{Perms, Span, WriteFlags, ZeroFlags};
use buf::IoBuf;
use common::suite::{SIZE, check};
use common::{attach, graph, image, on_thread, options, refused, writer};
use io::RingUse;
use serde_json::json;

const MIB: u64 = 1 << 20;

#[test]
fn preallocate_keeps_the_contract() {
    let file = image(2 * SIZE);
    for more in [json!({}), json!({ "prealloc-size": 5000, "prealloc-align": 1536 })] {
        let mut json = json!({
            "driver": "preallocate", "node-name": "top", "discard": "unmap",
            "file": { "driver": "file", "filename": file.path() }
        });
        json.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        check(RingUse::Auto, json, true, Some((file.path(), 0)));
    }
}

/// A user that may make the node longer by writing, as a format is.
fn grower() -> Perms {
    Perms { need: writer().need | Bits::RESIZE, shared: Bits::CONSISTENT_READ }
}

#[test]
fn space_is_reserved_while_a_user_may_grow_the_node() {
    let file = image(0);
    let path = file.path().to_owned();
    on_thread(RingUse::Auto, move || async move {
        let length = || std::fs::metadata(&path).unwrap().len();
        let mut g = graph();
        let json = json!({
            "driver": "preallocate", "node-name": "top", "prealloc-size": 4 * MIB, "prealloc-align": MIB,
            "file": { "driver": "file", "filename": &path, "node-name": "f" }
        });
        g.add(&options(&json)).await.unwrap();
        let disk = attach(&mut g, "top", grower()).await.unwrap();
        let node = disk.node();
        let data = IoBuf::copy_of(&[7; 10_000]);
        node.write(0, &data, WriteFlags::NONE).await.unwrap();
        if length() == 10_000 {
            println!("skipped: no fast zeroes on this file system");
            return;
        }
        assert_eq!((length(), node.size()), (5 * MIB, 10_240));
        // Nothing more has to be reserved for these.
        node.write(100_000, &data, WriteFlags::NONE).await.unwrap();
        node.zero(Span::new(200_000, MIB), ZeroFlags::default()).await.unwrap();
        assert_eq!(length(), 5 * MIB);
        // What nobody has written reads as zeroes.
        let between = IoBuf::alloc(90_000);
        between.fill(1);
        node.read(10_000, &between).await.unwrap();
        assert!(between.is_zero());
        // Nobody else may look at the length, or change the file.
        let text = attach(&mut g, "f", writer()).await.unwrap_err().to_string();
        assert!(text.contains("'write'") && text.contains("unshared"), "{text}");
        node.truncate(2 * MIB, true, block::Prealloc::Off).await.unwrap();
        assert_eq!((length(), node.size()), (5 * MIB, 2 * MIB));
        node.write(5 * MIB - 1, &data, WriteFlags::NONE).await.unwrap();
        assert_eq!(length(), 10 * MIB);
        let all = IoBuf::alloc(1000);
        all.fill(1);
        node.read(2 * MIB - 500, &all).await.unwrap();
        assert!(all.is_zero());
        // The last user that may grow it goes.
        g.detach(disk).await;
        assert_eq!(length(), 5 * MIB - 1 + 10_000);
        // One that may only write reserves nothing, and one more that may grow it begins anew.
        let disk = attach(&mut g, "top", writer()).await.unwrap();
        disk.write(0, &data, WriteFlags::NONE).await.unwrap();
        assert_eq!(length(), 5 * MIB - 1 + 10_000);
        g.detach(disk).await;
        let disk = attach(&mut g, "top", grower()).await.unwrap();
        disk.node().write(6 * MIB, &data, WriteFlags::NONE).await.unwrap();
        assert!(length() > 10 * MIB);
        disk.node().truncate(MIB, true, block::Prealloc::Off).await.unwrap();
        assert_eq!(length(), MIB);
        disk.node().write(MIB, &data, WriteFlags::NONE).await.unwrap();
        assert!(length() > 5 * MIB);
        // The end of everything.
        g.detach(disk).await;
        g.close_all().await;
        assert_eq!(length(), MIB + 10_000);
    });
}

#[test]
fn a_node_that_cannot_reserve_is_written_to_as_ever() {
    on_thread(RingUse::Off, || async {
        let mut g = graph();
        for (more, text) in [
            (json!({ "prealloc-align": 3 }), "prealloc-align parameter of preallocate filter is not aligned to 512"),
            (json!({ "prealloc-align": -512 }), "Value '-512' is out of range for parameter 'prealloc-align'"),
            (json!({ "prealloc-size": -5 }), "Value '-5' is out of range for parameter 'prealloc-size'"),
        ] {
            let mut json = json!({ "driver": "preallocate", "node-name": "n", "file": { "driver": "null-co" } });
            json.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            assert_eq!(refused(&mut g, &json).await, text);
        }
        let file = image(0);
        let json = json!({
            "driver": "preallocate", "node-name": "top",
            "file": {
                "driver": "blkdebug", "image": { "driver": "file", "filename": file.path() },
                "inject-error": [{ "event": "none", "iotype": "write-zeroes", "errno": 28 }]
            }
        });
        g.add(&options(&json)).await.unwrap();
        let disk = attach(&mut g, "top", grower()).await.unwrap();
        disk.node().write(0, &IoBuf::copy_of(&[3; 700]), WriteFlags::NONE).await.unwrap();
        assert_eq!(std::fs::read(file.path()).unwrap(), [3; 700]);
        g.detach(disk).await;
        assert_eq!(std::fs::read(file.path()).unwrap(), [3; 700]);
    });
}
