//! Memory that another process shares: what is seen through it, and what becomes of it when it is taken away.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

use buf::{Gather, GuestMemory, Mapping, Region};
use rustix::fs::{MemfdFlags, memfd_create};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

const PAGE: u64 = 4096;

fn memory(pages: u64) -> File {
    let file = File::from(memfd_create("test", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(pages * PAGE).unwrap();
    file
}

fn region(file: &File, guest: u64, offset: u64, len: u64) -> Region {
    let map = Arc::new(Mapping::new(file.as_fd(), offset, len).unwrap());
    Region { guest, monitor: guest, map }
}

#[test]
fn a_mapping_shows_the_file() {
    let file = memory(4);
    // Not at the start of a page, as monitors do.
    let map = Arc::new(Mapping::new(file.as_fd(), PAGE + 64, 2 * PAGE).unwrap());
    file.write_all_at(&[1, 2, 3, 4, 5, 6, 7, 8, 9], PAGE + 64).unwrap();
    let window = map.window(0, 2 * 4096).unwrap();
    assert_eq!(window.load_u64(0), 0x0807_0605_0403_0201);
    assert_eq!(window.load_u16(2), 0x0403);
    assert_eq!(window.load_u8(8), 9);
    window.store_u32(8192 - 4, 0xAABB_CCDD);
    window.or_u8(0, 0x80);
    let mut seen = [0; 4];
    file.read_exact_at(&mut seen, 3 * PAGE + 60).unwrap();
    assert_eq!(seen, [0xDD, 0xCC, 0xBB, 0xAA]);
    assert_eq!(window.load_u8(0), 0x81);
    // Beyond the end and off the alignment there is nothing.
    window.store_u32(8192 - 2, 1);
    window.store_u32(2, 1);
    assert_eq!(
        (window.load_u32(8190), window.load_u64(8192), window.load_u16(1), window.load_u16(usize::MAX)),
        (0, 0, 0, 0)
    );
    assert!(map.window(1, 2 * 4096).is_none() && map.window(usize::MAX, 2).is_none());
    assert!(window.read(8190, &mut [0; 2]) && !window.read(8191, &mut [0; 2]) && !window.read(usize::MAX, &mut [0; 2]));
}

#[test]
fn what_is_no_memory_is_refused() {
    let file = memory(2);
    for (offset, len) in [(0, 2 * PAGE + 1), (PAGE, PAGE + 1), (u64::MAX, 2), (1 << 62, 1 << 62), (0, 0), (3 * PAGE, 1)]
    {
        assert!(Mapping::new(file.as_fd(), offset, len).is_err(), "{offset} {len}");
    }
    let null = File::options().read(true).write(true).open("/dev/null").unwrap();
    assert!(Mapping::new(null.as_fd(), 0, PAGE).is_err());
    let proc = File::open("/proc/self/status").unwrap();
    assert!(Mapping::new(proc.as_fd(), 0, 1).is_err());
    let (pipe, _writer) = std::io::pipe().unwrap();
    assert!(Mapping::new(pipe.as_fd(), 0, 1).is_err());
}

#[test]
fn memory_that_is_taken_away_is_noticed() {
    for pages in [0, 1] {
        let file = memory(4);
        let map = Arc::new(Mapping::new(file.as_fd(), 0, 4 * PAGE).unwrap());
        let other = memory(1);
        let stays = Arc::new(Mapping::new(other.as_fd(), 0, PAGE).unwrap());
        let window = map.window(0, 4 * 4096).unwrap();
        window.store_u64(3 * 4096, 7);
        file.set_len(pages * PAGE).unwrap();
        assert!(!window.is_torn(), "nobody has touched it");
        assert_eq!(window.load_u64(3 * 4096), 0);
        assert!(window.is_torn() && map.is_torn());
        // It can be used on, and reaches nobody.
        window.store_u64(0, 9);
        assert_eq!(window.load_u64(0), 9);
        assert!(!stays.is_torn());
    }
    // A place that is used again starts whole.
    let file = memory(1);
    assert!(!Mapping::new(file.as_fd(), 0, PAGE).unwrap().is_torn());
}

#[test]
fn a_table_is_checked() {
    let file = memory(8);
    let table = |list: &[(u64, u64)]| {
        GuestMemory::new(list.iter().map(|(guest, pages)| region(&file, *guest, 0, pages * PAGE)).collect())
    };
    assert!(table(&[]).is_ok());
    assert!(table(&[(0, 2), (2 * PAGE, 2)]).is_ok());
    assert!(table(&[(2 * PAGE, 2), (0, 2)]).is_ok(), "in any order");
    assert!(table(&[(0, 2), (PAGE, 2)]).is_err());
    assert!(table(&[(PAGE, 1), (PAGE, 1)]).is_err());
    assert!(table(&[(u64::MAX - PAGE + 1, 1)]).is_err());
}

#[test]
fn a_gather_crosses_regions_and_stops_at_holes() {
    let (low, high) = (memory(2), memory(2));
    let regions =
        vec![region(&low, PAGE, 0, 2 * PAGE), region(&high, 3 * PAGE, 0, PAGE), region(&high, 5 * PAGE, PAGE, PAGE)];
    let memory = Arc::new(GuestMemory::new(regions).unwrap());
    low.write_all_at(b"ab", 2 * PAGE - 2).unwrap();
    high.write_all_at(b"cd", 0).unwrap();
    let mut gather = Gather::new(Arc::clone(&memory));
    gather.push(3 * PAGE - 2, 1).unwrap();
    gather.push(3 * PAGE - 1, 3).unwrap();
    assert_eq!(gather.len(), 4);
    let buf = gather.take();
    assert_eq!((buf.to_vec(), buf.segments().count()), (b"abcd".to_vec(), 2));
    assert!(gather.is_empty());
    let mut marked = Vec::new();
    memory.guest_ranges(&buf, |guest, len| marked.push((guest, len)));
    assert_eq!(marked, [(3 * PAGE - 2, 2), (3 * PAGE, 2)]);
    // The buffer keeps what it points to.
    drop((gather, memory));
    assert_eq!(buf.to_vec(), b"abcd");
    let memory = Arc::new(GuestMemory::new(vec![region(&low, PAGE, 0, 2 * PAGE)]).unwrap());
    for (guest, len) in [
        (0, 1),
        (PAGE - 1, 2),
        (3 * PAGE, 1),
        (3 * PAGE - 1, 2),
        (u64::MAX, 1),
        (u64::MAX, usize::MAX),
        (PAGE, usize::MAX),
    ] {
        let mut gather = Gather::new(Arc::clone(&memory));
        assert!(gather.push(guest, len).is_err(), "{guest:#x} {len:#x}");
        assert!(len > 64 || memory.read(guest, &mut vec![0; len]).is_err());
    }
    // The front and the last byte come off, over the borders of runs.
    let mut gather = Gather::new(Arc::clone(&memory));
    low.write_all_at(b"0123456789", 0).unwrap();
    for (at, len) in [(0, 2), (4, 1), (6, 4)] {
        gather.push(PAGE + at, len).unwrap();
    }
    let mut front = [0; 3];
    assert!(gather.take_front(&mut front) && front == *b"014");
    assert_eq!(gather.take_last().unwrap().to_vec(), b"9");
    assert!(!gather.take_front(&mut [0; 4]) && gather.len() == 3);
    assert_eq!(gather.take().to_vec(), b"678");
    assert!(gather.take_last().is_none());
}
