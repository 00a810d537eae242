//! A training run: its parts are built from the plan in order, then it loops.

mod clip_adapter;
mod evaluate;
mod folder;
mod learners;
mod log;
mod pinning;
mod samples;
mod step;
mod summary;

use std::ops::Range;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use candle_core::Device;

pub use folder::{RunFolder, changed_settings};
pub(crate) use step::{UpdateSettings, update};

use crate::batch::{Batches, StepData};
use crate::checkpoint::{self, Progress};
use crate::devices;
use crate::encode::{Encoded, Encoding};
use crate::error::{Error, Result};
use crate::export;
use crate::interrupt::Interrupt;
use crate::metrics::StepRow;
use crate::optim;
use crate::plan::{Plan, Planned};
use crate::ui::{Bar, Ui};
use learners::{Learner, Learners};
use log::Log;
use pinning::Pinning;

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// All steps are made.
    Finished,
    /// The user asked to stop; the state is saved.
    Interrupted,
}

/// A run under way.
struct Run<'a> {
    plan: &'a Plan,
    folder: &'a RunFolder,
    batches: Batches<'a>,
    encoded: &'a Encoded,
    /// Stages with their blocks, for networks that are read for clips.
    split: Vec<(Device, Range<usize>)>,
    learners: Learners,
    progress: Progress,
    /// Host memory that is not all pinned yet; nothing from the first step on.
    pinning: Option<Pinning>,
    /// The data of the next step, where it was made during the last one.
    ahead: Option<Result<StepData>>,
    log: Log,
    ui: &'a Ui,
}

/// Encodes what is not cached: every clip, every caption, every prompt of the samples.
///
/// # Errors
/// Whatever stands in the way of decoding, encoding or keeping them.
pub fn cache(planned: &Planned, interrupt: &Interrupt, ui: &Ui) -> Result<Encoded> {
    let stages = planned.plan.devices.open_within(&planned.limits)?;
    cache_on(&stages[0].0, planned, interrupt, ui) // a settled plan has a stage
}

/// [`cache`] on a device that is open already: a GPU that is opened twice has two pools of memory.
fn cache_on(device: &Device, planned: &Planned, interrupt: &Interrupt, ui: &Ui) -> Result<Encoded> {
    let Planned { plan, dataset, .. } = planned;
    let mut encoded = Encoded::open(&plan.run.cache, &plan.model)?;
    let captions = dataset.sources.iter().map(|source| source.item.caption.as_str());
    let prompts = plan.sample.clips.iter().flat_map(|clip| [clip.prompt.as_str(), clip.negative.as_str()]);
    let with = Encoding { model: &plan.model, dit: &planned.dit, device, interrupt, ui };
    encoded.encode_prompts(captions.chain(prompts).chain([""]), &with)?;
    encoded.encode_pictures(&plan.sample.clips, &with)?;
    encoded.encode_clips(dataset, &with)?;
    Ok(encoded)
}

/// Trains as planned in `folder`, from its newest checkpoint where there is one.
///
/// # Errors
/// Whatever stops the run. Everything up to the last checkpoint is safe.
pub fn train(planned: &Planned, folder: &RunFolder, interrupt: &Interrupt, ui: &Ui) -> Result<Ending> {
    let plan = &planned.plan;
    let split = plan.devices.open_within(&planned.limits)?;
    tell_engines(&split, planned, ui);
    let pinning = Pinning::start(planned, &split, ui)?;
    let encoded = cache_on(&split[0].0, planned, interrupt, ui)?; // a settled plan has a stage
    let saved = checkpoint::newest(&folder.checkpoints())?;
    let loaded = saved.as_deref().map(checkpoint::load).transpose()?;
    let states = loaded.as_ref().map(|(_, states)| states);
    let learners = Learners::load(planned, &split, pinning.stores(), states, ui)?;
    let progress = loaded.map_or_else(Progress::default, |(progress, _)| progress);
    if let Some(path) = saved {
        ui.say(&format!("going on after step {} from {}", progress.step, path.display()));
    }
    folder.cut_samples(&progress)?;
    let log = Log::open(folder, &progress)?;
    let batches = Batches::new(plan, &planned.dataset, &encoded)?;
    let encoded = &encoded;
    let (pinning, ahead) = (Some(pinning), None);
    let mut run =
        Run { plan, folder, batches, encoded, split, learners, progress, pinning, ahead, log, ui };
    run.finish(interrupt)
}

