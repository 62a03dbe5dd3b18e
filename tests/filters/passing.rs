//! Filters that have nothing to do pass requests on; that ends, under requests, when they have something to do again.

use serde_json::json;
use std::sync::atomic::{AtomicBool, Ordering};
use tests::image::Noise;
use tests::nbd::{Client, Headers};
use tests::tools::{installed, ok};
use tests::{Setup, on_reference, skip};

use crate::MIB;

/// Writes and reads a part of the disk that is its own, of which it knows every byte.
fn work(mut client: Client, at: u64, mut known: Vec<u8>, going: &AtomicBool) -> u64 {
    let mut noise = Noise::new(at + 1);
    let mut rounds = 0;
    while going.load(Ordering::SeqCst) {
        let from = noise.below(2000) * 512;
        let len = 512 * (1 + noise.below(40));
        let len = len.min(MIB - from);
        let (start, end) = (usize::try_from(from).unwrap(), usize::try_from(from + len).unwrap());
        if noise.below(3) == 0 {
            let bytes = noise.bytes(end - start);
            assert_eq!(client.write(at + from, 0, &bytes), 0);
            known[start..end].copy_from_slice(&bytes);
        } else {
            let got = client.read(at + from, len);
            assert!(got == known[start..end], "{len} bytes at {}", at + from);
        }
        rounds += 1;
    }
    rounds
}

/// Ends the work, also when the test fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

/// A throttle without limits gets some and another group, the medium grows, and an overlay comes between it and copy-on-read:
/// what is read is right all along, and from then on it is copied.
#[test]
fn what_passes_requests_on_notices_changes() {
    if !installed("qemu-img") {
        skip!("qemu-img is not installed");
    }
    let setup = Setup::new().qmp().nbd_server();
    let bytes = Noise::new(8).bytes(usize::try_from(4 * MIB).unwrap());
    std::fs::write(setup.path("f.img"), &bytes).unwrap();
    let overlay = setup.path("o.qcow2").display().to_string();
    ok("qemu-img", ["create", "-q", "-f", "qcow2", &overlay, &(5 * MIB).to_string()]);
    let mut daemon = setup.line("--object iothread,id=t0 --object iothread,id=t1").start();
    let mut qmp = daemon.qmp();
    for id in ["g", "h"] {
        qmp.ok("object-add", json!({"qom-type": "throttle-group", "id": id}));
    }
    let throttle = |group: &str, file: &str| json!({"driver": "throttle", "node-name": "t", "throttle-group": group, "file": file});
    qmp.ok("blockdev-add", json!({"driver": "file", "node-name": "f", "filename": daemon.path("f.img")}));
    qmp.ok("blockdev-add", json!({"driver": "raw", "node-name": "r", "file": "f"}));
    qmp.ok("blockdev-add", throttle("g", "r"));
    qmp.ok("blockdev-add", json!({"driver": "copy-on-read", "node-name": "c", "file": "t"}));
    for n in 0..2 {
        let thread = format!("t{n}");
        let export = json!({
            "type": "nbd", "id": format!("e{n}"), "name": thread, "node-name": "c", "writable": true, "iothread": thread
        });
        qmp.ok("block-export-add", export);
    }
    let going = AtomicBool::new(true);
    std::thread::scope(|scope| {
        let _stop = Stop(&going);
        let workers: Vec<_> = (0..4_u64)
            .map(|n| {
                let (client, _) = daemon.nbd().open(&format!("t{}", n % 2), Headers::Structured);
                let (start, end) = (usize::try_from(n * MIB).unwrap(), usize::try_from((n + 1) * MIB).unwrap());
                let (known, going) = (bytes[start..end].to_vec(), &going);
                scope.spawn(move || work(client, n * MIB, known, going))
            })
            .collect();
        for round in 0..12_u64 {
            for limit in [2000, 0] {
                qmp.ok("qom-set", json!({"path": "/objects/g", "property": "limits", "value": {"iops-total": limit}}));
            }
            let file = if round <= 6 { "r" } else { "q" };
            let group = if round % 2 == 0 { "h" } else { "g" };
            qmp.ok("blockdev-reopen", json!({"options": [throttle(group, file)]}));
            // The reference lets nobody resize what has a throttle above it.
            if round < 6 && !on_reference() {
                qmp.ok("block_resize", json!({"node-name": "r", "size": 4 * MIB + (round + 1) * 65536}));
            }
            if round == 6 {
                if !on_reference() {
                    qmp.ok("block_resize", json!({"node-name": "r", "size": 5 * MIB}));
                }
                let file = json!({"driver": "file", "filename": overlay});
                qmp.ok("blockdev-add", json!({"driver": "qcow2", "node-name": "q", "backing": null, "file": file}));
                qmp.ok("blockdev-snapshot", json!({"node": "r", "overlay": "q"}));
            }
        }
        going.store(false, Ordering::SeqCst);
        for worker in workers {
            assert!(worker.join().unwrap() > 0);
        }
    });
    let (mut client, size) = daemon.nbd().open("t0", Headers::Structured);
    for part in 0..4 {
        client.read(part * MIB, MIB);
    }
    drop((client, size, qmp));
    daemon.stop();
    let map: serde_json::Value =
        serde_json::from_str(&ok("qemu-img", ["map", "-f", "qcow2", "--output=json", &overlay])).unwrap();
    let there =
        map.as_array().unwrap().iter().filter(|run| run["data"] == true).map(|run| run["length"].as_u64().unwrap());
    assert!(there.sum::<u64>() >= 4 * MIB, "not all that was read was copied: {map}");
}
