//! [`Reporter`]: how drivers, exports and jobs tell the daemon of things that its clients are told as events.
//!
//! Any thread may report, on the path of a request: a report never waits for anybody. What waits to be told is bounded by
//! the number of different things that it is about: a report takes the place of an older one that says the same of the same
//! node and has not been fetched yet. The control task fetches with [`Reporter::next`]; the limits on how often a kind of
//! event is sent come after that.

use qapi::types::block::BlockIoError;
use qapi::types::block_event::{BlockImageCorrupted, BlockWriteThreshold, QuorumFailure, QuorumReportBad};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};
use std::time::SystemTime;

/// Reports that wait at most. More than there are broken nodes in any daemon; ends what would be without end.
pub const MAX_WAITING: usize = 4096;

/// Something that happened, as the event that it becomes.
#[derive(Clone, Debug, PartialEq)]
pub enum Report {
    /// An image is damaged.
    ImageCorrupted(BlockImageCorrupted),
    /// A request failed.
    IoError(BlockIoError),
    /// A quorum found no majority.
    QuorumFailure(QuorumFailure),
    /// A child of a quorum failed, or differs from the majority.
    QuorumReportBad(QuorumReportBad),
    /// A write went beyond the threshold of its node.
    WriteThreshold(BlockWriteThreshold),
}

impl Report {
    /// Whether `newer` says the same thing of the same node again, so that it can stand for both. A fatal corruption is
    /// never replaced, and nothing hides that a request stopped its client.
    fn repeats(&self, newer: &Report) -> bool {
        match (self, newer) {
            (Report::ImageCorrupted(old), Report::ImageCorrupted(new)) => {
                old.node_name == new.node_name && old.fatal == new.fatal
            }
            (Report::IoError(old), Report::IoError(new)) => {
                (&old.qom_path, &old.device, &old.node_name, old.operation, old.action)
                    == (&new.qom_path, &new.device, &new.node_name, new.operation, new.action)
            }
            (Report::QuorumFailure(old), Report::QuorumFailure(new)) => old.reference == new.reference,
            (Report::QuorumReportBad(old), Report::QuorumReportBad(new)) => {
                (&old.node_name, old.kind) == (&new.node_name, new.kind)
            }
            (Report::WriteThreshold(old), Report::WriteThreshold(new)) => old.node_name == new.node_name,
            _ => false,
        }
    }
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<(SystemTime, Report)>,
    /// Reports that found no room.
    lost: u64,
    /// Who waits in [`Reporter::next`].
    fetcher: Option<Waker>,
}

/// The way from where things happen to the control task; clones share it.
#[derive(Clone, Debug, Default)]
pub struct Reporter {
    /// Guards the queue. Held for a few instructions, never across an await.
    state: Arc<Mutex<State>>,
}

impl Reporter {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Leaves a report. From any thread; returns at once.
    pub fn report(&self, report: Report) {
        let mut state = self.lock();
        let now = SystemTime::now();
        let full = state.waiting.len() == MAX_WAITING;
        match state.waiting.iter_mut().find(|(_, old)| old.repeats(&report)) {
            // It keeps its place: what came first is told first.
            Some(slot) => *slot = (now, report),
            None if full => state.lost += 1,
            None => state.waiting.push_back((now, report)),
        }
        let fetcher = state.fetcher.take();
        drop(state);
        if let Some(fetcher) = fetcher {
            fetcher.wake();
        }
    }

    /// Takes the oldest report that waits, and when it was made, if there is one.
    pub fn try_next(&self) -> Option<(SystemTime, Report)> {
        self.lock().waiting.pop_front()
    }

    /// Waits for the next report. For one caller: the newest one is woken.
    pub async fn next(&self) -> (SystemTime, Report) {
        poll_fn(|cx| {
            let mut state = self.lock();
            match state.waiting.pop_front() {
                Some(report) => Poll::Ready(report),
                None => {
                    state.fetcher = Some(cx.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await
    }

    /// How many reports found no room since the start.
    pub fn lost(&self) -> u64 {
        self.lock().lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn corrupted(node: &str, msg: &str, fatal: bool) -> Report {
        Report::ImageCorrupted(BlockImageCorrupted {
            device: String::new(),
            node_name: Some(node.to_owned()),
            msg: msg.to_owned(),
            offset: None,
            size: None,
            fatal,
        })
    }

    fn drain(reporter: &Reporter) -> Vec<Report> {
        std::iter::from_fn(|| reporter.try_next().map(|(_, report)| report)).collect()
    }

    #[test]
    fn what_repeats_takes_the_place_of_what_waits() {
        let reporter = Reporter::default();
        for n in 0..10_000 {
            reporter.report(corrupted("a", &format!("{n}"), false));
        }
        reporter.report(corrupted("b", "b", false));
        reporter.report(corrupted("a", "fatal", true));
        reporter.report(corrupted("a", "last", false));
        let told = drain(&reporter);
        assert_eq!(told, [corrupted("a", "last", false), corrupted("b", "b", false), corrupted("a", "fatal", true)]);
        reporter.report(corrupted("a", "again", false));
        assert_eq!(drain(&reporter), [corrupted("a", "again", false)], "what has been fetched holds nothing back");
        assert_eq!(reporter.lost(), 0);
    }

    #[test]
    fn what_waits_is_bounded() {
        let reporter = Reporter::default();
        for n in 0..MAX_WAITING + 7 {
            reporter.report(corrupted(&format!("n{n}"), "", false));
        }
        assert_eq!(reporter.lost(), 7);
        assert_eq!(drain(&reporter).len(), MAX_WAITING);
    }

    #[tokio::test]
    async fn another_thread_wakes_the_fetcher() {
        let reporter = Reporter::default();
        let other = reporter.clone();
        let thread = std::thread::spawn(move || {
            for n in 0..100 {
                other.report(corrupted(&format!("n{n}"), "", false));
            }
        });
        for n in 0..100 {
            assert_eq!(reporter.next().await.1, corrupted(&format!("n{n}"), "", false));
        }
        assert!(thread.join().is_ok());
    }
}
