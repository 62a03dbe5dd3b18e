//! Image formats: where the bytes of a guest are in an image.
//!
//! | module | format |
//! | --- | --- |
//! | [`qcow2`] | QCOW2, versions 2 and 3 |
//!
//! A format owns its metadata and the caches of it. It reaches its medium through the edges of the graph alone, keeps no
//! lock across their I/O, and takes every byte of an image for hostile.
#![forbid(unsafe_code)]

pub mod qcow2;
mod workers;

pub use workers::Workers;

use block::driver::LocalFuture;
use block::{CreateContext, DynDriver, OpenContext, Opener};
use qapi::Result;
use qapi::types::block::{BlockdevDriverOptions, BlockdevOptions};
use qapi::types::create::{BlockdevCreateOptions, BlockdevCreateVariant};

/// The table of the formats of this crate, in front of a table of the other drivers.
#[derive(Clone, Debug, Default)]
pub struct Formats<Rest> {
    rest: Rest,
    workers: Workers,
}

impl<Rest> Formats<Rest> {
    /// The formats in front of `rest`; what takes a processor long is left to `workers`.
    pub fn new(rest: Rest, workers: Workers) -> Self {
        Self { rest, workers }
    }
}

impl<Rest: Opener> Opener for Formats<Rest> {
    fn open<'a>(
        &'a self,
        cx: &'a mut OpenContext<'_>,
        options: &'a BlockdevOptions,
    ) -> LocalFuture<'a, Result<Box<dyn DynDriver>>> {
        match &options.driver {
            BlockdevDriverOptions::Qcow2(qcow2) => Box::pin(async move {
                let driver: Box<dyn DynDriver> = Box::new(qcow2::open(cx, qcow2, self.workers.another()).await?);
                Ok(driver)
            }),
            _ => self.rest.open(cx, options),
        }
    }

    fn create<'a>(
        &'a self,
        cx: &'a mut dyn CreateContext,
        options: &'a BlockdevCreateOptions,
    ) -> LocalFuture<'a, Result<()>> {
        match &options.driver {
            BlockdevCreateVariant::Qcow2(qcow2) => Box::pin(qcow2::create(cx, qcow2)),
            _ => self.rest.create(cx, options),
        }
    }
}
