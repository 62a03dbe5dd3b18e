//! Random operations, as fsx(8) does them: the file is at every moment what a plain vector of bytes says.
//!
//! `FUSE_RANDOM_OPS=100000` makes it longer, `FUSE_RANDOM_SEED=7` picks another run.

use std::fs::File;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek};
use tests::image::Noise;
use tests::{Setup, known_defect, on_reference, skip};

use crate::{Mounted, qcow2, raw};

const MAX: u64 = 1 << 20;
/// Images are as long as whole sectors.
const SECTOR: u64 = 512;

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

struct Run {
    file: File,
    model: Vec<u8>,
    noise: Noise,
    /// What changed which bytes, for whoever looks for a difference.
    history: Vec<(&'static str, u64, u64)>,
}

impl Run {
    fn len(&self) -> u64 {
        self.model.len() as u64
    }

    /// A range inside the file, perhaps empty, perhaps odd.
    fn range(&mut self) -> (u64, u64) {
        let at = self.noise.below(self.len());
        let longest =
            (self.len() - at).min([513, 5000, 70_000, 400_000][usize::try_from(self.noise.below(4)).unwrap()]);
        (at, self.noise.below(longest + 1))
    }

    fn part(&mut self, at: u64, len: u64) -> &mut [u8] {
        let (at, len) = (usize::try_from(at).unwrap(), usize::try_from(len).unwrap());
        &mut self.model[at..at + len]
    }

    fn read(&mut self) {
        let (at, len) = self.range();
        let mut got = vec![0xEE; usize::try_from(len).unwrap()];
        self.file.read_exact_at(&mut got, at).unwrap();
        assert!(got == self.part(at, len), "read of {len} at {at}");
    }

    fn write(&mut self) {
        let (at, len) = self.range();
        let data = self.noise.bytes(usize::try_from(len).unwrap());
        self.history.push(("write", at, len));
        self.file.write_all_at(&data, at).unwrap();
        self.part(at, len).copy_from_slice(&data);
    }

    /// A write that begins in the file and ends at most at the longest length, on a sector.
    fn grow(&mut self) {
        let at = self.noise.below(self.len() + 1);
        let end = (at + 1 + self.noise.below(100_000)).next_multiple_of(SECTOR).min(MAX);
        let len = end.saturating_sub(at);
        let data = self.noise.bytes(usize::try_from(len).unwrap());
        self.history.push(("grow", at, len));
        self.file.write_all_at(&data, at).unwrap();
        if end > self.len() {
            self.model.resize(usize::try_from(end).unwrap(), 0);
        }
        self.part(at, len).copy_from_slice(&data);
    }

    fn truncate(&mut self) {
        let len = (1 + self.noise.below(MAX / SECTOR)) * SECTOR;
        self.history.push(("truncate", len, u64::MAX - len));
        self.file.set_len(len).unwrap();
        self.model.resize(usize::try_from(len).unwrap(), 0);
    }

    fn zero(&mut self, how: FallocateFlags) {
        let (at, len) = self.range();
        if len == 0 {
            return;
        }
        self.history.push(("zero", at, len));
        let signed = |n: u64| i64::try_from(n).unwrap();
        match fallocate(&self.file, how, signed(at), signed(len)) {
            Ok(()) => {}
            // The reference punches whole clusters only.
            Err(Errno::ENOTSUP) if on_reference() => return,
            Err(errno) => panic!("{how:?} of {len} at {at}: {errno}"),
        }
        self.part(at, len).fill(0);
    }

    /// There is no data where SEEK_DATA finds none.
    fn seek(&mut self) {
        let at = self.noise.below(self.len());
        let found = lseek(&self.file, i64::try_from(at).unwrap(), Whence::SeekData);
        let data = found.map_or(self.len(), |found| u64::try_from(found).unwrap());
        assert!((at..=self.len()).contains(&data));
        assert!(self.part(at, data - at).iter().all(|byte| *byte == 0), "data before {data}, from {at}");
    }

