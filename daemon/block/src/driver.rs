//! What a driver is: a few asynchronous operations on bytes, and facts about them.
//!
//! The author of a driver implements [`Driver`] with plain `async fn`s; the core calls it through [`DynDriver`], the
//! boxed mirror that is derived from it. A driver is called only within its facts: offsets and lengths are multiples of
//! [`Facts::request_align`], transfers are no longer than [`Facts::max_transfer`], buffers are aligned to
//! [`Facts::mem_align`]. It need not check bounds, emulate anything or count.
//!
//! A driver owns the state of its medium, shared by all threads. It keeps no lock across an await, starts no thread and
//! knows no parents.

use crate::IoResult;
use crate::check::Check;
use crate::edge::Edge;
use crate::fault::FaultControl;
use crate::node::Node;
use crate::perm::Perms;
use crate::reopen::{Backing, ChildList, Reopen};
use crate::reservation::Reservations;
use crate::snapshot::Snapshots;
use buf::IoBuf;
use nix::errno::Errno;
use qapi::types::block_filters::BlkdebugEvent;
use qapi::types::block_query::{BlockStatsSpecificVariant, ImageInfoSpecificVariant};
use qapi::types::snapshot::SnapshotInfo;
use qapi::{Error, Result};
use std::pin::Pin;
use std::sync::Arc;

/// A future that stays on the thread that made it, as every request does (law 4).
pub type LocalFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// A run of bytes on a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// First byte.
    pub at: u64,
    /// Number of bytes.
    pub len: u64,
}

impl Span {
    /// `len` bytes from `at`.
    pub const fn new(at: u64, len: u64) -> Self {
        Self { at, len }
    }

    /// The first byte after the run; saturates, so that a run that would wrap never looks short.
    pub const fn end(self) -> u64 {
        self.at.saturating_add(self.len)
    }
}

/// How well a driver does something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Support {
    /// Not at all: the core does without or refuses.
    #[default]
    None,
    /// By other means of the driver's, slower than it looks.
    Emulated,
    /// As the medium's own operation.
    Native,
}

/// What the core has to know of a driver to call it right. Taken as a snapshot at open and after each change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Offsets and lengths are multiples of this many bytes. A power of two, from 1 to 1 MiB.
    pub request_align: u32,
    /// Each segment of a buffer starts at a multiple of this many bytes in memory, and its length is a multiple of it or of
    /// `request_align`, whichever is smaller. A power of two, up to 4096.
    pub mem_align: u32,
    /// The longest read or write in bytes; a multiple of `request_align`.
    pub max_transfer: u32,
    /// The length that serves best, in bytes; 0 where the driver does not know one.
    pub opt_transfer: u32,
    /// Longest zero request in bytes.
    pub max_zero: u64,
    /// Zero requests that are no multiple of this lose their ends to ordinary writes. A power of two.
    pub zero_align: u32,
    /// Longest discard in bytes.
    pub max_discard: u64,
    /// Discards are shrunk to multiples of this. A power of two.
    pub discard_align: u32,
    /// [`WriteFlags::FUA`] on writes and zeroes; emulated by a flush where it is not native.
    pub fua: Support,
    /// [`Driver::zero`] exists. Where it is `Native`, a request without fallback may succeed.
    pub zero: Support,
    /// [`Driver::discard`] exists.
    pub discard: Support,
    /// [`Driver::write_compressed`] exists, and takes runs of this many bytes; 0 where it does not. A power of two.
    pub compressed_unit: u32,
    /// Whatever happens to it, [`Driver::map`] calls all its bytes allocated: none ever shows through from another layer.
    pub complete: bool,
}

impl Default for Facts {
    fn default() -> Self {
        Self {
            request_align: 1,
            mem_align: 1,
            max_transfer: 1 << 30,
            opt_transfer: 0,
            max_zero: 1 << 40,
            zero_align: 1,
            max_discard: 1 << 40,
            discard_align: 1,
            fua: Support::None,
            zero: Support::None,
            discard: Support::None,
            compressed_unit: 0,
            complete: false,
        }
    }
}

/// How a write is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct WriteFlags {
    /// The data is on stable storage before the write completes (force unit access).
    pub fua: bool,
}

impl WriteFlags {
    /// On stable storage before it completes.
    pub const FUA: Self = Self { fua: true };
    /// No flag.
    pub const NONE: Self = Self { fua: false };
}

