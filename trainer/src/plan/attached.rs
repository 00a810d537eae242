//! The adapters of clips, as shadows.

use kernels::Device;
use models::adapter::{Adapter, Adapters, LoraConfig, Target};
use models::dit::DitConfig;
use models::expert::Expert;

use super::SamplePlan;
use crate::adapters::look_at;
use crate::error::Result;

/// For each network that clips go through, shadows of the adapters that `sample` puts to it, by the headers of their files.
///
/// # Errors
/// A file that is no adapter.
pub(super) fn attached(sample: &SamplePlan, experts: &[Expert], dit: &DitConfig) -> Result<Vec<Adapters>> {
    let networks = match experts {
        [] => vec![None],
        experts => experts.iter().copied().map(Some).collect(),
    };
    let adaptable: Vec<String> = dit.adaptable_modules().into_iter().map(|(module, ..)| module).collect();
    let mut all = Vec::new();
    for expert in networks {
        let mut adapters = Adapters::default();
        for plan in sample.adapters_of(expert) {
            for (module, held) in look_at(&plan.path)?.modules {
                let (Some(kind), true) = (held.kind, adaptable.contains(&module)) else { continue };
                let target = Target { module, out: held.output, input: held.input };
                let config = LoraConfig { kind, rank: Some(held.rank.max(1)), ..LoraConfig::default() };
                let fresh = Adapters::fresh(&[target], &config, 0, &Device::shadow_cpu(None))?;
                for (module, fresh) in fresh.iter() {
                    let frozen = fresh.iter().map(|adapter| Adapter::frozen(adapter.delta().clone()));
                    frozen.for_each(|adapter| adapters.attach(module.to_owned(), adapter));
                }
            }
        }
        all.push(adapters);
    }
    all.dedup_by(|a, b| a.iter().next().is_none() && b.iter().next().is_none());
    Ok(all)
}
