//! Metadata contexts: which there are, which a client selected, and which a query names, `[NBD Metadata querying]`.

/// Something that can be asked about each block. The number is its id on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Context {
    /// Whether bytes are stored, and whether they read as zero.
    BaseAllocation,
    /// How many layers of backing files down the bytes are. Offered by exports with `allocation-depth`.
    AllocationDepth,
}

impl Context {
    const ALL: [Self; 2] = [Self::BaseAllocation, Self::AllocationDepth];

    /// The id under which replies carry it.
    pub(crate) fn id(self) -> u32 {
        match self {
            Self::BaseAllocation => 0,
            Self::AllocationDepth => 1,
        }
    }

    /// The name under which clients select it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::BaseAllocation => "base:allocation",
            Self::AllocationDepth => "qemu:allocation-depth",
        }
    }

    fn namespace(self) -> &'static str {
        match self {
            Self::BaseAllocation => "base:",
            Self::AllocationDepth => "qemu:",
        }
    }

    fn bit(self) -> u8 {
        1 << self.id()
    }
}

/// A set of contexts, in the order of their ids.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Contexts(u8);

impl Contexts {
    /// No context.
    pub(crate) const NONE: Self = Self(0);

    /// Those that an export offers.
    pub(crate) fn offered(allocation_depth: bool) -> Self {
        let mut all = Self::NONE;
        all.insert(Context::BaseAllocation);
        if allocation_depth {
            all.insert(Context::AllocationDepth);
        }
        all
    }

    pub(crate) fn insert(&mut self, context: Context) {
        self.0 |= context.bit();
    }

    pub(crate) fn contains(self, context: Context) -> bool {
        self.0 & context.bit() != 0
    }

    pub(crate) fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub(crate) fn len(self) -> usize {
        self.iter().count()
    }

    pub(crate) fn iter(self) -> impl Iterator<Item = Context> {
        Context::ALL.into_iter().filter(move |c| self.contains(*c))
    }

    /// The member with this id.
    pub(crate) fn by_id(self, id: u32) -> Option<Context> {
        self.iter().find(|c| c.id() == id)
    }

    /// The members that `query` names. A bare namespace names all of it, but only when contexts are listed.
    pub(crate) fn matching(self, query: &[u8], listing: bool) -> Self {
        let mut found = Self::NONE;
        for context in self.iter() {
            let all_of_it = listing && query == context.namespace().as_bytes();
            if all_of_it || query == context.name().as_bytes() {
                found.insert(context);
            }
        }
        found
    }

    pub(crate) fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_name_what_the_specification_says() {
        let all = Contexts::offered(true);
        let names = |query: &str, listing| {
            all.matching(query.as_bytes(), listing).iter().map(Context::name).collect::<Vec<_>>()
        };
        assert_eq!(names("base:allocation", false), ["base:allocation"]);
        assert_eq!(names("base:", true), ["base:allocation"]);
        assert_eq!(names("qemu:", true), ["qemu:allocation-depth"]);
        for ignored in
            ["base:", "qemu:", "", "base", "qemu:dirty-bitmap:", "x-foo:", "base:allocation2", "BASE:ALLOCATION"]
        {
            assert_eq!(names(ignored, false), [""; 0], "{ignored}");
        }
        assert!(Contexts::offered(false).matching(b"qemu:allocation-depth", false).is_empty());
        assert_eq!(all.by_id(1), Some(Context::AllocationDepth));
        assert_eq!(Contexts::offered(false).by_id(1), None);
        assert_eq!((all.len(), all.by_id(2)), (2, None));
    }
}
