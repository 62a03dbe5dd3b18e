//! Work that keeps a processor busy for long, such as unpacking a cluster: it goes to other threads, so that the event loop
//! serves other requests meanwhile and all processors take part.

use block::{Errno, IoResult};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::oneshot;

/// Runs some work on another thread, or drops it where there is none to be had.
type Start = dyn Fn(Box<dyn FnOnce() + Send>) + Send + Sync;

/// Where such work goes; clones are the same place. By default it is done at once, on the thread that asks for it.
#[derive(Clone, Default)]
pub struct Workers(Option<Arc<Start>>);

impl std::fmt::Debug for Workers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Workers").field(&self.0.is_some()).finish()
    }
}

impl Workers {
    /// Work goes to `start`, which runs it later on some thread, or drops it.
    pub fn new(start: impl Fn(Box<dyn FnOnce() + Send>) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(start)))
    }

    /// The result of `work`, which runs to its end even if the future is dropped.
    ///
    /// # Errors
    /// `EIO` if the work did not end as it should have.
    pub async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> IoResult<T> + Send + 'static) -> IoResult<T> {
        let Some(start) = &self.0 else { return work() };
        let (done, result) = oneshot::channel();
        let work = Arc::new(Mutex::new(Some(work)));
        let job = Arc::clone(&work);
        start(Box::new(move || {
            // Nobody waiting any more is fine.
            if let Some(work) = take(&job) {
                let _ = done.send(work());
            }
        }));
        match result.await {
            Ok(result) => result,
            Err(_) => take(&work).map_or(Err(Errno::EIO), |work| work()),
        }
    }
}

fn take<W>(work: &Mutex<Option<W>>) -> Option<W> {
    work.lock().unwrap_or_else(PoisonError::into_inner).take()
}
