//! The limit of the norm of each module's change, as sd-scripts' `scale_weight_norms` has it.

use std::collections::BTreeMap;

use kernels::Result;
use kernels::optimiser::State;

/// What the names of the factors of a LoRA end with.
const FACTORS: [&str; 2] = [".lora_A.weight", ".lora_B.weight"];
/// Less than any norm that is near its limit.
const NOTHING: f64 = 1e-20;

/// The largest norm of a module's change.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NormLimit {
    /// Frobenius norm of the change that is added to the weight.
    pub most: f64,
    /// What the product of the factors is multiplied by, of modules without a scale of their own.
    pub scale: f64,
}

impl NormLimit {
    /// Scales both factors of each LoRA of `states` whose change has a larger norm, alike, so that it has this one. `scales` are those
    /// of modules that have their own.
    ///
    /// # Errors
    /// A device that fails.
    pub fn apply(self, states: &mut BTreeMap<String, State>, scales: &BTreeMap<String, f64>) -> Result<()> {
        let modules = states.keys().filter_map(|name| name.strip_suffix(FACTORS[0]).map(str::to_owned));
        for module in modules.collect::<Vec<_>>() {
            let names = FACTORS.map(|end| format!("{module}{end}"));
            let [Some(a), Some(b)] = [&names[0], &names[1]].map(|name| states.get(name)) else { continue };
            // |BA|^2 is the sum of the products of the Gram matrices: BA itself is as large as the weight.
            let (a, b) = (&a.parameter, &b.parameter);
            let of_a = a.matmul(&a.t()?.contiguous()?)?;
            let of_b = b.t()?.contiguous()?.matmul(b)?;
            let scale = scales.get(&module).copied().unwrap_or(self.scale).abs();
            let norm = ((of_a * of_b)?.sum_all()?.maximum(NOTHING)?.sqrt()? * scale)?;
            let factor = (norm.maximum(self.most)?.recip()? * self.most)?.sqrt()?;
            for name in names {
                if let Some(state) = states.get_mut(&name) {
                    state.parameter = state.parameter.broadcast_mul(&factor)?;
                }
            }
        }
        Ok(())
    }
}
