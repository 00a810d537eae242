//! Models that can be parked in host memory and moved back to their device.

use kernels::{Device, Tensor};

use crate::Result;

/// A model that is used whole, on one device at a time.
pub trait Movable {
    /// Every tensor of it.
    fn tensors_mut(&mut self) -> Vec<&mut Tensor>;

    /// Moves it to `device`. No number changes.
    ///
    /// # Errors
    /// When memory runs out; then some tensors are on either device, and the model must be dropped.
    fn move_to(&mut self, device: &Device) -> Result<()> {
        for tensor in self.tensors_mut() {
            *tensor = tensor.to_device(device)?;
        }
        Ok(())
    }
}
