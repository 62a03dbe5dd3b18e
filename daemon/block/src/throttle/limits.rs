//! [`Limits`]: the 18 limits of a group and the size of a request, checked as the reference checks them.

use super::Direction;
use qapi::types::throttle::{ThrottleGroupProperties, ThrottleLimits};
use qapi::{Error, Result};

/// The greatest rate; the reference's.
pub const MAX_RATE: u64 = 1_000_000_000_000_000;

/// One bucket's worth of limits, in units (requests or bytes) and seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// Units a second in the long run; 0 is no limit.
    pub avg: u64,
    /// Units a second while a burst lasts; 0 where bursts are not asked for.
    pub max: u64,
    /// How long a burst may last, in seconds; at least 1.
    pub length: u64,
}

impl Default for Limit {
    fn default() -> Self {
        Self { avg: 0, max: 0, length: 1 }
    }
}

/// What a bucket counts, and for which requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Requests, of one direction or (none) of both.
    Iops(Option<Direction>),
    /// Bytes, likewise.
    Bps(Option<Direction>),
}

impl Kind {
    /// All six, in the order of [`Limits::buckets`].
    pub const ALL: [Self; 6] = [
        Self::Iops(None),
        Self::Iops(Some(Direction::Read)),
        Self::Iops(Some(Direction::Write)),
        Self::Bps(None),
        Self::Bps(Some(Direction::Read)),
        Self::Bps(Some(Direction::Write)),
    ];

    /// Whether requests of `direction` go through this bucket.
    pub fn counts(self, direction: Direction) -> bool {
        let (Self::Iops(only) | Self::Bps(only)) = self;
        only.is_none_or(|only| only == direction)
    }
}

/// The limits of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Limits {
    /// One for each of [`Kind::ALL`].
    pub buckets: [Limit; 6],
    /// Longer requests count as several, in bytes; 0 counts each as one.
    pub op_size: u64,
}

