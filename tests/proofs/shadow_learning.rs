//! Every loss and every optimiser is forecast to the byte: the plan plays its own code.

use kernels::loss::{Penalty, Reduction};
use models::adapter::LoraConfig;
use proofs::small::config;
use trainer::learning::optim::{OptimizerConfig, OptimizerKind};
use trainer::machine::forecast::{LossTask, Masks, Task};

use crate::shadow::{PLANS, assert_shadow, task};

#[test]
fn a_shadow_takes_the_same_of_every_loss() {
    let dit = config(2, 24);
    let targets = LoraConfig::default().select(&dit.adaptable_modules()).unwrap();
    // The loss is the largest part of a step whose blocks keep nothing and whose latents are large.
    let plain = Task { batch: 2, latents: (3, 16, 24), ..task(&dit, &targets) };
    for penalty in [Penalty::Squared, Penalty::Absolute, Penalty::Huber, Penalty::PseudoHuber] {
        for reduction in [Reduction::Elements, Reduction::Samples, Reduction::Batch] {
            for masks in [Masks::None, Masks::Given] {
                let objective = LossTask { penalty, reduction, masks };
                let task = Task { objective, ..plain.clone() };
                assert_shadow(&format!("{objective:?}"), &task, [PLANS[0], PLANS[0]], 5);
            }
        }
    }
}

/// Prodigy is not among them: it makes no step of gradients that are all zeros, as they are on a stage that is played alone in the
/// middle.
#[test]
fn a_shadow_takes_the_same_of_every_optimiser() {
    let dit = config(2, 24);
    let targets = LoraConfig::default().select(&dit.adaptable_modules()).unwrap();
    for kind in [
        OptimizerKind::AdamW,
        OptimizerKind::AdamW8bit,
        OptimizerKind::Lion,
        OptimizerKind::Adafactor,
        OptimizerKind::ScheduleFree,
        OptimizerKind::Came,
        OptimizerKind::Muon,
    ] {
        let rule = OptimizerConfig { kind, ..OptimizerConfig::default() }.rule();
        // The state and the update are most of it: many adapters on few tokens.
        let task = Task { rule, rank: 16, latents: (1, 2, 2), ..task(&dit, &targets) };
        assert_shadow(&kind.to_string(), &task, [PLANS[0], PLANS[0]], 5);
    }
}
