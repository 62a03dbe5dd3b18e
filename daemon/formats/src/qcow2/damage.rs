//! What happens when an image is found damaged [qcow2 §Header, corrupt bit].
//!
//! Damage that a write would make worse is fatal: the header is marked, so that nobody writes to the image before it is
//! repaired, and the node refuses everything from then on. Damage that a read meets on a node that is never written to, or that
//! hurts no other data, fails that request alone. Either is told as `BLOCK_IMAGE_CORRUPTED`, in the reference's words.

use super::entry::{Malformed, OFFSET};
use super::header;
use super::image::Qcow2;
use block::report::{Report, Reporter};
use block::{Errno, IoResult};
use qapi::types::block_event::BlockImageCorrupted;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A number as C prints it with `%#x`, which is what the messages are compared with.
pub(super) fn hex(value: u64) -> String {
    if value == 0 { "0".to_owned() } else { format!("{value:#x}") }
}

/// What is known of damage.
#[derive(Debug)]
pub(super) struct Damage {
    reporter: Reporter,
    node: Arc<str>,
    /// It has been told.
    told: AtomicBool,
    /// Nothing is to be done with the image any more.
    fatal: AtomicBool,
    /// The header has to be marked.
    unmarked: AtomicBool,
}

impl Damage {
    pub fn new(reporter: Reporter, node: Arc<str>) -> Self {
        Self { reporter, node, told: false.into(), fatal: false.into(), unmarked: false.into() }
    }

    /// The image has been repaired.
    pub fn forget(&self) {
        for flag in [&self.told, &self.fatal, &self.unmarked] {
            flag.store(false, Ordering::Release);
        }
    }

    fn tell(&self, msg: &str, place: Option<(u64, u64)>, fatal: bool) {
        let signed = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        self.reporter.report(Report::ImageCorrupted(BlockImageCorrupted {
            device: String::new(),
            node_name: Some(self.node.to_string()),
            msg: msg.to_owned(),
            offset: place.map(|(at, _)| signed(at)),
            size: place.map(|(_, len)| signed(len)),
            fatal,
        }));
    }
}

impl Qcow2 {
    /// Fatal damage: the errno of the request that met it.
    pub(super) fn damage(&self, msg: &str) -> Errno {
        self.signal(msg, None, true)
    }

    /// A write of `len` bytes at `at` would have destroyed metadata.
    pub(super) fn overwritten(&self, msg: &str, at: u64, len: u64) -> Errno {
        self.signal(msg, Some((at, len)), true)
    }

    fn signal(&self, msg: &str, place: Option<(u64, u64)>, fatal: bool) -> Errno {
        let fatal = fatal && !self.is_read_only();
        let damage = &self.damage;
        if fatal {
            if !damage.fatal.swap(true, Ordering::AcqRel) {
                damage.unmarked.store(true, Ordering::Release);
                damage.told.store(true, Ordering::Release);
                damage.tell(msg, place, true);
            }
        } else if !damage.told.swap(true, Ordering::AcqRel) {
            damage.tell(msg, place, false);
        }
        Errno::EIO
    }

    /// The L1 entry for the guest's byte `at` names a table that cannot be at `table`.
    pub(super) fn unaligned_table(&self, at: u64, table: u64) -> Errno {
        self.damage(&format!("L2 table offset {table:#x} unaligned (L1 index: {})", hex(at / self.l2_reach())))
    }

    /// The L2 entry for the guest's byte `at` cannot be meant. `writing` is what the request wanted.
    pub(super) fn malformed(&self, at: u64, why: Malformed, writing: bool) -> Errno {
        let table = self.l1_entry(at) & OFFSET;
        let index = at / self.shape.cluster() % self.l2_entries();
        let place = format!("L2 offset: {}, L2 index: {}", hex(table), hex(index));
        let msg = match why {
            Malformed::Unaligned { at: host, zero } if writing => {
                let kind = if zero { "Preallocated zero" } else { "Data" };
                format!("{kind} cluster offset {host:#x} unaligned (guest offset: {})", hex(at))
            }
            Malformed::Unaligned { at: host, .. } => format!("Cluster allocation offset {host:#x} unaligned ({place})"),
            Malformed::OldZero => format!("Zero cluster entry found in pre-v3 image ({place})"),
            Malformed::PackedOutside => {
                format!("Compressed cluster entry found in image with external data file ({place})")
            }
            Malformed::Subclusters => format!("Invalid cluster entry found ({place})"),
        };
        self.damage(&msg)
    }

    /// Whether the image may be used at all.
    pub(super) fn check_sound(&self) -> IoResult {
        if self.damage.fatal.load(Ordering::Acquire) { Err(Errno::EIO) } else { Ok(()) }
    }

    /// What a request comes to, when it has marked the image if it found it damaged. The caller holds nothing.
    pub(super) async fn conclude<T>(&self, result: IoResult<T>) -> IoResult<T> {
        if self.damage.unmarked.load(Ordering::Acquire) && self.damage.unmarked.swap(false, Ordering::AcqRel) {
            let _turn = self.turn.lock().await;
            // Where the mark cannot be written, the node refuses all the same.
            let _ = self.set_header(|header| header.incompatible |= header::CORRUPT).await;
        }
        result
    }
}