    fn all(&self) {
        assert_eq!(self.file.metadata().unwrap().len(), self.len());
        let mut got = vec![0xEE; self.model.len()];
        self.file.read_exact_at(&mut got, 0).unwrap();
        let differs = got.iter().zip(&self.model).position(|(a, b)| a != b);
        let Some(differs) = differs else { return };
        let touching = self.history.iter().filter(|(_, at, len)| (*at..at + len).contains(&(differs as u64)));
        let run = got[differs..].iter().zip(&self.model[differs..]).take_while(|(a, b)| a != b).count();
        let zero = got[differs..differs + run].iter().all(|byte| *byte == 0);
        let touching: Vec<_> = touching.rev().take(6).collect();
        panic!(
            "{run} of {} bytes differ at {differs}, zero: {zero}; last changes: {touching:?}, of all: {:?}",
            self.len(),
            self.history.iter().rev().take(5).collect::<Vec<_>>()
        );
    }
}

fn random(setup: Setup, seed: u64) {
    let Some(mut mounted) = Mounted::start(setup, ",writable=on,growable=on") else { skip!("no FUSE here") };
    let seed = number("FUSE_RANDOM_SEED", seed);
    let noise = Noise::new(seed);
    let mut run = Run { file: mounted.open(), model: vec![0; 512 << 10], noise, history: Vec::new() };
    for step in 0..number("FUSE_RANDOM_OPS", 1500) {
        let what = run.noise.below(20);
        match what {
            0..6 => run.read(),
            6..11 => run.write(),
            11..13 => run.grow(),
            13 => run.truncate(),
            14..16 => {
                run.zero(FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE);
            }
            16 => run.zero(FallocateFlags::FALLOC_FL_ZERO_RANGE),
            17..19 => run.seek(),
            _ => run.file.sync_data().unwrap(),
        }
        if step % number("FUSE_RANDOM_LOOK", 100) == 0 {
            run.all();
        }
    }
    run.all();
    let Run { file, model, .. } = run;
    drop(file);
    mounted.daemon.stop();
    let flat = mounted.daemon.path("flat.img");
    let image = mounted.daemon.path("a.img").display().to_string();
    tests::tools::ok("qemu-img", ["convert", "-O", "raw", &image, &flat.display().to_string()]);
    assert!(tests::image::contents(&flat) == model, "the image after the end is what the file was, seed {seed}");
}

#[test]
fn random_operations_on_raw() {
    random(raw(512 << 10), 1);
}

#[test]
fn random_operations_on_qcow2() {
    random(qcow2(512 << 10), 2);
}

/// Reads and writes between those through a shared mapping, which go through the kernel's cache, and the others do not.
#[test]
fn random_operations_with_a_mapping() {
    let script = "
import mmap, os, random, sys
path, seed, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
noise, fd = random.Random(seed), os.open(path, os.O_RDWR)
size = os.fstat(fd).st_size
model = bytearray(os.pread(fd, size, 0))
shared = mmap.mmap(fd, size, mmap.MAP_SHARED)
done = []
def check(what, at, got):
    if got != model[at:at + len(got)]:
        differs = next(i for i in range(len(got)) if got[i] != model[at + i]) + at
        sys.exit(f'{what} of {len(got)} bytes at {at} differs at {differs}, seed {seed}, last: {done[-8:]}')
for step in range(steps):
    at = noise.randrange(size)
    len_ = min(noise.choice([1, 100, 4096, 20000, 70000]), size - at)
    data = noise.randbytes(len_)
    what = noise.choice(['read', 'write', 'map read', 'map write', 'map write', 'sync', 'flush', 'remap'])
    done.append((what, at, len_))
    if what == 'read': check(what, at, os.pread(fd, len_, at))
    elif what == 'map read': check(what, at, shared[at:at + len_])
    elif what == 'write':
        assert os.pwrite(fd, data, at) == len_
        model[at:at + len_] = data
    elif what == 'map write':
        shared[at:at + len_] = data
        model[at:at + len_] = data
    elif what == 'sync': os.fsync(fd)
    elif what == 'flush': shared.flush()
    else:
        shared.close()
        shared = mmap.mmap(fd, size, mmap.MAP_SHARED)
check('all', 0, os.pread(fd, size, 0))
shared.close()
os.fsync(fd)
open(sys.argv[4], 'wb').write(model)
";
    if known_defect("what is written through a mapping gets mixed up with what is written otherwise") {
        return;
    }
    let Some(mounted) = Mounted::start(raw(300 << 10), ",writable=on") else { skip!("no FUSE here") };
    let (mut seed, mut steps) = (number("FUSE_RANDOM_SEED", 3), number("FUSE_RANDOM_OPS", 1500));
    let wanted = mounted.daemon.path("wanted");
    let name = wanted.display().to_string();
    // Each program goes on with what it finds, and none takes longer than a program may.
    while steps > 0 {
        let now = steps.min(2000);
        tests::tools::ok("python3", ["-c", script, &mounted.name(), &seed.to_string(), &now.to_string(), &name]);
        (seed, steps) = (seed + 1, steps - now);
    }
    let image = mounted.daemon.path("a.img");
    assert!(std::fs::read(image).unwrap() == std::fs::read(wanted).unwrap(), "the image is what was written");
}

/// Several threads, each with its own part of the file, over several threads of the export.
#[test]
fn random_operations_of_many_at_once() {
    const PART: u64 = 256 << 10;
    let setup = raw(8 * PART).line("--object iothread,id=t0 --object iothread,id=t1");
    let list = if tests::on_reference() { "" } else { ",iothread.0=t0,iothread.1=t1" };
    let Some(mounted) = Mounted::start(setup, &format!(",writable=on{list}")) else { skip!("no FUSE here") };
    let workers: Vec<_> = (0..8)
        .map(|part| {
            let file = mounted.open();
            std::thread::spawn(move || {
                let mut noise = Noise::new(100 + part);
                let mut model = vec![0; usize::try_from(PART).unwrap()];
                for _ in 0..200 {
                    let at = noise.below(PART);
                    let len = usize::try_from(noise.below((PART - at).min(50_000) + 1)).unwrap();
                    let place = usize::try_from(at).unwrap();
                    if noise.below(2) == 0 {
                        let data = noise.bytes(len);
                        file.write_all_at(&data, part * PART + at).unwrap();
                        model[place..place + len].copy_from_slice(&data);
                    } else {
                        let mut got = vec![0; len];
                        file.read_exact_at(&mut got, part * PART + at).unwrap();
                        assert!(got == model[place..place + len]);
                    }
                }
            })
        })
        .collect();
    for worker in workers {
        worker.join().unwrap();
    }
}
