//! Learning rates of parts of an adapter, as factors of the run's.

use models::adapter::{AdapterKind, Target, names_module};
use models::expert::Expert;

use super::OptimizerConfig;
use crate::error::{Error, Result};
use crate::learning::patterns;

/// What the names of the second factor of a LoRA end with.
const SECOND_FACTOR: &str = ".lora_B.weight";

impl OptimizerConfig {
    /// What the learning rate of the tensor `name` in the adapter of `expert` is multiplied by.
    pub fn factor(&self, name: &str, expert: Option<Expert>) -> f64 {
        let of_expert = match expert {
            Some(Expert::High) => self.lr_high,
            Some(Expert::Low) => self.lr_low,
            None => None,
        };
        let lr = of_expert.unwrap_or(self.lr);
        let module = self.lr_by_module.iter().find(|(pattern, _)| names_module(pattern, module_of(name)));
        let lr = module.map_or(lr, |(_, own)| *own);
        let ratio = self.lr_b_ratio.filter(|_| name.ends_with(SECOND_FACTOR)).unwrap_or(1.0);
        match (lr == self.lr, ratio) {
            (true, ratio) => ratio,
            (false, ratio) => lr / self.lr * ratio,
        }
    }

    /// Whether tensors may have rates of their own.
    pub(super) fn has_groups(&self) -> bool {
        let of_expert = self.lr_high.is_some() || self.lr_low.is_some();
        of_expert || !self.lr_by_module.is_empty() || self.lr_b_ratio.is_some()
    }

    /// The key of the first of the groups.
    pub(super) fn first_group(&self) -> &'static str {
        match self {
            Self { lr_b_ratio: Some(_), .. } => "lr_b_ratio",
            Self { lr_high: Some(_), .. } => "lr_high",
            Self { lr_low: Some(_), .. } => "lr_low",
            _ => "lr_by_module",
        }
    }

    /// Checks the groups against what is trained: the adapters of `kind` of `targets`, of the experts `trained`.
    ///
    /// # Errors
    /// A pattern that names nothing that is trained, two that name one module, and keys that are for other adapters or models.
    pub fn check_groups(&self, kind: AdapterKind, targets: &[Target], trained: &[Expert]) -> Result<()> {
        let refuse = |key: &str, why: String| Err(Error::Setting { key: format!("optimizer.{key}"), why });
        let is_lora = matches!(kind, AdapterKind::Lora | AdapterKind::Dora);
        if self.lr_b_ratio.is_some() && !is_lora {
            return refuse("lr_b_ratio", "only LoRA and DoRA have a matrix B: leave it out".into());
        }
        if self.norm_limit.is_some() && kind != AdapterKind::Lora {
            return refuse("norm_limit", "only the change of a LoRA is limited: leave it out".into());
        }
        for (key, rate, expert) in
            [("lr_high", self.lr_high, Expert::High), ("lr_low", self.lr_low, Expert::Low)]
        {
            if rate.is_some() && !trained.contains(&expert) {
                return refuse(key, format!("no expert for {expert} noise is trained: leave it out"));
            }
        }
        patterns::check("optimizer.lr_by_module", self.lr_by_module.keys(), targets, "rate")
    }
}

/// The module of the tensor `name`.
fn module_of(name: &str) -> &str {
    let ends = [".lora_", ".magnitude", ".hada_", ".lokr_"];
    ends.iter().find_map(|end| name.rfind(end)).map_or(name, |end| &name[..end])
}
