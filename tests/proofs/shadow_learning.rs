//! Every loss and every optimiser is forecast to the byte: the plan plays its own code.

use kernels::loss::{Penalty, Reduction};
use models::adapter::LoraConfig;
use proofs::small::config;
use trainer::learning::ema::EmaConfig;
use trainer::learning::optim::{NormLimit, OptimizerConfig, OptimizerKind};
use trainer::machine::forecast::{LossTask, Masks, SmallBatches, StagePlan, Task};

use crate::shadow::{PLANS, assert_shadow, taken, task};

#[test]
fn a_shadow_takes_the_same_of_every_loss() {
    let dit = config(2, 24);
    let targets = LoraConfig::default().select(&dit.adaptable_modules()).unwrap();
    // The loss is the largest part of a step whose blocks keep nothing and whose latents are large.
    let plain = Task { batch: 2, latents: (3, 16, 24), ..task(&dit, &targets) };
    for penalty in [Penalty::Squared, Penalty::Absolute, Penalty::Huber, Penalty::PseudoHuber] {
        for reduction in [Reduction::Elements, Reduction::Samples, Reduction::Batch] {
            let tasks =
                [(Masks::None, 0, 0), (Masks::Given, 0, 0), (Masks::None, 2, 2), (Masks::Given, 3, 0)];
            for (masks, of_base, guides) in tasks {
                let objective = LossTask { penalty, reduction, masks, of_base, guides };
                let task = Task { objective, ..plain.clone() };
                assert_shadow(&format!("{objective:?}"), &task, [PLANS[0], PLANS[0]], 5);
            }
        }
    }
}

/// A step that ends by its tokens may have many small clips beside a large one.
#[test]
fn a_shadow_takes_the_same_of_micro_batches_of_two_sizes() {
    let dit = config(2, 24);
    let targets = LoraConfig::default().select(&dit.adaptable_modules()).unwrap();
    let small = Some(SmallBatches { count: 4, latents: (1, 2, 4) });
    for of_base in [0, 1, 6] {
        let objective = LossTask { of_base, ..LossTask::default() };
        for accumulate in [1, 2] {
            let task = Task { small, accumulate, objective, ..task(&dit, &targets) };
            assert_shadow(&format!("{small:?}, {objective:?}"), &task, [PLANS[0], PLANS[2]], 5);
        }
    }
}

#[test]
fn a_shadow_takes_the_same_of_every_optimiser() {
    let dit = config(2, 24);
    let targets = LoraConfig::default().select(&dit.adaptable_modules()).unwrap();
    // The state and the update are most of it: many adapters on few tokens.
    let task = Task { rank: 16, latents: (1, 2, 2), ..task(&dit, &targets) };
    let stage = StagePlan { blocks: 0..2, keep: vec![PLANS[0]; 2], ffn_tokens: 5 };
    let averaged = EmaConfig { decay: 0.99, ..EmaConfig::default() };
    let limit = Some(NormLimit { most: 0.1, scale: 1.0 });
    for kind in [
        OptimizerKind::AdamW,
        OptimizerKind::AdamW8bit,
        OptimizerKind::Lion,
        OptimizerKind::Adafactor,
        OptimizerKind::ScheduleFree,
        OptimizerKind::Prodigy,
        OptimizerKind::Came,
        OptimizerKind::Muon,
    ] {
        let rule = OptimizerConfig { kind, ..OptimizerConfig::default() }.rule();
        for (ema, norm_limit) in
            [(EmaConfig::default(), None), (averaged, None), (EmaConfig::default(), limit)]
        {
            let task = Task { rule, ema, norm_limit, ..task.clone() };
            let [real, shadow] = [false, true].map(|is_shadow| taken(&task, &stage, [0, 1], is_shadow));
            assert_eq!(shadow, real, "{kind}, {ema:?}, {norm_limit:?}");
            // Prodigy makes no step of gradients that are all zeros, as those of a stage alone in the middle are.
            if kind != OptimizerKind::Prodigy {
                assert_shadow(&kind.to_string(), &task, [PLANS[0], PLANS[0]], 5);
            }
        }
        let bytes = |ema: EmaConfig| taken(&Task { rule, ema, ..task.clone() }, &stage, [0, 1], true).left;
        let parameters: usize = targets.iter().map(|target| 16 * (target.out + target.input)).sum();
        assert_eq!(bytes(averaged) - bytes(EmaConfig::default()), 4 * parameters as u64, "{kind}");
    }
}
