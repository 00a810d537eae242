//! A stage of a training step, or of calls without a backward, that is played alone: the model's own code on tensors that
//! are counted.
//!
//! On shadows it allocates nothing and says what the work would. On real tensors in counted host memory the same code says
//! what it did allocate; a proof holds the two together to the byte.

use std::cell::RefCell;
use std::ops::Range;

use kernels::ledger::{Label, Ledger, Trace};
use kernels::optimiser::square_sums;
use kernels::random::Key;
use kernels::transfer::{HostStore, Route};
use kernels::{DType, Device, Tensor};
use models::adapter::{Adapters, Target};
use models::dit::speech::PAST;
use models::dit::{BlockPlan, Boundary, Dropout, Gradients, LayerId, NetworkInput, Plans, Role};
use models::weights::Weights;

use super::calls::{Calls, ClipShape, Residuals, Sink, Source};
use super::memo::Memo;
use super::task::{Masks, Task};
use crate::error::Result;
use crate::learning::optim::{Optimizer, Step};
use crate::pipeline::alone::{self, Neighbours};
use crate::pipeline::schedule::one_f_one_b;
use crate::pipeline::{
    Blocks, Guide, Made, MicroBatch, Objective, ParkedStage, Stage, StepOutcome, calls_of, run_all,
    with_entry,
};
use crate::replicas::nccl::{Pretended, sum_on_device};

/// Micro-batches that are played beyond those in flight: from then on a stage does the same again and again.
const BEYOND: usize = 1;
/// The most calls of a clip for a solver step.
const HALVES: usize = 2;
/// A timestep: its value allocates nothing.
const TIMESTEP: f32 = 500.0;
/// An update: its values allocate nothing.
const UPDATE: Step = Step { lr: 1e-4, factor: 1.0, number: 1 };

/// Where a stage is played.
#[derive(Debug, Clone)]
pub struct Scene {
    /// Which stage it is.
    pub index: usize,
    /// How many there are.
    pub count: usize,
    /// The device of the stage.
    pub own: Device,
    /// That of the stage before, and how tensors go there.
    pub previous: Option<(Device, Route)>,
    /// That of the stage behind.
    pub next: Option<(Device, Route)>,
    /// Where micro-batches come from.
    pub host: Device,
}

/// A stage with its part of the optimiser, and what goes through it.
#[derive(Debug)]
pub struct Rehearsal {
    scene: Scene,
    stage: Stage,
    optimizer: Optimizer,
    /// The update on shadows, which is the same after every step.
    update: Option<Trace>,
    batches: Vec<MicroBatch>,
    boundary: Boundary,
    /// Replicas that exchange gradients.
    replicas: usize,
}

impl Rehearsal {
    /// The stage of the `blocks` of `task`'s model, with `weights` of it.
    ///
    /// # Errors
    /// Those of the model's own code: sizes that it does not take.
    pub fn new(task: &Task, weights: &Weights, blocks: Range<usize>, scene: Scene) -> Result<Self> {
        let label = |label| scene.own.ledger().map(|ledger| ledger.set_label(label));
        label("adapters");
        let adapters = adapters(task, &blocks, &scene.own)?;
        label("weights");
        let mut stage = Stage::load(weights, task.dit.clone(), blocks, &adapters, task.base, &scene.own)?;
        label("adapters");
        drop(adapters);
        let optimizer = Optimizer::of(std::slice::from_ref(&stage), task.rule)?;
        let optimizer = optimizer.averaged(task.ema)?.limited(task.norm_limit);
        optimizer.publish_to(std::slice::from_mut(&mut stage));
        let batches = micro_batches(task, &scene)?;
        let boundary = boundary(task, weights, &scene)?;
        let replicas = task.replicas;
        Ok(Self { scene, stage, optimizer, update: None, batches, boundary, replicas })
    }

