//! Numbers read back to the host. A shadow has none: [`NoNumbers`](super::NoNumbers).

use candle_core::{Result, WithDType};

use super::Tensor;

impl Tensor {
    /// The one number of a scalar.
    ///
    /// # Errors
    /// If it has another shape or dtype, or is a shadow; likewise for the methods that follow.
    pub fn to_scalar<T: WithDType>(&self) -> Result<T> {
        self.as_candle()?.to_scalar()
    }

    /// The numbers of a tensor of one dimension.
    pub fn to_vec1<T: WithDType>(&self) -> Result<Vec<T>> {
        self.as_candle()?.to_vec1()
    }

    /// The numbers of a tensor of two dimensions.
    pub fn to_vec2<T: WithDType>(&self) -> Result<Vec<Vec<T>>> {
        self.as_candle()?.to_vec2()
    }

    /// The numbers of a tensor of three dimensions.
    pub fn to_vec3<T: WithDType>(&self) -> Result<Vec<Vec<Vec<T>>>> {
        self.as_candle()?.to_vec3()
    }
}
