//! Front-ends that come and go by the thousand, and queues that are set up, switched and reset in any order and at any time, with
//! requests under way. Nothing is done twice, nothing stays behind.

use super::lifecycle::{fast, slow};
use super::{MIB, byte, client, serving, socket};
use std::os::fd::AsFd;
use tests::image::contents;
use tests::vhost::{FrontEnd, GUEST, MEMORY, MONITOR, event, msg, protocol, req};
use tests::{known_defect, on_reference, wait_for};

fn longs(list: &[u64]) -> Vec<u8> {
    list.iter().flat_map(|n| n.to_le_bytes()).collect()
}

fn words(list: &[u32]) -> Vec<u8> {
    list.iter().flat_map(|n| n.to_le_bytes()).collect()
}

/// The requests that are noted as done, each once.
fn heads(front: &mut FrontEnd, count: usize) -> Vec<u32> {
    let mut heads: Vec<u32> = (0..count).map(|_| front.wait_used(0).0).collect();
    heads.sort_unstable();
    heads
}

fn submit_twenty(front: &mut FrontEnd) -> Vec<u32> {
    for slot in 0..20 {
        front.submit(0, slot, req::OUT, u64::from(slot), &[byte(slot + 1); 512], 0);
    }
    (0..20).map(|slot| slot * 3).collect()
}

#[test]
fn a_queue_is_switched_while_requests_run() {
    if known_defect("a queue that is disabled is served") {
        return;
    }
    let daemon = slow();
    let mut front = client(&daemon);
    let all = submit_twenty(&mut front);
    for turn in 0..50 {
        front.tell(msg::SET_VRING_ENABLE, &words(&[0, turn % 2]), &[]);
        // Other descriptors for the same queue, and the same place once more.
        let kick = event();
        front.tell(msg::SET_VRING_KICK, &longs(&[0]), &[kick.as_fd()]);
        front.tell(msg::SET_VRING_ADDR, &FrontEnd::addresses(0, 0, 0), &[]);
        front.call_by(0, event());
    }
    // The last was on.
    fast(&mut daemon.qmp());
    assert_eq!(heads(&mut front, 20), all);
    assert_eq!(front.poll_used(0), None);
    let image = contents(&daemon.path("disk.img"));
    for slot in 0..20_usize {
        assert_eq!(front.status(0, u16::try_from(slot).unwrap()), 0);
        assert_eq!(image[slot * 512..][..512], [byte(slot + 1); 512]);
    }
}

/// Whatever ends the use of a queue waits for its requests: with the answer the guest's memory is the guest's alone.
#[test]
fn resets_while_requests_run() {
    if on_reference() {
        tests::skip!("the reference has none of these resets");
    }
    let reset = |request, payload| (request, payload);
    for (request, payload) in [
        reset(msg::RESET_DEVICE, vec![]),
        reset(msg::RESET_OWNER, vec![]),
        reset(msg::SET_STATUS, longs(&[0])),
        reset(msg::GET_VRING_BASE, words(&[0, 0])),
    ] {
        let daemon = slow();
        let mut front = client(&daemon);
        let all = submit_twenty(&mut front);
        // One is done at once; the others are taken then, and wait.
        let first = front.wait_used(0).0;
        // With an answer, if it has none of its own.
        front.send(request, if request == msg::GET_VRING_BASE { 0 } else { 1 << 3 }, &payload, &[]);
        fast(&mut daemon.qmp());
        assert_eq!(front.receive().unwrap().request, request);
        let mut done = vec![first];
        done.extend(std::iter::from_fn(|| front.poll_used(0)).map(|(head, _)| head));
        done.sort_unstable();
        assert_eq!(done, all, "message {request}");
        // Nothing is taken from it any more, until it is set up once more.
        front.submit(0, 0, req::IN, 0, &[], 512);
        let after = front.peek(0, 0x10000);
        assert_eq!(front.ask(msg::GET_FEATURES, &[]).request, msg::GET_FEATURES);
        assert!(front.peek(0, 0x10000) == after && front.poll_used(0).is_none(), "message {request}");
        front.queues.clear();
        front.poke(0, &[0; 0x10000]);
        if request == msg::RESET_DEVICE {
            front.negotiate(u64::MAX, u64::MAX);
        }
        front.add_queue(0, 128);
        assert_eq!(front.read(3, 512), [4; 512]);
    }
}

