//! A driver in memory, for the tests of this crate and of those above it.
//!
//! It keeps to the contract it is given: a request outside its facts panics, so that a test sees the core break its promise.

mod crash;

pub use crash::{CrashDriver, History, Step};

use crate::clock::Clock;
use crate::driver::{Driver, Facts, LocalFuture, Mapping, Prealloc, Span, Support, WriteFlags, ZeroFlags};
use crate::graph::{CreateContext, Graph, OpenContext, Opener};
use crate::{DynDriver, IoResult};
use buf::IoBuf;
use nix::errno::Errno;
use qapi::types::block::BlockdevOptions;
use qapi::types::create::BlockdevCreateOptions;
use qapi::{Error, Result};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};

/// What the tests see of a [`MemoryDriver`].
#[derive(Debug, Default)]
pub struct Memory {
    /// The bytes as written.
    pub bytes: Mutex<Vec<u8>>,
    /// Flushes that reached the driver.
    pub flushes: AtomicU64,
    /// Requests that reached the driver, flushes aside.
    pub requests: AtomicU64,
    /// Writes fail when a half of the bytes is there.
    pub fails: AtomicBool,
}

impl Memory {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A driver whose medium is a vector.
#[derive(Debug)]
pub struct MemoryDriver {
    memory: Arc<Memory>,
    facts: Facts,
}

impl MemoryDriver {
    /// A driver of `size` zero bytes with these facts, and what a test can look at.
    pub fn open(size: usize, facts: Facts) -> (Box<dyn DynDriver>, Arc<Memory>) {
        let memory = Arc::new(Memory { bytes: Mutex::new(vec![0; size]), ..Memory::default() });
        (Box::new(Self { memory: Arc::clone(&memory), facts }), memory)
    }

    fn range(&self, span: Span, align: u32) -> std::ops::Range<usize> {
        let align = u64::from(align.max(self.facts.request_align));
        assert!(span.at.is_multiple_of(align) && span.len.is_multiple_of(align), "{span:?} is not aligned to {align}");
        self.memory.requests.fetch_add(1, Ordering::Relaxed);
        let at = usize::try_from(span.at).unwrap_or(usize::MAX);
        at..at + usize::try_from(span.len).unwrap_or(usize::MAX)
    }

    fn transfer(&self, at: u64, buf: &IoBuf) -> std::ops::Range<usize> {
        assert!(buf.len() <= usize::try_from(self.facts.max_transfer).unwrap_or(usize::MAX), "too long");
        assert!(
            buf.is_aligned(self.facts.mem_align as usize, self.facts.mem_align.min(self.facts.request_align) as usize),
            "memory is not aligned"
        );
        self.range(Span::new(at, u64::try_from(buf.len()).unwrap_or(u64::MAX)), 1)
    }
}

impl Driver for MemoryDriver {
    fn name(&self) -> &'static str {
        "memory"
    }

    fn facts(&self) -> Facts {
        self.facts.clone()
    }

    async fn length(&self) -> IoResult<u64> {
        u64::try_from(self.memory.lock().len()).map_err(|_| Errno::EFBIG)
    }

    async fn read(&self, at: u64, buf: &IoBuf) -> IoResult {
        let range = self.transfer(at, buf);
        let bytes = self.memory.lock();
        buf.fill(0);
        buf.write_at(0, bytes.get(range.start..range.end.min(bytes.len())).unwrap_or_default());
        Ok(())
    }

    async fn write(&self, at: u64, buf: &IoBuf, flags: WriteFlags) -> IoResult {
        assert!(!flags.fua || self.facts.fua != Support::None, "FUA to a driver that has none");
        let range = self.transfer(at, buf);
        // Others get their turn in the middle, as with a real medium.
        tokio::task::yield_now().await;
        let mut bytes = self.memory.lock();
        if bytes.len() < range.end {
            bytes.resize(range.end, 0);
        }
        if self.memory.fails.load(Ordering::Relaxed) {
            let half = range.start + range.len() / 2;
            bytes.truncate(half);
            buf.read_at(0, bytes.get_mut(range.start..half).unwrap_or_default());
            return Err(Errno::ENOSPC);
        }
        buf.read_at(0, bytes.get_mut(range).unwrap_or_default());
        Ok(())
    }

