//! `preallocate`: reserves space at the end of another node ahead of the writes that make it grow, many of them at once.
//!
//! While its users may write and resize, the node below belongs to this one: it ends behind what the users see, and the
//! rest is zeroes. When they may not any more, and at the end, it is cut back. After a crash the space stays, as it does with the
//! reference: it reads as zeroes.

use crate::filter::{self, len_of};
use arc_swap::ArcSwap;
use block::driver::{LocalFuture, Prealloc};
use block::perm::Bits;
use block::reopen::{NewOptions, Prepared, Reopen};
use block::reservation::Reservations;
use block::{Driver, Edge, Facts, IoResult, Mapping, OpenContext, Perms, Role, Span, WriteFlags, ZeroFlags};
use buf::IoBuf;
use qapi::types::block::BlockdevDriverOptions;
use qapi::types::block_filters::BlockdevOptionsPreallocate;
use qapi::{Error, Result};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Unit of `prealloc-align`, in bytes.
const SECTOR: i64 = 512;
/// `prealloc-align` where the user gives none, in bytes.
const DEFAULT_ALIGN: i64 = 1 << 20;
/// `prealloc-size` where the user gives none, in bytes.
const DEFAULT_SIZE: i64 = 128 << 20;

/// How far the node below has been used, in bytes.
#[derive(Clone, Copy, Debug)]
struct Ends {
    /// What the users see.
    data: u64,
    /// From here to `file` nothing has been written but zeroes.
    zero: u64,
    /// The node below.
    file: u64,
}

#[derive(Debug, Default)]
struct State {
    /// The users may write and resize.
    owner: bool,
    /// What `owner` is about to be.
    next_owner: bool,
    /// None until the first change, and while not the owner.
    ends: Option<Ends>,
}

/// A node that reserves space below.
#[derive(Debug)]
pub struct Preallocate {
    file: Arc<Edge>,
    /// Replaced by the control task, while nothing is in flight.
    settings: ArcSwap<Settings>,
    /// Guards what is known; never across an await.
    state: Mutex<State>,
    /// Whoever makes the node below longer or shorter.
    growing: tokio::sync::Mutex<()>,
}

/// What the options ask for.
#[derive(Clone, Copy, Debug)]
struct Settings {
    given_align: Option<i64>,
    given_size: Option<i64>,
    /// The node below ends at a multiple of this, in bytes.
    align: u64,
    /// What is reserved behind a write that makes it longer, in bytes.
    size: u64,
}

impl Settings {
    fn new(options: &BlockdevOptionsPreallocate) -> Result<Self> {
        let number = |name: &str, value: i64| {
            let range = |_| Error::generic(format!("Value '{value}' is out of range for parameter '{name}'"));
            u64::try_from(value).map_err(range)
        };
        let (given_align, given_size) = (options.prealloc_align, options.prealloc_size);
        let align = given_align.unwrap_or(DEFAULT_ALIGN);
        let size = number("prealloc-size", given_size.unwrap_or(DEFAULT_SIZE))?;
        let aligned = align % SECTOR == 0;
        let align = number("prealloc-align", align)?.max(1);
        if !aligned {
            return Err(Error::generic(format!(
                "prealloc-align parameter of preallocate filter is not aligned to {SECTOR}"
            )));
        }
        Ok(Self { given_align, given_size, align, size })
    }
}

/// Opens the child.
///
/// # Errors
/// A size or an alignment out of range; those of the child.
pub async fn open(cx: &mut OpenContext<'_>, options: &BlockdevOptionsPreallocate) -> Result<Preallocate> {
    let settings = ArcSwap::from_pointee(Settings::new(options)?);
    let file = cx.child("file", Role::Filtered, &options.file).await?;
    Ok(Preallocate { file, settings, state: Mutex::default(), growing: tokio::sync::Mutex::default() })
}

/// Settings that wait to be put in force.
struct Waiting<'a> {
    node: &'a Preallocate,
    settings: Settings,
}

impl Reopen for Preallocate {
    fn mutable(&self) -> &'static [&'static str] {
        &["prealloc-align", "prealloc-size"]
    }

    fn prepare<'a>(&'a self, new: &'a NewOptions<'_>) -> LocalFuture<'a, Result<Box<dyn Prepared + 'a>>> {
        Box::pin(async move {
            let BlockdevDriverOptions::Preallocate(options) = new.driver else {
                return Err(Error::generic("These are not the options of a preallocate node"));
            };
            let waiting: Box<dyn Prepared + 'a> = Box::new(Waiting { node: self, settings: Settings::new(options)? });
            Ok(waiting)
        })
    }
}

impl Prepared for Waiting<'_> {
    /// Another node may be below from now on: what is reserved goes with the one that it was reserved in.
    fn drained(&mut self) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.node.cut_back())
    }

    fn commit(self: Box<Self>) {
        self.node.settings.store(Arc::new(self.settings));
    }
}

/// Whether users with these permissions make the node below this one's own.
fn owns(users: Perms) -> bool {
    users.need.contains(Bits::WRITE | Bits::RESIZE)
}

impl Preallocate {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of a change of `span` that is about to come; true if more space is wanted below for it.
    fn note(&self, span: Span, data: bool) -> bool {
        let mut state = self.state();
        if !state.owner {
            return false;
        }
        let now = self.file.size();
        let ends = state.ends.get_or_insert(Ends { data: now, zero: now, file: now });
        let wants = span.end() > ends.file;
        ends.data = ends.data.max(span.end());
        if data {
            ends.zero = ends.zero.max(span.end());
        }
        wants
    }

