//! Protocol drivers and filters: where the bytes of the graph's lowest nodes are, and what can stand above them.
//!
//! | module | drivers |
//! | --- | --- |
//! | [`file`] | `file`, `host_device` |
//! | [`raw`] | `raw` |
//! | [`null`] | `null-co`, `null-aio` |
//!
//! Drivers never import each other. Each owns its medium's state and nothing else; see [`block::Driver`] for what the core
//! promises them.
#![forbid(unsafe_code)]

pub mod file;
pub mod null;
pub mod raw;

use block::driver::LocalFuture;
use block::{DynDriver, OpenContext, Opener};
use qapi::Result;
use qapi::types::block::{BlockdevDriverOptions, BlockdevOptions};

/// The table of the drivers of this crate.
#[derive(Clone, Copy, Debug, Default)]
pub struct Drivers;

impl Opener for Drivers {
    fn open<'a>(
        &'a self,
        cx: &'a mut OpenContext<'_>,
        options: &'a BlockdevOptions,
    ) -> LocalFuture<'a, Result<Box<dyn DynDriver>>> {
        Box::pin(async move {
            Ok(match &options.driver {
                BlockdevDriverOptions::File(file) => boxed(file::open_regular(&cx.options, file).await?),
                BlockdevDriverOptions::HostDevice(file) => boxed(file::open_device(&cx.options, file).await?),
                BlockdevDriverOptions::NullAio(null) => boxed(null::open("null-aio", null)?),
                BlockdevDriverOptions::NullCo(null) => boxed(null::open("null-co", null)?),
                BlockdevDriverOptions::Raw(raw) => boxed(raw::open(cx, raw).await?),
            })
        })
    }
}

fn boxed(driver: impl block::Driver) -> Box<dyn DynDriver> {
    Box::new(driver)
}
