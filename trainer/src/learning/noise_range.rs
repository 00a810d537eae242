//! Which of the noise levels a network makes.

use models::expert::Expert;

use super::noise::EVAL_SIGMAS;

/// The noise levels that a network makes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum NoiseRange {
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

impl NoiseRange {
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

    /// The expert, where the network is one.
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

    /// The nine sigmas of its held-out loss, evenly between its ends.
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
