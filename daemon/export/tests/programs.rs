//! The server against programs that nobody here wrote: nbdinfo, nbdcopy, libnbd, qemu-io, qemu-img, a real
//! qemu-storage-daemon. Each test skips, and says so, where its program is not installed.
#![expect(clippy::unwrap_used, clippy::panic, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use block::{Facts, Support};
use common::{Server, Setup, program, succeed};
use export::nbd::NbdServerParams;
use io::IoThread;
use std::process::Command;
use std::sync::atomic::Ordering;

const MIB: usize = 1 << 20;

fn native() -> Facts {
    Facts { zero: Support::Native, discard: Support::Native, ..Facts::default() }
}

/// A writable export `e` and a read-only one `r` of 8 MiB, on a thread of their own.
fn server() -> Server {
    let server = Server::start(NbdServerParams::default());
    for (name, writable) in [("e", true), ("r", false)] {
        let threads = vec![IoThread::start("io", io::Params::default()).unwrap()];
        server.export(Setup { threads, ..Setup::new(name, writable) }, 8 * MIB, native());
    }
    server
}

#[test]
fn nbdinfo_sees_what_there_is() {
    let server = server();
    let Some(json) = succeed(Command::new("nbdinfo").args(["--json", &server.uri("e")])) else { return };
    for part in [
        r#""protocol": "newstyle-fixed""#,
        r#""structured": true"#,
        r#""export-name": "e""#,
        r#""description": "some text""#,
        r#""export-size": 8388608"#,
        r#""base:allocation""#,
        r#""is_read_only": false"#,
        r#""can_multi_conn": true"#,
        r#""can_fast_zero": true"#,
        r#""can_df": true"#,
        r#""can_cache": true"#,
        r#""can_fua": true"#,
        r#""can_trim": true"#,
        r#""can_zero": true"#,
        r#""block_size_preferred": 4096"#,
        r#""block_size_maximum": 33554432"#,
    ] {
        assert!(json.contains(part), "{part} in {json}");
    }
    let all = succeed(Command::new("nbdinfo").args(["--list", "--json", &server.uri("")])).unwrap();
    assert!(all.contains(r#""export-name": "e""#) && all.contains(r#""export-name": "r""#), "{all}");
    let map = succeed(Command::new("nbdinfo").args(["--map", &server.uri("r")])).unwrap();
    let fields: Vec<&str> = map.split_whitespace().collect();
    assert_eq!(fields, ["0", "8388608", "3", "hole,zero"]);
    let depth = succeed(Command::new("nbdinfo").args(["--map=qemu:allocation-depth", &server.uri("r")])).unwrap();
    assert_eq!(depth.split_whitespace().take(3).collect::<Vec<_>>(), ["0", "8388608", "1"]);
}

#[test]
fn nbdcopy_there_and_back() {
    let server = server();
    let (from, back) = (server.file("from"), server.file("back"));
    let bytes: Vec<u8> =
        (0..8 * MIB).map(|i| if i / 65536 % 3 == 0 { 0 } else { u8::try_from(i % 253).unwrap() }).collect();
    std::fs::write(&from, &bytes).unwrap();
    let Some(_) = succeed(Command::new("nbdcopy").arg("--flush").args([from.to_str().unwrap(), &server.uri("e")]))
    else {
        return;
    };
    for extra in [&["--connections=1"][..], &["--connections=4", "--requests=64"], &["--request-size=2097152"]] {
        succeed(Command::new("nbdcopy").args(extra).arg(server.uri("e")).arg(&back));
        assert!(std::fs::read(&back).unwrap() == bytes, "{extra:?}");
    }
    let map = succeed(Command::new("nbdinfo").args(["--map", "--totals", &server.uri("e")])).unwrap();
    assert!(map.contains("hole,zero"), "{map}");
}

#[test]
fn libnbd_uses_every_command() {
    let server = server();
    let script = format!(
        r#"
import sys
try:
    import nbd
except ImportError:
    print("SKIPPED: the nbd module is not installed")
    sys.exit(0)
h = nbd.NBD()
h.add_meta_context("base:allocation")
h.add_meta_context("qemu:allocation-depth")
h.connect_uri("{uri}")
assert h.can_meta_context("qemu:allocation-depth")
h.pwrite(b"x" * 5000, 100, nbd.CMD_FLAG_FUA)
assert h.pread(5000, 100) == b"x" * 5000
assert h.pread(8, 96) == b"\0\0\0\0xxxx"
h.zero(4096, 0, nbd.CMD_FLAG_FAST_ZERO)
h.zero(4, 4096, nbd.CMD_FLAG_NO_HOLE)
assert h.pread(8, 4096) == b"\0\0\0\0xxxx"
h.trim(65536, 1048576, nbd.CMD_FLAG_FUA)
h.cache(1048576, 0)
h.flush()
got = {{}}
def extents(context, offset, entries, error):
    got[context] = (offset, entries)
h.block_status(1048576, 0, extents)
entries = got["base:allocation"][1]
assert got["base:allocation"][0] == 0
assert sum(entries[0::2]) == 1048576, entries
assert entries[1] == 3 and 0 in entries[1::2], entries
assert got["qemu:allocation-depth"] == (0, [1048576, 1])
h.block_status(1048576, 0, extents, nbd.CMD_FLAG_REQ_ONE)
assert len(got["base:allocation"][1]) == 2
# Fragments, and the same without.
h.pwrite(b"y" * 65536, 131072)
chunks = []
def chunk(data, offset, status, error):
    chunks.append((offset, len(data), status))
    return 0
data = h.pread_structured(262144, 65536, chunk)
assert data == b"\0" * 65536 + b"y" * 65536 + b"\0" * 131072
assert sorted(chunks) == [(65536, 65536, nbd.READ_HOLE), (131072, 65536, nbd.READ_DATA), (196608, 131072, nbd.READ_HOLE)], chunks
del chunks[:]
assert h.pread_structured(262144, 65536, chunk, nbd.CMD_FLAG_DF) == data
assert chunks == [(65536, 262144, nbd.READ_DATA)], chunks
# What the library itself would refuse.
h.set_strict_mode(0)
for bad in (lambda: h.pread(1, 8388608), lambda: h.pwrite(b"z", 8388608), lambda: h.trim(1, 1 << 62),
            lambda: h.zero(2, 8388607), lambda: h.block_status(0, 0, extents), lambda: h.cache(33554433, 0),
            lambda: h.flush(nbd.CMD_FLAG_DF)):
    try:
        bad()
        assert False
    except nbd.Error as e:
        assert e.errno == "EINVAL", e
# Many at once, on several connections.
conns = [nbd.NBD() for _ in range(4)]
for c in conns:
    c.connect_uri("{uri}")
bufs = []
for i in range(64):
    c = conns[i % 4]
    data = nbd.Buffer.from_bytearray(bytearray([i + 1]) * 30000)
    bufs.append((c, i, data, c.aio_pwrite(data, i * 100000)))
for c, i, data, cookie in bufs:
    while not c.aio_command_completed(cookie):
        c.poll(-1)
conns[0].flush()
for i in range(64):
    assert h.pread(30000, i * 100000) == bytes([i + 1]) * 30000
h.shutdown()
for c in conns:
    c.shutdown()
print("done")
"#,
        uri = server.uri("e")
    );
    let Some(out) = succeed(Command::new("/usr/bin/python3").args(["-c", &script])) else { return };
    println!("{out}");
}

/// QEMU's client negotiates extended headers.
#[test]
fn qemu_io_and_qemu_img() {
    let server = server();
    let io = |export: &str, commands: &[&str]| {
        let mut command = Command::new("qemu-io");
        command.args(["-f", "raw", &server.uri(export)]);
        for c in commands {
            command.args(["-c", c]);
        }
        succeed(&mut command)
    };
    let Some(out) =
        io("e", &["write -P 7 0 1M", "write -z -u 64k 64k", "discard 512k 64k", "flush", "read -P 7 0 64k"])
    else {
        return;
    };
    assert!(!out.contains("failed") && !out.contains("Pattern"), "{out}");
    let out = io("e", &["read -P 0 64k 64k", "aio_write -P 9 2M 3M", "aio_flush", "read -P 9 2M 3M"]).unwrap();
    assert!(!out.contains("failed") && !out.contains("Pattern"), "{out}");
    let out = program(Command::new("qemu-io").args(["-f", "raw", &server.uri("r"), "-c", "write 0 4k"])).unwrap();
    assert!(!out.status.success(), "the export is read-only");

    let (image, copy) = (server.file("image"), server.file("copy"));
    let bytes: Vec<u8> =
        (0..8 * MIB).map(|i| if i % 1_000_000 < 500_000 { 0 } else { u8::try_from(i % 251).unwrap() }).collect();
    std::fs::write(&image, &bytes).unwrap();
    let raw = ["-f", "raw", "-O", "raw"];
    succeed(Command::new("qemu-img").args(["convert", "-n"]).args(raw).arg(&image).arg(server.uri("e"))).unwrap();
    succeed(Command::new("qemu-img").arg("convert").args(raw).arg(server.uri("e")).arg(&copy));
    assert!(std::fs::read(&copy).unwrap() == bytes);
    let compared =
        succeed(Command::new("qemu-img").args(["compare", "-f", "raw", "-F", "raw"]).arg(&image).arg(server.uri("e")));
    assert!(compared.unwrap().contains("identical"));
    let info = succeed(Command::new("qemu-img").args(["info", "--output=json", &server.uri("e")])).unwrap();
    assert!(info.contains(r#""virtual-size": 8388608"#), "{info}");
}

/// FUA of a client of QEMU becomes a flush on a medium without FUA of its own.
#[test]
fn fua_reaches_the_medium() {
    let server = Server::start(NbdServerParams::default());
    let memory = server.export(Setup::new("e", true), MIB, Facts::default());
    let write = |flag: &str| {
        let before = memory.flushes.load(Ordering::Relaxed);
        let command = format!("write {flag} -P 1 0 4k");
        succeed(Command::new("qemu-io").args(["-t", "writeback", "-f", "raw", &server.uri("e"), "-c", &command]))
            .map(|_| memory.flushes.load(Ordering::Relaxed) - before)
    };
    let Some(plain) = write("") else { return };
    assert_eq!(write("-f"), Some(plain + 1));
}

/// A medium with large sectors is served to clients that keep to them and to those that do not.
#[test]
fn large_sectors() {
    let server = Server::start(NbdServerParams::default());
    server.export(Setup::new("e", true), MIB, Facts { request_align: 4096, mem_align: 512, ..native() });
    let Some(info) = succeed(Command::new("nbdinfo").args(["--json", &server.uri("e")])) else { return };
    assert!(info.contains(r#""block_size_minimum": 4096"#), "{info}");
    let commands =
        ["-c", "write -P 3 0 64k", "-c", "write -P 4 4k 4k", "-c", "read -P 4 4k 4k", "-c", "read -P 3 8k 4k"];
    if let Some(out) = succeed(Command::new("qemu-io").args(["-f", "raw", &server.uri("e")]).args(commands)) {
        assert!(!out.contains("failed") && !out.contains("Pattern"), "{out}");
    }
    let mut plain = server.connect();
    plain.choose("e");
    assert_eq!(plain.read(4090, 10).unwrap(), [3, 3, 3, 3, 3, 3, 4, 4, 4, 4], "who asks for nothing may send anything");
}

/// A real qemu-storage-daemon as the client, exporting ours once more.
#[test]
fn a_real_daemon_in_between() {
    let server = server();
    let middle = server.file("middle");
    let blockdev = format!("nbd,node-name=n,server.type=unix,server.path={},export=e", server.path().display());
    let listen = format!("addr.type=unix,addr.path={}", middle.display());
    let spawned = Command::new("qemu-storage-daemon")
        .args(["--blockdev", &blockdev, "--nbd-server", &listen])
        .args(["--export", "nbd,id=x,node-name=n,name=x,writable=on"])
        .spawn();
    let Ok(mut daemon) = spawned else {
        eprintln!("SKIPPED: qemu-storage-daemon is not installed");
        return;
    };
    let uri = format!("nbd+unix:///x?socket={}", middle.display());
    let retry = ["--connections=1"];
    let bytes: Vec<u8> = (0..8 * MIB).map(|i| u8::try_from(i % 241).unwrap()).collect();
    let (from, back) = (server.file("from"), server.file("back"));
    std::fs::write(&from, &bytes).unwrap();
    while !middle.exists() && daemon.try_wait().unwrap().is_none() {
        std::thread::yield_now();
    }
    // The socket file is there a moment before somebody listens on it.
    while std::os::unix::net::UnixStream::connect(&middle).is_err() && daemon.try_wait().unwrap().is_none() {}
    succeed(Command::new("nbdcopy").args(retry).args([from.to_str().unwrap(), &uri]));
    succeed(Command::new("nbdcopy").args(retry).args([&uri, back.to_str().unwrap()]));
    let same = std::fs::read(&back).unwrap_or_default() == bytes;
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    assert!(same);
}
