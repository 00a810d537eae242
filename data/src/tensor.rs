//! Arrays in ordinary memory: what encoders give to the cache and training takes from it.

/// Numbers with a shape, row-major, in f32.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct HostTensor {
    shape: Vec<usize>,
    data: Vec<f32>,
}

impl HostTensor {
    /// A tensor of `data` in `shape`. `None` when their sizes differ.
    pub fn new(shape: Vec<usize>, data: Vec<f32>) -> Option<Self> {
        let count = shape.iter().try_fold(1_usize, |count, &side| count.checked_mul(side));
        (count == Some(data.len())).then_some(Self { shape, data })
    }

    /// Sides, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The numbers.
    pub fn data(&self) -> &[f32] {
        &self.data
    }

    /// The numbers, without a copy.
    pub fn into_data(self) -> Vec<f32> {
        self.data
    }
}

/// How numbers are kept on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// As they are.
    F32,
    /// Rounded to bfloat16, half the size: right for what an encoder computed in bfloat16 anyway.
    Bf16,
}
