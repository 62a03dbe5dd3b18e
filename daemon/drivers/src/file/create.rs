//! Makes a regular file (`blockdev-create` of driver `file`).

use super::FileDriver;
use super::open::open_path;
use block::driver::{DynDriver, Prealloc};
use block::perm::Bits;
use block::{NodeOptions, Perms};
use io::{Engine, FdSets, File};
use qapi::types::block::BlockdevOptionsFile;
use qapi::types::create::{BlockdevCreateOptionsFile, PreallocMode};
use qapi::{Error, Result};
use std::path::Path;

/// The extent size hint where none is given, in bytes; the reference's.
const EXTENT_SIZE: u64 = 1 << 20;

/// Makes the file, or empties the one that is there, and gives it its length.
///
/// # Errors
/// It cannot be made, is in use elsewhere, or there is no space; what was there before is lost then all the same.
pub async fn create(fdsets: &FdSets, options: &BlockdevCreateOptionsFile) -> Result<()> {
    let filename = options.filename.as_str();
    let prealloc = match options.preallocation {
        None | Some(PreallocMode::Off) => Prealloc::Off,
        Some(PreallocMode::Falloc) => Prealloc::Falloc,
        Some(PreallocMode::Full) => Prealloc::Full,
        Some(PreallocMode::Metadata) => return Err(Error::generic("Unsupported preallocation mode: metadata")),
    };
    let hint = options.extent_size_hint.map_or(EXTENT_SIZE, |hint| hint.0);
    let hint = u32::try_from(hint).map_err(|_| Error::generic("Extent size hint is too large"))?;
    let file = File::create(Path::new(filename), fdsets, Engine::Threads)
        .await
        .map_err(|error| Error::io(format!("Could not create '{filename}'"), error))?;
    let plain = BlockdevOptionsFile {
        filename: filename.to_owned(),
        pr_manager: None,
        locking: None,
        aio: None,
        aio_max_batch: None,
        drop_cache: true,
        x_check_cache_dropped: false,
    };
    let driver = open_path("file", &NodeOptions::default(), None, fdsets, &plain).await?;
    let made = fill(&driver, &file, options, hint, prealloc).await;
    DynDriver::close(&driver).await;
    file.close().await;
    made
}

async fn fill(
    driver: &FileDriver,
    file: &File,
    options: &BlockdevCreateOptionsFile,
    hint: u32,
    prealloc: Prealloc,
) -> Result<()> {
    let perms = Perms { need: Bits::WRITE | Bits::RESIZE, shared: !Bits::RESIZE };
    driver.prepare(perms).await?;
    driver.commit();
    driver.set_length(0, true, Prealloc::Off).await?;
    // Both are wishes, which few file systems know.
    if options.nocow == Some(true) {
        let _ = file.set_nocow().await;
    }
    if hint > 0 {
        let _ = file.set_extent_size_hint(hint).await;
    }
    driver.set_length(options.size.0, true, prealloc).await
}
