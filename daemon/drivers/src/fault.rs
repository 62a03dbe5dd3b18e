//! `x-fault`: a disk with a volatile cache that can hold, delay, fail and tear requests, and lose power.
//!
//! Two images: the durable one is the node below, the volatile one is kept here, in sectors, over it. Writes reach the durable
//! one only by a flush or with FUA, so that a kill of the process loses exactly what was not flushed. A loss of power on
//! demand keeps a part of the volatile image, by chance but repeatable, as a real cache may.
//!
//! A model and no medium for data: volatile sectors cost memory. Discards do not reach it. Held requests wait through
//! drains, as those of a disk that hangs do.

use crate::filter::{self, len_of};
use block::clock::Clock;
use block::driver::{LocalFuture, Prealloc};
use block::fault::FaultControl;
use block::{Driver, Edge, Errno, Facts, IoResult, Mapping, OpenContext, Role, Span, Support, WriteFlags, ZeroFlags};
use buf::IoBuf;
use qapi::types::block_filters::BlkdebugIOType as IoType;
use qapi::types::fault::{BlockdevOptionsXFault, XFaultAction, XFaultInfo, XFaultKeep, XFaultRule};
use qapi::{Error, Result};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::watch;

/// Bytes in a sector, the unit that a disk writes whole.
const SECTOR: usize = 512;
const SECTOR_LEN: u64 = 512;
/// The longest zero request, in bytes: each of its sectors is remembered.
const MAX_ZERO: u64 = 1 << 20;
/// Sectors that are made durable with one write.
const RUN: usize = 256;

/// A sector that has been written and not flushed.
#[derive(Debug)]
struct Dirty {
    /// Which write it was, so that a flush forgets only what it has made durable.
    generation: u64,
    data: Box<[u8; SECTOR]>,
}

#[derive(Debug)]
struct Rule {
    rule: XFaultRule,
    skipped: u64,
    used: u64,
}

#[derive(Debug, Default)]
struct State {
    rules: Vec<Rule>,
    dirty: BTreeMap<u64, Dirty>,
    generation: u64,
    held: u64,
    crashed: bool,
}

/// The fault node.
#[derive(Debug)]
pub struct Fault {
    file: Arc<Edge>,
    clock: Arc<dyn Clock>,
    /// Guards all else; never across an await.
    state: Mutex<State>,
    /// Counts releases and crashes; who is held waits for a change.
    released: watch::Sender<u64>,
    /// Held by who makes sectors durable, so that older data never overtake newer ones.
    hardening: tokio::sync::Mutex<()>,
}

/// Opens the durable node.
///
/// # Errors
/// A rule that makes no sense; those of the child.
pub async fn open(cx: &mut OpenContext<'_>, clock: Arc<dyn Clock>, options: &BlockdevOptionsXFault) -> Result<Fault> {
    let rules = checked(options.rules.as_deref().unwrap_or_default())?;
    let file = cx.child("file", Role::Filtered, &options.file).await?;
    let state = Mutex::new(State { rules, ..State::default() });
    Ok(Fault { file, clock, state, released: watch::Sender::new(0), hardening: tokio::sync::Mutex::new(()) })
}

fn checked(rules: &[XFaultRule]) -> Result<Vec<Rule>> {
    if rules.iter().any(|rule| !(1..4096).contains(&rule.errno)) {
        return Err(Error::generic("Parameter 'errno' expects a number of an error"));
    }
    Ok(rules.iter().map(|rule| Rule { rule: rule.clone(), skipped: 0, used: 0 }).collect())
}

impl State {
    /// The first rule that applies to a request; it is used once more.
    fn rule_for(&mut self, kind: IoType, span: Span) -> Option<XFaultRule> {
        for Rule { rule, skipped, used } in &mut self.rules {
            let end = rule.length.map_or(u64::MAX, |length| rule.offset.saturating_add(length));
            let touches = kind == IoType::Flush || (span.at < end && rule.offset < span.end());
            if !touches || rule.iotype.is_some_and(|of| of != kind) || rule.count.is_some_and(|count| *used >= count) {
                continue;
            }
            if *skipped < rule.skip {
                *skipped += 1;
                continue;
            }
            *used += 1;
            return Some(rule.clone());
        }
        None
    }

    fn alive(&self) -> IoResult {
        if self.crashed { Err(Errno::EIO) } else { Ok(()) }
    }

    /// Takes `data`, whole sectors from sector `first`.
    fn put(&mut self, first: u64, data: &IoBuf) {
        self.generation += 1;
        let count = data.len() / SECTOR;
        for (i, sector) in (0..count).zip(first..) {
            let mut bytes = Box::new([0; SECTOR]);
            data.read_at(i * SECTOR, &mut bytes[..]);
            self.dirty.insert(sector, Dirty { generation: self.generation, data: bytes });
        }
    }

