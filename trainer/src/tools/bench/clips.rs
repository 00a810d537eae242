//! Clips in flight: how busy the devices are while clips are sampled, by the session that makes them in earnest.

use std::num::NonZeroUsize;
use std::ops::ControlFlow;

use kernels::Device;
use models::dit::pass::FFN_TOKENS;
use models::dit::{DitConfig, Role};
use models::expert::Networks;
use serde_json::{Value, json};

use super::dit::{DitBench, Ready, fields};
use super::meter::Meter;
use super::{gib, rounded};
use crate::encode::PictureInputs;
use crate::encode::prompt::ClipRequest;
use crate::error::Result;
use crate::learning::NoiseRange;
use crate::machine::devices::Limits;
use crate::machine::forecast::{Calls, ClipShape, Forecaster, Residuals, Task};
use crate::machine::memory::Machine;
use crate::pipeline::{NetworkInput, Pipeline};
use crate::plan::{Split, in_group};
use crate::sample::magcache::{CacheConfig, Halves, Table, skipped};
use crate::sample::{Prompted, SampleConfig, Session};
use crate::solver::SolverKind;

/// Halves of the guidance.
const HALVES: usize = 2;
/// A ratio of the residual's norm from step to step in the middle of a clip of a published model.
const FALLS_TO: f64 = 0.995;

/// What is sampled.
#[derive(Debug, Clone)]
pub struct ClipsBench<'a> {
    /// The network and the size of the clips.
    pub network: DitBench<'a>,
    /// How many clips, each with guidance.
    pub clips: usize,
    /// Solver steps of each.
    pub steps: usize,
    /// Groups of devices that have the whole network each; 1 for the split.
    pub groups: NonZeroUsize,
    /// Devices of each group that share the tokens of a call; 1 for stages.
    pub sharing: NonZeroUsize,
}

