//! Front-ends and guests that break the rules: they lose their connection, and the next one is served as if nothing had been.

use super::{client, serving, socket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use tests::image::Noise;
use tests::vhost::{FrontEnd, GUEST, INDIRECT, MEMORY, MONITOR, NEXT, WRITE, descriptor, event, memory, msg, req};
use tests::{Daemon, known_defect};

fn longs(list: &[u64]) -> Vec<u8> {
    list.iter().flat_map(|n| n.to_le_bytes()).collect()
}

fn words(list: &[u32]) -> Vec<u8> {
    list.iter().flat_map(|n| n.to_le_bytes()).collect()
}

/// The daemon still serves.
fn works(daemon: &mut Daemon) {
    assert!(daemon.alive());
    let mut front = client(daemon);
    front.write(1, &[1; 512]);
    assert_eq!(front.read(1, 512), [1; 512]);
}

/// Lets a guest do something to its ring, and expects that it is thrown out.
fn thrown_out(daemon: &mut Daemon, what: &str, deed: impl FnOnce(&mut FrontEnd)) {
    let mut front = client(daemon);
    front.write(0, &[0; 512]);
    deed(&mut front);
    // It may be gone before the kick.
    front.kick(0);
    assert!(front.closed() || known_defect(what), "{what}: still connected");
    drop(front);
    works(daemon);
}

#[test]
fn rings_full_of_lies() {
    let mut daemon = serving("writable=on");
    let d = &mut daemon;
    thrown_out(d, "an index beyond the ring", |f| f.set_available(0, 5000));
    thrown_out(d, "a head beyond the table", |f| f.offer(0, 128));
    thrown_out(d, "a circle", |f| {
        f.prepare(0, 0, req::IN, 0, &[], 512);
        f.descriptor(0, 1, GUEST, 16, NEXT, 0);
        f.offer(0, 0);
    });
    thrown_out(d, "a next beyond the table", |f| {
        f.prepare(0, 0, req::IN, 0, &[], 512);
        f.descriptor(0, 0, GUEST, 16, NEXT, 4000);
        f.offer(0, 0);
    });
    for (addr, len) in [
        (0, 16),
        (GUEST - 1, 16),
        (GUEST + MEMORY, 1),
        (GUEST + MEMORY - 8, 16),
        (u64::MAX, 16),
        (u64::MAX - 15, 16),
        (GUEST, u32::MAX),
    ] {
        thrown_out(d, "memory that is not there", |f| {
            f.prepare(0, 0, req::OUT, 0, &[], 512);
            f.descriptor(0, 1, addr, len, NEXT, 2);
            f.offer(0, 0);
        });
    }
    thrown_out(d, "readable after writable", |f| {
        f.prepare(0, 0, req::IN, 0, &[], 512);
        f.descriptor(0, 2, GUEST, 16, 0, 0);
        f.offer(0, 0);
    });
    thrown_out(d, "no bytes", |f| {
        f.prepare(0, 0, req::IN, 0, &[], 512);
        f.descriptor(0, 1, GUEST, 0, NEXT | WRITE, 2);
        f.offer(0, 0);
    });
    thrown_out(d, "no status", |f| {
        f.descriptor(0, 0, GUEST + f.buffer(0, 0), 16, 0, 0);
        f.offer(0, 0);
    });
    thrown_out(d, "a short header", |f| {
        f.prepare(0, 0, req::IN, 0, &[], 512);
        f.descriptor(0, 0, GUEST + f.buffer(0, 0), 15, NEXT, 1);
        f.offer(0, 0);
    });
}

/// As [`rings_full_of_lies`], where the driver's and the device's descriptors lie in one ring.
#[test]
fn packed_rings_full_of_lies() {
    let mut daemon = serving("writable=on");
    let mut thrown_out = |what: &str, deed: &dyn Fn(&mut FrontEnd)| {
        let Some(mut front) = FrontEnd::start_packed(&socket(&daemon), 1, 0) else {
            assert!(known_defect("no packed rings"));
            return;
        };
        front.write(0, &[0; 512]);
        deed(&mut front);
        front.kick(0);
        assert!(front.closed(), "{what}: still connected");
        drop(front);
        works(&mut daemon);
    };
    thrown_out("a chain of the whole ring and more", &|f| {
        (0..128)
            .for_each(|slot| f.poke(16 * slot, &[&GUEST.to_le_bytes()[..], &[16, 0, 0, 0, 0, 0, 0x81, 0]].concat()));
        f.poke(0, &[&GUEST.to_le_bytes()[..], &[16, 0, 0, 0, 0, 0, 1, 0x80]].concat());
    });
    for (addr, len) in [(0, 16), (GUEST + MEMORY - 8, 16), (u64::MAX - 15, 16), (GUEST, u32::MAX)] {
        thrown_out("memory that is not there", &|f| {
            f.prepare(0, 0, req::OUT, 0, &[], 512);
            f.descriptor(0, 1, addr, len, NEXT, 2);
            f.offer(0, 0);
        });
    }
    thrown_out("readable after writable", &|f| {
        f.prepare(0, 0, req::IN, 0, &[], 512);
        f.descriptor(0, 2, GUEST, 16, 0, 0);
        f.offer(0, 0);
    });
    thrown_out("no status", &|f| {
        f.descriptor(0, 0, GUEST + f.buffer(0, 0), 16, 0, 0);
        f.offer(0, 0);
    });
    for (len, flags) in
        [(0, INDIRECT), (33, INDIRECT), (16 * 70000, INDIRECT), (u32::MAX - 15, INDIRECT), (32, INDIRECT | NEXT)]
    {
        thrown_out("a table that is none", &|f| {
            f.descriptor(0, 10, GUEST, 1, WRITE, 0);
            f.descriptor(0, 9, GUEST + f.buffer(0, 3), len, flags, 10);
            f.offer(0, 9);
        });
    }
    let mut front = FrontEnd::connect(&socket(&daemon));
    front.packed = true;
    front.negotiate(u64::MAX, u64::MAX);
    if front.is_packed() {
        let base = [0, 128_u32 | 128 << 16].map(|word| word.to_le_bytes()).concat();
        front.share_memory();
        assert_eq!(front.try_tell(msg::SET_VRING_NUM, &[0_u32, 128].map(u32::to_le_bytes).concat(), &[]), 0);
        assert_eq!(front.try_tell(msg::SET_VRING_BASE, &base, &[]), 0);
        assert_eq!(front.try_tell(msg::SET_VRING_ADDR, &FrontEnd::addresses(0, 0, 0), &[]), 0);
        assert_eq!(front.try_tell(msg::SET_VRING_KICK, &[0; 8], &[event().as_fd()]), 1, "a place beyond the ring");
    }
    drop(front);
    works(&mut daemon);
}

#[test]
fn indirect_tables_full_of_lies() {
    let mut daemon = serving("writable=on");
    let d = &mut daemon;
    let table = |entries: Vec<[u8; 16]>, len: u32, flags: u16| {
        move |f: &mut FrontEnd| {
            let at = f.buffer(0, 3);
            f.poke(at, &entries.concat());
            f.descriptor(0, 9, GUEST + at, len, flags, 10);
            f.offer(0, 9);
        }
    };
    let good = || vec![descriptor(GUEST, 16, NEXT, 1), descriptor(GUEST + 16, 1, WRITE, 0)];
    thrown_out(d, "a table of no entries", table(good(), 0, INDIRECT));
    thrown_out(d, "a table that ends within an entry", table(good(), 33, INDIRECT));
    thrown_out(d, "a huge table", table(good(), 16 * 70000, INDIRECT));
    thrown_out(d, "a table beyond the memory", table(good(), u32::MAX - 15, INDIRECT));
    thrown_out(d, "a table and more", table(good(), 32, INDIRECT | NEXT));
    thrown_out(d, "a circle in a table", table(vec![descriptor(GUEST, 16, NEXT, 0)], 16, INDIRECT));
    thrown_out(d, "a next beyond a table", table(vec![descriptor(GUEST, 16, NEXT, 7)], 16, INDIRECT));
    let nested = vec![descriptor(GUEST + 65536, 16, INDIRECT, 0)];
    thrown_out(d, "a table in a table", table(nested, 16, INDIRECT));
    let far = vec![descriptor(GUEST, 16, NEXT, 1), descriptor(1, 16, WRITE, 0)];
    thrown_out(d, "memory that is not there", table(far, 32, INDIRECT));
}

/// Rings, tables and requests of random bytes; the daemon lives, and the next guest finds a working disk.
#[test]
fn rings_full_of_noise() {
    let mut daemon = serving("writable=on");
    let mut noise = Noise::new(42);
    for _ in 0..60 {
        let mut front = client(&daemon);
        let mut bytes = noise.bytes(0x4000);
        // Most descriptors point into the memory, or nothing would come of them.
        for entry in bytes.chunks_exact_mut(16) {
            let addr = GUEST + noise.below(MEMORY);
            entry[..8].copy_from_slice(&addr.to_le_bytes());
            entry[8..12].copy_from_slice(&u32::try_from(noise.below(5000)).unwrap().to_le_bytes());
            entry[12..14].copy_from_slice(&u16::try_from(noise.below(8)).unwrap().to_le_bytes());
            entry[14..].copy_from_slice(&u16::try_from(noise.below(130)).unwrap().to_le_bytes());
        }
        front.poke(0, &bytes);
        for _ in 0..32 {
            let head = u16::try_from(noise.below(128)).unwrap();
            front.offer(0, head);
        }
        front.kick(0);
        // Gone or not, it is in order to hear of it: a message is answered or the connection has ended.
        let _ = front.try_send(msg::GET_FEATURES, 0, &[], &[]);
        let _ = front.receive();
    }
    works(&mut daemon);
}

#[test]
fn messages_that_make_no_sense() {
    if known_defect("the reference ends") {
        return;
    }
    let mut daemon = serving("writable=on,num-queues=2");
    let bad: Vec<(u32, Vec<u8>)> = vec![
        (msg::SET_FEATURES, vec![]),
        (msg::SET_FEATURES, vec![0; 4]),
        (msg::SET_FEATURES, longs(&[1 << 63])),
        (msg::SET_PROTOCOL_FEATURES, longs(&[1 << 60])),
        (msg::SET_MEM_TABLE, words(&[9, 0])),
        (msg::SET_MEM_TABLE, words(&[u32::MAX, 0])),
        (msg::SET_MEM_TABLE, words(&[1, 0])),
        (msg::SET_VRING_NUM, words(&[2, 128])),
        (msg::SET_VRING_NUM, words(&[u32::MAX, 128])),
        (msg::SET_VRING_NUM, words(&[0, 0])),
        (msg::SET_VRING_NUM, words(&[0, 100])),
        (msg::SET_VRING_NUM, words(&[0, 1 << 20])),
        (msg::SET_VRING_BASE, words(&[0, 1 << 16])),
        (msg::SET_VRING_KICK, longs(&[1 << 8])),
        (msg::SET_VRING_KICK, longs(&[0])),
        (msg::SET_VRING_CALL, longs(&[200 | 1 << 8])),
        (msg::SET_VRING_ENABLE, words(&[7, 1])),
        (msg::SET_CONFIG, words(&[32, 4000, 0])),
        (msg::SET_CONFIG, words(&[0, 1, 0])),
        (msg::GET_CONFIG, words(&[u32::MAX, 2, 0])),
        (msg::GET_VRING_BASE, words(&[99, 0])),
        (msg::ADD_MEM_REG, longs(&[0, GUEST, 4096, MONITOR, 0])),
        (msg::SET_INFLIGHT_FD, longs(&[0, 0, 0])),
        (9999, vec![]),
        (0, vec![]),
    ];
    for (request, payload) in bad {
        let front = FrontEnd::connect(&socket(&daemon));
        front.send(request, 0, &payload, &[]);
        let what = format!("message {request} with {payload:?}");
        // Something it does not even notice may be answered.
        let _ = front.try_send(msg::GET_FEATURES, 0, &[], &[]);
        assert!(front.receive().is_none(), "{what} was taken");
    }
    // Headers that are none.
    for bytes in [words(&[1, 1, 70000]), words(&[1, 0, 0]), words(&[1, 2, 0]), words(&[1, 5, 0]), words(&[u32::MAX; 3])]
    {
        let front = FrontEnd::connect(&socket(&daemon));
        let _ = front.try_send_raw(&bytes, &[]);
        assert!(front.receive().is_none(), "{bytes:?}");
    }
    // A message that never ends, and one in the smallest pieces.
    let front = FrontEnd::connect(&socket(&daemon));
    front.try_send_raw(&words(&[2, 1, 8])[..11], &[]).unwrap();
    drop(front);
    let front = FrontEnd::connect(&socket(&daemon));
    for byte in words(&[msg::GET_FEATURES, 1, 0]) {
        front.try_send_raw(&[byte], &[]).unwrap();
    }
    assert_eq!(front.receive().unwrap().request, msg::GET_FEATURES);
    drop(front);
    works(&mut daemon);
}

#[test]
fn messages_that_make_no_sense_are_answered_if_asked_for() {
    let mut daemon = serving("writable=on");
    if known_defect("the reference ends the connection") {
        return;
    }
    let front = client(&daemon);
    let overlapping =
        [words(&[2, 0]), longs(&[GUEST, 8192, MONITOR, 0, GUEST + 4096, 8192, MONITOR + 8192, 0])].concat();
    let beyond = [words(&[1, 0]), longs(&[GUEST, MEMORY + 4096, MONITOR, 0])].concat();
    let wraps = [words(&[1, 0]), longs(&[u64::MAX - 4096, 8192, MONITOR, 0])].concat();
    let empty = [words(&[1, 0]), longs(&[GUEST, 0, MONITOR, 0])].concat();
    let file = front.memory.as_fd();
    for (payload, fds) in
        [(&overlapping, vec![file; 2]), (&beyond, vec![file]), (&wraps, vec![file]), (&empty, vec![file])]
    {
        assert_ne!(front.try_tell(msg::SET_MEM_TABLE, payload, &fds), 0, "{payload:?}");
    }
    assert_ne!(front.try_tell(9999, &[], &[]), 0);
    assert_ne!(front.try_tell(msg::SET_VRING_NUM, &words(&[0, 64]), &[]), 0, "a running queue keeps its size");
    // Nothing of that changed anything.
    let mut front = front;
    front.write(0, &[1; 512]);
    drop(front);
    works(&mut daemon);
}

#[test]
fn descriptors_of_the_wrong_kind() {
    let mut daemon = serving("writable=on");
    if known_defect("kinds of descriptors are not checked") {
        return;
    }
    let null = OwnedFd::from(std::fs::File::options().read(true).write(true).open("/dev/null").unwrap());
    let (pipe, _writer) = std::io::pipe().unwrap();
    let pipe = OwnedFd::from(pipe);
    let dir = OwnedFd::from(std::fs::File::open("/").unwrap());
    let file = OwnedFd::from(std::fs::File::open(daemon.path("disk.img")).unwrap());
    let counter = event();
    let front = client(&daemon);
    let table = [words(&[1, 0]), longs(&[GUEST, 4096, MONITOR, 0])].concat();
    for fd in [&null, &pipe, &dir, &counter, &file] {
        assert_ne!(front.try_tell(msg::SET_MEM_TABLE, &table, &[fd.as_fd()]), 0, "{fd:?} as memory");
    }
    for fd in [&null, &pipe, &dir, &file] {
        for message in [msg::SET_VRING_CALL, msg::SET_VRING_ERR] {
            assert_ne!(front.try_tell(message, &longs(&[0]), &[fd.as_fd()]), 0, "{fd:?} as event");
        }
    }
    drop(front);
    for count in [2, 8, 16, 60] {
        let front = FrontEnd::connect(&socket(&daemon));
        let many: Vec<BorrowedFd<'_>> = vec![counter.as_fd(); count];
        let _ = front.try_send(msg::GET_FEATURES, 0, &[], &many);
        assert!(front.closed(), "{count} descriptors where none belongs");
    }
    let before = daemon.open_fds();
    for _ in 0..50 {
        let front = FrontEnd::connect(&socket(&daemon));
        let _ = front.try_send(msg::SET_MEM_TABLE, 0, &table, &[null.as_fd(), null.as_fd()]);
        assert!(front.closed());
    }
    tests::wait_for("descriptors are not kept", || (daemon.open_fds() <= before + 2).then_some(()));
    works(&mut daemon);
}

#[test]
fn memory_that_is_taken_away() {
    let mut daemon = serving("writable=on");
    if known_defect("the reference dies of SIGBUS") {
        return;
    }
    for (queue_stays, reads) in [(true, true), (true, false), (false, true)] {
        let mut front = client(&daemon);
        front.write(0, &[1; 512]);
        let len = if queue_stays { 1 << 20 } else { 0 };
        front.prepare(0, 0, if reads { req::IN } else { req::OUT }, 0, &[], 0);
        front.offer(0, 0);
        front.memory.set_len(len).unwrap();
        front.kick(0);
        assert!(front.closed(), "memory of {len} bytes");
        drop(front);
        works(&mut daemon);
    }
    // Memory that is too short from the start is not taken.
    let front = FrontEnd::connect(&socket(&daemon));
    let short = memory(4096);
    let table = [words(&[1, 0]), longs(&[GUEST, 8192, MONITOR, 0])].concat();
    front.send(msg::SET_MEM_TABLE, 0, &table, &[short.as_fd()]);
    assert!(front.closed());
    works(&mut daemon);
}

#[test]
fn rings_that_are_not_there() {
    let mut daemon = serving("writable=on");
    for (at, size) in [(MONITOR + MEMORY - 64, 128_u32), (0, 128), (MONITOR - 64, 128), (u64::MAX - 8, 128)] {
        let mut front = FrontEnd::connect(&socket(&daemon));
        front.negotiate(u64::MAX, 0);
        front.share_memory();
        front.send(msg::SET_VRING_NUM, 0, &words(&[0, size]), &[]);
        let payload = [words(&[0, 0]), longs(&[at, at, at, 0])].concat();
        front.send(msg::SET_VRING_ADDR, 0, &payload, &[]);
        let kick = event();
        // The connection may have ended before.
        let _ = front.try_send(msg::SET_VRING_KICK, 0, &longs(&[0]), &[kick.as_fd()]);
        let _ = front.try_send(msg::GET_FEATURES, 0, &[], &[]);
        assert!(front.receive().is_none() || known_defect("a ring outside"), "{at:#x}");
    }
    works(&mut daemon);
}

#[test]
fn a_front_end_that_never_reads_holds_nobody_up() {
    let mut daemon = serving("writable=on");
    let front = FrontEnd::connect(&socket(&daemon));
    if known_defect("it blocks in a send, the monitor with it") {
        return;
    }
    // Until neither side takes any more.
    rustix::io::ioctl_fionbio(front.socket(), true).unwrap();
    while front.try_send(msg::GET_FEATURES, 0, &[], &[]).is_ok() {}
    let mut qmp = daemon.qmp();
    qmp.ok("query-block-exports", serde_json::json!({}));
    qmp.ok("block-export-del", serde_json::json!({"id": "e", "mode": "hard"}));
    qmp.event("BLOCK_EXPORT_DELETED");
    assert!(daemon.alive());
}
