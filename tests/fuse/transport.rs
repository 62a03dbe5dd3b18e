//! How the kernel's requests come: read from the device, or over io_uring where the administrator has switched that on
//! (`/sys/module/fuse/parameters/enable_uring`, which no test changes).

use std::os::unix::fs::FileExt;
use std::thread;

use serde_json::{Value, json};
use tests::image::Noise;
use tests::qmp::Client;
use tests::{on_reference, skip, wait_for};

use crate::{MIB, Mounted, over_rings, raw};

fn transport(qmp: &mut Client) -> Value {
    qmp.ok("query-block-exports", json!({}))[0]["x-transport"].clone()
}

/// On one thread, on several, on more than there are queues.
const THREADS: [&str; 3] =
    ["", ",iothread.0=t0,iothread.1=t1", ",iothread.0=t0,iothread.1=t1,iothread.2=t2,iothread.3=t3"];

fn start(threads: &str) -> Option<Mounted> {
    let setup = (0..4).fold(raw(16 * MIB), |setup, n| setup.line(&format!("--object iothread,id=t{n}")));
    Mounted::start(setup, &format!(",writable=on{threads}"))
}

#[test]
fn what_the_kernel_offers_is_used_and_told() {
    if on_reference() {
        skip!("the reference reads the device");
    }
    let expected = if over_rings() { "io-uring" } else { "device" };
    for threads in THREADS {
        let Some(mounted) = start(threads) else { skip!("no FUSE here") };
        // The first request is served when the kernel and the daemon have agreed.
        assert_eq!(mounted.open().metadata().unwrap().len(), 16 * MIB);
        let mut qmp = mounted.daemon.qmp();
        wait_for("the transport", || (transport(&mut qmp) == expected).then_some(()));
    }
}

/// Many requests of all sizes from all processors: each queue gets more than it has entries.
#[test]
fn requests_of_all_sizes_come_over_all_queues() {
    for threads in THREADS {
        if on_reference() && !threads.is_empty() {
            continue;
        }
        let Some(mounted) = start(threads) else { skip!("no FUSE here") };
        thread::scope(|scope| {
            for worker in 0..48 {
                let file = mounted.open();
                scope.spawn(move || {
                    let mut noise = Noise::new(worker + 1);
                    let start = worker * 16 * MIB / 48;
                    for _ in 0..6 {
                        let len = usize::try_from(1 + noise.below(300_000)).unwrap();
                        let bytes = noise.bytes(len);
                        file.write_all_at(&bytes, start).unwrap();
                        let mut got = vec![0; len];
                        file.read_exact_at(&mut got, start).unwrap();
                        assert!(got == bytes, "{len} bytes of worker {worker}");
                    }
                });
            }
        });
        let all = Noise::new(99).bytes(5 << 20);
        let file = mounted.open();
        file.write_all_at(&all, 77).unwrap();
        file.sync_all().unwrap();
        assert!(std::fs::read(mounted.daemon.path("a.img")).unwrap()[77..].starts_with(&all));
    }
}
