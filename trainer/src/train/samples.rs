//! Clips made while training, by the adapter as it stands.

use models::expert::Networks;
use models::vae::Tiling;

use super::{Run, is_due};
use crate::encode::prompt::ClipRequest;
use crate::error::Result;
use crate::sample::{self, CONTACT_SHEET, ClipFiles, Prompted, starting_noise};
use crate::watch::interrupt::Interrupt;

impl Run<'_> {
    /// Makes the plan's clips where they are due and not there: a run that was interrupted while sampling makes them when
    /// it continues.
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
        let residents = self.networks.residents_mut();
        let (device, dit) = (residents.first_device(), residents.dit());
        let prompted = |request: &ClipRequest| {
            Prompted::new(request, starting_noise(request, dit, device)?, self.encoded, dit)
        };
        let clips = plan.sample.clips.iter().map(prompted).collect::<Result<Vec<_>>>()?;
        let fps = plan.data.fps.unwrap_or(dit.defaults(Networks::Whole).fps);
        let Some(latents) = sample::latents(&clips, residents, interrupt)? else { return Ok(()) };
        let folder = self.folder.samples(step);
        let files = ClipFiles { tiling: Tiling::Off, fps, formats: &plan.sample.formats };
        let written = sample::files(&folder, (&clips, latents), &format!("step {step}  "), residents, files)?;
        if let Some(sheet) = written.last() {
            self.log.picture(step, sheet)?;
            ui.say(&format!("step {step:>6}  clips in {}", folder.display()));
        }
        Ok(())
    }
}
