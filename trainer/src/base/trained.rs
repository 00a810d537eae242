//! Which of two experts a run trains, and the noise levels of each network of a run.

use models::dit::DitConfig;
use models::expert::{Expert, Networks};
use serde::{Deserialize, Serialize};

use super::{BaseModel, DitFiles, Dits};
use crate::error::{Error, Result};
use crate::learning::NoiseRange;

/// What a run trains of a model of two experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Trained {
    /// The expert for high noise.
    High,
    /// The expert for low noise.
    Low,
    /// Both, an adapter each.
    Both,
}

impl Trained {
    /// The single expert; `None` for both.
    pub fn one(self) -> Option<Expert> {
        match self {
            Self::High => Some(Expert::High),
            Self::Low => Some(Expert::Low),
            Self::Both => None,
        }
    }

    /// As recipes write it.
    pub fn name(self) -> &'static str {
        self.one().map_or("both", Expert::name)
    }
}

impl From<Expert> for Trained {
    fn from(expert: Expert) -> Self {
        match expert {
            Expert::High => Self::High,
            Expert::Low => Self::Low,
        }
    }
}

impl BaseModel {
    /// The experts that are trained, in the order in which sampling uses them; none for a model of one network.
    pub fn trained_experts(&self) -> &'static [Expert] {
        match self.expert {
            None => &[],
            Some(Trained::High) => &[Expert::High],
            Some(Trained::Low) => &[Expert::Low],
            Some(Trained::Both) => &Expert::ALL,
        }
    }

    /// The DiT that is trained; of two that are, the one for high noise.
    ///
    /// # Errors
    /// If there are two, and the recipe does not say which.
    pub fn trained_dit(&self) -> Result<&DitFiles> {
        match (&self.dits, self.expert) {
            (Dits::Experts { high, low }, None) => {
                Err(Error::TwoExperts { high: high.weights.clone(), low: low.weights.clone() })
            }
            _ => Ok(self.dits.of(self.trained_experts().first().copied().unwrap_or(Expert::High))),
        }
    }

    /// The sigma from which up the expert for high noise is used, for experts with the sizes `dit`.
    pub fn boundary_of(&self, dit: &DitConfig) -> f64 {
        self.boundary.unwrap_or(dit.defaults(Networks::Pair).boundary)
    }

    /// The noise range of the network of `expert`.
    pub fn noise_range_of(&self, expert: Option<Expert>, dit: &DitConfig) -> NoiseRange {
        expert.map_or(NoiseRange::All, |expert| NoiseRange::Of { expert, boundary: self.boundary_of(dit) })
    }

    /// The sigma at which sampling changes from one expert to the other; `None` with one network.
    pub fn clip_boundary(&self, dit: &DitConfig) -> Option<f64> {
        (self.dits.networks() == Networks::Pair).then(|| self.boundary_of(dit))
    }

    /// The noise ranges of the networks that sample clips, in order: both experts if both are available, also if one is trained.
    pub fn clip_ranges(&self, dit: &DitConfig) -> Vec<NoiseRange> {
        match self.dits.networks() {
            Networks::Pair => Expert::ALL.map(|expert| self.noise_range_of(Some(expert), dit)).to_vec(),
            Networks::Whole => vec![NoiseRange::All],
        }
    }

    /// If both experts are trained, checks that there are two, of the same sizes, and not the same network twice.
    ///
    /// # Errors
    /// What is wrong, and the keys that correct it.
    pub fn check_experts(&self) -> Result<()> {
        let refuse = |why: String| Err(Error::Setting { key: "model.expert".into(), why });
        let Some((high, low)) = self.dits.experts() else {
            return match self.expert {
                Some(Trained::Both) => refuse(format!(
                    "\"both\" needs two experts, and there is one DiT, {}: name both with model.dit_high and \
                     model.dit_low, or the folder of both with model.folder",
                    self.dits.of(Expert::High).weights.display()
                )),
                _ => Ok(()),
            };
        };
        let ((one, of_high), (other, of_low)) = (high.open()?, low.open()?);
        if one != other {
            return refuse(format!(
                "{} and {} are networks of different sizes, so they are not experts of one model",
                high.weights.display(),
                low.weights.display()
            ));
        }
        if of_high.fingerprint()? == of_low.fingerprint()? {
            return refuse(format!(
                "{} and {} have the same weights: one of them is given twice",
                high.weights.display(),
                low.weights.display()
            ));
        }
        Ok(())
    }
}
