//! The place of a model that is loaded when it is first used: in its files, on its device, or in host memory.

use std::sync::Arc;

use kernels::Device;
use models::Movable;

use crate::error::Result;

/// What becomes of a model that nobody uses when its device is needed for others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhenIdle {
    /// It is dropped, and read from its files when it is used again.
    Drop,
    /// It waits in host memory.
    Park,
}

/// A model, wherever it is.
#[derive(Debug)]
pub(super) enum Slot<T> {
    Files,
    OnDevice(Arc<T>),
    Parked(T),
}

impl<T: Movable> Slot<T> {
    /// The model on `device`, loaded where it is nowhere yet.
    pub fn on(&mut self, device: &Device, load: impl FnOnce() -> Result<T>) -> Result<Arc<T>> {
        let model = match std::mem::replace(self, Self::Files) {
            Self::OnDevice(model) => model,
            Self::Files => Arc::new(load()?),
            Self::Parked(mut model) => {
                model.move_to(device)?;
                Arc::new(model)
            }
        };
        *self = Self::OnDevice(model.clone());
        Ok(model)
    }

    /// Takes the model off its device, if nobody uses it.
    pub fn leave(&mut self, when_idle: WhenIdle) -> Result<()> {
        *self = match (std::mem::replace(self, Self::Files), when_idle) {
            (Self::OnDevice(model), _) if Arc::strong_count(&model) > 1 => Self::OnDevice(model),
            (Self::Files, _) | (Self::OnDevice(_), WhenIdle::Drop) => Self::Files,
            (Self::Parked(model), _) => Self::Parked(model),
            (Self::OnDevice(model), WhenIdle::Park) => match Arc::try_unwrap(model) {
                Ok(mut model) => {
                    model.move_to(&Device::Cpu)?;
                    Self::Parked(model)
                }
                Err(model) => Self::OnDevice(model),
            },
        };
        Ok(())
    }
}
