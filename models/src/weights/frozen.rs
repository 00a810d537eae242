//! How the frozen weights of a network are held.

use candle_core::{DType, Device};
use kernels::weight::{Format, Weight};

use super::Weights;
use crate::Result;

/// How the frozen weights of a network are held, and what it computes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frozen {
    /// The dtype of matrix products, of what goes through them, and of the weights that are not coded.
    pub compute: DType,
    /// The matrices of the layers that the network repeats. Norms, embeddings and heads are never coded.
    pub storage: Storage,
}

/// How a matrix is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// In the dtype that it is computed with.
    Dense,
    /// One byte a number and a scale for each row.
    Coded(Format),
}

impl Frozen {
    /// Everything in f32.
    pub const F32: Self = Self::dense(DType::F32);

    /// Nothing coded, everything in `compute`.
    pub const fn dense(compute: DType) -> Self {
        Self { compute, storage: Storage::Dense }
    }

    /// Whether a product needs the matrix decoded before it.
    pub const fn is_coded(self) -> bool {
        matches!(self.storage, Storage::Coded(_))
    }

    /// Bytes of a matrix [out, in], scales included.
    pub fn bytes(self, out: usize, input: usize) -> u64 {
        let (rows, numbers) = (out as u64, (out * input) as u64);
        match self.storage {
            Storage::Dense => numbers * self.compute.size_in_bytes() as u64,
            Storage::Coded(_) => numbers + rows * DType::F32.size_in_bytes() as u64,
        }
    }
}

impl Weights {
    /// Reads the matrix `name` [out, in] onto `device` in the form that `frozen` says.
    ///
    /// What is to be coded goes to the device as it is stored, is coded there and dropped: neither side holds more than
    /// this one tensor besides the result.
    ///
    /// # Errors
    /// See [`Weights::tensor`].
    pub fn matrix(&self, name: &str, frozen: Frozen, device: &Device) -> Result<Weight> {
        match frozen.storage {
            Storage::Dense => Ok(Weight::Dense(self.tensor(name, frozen.compute, device)?)),
            Storage::Coded(format) => {
                let dense = self.tensor(name, self.float_dtype(name), device)?;
                Ok(Weight::quantise(&dense, format, frozen.compute)?)
            }
        }
    }
}