/// The members of one bucket and the name of its length.
type Row = ([Option<i64>; 3], &'static str);

fn rows(l: &ThrottleLimits) -> [Row; 6] {
    [
        ([l.iops_total, l.iops_total_max, l.iops_total_max_length], "iops-total-max-length"),
        ([l.iops_read, l.iops_read_max, l.iops_read_max_length], "iops-read-max-length"),
        ([l.iops_write, l.iops_write_max, l.iops_write_max_length], "iops-write-max-length"),
        ([l.bps_total, l.bps_total_max, l.bps_total_max_length], "bps-total-max-length"),
        ([l.bps_read, l.bps_read_max, l.bps_read_max_length], "bps-read-max-length"),
        ([l.bps_write, l.bps_write_max, l.bps_write_max_length], "bps-write-max-length"),
    ]
}

impl Limits {
    /// These limits with what `change` names changed.
    ///
    /// # Errors
    /// A value out of range, or limits that contradict each other.
    pub fn with(&self, change: &ThrottleLimits) -> Result<Self> {
        let mut new = *self;
        new.merge(change, "")?;
        new.check()?;
        Ok(new)
    }

    /// The limits that the properties of a new object ask for; `limits` has the last word.
    ///
    /// # Errors
    /// As for [`Limits::with`].
    pub fn of_properties(p: &ThrottleGroupProperties) -> Result<Self> {
        let single = ThrottleLimits {
            iops_total: p.x_iops_total,
            iops_total_max: p.x_iops_total_max,
            iops_total_max_length: p.x_iops_total_max_length,
            iops_read: p.x_iops_read,
            iops_read_max: p.x_iops_read_max,
            iops_read_max_length: p.x_iops_read_max_length,
            iops_write: p.x_iops_write,
            iops_write_max: p.x_iops_write_max,
            iops_write_max_length: p.x_iops_write_max_length,
            bps_total: p.x_bps_total,
            bps_total_max: p.x_bps_total_max,
            bps_total_max_length: p.x_bps_total_max_length,
            bps_read: p.x_bps_read,
            bps_read_max: p.x_bps_read_max,
            bps_read_max_length: p.x_bps_read_max_length,
            bps_write: p.x_bps_write,
            bps_write_max: p.x_bps_write_max,
            bps_write_max_length: p.x_bps_write_max_length,
            iops_size: p.x_iops_size,
        };
        let negative = |value: &Option<i64>| value.is_some_and(|value| value < 0);
        if rows(&single).iter().any(|(values, _)| values.iter().any(negative)) || negative(&single.iops_size) {
            return Err(Error::generic("Property values cannot be negative"));
        }
        let mut limits = Self::default();
        limits.merge(&single, "x-")?;
        limits.merge(p.limits.as_ref().unwrap_or(&ThrottleLimits::default()), "")?;
        limits.check()?;
        Ok(limits)
    }

    fn merge(&mut self, change: &ThrottleLimits, prefix: &str) -> Result<()> {
        // A negative rate becomes one that is out of range, and is refused as such.
        let rate = |value: i64| u64::try_from(value).unwrap_or(u64::MAX);
        for (bucket, ([avg, max, length], name)) in self.buckets.iter_mut().zip(rows(change)) {
            bucket.avg = avg.map_or(bucket.avg, rate);
            bucket.max = max.map_or(bucket.max, rate);
            if let Some(length) = length {
                let length = u32::try_from(length).map_err(|_| {
                    Error::generic(format!("{prefix}{name} value must be in the range [0, {}]", u32::MAX))
                })?;
                bucket.length = u64::from(length);
            }
        }
        if let Some(size) = change.iops_size {
            let out_of_range =
                |_| Error::generic(format!("{prefix}iops-size value must be in the range [0, {}]", i64::MAX));
            self.op_size = u64::try_from(size).map_err(out_of_range)?;
        }
        Ok(())
    }

    fn check(&self) -> Result<()> {
        let refuse = |text: &str| Err(Error::generic(text));
        let [iops, bps] = [&self.buckets[..3], &self.buckets[3..]];
        let conflict = |of: &[Limit], value: fn(&Limit) -> u64| {
            of.first().is_some_and(|total| value(total) > 0) && of.iter().skip(1).any(|limit| value(limit) > 0)
        };
        if [iops, bps].iter().any(|of| conflict(of, |limit| limit.avg) || conflict(of, |limit| limit.max)) {
            return refuse("bps/iops/max total values and read/write values cannot be used at the same time");
        }
        if self.op_size > 0 && iops.iter().all(|limit| limit.avg == 0) {
            return refuse("iops size requires an iops value to be set");
        }
        for Limit { avg, max, length } in self.buckets {
            if avg > MAX_RATE || max > MAX_RATE {
                return Err(Error::generic(format!("bps/iops/max values must be within [0, {MAX_RATE}]")));
            }
            if length == 0 {
                return refuse("the burst length cannot be 0");
            }
            if length > 1 && max == 0 {
                return refuse("burst length set without burst rate");
            }
            if max > 0 && length > MAX_RATE / max {
                return refuse("burst length too high for this burst rate");
            }
            if max > 0 && avg == 0 {
                return refuse("bps_max/iops_max require corresponding bps/iops values");
            }
            if max > 0 && max < avg {
                return refuse("bps_max/iops_max cannot be lower than bps/iops");
            }
        }
        Ok(())
    }

    /// Whether requests of `direction` have any limit.
    pub fn limits(&self, direction: Direction) -> bool {
        self.buckets.iter().zip(Kind::ALL).any(|(limit, kind)| limit.avg > 0 && kind.counts(direction))
    }

    /// The limits with all members, as a query shows them.
    pub fn to_qapi(&self) -> ThrottleLimits {
        // All values were checked to be below the largest signed one.
        let signed = |value: u64| Some(i64::try_from(value).unwrap_or(i64::MAX));
        let [it, ir, iw, bt, br, bw] = self.buckets;
        ThrottleLimits {
            iops_total: signed(it.avg),
            iops_total_max: signed(it.max),
            iops_total_max_length: signed(it.length),
            iops_read: signed(ir.avg),
            iops_read_max: signed(ir.max),
            iops_read_max_length: signed(ir.length),
            iops_write: signed(iw.avg),
            iops_write_max: signed(iw.max),
            iops_write_max_length: signed(iw.length),
            bps_total: signed(bt.avg),
            bps_total_max: signed(bt.max),
            bps_total_max_length: signed(bt.length),
            bps_read: signed(br.avg),
            bps_read_max: signed(br.max),
            bps_read_max_length: signed(br.length),
            bps_write: signed(bw.avg),
            bps_write_max: signed(bw.max),
            bps_write_max_length: signed(bw.length),
            iops_size: signed(self.op_size),
        }
    }
}
