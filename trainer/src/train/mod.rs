//! A training run: its parts are built from the plan in order, then it loops.

mod asked;
pub mod background;
pub mod batch;
pub mod checkpoint;
mod evaluate;
mod exchange;
pub mod export;
mod folder;
pub mod kept;
mod lock;
mod log;
mod networks;
mod overview;
mod pinning;
mod reporting;
mod samples;
mod saving;
mod start;
mod step;
mod summary;
mod told;

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kernels::Device;

pub use asked::Asked;
pub use folder::{RunFolder, changed_settings, newest};
pub(crate) use step::{UpdateSettings, update};
pub(crate) use summary::{held_out_losses, losses};

use crate::adapters::start_on;
use crate::encode::{Check, Encoding, LatentStore};
use crate::error::Result;
use crate::machine::devices;
use crate::machine::memory::{MemoryPlan, Phase};
use crate::machine::products::Products;
use crate::plan::{Plan, Planned};
use crate::replicas::{Replicas, Share};
use crate::residents::{Residency, Residents, Setup, WhenIdle};
use crate::train::background::Background;
use crate::train::batch::{Batches, StepData};
use crate::watch::interrupt::Interrupt;
use crate::watch::metrics::StepRow;
use crate::watch::ui::{Bar, Ui};
use checkpoint::Progress;
use log::RunLog;
use networks::TrainedNetworks;
use pinning::Pinning;
use reporting::Reporting;
use saving::Keep;
use told::Told;

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// All steps are made.
    Finished,
    /// The user asked to stop; the state is saved.
    Interrupted,
}

/// Steps whose mean loss is shown.
const SMOOTHED_OVER: usize = 50;

/// A run under way.
struct Run<'a> {
    plan: &'a Plan,
    folder: &'a RunFolder,
    batches: Batches<'a>,
    encoded: &'a LatentStore,
    networks: TrainedNetworks,
    progress: Progress,
    /// Host memory that is not all pinned yet; nothing from the first step on.
    pinning: Option<Pinning>,
    /// The data of the next step, where it was made during the last one.
    ahead: Option<Result<StepData>>,
    log: RunLog,
    /// Learning rates that it was told.
    told: Told,
    reporting: Reporting,
    /// The plan for the writer, which outlives no borrow.
    settings: Arc<Plan>,
    /// Writes checkpoints and adapter files. Gives the files.
    writer: Background<Vec<PathBuf>>,
    /// Step of the newest checkpoint.
    saved_step: Option<u64>,
    /// The newest losses.
    recent: VecDeque<f64>,
    ui: &'a Ui,
    /// The other replicas.
    replicas: &'a mut Replicas,
}

/// Encodes what is not cached or is damaged: every clip, every caption, every prompt of the samples. Every entry is read.
///
/// # Errors
/// Whatever stands in the way of decoding, encoding or keeping them.
pub fn cache(planned: &Planned, interrupt: &Interrupt, ui: &Ui) -> Result<LatentStore> {
    let mut residents = residents(planned, planned.plan.devices.open_within(&planned.limits)?, ui);
    cache_with(&mut residents, planned, Check::Checksum, Share::WHOLE, interrupt)
}

/// [`cache`] with encoders of `residents`, as far as it falls to `share`.
fn cache_with(
    residents: &mut Residents,
    planned: &Planned,
    check: Check,
    share: Share,
    interrupt: &Interrupt,
) -> Result<LatentStore> {
    let Planned { plan, dataset, .. } = planned;
    let encoded = LatentStore::open(&plan.run.cache, &plan.model)?.checking(check).sharing(share);
    let mut encoded = encoded.masking(&plan.data.mask_rules);
    let others = plan.train.texts(dataset);
    let captions = dataset.sources.iter().flat_map(|source| source.item.texts());
    let captions = captions.chain(others.iter().map(String::as_str));
    let prompts = plan.sample.clips.iter().flat_map(|clip| [clip.prompt.as_str(), clip.negative.as_str()]);
    let mut with = Encoding { residents, interrupt };
    // An encoder takes longer to load than to encode all prompts, so these are not dealt out.
    if share.rank == 0 {
        encoded.encode_prompts(captions.chain(prompts).chain([""]), &mut with)?;
        encoded.encode_pictures(&plan.sample.clips, &mut with)?;
    }
    encoded.encode_clips(dataset, &mut with)?;
    Ok(encoded)
}

/// The cache, filled by all `replicas` together: first each takes its share, as if all saw one folder; what is then missing on a
/// host is shared by the replicas there; what is still missing each makes itself.
fn cache_together(
    residents: &mut Residents,
    planned: &Planned,
    replicas: &mut Replicas,
    interrupt: &Interrupt,
) -> Result<LatentStore> {
    let (all, here) = (replicas.share(), replicas.local_share());
    for share in [Some(all), Some(here).filter(|here| *here != all)].into_iter().flatten() {
        if replicas.world() > 1 {
            cache_with(residents, planned, Check::Head, share, interrupt)?;
            replicas.barrier()?;
        }
    }
    cache_with(residents, planned, Check::Head, Share::WHOLE, interrupt)
}

