//! Which of the steps of a clip a network makes.

use models::expert::Expert;

/// The noise levels that a network makes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Share {
    /// All of them: there is one network.
    All,
    /// Of two experts, that of one; the other begins, or ends, at the sigma `boundary`.
    Of {
        /// Which.
        expert: Expert,
        /// The one for high noise works from here on.
        boundary: f64,
    },
}

impl Share {
    /// Whether the step at `timestep`, in 0..1000, is the network's.
    pub fn holds(self, timestep: f32) -> bool {
        match self {
            Self::All => true,
            Self::Of { expert, boundary } => {
                let is_high = f64::from(timestep) >= boundary * 1000.0;
                is_high == (expert == Expert::High)
            }
        }
    }
}
