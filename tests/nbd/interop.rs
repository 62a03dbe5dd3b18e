//! Programs nobody here wrote, as clients of the server.

use std::fs;

use serde_json::{Value, json};
use tests::image::{Noise, contents};
use tests::{Daemon, Setup, program, skip, tools};

const MIB: u64 = 1 << 20;

fn serving(size: u64) -> Daemon {
    Setup::new().serving("disk", size).start()
}

#[test]
fn nbdinfo_reads_the_export() {
    let daemon = serving(4 * MIB);
    let text = tools::ok("nbdinfo", ["--json", &daemon.uri("disk")]);
    let info: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(info["protocol"], "newstyle-fixed");
    assert_eq!(info["structured"], true);
    let export = &info["exports"][0];
    assert_eq!(export["export-name"], "disk");
    assert_eq!(export["export-size"], 4 * MIB);
    assert_eq!(export["contexts"], json!(["base:allocation"]));
    for can in ["cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero"] {
        assert_eq!(export[format!("can_{can}")], true, "can_{can}");
    }
    assert_eq!(export["is_read_only"], false);
    assert_eq!(export["block_size_maximum"], 32 * MIB);
    let listed = tools::ok("nbdinfo", ["--list", "--json", &daemon.uri("")]);
    let listed: Value = serde_json::from_str(&listed).unwrap();
    assert_eq!(listed["exports"][0]["export-name"], "disk");
    let unknown = tools::run("nbdinfo", [daemon.uri("nosuch")]);
    assert!(!unknown.status.success());
}

#[test]
fn nbdinfo_maps_holes() {
    let daemon = serving(4 * MIB);
    tools::qemu_io(&daemon.uri("disk"), &["write -P 7 1M 1M"]);
    let map: Value = serde_json::from_str(&tools::ok("nbdinfo", ["--map", "--json", &daemon.uri("disk")])).unwrap();
    let map: Vec<_> =
        map.as_array().unwrap().iter().map(|e| (e["offset"].clone(), e["length"].clone(), e["type"].clone())).collect();
    assert_eq!(
        map,
        [
            (json!(0), json!(MIB), json!(3)),
            (json!(MIB), json!(MIB), json!(0)),
            (json!(2 * MIB), json!(2 * MIB), json!(3))
        ]
    );
}

#[test]
fn nbdcopy_in_and_out() {
    let daemon = serving(16 * MIB);
    let mut noise = Noise::new(11);
    let mut image = noise.bytes(16 << 20);
    image[5 << 20..9 << 20].fill(0);
    fs::write(daemon.path("source"), &image).unwrap();
    let source = daemon.path("source").to_string_lossy().into_owned();
    let back = daemon.path("back").to_string_lossy().into_owned();
    tools::ok("nbdcopy", ["--flush", &source, &daemon.uri("disk")]);
    assert!(contents(&daemon.path("disk.img")) == image);
    fs::File::create(&back).unwrap().set_len(16 * MIB).unwrap();
    tools::ok("nbdcopy", ["--connections=4", "--requests=32", &daemon.uri("disk"), &back]);
    assert!(fs::read(&back).unwrap() == image);
    // A copy from the server to itself, with several connections to each.
    let other = serving(16 * MIB);
    tools::ok("nbdcopy", ["--connections=4", "--destination-is-zero", &daemon.uri("disk"), &other.uri("disk")]);
    assert!(contents(&other.path("disk.img")) == image);
}