    /// The volatile sectors of a range, in runs of neighbours, with their generations.
    fn runs(&self, sectors: std::ops::Range<u64>) -> Vec<(u64, Vec<u64>, IoBuf)> {
        let mut runs: Vec<(u64, Vec<u64>, Vec<u8>)> = Vec::new();
        for (sector, dirty) in self.dirty.range(sectors) {
            match runs.last_mut() {
                Some((first, generations, bytes))
                    if generations.len() < RUN && *first + u64::try_from(generations.len()).unwrap_or(0) == *sector =>
                {
                    generations.push(dirty.generation);
                    bytes.extend_from_slice(&dirty.data[..]);
                }
                _ => runs.push((*sector, vec![dirty.generation], dirty.data.to_vec())),
            }
        }
        runs.into_iter().map(|(first, generations, bytes)| (first, generations, IoBuf::copy_of(&bytes))).collect()
    }

    /// Forgets the sectors that have not been written again since.
    fn forget(&mut self, first: u64, generations: &[u64]) {
        for (generation, sector) in generations.iter().zip(first..) {
            if self.dirty.get(&sector).is_some_and(|dirty| dirty.generation == *generation) {
                self.dirty.remove(&sector);
            }
        }
    }
}

/// Numbers by chance, the same for the same seed.
struct Chance(u64);

impl Chance {
    /// Splitmix64, of which one bit is used.
    fn flip(&mut self) -> bool {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (mixed ^ (mixed >> 31)) & 1 == 1
    }
}

impl Fault {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does to a request what its rule says; the bytes to write before it fails, if it is torn.
    async fn meet(&self, kind: IoType, span: Span) -> Result<(), (Errno, u64)> {
        let dead = |errno| (errno, 0);
        let mut released = self.released.subscribe();
        let rule = {
            let mut state = self.lock();
            state.alive().map_err(dead)?;
            let rule = state.rule_for(kind, span);
            if rule.as_ref().is_some_and(|rule| rule.action == XFaultAction::Hold) {
                state.held += 1;
            }
            rule
        };
        let Some(rule) = rule else { return Ok(()) };
        match rule.action {
            XFaultAction::Hold => {
                // The sender lives as long as this node.
                let _ = released.changed().await;
                let mut state = self.lock();
                state.held = state.held.saturating_sub(1);
                state.alive().map_err(dead)
            }
            XFaultAction::Delay => {
                self.clock.sleep_until(self.clock.now().saturating_add(rule.delay_ns)).await;
                self.lock().alive().map_err(dead)
            }
            XFaultAction::Fail => Err((Errno::from_raw(rule.errno), 0)),
            XFaultAction::Tear => Err((Errno::from_raw(rule.errno), rule.torn_bytes)),
        }
    }

    /// A write of `data`, volatile.
    async fn write_volatile(&self, kind: IoType, at: u64, data: &IoBuf) -> IoResult {
        let met = self.meet(kind, Span::new(at, len_of(data))).await;
        let mut state = self.lock();
        state.alive()?;
        let (data, result) = match met {
            Ok(()) => (data.clone(), Ok(())),
            Err((errno, torn)) => {
                let whole = usize::try_from(torn).unwrap_or(usize::MAX).min(data.len()) / SECTOR * SECTOR;
                (data.slice(0, whole), Err(errno))
            }
        };
        state.put(at / SECTOR_LEN, &data);
        result
    }

    /// Makes the volatile sectors of a range durable.
    async fn harden(&self, sectors: std::ops::Range<u64>) -> IoResult {
        let _alone = self.hardening.lock().await;
        let runs = self.lock().runs(sectors);
        for (first, _, data) in &runs {
            self.file.write(first * SECTOR_LEN, data, WriteFlags::NONE).await?;
            self.lock().alive()?;
        }
        self.file.flush().await?;
        let mut state = self.lock();
        state.alive()?;
        for (first, generations, _) in &runs {
            state.forget(*first, generations);
        }
        Ok(())
    }

    /// Makes a write durable that has just been taken, if it asks for that.
    async fn finish(&self, fua: bool, at: u64, len: u64) -> IoResult {
        let first = at / SECTOR_LEN;
        if fua { self.harden(first..first + len / SECTOR_LEN).await } else { Ok(()) }
    }

    async fn lose_power(&self, keep: XFaultKeep, seed: u64, atomic: u64) -> Result<()> {
        let dirty = {
            let mut state = self.lock();
            if state.crashed {
                return Err(Error::generic("The node has lost its power already"));
            }
            state.crashed = true;
            std::mem::take(&mut state.dirty)
        };
        self.released.send_modify(|count| *count += 1);
        let _alone = self.hardening.lock().await;
        let mut chance = Chance(seed);
        let mut piece = None;
        for (sector, dirty) in dirty {
            let this = sector / atomic;
            let kept = match piece {
                Some((of, kept)) if of == this => kept,
                _ => match keep {
                    XFaultKeep::None => false,
                    XFaultKeep::All => true,
                    XFaultKeep::Random => chance.flip(),
                },
            };
            piece = Some((this, kept));
            if kept {
                let data = IoBuf::copy_of(&dirty.data[..]);
                let written = self.file.write(sector * SECTOR_LEN, &data, WriteFlags::NONE).await;
                written.map_err(|errno| Error::io("Could not write the durable image", errno.into()))?;
            }
        }
        self.file.flush().await.map_err(|errno| Error::io("Could not flush the durable image", errno.into()))
    }
}

