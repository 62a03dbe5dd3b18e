//! `blkdebug`: lets requests to a node fail by rule, and narrows what the node can do.
//!
//! | module | noun |
//! | --- | --- |
//! | [`rules`] | rules, the state, and which rules are in force after which event |
//! | `config` | the file with more rules |
//!
//! Events come from the core (writes, flushes) and from the driver above (`raw` and formats). A rule with the event `none` is in
//! force from the start.

mod config;
pub mod rules;

use crate::filter::{self, len_of};
use block::clock::Clock;
use block::driver::Prealloc;
use block::perm::Bits;
use block::reservation::Reservations;
use block::{
    BlkdebugEvent, Driver, Edge, Errno, Facts, IoResult, Mapping, OpenContext, Perms, Role, Span, WriteFlags, ZeroFlags,
};
use buf::IoBuf;
use qapi::types::block_filters::{BlkdebugIOType as IoType, BlockdevOptionsBlkdebug};
use qapi::types::block_query::BlockPermission;
use qapi::{Error, Qapi, Result};
use rules::Rules;
use std::sync::{Arc, Mutex, PoisonError};

/// The largest alignment that the core takes, in bytes.
const MAX_ALIGN: u32 = 1 << 20;

/// What the options say about limits; 0 leaves the child's.
#[derive(Debug, Default)]
struct Narrow {
    align: u32,
    max_transfer: u32,
    opt_write_zero: u32,
    max_write_zero: u32,
    opt_discard: u32,
    max_discard: u32,
}

/// A node that fails on demand.
#[derive(Debug)]
pub struct Blkdebug {
    image: Arc<Edge>,
    clock: Arc<dyn Clock>,
    options: BlockdevOptionsBlkdebug,
    narrow: Narrow,
    take: Bits,
    unshare: Bits,
    /// Guards the rules; never across an await.
    rules: Mutex<Rules>,
}

/// Opens the child and reads the rules.
///
/// # Errors
/// A rule or a limit that makes no sense, a file that cannot be read, those of the child.
pub async fn open(
    cx: &mut OpenContext<'_>,
    clock: Arc<dyn Clock>,
    fdsets: &io::FdSets,
    options: &BlockdevOptionsBlkdebug,
) -> Result<Blkdebug> {
    let mut rules = Rules::default();
    if let Some(path) = options.config.clone() {
        let failed = |error| Error::io("Could not read blkdebug config file", error);
        let fdsets = fdsets.clone();
        let read = io::blocking(move || config::load(path.as_ref(), &fdsets)).await;
        let text = read.and_then(|text| text).map_err(failed)?;
        config::read(&text, &mut rules)?;
    }
    for rule in options.inject_error.iter().flatten() {
        rules.add_error(rule)?;
    }
    for rule in options.set_state.iter().flatten() {
        rules.add_state(rule);
    }
    let image = cx.child("image", Role::Filtered, &options.image).await?;
    let narrow = narrow(options, &image.facts())?;
    rules.event(BlkdebugEvent::None);
    Ok(Blkdebug {
        image,
        clock,
        narrow,
        take: bits(options.take_child_perms.as_deref()),
        unshare: bits(options.unshare_child_perms.as_deref()),
        options: options.clone(),
        rules: Mutex::new(rules),
    })
}

fn bits(permissions: Option<&[BlockPermission]>) -> Bits {
    permissions.unwrap_or_default().iter().fold(Bits::NONE, |bits, permission| {
        bits | match permission {
            BlockPermission::ConsistentRead => Bits::CONSISTENT_READ,
            BlockPermission::Write => Bits::WRITE,
            BlockPermission::WriteUnchanged => Bits::WRITE_UNCHANGED,
            BlockPermission::Resize => Bits::RESIZE,
        }
    })
}

/// Checks the limits against each other.
fn narrow(options: &BlockdevOptionsBlkdebug, below: &Facts) -> Result<Narrow> {
    let given = |name: &str, value: Option<i64>| {
        let value = value.unwrap_or(0);
        let range = |_| Error::generic(format!("Value '{value}' is out of range for parameter '{name}'"));
        u64::try_from(value).map_err(range)
    };
    let refuse = |name: &str, value: u64| Error::generic(format!("Cannot meet constraints with {name} {value}"));
    let align = given("align", options.align)?;
    let align = match u32::try_from(align) {
        Ok(0) => below.request_align,
        Ok(align) if align.is_power_of_two() && align <= MAX_ALIGN => align.max(below.request_align),
        _ => return Err(refuse("align", align)),
    };
    let limit = |name: &str, value: Option<i32>, unit: u32, power: bool| {
        let value = given(name, value.map(i64::from))?;
        match u32::try_from(value) {
            Ok(0) => Ok(0),
            Ok(limit) if limit.is_multiple_of(unit) && (!power || limit.is_power_of_two()) => Ok(limit),
            _ => Err(refuse(name, value)),
        }
    };
    let opt_write_zero = limit("opt-write-zero", options.opt_write_zero, align, true)?;
    let opt_discard = limit("opt-discard", options.opt_discard, align, true)?;
    Ok(Narrow {
        align,
        max_transfer: limit("max-transfer", options.max_transfer, align, false)?,
        opt_write_zero,
        max_write_zero: limit("max-write-zero", options.max_write_zero, align.max(opt_write_zero), false)?,
        opt_discard,
        max_discard: limit("max-discard", options.max_discard, align.max(opt_discard), false)?,
    })
}

