//! A task that takes tables out of the memory that nobody has used for a while (`cache-clean-interval`).

use super::cache::Cache;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

#[derive(Debug)]
struct Interval {
    /// Seconds; 0 is never.
    seconds: AtomicU32,
    changed: Notify,
}

/// The task; it ends when this is dropped.
#[derive(Debug)]
pub(super) struct Cleaner {
    interval: Arc<Interval>,
    /// None where no event loop runs.
    task: Option<JoinHandle<()>>,
}

impl Cleaner {
    /// Cleans `caches` every `seconds` seconds.
    pub fn start(seconds: u32, caches: [&Arc<Cache>; 2]) -> Self {
        let interval = Arc::new(Interval { seconds: seconds.into(), changed: Notify::new() });
        let caches = caches.map(Arc::downgrade);
        let task = Handle::try_current().ok().map(|handle| handle.spawn(run(Arc::clone(&interval), caches)));
        Self { interval, task }
    }

    /// From now on every `seconds` seconds.
    pub fn set_interval(&self, seconds: u32) {
        if self.interval.seconds.swap(seconds, Ordering::Relaxed) != seconds {
            self.interval.changed.notify_one();
        }
    }
}

impl Drop for Cleaner {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

async fn run(interval: Arc<Interval>, caches: [Weak<Cache>; 2]) {
    loop {
        let changed = interval.changed.notified();
        match interval.seconds.load(Ordering::Relaxed) {
            0 => changed.await,
            seconds => {
                if tokio::time::timeout(Duration::from_secs(seconds.into()), changed).await.is_ok() {
                    continue;
                }
                for cache in &caches {
                    let Some(cache) = cache.upgrade() else { return };
                    cache.clean();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn tables_leave_after_the_interval() {
        let caches = [(); 2].map(|()| Arc::new(Cache::new(4096, 512, block::BlkdebugEvent::L2Load)));
        let fill = || {
            caches[0].put(512, vec![0; 512]);
            caches[0].dirty_copies().iter().for_each(|copy| caches[0].written(copy));
        };
        fill();
        let cleaner = Cleaner::start(0, [&caches[0], &caches[1]]);
        tokio::time::sleep(Duration::from_secs(5000)).await;
        assert!(caches[0].peek(512).is_some(), "0 is never");
        cleaner.set_interval(10);
        tokio::time::sleep(Duration::from_secs(19)).await;
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert!(caches[0].peek(512).is_none());
    }
}