#[test]
fn queues_that_are_set_up_in_a_wrong_order() {
    if on_reference() {
        tests::skip!("the reference ends, or tells nothing");
    }
    let mut daemon = serving("writable=on,num-queues=2");
    let kick = event();
    let starts = |front: &FrontEnd| front.try_tell(msg::SET_VRING_KICK, &longs(&[0]), &[kick.as_fd()]);
    let size = words(&[0, 128]);
    let at = FrontEnd::addresses(0, 0, 0);
    let fresh = || {
        let mut front = FrontEnd::connect(&socket(&daemon));
        front.negotiate(u64::MAX, u64::MAX);
        front
    };
    // Without a size, a place, or memory; then with all of it, in the order of the alphabet.
    let mut front = fresh();
    assert_ne!(starts(&front), 0, "nothing is known");
    front.tell(msg::SET_VRING_ENABLE, &words(&[0, 1]), &[]);
    front.tell(msg::SET_VRING_BASE, &words(&[0, 0]), &[]);
    front.tell(msg::SET_VRING_ADDR, &at, &[]);
    assert_ne!(starts(&front), 0, "no size");
    front.tell(msg::SET_VRING_NUM, &size, &[]);
    assert_ne!(starts(&front), 0, "no memory");
    front.share_memory();
    front.add_queue(0, 128);
    front.write(0, &[1; 512]);
    // A queue that was never started is stopped, twice, and where it was told to begin.
    assert_eq!(front.stop_queue(1), 0);
    front.tell(msg::SET_VRING_BASE, &words(&[1, 77]), &[]);
    assert_eq!((front.stop_queue(1), front.stop_queue(1)), (77, 77));
    // While a queue runs its shape stays, as do the features.
    for (message, payload) in [
        (msg::SET_VRING_NUM, words(&[0, 64])),
        (msg::SET_VRING_BASE, words(&[0, 5])),
        (msg::SET_FEATURES, longs(&[0])),
        (msg::SET_FEATURES, longs(&[front.features & !tests::vhost::feature::EVENT_IDX])),
    ] {
        assert_ne!(front.try_tell(message, &payload, &[]), 0, "message {message}");
    }
    front.write(1, &[2; 512]);
    // A base that the ring has not come to: what the guest has there is beyond it.
    let base = front.stop_queue(0);
    front.tell(msg::SET_VRING_BASE, &words(&[0, u32::from(base.wrapping_sub(1000))]), &[]);
    let _ = starts(&front);
    assert!(front.closed(), "more than the ring can hold is available");
    drop(front);
    // Requests in flight are noted in a region of shorter rings.
    let mut front = fresh();
    front.share_memory();
    front.make_inflight(2, 64);
    front.tell(msg::SET_VRING_NUM, &size, &[]);
    front.tell(msg::SET_VRING_ADDR, &at, &[]);
    assert_ne!(starts(&front), 0, "a region of shorter rings");
    drop(front);
    assert!(daemon.alive());
    let mut front = client(&daemon);
    assert_eq!(front.read(1, 512), [2; 512]);
}

