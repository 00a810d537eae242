//! Best-fit allocation in a range of addresses; adjacent free runs are merged.
//!
//! The arithmetic of the GPU's allocator (`cuda/region.rs`), without the GPU.

use std::collections::{BTreeMap, BTreeSet, HashMap};

/// Sizes are multiples of this, as the driver's are.
pub const GRAIN: u64 = 512;

/// Runs of addresses, none adjacent to another.
#[derive(Debug, Clone, Default)]
pub struct Runs {
    lengths: BTreeMap<u64, u64>,
    /// (length, start), the smallest first.
    by_length: BTreeSet<(u64, u64)>,
}

impl Runs {
    /// Adds `length` addresses from `start`, joined with the runs that they touch.
    pub fn add(&mut self, mut start: u64, mut length: u64) {
        if let Some((&before, &more)) = self.lengths.range(..start).next_back()
            && before + more == start
        {
            self.remove(before, more);
            (start, length) = (before, length + more);
        }
        if let Some(&more) = self.lengths.get(&(start + length)) {
            self.remove(start + length, more);
            length += more;
        }
        self.insert(start, length);
    }

    /// Removes `length` addresses from `start` on. Returns false and changes nothing if any of them is missing.
    pub fn cut(&mut self, start: u64, length: u64) -> bool {
        let Some((&first, &whole)) = self.lengths.range(..=start).next_back() else { return false };
        let Some(behind) = (first + whole).checked_sub(start + length) else { return false };
        self.remove(first, whole);
        if start > first {
            self.insert(first, start - first);
        }
        if behind > 0 {
            self.insert(start + length, behind);
        }
        true
    }

    /// The start of the smallest run of at least `length`, the lowest among equals.
    pub fn fit(&self, length: u64) -> Option<u64> {
        self.by_length.range((length, 0)..).next().map(|(_, start)| *start)
    }

    /// Length of the run that ends at `end`.
    pub fn before(&self, end: u64) -> u64 {
        let last = self.lengths.range(..end).next_back();
        last.filter(|(start, length)| *start + *length == end).map_or(0, |(_, length)| *length)
    }

    /// Starts of whole pieces of `piece` addresses, at multiples of it.
    pub fn pieces(&self, piece: u64) -> impl Iterator<Item = u64> {
        self.lengths.iter().flat_map(move |(start, length)| {
            let first = start.next_multiple_of(piece);
            (0..(start + length).saturating_sub(first) / piece).map(move |i| first + i * piece)
        })
    }

    fn insert(&mut self, start: u64, length: u64) {
        self.lengths.insert(start, length);
        self.by_length.insert((length, start));
    }

    fn remove(&mut self, start: u64, length: u64) {
        self.lengths.remove(&start);
        self.by_length.remove(&(length, start));
    }
}

/// Free and taken runs of memory.
#[derive(Debug, Clone, Default)]
pub struct Arena {
    /// Free memory.
    pub free: Runs,
    taken: HashMap<u64, u64>,
    used: u64,
}

impl Arena {
    /// Bytes that are taken.
    pub fn used(&self) -> u64 {
        self.used
    }

    /// Allocates `bytes`, a multiple of [`GRAIN`], in the best-fitting free run; `None` if no run is large enough.
    pub fn take(&mut self, bytes: u64) -> Option<u64> {
        let start = self.free.fit(bytes)?;
        self.free.cut(start, bytes);
        self.taken.insert(start, bytes);
        self.used += bytes;
        Some(start)
    }

    /// Frees the allocation at `start`. False if there is none.
    pub fn give(&mut self, start: u64) -> bool {
        let Some(bytes) = self.taken.remove(&start) else { return false };
        self.used -= bytes;
        self.free.add(start, bytes);
        true
    }
}
