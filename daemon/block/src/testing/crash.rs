//! A medium that remembers its writes and flushes, for tests of what a power failure leaves.

use crate::driver::{Driver, Facts, Mapping, Prealloc, Span, Support, WriteFlags};
use crate::{DynDriver, IoResult};
use buf::IoBuf;
use nix::errno::Errno;
use qapi::{Error, Result};
use std::sync::{Arc, Mutex, PoisonError};

/// Something that happened to a [`CrashDriver`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// A write was issued.
    Write {
        /// First byte.
        at: usize,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// The write that was issued as this step has completed.
    Written(usize),
    /// A flush was issued.
    Flush,
    /// The flush that was issued as this step has completed.
    Flushed(usize),
    /// Something that the test wants to find again.
    Mark(u64),
}

/// Everything that reached a [`CrashDriver`], in order.
#[derive(Debug, Default)]
pub struct History {
    first: Vec<u8>,
    now: Mutex<Vec<u8>>,
    steps: Mutex<Vec<Step>>,
}

impl History {
    /// The steps so far.
    pub fn steps(&self) -> Vec<Step> {
        self.steps.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn push(&self, step: Step) -> usize {
        let mut steps = self.steps.lock().unwrap_or_else(PoisonError::into_inner);
        steps.push(step);
        steps.len() - 1
    }

    /// Notes something; returns its place among the steps.
    pub fn mark(&self, what: u64) -> usize {
        self.push(Step::Mark(what))
    }

    /// What may be on the medium if the power fails before step `crash`: all that was flushed, and of what was not each
    /// 512 bytes or not, as `survives` decides.
    pub fn image_at(&self, crash: usize, mut survives: impl FnMut() -> bool) -> Vec<u8> {
        let steps = self.steps();
        let steps = steps.get(..crash).unwrap_or(&steps);
        let flushed = steps.iter().filter_map(|step| if let Step::Flushed(of) = step { Some(*of) } else { None }).max();
        let written: std::collections::HashMap<usize, usize> = steps
            .iter()
            .enumerate()
            .filter_map(|(i, step)| if let Step::Written(of) = step { Some((*of, i)) } else { None })
            .collect();
        let mut image = self.first.clone();
        for (i, step) in steps.iter().enumerate() {
            let Step::Write { at, bytes } = step else { continue };
            let durable = written.get(&i).is_some_and(|end| flushed.is_some_and(|flush| *end < flush));
            let mut pos = *at;
            while pos < at + bytes.len() {
                let next = (pos / 512 * 512 + 512).min(at + bytes.len());
                if durable || survives() {
                    if image.len() < next {
                        image.resize(next, 0);
                    }
                    let part = bytes.get(pos - at..next - at).unwrap_or_default();
                    image.get_mut(pos..next).unwrap_or_default().copy_from_slice(part);
                }
                pos = next;
            }
        }
        image
    }
}

impl History {
    /// What the host has if the process dies before step `crash`: every write that had completed, and of those in flight the ones
    /// that `lands` chooses.
    pub fn image_if_killed(&self, crash: usize, mut lands: impl FnMut() -> bool) -> Vec<u8> {
        let steps = self.steps();
        let steps = steps.get(..crash).unwrap_or(&steps);
        let written: std::collections::HashSet<usize> =
            steps.iter().filter_map(|step| if let Step::Written(of) = step { Some(*of) } else { None }).collect();
        let mut image = self.first.clone();
        for (i, step) in steps.iter().enumerate() {
            let Step::Write { at, bytes } = step else { continue };
            if written.contains(&i) || lands() {
                let end = at + bytes.len();
                if image.len() < end {
                    image.resize(end, 0);
                }
                image.get_mut(*at..end).unwrap_or_default().copy_from_slice(bytes);
            }
        }
        image
    }
}

/// A driver in memory that remembers in which order it was written and flushed, so that a test can tell what a crash would
/// have left.
#[derive(Debug)]
pub struct CrashDriver {
    history: Arc<History>,
}

impl CrashDriver {
    /// A driver with this content, all of it durable.
    pub fn open(content: Vec<u8>) -> (Box<dyn DynDriver>, Arc<History>) {
        let history = Arc::new(History { first: content.clone(), now: content.into(), ..History::default() });
        (Box::new(Self { history: Arc::clone(&history) }), history)
    }

    fn now(&self) -> std::sync::MutexGuard<'_, Vec<u8>> {
        self.history.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Driver for CrashDriver {
    fn name(&self) -> &'static str {
        "crash"
    }

    fn facts(&self) -> Facts {
        Facts { discard: Support::Native, ..Facts::default() }
    }

    async fn length(&self) -> IoResult<u64> {
        u64::try_from(self.now().len()).map_err(|_| Errno::EFBIG)
    }

    async fn read(&self, at: u64, buf: &IoBuf) -> IoResult {
        tokio::task::yield_now().await;
        let at = usize::try_from(at).map_err(|_| Errno::EFBIG)?;
        let now = self.now();
        buf.fill(0);
        let end = at.saturating_add(buf.len()).min(now.len());
        buf.write_at(0, now.get(at..end).unwrap_or_default());
        Ok(())
    }

    async fn write(&self, at: u64, buf: &IoBuf, _flags: WriteFlags) -> IoResult {
        let at = usize::try_from(at).map_err(|_| Errno::EFBIG)?;
        let bytes = buf.to_vec();
        let step = self.history.push(Step::Write { at, bytes: bytes.clone() });
        tokio::task::yield_now().await;
        {
            let mut now = self.now();
            let end = at + bytes.len();
            if now.len() < end {
                now.resize(end, 0);
            }
            now.get_mut(at..end).unwrap_or_default().copy_from_slice(&bytes);
        }
        self.history.push(Step::Written(step));
        Ok(())
    }

    /// Zeroes what is there: a write like others to those who look for what a crash leaves.
    async fn discard(&self, span: Span) -> IoResult {
        let len = usize::try_from(span.len).map_err(|_| Errno::EFBIG)?;
        Driver::write(self, span.at, &IoBuf::zeroed(len), WriteFlags::NONE).await
    }

    async fn flush(&self) -> IoResult {
        let step = self.history.push(Step::Flush);
        tokio::task::yield_now().await;
        self.history.push(Step::Flushed(step));
        Ok(())
    }

    async fn map(&self, span: Span, _precise: bool) -> IoResult<Mapping> {
        Ok(Mapping::data(span.len, span.at))
    }

    async fn truncate(&self, size: u64, _exact: bool, _prealloc: Prealloc) -> Result<()> {
        let size = usize::try_from(size).map_err(|_| Error::generic("too large for memory"))?;
        self.now().resize(size, 0);
        Ok(())
    }
}
