//! Clips made while training, by the adapter as it stands.

use std::ops::ControlFlow;

use kernels::Device;
use models::adapter::Adapters;
use models::expert::Networks;
use models::vae::{Tiling, Vae};

use super::clip_adapter::ClipAdapter;
use super::networks::network;
use super::{Run, is_due};
use crate::encode::prompt::ClipRequest;
use crate::error::Result;
use crate::learning::NoiseRange;
use crate::pipeline::Pipeline;
use crate::sample::{self, CONTACT_SHEET, ClipFiles, Owner, Prompted, starting_noise};
use crate::watch::interrupt::Interrupt;

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
        let (plan, ui, step) = (self.plan, self.ui, self.progress.step);
        let first = &self.networks.first().pipeline;
        let (device, dit) = (first.ends()[0].clone(), first.config().clone());
        let prompted = |request: &ClipRequest| {
            Prompted::new(request, starting_noise(request, &dit, &device)?, self.encoded, &dit)
        };
        let clips = plan.sample.clips.iter().map(prompted).collect::<Result<Vec<_>>>()?;
        let Some(latents) = sample::latents(&clips, self, interrupt, ui)? else { return Ok(()) };
        let fps = plan.data.fps.unwrap_or(dit.defaults(Networks::Whole).fps);
        let folder = self.folder.samples(step);
        let files = ClipFiles { tiling: Tiling::Off, fps, formats: &plan.sample.formats };
        let written = sample::files(&folder, (&clips, latents), &format!("step {step}  "), self, files, ui)?;
        if let Some(sheet) = written.last() {
            self.log.picture(step, sheet)?;
            ui.say(&format!("step {step:>6}  clips in {}", folder.display()));
        }
        Ok(())
    }
}

impl Owner for Run<'_> {
    fn devices(&self) -> Vec<Device> {
        self.split.iter().map(|(device, _)| device.clone()).collect()
    }

    fn shares(&self) -> Vec<NoiseRange> {
        self.plan.model.clip_ranges(self.networks.first().pipeline.config())
    }

    /// One that is trained, or the expert that is read for the moment.
    fn with_network(
        &mut self,
        share: NoiseRange,
        work: &mut dyn FnMut(&Pipeline) -> Result<ControlFlow<()>>,
    ) -> Result<ControlFlow<()>> {
        let (plan, split, ui) = (self.plan, &self.split, self.ui);
        // Opened each time: what it holds belongs to nobody between clips.
        let adapter = ClipAdapter::open(plan, share.expert(), ui)?;
        let mut through = |pipeline: &mut Pipeline| {
            if let Some(adapter) = &adapter {
                adapter.put_on(pipeline)?;
            }
            let flow = work(pipeline)?;
            if let Some(adapter) = &adapter {
                adapter.take_off(pipeline)?;
            }
            Ok(flow)
        };
        let trained = (0..self.networks.len())
            .find(|index| share == NoiseRange::All || self.networks.share(*index).expert() == share.expert());
        match trained {
            Some(index) => through(&mut self.networks.awake(index)?.pipeline),
            // The only network that is trained makes room for the other expert.
            None => self
                .networks
                .out_of_the_way(0, || through(&mut network(plan, share, split, &Adapters::default(), ui)?)),
        }
    }

    /// Loaded for the moment: between samples its memory belongs to training.
    fn vae(&self) -> Result<Vae> {
        let device = &self.split[0].0; // a settled plan has a stage
        self.ui.phase("loading the VAE", || self.plan.model.load_vae(device))
    }
}