    /// Consecutive stages as one at `scene`, on the device of `parts[own]`, for calls without a backward.
    ///
    /// # Errors
    /// Those of the model's own code.
    pub fn joined(
        task: &Task,
        weights: &Weights,
        (parts, own): (&[&Self], usize),
        scene: Scene,
    ) -> Result<Self> {
        if let Some(ledger) = scene.own.ledger() {
            ledger.set_label("weights");
        }
        let stages: Vec<&Stage> = parts.iter().map(|part| &part.stage).collect();
        let stage = Stage::joined(&stages, own, Route::default())?;
        let optimizer = Optimizer::of(&[], task.rule)?;
        let batches = parts[own].batches.clone(); // `Stage::joined` refuses an index beyond them
        let boundary = boundary(task, weights, &scene)?;
        Ok(Self { scene, stage, optimizer, update: None, batches, boundary, replicas: 1 })
    }

    /// The device of the stage.
    pub(super) fn device(&self) -> &Device {
        &self.scene.own
    }

    /// Puts `adapters` to the stage that are applied and not trained.
    ///
    /// # Errors
    /// Adapters of modules that its layers do not have.
    pub fn attach(&mut self, adapters: &Adapters) -> Result<()> {
        self.stage.attach(adapters)
    }

    /// Lets the stage's layers, which are shadows, be played by what `memo` knows of those like them.
    pub(super) fn remember(&mut self, memo: &Memo) {
        memo.remember(&mut self.stage);
    }

    /// Takes the matrices of the stage off its device, into `store`.
    ///
    /// # Errors
    /// As [`ParkedStage::rest`].
    pub(super) fn rest(&mut self, store: &HostStore) -> Result<ParkedStage> {
        self.label("weights");
        ParkedStage::rest(store, &mut self.stage)
    }

    /// Puts the matrices of the stage back.
    ///
    /// # Errors
    /// As [`ParkedStage::wake`].
    pub(super) fn wake(&mut self, parked: ParkedStage) -> Result<()> {
        parked.wake(&mut self.stage)?;
        self.relabel_matrices();
        Ok(())
    }

    /// Takes the matrices of `leaving` off the device and puts those of this stage, which are `parked`, back.
    ///
    /// # Errors
    /// As [`ParkedStage::exchange`].
    pub(super) fn take_turn(
        &mut self,
        leaving: &mut Self,
        store: &HostStore,
        parked: ParkedStage,
    ) -> Result<ParkedStage> {
        self.label("weights");
        let parked = parked.exchange(store, &mut leaving.stage, &mut self.stage)?;
        self.relabel_matrices();
        Ok(parked)
    }

    /// Counts matrices that came back as weights again.
    fn relabel_matrices(&mut self) {
        let matrices = self.stage.dit.layers.iter_mut().flat_map(|layer| layer.matrices_mut());
        matrices.for_each(|matrix| matrix.relabel("weights"));
    }

    fn label(&self, label: Label) {
        if let Some(ledger) = self.scene.own.ledger() {
            ledger.set_label(label);
        }
    }

    /// Plays the stage's part of a step, as far as anything in it is new, with its blocks treated as `keep` and at most
    /// `ffn_tokens` tokens in a feed-forward layer, and its update. The ledgers of its device start their peaks anew.
    ///
    /// # Errors
    /// Those of the model's own code.
    pub fn step(&mut self, keep: &[BlockPlan], ffn_tokens: usize) -> Result<()> {
        self.stage.set_ffn_tokens(ffn_tokens);
        let dit = &self.stage.dit;
        let planned = dit.range.clone().zip(keep);
        let layers = planned.flat_map(|(n, plan)| {
            dit.architecture().layers(n).into_iter().map(move |id: LayerId| (id, *plan))
        });
        let plans: Plans = layers.collect();
        self.reset_peaks();
        let Scene { index, count, .. } = self.scene;
        let played = self.batches.len().min(count - index + BEYOND);
        let ops = &one_f_one_b(count, played)[index];
        let batches = self.with_base_targets()?;
        let outcome = alone::play(&self.stage, self.neighbours(), &batches, &plans, ops)?;
        drop(batches);
        self.label("adapters");
        match (&self.update, self.scene.own.ledger()) {
            (Some(update), Some(ledger)) => ledger.replay(update),
            (None, Some(ledger)) if self.scene.own.is_shadow() => {
                let ledger = ledger.clone();
                let (updated, trace) = ledger.traced(|| self.updated(&outcome));
                updated?;
                self.update = Some(trace);
            }
            _ => self.updated(&outcome)?,
        }
        Ok(())
    }