impl Blkdebug {
    /// Fails or delays a request as the rules in force have it.
    async fn check(&self, kind: IoType, at: u64, len: u64) -> IoResult {
        let hit = self.rules.lock().unwrap_or_else(PoisonError::into_inner).check(kind, at, len);
        let Some(hit) = hit else { return Ok(()) };
        if hit.delay_ns > 0 {
            self.clock.sleep_until(self.clock.now().saturating_add(hit.delay_ns)).await;
        }
        let Some(errno) = hit.errno else { return Ok(()) };
        if !hit.immediately {
            tokio::task::yield_now().await;
        }
        Err(errno)
    }
}

impl Driver for Blkdebug {
    fn name(&self) -> &'static str {
        "blkdebug"
    }

    fn facts(&self) -> Facts {
        let below = filter::facts(&self.image);
        let n = &self.narrow;
        let shorter = |limit: u32, own: u64| if limit > 0 { u64::from(limit).min(own) } else { own };
        Facts {
            request_align: n.align.max(below.request_align),
            max_transfer: if n.max_transfer > 0 { n.max_transfer.min(below.max_transfer) } else { below.max_transfer },
            max_zero: shorter(n.max_write_zero, below.max_zero),
            zero_align: n.opt_write_zero.max(below.zero_align),
            max_discard: shorter(n.max_discard, below.max_discard),
            discard_align: n.opt_discard.max(below.discard_align),
            ..below
        }
    }

    fn filename(&self) -> String {
        // Without what every node has, and without the child, which stands at the end.
        let options = self.options.to_value();
        let own = options.as_object().into_iter().flatten().filter(|(name, _)| *name != "image");
        let own: Vec<_> = own.map(|(name, value)| (name.as_str(), value.clone())).collect();
        filter::describe("blkdebug", &own, &[("image", &self.image)])
    }

    async fn length(&self) -> IoResult<u64> {
        Ok(self.image.size())
    }

    async fn read(&self, at: u64, buf: &IoBuf) -> IoResult {
        self.check(IoType::Read, at, len_of(buf)).await?;
        self.image.read(at, buf).await
    }

    async fn write(&self, at: u64, buf: &IoBuf, flags: WriteFlags) -> IoResult {
        self.check(IoType::Write, at, len_of(buf)).await?;
        self.image.write(at, buf, flags).await
    }

    async fn flush(&self) -> IoResult {
        self.check(IoType::Flush, 0, 0).await?;
        self.image.flush().await
    }

    async fn zero(&self, span: Span, flags: ZeroFlags) -> IoResult {
        self.check(IoType::WriteZeroes, span.at, span.len).await?;
        self.image.zero(span, flags).await
    }

    async fn discard(&self, span: Span) -> IoResult {
        self.check(IoType::Discard, span.at, span.len).await?;
        self.image.discard(span).await
    }

    async fn map(&self, span: Span, _precise: bool) -> IoResult<Mapping> {
        self.check(IoType::BlockStatus, span.at, span.len).await?;
        Ok(Mapping::forward(span.len, Arc::clone(&self.image), span.at))
    }

    async fn truncate(&self, size: u64, exact: bool, prealloc: Prealloc) -> Result<()> {
        self.image.truncate(size, exact, prealloc).await
    }

    fn reservations(&self) -> Option<&dyn Reservations> {
        Some(&*self.image)
    }

    fn child_perms(&self, _child: &Edge, of_node: Perms) -> Perms {
        Perms { need: of_node.need | self.take, shared: of_node.shared & !self.unshare }
    }

    fn hears_events(&self) -> bool {
        true
    }

    fn event(&self, event: BlkdebugEvent) {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner).event(event);
    }
}

/// The errno of a rule; none where requests go on.
fn errno_of(number: i64) -> Result<Option<Errno>> {
    match i32::try_from(number) {
        Ok(0) => Ok(None),
        // The range of the kernel's error numbers.
        Ok(number @ 1..4096) => Ok(Some(Errno::from_raw(number))),
        _ => Err(Error::generic(format!("Value '{number}' is out of range for parameter 'errno'"))),
    }
}
