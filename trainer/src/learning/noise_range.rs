//! The noise levels that a network is for.

use models::expert::Expert;

use super::noise::EVAL_SIGMAS;

/// The noise levels that a network is for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum NoiseRange {
    /// All, in a model of one network.
    All,
    /// The part of one of two experts, divided at the sigma `boundary`.
    Of {
        /// Which.
        expert: Expert,
        /// The expert for high noise is for sigmas from here up.
        boundary: f64,
    },
}

impl NoiseRange {
    /// Whether the network is for the step at `timestep`, in 0..1000.
    pub fn holds(self, timestep: f32) -> bool {
        match self {
            Self::All => true,
            Self::Of { expert, boundary } => {
                let is_high = f64::from(timestep) >= boundary * 1000.0;
                is_high == (expert == Expert::High)
            }
        }
    }

    /// The expert, if the network is one.
    pub fn expert(self) -> Option<Expert> {
        match self {
            Self::All => None,
            Self::Of { expert, .. } => Some(expert),
        }
    }

    /// The smallest and the largest sigma. The boundary belongs to the expert for high noise.
    pub fn sigmas(self) -> [f64; 2] {
        match self {
            Self::All => [0.0, 1.0],
            Self::Of { expert: Expert::High, boundary } => [boundary, 1.0],
            Self::Of { expert: Expert::Low, boundary } => [0.0, boundary.next_down()],
        }
    }

    /// The nine sigmas of its held-out loss, evenly spaced in the range.
    pub fn eval_sigmas(self) -> [f64; EVAL_SIGMAS.len()] {
        match self {
            Self::All => EVAL_SIGMAS,
            Self::Of { .. } => {
                let [low, high] = self.sigmas();
                EVAL_SIGMAS.map(|part| low + (high - low) * part)
            }
        }
    }
}
