//! The transmission phase: every command, flag and header style, bounds, alignment, status.

use std::fs;
use std::os::unix::fs::FileExt;

use tests::image::{Noise, allocated};
use tests::nbd::{Client, Export, Extent, Headers, Request, chunk, cmd, flag, opt};
use tests::{Daemon, Setup};

use crate::errno;

const MIB: u64 = 1 << 20;
const ALL: [Headers; 3] = [Headers::Simple, Headers::Structured, Headers::Extended];

fn serving() -> Daemon {
    Setup::new().serving("disk", 4 * MIB).start()
}

fn open(daemon: &Daemon, headers: Headers) -> (Client, Export) {
    daemon.nbd().open("disk", headers)
}

/// A client with the context `base:allocation`, and the context's id.
fn with_status(daemon: &Daemon, headers: Headers) -> (Client, u32) {
    let mut client = daemon.nbd();
    client.greet();
    client.negotiate(headers);
    let ids = client.set_contexts("disk", &["base:allocation"]).unwrap();
    client.go("disk").unwrap();
    (client, ids["base:allocation"])
}

/// The protocol asks for this error; the reference says EINVAL, and clients live with both.
fn refused(error: u32, expected: u32) {
    assert!([expected, errno::EINVAL].contains(&error), "error {error}, not {expected}");
}

#[test]
fn what_is_written_is_read_and_in_the_file() {
    let daemon = serving();
    let mut noise = Noise::new(1);
    for headers in ALL {
        let (mut client, _) = open(&daemon, headers);
        for (offset, len) in [(0, 1), (511, 2), (4096, 4096), (4095, 4098), (MIB - 7, 65543), (4 * MIB - 1, 1)] {
            let data = noise.bytes(len);
            assert_eq!(client.write(offset, 0, &data), 0);
            assert!(client.read(offset, len as u64) == data, "{headers:?} {offset}+{len}");
            let mut in_file = vec![0; len];
            fs::File::open(daemon.path("disk.img")).unwrap().read_exact_at(&mut in_file, offset).unwrap();
            assert!(in_file == data, "{headers:?} {offset}+{len} in the file");
        }
    }
}

#[test]
fn the_largest_request_and_one_byte_more() {
    let daemon = Setup::new().serving("disk", 64 * MIB).start();
    let most = 32 * MIB;
    for headers in ALL {
        let (mut client, export) = open(&daemon, headers);
        assert_eq!(export.block_sizes.unwrap().2, 32 << 20);
        let data = Noise::new(2).bytes(usize::try_from(most).unwrap());
        assert_eq!(client.write(4096, 0, &data), 0);
        assert!(client.read(4096, most) == data);
        let over = Request { cmd: cmd::READ, len: most + 1, ..Request::default() };
        let reply = client.call(&over);
        assert!([errno::EINVAL, errno::EOVERFLOW].contains(&reply.error), "{headers:?}: {}", reply.error);
        assert_eq!(client.read(4096, 4), data[..4]);
    }
}

#[test]
fn an_oversize_write_does_not_spoil_the_stream_or_ends_it() {
    let daemon = serving();
    let (mut client, _) = open(&daemon, Headers::Structured);
    let request = Request { cmd: cmd::WRITE, len: 32 * MIB + 1, ..Request::default() };
    let cookie = client.expect(&request);
    let header = client.encode(cookie, &request);
    client.send_raw(&header);
    // Either the server says so and reads the payload away, or it closes; it must not write and not hang.
    let mut alive = true;
    let block = vec![0xAA; 1 << 20];
    for _ in 0..32 {
        alive = alive && client.try_send_raw(&block).is_ok();
    }
    alive = alive && client.try_send_raw(&[0xAA]).is_ok();
    drop(client);
    let (mut client, _) = open(&daemon, Headers::Structured);
    assert!(client.read(0, MIB).iter().all(|byte| *byte == 0), "an oversize write was carried out ({alive})");
}

