//! `throttle`: another node, no faster than its group's limits allow.
//!
//! Reads wait as reads; writes, zeroes and discards as writes; flushes do not wait. Groups and their buckets are in
//! [`block::throttle`].

use crate::filter::{self, len_of};
use block::driver::Prealloc;
use block::reservation::Reservations;
use block::throttle::{Direction, Groups, Member};
use block::{Driver, Edge, Facts, IoResult, Mapping, OpenContext, Role, Span, WriteFlags, ZeroFlags};
use buf::IoBuf;
use qapi::types::block_filters::BlockdevOptionsThrottle;
use qapi::{Error, Result};
use std::sync::Arc;

/// A member of a group, and the node that it limits.
#[derive(Debug)]
pub struct Throttle {
    file: Arc<Edge>,
    member: Member,
}

/// Opens the child and joins the group.
///
/// # Errors
/// There is no such group; those of the child.
pub async fn open(cx: &mut OpenContext<'_>, groups: &Groups, options: &BlockdevOptionsThrottle) -> Result<Throttle> {
    let name = &options.throttle_group;
    let group = groups.get(name).ok_or_else(|| Error::generic(format!("Throttle group '{name}' does not exist")))?;
    let file = cx.child("file", Role::Filtered, &options.file).await?;
    Ok(Throttle { file, member: group.join() })
}

impl Driver for Throttle {
    fn name(&self) -> &'static str {
        "throttle"
    }

    fn facts(&self) -> Facts {
        filter::facts(&self.file)
    }

    fn filename(&self) -> String {
        let group = self.member.group().name().into();
        filter::describe("throttle", &[("throttle-group", group)], &[("file", &self.file)])
    }

    async fn length(&self) -> IoResult<u64> {
        Ok(self.file.size())
    }

    async fn read(&self, at: u64, buf: &IoBuf) -> IoResult {
        self.member.pass(Direction::Read, len_of(buf)).await;
        self.file.read(at, buf).await
    }

    async fn write(&self, at: u64, buf: &IoBuf, flags: WriteFlags) -> IoResult {
        self.member.pass(Direction::Write, len_of(buf)).await;
        self.file.write(at, buf, flags).await
    }

    async fn flush(&self) -> IoResult {
        self.file.flush().await
    }

    async fn zero(&self, span: Span, flags: ZeroFlags) -> IoResult {
        self.member.pass(Direction::Write, span.len).await;
        self.file.zero(span, flags).await
    }

    async fn discard(&self, span: Span) -> IoResult {
        self.member.pass(Direction::Write, span.len).await;
        self.file.discard(span).await
    }

    async fn map(&self, span: Span, _precise: bool) -> IoResult<Mapping> {
        Ok(Mapping::forward(span.len, Arc::clone(&self.file), span.at))
    }

    async fn truncate(&self, size: u64, exact: bool, prealloc: Prealloc) -> Result<()> {
        self.file.truncate(size, exact, prealloc).await
    }

    fn reservations(&self) -> Option<&dyn Reservations> {
        Some(&*self.file)
    }

    fn drain_begin(&self) {
        self.member.release();
    }

    fn drain_end(&self) {
        self.member.hold();
    }
}
