//! What an adapter adds to the weight of a layer: as files hold it ([`Change`]), on a device with its backward ([`Delta`]), and
//! by module name ([`Adapters`]).

mod change;
mod on_device;
mod set;

use serde::{Deserialize, Serialize};

pub use change::{Change, DoraPair, LoraPair, Magnitude};
pub use on_device::{Backward, Delta, Site};
pub use set::{Adapter, Adapters};

/// What an adapter is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Two thin factors.
    Lora,
    /// Two thin factors, and a length for each row of the weight.
    Dora,
    /// Two products of thin factors, multiplied number by number.
    Loha,
    /// A Kronecker product.
    Lokr,
}

impl Kind {
    /// What people call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lora => "LoRA",
            Self::Dora => "DoRA",
            Self::Loha => "LoHa",
            Self::Lokr => "LoKr",
        }
    }
}