/// The models of the plan on the devices of `split`, none of them loaded.
fn residents(planned: &Planned, split: Vec<(Device, Range<usize>)>, ui: &Ui) -> Residents {
    let Planned { plan, dit, .. } = planned;
    // Every set of clips needs the VAE again.
    let vae = if plan.sample.clips.is_empty() { WhenIdle::Drop } else { WhenIdle::Park };
    let MemoryPlan { networks, decoding, clip_groups, .. } = plan.memory;
    let residency = Residency { networks, decoding, vae, clip_groups };
    let (route, ffn_tokens) = (plan.devices.transfer.into(), Some(plan.memory.ffn_tokens));
    let encoders = Some(planned.forecast.devices_of(Phase::EncodingClips));
    let sharing = Some(plan.memory.clip_sharing);
    let fused = start_on::fused(&plan.adapter, &plan.trained_ranges());
    let setup = Setup { route, ffn_tokens, encoders, sharing, fused, ..Setup::default() };
    Residents::new((&plan.model, dit), split, residency, setup, ui)
}

/// Trains as planned in `folder`, from its newest checkpoint where there is one.
///
/// # Errors
/// Whatever stops the run. Everything up to the last checkpoint is safe.
pub fn train(planned: &Planned, folder: &RunFolder, interrupt: &Interrupt, ui: &Ui) -> Result<Ending> {
    train_together(planned, folder, &mut Replicas::alone(), interrupt, ui)
}

/// [`train`] as one of several `replicas`.
///
/// # Errors
/// Whatever stops the run. Everything up to the last checkpoint is safe.
pub fn train_together(
    planned: &Planned,
    folder: &RunFolder,
    replicas: &mut Replicas,
    interrupt: &Interrupt,
    ui: &Ui,
) -> Result<Ending> {
    let plan = &planned.plan;
    let split = plan.devices.open_within(&planned.limits)?;
    tell_engines(&split, planned, ui);
    Products::keep(&folder.products(), split.iter().map(|(device, _)| device))?;
    connect(planned, &split, replicas, ui)?;
    let pinning = Pinning::start(planned, &split, ui)?;
    let mut residents = residents(planned, split, ui);
    let encoded = cache_together(&mut residents, planned, replicas, interrupt)?;
    let start::Start { progress, networks, is_resumed } =
        start::load(planned, folder, residents, pinning.stores(), replicas, ui)?;
    let is_first = replicas.is_first();
    if is_first {
        asked::forget(folder)?;
        folder.cut_samples(&progress)?;
    }
    let log = RunLog::open(folder, &progress, replicas.rank())?;
    let told = Told::open(folder, replicas)?;
    let losses = if is_first { summary::losses(folder)? } else { Vec::new() };
    let recent = losses[losses.len().saturating_sub(SMOOTHED_OVER)..].to_vec().into();
    let batches = Batches::new(plan, &planned.dataset, &encoded)?;
    let encoded = &encoded;
    let mut run = Run {
        plan,
        folder,
        batches,
        encoded,
        networks,
        progress,
        pinning: Some(pinning),
        ahead: None,
        log,
        told,
        reporting: Reporting::new(planned),
        settings: Arc::new(plan.clone()),
        writer: Background::default(),
        saved_step: is_resumed.then_some(progress.step),
        recent,
        ui,
        replicas,
    };
    run.finish(interrupt)
}

/// Connects the GPUs of all replicas, where the plan wants NCCL for them.
fn connect(
    planned: &Planned,
    split: &[(Device, Range<usize>)],
    replicas: &mut Replicas,
    ui: &Ui,
) -> Result<()> {
    let devices = &planned.plan.devices;
    if replicas.world() == 1 || !devices.wants_nccl() {
        return Ok(());
    }
    let key = "devices.split (set it in the recipe: NCCL sums stage by stage)".to_owned();
    replicas.compare(&BTreeMap::from([(key, format!("{:?}", devices.split))]))?;
    let mut cards: Vec<Device> = Vec::new();
    for (device, _) in split {
        if !cards.iter().any(|card| card.same_device(device)) {
            cards.push(device.clone());
        }
    }
    Ok(ui.phase("connecting GPUs", || replicas.use_nccl(&cards))?)
}