#[test]
fn bounds() {
    let daemon = serving();
    for headers in ALL {
        let (mut client, _) = open(&daemon, headers);
        let end = 4 * MIB;
        for (offset, len) in [(end, 1), (end - 1, 2), (u64::MAX, 1), (u64::MAX - 511, 512), (1 << 63, 4096)] {
            let reply = client.call(&Request { cmd: cmd::READ, offset, len, ..Request::default() });
            assert_eq!(reply.error, errno::EINVAL, "{headers:?} read {offset}+{len}");
            let data = vec![1; usize::try_from(len).unwrap()];
            refused(client.write(offset, 0, &data), errno::ENOSPC);
            refused(client.simple(cmd::WRITE_ZEROES, 0, offset, len), errno::ENOSPC);
            assert_eq!(client.simple(cmd::TRIM, 0, offset, len), errno::EINVAL, "{headers:?} trim {offset}+{len}");
            assert_eq!(client.simple(cmd::CACHE, 0, offset, len), errno::EINVAL, "{headers:?} cache {offset}+{len}");
        }
        assert_eq!(fs::metadata(daemon.path("disk.img")).unwrap().len(), end);
    }
}

#[test]
fn flags_and_commands_that_are_not() {
    let daemon = serving();
    for headers in ALL {
        let (mut client, _) = open(&daemon, headers);
        assert_eq!(client.simple(99, 0, 0, 0), errno::EINVAL, "{headers:?}");
        assert_eq!(client.simple(cmd::READ, 1 << 9, 0, 512), errno::EINVAL, "{headers:?}");
        assert_eq!(client.simple(cmd::READ, flag::REQ_ONE, 0, 512), errno::EINVAL, "{headers:?}");
        assert_eq!(client.simple(cmd::FLUSH, flag::NO_HOLE, 0, 0), errno::EINVAL, "{headers:?}");
        assert_eq!(client.simple(cmd::TRIM, flag::NO_HOLE, 0, 512), errno::EINVAL, "{headers:?}");
        // A status without a context negotiated.
        assert_eq!(client.simple(cmd::BLOCK_STATUS, 0, 0, 512), errno::EINVAL, "{headers:?}");
        assert_eq!(client.read(0, 16), [0; 16]);
    }
}

#[test]
fn zeroes_with_every_flag() {
    let daemon = serving();
    for headers in ALL {
        let (mut client, _) = open(&daemon, headers);
        for flags in [0, flag::NO_HOLE, flag::FUA, flag::NO_HOLE | flag::FUA] {
            assert_eq!(client.write(0, 0, &vec![7; 1 << 20]), 0);
            assert_eq!(client.simple(cmd::WRITE_ZEROES, flags, 100, MIB - 200), 0, "{headers:?} {flags:#x}");
            let back = client.read(0, MIB);
            let whole = usize::try_from(MIB).unwrap();
            assert!(back[..100].iter().chain(&back[whole - 100..]).all(|byte| *byte == 7), "{headers:?} {flags:#x}");
            assert!(back[100..whole - 100].iter().all(|byte| *byte == 0), "{headers:?} {flags:#x}");
        }
        let fast = client.simple(cmd::WRITE_ZEROES, flag::FAST_ZERO, 0, 65536);
        assert!([0, errno::ENOTSUP].contains(&fast), "{headers:?} fast zero: {fast}");
    }
}

#[test]
fn zeroes_and_trim_give_space_back() {
    let daemon = serving();
    let (mut client, _) = open(&daemon, Headers::Structured);
    let image = daemon.path("disk.img");
    let full = vec![9; usize::try_from(4 * MIB).unwrap()];
    assert_eq!(client.write(0, flag::FUA, &full), 0);
    assert!(allocated(&image) >= 4 * MIB);
    // Zeroes that must stay allocated.
    assert_eq!(client.simple(cmd::WRITE_ZEROES, flag::NO_HOLE, 0, MIB), 0);
    assert!(allocated(&image) >= 4 * MIB, "NO_HOLE made a hole");
    // Zeroes that may be a hole.
    assert_eq!(client.simple(cmd::WRITE_ZEROES, 0, 0, 2 * MIB), 0);
    assert!(allocated(&image) <= 2 * MIB + 65536, "zeroes made no hole: {}", allocated(&image));
    assert_eq!(client.simple(cmd::TRIM, 0, 2 * MIB, 2 * MIB), 0);
    assert!(allocated(&image) <= 65536, "trim made no hole: {}", allocated(&image));
    assert!(client.read(0, 4 * MIB).iter().all(|byte| *byte == 0));
}

