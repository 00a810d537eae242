//! The share of a replica in what is dealt out.

/// One of several equal shares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// Which, from 0.
    pub rank: usize,
    /// Of how many, at least one.
    pub world: usize,
}

impl Share {
    /// All of it.
    pub const WHOLE: Self = Self { rank: 0, world: 1 };

    /// Whether thing number `index` is in it.
    pub fn has(self, index: usize) -> bool {
        index % self.world == self.rank
    }
}
