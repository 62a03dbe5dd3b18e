//! Requests of a guest that keeps the rules.

use super::{MIB, byte, client, serving, socket};
use tests::image::{Noise, allocated, contents};
use tests::vhost::{FrontEnd, GUEST, INDIRECT, NEXT, WRITE, descriptor, feature, req};
use tests::{Setup, known_defect};

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

#[test]
fn what_is_written_is_read_and_is_in_the_image() {
    let daemon = serving("writable=on");
    let mut front = client(&daemon);
    let mut noise = Noise::new(1);
    let mut model = vec![0; 8 << 20];
    for _ in 0..200 {
        let sector = noise.below(8 * 2048 - 120);
        let len = usize::try_from(512 * (1 + noise.below(119))).unwrap();
        let at = usize::try_from(sector * 512).unwrap();
        if noise.below(2) == 0 {
            let data = noise.bytes(len);
            model[at..at + len].copy_from_slice(&data);
            front.write(sector, &data);
        } else {
            assert!(front.read(sector, u32::try_from(len).unwrap()) == model[at..at + len]);
        }
    }
    front.flush();
    assert!(contents(&daemon.path("disk.img")) == model);
}

/// All ways in which a driver and a device may agree.
#[test]
fn with_and_without_each_feature() {
    let daemon = serving("writable=on");
    for without in
        [0, feature::EVENT_IDX, feature::INDIRECT, feature::VERSION_1, feature::EVENT_IDX | feature::INDIRECT]
    {
        if without == feature::VERSION_1 && known_defect("a legacy driver is disconnected") {
            continue;
        }
        let mut front = FrontEnd::start(&socket(&daemon), 1, without);
        for turn in 0..300_u64 {
            let data = [u8::try_from(turn % 251).unwrap(); 512];
            front.write(turn, &data);
            assert_eq!(front.read(turn, 512), data);
        }
    }
    for without in [0, feature::EVENT_IDX, feature::INDIRECT, feature::EVENT_IDX | feature::INDIRECT] {
        let front = FrontEnd::start_packed(&socket(&daemon), 1, without);
        let Some(mut front) = front else {
            assert!(known_defect("no packed rings"));
            break;
        };
        // Several times around the ring, which its chains of two and three do not fill.
        for turn in 0..300_u64 {
            let data = [u8::try_from(turn % 241).unwrap(); 512];
            front.write(turn, &data);
            assert_eq!(front.read(turn, 512), data);
            front.flush();
        }
        // Many at a time, in any order.
        for slot in 0..40 {
            front.submit(0, slot, req::OUT, u64::from(slot) * 8, &[byte(slot); 4096], 0);
        }
        let mut heads: Vec<u32> = (0..40).map(|_| front.wait_used(0).0).collect();
        heads.sort_unstable();
        assert_eq!(heads, (0..40).map(|slot| slot * 3).collect::<Vec<u32>>());
        assert!((0..40).all(|slot| front.status(0, slot) == 0));
        // It goes on where it stopped.
        let next = front.stop_queue(0);
        front.start_queue(0, next);
        assert_eq!(front.read(39 * 8, 4096), [byte(39); 4096]);
    }
    if known_defect("a front-end without protocol features is disconnected") {
        return;
    }
    // As a front-end that knows no protocol features: rings run as soon as they are kicked.
    let mut front = FrontEnd::start(&socket(&daemon), 1, feature::PROTOCOL);
    assert_eq!(front.protocol, 0);
    front.write(0, &[9; 512]);
    assert_eq!(front.read(0, 512), [9; 512]);
}

#[test]
fn many_requests_at_once_on_several_queues() {
    for iothreads in ["", ",iothread=t0", ",iothread.0=t0,iothread.1=t1"] {
        if tests::on_reference() && iothreads.contains(".0") {
            continue;
        }
        let daemon = Setup::new()
            .image("disk.img", 8 * MIB)
            .line("--object iothread,id=t0 --object iothread,id=t1,poll-max-ns=0")
            .line("--blockdev driver=file,node-name=disk,filename=disk.img")
            .line(&super::export(&format!("writable=on,num-queues=3{iothreads}")))
            .start();
        let mut front = FrontEnd::start(&socket(&daemon), 3, 0);
        for round in 0..20_u8 {
            for queue in 0..3 {
                for slot in 0..40 {
                    let sector = u64::from(queue) * 4000 + u64::from(slot) * 8;
                    front.submit(queue, slot, req::OUT, sector, &[round.wrapping_add(byte(slot)); 4096], 0);
                }
            }
            for queue in 0..3 {
                let mut heads: Vec<u32> = (0..40).map(|_| front.wait_used(queue).0).collect();
                heads.sort_unstable();
                assert_eq!(heads, (0..40).map(|slot| slot * 3).collect::<Vec<u32>>());
                assert!((0..40).all(|slot| front.status(queue, slot) == 0));
            }
        }
        for slot in 0..40_u8 {
            let sector = 8000 + u64::from(slot) * 8;
            assert_eq!(front.read(sector, 4096), [19_u8.wrapping_add(slot); 4096]);
        }
    }
}