#[test]
fn trim_is_ignored_where_the_node_ignores_discards() {
    let daemon = Setup::new()
        .image("a.img", MIB)
        .line("--blockdev file,node-name=f,filename=a.img,discard=ignore")
        .nbd_server()
        .line("--export nbd,id=e,node-name=f,name=disk,writable=on")
        .start();
    let (mut client, _) = open(&daemon, Headers::Structured);
    assert_eq!(client.write(0, 0, &vec![5; 1 << 20]), 0);
    assert_eq!(client.simple(cmd::TRIM, 0, 0, MIB), 0);
    assert!(client.read(0, MIB).iter().all(|byte| *byte == 5));
    // Zeroes keep their space too without discard=unmap, but they are zeroes.
    assert_eq!(client.simple(cmd::WRITE_ZEROES, 0, 0, MIB), 0);
    assert!(client.read(0, MIB).iter().all(|byte| *byte == 0));
    assert!(allocated(&daemon.path("a.img")) >= MIB);
}

#[test]
fn flush_cache_and_fua_answer() {
    let daemon = serving();
    for headers in ALL {
        let (mut client, export) = open(&daemon, headers);
        // HAS_FLAGS FLUSH FUA TRIM WRITE_ZEROES MULTI_CONN CACHE FAST_ZERO.
        for bit in [0, 2, 3, 5, 6, 8, 10, 11] {
            assert!(export.flags & 1 << bit != 0, "{headers:?} flag {bit} of {:#x}", export.flags);
        }
        assert_eq!(export.flags & 2, 0, "read-only");
        assert_eq!(export.flags & 1 << 7 != 0, headers != Headers::Simple, "DF goes with structured replies");
        assert_eq!(client.simple(cmd::FLUSH, 0, 0, 0), 0);
        assert_eq!(client.simple(cmd::CACHE, 0, 0, MIB), 0);
        assert_eq!(client.write(0, flag::FUA, &[1; 4096]), 0);
        assert_eq!(client.simple(cmd::TRIM, flag::FUA, 0, 4096), 0);
    }
}

#[test]
fn a_read_only_export() {
    let daemon = Setup::new()
        .image("a.img", MIB)
        .line("--blockdev file,node-name=f,filename=a.img")
        .nbd_server()
        .line("--export nbd,id=e,node-name=f,name=disk")
        .start();
    for headers in ALL {
        let (mut client, export) = open(&daemon, headers);
        assert_eq!(export.flags & 2, 2, "READ_ONLY in {:#x}", export.flags);
        refused(client.write(0, 0, &[1; 512]), errno::EPERM);
        refused(client.simple(cmd::WRITE_ZEROES, 0, 0, 512), errno::EPERM);
        refused(client.simple(cmd::TRIM, 0, 0, 512), errno::EPERM);
        assert_eq!(client.simple(cmd::FLUSH, 0, 0, 0), 0);
        assert_eq!(client.read(0, 512), [0; 512]);
    }
    assert_eq!(allocated(&daemon.path("a.img")), 0);
}

#[test]
fn holes_in_reads() {
    let daemon = serving();
    for headers in [Headers::Structured, Headers::Extended] {
        let (mut client, _) = open(&daemon, headers);
        assert_eq!(client.write(MIB, 0, &[3; 65536]), 0);
        let reply = client.call(&Request { cmd: cmd::READ, offset: 0, len: 2 * MIB, ..Request::default() });
        assert_eq!(reply.error, 0);
        let mut want = vec![0; usize::try_from(2 * MIB).unwrap()];
        want[1 << 20..(1 << 20) + 65536].fill(3);
        assert!(reply.data == want);
        // In one piece when asked for.
        let reply = client.call(&Request {
            cmd: cmd::READ,
            flags: flag::DF,
            offset: 0,
            len: MIB + 65536,
            ..Request::default()
        });
        assert_eq!((reply.error, reply.data.len()), (0, (1 << 20) + 65536));
        let data = reply.chunks.iter().filter(|kind| [chunk::OFFSET_DATA, chunk::OFFSET_HOLE].contains(kind)).count();
        assert_eq!(data, 1, "{:?}", reply.chunks);
        assert!(reply.data == want[..(1 << 20) + 65536]);
        assert_eq!(client.simple(cmd::TRIM, 0, 0, 4 * MIB), 0);
    }
}

