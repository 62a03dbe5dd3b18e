//! Protocol drivers and filters: where the bytes of the graph's lowest nodes are, and what can stand above them.
//!
//! | module | drivers |
//! | --- | --- |
//! | [`file`] | `file`, `host_device`, `host_cdrom` |
//! | [`quorum`] | `quorum` |
//! | [`raw`] | `raw` |
//! | [`null`] | `null-co`, `null-aio` |
//! | [`blkdebug`] | `blkdebug` |
//! | [`copy_on_read`] | `copy-on-read` |
//! | [`blklogwrites`] | `blklogwrites` |
//! | [`blkverify`] | `blkverify` |
//! | [`compress`] | `compress` |
//! | [`fault`] | `x-fault` |
//! | [`preallocate`] | `preallocate` |
//! | [`throttle`] | `throttle` |
//! | [`filter`] | none: what those share that show the bytes of another node |
//!
//! Drivers never import each other. Each owns its medium's state and nothing else; see [`block::Driver`] for what the core
//! promises them.
#![forbid(unsafe_code)]

pub mod blkdebug;
pub mod blklogwrites;
pub mod blkverify;
pub mod compress;
pub mod copy_on_read;
pub mod fault;
pub mod file;
pub mod filter;
pub mod null;
pub mod preallocate;
pub mod quorum;
pub mod raw;
pub mod throttle;

use block::clock::{Clock, SystemClock};
use block::driver::LocalFuture;
use block::{CreateContext, DynDriver, OpenContext, Opener};
use qapi::types::block::{BlockdevDriverOptions, BlockdevOptions};
use qapi::types::create::{BlockdevCreateOptions, BlockdevCreateVariant};
use qapi::{Error, Result};
use std::sync::Arc;

/// The table of the drivers of this crate, and what of the daemon they need.
#[derive(Clone, Debug)]
pub struct Drivers {
    /// The descriptors that the user passed, by the names under which they are opened.
    pub fdsets: io::FdSets,
    /// The time of drivers that delay requests.
    pub clock: Arc<dyn Clock>,
}

impl Default for Drivers {
    /// No descriptors, and the host's time.
    fn default() -> Self {
        Self::with_clock(Arc::new(SystemClock::default()))
    }
}

impl Drivers {
    /// No descriptors, and this time.
    pub fn with_clock(clock: Arc<dyn Clock>) -> Self {
        Self { fdsets: io::FdSets::default(), clock }
    }
}

impl Opener for Drivers {
    fn open<'a>(
        &'a self,
        cx: &'a mut OpenContext<'_>,
        options: &'a BlockdevOptions,
    ) -> LocalFuture<'a, Result<Box<dyn DynDriver>>> {
        Box::pin(async move {
            Ok(match &options.driver {
                BlockdevDriverOptions::Blkdebug(options) => {
                    boxed(blkdebug::open(cx, Arc::clone(&self.clock), &self.fdsets, options).await?)
                }
                BlockdevDriverOptions::Blklogwrites(options) => boxed(blklogwrites::open(cx, options).await?),
                BlockdevDriverOptions::Blkverify(options) => boxed(blkverify::open(cx, options).await?),
                BlockdevDriverOptions::Compress(options) => boxed(compress::open(cx, options).await?),
                BlockdevDriverOptions::CopyOnRead(options) => boxed(copy_on_read::open(cx, options).await?),
                BlockdevDriverOptions::File(file) => boxed(file::open_regular(cx, &self.fdsets, file).await?),
                BlockdevDriverOptions::HostCdrom(file) => boxed(file::open_cdrom(cx, &self.fdsets, file).await?),
                BlockdevDriverOptions::HostDevice(file) => boxed(file::open_device(cx, &self.fdsets, file).await?),
                BlockdevDriverOptions::NullAio(null) => boxed(null::open("null-aio", null)?),
                BlockdevDriverOptions::NullCo(null) => boxed(null::open("null-co", null)?),
                BlockdevDriverOptions::Preallocate(options) => boxed(preallocate::open(cx, options).await?),
                BlockdevDriverOptions::Quorum(options) => boxed(quorum::open(cx, options).await?),
                BlockdevDriverOptions::Raw(raw) => boxed(raw::open(cx, raw).await?),
                BlockdevDriverOptions::XFault(options) => {
                    boxed(fault::open(cx, Arc::clone(&self.clock), options).await?)
                }
                BlockdevDriverOptions::Throttle(throttle) => boxed(throttle::open(cx, throttle).await?),
                BlockdevDriverOptions::Qcow2(_) => {
                    return Err(Error::generic("Formats are not among the drivers of this table"));
                }
            })
        })
    }

    fn create<'a>(
        &'a self,
        _cx: &'a mut dyn CreateContext,
        options: &'a BlockdevCreateOptions,
    ) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            match &options.driver {
                BlockdevCreateVariant::File(file) => file::create(&self.fdsets, file).await,
                BlockdevCreateVariant::Qcow2(_) => {
                    Err(Error::generic("Formats are not among the drivers of this table"))
                }
            }
        })
    }
}

fn boxed(driver: impl block::Driver) -> Box<dyn DynDriver> {
    Box::new(driver)
}