    /// Makes the node below longer than `end`, with zeroes, if it can do that fast.
    async fn grow(&self, end: u64) {
        let _alone = self.growing.lock().await;
        let Some(Ends { file, .. }) = self.state().ends else { return };
        // Somebody else may have come first.
        if end <= file {
            return;
        }
        let settings = **self.settings.load();
        let wanted = end.saturating_add(settings.size).checked_next_multiple_of(settings.align);
        let Some(wanted) = wanted.filter(|wanted| *wanted <= block::node::MAX_LENGTH) else { return };
        let unit = u64::from(self.file.facts().request_align);
        let (from, to) = (file - file % unit, wanted.next_multiple_of(unit));
        let flags = ZeroFlags { no_fallback: true, ..ZeroFlags::default() };
        // Not from inside the last unit, whose beginning may be data: its end reads as zero already.
        let from = if from < file { from + unit } else { from };
        let done = self.file.zero(Span::new(from, to - from), flags).await.is_ok();
        let file = if done { to } else { self.file.size() };
        if let Some(ends) = &mut self.state().ends {
            ends.file = ends.file.max(file);
            if !done {
                // What lies there is nobody's promise.
                ends.zero = ends.zero.max(file);
            }
        }
    }

    /// A change of `span` is about to come: makes room.
    async fn prepare_change(&self, span: Span, data: bool) {
        if self.note(span, data) {
            self.grow(span.end()).await;
        }
    }

    /// The node below ends where the users see its end.
    async fn cut_back(&self) -> Result<()> {
        let _alone = self.growing.lock().await;
        let Some(ends) = self.state().ends else { return Ok(()) };
        if self.file.size() > ends.data {
            self.file.truncate(ends.data, true, Prealloc::Off).await?;
        }
        self.state().ends = None;
        Ok(())
    }
}

impl Driver for Preallocate {
    fn name(&self) -> &'static str {
        "preallocate"
    }

    fn facts(&self) -> Facts {
        filter::facts(&self.file)
    }

    fn filename(&self) -> String {
        let settings = **self.settings.load();
        let given = [("prealloc-align", settings.given_align), ("prealloc-size", settings.given_size)];
        let given: Vec<_> = given.into_iter().filter_map(|(name, value)| Some((name, value?.into()))).collect();
        filter::describe("preallocate", &given, &[("file", &self.file)])
    }

    async fn length(&self) -> IoResult<u64> {
        Ok(self.state().ends.map_or_else(|| self.file.size(), |ends| ends.data))
    }

    async fn allocated_size(&self) -> Option<u64> {
        self.file.node().driver().allocated_size().await
    }

    async fn read(&self, at: u64, buf: &IoBuf) -> IoResult {
        self.file.read(at, buf).await
    }

    async fn write(&self, at: u64, buf: &IoBuf, flags: WriteFlags) -> IoResult {
        self.prepare_change(Span::new(at, len_of(buf)), true).await;
        self.file.write(at, buf, flags).await
    }

    async fn flush(&self) -> IoResult {
        self.file.flush().await
    }

    async fn zero(&self, span: Span, flags: ZeroFlags) -> IoResult {
        self.prepare_change(span, false).await;
        let reserved = self.state().ends.is_some_and(|ends| ends.zero <= span.at && span.end() <= ends.file);
        // The space there is zeroes already.
        if reserved && !flags.fua && !flags.may_unmap { Ok(()) } else { self.file.zero(span, flags).await }
    }

    async fn discard(&self, span: Span) -> IoResult {
        self.file.discard(span).await
    }

    async fn map(&self, span: Span, _precise: bool) -> IoResult<Mapping> {
        Ok(Mapping::forward(span.len, Arc::clone(&self.file), span.at))
    }

    async fn truncate(&self, size: u64, exact: bool, prealloc: Prealloc) -> Result<()> {
        let ends = self.state().ends;
        if let Some(ends) = ends
            && prealloc == Prealloc::Off
            && (ends.data..=ends.file).contains(&size)
        {
            if let Some(ends) = &mut self.state().ends {
                ends.data = ends.data.max(size);
            }
            return Ok(());
        }
        self.cut_back().await?;
        self.file.truncate(size, exact, prealloc).await
    }

    fn reopen(&self) -> Option<&dyn Reopen> {
        Some(self)
    }

    fn reservations(&self) -> Option<&dyn Reservations> {
        Some(&*self.file)
    }

    /// Nobody else may change the node below while its end is this one's.
    fn child_perms(&self, _child: &Edge, of_node: Perms) -> Perms {
        if owns(of_node) {
            Perms { shared: of_node.shared & !(Bits::WRITE | Bits::RESIZE), ..of_node }
        } else {
            of_node
        }
    }

    async fn prepare_perms(&self, new: Perms) -> Result<()> {
        let next = owns(new);
        if !next {
            // Still with the permission to do it.
            self.cut_back().await?;
        }
        self.state().next_owner = next;
        Ok(())
    }

    fn commit_perms(&self) {
        let mut state = self.state();
        state.owner = state.next_owner;
    }

    fn abort_perms(&self) {
        let mut state = self.state();
        state.next_owner = state.owner;
    }

    async fn close(&self) {
        // A failure cannot be told to anybody: the space stays, as after a crash.
        let _ = self.cut_back().await;
    }
}