    /// The micro-batches, with targets that the base predicts, as far as its calls are new.
    fn with_base_targets(&mut self) -> Result<Vec<MicroBatch>> {
        let mut batches = self.batches.clone();
        let of_base = batches.iter().filter(|batch| batch.objective.of_base.is_some()).count();
        if of_base == 0 {
            return Ok(batches);
        }
        let Scene { index, count, own, .. } = &self.scene;
        let played = of_base.min(count + BEYOND);
        let (mut made, mut held) = (Made::default(), Vec::new());
        self.label("micro-batches");
        if self.stage.dit.head.is_some() {
            // What more calls would have left.
            let more = batches[played..of_base].iter();
            let zeros = |batch: &MicroBatch| Tensor::zeros(batch.target.shape(), DType::F32, own);
            held = more.map(zeros).collect::<kernels::Result<_>>()?;
        }
        self.label("activations");
        let (all, calls) = (self.stage.take_trained(), calls_of(&batches[..played]));
        let calls = alone::Calls {
            count: calls.len(),
            lanes: usize::MAX,
            input: |m: usize| Ok(calls[m].input(&batches)),
            output: |m: usize, velocity| made.take(&batches, calls[m], velocity),
            blocks: run_all,
        };
        let called = alone::call(&self.stage, self.neighbours(), [*index, *count], calls);
        self.stage.adapters = all;
        called?;
        batches
            .iter_mut()
            .zip(made.targets.into_iter().chain(held))
            .for_each(|(batch, target)| batch.target = target);
        Ok(batches)
    }

    /// The second half of a step: a look at the gradients, the optimiser, and the new parameters to the adapters.
    fn updated(&mut self, outcome: &StepOutcome) -> Result<()> {
        let sums = self.summed(&outcome.gradients)?;
        let all = sums.as_ref().unwrap_or(&outcome.gradients);
        let names = self.optimizer.states().keys();
        let gradients: Vec<&Tensor> = names.filter_map(|name| all.get(name)).collect();
        if !gradients.is_empty() {
            square_sums(&gradients)?;
        }
        self.optimizer.update(all, &UPDATE)?;
        self.optimizer.publish_to(std::slice::from_mut(&mut self.stage));
        Ok(())
    }

    /// The sums of the stage's `gradients` over all replicas, where there are several. The gradients themselves stay meanwhile,
    /// which a run frees a bucket at a time.
    fn summed(&self, gradients: &Gradients) -> Result<Option<Gradients>> {
        if self.replicas == 1 {
            return Ok(None);
        }
        let names: Vec<&String> =
            self.optimizer.states().keys().filter(|name| gradients.get(name).is_some()).collect();
        let own = names.iter().filter_map(|name| gradients.get(name).cloned()).collect();
        let mut sums = Gradients::default();
        let mover = Pretended { world: self.replicas };
        for (name, sum) in names.iter().zip(sum_on_device(own, self.replicas, &mover)?) {
            sums.add((*name).clone(), sum)?;
        }
        Ok(Some(sums))
    }

