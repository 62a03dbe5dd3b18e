//! `blklogwrites`: the contract; what is in the log, read by a reader of its own from the kernel's documentation; replay.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "test code")]

mod common;

use block::{Errno, Span, WriteFlags, ZeroFlags};
use buf::IoBuf;
use common::suite::{SIZE, check};
use common::{attach, graph, image, on_thread, options, refused, writer};
use io::RingUse;
use serde_json::{Value, json};
use std::path::Path;

const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;

/// An entry: first sector, sectors, flags, data.
type Entry = (u64, u64, u64, Vec<u8>);

/// Reads a log as Documentation/admin-guide/device-mapper/log-writes.rst describes it.
fn read_log(path: &Path) -> (usize, Vec<Entry>) {
    let log = std::fs::read(path).unwrap();
    let number = |at: usize| u64::from_le_bytes(log[at..at + 8].try_into().unwrap());
    assert_eq!((number(0), number(8)), (0x006a_7366_7773_6872, 1));
    let sector = u32::from_le_bytes(log[24..28].try_into().unwrap()) as usize;
    let mut at = sector;
    let mut entries = Vec::new();
    for _ in 0..number(16) {
        let (first, count, flags) = (number(at), number(at + 8), number(at + 16));
        assert_eq!(number(at + 24), 0);
        at += sector;
        let len = if flags & DISCARD == 0 { count as usize * sector } else { 0 };
        let mut data = log[at..log.len().min(at + len)].to_vec();
        data.resize(len, 0);
        entries.push((first, count, flags, data));
        at += len;
    }
    (sector, entries)
}

/// A disk of zeroes with the entries of a log applied. Discards leave the bytes.
fn replay(path: &Path, len: usize) -> Vec<u8> {
    let (sector, entries) = read_log(path);
    let mut disk = vec![0; len];
    for (first, _, _, data) in entries {
        let at = first as usize * sector;
        disk[at..at + data.len()].copy_from_slice(&data);
    }
    disk
}

fn logging(disk: &Path, log: &Path, more: &Value) -> Value {
    let mut json = json!({
        "driver": "blklogwrites", "node-name": "top", "discard": "unmap",
        "file": { "driver": "file", "filename": disk }, "log": { "driver": "file", "filename": log }
    });
    json.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    json
}

#[test]
fn blklogwrites_keeps_the_contract_and_the_log_replays() {
    let (disk, log) = (image(2 * SIZE), image(0));
    for more in [json!({}), json!({ "log-sector-size": 4096, "log-super-update-interval": 3 })] {
        // Not resized: the log has no entry for that.
        check(RingUse::Auto, logging(disk.path(), log.path(), &more), false, Some((disk.path(), 0)));
        // The last run began the log anew, on a disk of zeroes.
        let found = std::fs::read(disk.path()).unwrap();
        let replayed = replay(log.path(), found.len());
        let (sector, entries) = read_log(log.path());
        let discarded = |at: usize| {
            entries.iter().any(|(first, count, flags, _)| {
                let first = *first as usize * sector;
                flags & DISCARD != 0 && (first..first + *count as usize * sector).contains(&at)
            })
        };
        for at in 0..found.len() {
            assert!(found[at] == replayed[at] || discarded(at), "byte {at}");
        }
    }
}

#[test]
fn the_log_says_what_was_done_in_order() {
    let (disk, log) = (image(65536), image(0));
    let (disk_path, log_path) = (disk.path().to_owned(), log.path().to_owned());
    on_thread(RingUse::Auto, move || async move {
        let mut g = graph();
        g.add(&options(&logging(&disk_path, &log_path, &json!({})))).await.unwrap();
        let disk = attach(&mut g, "top", writer()).await.unwrap();
        disk.write(512, &IoBuf::copy_of(&[1; 1024]), WriteFlags::NONE).await.unwrap();
        // Nothing counts before the first flush.
        assert!(std::fs::read(&log_path).unwrap()[..28].iter().all(|byte| *byte == 0));
        disk.flush().await.unwrap();
        disk.write(0, &IoBuf::copy_of(&[2; 512]), WriteFlags::FUA).await.unwrap();
        let four = vec![(1, 2, 0, vec![1; 1024]), (0, 0, FLUSH, vec![]), (0, 1, FUA, vec![2; 512])];
        assert_eq!(read_log(&log_path), (512, four.clone()));
        disk.zero(Span::new(4096, 1024), ZeroFlags::default()).await.unwrap();
        disk.discard(Span::new(8192, 4096)).await.unwrap();
        g.detach(disk).await;
        g.close_all().await;
        let mut all = four;
        all.extend([(8, 2, 0, vec![0; 1024]), (16, 8, DISCARD, vec![])]);
        let (_, entries) = read_log(&log_path);
        assert_eq!(entries[..all.len()], all);

        // Going on with it, with its own unit.
        let mut g = graph();
        let mut append = logging(&disk_path, &log_path, &json!({ "log-append": true }));
        g.add(&options(&append)).await.unwrap();
        let disk = attach(&mut g, "top", writer()).await.unwrap();
        disk.write(0, &IoBuf::copy_of(&[3; 512]), WriteFlags::NONE).await.unwrap();
        disk.flush().await.unwrap();
        g.detach(disk).await;
        g.close_all().await;
        let (_, longer) = read_log(&log_path);
        assert_eq!(longer[..entries.len()], entries);
        assert_eq!(longer[entries.len()..entries.len() + 2], [(0, 1, 0, vec![3; 512]), (0, 0, FLUSH, vec![])]);

        // A log that counts more than it has.
        let mut bytes = std::fs::read(&log_path).unwrap();
        bytes[16..24].copy_from_slice(&u64::MAX.to_le_bytes());
        std::fs::write(&log_path, bytes).unwrap();
        append["node-name"] = "again".into();
        let text = refused(&mut graph(), &append).await;
        assert!(text.starts_with("The log ends before entry"), "{text}");
    });
}

#[test]
fn what_cannot_be_logged_is_not_acknowledged() {
    on_thread(RingUse::Off, || async {
        let mut g = graph();
        let json = json!({
            "driver": "blklogwrites", "node-name": "top", "file": { "driver": "null-co", "size": 65536 },
            "log": {
                "driver": "blkdebug", "image": { "driver": "null-co", "size": 1 << 30 },
                "inject-error": [{ "event": "none", "iotype": "write", "errno": 28, "sector": 1, "once": true }]
            }
        });
        g.add(&options(&json)).await.unwrap();
        let disk = attach(&mut g, "top", writer()).await.unwrap();
        let data = IoBuf::copy_of(&[1; 512]);
        assert_eq!(disk.write(0, &data, WriteFlags::NONE).await, Err(Errno::ENOSPC));
        // The log has a gap now.
        assert_eq!(disk.write(0, &data, WriteFlags::NONE).await, Err(Errno::EIO));
        assert_eq!(disk.flush().await, Err(Errno::EIO));
        assert_eq!(disk.read(0, &data).await, Ok(()));
        g.detach(disk).await;
    });
}