#[test]
fn status_tells_data_from_holes() {
    let daemon = serving();
    for headers in [Headers::Structured, Headers::Extended] {
        let (mut client, id) = with_status(&daemon, headers);
        assert_eq!(client.simple(cmd::TRIM, 0, 0, 4 * MIB), 0);
        assert_eq!(client.write(MIB, 0, &vec![3; 1 << 20]), 0);
        let status = |flags, offset, len| Request { cmd: cmd::BLOCK_STATUS, flags, offset, len, payload: Vec::new() };
        let reply = client.call(&status(0, 0, 4 * MIB));
        let want = [(MIB, 3), (MIB, 0), (2 * MIB, 3)].map(|(len, flags)| Extent { len, flags });
        assert_eq!(reply.extents[&id], want, "{headers:?}");
        let one = client.call(&status(flag::REQ_ONE, MIB / 2, 2 * MIB));
        assert_eq!(one.extents[&id], [Extent { len: MIB / 2, flags: 3 }], "{headers:?}");
        assert_eq!(client.simple(cmd::BLOCK_STATUS, 0, 4 * MIB, 1), errno::EINVAL);
        assert_eq!(client.simple(cmd::BLOCK_STATUS, 0, 0, 0), errno::EINVAL);
    }
}

#[test]
fn allocation_depth() {
    let daemon = Setup::new()
        .image("a.img", MIB)
        .line("--blockdev file,node-name=f,filename=a.img")
        .nbd_server()
        .line("--export nbd,id=e,node-name=f,name=disk,allocation-depth=on,writable=on")
        .start();
    let mut client = daemon.nbd();
    client.greet();
    client.negotiate(Headers::Structured);
    let ids = client.set_contexts("disk", &["base:allocation", "qemu:allocation-depth"]).unwrap();
    client.go("disk").unwrap();
    assert_eq!(client.write(0, 0, &vec![1; 65536]), 0);
    let reply = client.call(&Request { cmd: cmd::BLOCK_STATUS, len: MIB, ..Request::default() });
    assert_eq!(reply.extents.len(), 2);
    let depth = &reply.extents[&ids["qemu:allocation-depth"]];
    assert_eq!(depth.iter().map(|extent| extent.len).sum::<u64>(), MIB, "{depth:?}");
    // A file is one layer, its holes included.
    assert!(depth.iter().all(|extent| extent.flags == 1), "{depth:?}");
}

#[test]
fn status_of_one_context_with_a_payload() {
    let daemon = Setup::new()
        .image("a.img", MIB)
        .line("--blockdev file,node-name=f,filename=a.img")
        .nbd_server()
        .line("--export nbd,id=e,node-name=f,name=disk,allocation-depth=on,writable=on")
        .start();
    let mut client = daemon.nbd();
    client.greet();
    client.negotiate(Headers::Extended);
    let ids = client.set_contexts("disk", &["base:allocation", "qemu:allocation-depth"]).unwrap();
    let export = client.go("disk").unwrap();
    assert!(export.flags & 1 << 12 != 0, "BLOCK_STAT_PAYLOAD in {:#x}", export.flags);
    let mut payload = MIB.to_be_bytes().to_vec();
    payload.extend(ids["base:allocation"].to_be_bytes());
    let request =
        Request { cmd: cmd::BLOCK_STATUS, flags: flag::PAYLOAD_LEN, len: payload.len() as u64, payload, offset: 0 };
    let reply = client.call(&request);
    assert_eq!(reply.error, 0, "{}", reply.message);
    assert_eq!(reply.extents.keys().collect::<Vec<_>>(), [&ids["base:allocation"]]);
}

#[test]
fn requests_in_flight_are_answered_each() {
    let daemon = serving();
    for headers in ALL {
        let (mut client, _) = open(&daemon, headers);
        let mut noise = Noise::new(3);
        let image = noise.bytes(usize::try_from(4 * MIB).unwrap());
        assert_eq!(client.write(0, 0, &image), 0);
        let mut wanted = std::collections::HashMap::new();
        let mut batch = Vec::new();
        for _ in 0..300 {
            let (offset, len) = (noise.below(4 * MIB - 4096), 1 + noise.below(4096));
            let request = Request { cmd: cmd::READ, offset, len, ..Request::default() };
            let cookie = client.expect(&request);
            wanted.insert(cookie, (offset, len));
            batch.extend(client.encode(cookie, &request));
        }
        // All in one go: many headers in one segment, and the last one cut.
        let cut = batch.len() - 5;
        client.send_raw(&batch[..cut]);
        client.send_raw(&batch[cut..]);
        for _ in 0..300 {
            let reply = client.reply();
            let (offset, len) = wanted.remove(&reply.cookie).unwrap();
            let (from, to) = (usize::try_from(offset).unwrap(), usize::try_from(offset + len).unwrap());
            assert!(reply.error == 0 && reply.data == image[from..to], "{headers:?} {offset}+{len}");
        }
    }
}