    /// Plays the stage's part of `calls`, as far as anything in it is new, with at most `ffn_tokens` tokens in a feed-forward
    /// layer. Samples are those of the task, clips of their own shapes; the largest one is that of the task. The ledgers of
    /// its device start their peaks anew.
    ///
    /// # Errors
    /// Those of the model's own code.
    pub fn calls(&mut self, calls: &Calls, ffn_tokens: usize) -> Result<()> {
        self.stage.set_ffn_tokens(ffn_tokens);
        self.reset_peaks();
        let (Scene { index, count, own, .. }, dit) = (&self.scene, &self.stage.dit);
        let label = |label| own.ledger().map(|ledger| ledger.set_label(label));
        label("clips");
        let sample = (&self.batches[0], dit.config.kind.facts()); // a task has a micro-batch
        let sink = dit.head.as_ref().map(|_| Sink::new(calls, sample, own)).transpose()?;
        let beside = if dit.embedder.is_some() { own } else { &self.scene.host };
        let is_alone = *count == 1;
        let mut source = Source::new(calls, sample.0, beside, sink.as_ref().filter(|_| is_alone))?;
        label("residual");
        let _held = self.residuals_of_others(calls)?;
        label("activations");
        let (sink, halves, residuals) = (RefCell::new(sink), calls.halves_of_first(), calls.clone());
        let calls = alone::Calls {
            // As many as may wait, those at work, and as many again as make a solver step.
            count: count + 1 + 2 * HALVES,
            lanes: calls.lanes(),
            input: |m| source.input(m, sink.borrow().as_ref().filter(|_| is_alone)),
            output: |_, velocity| sink.borrow_mut().as_mut().map_or(Ok(()), |sink| sink.take(velocity)),
            blocks: |m| residuals.blocks(m % halves),
        };
        let boundary = match residuals.blocks(0) {
            Blocks::Measure { .. } => {
                let Boundary { streams, cond } = self.boundary.clone();
                Boundary { streams: with_entry(streams), cond }
            }
            _ => self.boundary.clone(),
        };
        let around = Neighbours { boundary: &boundary, ..self.neighbours() };
        alone::call(&self.stage, around, [*index, *count], calls)
    }

    /// What clips other than the largest, whose calls are played, keep of their blocks meanwhile.
    fn residuals_of_others(&self, calls: &Calls) -> Result<Vec<Tensor>> {
        let Calls::Clips(clips) = calls else { return Ok(Vec::new()) };
        let config = &self.stage.dit.config;
        let others = clips.iter().skip(1).filter(|clip| clip.residuals == Residuals::Kept);
        let of = |clip: &ClipShape| {
            let (frames, height, width) = clip.latents;
            let cond = &self.batches[0].input.cond; // a task has a micro-batch
            let past = if cond.get(PAST).is_some() { config.tokens_of_past(height, width) } else { 0 };
            let shape = (1, config.tokens(frames, height, width) + past, config.dim);
            let residual = || Tensor::zeros(shape, self.stage.compute(), &self.scene.own);
            (0..clip.halves).map(|_| Ok(residual()?)).collect::<Result<Vec<_>>>()
        };
        Ok(others.map(of).collect::<Result<Vec<_>>>()?.concat())
    }

    fn neighbours(&self) -> Neighbours<'_> {
        let Scene { previous, next, .. } = &self.scene;
        Neighbours {
            previous: previous.as_ref().map(|(device, route)| (device, *route)),
            next: next.as_ref().map(|(device, route)| (device, *route)),
            boundary: &self.boundary,
        }
    }

    fn reset_peaks(&self) {
        let own = &self.scene.own;
        [own.ledger(), own.host_ledger()].into_iter().flatten().for_each(Ledger::reset_peak);
    }
}

/// What crosses the boundary before a stage at `scene`. What the stage before hands over is on its device; a stage without one
/// hands on what is as large.
fn boundary(task: &Task, weights: &Weights, scene: &Scene) -> Result<Boundary> {
    let beside = scene.previous.as_ref().map_or(&scene.host, |(device, _)| device);
    let embedder = task.dit.load_embedding(weights, task.base, beside)?;
    Ok(embedder.embed(&micro_batch(task, 0, &scene.host)?.input.to_device(beside)?)?)
}

