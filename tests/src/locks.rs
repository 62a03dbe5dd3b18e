//! The image locks that a file carries, read from the kernel's table.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// The bytes of the file on which anyone holds an open-file-description read lock, and nothing else: another kind of
/// lock on the file fails the test.
pub fn read_locked_bytes(path: &Path) -> BTreeSet<u64> {
    let meta = std::fs::metadata(path).expect("look at an image");
    let dev = meta.dev();
    let file = format!("{:02x}:{:02x}:{}", nix::sys::stat::major(dev), nix::sys::stat::minor(dev), meta.ino());
    let table = std::fs::read_to_string("/proc/locks").expect("read /proc/locks");
    let mut bytes = BTreeSet::new();
    for line in table.lines() {
        let fields: Vec<&str> = line.split_whitespace().filter(|field| *field != "->").collect();
        // [proc_locks(5)] 1: OFDLCK ADVISORY READ -1 fe:00:10010778 203 203
        let [_, kind, _, mode, _, on, first, last] = fields[..] else { continue };
        if on != file {
            continue;
        }
        assert_eq!((kind, mode), ("OFDLCK", "READ"), "another kind of lock: {line}");
        let first: u64 = first.parse().expect("the first byte");
        let last: u64 = last.parse().expect("the last byte");
        bytes.extend(first..=last);
    }
    bytes
}
