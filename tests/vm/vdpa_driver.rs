//! Drives a virtio-blk device that vhost_vdpa gives to programs: what a virtual machine behind it does, without one.
//!
//! `vdpa-driver /dev/vhost-vdpa-0 SEED`: random writes, flushes and reads on the first MiB, each read compared with what was written
//! last; at the end all of it. Prints the size of the disk in bytes.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "it fails by panicking"
)]

use std::path::Path;
use tests::blkdriver::{Disk, Op};
use tests::image::Noise;

const BLOCK: usize = 4096;
const BLOCKS: usize = 256;
const DEPTH: usize = 16;

fn main() {
    let mut args = std::env::args().skip(1);
    let (Some(device), Some(seed)) = (args.next(), args.next()) else { panic!("which device, and a seed") };
    let mut disk = Disk::of_kernel(Path::new(&device), DEPTH, BLOCK);
    let mut noise = Noise::new(seed.parse().expect("a number"));
    let queue = disk.queues.first_mut().expect("a queue");
    // What each block holds; none that this program has not written yet.
    let mut model: Vec<Option<u8>> = vec![None; BLOCKS];
    let (mut done, mut turns) = (Vec::new(), 0);
    while turns < 200 {
        turns += 1;
        let mut expected = Vec::new();
        // Each block is one slot's alone.
        let first = usize::try_from(noise.below((BLOCKS - DEPTH) as u64)).unwrap();
        for slot in 0..DEPTH {
            let block = first + slot;
            let write = model[block].is_none() || noise.below(2) == 0;
            if write {
                let byte = u8::try_from(1 + noise.below(255)).unwrap();
                model[block] = Some(byte);
                queue.fill(slot, &[byte; BLOCK]);
            }
            queue.submit(slot, if write { Op::Write } else { Op::Read }, (block * BLOCK) as u64);
            expected.push(model[block].unwrap());
        }
        queue.kick();
        let mut left = DEPTH;
        while left > 0 {
            queue.wait(&mut done);
            for (slot, result) in done.drain(..) {
                assert_eq!(result, 0, "a request failed");
                assert!(queue.contents(slot) == [expected[slot]; BLOCK], "a block is not what was written");
                left -= 1;
            }
        }
        queue.submit(0, Op::Flush, 0);
        queue.kick();
        queue.wait(&mut done);
        assert_eq!(done.drain(..).map(|one| one.1).collect::<Vec<_>>(), [0], "the flush failed");
    }
    println!("{}", disk.size);
}