/// How zeroes are to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct ZeroFlags {
    /// The zeroes are on stable storage before the request completes.
    pub fua: bool,
    /// Space may be given back to the host, as long as the bytes read as zero.
    pub may_unmap: bool,
    /// Fail with `ENOTSUP` rather than write zeroes the slow way.
    pub no_fallback: bool,
}

/// How the new end of a node is to be backed when it grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Prealloc {
    /// Sparse.
    #[default]
    Off,
    /// The format's metadata only.
    Metadata,
    /// Reserved without being written.
    Falloc,
    /// Written with zeroes.
    Full,
}

/// What lies at some run of bytes of one node, see [`Driver::map`].
#[derive(Clone, Debug)]
pub struct Mapping {
    /// For how many bytes from the start this holds; at most what was asked. What changes inside an alignment unit is taken
    /// for data by whoever asks for the rest of that.
    pub len: u64,
    /// The bytes read as zero, whatever else is said.
    pub zero: bool,
    /// The bytes are stored and must be read to be known.
    pub data: bool,
    /// The bytes come from this node, not from what backs it. Formats say no where their backing file shows through.
    pub allocated: bool,
    /// Where they are: offset in `child`, or in this node's own medium if that is none.
    pub at: Option<u64>,
    /// The child that the bytes are in. The core asks it in turn whether they are zero there.
    pub child: Option<Arc<Edge>>,
    /// The bytes are stored in another form (compressed, encrypted), so `at` is no place to read them plainly.
    pub encoded: bool,
}

impl Mapping {
    /// `len` bytes of stored data at `at` of the driver's own medium.
    pub const fn data(len: u64, at: u64) -> Self {
        Self { len, zero: false, data: true, allocated: true, at: Some(at), child: None, encoded: false }
    }

    /// `len` bytes of the driver's own medium that read as zero because nothing is stored.
    pub const fn hole(len: u64, at: u64) -> Self {
        Self { len, zero: true, data: false, allocated: true, at: Some(at), child: None, encoded: false }
    }

    /// `len` bytes that `child` has at `at`: what a filter says of all its bytes.
    pub const fn forward(len: u64, child: Arc<Edge>, at: u64) -> Self {
        Self { len, zero: false, data: false, allocated: true, at: Some(at), child: Some(child), encoded: false }
    }
}

/// What a driver knows of its image besides what every node has; the members are those of `ImageInfo`.
#[derive(Clone, Debug, Default)]
pub struct ImageDetails {
    /// Whether the image was not closed properly; none where the driver has no such notion.
    pub dirty: Option<bool>,
    /// Bytes of a cluster.
    pub cluster_size: Option<u32>,
    /// The data are encrypted.
    pub encrypted: bool,
    /// Clusters are compressed.
    pub compressed: bool,
    /// The name that the image has for its backing file, as it stands there.
    pub backing_filename: Option<String>,
    /// The same as it can be opened.
    pub full_backing_filename: Option<String>,
    /// The format that the image gives its backing file.
    pub backing_filename_format: Option<String>,
    /// Internal snapshots.
    pub snapshots: Vec<SnapshotInfo>,
    /// What only images of this format have.
    pub specific: Option<ImageInfoSpecificVariant>,
}