impl Driver for Fault {
    fn name(&self) -> &'static str {
        "x-fault"
    }

    fn facts(&self) -> Facts {
        let below = filter::facts(&self.file);
        Facts { request_align: below.request_align.max(512), max_zero: MAX_ZERO, discard: Support::None, ..below }
    }

    fn filename(&self) -> String {
        filter::describe("x-fault", &[], &[("file", &self.file)])
    }

    async fn length(&self) -> IoResult<u64> {
        Ok(self.file.size())
    }

    async fn read(&self, at: u64, buf: &IoBuf) -> IoResult {
        self.meet(IoType::Read, Span::new(at, len_of(buf))).await.map_err(|(errno, _)| errno)?;
        let first = at / SECTOR_LEN;
        let sectors = first..first + len_of(buf) / SECTOR_LEN;
        // Also those that a flush makes durable while the read is on its way.
        let before = self.lock().runs(sectors.clone());
        self.file.read(at, buf).await?;
        let state = self.lock();
        state.alive()?;
        for (sector, _, data) in before.into_iter().chain(state.runs(sectors)) {
            let place = usize::try_from((sector - first) * SECTOR_LEN).unwrap_or(usize::MAX);
            buf.copy_from(place, &data);
        }
        Ok(())
    }

    async fn write(&self, at: u64, buf: &IoBuf, flags: WriteFlags) -> IoResult {
        self.write_volatile(IoType::Write, at, buf).await?;
        self.finish(flags.fua, at, len_of(buf)).await
    }

    async fn flush(&self) -> IoResult {
        self.meet(IoType::Flush, Span::new(0, 0)).await.map_err(|(errno, _)| errno)?;
        self.harden(0..u64::MAX).await
    }

    async fn zero(&self, span: Span, flags: ZeroFlags) -> IoResult {
        let zeroes = IoBuf::zeroed(usize::try_from(span.len).map_err(|_| Errno::ENOTSUP)?);
        self.write_volatile(IoType::WriteZeroes, span.at, &zeroes).await?;
        self.finish(flags.fua, span.at, span.len).await
    }

    async fn map(&self, span: Span, _precise: bool) -> IoResult<Mapping> {
        self.meet(IoType::BlockStatus, span).await.map_err(|(errno, _)| errno)?;
        // Where nothing is volatile the durable node knows; else the first volatile sector ends what it knows.
        let first = span.at / SECTOR_LEN;
        let next = self.lock().dirty.range(first..).next().map(|(sector, _)| *sector * SECTOR_LEN);
        Ok(match next {
            Some(next) if next <= span.at => Mapping::data(SECTOR_LEN.min(span.len), span.at),
            Some(next) => Mapping::forward(span.len.min(next - span.at), Arc::clone(&self.file), span.at),
            None => Mapping::forward(span.len, Arc::clone(&self.file), span.at),
        })
    }

    async fn truncate(&self, size: u64, exact: bool, prealloc: Prealloc) -> Result<()> {
        self.lock().dirty.split_off(&size.div_ceil(SECTOR_LEN));
        self.file.truncate(size, exact, prealloc).await
    }

    fn fault_control(&self) -> Option<&dyn FaultControl> {
        Some(self)
    }
}

impl FaultControl for Fault {
    fn set_rules(&self, rules: &[XFaultRule]) -> Result<()> {
        self.lock().rules = checked(rules)?;
        Ok(())
    }

    fn release(&self) {
        self.released.send_modify(|count| *count += 1);
    }

    fn let_all_go(&self) {
        self.lock().rules.retain(|rule| rule.rule.action != XFaultAction::Hold);
        self.release();
    }

    fn crash(&self, keep: XFaultKeep, seed: u64, atomic_size: u32) -> LocalFuture<'_, Result<()>> {
        let atomic = u64::from(atomic_size);
        if atomic == 0 || !atomic.is_multiple_of(SECTOR_LEN) {
            return Box::pin(async { Err(Error::generic("Parameter 'atomic-size' expects a multiple of 512")) });
        }
        Box::pin(self.lose_power(keep, seed, atomic / SECTOR_LEN))
    }

    fn restart(&self) {
        self.lock().crashed = false;
    }

    fn info(&self) -> XFaultInfo {
        let state = self.lock();
        let sectors = u64::try_from(state.dirty.len()).unwrap_or(u64::MAX);
        XFaultInfo { held: state.held, volatile_bytes: sectors.saturating_mul(SECTOR_LEN), crashed: state.crashed }
    }
}