impl ClipsBench<'_> {
    /// The clips from noise to latents.
    ///
    /// `busy` is the share of the devices' time that one call alone accounts for: calls x seconds of one / (devices x seconds of
    /// all). Of several unlike GPUs it is a mean.
    ///
    /// # Errors
    /// A model that cannot be made.
    pub fn measure(&self) -> Result<Value> {
        let ready = self.network.ready(None)?;
        let groups = self.grouped(&ready)?;
        let clips = self.prompted(&ready.config, &ready.devices[0].0)?; // a settled config has a stage
        let input = self.network.input(&ready.config, 1, groups[0].ends()[0])?;
        let meter = Meter::of(ready.devices.iter().map(|(device, _)| device));
        let predict = || groups[0].predict(std::slice::from_ref(&input)).map(drop);
        let one = meter.measure(self.network.repeats, predict)?.seconds;
        let all = meter.measure(self.network.repeats, || sampled(&groups, &clips, &[]))?;
        let calls = (HALVES * self.clips * self.steps) as f64;
        let busy = calls * one * self.sharing.get() as f64 / (ready.devices.len() as f64 * all.seconds);
        let mut report = self.network.report("clips", &ready, &all);
        report.extend(fields(json!({
            "clips": self.clips, "groups": self.groups, "sharing": self.sharing, "s_per_forward": rounded(one, 4),
            "s_per_step": rounded(all.seconds / (self.clips * self.steps) as f64, 4), "busy": rounded(busy, 3),
            "forecast_gib": self.forecast(&ready)?,
        })));
        Ok(report.into())
    }

    /// The same clips with all steps computed and with those skipped that the rule `cache` skips of a table of ratios that fall
    /// slowly, as those of published models do.
    ///
    /// `share_of_ideal` is the time of the steps that are computed, as a share of all that the skipping clips took.
    ///
    /// # Errors
    /// A model that cannot be made, and an impossible rule.
    pub fn measure_skipping(&self, cache: &CacheConfig) -> Result<Value> {
        let rule = cache.settle("--cache-preset")?;
        let falling =
            (0..self.steps).map(|step| if step == 0 { 1.0 } else { FALLS_TO }).collect::<Vec<f64>>();
        let table = Table { cond: falling.clone(), uncond: falling, high_steps: None, made: None };
        let skips = skipped(&rule, &table, 0, [Halves::Both; 2]);
        let ready = self.network.ready(None)?;
        let groups = self.grouped(&ready)?;
        let clips = self.prompted(&ready.config, &ready.devices[0].0)?; // a settled config has a stage
        let meter = Meter::of(ready.devices.iter().map(|(device, _)| device));
        let exact = meter.measure(self.network.repeats, || sampled(&groups, &clips, &[]))?;
        let of_clips = vec![skips.clone(); self.clips];
        let cached = meter.measure(self.network.repeats, || sampled(&groups, &clips, &of_clips))?;
        let computed = exact.seconds * (self.steps - skips.len()) as f64 / self.steps as f64;
        let mut report = self.network.report("skipping clips", &ready, &cached);
        report.extend(fields(json!({
            "clips": self.clips, "groups": self.groups, "sharing": self.sharing, "steps": self.steps, "skipped": skips.len(),
            "exact_s": rounded(exact.seconds, 4), "cached_s": rounded(cached.seconds, 4),
            "share_of_ideal": rounded(computed / cached.seconds, 4),
        })));
        Ok(report.into())
    }

    /// The network on each group; on one the split itself, which is not needed besides.
    fn grouped(&self, ready: &Ready) -> Result<Vec<Pipeline>> {
        let parts = ready.pipeline.grouped(self.whole().get())?;
        Pipeline::in_rows(parts, self.sharing.get())
    }

    /// Parts of the devices that each have the whole network.
    fn whole(&self) -> NonZeroUsize {
        self.groups.saturating_mul(self.sharing)
    }

    /// Clips with guidance, whose inputs are on `device`.
    fn prompted(&self, config: &DitConfig, device: &Device) -> Result<Vec<Prompted>> {
        let of = |index: usize| {
            let NetworkInput { x_bcthw, mut cond } = self.network.input(config, 1, device)?;
            cond.take(Role::TIMESTEP);
            let (own, all) = (config.out_channels, config.in_channels);
            let beside = (all > own).then(|| x_bcthw.narrow(1, own, all - own)?.contiguous()).transpose()?;
            Ok(Prompted {
                request: self.request(config, index),
                positive: cond.clone(),
                negative: cond,
                noise_bcthw: x_bcthw.narrow(1, 0, own)?.contiguous()?,
                shown: PictureInputs { beside_bcthw: beside, ..PictureInputs::default() },
            })
        };
        (0..self.clips).map(of).collect()
    }

    fn request(&self, config: &DitConfig, index: usize) -> ClipRequest {
        let size = self.network.size;
        let (defaults, sides) = (config.defaults(Networks::Whole), [size.width as u32, size.height as u32]);
        let base = SampleConfig::default().request(defaults, sides, size.frames as u32, index as u64);
        ClipRequest { steps: self.steps, guidance: 5.0, guidance_high: 5.0, ..base }
    }

    /// What was forecast of the clips in flight, GiB of each device as `peak_gib` has them.
    fn forecast(&self, ready: &Ready) -> Result<Vec<f64>> {
        let DitBench { devices, .. } = &self.network;
        let [_, frames, height, width] = self.network.latent_shape(&ready.config)?;
        let latents = (frames, height, width);
        let task = Task::without_training(&ready.config, self.network.base(None), latents);
        let settled = devices.settle(ready.config.layers)?;
        let machine = &Machine::here(&settled, &Limits::default(), task.base, &ready.config, None);
        let (solver, residuals) = (SolverKind::UniPc, Residuals::None);
        let shape = ClipShape { latents, halves: HALVES, solver, has_picture: false, residuals };
        let calls = Calls::Clips(in_group(vec![shape; self.clips], self.groups));
        let dit = Split { task: &task, machine, blocks: &settled.split, ffn_tokens: FFN_TOKENS, pinned: 0 };
        let stages = dit.calls(&Forecaster::new(&task), &calls, self.whole())?;
        let of = |(_, on): (&str, Vec<usize>)| gib(on.into_iter().map(|index| stages[index].peak).sum());
        Ok(machine.devices().into_iter().map(of).collect())
    }
}

/// Makes all steps of `clips`, but for those that each skips.
fn sampled(groups: &[Pipeline], clips: &[Prompted], skips: &[Vec<usize>]) -> Result<()> {
    let mut session = Session::new(clips)?.skipping(skips);
    let _never_broken_off = session.run(groups, NoiseRange::All, |_| ControlFlow::Continue(()))?;
    Ok(())
}