/// A driver, as its author writes it. See the module for what the core guarantees.
pub trait Driver: Send + Sync + 'static {
    /// The driver's name in QAPI: `file`, `raw`, ...
    fn name(&self) -> &'static str;

    /// The facts as they are now. Called at open and after a change of permissions, options or size.
    fn facts(&self) -> Facts;

    /// The file name that the node shows (`filename` of `query-named-block-nodes`); empty where it has none of its own.
    fn filename(&self) -> String {
        String::new()
    }

    /// Length in bytes, as the medium has it now.
    fn length(&self) -> impl Future<Output = IoResult<u64>>;

    /// Bytes that the medium occupies on its host, none where that is unknown.
    fn allocated_size(&self) -> impl Future<Output = Option<u64>> {
        async { None }
    }

    /// What it knows of its image. For queries: nothing is read that is not in memory, where that can be helped.
    fn image_info(&self) -> impl Future<Output = ImageDetails> {
        async { ImageDetails::default() }
    }

    /// What it counts besides requests.
    fn driver_stats(&self) -> Option<BlockStatsSpecificVariant> {
        None
    }

    /// Fills `buf` with the bytes from `at`. Bytes after the end of the medium read as zero.
    fn read(&self, at: u64, buf: &IoBuf) -> impl Future<Output = IoResult>;

    /// The node from which a read of `span` fills its whole buffer, at the same offset, where this driver would do nothing but
    /// read there: the core does so in its place, and counts the read here as well. It is asked for reads within the facts
    /// that come through a backing link, and takes the answer: what the driver raises before it reads there, it raises now.
    ///
    /// No I/O, no waiting; a driver that cannot tell at once says none, and [`Driver::read`] is called as ever.
    fn read_through(&self, span: Span) -> Option<Arc<Node>> {
        let _ = span;
        None
    }

    /// Writes `buf` at `at`. `flags.fua` is set only where [`Facts::fua`] is not `None`.
    fn write(&self, at: u64, buf: &IoBuf, flags: WriteFlags) -> impl Future<Output = IoResult>;

    /// Writes `buf` at `at` so that it takes less space, where it can. Called where [`Facts::compressed_unit`] is not 0; both
    /// ends are multiples of it, or the end of the node.
    fn write_compressed(&self, at: u64, buf: &IoBuf) -> impl Future<Output = IoResult> {
        let _ = (at, buf);
        async { Err(Errno::ENOTSUP) }
    }

    /// All writes that completed before this call are on stable storage when it returns. A filter flushes its child.
    fn flush(&self) -> impl Future<Output = IoResult>;

    /// Makes `span` read as zero, or `ENOTSUP`, upon which the core writes zeroes (unless `no_fallback`).
    fn zero(&self, span: Span, flags: ZeroFlags) -> impl Future<Output = IoResult> {
        let _ = (span, flags);
        async { Err(Errno::ENOTSUP) }
    }

    /// The bytes of `span` are not needed any more; `ENOTSUP` is taken as done.
    fn discard(&self, span: Span) -> impl Future<Output = IoResult> {
        let _ = span;
        async { Err(Errno::ENOTSUP) }
    }

    /// What lies at the start of `span`. With `precise` false a driver may call data what it would have to search.
    fn map(&self, span: Span, precise: bool) -> impl Future<Output = IoResult<Mapping>>;

    /// Sets the length to `size` bytes. With `exact` false a medium whose size cannot change may stay larger.
    fn truncate(&self, size: u64, exact: bool, prealloc: Prealloc) -> impl Future<Output = Result<()>> {
        let _ = (size, exact, prealloc);
        async { Err(Error::generic("Image format driver does not support resize")) }
    }

    /// What this node needs of, and shares on, `child` when its own users have `of_node`. A filter passes them on.
    fn child_perms(&self, child: &Edge, of_node: Perms) -> Perms {
        let _ = child;
        of_node
    }

    /// The medium's persistent reservations, where it can have them; a filter that shows all of its child's bytes gives the
    /// edge to its child.
    fn reservations(&self) -> Option<&dyn Reservations> {
        None
    }

    /// How the driver is made to fail, where it is one that can be.
    fn fault_control(&self) -> Option<&dyn FaultControl> {
        None
    }

    /// The snapshots inside the image, where the driver is a format that has them.
    fn snapshots(&self) -> Option<&dyn Snapshots> {
        None
    }

    /// How the image is checked, where the driver is a format that can.
    fn check_control(&self) -> Option<&dyn Check> {
        None
    }

    /// The node is about to be taken into the graph, and its permissions hold: what has to be written before anybody uses it is
    /// written now.
    fn start(&self) -> impl Future<Output = Result<()>> {
        async { Ok(()) }
    }

    /// How the driver's options change, where it has something to do about it.
    fn reopen(&self) -> Option<&dyn Reopen> {
        None
    }

    /// The backing file, for formats whose images can have one.
    fn backing(&self) -> Option<&dyn Backing> {
        None
    }

    /// Children that come and go one by one, where they can.
    fn child_list(&self) -> Option<&dyn ChildList> {
        None
    }

    /// The users' permissions are about to become `new`: gets what they need in addition (locks, a writable descriptor)
    /// and keeps what the old ones need, until one of [`Driver::commit_perms`] and [`Driver::abort_perms`] follows.
    fn prepare_perms(&self, new: Perms) -> impl Future<Output = Result<()>> {
        let _ = new;
        async { Ok(()) }
    }

    /// The prepared permissions hold: releases what only the old ones needed. Cannot fail.
    fn commit_perms(&self) {}

    /// The prepared permissions will not come: back to the old ones.
    fn abort_perms(&self) {}

    /// Whether some user above stays when this process dies, and goes on with its successor: a guest behind a front-end that
    /// connects again. What completes from now on must then be found in the medium below by that successor, without any
    /// flush: given to the host, stable or not. A driver that completes changes earlier, as its metadata wait in its
    /// memory, has to give those out as well; one that passes requests on has nothing to do.
    fn outlived(&self, outlived: bool) {
        let _ = outlived;
    }

    /// Whether [`Driver::event`] does anything; asked once, when the node is made.
    fn hears_events(&self) -> bool {
        false
    }

    /// Something is about to be done to this node, or has been. The core raises what it does itself, drivers raise
    /// the rest on their children with [`Edge::raise`].
    fn event(&self, event: BlkdebugEvent) {
        let _ = event;
    }

    /// The image is this process's again after it may have been another's: whatever was learned of it is forgotten and read
    /// anew, down to the length. The permissions of the node hold already; nothing is in flight.
    fn activate(&self) -> impl Future<Output = Result<()>> {
        async { Ok(()) }
    }

    /// The image is about to be another process's: what is not in it is written now. Nothing is in flight, and the node has
    /// been flushed.
    fn deactivate(&self) -> impl Future<Output = Result<()>> {
        async { Ok(()) }
    }

    /// A drain begins above this node: what the driver holds back (not what it waits for) must go on now, and what still comes
    /// must not be held back, until [`Driver::drain_end`]. Nests.
    fn drain_begin(&self) {}

    /// Takes one [`Driver::drain_begin`] back.
    fn drain_end(&self) {}

    /// The node is gone from the graph, nothing is in flight, everything has been flushed: releases locks and files.
    fn close(&self) -> impl Future<Output = ()> {
        async {}
    }
}

