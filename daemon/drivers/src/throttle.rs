//! `throttle`: another node, no faster than its group's limits allow.
//!
//! Reads wait as reads; writes, zeroes and discards as writes; flushes do not wait. Groups and their buckets are in
//! [`block::throttle`].

use crate::filter::{self, len_of};
use arc_swap::ArcSwap;
use block::driver::{LocalFuture, Prealloc};
use block::reopen::{NewOptions, Prepared, Reopen};
use block::reservation::Reservations;
use block::throttle::{Direction, Member};
use block::{Driver, Edge, Facts, IoResult, Mapping, OpenContext, Role, Span, WriteFlags, ZeroFlags};
use buf::IoBuf;
use qapi::types::block::BlockdevDriverOptions;
use qapi::types::block_filters::BlockdevOptionsThrottle;
use qapi::{Error, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// A member of a group, and the node that it limits.
#[derive(Debug)]
pub struct Throttle {
    file: Arc<Edge>,
    /// Replaced by the control task, while nothing is in flight.
    member: ArcSwap<Member>,
    /// Drains that are under way above. Control task only.
    drains: AtomicU32,
}

/// Opens the child and joins the group.
///
/// # Errors
/// There is no such group; those of the child.
pub async fn open(cx: &mut OpenContext<'_>, options: &BlockdevOptionsThrottle) -> Result<Throttle> {
    let group = cx.throttle_group(&options.throttle_group)?;
    let file = cx.child("file", Role::Filtered, &options.file).await?;
    Ok(Throttle { file, member: ArcSwap::from_pointee(group.join()), drains: AtomicU32::new(0) })
}

/// The membership of another group, which waits to take the place of the one there is.
struct Waiting<'a> {
    throttle: &'a Throttle,
    member: Member,
}

impl Reopen for Throttle {
    fn mutable(&self) -> &'static [&'static str] {
        &["throttle-group"]
    }

    fn prepare<'a>(&'a self, new: &'a NewOptions<'_>) -> LocalFuture<'a, Result<Box<dyn Prepared + 'a>>> {
        Box::pin(async move {
            let BlockdevDriverOptions::Throttle(options) = new.driver else {
                return Err(Error::generic("These are not the options of a throttle node"));
            };
            let member = new.resources.throttle_group(&options.throttle_group)?.join();
            let waiting: Box<dyn Prepared + 'a> = Box::new(Waiting { throttle: self, member });
            Ok(waiting)
        })
    }
}

impl Prepared for Waiting<'_> {
    fn commit(self: Box<Self>) {
        for _ in 0..self.throttle.drains.load(Ordering::Relaxed) {
            self.member.release();
        }
        self.throttle.member.store(Arc::new(self.member));
    }
}

impl Throttle {
    /// Waits until a request may go. Without a limit that is at once, and costs a look.
    async fn pass(&self, direction: Direction, bytes: u64) {
        if self.member.load().is_limited(direction) {
            let member = self.member.load_full();
            // Boxed, so that requests without a limit do not carry the room for it.
            Box::pin(async move { member.pass(direction, bytes).await }).await;
        }
    }
}

impl Driver for Throttle {
    fn name(&self) -> &'static str {
        "throttle"
    }

    fn facts(&self) -> Facts {
        let child = self.file.facts();
        Facts { compressed_unit: child.compressed_unit, complete: child.complete, ..filter::facts(&self.file) }
    }

    fn filename(&self) -> String {
        let group = self.member.load().group().name().into();
        filter::describe("throttle", &[("throttle-group", group)], &[("file", &self.file)])
    }

    async fn length(&self) -> IoResult<u64> {
        Ok(self.file.size())
    }

    async fn read(&self, at: u64, buf: &IoBuf) -> IoResult {
        self.pass(Direction::Read, len_of(buf)).await;
        self.file.read(at, buf).await
    }

    async fn write(&self, at: u64, buf: &IoBuf, flags: WriteFlags) -> IoResult {
        self.pass(Direction::Write, len_of(buf)).await;
        self.file.write(at, buf, flags).await
    }

    async fn write_compressed(&self, at: u64, buf: &IoBuf) -> IoResult {
        self.pass(Direction::Write, len_of(buf)).await;
        self.file.write_compressed(at, buf).await
    }

    async fn flush(&self) -> IoResult {
        self.file.flush().await
    }

    async fn zero(&self, span: Span, flags: ZeroFlags) -> IoResult {
        self.pass(Direction::Write, span.len).await;
        self.file.zero(span, flags).await
    }

    async fn discard(&self, span: Span) -> IoResult {
        self.pass(Direction::Write, span.len).await;
        self.file.discard(span).await
    }

    async fn map(&self, span: Span, _precise: bool) -> IoResult<Mapping> {
        Ok(Mapping::forward(span.len, Arc::clone(&self.file), span.at))
    }

    async fn truncate(&self, size: u64, exact: bool, prealloc: Prealloc) -> Result<()> {
        self.file.truncate(size, exact, prealloc).await
    }

    fn reopen(&self) -> Option<&dyn Reopen> {
        Some(self)
    }

    fn reservations(&self) -> Option<&dyn Reservations> {
        Some(&*self.file)
    }

    fn drain_begin(&self) {
        self.drains.fetch_add(1, Ordering::Relaxed);
        self.member.load().release();
    }

    fn drain_end(&self) {
        self.drains.fetch_sub(1, Ordering::Relaxed);
        self.member.load().hold();
    }
}
