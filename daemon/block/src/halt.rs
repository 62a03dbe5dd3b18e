//! [`Halt`]: requests of a disk that wait after an error instead of failing, until somebody has seen to it.
//!
//! The error policy of a user of the graph. A request that waits is outside the gate of its disk, so that drains do not wait for
//! it, and is tried again from the beginning when it goes on. Flushes never wait: what a medium could not make
//! durable once it may forget, and a second flush that succeeds would say nothing about it.

use crate::report::{Report, Reporter};
use crate::stats::Op;
use nix::errno::Errno;
use qapi::types::block::{BlockErrorAction, BlockIoError, IoOperationType};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::watch;

/// What becomes of a request that fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnError {
    /// The user gets the error.
    Report,
    /// It waits.
    Stop,
    /// It waits if there is no space left; the user gets other errors.
    Enospc,
}

/// Where requests stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// So often they were told to go on.
    Round(u64),
    /// The disk is to be taken back: nobody waits any more.
    Ended,
}

/// The policy of a disk and the requests that wait for it.
#[derive(Debug)]
pub(crate) struct Halt {
    /// The name of the user in events, and what it wants. Without one errors are the user's own affair, and no event is sent.
    policy: OnceLock<(String, OnError)>,
    stage: watch::Sender<Stage>,
    waiting: AtomicUsize,
}

/// Counts a request as waiting for as long as it lives.
struct Waiting<'a>(&'a Halt);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Default for Halt {
    fn default() -> Self {
        Self { policy: OnceLock::new(), stage: watch::Sender::new(Stage::Round(0)), waiting: AtomicUsize::new(0) }
    }
}

impl Halt {
    /// Sets the policy; the first one holds.
    pub fn set(&self, name: String, policy: OnError) {
        // A second one would be a mistake of the caller's, and harmless.
        let _ = self.policy.set((name, policy));
    }

    /// Requests that wait now.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Acquire)
    }

    /// Lets those that wait try again.
    pub fn resume(&self) {
        self.stage.send_if_modified(|stage| match stage {
            Stage::Round(round) => {
                *round += 1;
                true
            }
            Stage::Ended => false,
        });
    }

    /// Has those that wait fail, and lets nobody wait from now on.
    pub fn end(&self) {
        self.stage.send_replace(Stage::Ended);
    }

    /// After an error: whether to try again. Waits if the policy says so, and tells about it.
    pub async fn try_again(&self, op: Op, errno: Errno, node: &str, reporter: &Reporter) -> bool {
        let Some((name, policy)) = self.policy.get() else { return false };
        // Said of requests that are not possible, and no failure.
        if errno == Errno::ENOTSUP {
            return false;
        }
        let full = errno == Errno::ENOSPC;
        let mut stage = self.stage.subscribe();
        let before = *stage.borrow_and_update();
        let waits = op != Op::Flush
            && before != Stage::Ended
            && match policy {
                OnError::Report => false,
                OnError::Stop => true,
                OnError::Enospc => full,
            };
        let waiting = waits.then(|| {
            self.waiting.fetch_add(1, Ordering::AcqRel);
            Waiting(self)
        });
        reporter.report(Report::IoError(BlockIoError {
            qom_path: String::new(),
            device: name.clone(),
            node_name: Some(node.to_owned()),
            operation: if op == Op::Read { IoOperationType::Read } else { IoOperationType::Write },
            action: if waits { BlockErrorAction::Stop } else { BlockErrorAction::Report },
            nospace: Some(full),
            reason: errno.desc().to_owned(),
        }));
        if waiting.is_none() {
            return false;
        }
        // An error says that the disk is gone, and this request with it.
        let now = stage.wait_for(|now| *now != before).await.map(|now| *now);
        matches!(now, Ok(Stage::Round(_)))
    }
}
