//! Tensors that stay in host memory and are copied to a device whenever they are used.

use super::{Parked, Waiting};
use crate::profile::{self, Class};
use crate::{Device, Result, Tensor};

/// Copies parked tensors to a device, beside its work. What is parked stays parked.
#[derive(Debug)]
pub struct Fetcher {
    device: Device,
    #[cfg(feature = "cuda")]
    gpu: Option<crate::cuda::copies::Fetcher>,
}

/// A tensor on its way to a device.
#[derive(Debug)]
pub struct Arriving(On);

#[derive(Debug)]
enum On {
    There(Tensor),
    #[cfg(feature = "cuda")]
    Way(crate::cuda::copies::Fetched),
}

impl Fetcher {
    /// Copies to `device`.
    ///
    /// # Errors
    /// When the device fails.
    pub fn new(device: &Device) -> Result<Self> {
        Ok(Self {
            device: device.clone(),
            #[cfg(feature = "cuda")]
            gpu: device.card().map(|card| crate::cuda::copies::Fetcher::new(card.clone())).transpose()?,
        })
    }

    /// Starts to copy `parked`. The copy runs beside work that is queued from now on, so this is called before the work that it
    /// is to run beside.
    ///
    /// # Errors
    /// When the device has too little memory.
    pub fn start(&self, parked: &Parked) -> Result<Arriving> {
        let _noted = profile::scope(Class::Copy, &self.device);
        Ok(Arriving(match &parked.x {
            Waiting::Here(x) => On::There(x.to_device(&self.device)?),
            Waiting::Counted(parked) => On::There(parked.copied(&self.device)),
            #[cfg(feature = "cuda")]
            Waiting::Out(parked) => match &self.gpu {
                Some(gpu) => On::Way(gpu.start(parked)?),
                None => {
                    candle_core::bail!("a tensor that was parked by a GPU is wanted on {:?}", self.device)
                }
            },
        }))
    }
}

impl Arriving {
    /// The tensor; work that is queued from now on waits for the copy.
    ///
    /// # Errors
    /// When the device fails.
    pub fn take(self) -> Result<Tensor> {
        match self.0 {
            On::There(x) => Ok(x),
            #[cfg(feature = "cuda")]
            On::Way(fetched) => fetched.take(),
        }
    }
}
