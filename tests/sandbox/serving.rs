//! Serving needs nothing that the sandbox refuses. That each daemon of every suite ends without a line about a refused call is
//! seen to by the library; here is what those that come by other ways miss.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;

use serde_json::{Value, json};
use tests::vhost::{FrontEnd, blocking_event, req};
use tests::{Daemon, Setup, on_reference, skip, tools};

const MIB: u64 = 1 << 20;

/// A daemon with an image of 8 MiB as the node `disk`, an iothread, and this export of it.
fn serving(export: &str) -> Daemon {
    Setup::new()
        .qmp()
        .image("disk.img", 8 * MIB)
        .image("mnt", 0)
        .line("--object iothread,id=i --blockdev file,node-name=disk,filename=disk.img,discard=unmap")
        .line(&format!("--export {export},id=e,node-name=disk,iothread=i,writable=on"))
        .start()
}

/// Ends it, and shows what was refused until then.
fn nothing_was_refused(mut daemon: Daemon) {
    if !on_reference() {
        assert_eq!(daemon.qmp().ok("x-query-sandbox", json!({}))["refused"], Value::Array(Vec::new()));
    }
    assert_eq!(daemon.stop(), "");
}

#[test]
fn vhost_user_with_any_kind_of_call() {
    let daemon = serving("vhost-user-blk,addr.type=unix,addr.path=vhost.sock,num-queues=2");
    let mut front = FrontEnd::start(&daemon.path("vhost.sock"), 2, 0);
    // Whoever waits in a read of it has one that blocks; the daemon must not wait in a write.
    front.call_by(1, blocking_event());
    for queue in [0, 1] {
        for turn in 0..20 {
            assert_eq!(front.request(queue, req::OUT, turn, &[7; 512], 0).0, 0);
            assert_eq!(front.request(queue, req::IN, turn, &[], 512), (0, vec![7; 512]));
        }
        assert_eq!(front.request(queue, req::FLUSH, 0, &[], 0).0, 0);
    }
    drop(front);
    nothing_was_refused(daemon);
}

#[test]
fn fuse() {
    if File::open("/dev/fuse").is_err() {
        skip!("the machine has no FUSE");
    }
    let daemon = serving("fuse,mountpoint=mnt");
    let file = OpenOptions::new().read(true).write(true).open(daemon.path("mnt")).unwrap();
    file.write_all_at(&[5; 8192], MIB).unwrap();
    file.sync_all().unwrap();
    let mut read = [0; 8192];
    file.read_exact_at(&mut read, MIB).unwrap();
    assert_eq!(read, [5; 8192]);
    let (length, mapped) = (file.metadata().unwrap().len(), daemon.path("mnt"));
    assert_eq!(length, 8 * MIB);
    drop(file);
    tools::ok("qemu-img", ["map", "-f", "raw", &mapped.display().to_string()]);
    nothing_was_refused(daemon);
}
