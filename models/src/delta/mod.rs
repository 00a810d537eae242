//! The change of a layer's weight by an adapter: as in files ([`Change`]), on a device with its backward ([`Delta`]), and by
//! module name ([`Adapters`]).

mod change;
mod on_device;
mod set;

use serde::{Deserialize, Serialize};

pub use change::{Change, DoraPair, LoraPair, Magnitude};
pub use on_device::{Backward, Delta, Site};
pub use set::{Adapter, Adapters};

/// The kind of an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AdapterKind {
    /// Two low-rank factors.
    Lora,
    /// Two low-rank factors, and a magnitude for each row of the weight.
    Dora,
    /// Two products of low-rank factors, multiplied elementwise.
    Loha,
    /// A Kronecker product.
    Lokr,
}

impl AdapterKind {
    /// Its usual spelling.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lora => "LoRA",
            Self::Dora => "DoRA",
            Self::Loha => "LoHa",
            Self::Lokr => "LoKr",
        }
    }
}