#[test]
fn a_disconnect_waits_for_what_is_in_flight() {
    let daemon = serving();
    let (mut client, _) = open(&daemon, Headers::Structured);
    let data = Noise::new(4).bytes(1 << 20);
    let write = Request { cmd: cmd::WRITE, offset: 0, len: MIB, payload: data.clone(), flags: 0 };
    let cookie = client.expect(&write);
    let mut batch = client.encode(cookie, &write);
    let bye = Request { cmd: cmd::DISC, ..Request::default() };
    batch.extend(client.encode(99, &bye));
    client.send_raw(&batch);
    assert!(client.closed());
    let (mut client, _) = open(&daemon, Headers::Structured);
    assert!(client.read(0, MIB) == data);
}

#[test]
fn block_sizes_are_what_direct_io_needs() {
    let daemon = Setup::new()
        .image("a.img", MIB)
        .line("--blockdev file,node-name=f,filename=a.img,cache.direct=on")
        .nbd_server()
        .line("--export nbd,id=e,node-name=f,name=disk,writable=on")
        .start();
    let (client, export) = open(&daemon, Headers::Structured);
    let (min, preferred, _) = export.block_sizes.unwrap();
    assert!(min <= preferred && min.is_power_of_two(), "{export:?}");
    drop(client);
    // A client that did not ask has promised nothing: the server reads around what it sends.
    let mut client = daemon.nbd();
    client.greet();
    client.info(opt::GO, "disk", &[]).unwrap();
    let data = Noise::new(5).bytes(10_000);
    assert_eq!(client.write(777, 0, &data), 0);
    assert!(client.read(777, 10_000) == data);
    assert_eq!(client.read(0, 777), vec![0; 777]);
    assert_eq!(client.simple(cmd::WRITE_ZEROES, 0, 1000, 5000), 0);
    let back = client.read(777, 10_000);
    assert!(back[..223] == data[..223] && back[5223..] == data[5223..] && back[223..5223].iter().all(|b| *b == 0));
}

#[test]
fn an_image_of_odd_size() {
    let setup = |direct: &str| {
        Setup::new()
            .image("a.img", 1_000_001)
            .line(&format!("--blockdev file,node-name=f,filename=a.img,cache.direct={direct}"))
            .nbd_server()
            .line("--export nbd,id=e,node-name=f,name=disk,writable=on")
    };
    let daemon = setup("off").start();
    let (mut client, export) = open(&daemon, Headers::Structured);
    // The size may be rounded up to whole sectors; the tail is zeroes then.
    assert!([1_000_001, 1_000_448].contains(&export.size), "{}", export.size);
    assert_eq!(client.write(999_990, 0, b"the ending!"), 0);
    assert_eq!(client.read(999_990, 11), b"the ending!");
    drop((client, daemon));
    // With direct I/O the last unit may reach beyond the end. Whole sectors are rounded up to; a device with larger ones
    // makes the image one that cannot be written.
    let mut daemon = setup("on").line("--pidfile ready").spawn();
    let serves = tests::wait_for("the daemon to serve or end", || match daemon.ended() {
        Some(_) => Some(false),
        None => daemon.path("ready").exists().then_some(true),
    });
    if serves {
        let mut client = daemon.nbd();
        client.greet();
        client.info(opt::GO, "disk", &[]).unwrap();
        assert_eq!(client.write(999_990, 0, b"the ending!"), 0);
        assert_eq!(client.read(999_990, 11), b"the ending!");
    } else {
        let text = "Cannot get 'write' permission without 'resize': Image size is not a multiple of request alignment";
        assert!(daemon.stderr().contains(text), "{}", daemon.stderr());
    }
}
