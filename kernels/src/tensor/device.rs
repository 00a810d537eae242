//! Devices: host memory, a GPU, and shadow devices, whose tensors have no numbers and are only counted.

use std::fmt;
use std::sync::Arc;

use candle_core::{DeviceLocation, Result};

use crate::ledger::{Allocation, Ledger};
use crate::settings::Repeatability;

/// The device of a tensor.
#[derive(Clone)]
pub enum Device {
    /// Host memory; tensors have numbers and are not counted.
    Cpu,
    /// A GPU that [`crate::device::open_gpu`] opened, host memory that is counted, or the shadow of either.
    Other(Other),
}

/// A device other than plain host memory. Two of them are the same device if one is a clone of the other.
#[derive(Clone)]
pub struct Other(pub(crate) Kind);

#[derive(Clone)]
pub(crate) enum Kind {
    #[cfg(feature = "cuda")]
    Card(Arc<crate::cuda::Card>),
    Space(Arc<Space>),
}

/// A memory whose tensors are counted, or are shadows, or both.
#[derive(Debug)]
pub(crate) struct Space {
    pub on: On,
    pub ledger: Option<Ledger>,
    /// The ledger of its pinned host memory.
    pub host: Option<Ledger>,
    /// What a library allocates for as long as the device is open.
    pub _workspace: Option<Allocation>,
}

/// The device that a [`Space`] imitates, and whether its tensors have numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum On {
    /// Real tensors in host memory.
    Cpu,
    /// Shadows of tensors in host memory.
    ShadowCpu,
    /// Shadows of tensors on a GPU.
    ShadowGpu(ShadowGpu),
}

/// A simulated GPU, with what decides which engines its operations use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShadowGpu {
    /// Its number, as in `cuda:0`.
    pub index: usize,
    /// What attention runs on.
    pub attention: ShadowAttention,
}

/// The engine of attention on a [`ShadowGpu`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShadowAttention {
    /// Chunks of matrix products.
    Chunked,
    /// cuDNN, if it supports the heads.
    Cudnn(Repeatability),
}

impl Device {
    /// Host memory whose real tensors are counted in `ledger`.
    pub fn counted_cpu(ledger: Ledger) -> Self {
        Self::space(On::Cpu, Some(ledger))
    }

    /// Host memory whose tensors are shadows, counted in `ledger` where there is one.
    pub fn shadow_cpu(ledger: Option<Ledger>) -> Self {
        Self::space(On::ShadowCpu, ledger)
    }

    /// The shadow of a GPU: its tensors are counted in `ledger`, its pinned host memory in `host`.
    pub fn shadow_gpu(gpu: ShadowGpu, ledger: Ledger, host: Ledger) -> Self {
        let _workspace = Some(ledger.take_as("workspace", crate::settings::PRODUCT_WORKSPACE as u64));
        let (ledger, host) = (Some(ledger), Some(host));
        let space = Space { on: On::ShadowGpu(gpu), ledger, host, _workspace };
        Self::Other(Other(Kind::Space(Arc::new(space))))
    }

    fn space(on: On, ledger: Option<Ledger>) -> Self {
        Self::Other(Other(Kind::Space(Arc::new(Space { on, ledger, host: None, _workspace: None }))))
    }

    /// Whether tensors are in host memory, or the shadows of such.
    pub fn is_cpu(&self) -> bool {
        match self {
            Self::Cpu => true,
            Self::Other(Other(Kind::Space(space))) => matches!(space.on, On::Cpu | On::ShadowCpu),
            #[cfg(feature = "cuda")]
            Self::Other(Other(Kind::Card(_))) => false,
        }
    }

    /// Whether tensors are on a GPU, or the shadows of such.
    pub fn is_cuda(&self) -> bool {
        !self.is_cpu()
    }

    /// Whether tensors have no numbers.
    pub fn is_shadow(&self) -> bool {
        matches!(self, Self::Other(Other(Kind::Space(space))) if space.on != On::Cpu)
    }

    /// Whether both are one device. Memories with different ledgers are different devices.
    pub fn same_device(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Cpu, Self::Cpu) => true,
            (Self::Other(Other(Kind::Space(a))), Self::Other(Other(Kind::Space(b)))) => Arc::ptr_eq(a, b),
            #[cfg(feature = "cuda")]
            (Self::Other(Other(Kind::Card(a))), Self::Other(Other(Kind::Card(b)))) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }

    /// The physical device, or the one that it is the shadow of.
    pub fn location(&self) -> DeviceLocation {
        match self {
            Self::Cpu => DeviceLocation::Cpu,
            Self::Other(Other(Kind::Space(space))) => match space.on {
                On::Cpu | On::ShadowCpu => DeviceLocation::Cpu,
                On::ShadowGpu(gpu) => DeviceLocation::Cuda { gpu_id: gpu.index },
            },
            #[cfg(feature = "cuda")]
            Self::Other(Other(Kind::Card(card))) => DeviceLocation::Cuda { gpu_id: card.context.ordinal() },
        }
    }

    /// Waits until everything queued on the device has run.
    ///
    /// # Errors
    /// When the device failed.
    pub fn synchronize(&self) -> Result<()> {
        self.candle().map_or(Ok(()), |device| device.synchronize())
    }

    /// The ledger of its tensors, if they are counted.
    pub fn ledger(&self) -> Option<&Ledger> {
        match self {
            Self::Other(Other(Kind::Space(space))) => space.ledger.as_ref(),
            _ => None,
        }
    }

    /// The ledger of the pinned host memory of a shadow GPU.
    pub fn host_ledger(&self) -> Option<&Ledger> {
        match self {
            Self::Other(Other(Kind::Space(space))) => space.host.as_ref(),
            _ => None,
        }
    }

    /// The GPU whose shadow this is.
    pub(crate) fn as_shadow_gpu(&self) -> Option<ShadowGpu> {
        match self {
            Self::Other(Other(Kind::Space(space))) => match space.on {
                On::ShadowGpu(gpu) => Some(gpu),
                _ => None,
            },
            _ => None,
        }
    }

    /// The GPU that this is.
    #[cfg(feature = "cuda")]
    pub(crate) fn card(&self) -> Option<&Arc<crate::cuda::Card>> {
        match self {
            Self::Other(Other(Kind::Card(card))) => Some(card),
            _ => None,
        }
    }

    /// candle's device of real tensors; `None` for shadows.
    pub(crate) fn candle(&self) -> Option<candle_core::Device> {
        match self {
            Self::Other(Other(Kind::Space(space))) if space.on != On::Cpu => None,
            Self::Cpu | Self::Other(Other(Kind::Space(_))) => Some(candle_core::Device::Cpu),
            #[cfg(feature = "cuda")]
            Self::Other(Other(Kind::Card(card))) => Some(candle_core::Device::Cuda(card.device.clone())),
        }
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("Cpu"),
            Self::Other(Other(Kind::Space(space))) => write!(f, "{:?}", space.on),
            #[cfg(feature = "cuda")]
            Self::Other(Other(Kind::Card(card))) => write!(f, "Gpu({})", card.context.ordinal()),
        }
    }
}

impl fmt::Debug for Other {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Device::Other(self.clone()).fmt(f)
    }
}
