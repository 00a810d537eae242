//! Training learns: a few hundred steps on one clip, from its file to the optimiser, and the model knows the clip.

use data::Cursor;
use kernels::Device;
use models::adapter::Adapters;
use models::dit::BlockPlan;
use proofs::project::Project;
use proofs::small::{config, open_weights, pipeline, uniform};
use trainer::learning::NoiseRange;
use trainer::learning::lr::{Curve, Rates, WarmUp};
use trainer::learning::optim::{AdamW, Optimizer, Rule, Step, checked_norm, clip_factor};
use trainer::pipeline::Pipeline;
use trainer::plan::Plan;
use trainer::train;
use trainer::train::batch::Batches;
use trainer::watch::interrupt::Interrupt;
use trainer::watch::ui::{Ui, Voice};

/// The mean squared error at the nine sigmas of the held-out loss, with the noise fixed; and that of an answer of zero.
fn held_out_loss(batches: &Batches, pipeline: &Pipeline) -> (f64, f64) {
    let samples: Vec<_> = batches.held_out(NoiseRange::All).map(|sample| sample.unwrap().batch).collect();
    let (mut loss, mut of_zero) = (0.0, 0.0);
    for sample in &samples {
        let velocity = pipeline.predict(std::slice::from_ref(&sample.input)).unwrap().remove(0);
        let velocity = velocity.to_device(&Device::Cpu).unwrap();
        let mean_square = |t: kernels::Tensor| {
            f64::from(t.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap()) / samples.len() as f64
        };
        loss += mean_square((velocity - &sample.target).unwrap());
        of_zero += mean_square(sample.target.clone());
    }
    (loss, of_zero)
}

/// The same clip is in the folder twice: one is trained, the other held out to measure on.
#[test]
fn a_few_hundred_steps_learn_a_clip() {
    const RULE: Rule = Rule::AdamW(AdamW { betas: [0.9, 0.99], eps: 1e-8, weight_decay: 0.0 });
    const STEPS: u64 = 400;
    let settings =
        "held_out = [\"twin*\"]\nrepeats = { \"clip*\" = 8 }\n[adapter]\nrank = 32\n[train]\nbatch = 8\n";
    let project = Project::new(&proofs::fixture(""), &["a drifting wave"], settings);
    for kind in ["webp", "txt"] {
        let clip = |name: &str| project.clips().join(format!("{name}.{kind}"));
        std::fs::copy(clip("clip00"), clip("twin")).unwrap();
    }
    let planned = Plan::make(&project.recipe(), &mut |_, _| {}).unwrap();
    let encoded = train::cache(&planned, &Interrupt::default(), &Ui::new(Voice::Json)).unwrap();
    let batches = Batches::new(&planned.plan, &planned.dataset, &encoded).unwrap();

    let dit = config(2, 128);
    let targets = planned.plan.adapter.select(&dit.adaptable_modules()).unwrap();
    let fresh = Adapters::fresh(&targets, &planned.plan.adapter, 1, &proofs::device()).unwrap();
    let mut pipeline = pipeline(&dit, &open_weights(&dit), &fresh, &[1, 1]);
    let mut optimizer = Optimizer::new(&pipeline, RULE).unwrap();
    let (before, of_zero) = held_out_loss(&batches, &pipeline);
    let (mut cursor, plans) = (Cursor::default(), uniform(&pipeline, BlockPlan::default()));
    let cosine = Curve::Cosine { floor: 0.0, cycles: 1 };
    let rates = Rates { peak: 1e-2, steps: STEPS, warmup: WarmUp::above_zero(10), curve: cosine };
    for step in 0..STEPS {
        let data = batches.step(step, cursor, 1).unwrap();
        cursor = data.cursor;
        let gradients = pipeline.train(&data.micro_batches, &plans).unwrap().gradients;
        let norm = checked_norm(&gradients, optimizer.states().keys()).unwrap();
        let lr = rates.at(step);
        let step = Step { lr, factor: clip_factor(norm, 1.0), number: step + 1 };
        optimizer.update(&gradients, &step).unwrap();
        optimizer.publish(&mut pipeline);
    }
    let (after, _) = held_out_loss(&batches, &pipeline);
    assert!(after < before / 4.0, "the loss went from {before:.3} to {after:.3} only");
    assert!(after < of_zero / 3.0, "{after:.3}, where an answer of zero has {of_zero:.3}");
}