/// What attention and memory run on, and why: without cuDNN a run takes several times as long, without the allocator of
/// large tensors a plan that fits may fail.
fn tell_engines(split: &[(Device, Range<usize>)], planned: &Planned, ui: &Ui) {
    let compute = planned.plan.model.precision.dit().frozen.compute;
    let mut told = Vec::new();
    for (device, _) in split.iter().filter(|(device, _)| device.is_cuda()) {
        let attention = kernels::attention::engine(device, compute, planned.dit.head_size());
        let memory = kernels::device::allocator(device);
        for line in [format!("attention: {}, {}", attention.name, attention.why), format!("memory: {memory}")] {
            if !told.contains(&line) {
                ui.say(&line);
                told.push(line);
            }
        }
    }
}

impl Run<'_> {
    /// Steps until all are made or the user asks to stop; evaluates, samples and saves where the plan says so.
    fn finish(&mut self, interrupt: &Interrupt) -> Result<Ending> {
        let steps = self.plan.train.steps;
        // A run that was stopped before its first step has this row already.
        if self.progress == Progress::default() {
            self.evaluate()?;
        }
        self.sample_if_due(interrupt)?;
        let bar = self.ui.bar("training", steps as usize);
        bar.skip(self.progress.step as usize);
        let mut saved_at = Instant::now();
        while self.progress.step < steps {
            if interrupt.is_asked() {
                self.save()?;
                return self.stopped(&bar);
            }
            if let Some(pinning) = self.pinning.take() {
                pinning.finish(self.ui)?;
            }
            let row = self.step()?;
            devices::tell_refusals(self.split.iter().map(|(device, _)| device), self.ui);
            self.log.step(&row)?;
            self.show(&bar, &row);
            let is_last = self.progress.step == steps;
            if is_last || is_due(self.plan.train.eval_every, self.progress.step) {
                self.evaluate()?;
            }
            self.sample_if_due(interrupt)?;
            let minutes = self.plan.checkpoint.every_minutes;
            let is_late = minutes > 0 && saved_at.elapsed() >= Duration::from_secs(60 * minutes);
            let is_by_step = is_due(self.plan.checkpoint.every_steps, self.progress.step);
            // Before the checkpoint: a run that is killed in between goes on from the one before and writes it again.
            if is_by_step && !is_last {
                self.export(Some(&format!("step-{:06}", self.progress.step)))?;
            }
            if is_last || is_by_step || is_late {
                self.save()?;
                saved_at = Instant::now();
            }
        }
        let written = self.export(None)?;
        if interrupt.is_asked() {
            return self.stopped(&bar);
        }
        bar.finish();
        summary::tell(self.plan, self.folder, &written, self.ui)?;
        Ok(Ending::Finished)
    }

    fn stopped(&self, bar: &Bar) -> Result<Ending> {
        bar.finish();
        self.ui.note(&format!("stopped after step {} and saved; go on with --resume", self.progress.step));
        Ok(Ending::Interrupted)
    }

    fn show(&self, bar: &Bar, row: &StepRow) {
        bar.inc(1);
        bar.inform(format!("loss {:.4}  {:.2} s/step", row.loss, row.seconds));
        self.ui.progress(&format!("step {:>6}  loss {:.4}  {:.2} s", row.step, row.loss, row.seconds), row);
    }

    /// Saves everything that the run needs to go on from here.
    ///
    /// # Errors
    /// What stood in the way, and that the state before is whole.
    fn save(&mut self) -> Result<()> {
        let step = self.progress.step;
        self.write_state().map_err(|cause| Error::NotSaved { step, cause: Box::new(cause) })
    }

    fn write_state(&mut self) -> Result<()> {
        (self.progress.metrics_bytes, self.progress.events_bytes) = self.log.sync()?;
        let keep = self.plan.checkpoint.keep_last;
        checkpoint::save(&self.folder.checkpoints(), self.progress, &self.learners.states(), keep)?;
        Ok(())
    }

    fn export(&mut self, label: Option<&str>) -> Result<Vec<PathBuf>> {
        let made = (self.progress.step, self.progress.cursor.epoch);
        let mut written = Vec::new();
        for index in self.learners.order() {
            // Some kinds of adapter are written with a look at the weights that they change.
            let Learner { share, pipeline, .. } = self.learners.awake(index)?;
            let (adapters, expert) = (optim::gathered(pipeline)?, share.expert());
            let part = export::Part { label, expert };
            written.extend(export::write(self.plan, &adapters, made, &self.folder.adapters(), part)?);
        }
        written.sort();
        Ok(written)
    }
}

/// Whether something that happens every `every` steps (0: never) happens after `step` steps.
fn is_due(every: u64, step: u64) -> bool {
    every > 0 && step.is_multiple_of(every)
}