#[test]
fn nbdsh_tries_every_call() {
    if tools::python_with_nbd().is_none() {
        skip!("python3-libnbd is not installed");
    }
    let daemon = serving(4 * MIB);
    let script = r#"
import nbd as n
h.set_handshake_flags(n.HANDSHAKE_FLAG_MASK)
h.add_meta_context('base:allocation')
h.connect_uri(uri)
assert h.get_protocol() == 'newstyle-fixed'
assert h.get_structured_replies_negotiated()
assert h.can_meta_context('base:allocation')
assert h.get_size() == 4 << 20
data = bytes(range(256)) * 16
h.pwrite(data, 4096, n.CMD_FLAG_FUA)
assert h.pread(4096, 4096) == data
chunks = []
def chunk(buf, offset, status, error):
    chunks.append((offset, len(buf), status))
buf = h.pread_structured(4096, 4096, chunk, n.CMD_FLAG_DF)
assert buf == data and len(chunks) == 1, chunks
h.zero(1024, 4096)
assert h.pread(1024, 4096) == bytes(1024)
h.zero(1024, 5120, n.CMD_FLAG_NO_HOLE)
h.trim(65536, 65536, n.CMD_FLAG_FUA)
h.cache(65536, 0)
h.flush()
extents = []
def status(context, offset, found, error):
    extents.extend(found)
h.block_status(4 << 20, 0, status)
assert sum(extents[0::2]) == 4 << 20, extents
# Commands in flight, answered in any order.
buffers = [n.Buffer(4096) for _ in range(64)]
cookies = [h.aio_pread(buffer, i * 4096) for i, buffer in enumerate(buffers)]
while h.aio_in_flight() > 0:
    h.poll(-1)
assert all(h.aio_command_completed(cookie) for cookie in cookies)
# A request beyond the end is refused by the server when the client does not stop it.
h.set_strict_mode(0)
try:
    h.pread(1024, 4 << 20)
except n.Error as error:
    assert error.errnum == 22, error
else:
    raise AssertionError('a read beyond the end')
try:
    h.pwrite(b'x' * 1024, 4 << 20)
except n.Error as error:
    assert error.errnum in (22, 28), error
else:
    raise AssertionError('a write beyond the end')
assert h.pread(4, 6144) is not None
h.shutdown()
print('all well')
"#;
    assert_eq!(tools::nbdsh_unconnected(&daemon.uri("disk"), script), "all well\n");
}

#[test]
fn nbdsh_negotiates_by_hand() {
    if tools::python_with_nbd().is_none() {
        skip!("python3-libnbd is not installed");
    }
    let daemon = serving(MIB);
    let script = r#"
import nbd as n
h.set_opt_mode(True)
h.connect_uri(uri)
names = []
h.opt_list(lambda name, description: names.append(name))
assert names == ['disk'], names
contexts = []
h.set_export_name('disk')
h.opt_list_meta_context(lambda name: contexts.append(name))
assert contexts == ['base:allocation'], contexts
h.set_export_name('nosuch')
try:
    h.opt_info()
except n.Error as error:
    assert error.errnum == 2, error
else:
    raise AssertionError('an unknown export')
h.set_export_name('disk')
h.opt_info()
assert h.get_size() == 1 << 20
h.opt_go()
assert h.pread(4, 0) == bytes(4)
h.shutdown()
print('all well')
"#;
    assert_eq!(tools::nbdsh_unconnected(&daemon.uri("disk"), script), "all well\n");
}