    async fn flush(&self) -> IoResult {
        self.memory.flushes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    async fn zero(&self, span: Span, _flags: ZeroFlags) -> IoResult {
        assert!(span.len <= self.facts.max_zero, "too long");
        let range = self.range(span, self.facts.zero_align);
        self.memory.lock().get_mut(range).unwrap_or_default().fill(0);
        Ok(())
    }

    /// Fills with 0xDD, so that a test notices who relies on discarded bytes.
    async fn discard(&self, span: Span) -> IoResult {
        assert!(span.len <= self.facts.max_discard, "too long");
        let range = self.range(span, self.facts.discard_align);
        self.memory.lock().get_mut(range).unwrap_or_default().fill(0xDD);
        Ok(())
    }

    async fn map(&self, span: Span, _precise: bool) -> IoResult<Mapping> {
        let range = self.range(span, 1);
        let bytes = self.memory.lock();
        let bytes = bytes.get(range).unwrap_or_default();
        let unit = usize::try_from(self.facts.request_align).unwrap_or(1);
        let is_zero = |unit: &[u8]| unit.iter().all(|b| *b == 0);
        let first = bytes.chunks(unit).next().is_some_and(is_zero);
        let run = bytes.chunks(unit).take_while(|unit| is_zero(unit) == first).map(<[u8]>::len).sum::<usize>();
        let len = u64::try_from(run).unwrap_or(span.len);
        Ok(if first { Mapping::hole(len, span.at) } else { Mapping::data(len, span.at) })
    }

    async fn truncate(&self, size: u64, _exact: bool, _prealloc: Prealloc) -> Result<()> {
        let size = usize::try_from(size).map_err(|_| Error::generic("too large for memory"))?;
        self.memory.lock().resize(size, 0);
        Ok(())
    }
}

/// A clock that stands still until a test moves it.
#[derive(Debug, Default)]
pub struct ManualClock {
    state: Mutex<ManualTime>,
}

#[derive(Debug, Default)]
struct ManualTime {
    now: u64,
    /// Who sleeps until when.
    sleepers: Vec<(u64, Waker)>,
}

impl ManualClock {
    fn lock(&self) -> std::sync::MutexGuard<'_, ManualTime> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A clock at zero, to hand to what is tested.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Moves the clock to `now` nanoseconds and wakes who slept until then. It never goes back.
    pub fn advance_to(&self, now: u64) {
        let due = {
            let mut time = self.lock();
            time.now = time.now.max(now);
            let now = time.now;
            let (due, later) = std::mem::take(&mut time.sleepers).into_iter().partition(|(at, _)| *at <= now);
            time.sleepers = later;
            let due: Vec<(u64, Waker)> = due;
            due
        };
        due.into_iter().for_each(|(_, waker)| waker.wake());
    }

    /// When the next sleeper is due, in nanoseconds.
    pub fn next(&self) -> Option<u64> {
        self.lock().sleepers.iter().map(|(at, _)| *at).min()
    }

    /// How many timers are set.
    pub fn timers(&self) -> usize {
        self.lock().sleepers.len()
    }
}

/// The clock as the tested code holds it.
#[derive(Clone, Debug)]
pub struct ManualHandle(pub Arc<ManualClock>);

impl Clock for ManualHandle {
    fn now(&self) -> u64 {
        self.0.lock().now
    }

    fn sleep_until(&self, at: u64) -> LocalFuture<'static, ()> {
        Box::pin(ManualSleep { clock: Arc::clone(&self.0), at, waker: None })
    }
}

/// Leaves the list of sleepers when dropped, as a timer does.
struct ManualSleep {
    clock: Arc<ManualClock>,
    at: u64,
    waker: Option<Waker>,
}

impl ManualSleep {
    fn leave(&mut self, time: &mut ManualTime) {
        if let Some(old) = self.waker.take()
            && let Some(i) = time.sleepers.iter().position(|(at, waker)| *at == self.at && waker.will_wake(&old))
        {
            time.sleepers.swap_remove(i);
        }
    }
}

impl Future for ManualSleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let clock = Arc::clone(&self.clock);
        let mut time = clock.lock();
        self.leave(&mut time);
        if time.now >= self.at {
            return Poll::Ready(());
        }
        time.sleepers.push((self.at, cx.waker().clone()));
        self.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for ManualSleep {
    fn drop(&mut self) {
        let clock = Arc::clone(&self.clock);
        self.leave(&mut clock.lock());
    }
}

/// A table without drivers: the graphs of tests adopt theirs.
#[derive(Debug)]
pub struct NoDrivers;

impl Opener for NoDrivers {
    fn open<'a>(
        &'a self,
        _cx: &'a mut OpenContext<'_>,
        _options: &'a BlockdevOptions,
    ) -> LocalFuture<'a, Result<Box<dyn DynDriver>>> {
        Box::pin(async { Err(Error::generic("there are no drivers in this test")) })
    }
    fn create<'a>(
        &'a self,
        _cx: &'a mut dyn CreateContext,
        _options: &'a BlockdevCreateOptions,
    ) -> LocalFuture<'a, Result<()>> {
        Box::pin(async { Err(Error::generic("there are no drivers in this test")) })
    }
}

/// An empty graph for [`Graph::adopt`].
pub fn graph() -> Graph {
    Graph::new(Arc::new(NoDrivers))
}
