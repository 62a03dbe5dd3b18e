//! A front-end that nobody here wrote: the crate virtio-driver, which libblkio is made of.

use super::{MIB, byte, export, serving, socket};
use tests::blkdriver::{Disk, Op};
use tests::image::{Noise, contents};
use tests::{Setup, known_defect};

#[test]
fn it_is_told_what_the_disk_is() {
    let daemon = serving("writable=on");
    let disk = Disk::open(&socket(&daemon), 1, 1, 512);
    assert_eq!(disk.size, 8 * MIB);
    assert!(disk.writeback || known_defect("X1"));
}

/// Two threads with a queue each, on their halves of the disk; every block is what was written there last.
#[test]
fn random_work_on_two_queues() {
    const BLOCK: usize = 4096;
    const DEPTH: usize = 32;
    for threads in ["", ",iothread.0=t0,iothread.1=t1"] {
        if tests::on_reference() && !threads.is_empty() {
            continue;
        }
        let daemon = Setup::new()
            .image("disk.img", 8 * MIB)
            .line("--object iothread,id=t0 --object iothread,id=t1")
            .line("--blockdev driver=file,node-name=disk,filename=disk.img")
            .line(&export(&format!("writable=on,num-queues=2{threads}")))
            .start();
        let mut disk = Disk::open(&socket(&daemon), 2, DEPTH, BLOCK);
        let halves: Vec<Vec<u8>> = std::thread::scope(|scope| {
            let workers: Vec<_> = disk
                .queues
                .iter_mut()
                .enumerate()
                .map(|(half, queue)| {
                    scope.spawn(move || {
                        let mut noise = Noise::new(half as u64 + 9);
                        let blocks = 4 << 20 >> 12;
                        let mut model = vec![0_u8; blocks];
                        // What each slot does: nothing, or an operation on a block that no other slot is at.
                        let mut slots: Vec<Option<(Op, usize)>> = vec![None; DEPTH];
                        let (mut left, mut done) = (4000, Vec::new());
                        while left > 0 || slots.iter().any(Option::is_some) {
                            for slot in 0..DEPTH {
                                let block = usize::try_from(noise.below(blocks as u64)).unwrap();
                                if left == 0 || slots[slot].is_some() || slots.iter().flatten().any(|s| s.1 == block) {
                                    continue;
                                }
                                let op = if noise.below(2) == 0 { Op::Read } else { Op::Write };
                                if op == Op::Write {
                                    model[block] = byte(1 + noise.below(255));
                                    queue.fill(slot, &[model[block]; BLOCK]);
                                }
                                queue.submit(slot, op, (half * blocks + block) as u64 * BLOCK as u64);
                                slots[slot] = Some((op, block));
                                left -= 1;
                            }
                            queue.kick();
                            queue.wait(&mut done);
                            for (slot, result) in done.drain(..) {
                                assert_eq!(result, 0);
                                let (op, block) = slots[slot].take().unwrap();
                                assert!(op == Op::Write || queue.contents(slot) == [model[block]; BLOCK]);
                            }
                        }
                        queue.submit(0, Op::Flush, 0);
                        queue.kick();
                        queue.wait(&mut done);
                        model
                    })
                })
                .collect();
            workers.into_iter().map(|worker| worker.join().unwrap()).collect()
        });
        let expected: Vec<u8> = halves.concat().into_iter().flat_map(|value| [value; BLOCK]).collect();
        assert!(contents(&daemon.path("disk.img")) == expected);
    }
}