#[test]
fn qemu_io_and_qemu_img() {
    let daemon = serving(16 * MIB);
    let uri = daemon.uri("disk");
    tools::qemu_io(
        &uri,
        &[
            "write -P 1 0 64k",
            "write -P 2 65537 513",
            "write -f -P 3 1M 2M",
            "write -z -u 4M 1M",
            "discard 8M 1M",
            "flush",
        ],
    );
    let out = tools::qemu_io(&uri, &["read -P 1 0 64k", "read -P 2 65537 513", "read -P 3 1M 2M", "read -P 0 4M 12M"]);
    assert!(!out.contains("Pattern verification failed"), "{out}");
    let info: Value = serde_json::from_str(&tools::ok("qemu-img", ["info", "--output=json", &uri])).unwrap();
    assert_eq!(info["virtual-size"], 16 * MIB);
    assert_eq!(info["format"], "raw");
    let map: Value = serde_json::from_str(&tools::ok("qemu-img", ["map", "--output=json", &uri])).unwrap();
    let covered: u64 = map.as_array().unwrap().iter().map(|extent| extent["length"].as_u64().unwrap()).sum();
    assert_eq!(covered, 16 * MIB);
    let copy = daemon.path("copy.qcow2").to_string_lossy().into_owned();
    tools::ok("qemu-img", ["convert", "-f", "raw", "-O", "qcow2", "-m", "8", "-W", &uri, &copy]);
    tools::ok("qemu-img", ["compare", "-f", "raw", "-F", "qcow2", &uri, &copy]);
    tools::ok("qemu-img", ["convert", "-n", "-f", "qcow2", "-O", "raw", &copy, &uri]);
    tools::ok("qemu-img", ["compare", "-f", "raw", "-F", "qcow2", &uri, &copy]);
    tools::ok("qemu-img", ["bench", "-f", "raw", "-c", "2000", "-d", "32", "-s", "4k", "-w", &uri]);
}

#[test]
fn fio_verifies() {
    if !tools::installed("fio") || !tools::ok("fio", ["--enghelp"]).contains("nbd") {
        skip!("no fio with the nbd engine");
    }
    for options in [&["--bs=4k", "--iodepth=32"][..], &["--bsrange=512-128k", "--bs_unaligned=1", "--iodepth=8"]] {
        let daemon = serving(32 * MIB);
        let uri = format!("--uri={}", daemon.uri("disk"));
        let base = [
            "--name=verify",
            "--ioengine=nbd",
            "--rw=randwrite",
            "--size=16M",
            "--verify=crc32c",
            "--verify_fatal=1",
            &uri,
        ];
        let text = tools::ok("fio", base.iter().chain(options));
        assert!(text.contains("err= 0"), "{text}");
    }
}

#[test]
fn a_real_qemu_storage_daemon_as_client() {
    let Some(reference) = program::reference() else {
        skip!("no reference program is installed");
    };
    let server = serving(16 * MIB);
    let client = Setup::of(&reference)
        .qmp()
        .arg("--blockdev")
        .arg(format!(
            "nbd,node-name=far,export=disk,discard=unmap,server.type=unix,server.path={}",
            server.path("nbd.sock").display()
        ))
        .nbd_server()
        .line("--export nbd,id=e,node-name=far,name=far,writable=on")
        .start();
    let uri = client.uri("far");
    tools::qemu_io(&uri, &["write -P 5 0 1M", "write -z 256k 256k", "write -P 6 15M 1M", "flush", "discard 2M 1M"]);
    tools::qemu_io(&uri, &["read -P 5 0 256k", "read -P 0 256k 256k", "read -P 5 512k 512k", "read -P 6 15M 1M"]);
    // What went through the far daemon is in this one's image.
    let image = contents(&server.path("disk.img"));
    assert!(image[..256 << 10].iter().all(|byte| *byte == 5) && image[15 << 20..].iter().all(|byte| *byte == 6));
    let nodes = client.qmp().ok("query-named-block-nodes", json!({"flat": true}));
    assert_eq!(nodes[0]["image"]["virtual-size"], 16 * MIB);
}

#[test]
fn a_disk_image_with_partitions_comes_back_as_it_was() {
    let daemon = serving(32 * MIB);
    let uri = daemon.uri("disk");
    let image = Noise::new(12).bytes(32 << 20);
    fs::write(daemon.path("source"), &image).unwrap();
    let source = daemon.path("source").to_string_lossy().into_owned();
    tools::ok("qemu-img", ["convert", "-n", "-f", "raw", "-O", "raw", "-m", "16", "-W", &source, &uri]);
    tools::ok("qemu-img", ["compare", "-f", "raw", "-F", "raw", &source, &uri]);
    assert!(contents(&daemon.path("disk.img")) == image);
}
