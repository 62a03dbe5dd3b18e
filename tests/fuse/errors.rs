//! What becomes of requests that fail, and what exports count.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::thread::JoinHandle;

use nix::errno::Errno;
use serde_json::{Value, json};
use tests::qmp::Client;
use tests::{Setup, known_defect, on_reference, skip, wait_for};

use crate::{MIB, Mounted};

/// The node `f` on an image, on which writes fail as `rule` says.
fn failing(rule: &str) -> Setup {
    Setup::new()
        .image("a.img", MIB)
        .line("--blockdev file,node-name=p,filename=a.img")
        .line(&format!("--blockdev blkdebug,node-name=f,image=p,inject-error.0.event=pwritev,{rule}"))
}

fn write_beside(file: File) -> JoinHandle<Option<i32>> {
    std::thread::spawn(move || file.write_all_at(&[7; 4096], 8192).err().and_then(|error| error.raw_os_error()))
}

fn export(qmp: &mut Client) -> Value {
    qmp.execute("query-block-exports", json!({})).unwrap()[0].clone()
}

fn wait_until_one_waits(qmp: &mut Client) {
    wait_for("a request that waits", || (export(qmp)["x-statistics"]["waiting-operations"] == 1).then_some(()));
}

#[test]
fn a_request_waits_until_somebody_has_seen_to_it() {
    if on_reference() {
        skip!("the reference has no such policy");
    }
    for policy in ["stop", "enospc"] {
        let setup = failing("inject-error.0.errno=28,inject-error.0.once=on");
        let Some(mounted) = Mounted::start(setup, &format!(",writable=on,x-on-error={policy}")) else {
            skip!("no FUSE here")
        };
        let mut qmp = mounted.daemon.qmp();
        let writer = write_beside(mounted.open());
        let event = qmp.event("BLOCK_IO_ERROR");
        assert_eq!(event["device"], "e");
        assert_eq!(event["node-name"], "f");
        assert_eq!((&event["action"], &event["operation"]), (&json!("stop"), &json!("write")));
        assert_eq!(event["nospace"], true);
        wait_until_one_waits(&mut qmp);
        // It keeps nobody from changing things, nor others from their requests.
        qmp.execute("block_resize", json!({"node-name": "f", "size": 2 * MIB})).unwrap();
        assert_eq!(mounted.open().read_at(&mut [1; 512], 0).unwrap(), 512);
        qmp.execute("x-block-export-resume", json!({"id": "e"})).unwrap();
        assert_eq!(writer.join().unwrap(), None, "the second time it succeeds");
        let counted = export(&mut qmp)["x-statistics"].clone();
        assert_eq!(counted["waiting-operations"], 0);
        assert_eq!(counted["failed-operations"], 1);
        assert_eq!((&counted["wr-operations"], &counted["wr-bytes"]), (&json!(1), &json!(4096)));
        let unknown = qmp.execute("x-block-export-resume", json!({"id": "x"})).unwrap_err();
        assert_eq!(unknown.desc, "Export 'x' is not found");
    }
}

#[test]
fn what_waits_fails_when_the_export_goes() {
    if on_reference() {
        skip!("the reference has no such policy");
    }
    for quits in [true, false] {
        let Some(mut mounted) = Mounted::start(failing("inject-error.0.errno=5"), ",writable=on,x-on-error=stop")
        else {
            skip!("no FUSE here")
        };
        let mut qmp = mounted.daemon.qmp();
        let writer = write_beside(mounted.open());
        wait_until_one_waits(&mut qmp);
        // Tried again, it fails again.
        qmp.execute("x-block-export-resume", json!({"id": "e"})).unwrap();
        qmp.event("BLOCK_IO_ERROR");
        qmp.event("BLOCK_IO_ERROR");
        wait_until_one_waits(&mut qmp);
        if quits {
            mounted.daemon.stop();
        } else {
            qmp.execute("block-export-del", json!({"id": "e"})).unwrap();
        }
        assert_eq!(writer.join().unwrap(), Some(Errno::EIO as i32));
    }
}

#[test]
fn other_errors_go_to_the_client_and_are_told() {
    if on_reference() {
        skip!("the reference has no such policy");
    }
    for policy in ["report", "enospc"] {
        let setup = failing("inject-error.0.errno=5,inject-error.0.once=on");
        let Some(mounted) = Mounted::start(setup, &format!(",writable=on,x-on-error={policy}")) else {
            skip!("no FUSE here")
        };
        let mut qmp = mounted.daemon.qmp();
        assert_eq!(write_beside(mounted.open()).join().unwrap(), Some(Errno::EIO as i32));
        let event = qmp.event("BLOCK_IO_ERROR");
        assert_eq!((&event["action"], &event["nospace"]), (&json!("report"), &json!(false)));
    }
}

/// Each write is durable before it is acknowledged, as a log of what reaches the medium shows. `[Linux dm-log-writes]`
#[test]
fn writethrough_waits_for_the_medium() {
    const SECTOR: u64 = 512;
    const FLUSH: u64 = 1;
    const FUA: u64 = 2;
    for option in ["off", "on"] {
        let setup = Setup::new()
            .image("a.img", MIB)
            .image("log", 0)
            .line("--blockdev file,node-name=p,filename=a.img --blockdev file,node-name=l,filename=log")
            .line("--blockdev blklogwrites,node-name=f,file=p,log=l");
        let options = format!(",writable=on,writethrough={option}");
        let Some(mounted) = Mounted::start(setup, &options) else { skip!("no FUSE here") };
        // Open until the end: to close it would flush.
        let file = mounted.open();
        file.write_all_at(&[7; 4096], 8192).unwrap();
        let log = std::fs::read(mounted.daemon.path("log")).unwrap();
        // The flags of the entry there; the data come a sector after it.
        let flags = |at: u64| {
            let from = usize::try_from(at).unwrap() + 16;
            log.get(from..from + 8).map_or(0, |bytes| u64::from_le_bytes(bytes.try_into().unwrap()))
        };
        let durable = flags(SECTOR) & FUA != 0 || flags(2 * SECTOR + 4096) & FLUSH != 0;
        let told = durable == (option == "on");
        assert!(told || known_defect("writethrough waits for nothing"), "{option}");
    }
}
