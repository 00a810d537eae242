//! Clips made while training, by the adapter as it stands.

use std::ops::ControlFlow;

use models::adapter::Adapters;
use models::dit::DitConfig;
use models::expert::{Expert, Networks};
use models::vae::Tiling;

use super::clip_adapter::ClipAdapter;
use super::learners::network;
use super::{Run, is_due};
use crate::devices;
use crate::error::Result;
use crate::interrupt::Interrupt;
use crate::pipeline::Pipeline;
use crate::plan::Plan;
use crate::sample::{
    CONTACT_SHEET, ClipFiles, Prompted, Sampled, Sampling, Share, clip_name, starting_noise, write_clips,
};

impl Run<'_> {
    /// Makes the plan's clips where they are due and not there: a run that was interrupted while sampling makes them when
    /// it goes on.
    pub(super) fn sample_if_due(&mut self, interrupt: &Interrupt) -> Result<()> {
        let (step, plan) = (self.progress.step, &self.plan.sample);
        let is_due = step == 0 || step == self.plan.train.steps || is_due(plan.every, step);
        let is_there = self.folder.samples(step).join(CONTACT_SHEET).is_file();
        if plan.clips.is_empty() || !is_due || is_there {
            return Ok(());
        }
        self.sample(interrupt)
    }

    /// Makes the plan's clips and writes them to `samples/step-<n>`.
    fn sample(&mut self, interrupt: &Interrupt) -> Result<()> {
        let (plan, ui) = (self.plan, self.ui);
        let clips = &plan.sample.clips;
        let first = &self.learners.first().pipeline;
        let (device, dit) = (first.stages()[0].device.clone(), first.config().clone());
        let mut prompted = Vec::new();
        for request in clips {
            let noise = starting_noise(request, &dit, &device)?;
            prompted.push(Prompted::new(request, noise, self.encoded, &dit)?);
        }
        let mut sampling = Sampling::new(&prompted)?;
        let shares = clip_shares(plan, &dit);
        let bar = ui.bar("sampling", shares.iter().map(|share| sampling.steps_of(*share)).sum());
        let mut progress = || {
            bar.inc(1);
            interrupt.flow()
        };
        for share in shares {
            // An expert that has no steps to make is not needed.
            if sampling.steps_of(share) > 0 && self.advance(&mut sampling, share, &mut progress)?.is_break() {
                bar.finish();
                return Ok(());
            }
        }
        bar.finish();
        devices::tell_refusals(self.split.iter().map(|(device, _)| device), ui);

        // Loaded for the moment: between samples its memory belongs to training.
        let vae = ui.phase("loading the VAE", || plan.model.load_vae(&device))?;
        let step = self.progress.step;
        let done = clips.iter().zip(sampling.latents()).enumerate().map(|(i, (clip, latents))| Sampled {
            name: clip_name(i, &clip.prompt),
            title: format!("step {step}  {}", clip.prompt),
            latents: latents.clone(),
        });
        let fps = plan.data.fps.unwrap_or(dit.defaults(Networks::Whole).fps);
        let folder = self.folder.samples(step);
        let files = ClipFiles { tiling: Tiling::Off, fps, formats: &plan.sample.formats };
        let written = write_clips(&folder, &vae, &done.collect::<Vec<_>>(), files, ui)?;
        if let Some(sheet) = written.last() {
            self.log.picture(self.progress.step, sheet)?;
            ui.say(&format!("step {:>6}  clips in {}", self.progress.step, folder.display()));
        }
        Ok(())
    }

    /// Makes the steps of one network: one that is trained, or the expert that is read for the moment.
    fn advance(
        &mut self,
        sampling: &mut Sampling,
        share: Share,
        progress: &mut dyn FnMut() -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>> {
        let (plan, split, ui) = (self.plan, &self.split, self.ui);
        // Opened each time: what it holds belongs to nobody between clips.
        let adapter = ClipAdapter::open(plan, share.expert(), ui)?;
        let mut through = |pipeline: &mut Pipeline| {
            if let Some(adapter) = &adapter {
                adapter.put_on(pipeline)?;
            }
            let flow = sampling.advance(pipeline, share, &mut *progress)?;
            if let Some(adapter) = &adapter {
                adapter.take_off(pipeline)?;
            }
            Ok(flow)
        };
        let trained = (0..self.learners.len())
            .find(|index| share == Share::All || self.learners.share(*index).expert() == share.expert());
        match trained {
            Some(index) => through(&mut self.learners.awake(index)?.pipeline),
            // The only network that is trained makes room for the other expert.
            None => self
                .learners
                .out_of_the_way(0, || through(&mut network(plan, share, split, &Adapters::default(), ui)?)),
        }
    }
}

/// The networks that clips go through, in order: both experts where they are there, whichever is trained.
fn clip_shares(plan: &Plan, dit: &DitConfig) -> Vec<Share> {
    match plan.model.dits.experts() {
        Some(_) => Expert::ALL.map(|expert| plan.model.share_of(Some(expert), dit)).to_vec(),
        None => vec![Share::All],
    }
}
