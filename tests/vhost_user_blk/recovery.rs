//! A daemon that is killed, and one that takes over; a front-end that comes back. Nothing acknowledged is lost, nothing that was
//! asked for is forgotten, nothing is told twice.

use super::{MIB, byte, client, serving, socket};
use tests::image::{Noise, contents};
use tests::vhost::{FrontEnd, protocol, req};
use tests::{Daemon, Setup, on_reference, wait_for};

const RECORD: usize = 4096;

/// A record that says where it belongs.
fn record(index: u64) -> Vec<u8> {
    Noise::new(index + 1).bytes(RECORD)
}

/// A daemon whose disk does one request a second, in front of the image of another one.
fn take_over(old: &Daemon, slow: bool) -> Daemon {
    let image = old.path("disk.img");
    wait_for("the image to be free", || tests::locks::read_locked_bytes(&image).is_empty().then_some(()));
    let file = format!("driver=file,node-name=f,filename={}", image.display());
    let limit = if slow { "1" } else { "0" };
    Setup::new()
        .line(&format!("--object throttle-group,id=g,x-iops-write={limit}"))
        .arg("--blockdev")
        .arg(file)
        .line("--blockdev driver=throttle,node-name=disk,file=f,throttle-group=g")
        .line(&super::export("writable=on"))
        .start()
}

/// The front-end of a queue and a region of requests in flight connects again.
fn come_back(front: &mut FrontEnd, daemon: &Daemon) {
    front.reconnect(&socket(daemon));
    front.negotiate(u64::MAX, u64::MAX);
    front.share_memory();
    front.set_inflight();
    // The front-end does not know how far the last daemon came; the region does.
    front.start_queue(0, 0);
}

#[test]
fn requests_in_flight_outlive_the_daemon() {
    [false, true].into_iter().for_each(outlive_the_daemon);
}

fn outlive_the_daemon(packed: bool) {
    let owner = Setup::new().image("disk.img", 8 * MIB).line("--blockdev driver=null-co,node-name=n").start();
    let mut daemon = take_over(&owner, true);
    let mut front = FrontEnd::connect(&socket(&daemon));
    front.packed = packed;
    front.negotiate(u64::MAX, u64::MAX);
    if front.protocol & protocol::INFLIGHT_SHMFD == 0 {
        assert!(on_reference());
        return;
    }
    front.share_memory();
    front.make_inflight(1, 128);
    front.add_queue(0, 128);
    // Some are done, the rest is taken and waits, over several lives.
    let mut done = vec![0; 40];
    for slot in 0..40 {
        front.submit(0, slot, req::OUT, u64::from(slot) * 8, &record(u64::from(slot)), 0);
    }
    for life in 0..4 {
        // At least one more, and whatever else is there.
        let (head, _) = front.wait_used(0);
        done[usize::try_from(head / 3).unwrap()] += 1;
        daemon.crash();
        while let Some((head, _)) = front.poll_used(0) {
            done[usize::try_from(head / 3).unwrap()] += 1;
        }
        let image = contents(&owner.path("disk.img"));
        for slot in (0..40).filter(|slot| done[*slot] > 0) {
            let at = slot * RECORD;
            assert!(image[at..at + RECORD] == record(slot as u64), "request {slot} was told to be done");
        }
        daemon = take_over(&owner, life < 3);
        come_back(&mut front, &daemon);
        front.kick(0);
    }
    while done.contains(&0) {
        let (head, _) = front.wait_used(0);
        done[usize::try_from(head / 3).unwrap()] += 1;
    }
    assert_eq!(done, [1; 40], "each is done once");
    assert_eq!(front.poll_used(0), None);
    assert!((0..40).all(|slot| front.status(0, slot) == 0));
    // And it goes on.
    for slot in 0..40 {
        assert!(front.read(slot * 8, 4096) == record(slot));
    }
}

#[test]
fn a_front_end_comes_back_to_the_same_daemon() {
    [false, true].into_iter().for_each(comes_back_to_the_same_daemon);
}

