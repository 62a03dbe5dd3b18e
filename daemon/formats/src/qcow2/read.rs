//! Reading: pieces of a request from wherever they are, several at a time.

use super::bytes::{u64_of, us};
use super::compress;
use super::image::{Qcow2, Where, lock};
use super::join::join_all;
use block::{BlkdebugEvent, Errno, IoResult, Mapping, Node, Span};
use buf::IoBuf;
use std::sync::Arc;

/// Pieces of one request that are read at a time.
const AT_ONCE: usize = 16;

impl Qcow2 {
    /// Fills `buf` with the guest's bytes from `at`. The caller is inside an epoch.
    pub(super) async fn read_guest(&self, at: u64, buf: &IoBuf) -> IoResult {
        let mut done = 0;
        while done < buf.len() {
            let mut pieces = Vec::new();
            while done < buf.len() && pieces.len() < AT_ONCE {
                let start = at + u64_of(done);
                let (place, len) = self.find(start, u64_of(buf.len() - done)).await?;
                // Nearly all requests are one piece.
                if us(len) == buf.len() {
                    return self.read_piece(at, place, buf).await;
                }
                let part = buf.slice(done, us(len));
                done += part.len();
                pieces.push(async move { self.read_piece(start, place, &part).await });
            }
            join_all(pieces).await?;
        }
        Ok(())
    }

    /// The node that all of `span` shows through from, if that is plain from what is in memory. A read goes there next.
    ///
    /// The mapping is looked at inside an epoch, for a table may be given up and another come to its place. Nothing of what
    /// is found is a place in this image, so the read below needs none.
    pub(super) fn backs(&self, span: Span) -> Option<Arc<Node>> {
        let backing = self.backing.load();
        let node = backing.as_ref()?.node();
        self.check_sound().ok()?;
        let absent = {
            let _inside = self.epochs.enter();
            self.is_absent(span.at, span.len)
        };
        if !absent {
            return None;
        }
        self.file.raise(BlkdebugEvent::ReadBackingAio);
        Some(node)
    }

    async fn read_piece(&self, at: u64, place: Where, buf: &IoBuf) -> IoResult {
        match place {
            Where::Zero(_) => buf.fill(0),
            Where::Backing => match self.backing.load_full() {
                Some(backing) => {
                    self.file.raise(BlkdebugEvent::ReadBackingAio);
                    backing.read(at, buf).await?;
                }
                None => buf.fill(0),
            },
            Where::Data(host) => {
                self.file.raise(BlkdebugEvent::ReadAio);
                self.data().read(host, buf).await?;
            }
            Where::Packed { at, len, skip } => {
                let look = |bytes: &[u8]| {
                    let end = (us(skip) + buf.len()).min(bytes.len());
                    buf.write_at(0, bytes.get(us(skip)..end).unwrap_or_default());
                };
                self.unpacked.look(at, len, || self.unpack(at, len), look).await?;
            }
        }
        Ok(())
    }

    /// A compressed cluster, unpacked.
    async fn unpack(&self, at: u64, len: u64) -> IoResult<Vec<u8>> {
        // Twice a cluster is more than any compressed cluster needs, whatever the descriptor says.
        if len > 2 * self.shape.cluster() || at >= self.file.size() {
            return Err(self.damage("compressed cluster descriptor points outside of the image"));
        }
        let packed = IoBuf::alloc(us(len));
        self.file.raise(BlkdebugEvent::ReadCompressed);
        self.file.read(at, &packed).await?;
        let (kind, cluster) = (lock(&self.header).compression, us(self.shape.cluster()));
        // The buffer goes back to the pool of the thread that it came from, for this is its last owner.
        let (given, room) = (packed.clone(), self.unpacked.room());
        self.workers.run(move || compress::unpack(kind, &given, room, cluster)).await
    }

    /// What lies at the start of `span`.
    pub(super) async fn map_guest(&self, span: Span) -> IoResult<Mapping> {
        if span.len == 0 {
            return Err(Errno::EINVAL);
        }
        let (place, len) = self.find(span.at, span.len).await?;
        let data = Arc::clone(self.data());
        let nothing = Mapping { at: None, ..Mapping::hole(len, 0) };
        Ok(match place {
            Where::Zero(None) => nothing,
            Where::Zero(Some(host)) => Mapping { at: Some(host), child: Some(data), ..nothing },
            Where::Backing => Mapping { allocated: false, zero: self.backing.load().is_none(), ..nothing },
            // Holes below are not looked for in a data file, as in the reference: what is stored there is data.
            Where::Data(host) => {
                Mapping { child: self.data_file.is_none().then_some(data), ..Mapping::data(len, host) }
            }
            Where::Packed { .. } => {
                Mapping { at: None, encoded: true, ..Mapping::data(len.min(self.shape.cluster()), 0) }
            }
        })
    }
}