#[test]
fn any_layout_of_a_chain() {
    let daemon = serving("writable=on");
    let mut front = client(&daemon);
    let data = Noise::new(7).bytes(3072);
    front.write(100, &data);
    // Header in three parts, data in parts of odd lengths, the status within the last of them, all in one table.
    let at = front.buffer(0, 1);
    let header = [&req::IN.to_le_bytes()[..], &[0; 4], &100_u64.to_le_bytes()].concat();
    front.poke(at, &header);
    let (head, data_at) = (GUEST + at, GUEST + at + 4096);
    let table = [
        descriptor(head, 3, NEXT, 1),
        descriptor(head + 3, 10, NEXT, 3),
        descriptor(data_at + 1000, 2073, WRITE, 0),
        descriptor(head + 13, 3, NEXT, 4),
        descriptor(data_at, 1, NEXT | WRITE, 5),
        descriptor(data_at + 1, 999, NEXT | WRITE, 2),
    ]
    .concat();
    front.poke(at + 256, &table);
    front.descriptor(0, 77, GUEST + at + 256, 96, INDIRECT, 0);
    front.offer(0, 77);
    front.kick(0);
    assert_eq!(front.wait_used(0), (77, 3073));
    assert!(front.peek(at + 4096, 3072) == data);
    assert_eq!(front.peek(at + 4096 + 3072, 1), [0]);
}

#[test]
fn requests_longer_than_any_buffer_of_ours() {
    let daemon = serving("writable=on");
    let mut front = client(&daemon);
    let data = Noise::new(3).bytes(6 << 20);
    // One request of 6 MiB, from and into the memory behind the queue's buffers.
    let at = 16 << 20;
    front.poke(at, &data);
    for (kind, flags) in [(req::OUT, NEXT), (req::IN, NEXT | WRITE)] {
        front.prepare(0, 0, kind, 0, &[], 0);
        front.descriptor(0, 0, GUEST + front.buffer(0, 0), 16, NEXT, 1);
        front.descriptor(0, 1, GUEST + at, 6 << 20, flags, 2);
        front.offer(0, 0);
        front.kick(0);
        front.wait_used(0);
        assert_eq!(front.status(0, 0), 0);
        if kind == req::OUT {
            front.poke(at, &vec![0; 6 << 20]);
        }
    }
    assert!(front.peek(at, 6 << 20) == data);
}

#[test]
fn discard_and_write_zeroes_of_several_ranges() {
    let daemon = serving("writable=on");
    let mut front = client(&daemon);
    let image = daemon.path("disk.img");
    for sector in (0..16384).step_by(64) {
        front.write(sector, &[0xAA; 32768]);
    }
    let full = allocated(&image);
    let two = [range(0, 2048, 0), range(4096, 2048, 0)].concat();
    let (status, _) = front.request(0, req::DISCARD, 0, &two, 0);
    if status != 0 {
        assert!(known_defect("discard of one segment only"));
        return;
    }
    assert!(allocated(&image) <= full - (1 << 20), "two MiB are given back");
    assert_eq!(front.read(0, 4096), [0; 4096]);
    assert_eq!(front.read(2048, 4096), [0xAA; 4096]);
    let zeroes = [range(2049, 1, 0), range(8192, 2048, 1), range(2051, 2, 0)].concat();
    assert_eq!(front.request(0, req::WRITE_ZEROES, 0, &zeroes, 0).0, 0);
    let expected = [[0xAA; 512], [0; 512], [0xAA; 512], [0; 512], [0; 512], [0xAA; 512]].concat();
    assert_eq!(front.read(2048, 3072), expected);
    assert_eq!(front.read(8192, 4096), [0; 4096]);
    assert!(allocated(&image) <= full - (2 << 20), "unmapped as it was allowed to");
    // Flags that are not known, a discard that asks for more than it may, ranges off the end, half a range, none, too many.
    assert_eq!(front.request(0, req::DISCARD, 0, &range(0, 8, 1), 0).0, 2);
    assert_eq!(front.request(0, req::WRITE_ZEROES, 0, &range(0, 8, 2), 0).0, 2);
    assert_eq!(front.request(0, req::DISCARD, 0, &range(16383, 2, 0), 0).0, 1);
    assert_eq!(front.request(0, req::DISCARD, 0, &range(u64::MAX, 2, 0), 0).0, 1);
    assert_eq!(front.request(0, req::WRITE_ZEROES, 0, &range(u64::MAX / 512, 8, 0), 0).0, 1);
    assert_eq!(front.request(0, req::DISCARD, 0, &range(0, 8, 0)[..15], 0).0, 1);
    assert_eq!(front.request(0, req::DISCARD, 0, &[], 0).0, 1);
    assert_eq!(front.request(0, req::DISCARD, 0, &range(0, 8, 0).repeat(300), 0).0, 1);
}

#[test]
fn what_cannot_be_is_an_error_of_that_request() {
    let daemon = serving("writable=on");
    let mut front = client(&daemon);
    assert_eq!(front.request(0, req::IN, 16383, &[], 1024).0, 1, "beyond the end");
    assert_eq!(front.request(0, req::OUT, 16384, &[1; 512], 0).0, 1, "beyond the end");
    assert_eq!(front.request(0, req::IN, u64::MAX, &[], 512).0, 1);
    assert_eq!(front.request(0, req::IN, u64::MAX / 512, &[], 512).0, 1);
    assert_eq!(front.request(0, req::IN, 0, &[], 511).0, 1, "no whole sector");
    assert_eq!(front.request(0, 99, 0, &[], 0).0, 2, "an unknown kind");
    assert_eq!(front.read(16383, 512), [0; 512]);
}
