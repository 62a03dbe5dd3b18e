//! Options that change while the file is open: `read-only`, `auto-read-only`, `force-share`, `cache.direct`, and what is done about
//! the page cache of another host.
//!
//! They take the way of permissions: the file is opened again and locked when the permissions that come with them are
//! prepared, and replaced when they are committed.

use super::{FileDriver, Settings, open};
use block::Errno;
use block::driver::LocalFuture;
use block::reopen::{NewOptions, Prepared, Reopen};
use io::{Access, File, OpenHow};
use qapi::types::block::BlockdevDriverOptions;
use qapi::{Error, Result};
use std::sync::Arc;

/// Settings that wait for the permissions that come with them.
struct Waiting<'a>(&'a FileDriver);

impl Reopen for FileDriver {
    fn mutable(&self) -> &'static [&'static str] {
        &["drop-cache", "x-check-cache-dropped"]
    }

    fn prepare<'a>(&'a self, new: &'a NewOptions<'_>) -> LocalFuture<'a, Result<Box<dyn Prepared + 'a>>> {
        Box::pin(async move {
            if self.native && !new.after.direct {
                return Err(open::native_needs_direct());
            }
            let (BlockdevDriverOptions::File(options) | BlockdevDriverOptions::HostDevice(options)) = new.driver else {
                return Err(Error::generic("These are not the options of a file"));
            };
            self.locks().reopening = Some(Settings::new(new.after, options, self.settings().align));
            let waiting: Box<dyn Prepared + 'a> = Box::new(Waiting(self));
            Ok(waiting)
        })
    }
}

impl Prepared for Waiting<'_> {
    /// The commit of the permissions has put the settings in force.
    fn commit(self: Box<Self>) {}
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.locks().reopening = None;
    }
}

impl FileDriver {
    /// The same file opened again, for other access.
    pub(super) async fn open_again(&self, file: &File, access: Access, direct: bool) -> Result<Arc<File>> {
        let how = OpenHow { access, direct, engine: self.engine };
        if let Some((fdsets, _)) = &self.passed {
            // The set may have a descriptor for this access; to open anything new may be forbidden.
            if let Ok(Some((mut again, _))) = open::passed(fdsets, &self.filename, how) {
                again.set_max_batch(file.max_batch());
                return Ok(Arc::new(again));
            }
        }
        match file.reopen(how).await {
            Ok(again) => Ok(Arc::new(again)),
            Err(e) if direct && !file.is_direct() && e.raw_os_error() == Some(Errno::EINVAL as i32) => {
                Err(open::no_direct_io(&self.filename))
            }
            Err(e) => Err(Error::io(format!("Could not open '{}'", self.filename), e)),
        }
    }
}