fn comes_back_to_the_same_daemon(packed: bool) {
    let daemon = serving("writable=on");
    let mut front = FrontEnd::connect(&socket(&daemon));
    front.packed = packed;
    front.negotiate(u64::MAX, u64::MAX);
    if front.protocol & protocol::INFLIGHT_SHMFD == 0 {
        assert!(on_reference());
        return;
    }
    front.share_memory();
    front.make_inflight(1, 128);
    front.add_queue(0, 128);
    let mut next = 0;
    for turn in 0..30_u64 {
        for slot in 0..20 {
            front.submit(0, slot, req::OUT, next, &[byte(turn); 512], 0);
            next += 1;
        }
        // It goes without waiting, and comes back.
        come_back(&mut front, &daemon);
        front.kick(0);
        let mut heads: Vec<u32> = (0..20).map(|_| front.wait_used(0).0).collect();
        heads.sort_unstable();
        assert_eq!(heads, (0..20).map(|slot| slot * 3).collect::<Vec<u32>>());
        assert!((0..20).all(|slot| front.status(0, slot) == 0));
        assert_eq!(front.poll_used(0), None);
    }
}

#[test]
fn a_guest_that_wants_its_writes_through_has_them_so_after_a_restart() {
    let owner = Setup::new().image("disk.img", 8 * MIB).line("--blockdev driver=null-co,node-name=n").start();
    let mut daemon = take_over(&owner, false);
    let mut front = FrontEnd::connect(&socket(&daemon));
    front.negotiate(u64::MAX, u64::MAX);
    if front.protocol & protocol::INFLIGHT_SHMFD == 0 {
        assert!(on_reference());
        return;
    }
    front.share_memory();
    front.make_inflight(1, 128);
    front.add_queue(0, 128);
    assert_eq!(front.set_writeback(false), 0);
    front.write(0, &[1; 512]);
    daemon.crash();
    let daemon = take_over(&owner, false);
    come_back(&mut front, &daemon);
    assert_eq!(front.config(33)[32], 0);
    front.write(1, &[1; 512]);
}

/// The short form; `VHOST_KILLS` sets the number of kills.
#[test]
fn acknowledged_records_survive_kills() {
    let kills = std::env::var("VHOST_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(4);
    for (driver, writeback) in [("raw", true), ("qcow2", true), ("qcow2", false)] {
        let owner = Setup::new().line("--blockdev driver=null-co,node-name=n").start();
        let image = owner.path("disk.img");
        tests::tools::ok("qemu-img", ["create", "-q", "-f", driver, image.to_str().unwrap(), "64M"]);
        let mut noise = Noise::new(kills);
        let mut durable = 0_u64;
        for kill in 0..kills {
            let mut daemon = Setup::new()
                .arg("--blockdev")
                .arg(format!("driver=file,node-name=f,filename={}", image.display()))
                .line(&format!("--blockdev driver={driver},node-name=disk,file=f"))
                .line(&super::export("writable=on"))
                .start();
            let mut front = client(&daemon);
            if front.set_writeback(writeback) != 0 || front.config(33)[32] != u8::from(writeback) {
                assert!(on_reference());
            }
            for index in 0..durable {
                assert!(
                    front.read(index * 8, 4096) == record(index),
                    "record {index} of {durable}, kill {kill}, {driver}"
                );
            }
            // Records one after the other, and more writes in flight behind them when it is killed.
            let target = durable + 20 + noise.below(100);
            while durable < target {
                front.write(durable * 8, &record(durable));
                if writeback {
                    front.flush();
                }
                durable += 1;
            }
            for slot in 0..30 {
                front.submit(0, slot, req::OUT, (durable + u64::from(slot)) * 8, &record(durable + u64::from(slot)), 0);
            }
            daemon.crash();
            // The kernel may hold the file for a moment longer than the process.
            wait_for("the image to be free", || tests::locks::read_locked_bytes(&image).is_empty().then_some(()));
        }
    }
}
