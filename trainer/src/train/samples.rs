//! Clips made while training, by the adapter as it stands.

use models::expert::Networks;
use models::vae::Tiling;

use super::{Run, is_due};
use crate::encode::prompt::ClipRequest;
use crate::error::Result;
use crate::pipeline::Change;
use crate::residents::ClipAdapters;
use crate::sample::magcache::skips::high_steps;
use crate::sample::magcache::{Made, MagCache, Skips, Table};
use crate::sample::{
    self, CONTACT_SHEET, ClipFiles, Course, Half, Previews, Prompted, Stepped, starting_noise,
};
use crate::watch::interrupt::Interrupt;

impl Run<'_> {
    /// Makes the plan's clips where they are due and not there: a run that was interrupted while sampling makes them when
    /// it continues.
    pub(super) fn sample_if_due(&mut self, interrupt: &Interrupt) -> Result<()> {
        let (step, plan) = (self.progress.step, &self.plan.sample);
        let is_due = step == 0 || step == self.plan.train.steps || is_due(plan.every, step);
        let is_there = self.folder.samples(step).join(CONTACT_SHEET).is_file();
        // Rank 0 makes them; the other replicas wait for it in the next step.
        if plan.clips.is_empty() || !is_due || is_there || !self.replicas.is_first() {
            return Ok(());
        }
        self.sample(interrupt)
    }

    /// Makes the plan's clips, by the adapters that are exported, and writes them to `samples/step-<n>`.
    pub(super) fn sample(&mut self, interrupt: &Interrupt) -> Result<()> {
        self.networks.show_exported()?;
        let done = self.make_clips(interrupt);
        self.networks.show_trained()?;
        done
    }

    fn make_clips(&mut self, interrupt: &Interrupt) -> Result<()> {
        let (plan, ui, step) = (self.plan, self.ui, self.progress.step);
        let residents = self.networks.residents();
        let (device, dit) = (residents.first_device(), residents.dit());
        let prompted = |request: &ClipRequest| {
            Prompted::new(request, starting_noise(request, dit, device)?, self.encoded, dit)
        };
        let is_full = step > 0 && is_due(plan.sample.full_every, step);
        let requests = if is_full { &plan.sample.full_clips } else { &plan.sample.clips };
        let clips = requests.iter().map(prompted).collect::<Result<Vec<_>>>()?;
        let fps = plan.data.fps.unwrap_or(dit.defaults(Networks::Whole).fps);
        let cache = plan.sample.cache.as_ref().filter(|_| !is_full);
        let rule = cache.map(|cache| cache.settle("sample.cache")).transpose()?;
        let skips = rule.map(|rule| self.skips(rule)).transpose()?.flatten();
        skips.iter().flat_map(|skips| skips.lines(&plan.sample.clips)).for_each(|line| ui.say(&line));
        let measured = (rule.is_some() && skips.is_none()).then_some(0);
        let skipped = skips.map_or_else(Vec::new, |skips| skips.clips);
        let clip_adapters = if is_full { ClipAdapters::LeftOut } else { ClipAdapters::Applied };
        let folder = self.folder.samples(step);
        plan.sample.preview.iter().for_each(|preview| preview.tell(ui));
        let previews = plan.sample.preview.as_ref().map(|plan| Previews { plan, folder: &folder, fps });
        let course = Course { skipped: &skipped, measured, clip_adapters, previews, made: None };
        let residents = self.networks.residents_mut();
        let Some(Stepped { pieces, changes, .. }) = sample::latents(&clips, residents, course, interrupt)?
        else {
            return Ok(());
        };
        if measured.is_some() {
            self.keep_table(&changes)?;
        }
        let residents = self.networks.residents_mut();
        let (bands, formats) = (plan.memory.bands, &plan.sample.formats);
        let files = ClipFiles { tiling: Tiling::Off, bands, fps, formats };
        let written =
            sample::files(&folder, (&clips, pieces, &skipped), &format!("step {step}  "), residents, files)?;
        previews.map_or(Ok(()), |previews| previews.remove(&clips))?;
        if let Some(sheet) = written.last() {
            self.log.picture(step, sheet)?;
            ui.say(&format!("step {step:>6}  clips in {}", folder.display()));
            let run = &plan.run.name;
            ui.event("clips", serde_json::json!({ "run": run, "step": step, "files": written }));
        }
        Ok(())
    }

    /// What the clips skip by the table that the recipe names, or that the run has measured; nothing before it has.
    fn skips(&self, rule: MagCache) -> Result<Option<Skips>> {
        let (plan, own) = (&self.plan.sample, self.folder.magcache());
        let path = plan.cache_table.clone().or_else(|| own.is_file().then_some(own));
        let Some(path) = path else { return Ok(None) };
        let table = Table::read(&path)?;
        let boundary = self.plan.model.clip_boundary(self.networks.residents().dit());
        Skips::planned(rule, (&table, path.display().to_string()), &plan.clips, boundary).map(Some)
    }

    /// Keeps what was measured of the first clip as the run's table.
    fn keep_table(&self, changes: &[(usize, Half, Change)]) -> Result<()> {
        let (path, request) = (self.folder.magcache(), &self.plan.sample.clips[0]); // it was measured
        let boundary = self.plan.model.clip_boundary(self.networks.residents().dit());
        let made = Made::with(&self.plan.model, vec![self.plan.run.name.clone()], request);
        let steps = request.schedule()?.steps();
        Table::measured(changes, steps, high_steps(request, boundary)?, made).write(&path)?;
        self.ui.say(&format!("MagCache: measured on the first clip for the next sets, {}", path.display()));
        Ok(())
    }
}
