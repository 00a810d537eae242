//! Clips made while training, by the adapter as it stands.

use candle_core::Tensor;
use models::vae::Tiling;

use super::clip_adapter::ClipAdapter;
use super::{Run, is_due};
use crate::error::Result;
use crate::habits::Habits;
use crate::interrupt::Interrupt;
use crate::sample::{CONTACT_SHEET, Prompted, clip_name, generate, starting_noise, write_clips};

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
        let clips = &self.plan.sample.clips;
        let device = self.pipeline.stages()[0].device.clone();
        let mut prompted = Vec::new();
        for request in clips {
            let noise = starting_noise(request, self.pipeline.config(), &device)?;
            prompted.push(Prompted::new(request, noise, self.encoded, self.pipeline.config())?);
        }
        let steps = clips.iter().map(|clip| clip.steps).max().unwrap_or(0);
        // Opened each time: what it holds belongs to nobody between clips.
        let adapter = ClipAdapter::open(self.plan, self.ui)?;
        if let Some(adapter) = &adapter {
            adapter.put_on(&mut self.pipeline)?;
        }
        let bar = self.ui.bar("sampling", steps);
        let latents = generate(&self.pipeline, &prompted, || {
            bar.inc(1);
            interrupt.flow()
        })?;
        bar.finish();
        if let Some(adapter) = &adapter {
            adapter.take_off(&mut self.pipeline)?;
        }
        let Some(latents) = latents else { return Ok(()) };

        // Loaded for the moment: between samples its memory belongs to training.
        let vae = self.plan.model.load_vae(&device)?;
        let names = clips.iter().enumerate().map(|(i, clip)| clip_name(i, &clip.prompt));
        let named: Vec<(String, Tensor)> = names.zip(latents).collect();
        let fps = self.plan.data.fps.unwrap_or(Habits::of(self.pipeline.config(), false).fps);
        let folder = self.folder.samples(self.progress.step);
        let written = write_clips(&folder, &vae, Tiling::Off, &named, fps, &self.plan.sample.formats)?;
        if let Some(sheet) = written.last() {
            self.log.picture(self.progress.step, sheet)?;
            self.ui.say(&format!("step {:>6}  clips in {}", self.progress.step, folder.display()));
        }
        Ok(())
    }
}
