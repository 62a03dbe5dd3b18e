//! `--sandbox strict`: each way of serving, with what the command line names and what it is passed. A call outside the lists
//! ends the daemon, so that to be served is to see that nothing was refused.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

use serde_json::json;
use tests::daemon::number;
use tests::nbd::Headers;
use tests::vhost::{FrontEnd, blocking_event, req};
use tests::{Daemon, Setup, on_reference, qmp, skip, tools, wait_for};

const MIB: u64 = 1 << 20;

/// A strict daemon with an image of a mebibyte as the node `disk`, and an iothread `i`.
fn setup() -> Setup {
    Setup::new()
        .qmp()
        .image("disk.img", MIB)
        .line("--sandbox strict --object iothread,id=i --blockdev file,node-name=disk,filename=disk.img,discard=unmap")
}

/// Writes through the NBD export `disk` and finds it in the image.
fn serves(daemon: &Daemon) {
    let (mut client, _) = daemon.nbd().open("disk", Headers::Simple);
    assert_eq!(client.write(4096, 0, b"written"), 0);
    assert_eq!(client.read(4096, 7), b"written");
    drop(client);
    assert_eq!(std::fs::read(daemon.path("disk.img")).unwrap()[4096..4103], *b"written");
}

#[test]
fn nbd_on_a_listener_that_was_passed() {
    if on_reference() {
        skip!("the reference has no such sandbox");
    }
    let setup = setup();
    let listener = OwnedFd::from(UnixListener::bind(setup.path("nbd.sock")).unwrap());
    let server = format!("--nbd-server addr.type=fd,addr.str={}", number(&listener));
    let mut daemon = setup
        .line(&server)
        .line("--export nbd,id=e,node-name=disk,name=disk,writable=on,iothread=i")
        .inherit(listener)
        .start();
    serves(&daemon);
    daemon.stop();
}

#[test]
fn a_fuse_export() {
    if on_reference() || File::open("/dev/fuse").is_err() {
        skip!("the reference has no such sandbox, or the machine no FUSE");
    }
    let daemon =
        setup().image("mnt", 0).line("--export fuse,id=e,node-name=disk,mountpoint=mnt,writable=on,iothread=i");
    let mut daemon = daemon.start();
    let file = OpenOptions::new().read(true).write(true).open(daemon.path("mnt")).unwrap();
    file.write_all_at(b"written", 4096).unwrap();
    file.sync_all().unwrap();
    drop(file);
    assert_eq!(std::fs::read(daemon.path("disk.img")).unwrap()[4096..4103], *b"written");
    // Another place is none that the command line named.
    File::create(daemon.path("other")).unwrap();
    let export = json!({"type": "fuse", "id": "o", "node-name": "disk", "mountpoint": "other"});
    let refusal = daemon.qmp().refused("block-export-add", export);
    assert_eq!(refusal, "Failed to mount FUSE session to export: Permission denied");
    let mut qmp = daemon.qmp();
    qmp.ok("block-export-del", json!({"id": "e"}));
    qmp.event("BLOCK_EXPORT_DELETED");
    assert_eq!(std::fs::metadata(daemon.path("mnt")).unwrap().len(), 0, "it is unmounted");
    daemon.stop();
}

#[test]
fn vhost_user() {
    if on_reference() {
        skip!("the reference has no such sandbox");
    }
    let export =
        "--export vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path=vhost.sock,writable=on,iothread=i";
    let mut daemon = setup().line(export).start();
    for _ in 0..2 {
        let mut front = FrontEnd::start(&daemon.path("vhost.sock"), 1, 0);
        front.call_by(0, blocking_event());
        assert_eq!(front.request(0, req::OUT, 3, &[7; 512], 0).0, 0);
        assert_eq!(front.request(0, req::IN, 3, &[], 512), (0, vec![7; 512]));
    }
    daemon.stop();
}

/// Waits until the manager `m` is told to be connected, or not to be.
fn wait_until(qmp: &mut qmp::Client, connected: bool) {
    let expected = json!([{"id": "m", "connected": connected}]);
    wait_for("the manager", || (qmp.ok("query-pr-managers", json!({})) == expected).then_some(()));
}

/// A helper for one client, up to the end of the negotiation. `[drop-in A.13]`
fn helper(socket: &Path) -> std::os::unix::net::UnixStream {
    let listener = UnixListener::bind(socket).unwrap();
    let (mut stream, _) = listener.accept().unwrap();
    stream.write_all(&[0; 4]).unwrap();
    let mut features = [0; 4];
    stream.read_exact(&mut features).unwrap();
    assert_eq!(features, [0; 4]);
    stream
}

#[test]
fn a_helper_that_goes_and_comes() {
    if on_reference() {
        skip!("the reference has no such sandbox");
    }
    let setup = setup().line("--object pr-manager-helper,id=m,path=pr.sock");
    let mut daemon = setup.line("--blockdev file,node-name=d,filename=disk.img,pr-manager=m").start();
    let mut qmp = daemon.qmp();
    for _ in 0..2 {
        let stream = helper(&daemon.path("pr.sock"));
        wait_until(&mut qmp, true);
        std::fs::remove_file(daemon.path("pr.sock")).unwrap();
        drop(stream);
        wait_until(&mut qmp, false);
    }
    daemon.stop();
}

#[test]
fn a_backing_file_is_named_or_refused() {
    if on_reference() || !tools::installed("qemu-img") {
        skip!("the reference has no such sandbox, or there is no qemu-img");
    }
    let image = |name: &str| format!("driver=qcow2,node-name=q,file.driver=file,file.filename={name}");
    let overlay = || {
        let setup = Setup::new().qmp().image("base.img", MIB);
        let path = |name: &str| setup.path(name).display().to_string();
        tools::ok(
            "qemu-img",
            ["create", "-q", "-f", "qcow2", "-b", &path("base.img"), "-F", "raw", &path("top.qcow2")],
        );
        setup.line("--sandbox strict")
    };
    let ended = overlay().line(&format!("--blockdev {}", image("top.qcow2"))).run();
    assert_eq!(ended.status.code(), Some(1));
    assert!(ended.stderr.contains("base.img': Permission denied"), "{}", ended.stderr);
    let named =
        "--blockdev file,node-name=b0,filename=base.img,read-only=on --blockdev raw,node-name=b,file=b0,read-only=on";
    overlay().line(named).line(&format!("--blockdev {},backing=b", image("top.qcow2"))).start().stop();
}