macro_rules! mirror {
    ($(fn $name:ident(&self $(, $arg:ident : $ty:ty)*) -> $ret:ty;)*) => {
        /// The object-safe mirror of [`Driver`], implemented for each of them; one allocation a call.
        pub trait DynDriver: Send + Sync + 'static {
            $(#[doc = concat!("[`Driver::", stringify!($name), "`], boxed.")]
            fn $name<'a>(&'a self $(, $arg: $ty)*) -> LocalFuture<'a, $ret>;)*
            /// [`Driver::name`].
            fn name(&self) -> &'static str;
            /// [`Driver::facts`].
            fn facts(&self) -> Facts;
            /// [`Driver::filename`].
            fn filename(&self) -> String;
            /// [`Driver::read`], boxed.
            fn read<'a>(&'a self, at: u64, buf: &'a IoBuf) -> LocalFuture<'a, IoResult>;
            /// [`Driver::read_through`].
            fn read_through(&self, span: Span) -> Option<Arc<Node>>;
            /// [`Driver::write`], boxed.
            fn write<'a>(&'a self, at: u64, buf: &'a IoBuf, flags: WriteFlags) -> LocalFuture<'a, IoResult>;
            /// [`Driver::write_compressed`], boxed.
            fn write_compressed<'a>(&'a self, at: u64, buf: &'a IoBuf) -> LocalFuture<'a, IoResult>;
            /// [`Driver::child_perms`].
            fn child_perms(&self, child: &Edge, of_node: Perms) -> Perms;
            /// [`Driver::reservations`].
            fn reservations(&self) -> Option<&dyn Reservations>;
            /// [`Driver::driver_stats`].
            fn driver_stats(&self) -> Option<BlockStatsSpecificVariant>;
            /// [`Driver::reopen`].
            fn reopen(&self) -> Option<&dyn Reopen>;
            /// [`Driver::backing`].
            fn backing(&self) -> Option<&dyn Backing>;
            /// [`Driver::child_list`].
            fn child_list(&self) -> Option<&dyn ChildList>;
            /// [`Driver::commit_perms`].
            fn commit_perms(&self);
            /// [`Driver::abort_perms`].
            fn abort_perms(&self);
            /// [`Driver::outlived`].
            fn outlived(&self, outlived: bool);
            /// [`Driver::fault_control`].
            fn fault_control(&self) -> Option<&dyn FaultControl>;
            /// [`Driver::snapshots`].
            fn snapshots(&self) -> Option<&dyn Snapshots>;
            /// [`Driver::check_control`].
            fn check_control(&self) -> Option<&dyn Check>;
            /// [`Driver::hears_events`].
            fn hears_events(&self) -> bool;
            /// [`Driver::event`].
            fn event(&self, event: BlkdebugEvent);
            /// [`Driver::drain_begin`].
            fn drain_begin(&self);
            /// [`Driver::drain_end`].
            fn drain_end(&self);
        }

        impl<D: Driver> DynDriver for D {
            $(fn $name<'a>(&'a self $(, $arg: $ty)*) -> LocalFuture<'a, $ret> {
                Box::pin(Driver::$name(self $(, $arg)*))
            })*
            fn name(&self) -> &'static str {
                Driver::name(self)
            }
            fn facts(&self) -> Facts {
                Driver::facts(self)
            }
            fn filename(&self) -> String {
                Driver::filename(self)
            }
            fn read<'a>(&'a self, at: u64, buf: &'a IoBuf) -> LocalFuture<'a, IoResult> {
                Box::pin(Driver::read(self, at, buf))
            }
            fn read_through(&self, span: Span) -> Option<Arc<Node>> {
                Driver::read_through(self, span)
            }
            fn write<'a>(&'a self, at: u64, buf: &'a IoBuf, flags: WriteFlags) -> LocalFuture<'a, IoResult> {
                Box::pin(Driver::write(self, at, buf, flags))
            }
            fn write_compressed<'a>(&'a self, at: u64, buf: &'a IoBuf) -> LocalFuture<'a, IoResult> {
                Box::pin(Driver::write_compressed(self, at, buf))
            }
            fn child_perms(&self, child: &Edge, of_node: Perms) -> Perms {
                Driver::child_perms(self, child, of_node)
            }
            fn reservations(&self) -> Option<&dyn Reservations> {
                Driver::reservations(self)
            }
            fn driver_stats(&self) -> Option<BlockStatsSpecificVariant> {
                Driver::driver_stats(self)
            }
            fn reopen(&self) -> Option<&dyn Reopen> {
                Driver::reopen(self)
            }
            fn backing(&self) -> Option<&dyn Backing> {
                Driver::backing(self)
            }
            fn child_list(&self) -> Option<&dyn ChildList> {
                Driver::child_list(self)
            }
            fn commit_perms(&self) {
                Driver::commit_perms(self);
            }
            fn abort_perms(&self) {
                Driver::abort_perms(self);
            }
            fn outlived(&self, outlived: bool) {
                Driver::outlived(self, outlived);
            }
            fn fault_control(&self) -> Option<&dyn FaultControl> {
                Driver::fault_control(self)
            }
            fn snapshots(&self) -> Option<&dyn Snapshots> {
                Driver::snapshots(self)
            }
            fn check_control(&self) -> Option<&dyn Check> {
                Driver::check_control(self)
            }
            fn hears_events(&self) -> bool {
                Driver::hears_events(self)
            }
            fn event(&self, event: BlkdebugEvent) {
                Driver::event(self, event);
            }
            fn drain_begin(&self) {
                Driver::drain_begin(self);
            }
            fn drain_end(&self) {
                Driver::drain_end(self);
            }
        }
    };
}

mirror! {
    fn length(&self) -> IoResult<u64>;
    fn allocated_size(&self) -> Option<u64>;
    fn image_info(&self) -> ImageDetails;
    fn flush(&self) -> IoResult;
    fn zero(&self, span: Span, flags: ZeroFlags) -> IoResult;
    fn discard(&self, span: Span) -> IoResult;
    fn map(&self, span: Span, precise: bool) -> IoResult<Mapping>;
    fn truncate(&self, size: u64, exact: bool, prealloc: Prealloc) -> Result<()>;
    fn activate(&self) -> Result<()>;
    fn deactivate(&self) -> Result<()>;
    fn prepare_perms(&self, new: Perms) -> Result<()>;
    fn start(&self) -> Result<()>;
    fn close(&self) -> ();
}
