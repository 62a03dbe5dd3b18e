//! Limits of throughput: buckets that leak, and groups of nodes that share them.
//!
//! | module | noun |
//! | --- | --- |
//! | [`limits`] | [`Limits`]: what the user asks for, checked |
//! | `bucket` | the six buckets: exact arithmetic, no clock |
//! | [`group`] | [`Group`] and [`Member`]: who waits, whose turn it is, who keeps the timer |
//!
//! A group owns its buckets and its queues under one short lock, never held across an await or while somebody is woken. It
//! has no thread and no task of its own: the timer of a direction is kept by one of the requests that wait there, on
//! the thread where that request runs, and handed to the next when it is let go. A group without limits takes no lock.

mod bucket;
pub mod group;
pub mod limits;

pub use group::{Group, Member};
pub use limits::{Limit, Limits};

/// What a request does to the medium, as limits tell it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Reads.
    Read,
    /// Writes, zeroes and discards.
    Write,
}

impl Direction {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Read, Self::Write];

    const fn index(self) -> usize {
        match self {
            Self::Read => 0,
            Self::Write => 1,
        }
    }

    const fn other(self) -> Self {
        match self {
            Self::Read => Self::Write,
            Self::Write => Self::Read,
        }
    }
}
