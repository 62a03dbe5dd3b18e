//! `null-co` and `null-aio`: a device of any size that keeps nothing, for tests and measurements.
//!
//! The two differ in name only: here every request completes in the task that made it.

use block::{Driver, Errno, Facts, IoResult, Mapping, Span, Support, WriteFlags, ZeroFlags};
use buf::IoBuf;
use qapi::types::block::BlockdevOptionsNull;
use qapi::{Error, Result};
use std::time::Duration;

/// Size where the user gives none, in bytes.
const DEFAULT_SIZE: u64 = 1 << 30;

/// A device that keeps nothing.
#[derive(Debug)]
pub struct Null {
    name: &'static str,
    size: u64,
    /// Whether the user named a size, read-zeroes or a latency, so that the name alone does not describe the node.
    options: BlockdevOptionsNull,
    latency: Duration,
}

/// A null device by its driver's name.
///
/// # Errors
/// The size is negative.
pub fn open(name: &'static str, options: &BlockdevOptionsNull) -> Result<Null> {
    let size = match options.size {
        None => DEFAULT_SIZE,
        Some(size) => u64::try_from(size).map_err(|_| Error::generic("size is invalid"))?,
    };
    let latency = options.latency_ns.unwrap_or(0);
    if i64::try_from(latency).is_err() {
        return Err(Error::generic("latency-ns is invalid"));
    }
    Ok(Null { name, size, options: options.clone(), latency: Duration::from_nanos(latency) })
}

impl Null {
    /// Takes the time that a request takes. The clock of the event loop ticks in milliseconds and rounds up.
    async fn wait(&self) {
        if !self.latency.is_zero() {
            tokio::time::sleep(self.latency).await;
        }
    }
}

impl Driver for Null {
    fn name(&self) -> &'static str {
        self.name
    }

    fn facts(&self) -> Facts {
        // Zeroes and discards are as much nothing as writes are.
        Facts {
            fua: Support::Native,
            zero: Support::Native,
            discard: Support::Native,
            complete: true,
            ..Facts::default()
        }
    }

    fn filename(&self) -> String {
        let BlockdevOptionsNull { size, latency_ns, read_zeroes } = &self.options;
        if size.is_none() && latency_ns.is_none() && !read_zeroes {
            return format!("{}://", self.name);
        }
        let mut json = serde_json::json!({ "driver": self.name });
        if let Some(size) = size {
            json["size"] = (*size).into();
        }
        if let Some(latency) = latency_ns {
            json["latency-ns"] = (*latency).into();
        }
        if *read_zeroes {
            json["read-zeroes"] = true.into();
        }
        format!("json:{json}")
    }

    async fn length(&self) -> IoResult<u64> {
        Ok(self.size)
    }

    async fn allocated_size(&self) -> Option<u64> {
        Some(0)
    }

    async fn read(&self, _at: u64, buf: &IoBuf) -> IoResult {
        self.wait().await;
        // Also without read-zeroes: the buffer may hold what another client read or wrote.
        buf.fill(0);
        Ok(())
    }

    async fn write(&self, _at: u64, _buf: &IoBuf, _flags: WriteFlags) -> IoResult {
        self.wait().await;
        Ok(())
    }

    async fn flush(&self) -> IoResult {
        self.wait().await;
        Ok(())
    }

    async fn zero(&self, _span: Span, _flags: ZeroFlags) -> IoResult {
        self.wait().await;
        Ok(())
    }

    async fn discard(&self, _span: Span) -> IoResult {
        self.wait().await;
        Ok(())
    }

    async fn map(&self, span: Span, _precise: bool) -> IoResult<Mapping> {
        if span.len == 0 {
            return Err(Errno::EINVAL);
        }
        // Nothing is stored, and only with read-zeroes it is promised what is read.
        Ok(Mapping { zero: self.options.read_zeroes, ..Mapping::hole(span.len, span.at) })
    }
}
