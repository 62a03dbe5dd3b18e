//! Compressed writes [qcow2 §Compressed Clusters Descriptor]: whole clusters, one behind the other, where space is left from the
//! last one.
//!
//! A cluster that does not become smaller is written as it is. What the cluster held before is given up, as in any write
//! into a new place.

use super::bytes::{u64_of, us};
use super::compress;
use super::entry::{Entry, Place};
use super::guard::Kinds;
use super::image::Qcow2;
use block::{BlkdebugEvent, Errno, IoResult, Span, WriteFlags};
use buf::IoBuf;

impl Qcow2 {
    /// Writes `buf`, whole clusters but for the last of the guest's disk, at `at`.
    pub(super) async fn write_packed(&self, at: u64, buf: &IoBuf) -> IoResult {
        let cluster = us(self.shape.cluster());
        let mut done = 0;
        while done < buf.len() {
            let part = buf.slice(done, cluster);
            let start = at + u64_of(done);
            // The end of the last cluster is nobody's, and reads as zero.
            let mut bytes = part.to_vec();
            bytes.resize(cluster, 0);
            let kind = self.header_now().compression;
            match self.workers.run(move || compress::pack(kind, &bytes)).await? {
                Some(packed) => self.write_one_packed(start, &packed).await?,
                None => self.write_guest(start, &part, WriteFlags::NONE).await?,
            }
            done += part.len();
        }
        Ok(())
    }

    async fn write_one_packed(&self, at: u64, packed: &[u8]) -> IoResult {
        self.prepare().await?;
        self.record(Span::new(at, self.shape.cluster().min(self.length_now() - at))).await?;
        let inside = self.epochs.enter();
        let held = self.busy.reserve(Span::new(at, self.shape.cluster()), true).await;
        self.own_table(at).await?;
        let len = u64_of(packed.len());
        self.file.raise(BlkdebugEvent::ClusterAllocBytes);
        let host = match self.refs.claim_bytes(len, &self.file).await {
            Err(Errno::EUCLEAN) => return Err(self.damage("The refcount structures are damaged")),
            other => other?,
        };
        let written = match self.check_overlap(Kinds::NONE, host, len) {
            Ok(()) => {
                self.file.raise(BlkdebugEvent::WriteCompressed);
                self.file.write(host, &IoBuf::copy_of(packed), WriteFlags::NONE).await
            }
            Err(errno) => Err(errno),
        };
        let linked = match written {
            Ok(()) => self.link_packed(at, host, len).await,
            Err(errno) => Err(errno),
        };
        if let Err(errno) = linked {
            let bits = self.shape.cluster_bits;
            self.unclaim(host >> bits..((host + len - 1) >> bits) + 1).await;
            return Err(errno);
        }
        drop(held);
        drop(inside);
        self.make_room().await
    }

    /// Makes the L2 entry for `at` name the compressed data.
    async fn link_packed(&self, at: u64, host: u64, len: u64) -> IoResult {
        if host + len > Entry::packed_limit(self.shape) {
            return Err(Errno::EFBIG);
        }
        let new = Entry { place: Place::Packed { at: host, len }, stored: self.shape.all(), zero: 0 };
        let change = |slice: &mut Vec<u8>| {
            let old = self.entry(slice, at);
            if old.is_ok() {
                self.put_entry(slice, at, new);
            }
            old
        };
        self.file.raise(BlkdebugEvent::L2UpdateCompressed);
        self.handover.expose();
        match self.change_slice(at..at + 1, change).await? {
            Ok(old) => {
                self.unlink(&[old], self.discards().other);
                Ok(())
            }
            Err(why) => Err(self.malformed(at, why, true)),
        }
    }
}
