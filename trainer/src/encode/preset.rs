//! Few-step sampling by preset: the grids and rules that distilled adapters were made for.
//!
//! Sources: ModelTC/LightX2V configs/distill and models/schedulers/wan/step_distill/scheduler.py; ModelTC/Wan2.2-Lightning
//! README and issue 3 of its LightX2V copy (eight steps); deepbeepmeep/Wan2GP profiles (CausVid, FusionX);
//! kijai/ComfyUI-WanVideoWrapper wanvideo/schedulers (CausVid's fixed list for 1.3B).

use serde::{Deserialize, Serialize};

use crate::encode::prompt::ClipRequest;
use crate::solver::SolverKind;

/// Settings for an adapter that was distilled to few steps. None uses a negative prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
#[value(rename_all = "kebab-case")]
pub enum Preset {
    /// Wan 2.1 T2V and I2V 14B with a LightX2V distill LoRA: 4 steps.
    #[serde(rename = "lightx2v-4")]
    #[value(name = "lightx2v-4")]
    Lightx2v4,
    /// The same as it was published first: it adds fresh noise at each step.
    #[serde(rename = "lightx2v-4-lcm")]
    #[value(name = "lightx2v-4-lcm")]
    Lightx2v4Lcm,
    /// Wan 2.2 A14B with a Lightning or distill LoRA for each expert: 2 + 2 steps.
    #[serde(rename = "lightning-4")]
    #[value(name = "lightning-4")]
    Lightning4,
    /// The same in 4 + 4 steps, which it was not trained for.
    #[serde(rename = "lightning-8")]
    #[value(name = "lightning-8")]
    Lightning8,
    /// Wan 2.1 14B with the CausVid LoRA at a strength of 0.5 to 0.7: 8 steps.
    #[serde(rename = "causvid-8")]
    #[value(name = "causvid-8")]
    CausVid8,
    /// Wan 2.1 1.3B with its CausVid LoRA: 4 steps on a fixed list.
    #[serde(rename = "causvid-1.3b-4")]
    #[value(name = "causvid-1.3b-4")]
    CausVidSmall4,
    /// Wan 2.1 14B with the FusionX LoRA: 8 steps.
    #[serde(rename = "fusionx-8")]
    #[value(name = "fusionx-8")]
    FusionX8,
}

/// The timesteps of CausVid's 1.3B, without a shift.
const CAUSVID_SMALL: [f32; 4] = [1000.0, 750.0, 500.0, 250.0];

/// What a preset sets.
struct Facts {
    steps: usize,
    shift: f64,
    solver: SolverKind,
    /// Steps of the expert for high noise, where it is for two.
    high_steps: Option<usize>,
    /// The adapters that it is for, as their files are called.
    adapters: &'static str,
}

impl Preset {
    fn facts(self) -> Facts {
        let of =
            |steps, shift, solver, high_steps, adapters| Facts { steps, shift, solver, high_steps, adapters };
        const DISTILL: &str =
            "lightx2v/Wan2.1-Distill-Loras: wan2.1_t2v_14b_lora_rank64_lightx2v_4step, or _i2v_";
        const LIGHTNING: &str =
            "lightx2v/Wan2.2-Lightning or lightx2v/Wan2.2-Distill-Loras: a file for each expert";
        match self {
            Self::Lightx2v4 => of(4, 5.0, SolverKind::Euler, None, DISTILL),
            Self::Lightx2v4Lcm => of(4, 5.0, SolverKind::Lcm, None, DISTILL),
            Self::Lightning4 => of(4, 5.0, SolverKind::Euler, Some(2), LIGHTNING),
            Self::Lightning8 => of(8, 5.0, SolverKind::Euler, Some(4), LIGHTNING),
            Self::CausVid8 => of(8, 7.0, SolverKind::UniPc, None, "Wan21_CausVid_14B_T2V_lora_rank32"),
            Self::CausVidSmall4 => {
                of(4, 1.0, SolverKind::Euler, None, "Wan21_CausVid_bidirect2_T2V_1_3B_lora_rank32")
            }
            Self::FusionX8 => of(8, 2.0, SolverKind::UniPc, None, "Wan2.1_T2V_14B_FusionX_LoRA, or _I2V_"),
        }
    }

    /// Whether it is for a model of two experts.
    pub fn is_for_experts(self) -> bool {
        self.facts().high_steps.is_some()
    }

    /// The adapters that it is for.
    pub fn adapters(self) -> &'static str {
        self.facts().adapters
    }

    /// `request` with what it sets.
    #[must_use]
    pub fn over(self, request: ClipRequest) -> ClipRequest {
        let Facts { steps, shift, solver, high_steps, .. } = self.facts();
        let timesteps = (self == Self::CausVidSmall4).then(|| CAUSVID_SMALL.to_vec());
        let (guidance, preset) = (1.0, Some(self));
        ClipRequest {
            steps,
            shift,
            solver,
            guidance,
            guidance_high: guidance,
            high_steps,
            timesteps,
            preset,
            ..request
        }
    }
}

/// What is to be known of a clip that is not what its model makes in all of its steps, of which `skipped` were skipped.
pub fn label(request: &ClipRequest, skipped: usize) -> Option<String> {
    let steps = request.steps;
    let distilled =
        request.preset.map(|_| format!("{steps} steps, distilled: motion is weaker than the model's own"));
    let cached = (skipped > 0).then(|| format!("MagCache: {} of {steps} steps computed", steps - skipped));
    let parts: Vec<String> = distilled.into_iter().chain(cached).collect();
    (!parts.is_empty()).then(|| parts.join("; "))
}
