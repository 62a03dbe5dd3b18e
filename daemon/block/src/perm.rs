//! Permissions: what each parent needs of a node and what it lets others do.
//!
//! A parent's edge carries two sets: what it *needs* and what it *shares*. An edge may exist only if what it needs is
//! shared by every other edge to the same node. The bits are QEMU's and so are their positions, for the image locks of
//! other processes are made of them (see `io::lock`).

use std::fmt;
use std::ops::{BitAnd, BitOr, Not};

/// A set of permission bits.
#[derive(Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct Bits(u8);

impl Bits {
    /// Nothing.
    pub const NONE: Self = Self(0);
    /// Reads see what was written last.
    pub const CONSISTENT_READ: Self = Self(1);
    /// Any write.
    pub const WRITE: Self = Self(2);
    /// Writes that do not change what a reader sees, as of a job that copies data upwards.
    pub const WRITE_UNCHANGED: Self = Self(4);
    /// A change of the length.
    pub const RESIZE: Self = Self(8);
    /// All four.
    pub const ALL: Self = Self(15);

    const NAMES: [(Self, &'static str); 4] = [
        (Self::CONSISTENT_READ, "consistent read"),
        (Self::WRITE, "write"),
        (Self::WRITE_UNCHANGED, "write unchanged"),
        (Self::RESIZE, "resize"),
    ];

    /// The bits as a number: bit 0 consistent read, 1 write, 2 write unchanged, 3 resize.
    pub const fn bits(self) -> u8 {
        self.0
    }

    /// The set with these bits; others are dropped.
    pub const fn from_bits(bits: u8) -> Self {
        Self(bits & Self::ALL.0)
    }

    /// Whether all bits of `other` are in this set.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether any bit of `other` is in this set.
    pub const fn intersects(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// Whether the set has no bit.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The single bits of this set with their names, in order.
    pub fn iter(self) -> impl Iterator<Item = (Self, &'static str)> {
        Self::NAMES.into_iter().filter(move |(bit, _)| self.contains(*bit))
    }
}

impl BitOr for Bits {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitAnd for Bits {
    type Output = Self;
    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

impl Not for Bits {
    type Output = Self;
    fn not(self) -> Self {
        Self(!self.0 & Self::ALL.0)
    }
}

impl fmt::Display for Bits {
    /// The names, separated by commas, as error messages have them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (_, name)) in self.iter().enumerate() {
            write!(f, "{}{name}", if i == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

impl fmt::Debug for Bits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{{{self}}}")
    }
}

/// What a parent, or all parents together, need of a node and share on it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Perms {
    /// What is needed.
    pub need: Bits,
    /// What others may need at the same time.
    pub shared: Bits,
}

impl Default for Perms {
    /// Of a node without parents: nothing needed, everything shared.
    fn default() -> Self {
        Self { need: Bits::NONE, shared: Bits::ALL }
    }
}

impl Perms {
    /// Those of two parents together.
    #[must_use]
    pub fn with(self, other: Self) -> Self {
        Self { need: self.need | other.need, shared: self.shared & other.shared }
    }

    /// Whether the users may change the data.
    pub fn writes(self) -> bool {
        self.need.intersects(Bits::WRITE | Bits::WRITE_UNCHANGED)
    }
}

/// One parent in a check for conflicts.
pub(crate) struct Claim<'a> {
    /// Who, as the message has it: `node 'x'`, `an unnamed block device`.
    pub who: String,
    /// The name of the edge: `file`, `root`.
    pub child: &'a str,
    pub perms: Perms,
}

/// The text of the first conflict between two parents of `node`, none if there is none.
pub(crate) fn conflict(node: &str, claims: &[Claim<'_>]) -> Option<String> {
    for (i, a) in claims.iter().enumerate() {
        for (j, b) in claims.iter().enumerate() {
            let bits = a.perms.need & !b.perms.shared;
            if i != j && !bits.is_empty() {
                return Some(format!(
                    "Permission conflict on node '{node}': permissions '{bits}' are both required by {} (uses node '{node}' as \
                     '{}' child) and unshared by {} (uses node '{node}' as '{}' child).",
                    a.who, a.child, b.who, b.child
                ));
            }
        }
    }
    None
}