/// Memory that is withdrawn by a message, and regions that would lie over others.
#[test]
fn regions_that_overlap_or_are_withdrawn() {
    let mut daemon = serving("writable=on");
    if on_reference() {
        tests::skip!("the reference ends the connection, or itself");
    }
    let region = |guest: u64, monitor: u64, size: u64| longs(&[0, guest, size, monitor, 0]);
    let mut front = client(&daemon);
    assert_ne!(front.protocol & protocol::CONFIGURE_MEM_SLOTS, 0);
    let file = front.memory.try_clone().unwrap();
    for (guest, size) in
        [(GUEST, MEMORY), (GUEST + MEMORY - 4096, 8192), (GUEST - 4096, 4097), (GUEST + 4096, 1), (0, MEMORY)]
    {
        let payload = region(guest, MONITOR + (1 << 40), size);
        assert_ne!(front.try_tell(msg::ADD_MEM_REG, &payload, &[file.as_fd()]), 0, "{size} bytes at {guest:#x}");
    }
    front.write(0, &[1; 512]);
    // Below a ring that runs: the connection ends, the answer may or may not come before.
    front.send(msg::REM_MEM_REG, 1 << 3, &region(GUEST, MONITOR, MEMORY), &[]);
    let _ = front.receive();
    assert!(front.closed());
    let front = client(&daemon);
    front.send(msg::SET_MEM_TABLE, 1 << 3, &words(&[0, 0]), &[]);
    let _ = front.receive();
    assert!(front.closed());
    drop(front);
    assert!(daemon.alive());
    let mut front = client(&daemon);
    assert_eq!(front.read(0, 512), [1; 512]);
}

#[test]
fn a_thousand_connects() {
    if known_defect("front-ends that leave in the middle end the daemon") {
        return;
    }
    let mut daemon = serving("writable=on,num-queues=2");
    let settled = |daemon: &tests::Daemon| (daemon.open_fds(), daemon.threads_and_mappings());
    // What is made once is there after the first.
    drop(FrontEnd::start(&socket(&daemon), 2, 0));
    drop(client(&daemon));
    let (fds, (threads, mappings)) = settled(&daemon);
    for turn in 0..1000_u32 {
        match turn % 10 {
            // Leaves in the middle of its requests.
            0 => {
                let mut front = FrontEnd::start(&socket(&daemon), 2, 0);
                for slot in 0..8 {
                    front.submit(turn / 10 % 2, slot, req::OUT, u64::from(slot), &[1; 512], 0);
                }
            }
            // Leaves in the middle of a message.
            1 => {
                let _ = FrontEnd::connect(&socket(&daemon)).try_send_raw(&words(&[msg::SET_FEATURES, 1, 8]), &[]);
            }
            // Leaves descriptors behind.
            2 => {
                let front = FrontEnd::connect(&socket(&daemon));
                let payload = [words(&[1, 0]), longs(&[GUEST, MEMORY, MONITOR, 0])].concat();
                let _ = front.try_send(msg::SET_MEM_TABLE, 0, &payload, &[front.memory.as_fd()]);
                let kick = event();
                let _ = front.try_send(msg::SET_VRING_KICK, 0, &longs(&[1]), &[kick.as_fd()]);
            }
            _ => drop(FrontEnd::connect(&socket(&daemon))),
        }
    }
    let mut front = client(&daemon);
    front.write(1, &[1; 512]);
    assert_eq!(front.read(1, 512), [1; 512]);
    drop(front);
    assert!(daemon.alive());
    wait_for("what front-ends had to be given back", || {
        let (now_fds, (now_threads, now_mappings)) = settled(&daemon);
        // A pool of threads may have grown, and the heap.
        (now_fds <= fds + 4 && now_threads <= threads + 4 && now_mappings <= mappings + 32).then_some(())
    });
}

/// More front-ends than are listened for, all at once: they get their turn, or are sent away by the kernel.
#[test]
fn a_crowd_at_the_door() {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
    let mut daemon = serving("writable=on");
    let first = client(&daemon);
    let place = SocketAddrUnix::new(socket(&daemon)).unwrap();
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let crowd: Vec<_> = (0..3000)
        .map_while(|_| {
            let one = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).ok()?;
            connect(&one, &place).ok().map(|()| one)
        })
        .collect();
    assert!(!crowd.is_empty());
    drop(first);
    drop(crowd);
    let mut front = client(&daemon);
    front.write(0, &[1; 512]);
    assert_eq!(contents(&daemon.path("disk.img")).len() as u64, 8 * MIB);
    assert!(daemon.alive());
}
