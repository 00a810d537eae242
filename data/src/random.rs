//! Random numbers of orders, masks and captions, the same on every machine.

/// SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014): small, well mixed, and the same
/// on every machine.
pub(crate) struct Random(u64);

impl Random {
    /// The numbers of `epoch` of `seed`.
    pub fn new(seed: u64, epoch: u64) -> Self {
        // Drawn from the seed first, so that epoch 1 of seed 0 is not epoch 0 of seed 1.
        let mixed = Self(seed).next();
        Self(mixed ^ epoch.wrapping_mul(0xd1b5_4a32_d192_ed03))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number from 0 to below `count`. The multiply-shift draw is uneven by less than one part in 2^40 for any list that fits a
    /// disk.
    pub fn below(&mut self, count: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(count)) >> 64) as u64
    }

    /// A number from 0 to below 1.
    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Fisher and Yates.
    pub fn shuffle<T>(&mut self, list: &mut [T]) {
        for last in (1..list.len()).rev() {
            let drawn = self.below(last as u64 + 1);
            list.swap(last, drawn as usize);
        }
    }
}