/// What attention and memory run on, and why: without cuDNN a run takes several times as long, without the allocator of
/// large tensors a plan that fits may fail.
fn tell_engines(split: &[(Device, Range<usize>)], planned: &Planned, ui: &Ui) {
    let compute = planned.plan.model.precision.dit().frozen.compute;
    let mut told = Vec::new();
    for (device, _) in split.iter().filter(|(device, _)| device.is_cuda()) {
        let attention = kernels::attention::engine(device, compute, planned.dit.head_size());
        let memory = kernels::device::allocator(device);
        for line in [format!("attention: {}, {}", attention.name, attention.why), format!("memory: {memory}")]
        {
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
        let (run, folder) = (&self.plan.run.name, self.folder.root());
        let begun =
            serde_json::json!({ "run": run, "folder": folder, "step": self.progress.step, "steps": steps });
        self.ui.event("started", begun);
        // A run that was stopped before its first step has this row already.
        if self.progress == Progress::default() {
            self.evaluate()?;
        }
        self.sample_if_due(interrupt)?;
        self.tell_end(steps);
        let bar = self.ui.bar("training", steps as usize).unannounced();
        bar.skip(self.progress.step as usize);
        let mut saved_at = Instant::now();
        while self.progress.step < steps {
            // One that is asked to stop stops all: none can go on without it.
            if self.replicas.any(interrupt.is_asked())? {
                bar.finish();
                if self.progress.step == 0 && self.folder.is_untouched()? {
                    return Ok(Ending::Interrupted);
                }
                let ui = self.ui;
                ui.phase("saving", || {
                    self.save(Keep::State)?;
                    self.finish_saving()
                })?;
                return self.stopped();
            }
            self.writer.check()?;
            if let Some(pinning) = self.pinning.take() {
                pinning.finish(self.ui)?;
            }
            let row = self.step()?;
            devices::tell_refusals(self.networks.residents().devices(), self.ui);
            self.log.step(&row)?;
            self.show(&bar, &row);
            let is_last = self.progress.step == steps;
            if is_last || is_due(self.plan.train.eval_every, self.progress.step) {
                self.evaluate()?;
            }
            self.sample_if_due(interrupt)?;
            self.meet_requests(interrupt)?;
            let minutes = self.plan.checkpoint.every_minutes;
            let is_late = minutes > 0 && saved_at.elapsed() >= Duration::from_secs(60 * minutes);
            let is_by_step = is_due(self.plan.checkpoint.every_steps, self.progress.step);
            if (is_by_step || is_late) && !is_last {
                self.save(if is_by_step { Keep::Step } else { Keep::State })?;
                saved_at = Instant::now();
                if !is_by_step {
                    self.tell_checkpoint();
                }
            }
            self.report_if_old();
        }
        let has_checkpoint = self.saved_step == Some(self.progress.step);
        bar.finish();
        let ui = self.ui;
        let written = ui.phase("saving", || {
            self.save(if has_checkpoint { Keep::Files } else { Keep::Last })?;
            self.finish_saving()
        })?;
        if interrupt.is_asked() {
            return self.stopped();
        }
        self.report("ended");
        if !self.replicas.is_first() {
            return Ok(Ending::Finished);
        }
        let overview = overview::write(self.plan, self.folder, ui)?;
        let end =
            summary::End { steps: self.progress.step, adapters: &written, overview: overview.as_deref() };
        summary::tell(self.plan, self.folder, end, ui)?;
        Ok(Ending::Finished)
    }

    fn stopped(&mut self) -> Result<Ending> {
        self.report("stopped");
        let step = self.progress.step;
        if !self.replicas.is_first() {
            return Ok(Ending::Interrupted);
        }
        let (run, folder) = (&self.plan.run.name, self.folder.root());
        self.ui.event("stopped", serde_json::json!({ "run": run, "folder": folder, "step": step }));
        self.ui.note(&format!(
            "stopped after step {step} and saved; go on with --resume, or make an adapter file of it:\n  {}",
            export::commands(self.plan, self.folder, step).join("\n  ")
        ));
        Ok(Ending::Interrupted)
    }

    /// Tells how an adapter file is made of a checkpoint that comes without one.
    fn tell_checkpoint(&self) {
        let step = self.progress.step;
        let commands = export::commands(self.plan, self.folder, step).join("\n  ");
        self.ui.say(&format!("step {step:>6}  checkpoint; for an adapter file of it:\n  {commands}"));
    }

    /// Tells where a run stands that has no steps left to make.
    fn tell_end(&self, steps: u64) {
        let made = self.progress.step;
        if made > steps {
            self.ui.note(&format!(
                "the run is past the end of its recipe: {made} steps are made, train.steps is {steps}; nothing is trained. \
                 Raise train.steps to go on"
            ));
        } else if made == steps {
            self.ui.note(&format!("all {steps} steps are made; raise train.steps to go on"));
        }
    }

    fn show(&mut self, bar: &Bar, row: &StepRow) {
        // Single steps differ by their noise level far more than training changes them.
        self.recent.push_back(row.loss);
        if self.recent.len() > SMOOTHED_OVER {
            self.recent.pop_front();
        }
        let smooth = self.recent.iter().sum::<f64>() / self.recent.len() as f64;
        let loss = format!("loss {smooth:.4} (now {:.4})", row.loss);
        bar.inc(1);
        bar.inform(format!("{loss}  {:.2} s/step", row.seconds));
        self.ui.progress(&format!("step {:>6}  {loss}  {:.2} s", row.step, row.seconds), row);
    }
}

/// Whether something that happens every `every` steps (0: never) happens after `step` steps.
fn is_due(every: u64, step: u64) -> bool {
    every > 0 && step.is_multiple_of(every)
}
