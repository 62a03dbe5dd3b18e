//! `blkverify`: does everything to two nodes and compares, so that a format is tested against plain bytes.
//!
//! Where the two differ the request fails with EIO and a line on standard error says where; the reference ends its process
//! with the same line, which a daemon that serves others must not do. Only `test` is flushed, as the reference has it.

use crate::filter::{self, len_of};
use block::{Driver, Edge, Errno, Facts, IoResult, Mapping, OpenContext, Role, Span, Support, WriteFlags};
use buf::IoBuf;
use qapi::Result;
use qapi::types::block_filters::BlockdevOptionsBlkverify;
use std::sync::Arc;

/// Two nodes that must hold the same.
#[derive(Debug)]
pub struct Blkverify {
    test: Arc<Edge>,
    raw: Arc<Edge>,
}

/// Opens both nodes.
///
/// # Errors
/// Those of the children.
pub async fn open(cx: &mut OpenContext<'_>, options: &BlockdevOptionsBlkverify) -> Result<Blkverify> {
    let raw = cx.child("raw", Role::Filtered, &options.raw).await?;
    let test = cx.child("test", Role::Data, &options.test).await?;
    Ok(Blkverify { test, raw })
}

fn differ(what: &str, at: u64, len: u64, how: &str) -> IoResult {
    eprintln!("blkverify: {what} offset={at} bytes={len} {how}");
    Err(Errno::EIO)
}

/// The one result of two, if they are the same.
fn same(what: &str, at: u64, len: u64, test: IoResult, raw: IoResult) -> IoResult {
    let number = |result: IoResult| result.map_or_else(|errno| -(errno as i32), |()| 0);
    if test == raw {
        return test;
    }
    differ(what, at, len, &format!("return value mismatch {} != {}", number(test), number(raw)))
}

impl Driver for Blkverify {
    fn name(&self) -> &'static str {
        "blkverify"
    }

    fn facts(&self) -> Facts {
        let (test, raw) = (filter::facts(&self.test), filter::facts(&self.raw));
        Facts {
            request_align: test.request_align.max(raw.request_align),
            mem_align: test.mem_align.max(raw.mem_align),
            max_transfer: test.max_transfer.min(raw.max_transfer),
            // Zeroes are written, so that both get the same requests; what a discard leaves may differ.
            zero: Support::None,
            discard: Support::None,
            ..test
        }
    }

    fn filename(&self) -> String {
        filter::describe("blkverify", &[], &[("test", &self.test), ("raw", &self.raw)])
    }

    async fn length(&self) -> IoResult<u64> {
        Ok(self.test.size())
    }

    async fn read(&self, at: u64, buf: &IoBuf) -> IoResult {
        let len = len_of(buf);
        let other = IoBuf::alloc(buf.len());
        let (test, raw) = tokio::join!(self.test.read(at, buf), self.raw.read(at, &other));
        same("read", at, len, test, raw)?;
        match buf.to_vec().iter().zip(&other.to_vec()).zip(at..).find(|((test, raw), _)| test != raw) {
            Some((_, place)) => differ("read", at, len, &format!("contents mismatch at offset {place}")),
            None => Ok(()),
        }
    }

    async fn write(&self, at: u64, buf: &IoBuf, flags: WriteFlags) -> IoResult {
        let (test, raw) = tokio::join!(self.test.write(at, buf, flags), self.raw.write(at, buf, flags));
        same("write", at, len_of(buf), test, raw)
    }

    async fn flush(&self) -> IoResult {
        self.test.flush().await
    }

    async fn map(&self, span: Span, _precise: bool) -> IoResult<Mapping> {
        Ok(Mapping::data(span.len, span.at))
    }
}