/// The fresh adapters of `blocks`.
fn adapters(task: &Task, blocks: &Range<usize>, device: &Device) -> Result<Adapters> {
    let ids: Vec<LayerId> = blocks.clone().flat_map(|n| task.dit.layers(n)).collect();
    let is_here = |target: &&Target| ids.iter().any(|id| id.local(&target.module).is_some());
    let targets: Vec<Target> = task.targets.iter().filter(is_here).cloned().collect();
    Ok(Adapters::fresh(&targets, &task.lora(), 0, device)?)
}

/// The share of the base's prediction in a target of `task`: of masks a number for each latent.
fn share_of_base(task: &Task, host: &Device) -> Result<Tensor> {
    let (frames, height, width) = match task.objective.masks {
        Masks::None => (1, 1, 1),
        Masks::Given => task.latents,
    };
    Ok(Tensor::ones((task.batch, 1, frames, height, width), DType::F32, host)?)
}

/// The micro-batches of a step of `task` on a stage at `scene`. Those that are played are of the largest clips; small ones are behind
/// them and wait.
fn micro_batches(task: &Task, scene: &Scene) -> Result<Vec<MicroBatch>> {
    let (count, latents) = task.small.map_or((0, task.latents), |small| (small.count, small.latents));
    let small = Task { latents, ..task.clone() };
    let all = task.accumulate + count;
    let large = task.accumulate.max(all.min(scene.count + BEYOND));
    (0..all).map(|m| micro_batch(if m < large { task } else { &small }, m, &scene.host)).collect()
}

/// Micro-batch `m` of `task`.
fn micro_batch(task: &Task, m: usize, host: &Device) -> Result<MicroBatch> {
    let (frames, height, width) = task.latents;
    let video = |channels| Tensor::zeros((task.batch, channels, frames, height, width), DType::F32, host);
    let states = |_, shape: Vec<usize>| {
        let shape: Vec<usize> = std::iter::once(task.batch).chain(shape).collect();
        Tensor::zeros(shape, DType::F32, host)
    };
    let mut shapes = task.dit.conditioning(task.latents);
    if task.continues {
        shapes = shapes.merged(task.dit.continuing(task.latents));
    }
    let cond = shapes.try_map(states)?;
    let timestep = Tensor::full(TIMESTEP, task.batch, &Device::Cpu)?;
    let x_bcthw = video(task.config().in_channels)?;
    let input = NetworkInput { x_bcthw, cond: cond.with(Role::TIMESTEP, timestep) };
    let key = |sample| Key::new(0, "rehearsal", &[m as u64, sample]);
    let guide = |text: &Tensor| {
        let factor = Tensor::ones((task.batch, 1, 1, 1, 1), DType::F32, host)?;
        Ok(Guide { factor, text: text.clone() })
    };
    let texts = input.cond.get(Role::TEXT).into_iter().cycle();
    let guides: Result<Vec<Guide>> = texts.take(task.objective.guides).map(guide).collect();
    let dropout = || Dropout { p: 0.1, keys: (0..task.batch as u64).map(key).collect() };
    Ok(MicroBatch {
        input,
        target: video(task.config().out_channels)?,
        weights: vec![1.0; task.batch],
        mask: None,
        objective: Objective {
            penalty: task.objective.penalty,
            scale: if task.objective.penalty.has_scale() { vec![1.0; task.batch] } else { Vec::new() },
            weights: match task.objective.masks {
                Masks::None => None,
                Masks::Given => {
                    Some(Tensor::zeros((task.batch, 1, frames, height, width), DType::F32, host)?)
                }
            },
            reduction: task.objective.reduction,
            guides: guides?,
            of_base: (m < task.objective.of_base).then(|| share_of_base(task, host)).transpose()?,
        },
        dropout: task.dropout.then(dropout),
    })
}
