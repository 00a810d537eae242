//! What a run does besides its steps, played on shadows: encoders, the held-out loss, clips.

use std::num::NonZeroUsize;
use std::ops::Range;

use kernels::{DType, Device, Tensor};
use models::adapter::Adapters;
use models::clip::Clip;
use models::dit::animate::MotionEncoder;
use models::dit::{Control, DitConfig, Pictures};
use models::expert::{Expert, Networks};
use models::published::{Beside, Defaults, Published};
use models::text::MAX_TOKENS;
use models::umt5::Umt5;
use models::vae::{TEMPORAL_RATIO, Tiling, TinyDecoder, TinySizes, Vae};
use models::weights::{Frozen, Weights};

use super::SamplePlan;
use super::attached::attached;
use super::clip_shapes::in_group;
use crate::base::{BaseModel, EncoderSizes};
use crate::encode::prompt::ClipRequest;
use crate::encode::{condition_there, conditions::latents_there};
use crate::error::{Error, Result};
use crate::machine::forecast::{
    Calls, ClipShape, Decoding, DeviceMemory, Engine, Forecaster, Held, Residuals, ShadowDevice, StageMemory,
    Task, continuing, decoding,
};
use crate::machine::memory::{Machine, Phase, PhaseForecast, Shapes};
use crate::machine::precision::Precision;
use crate::pipeline::held_by;
use crate::sample::{PAST_PIXELS, preview_video};

/// (frames, height, width) of latents.
pub(super) type Latents = (usize, usize, usize);

/// What is made besides steps: by a run, or by `tandem sample`.
#[derive(Debug, Clone)]
pub struct Rest {
    /// How the models are held.
    pub precision: Precision,
    /// Sizes of the models beside the DiT.
    pub encoders: EncoderSizes,
    /// The settings that the model was published with.
    pub defaults: Defaults,
    /// The largest bucket; nothing where no clips are encoded.
    pub bucket: Option<Latents>,
    /// Frames of it beyond those that the VAE makes of a clip: reference pictures, encoded one by one (VACE, Animate); -1 where the first
    /// of the clip's own is one (S2V).
    pub beyond: isize,
    /// What the DiT has for conditions, of which some are frames of a clip's latents.
    pub control: Control,
    /// Whether clips are held out.
    pub holds_out: bool,
    /// Clips that are made.
    pub clips: Vec<ClipRequest>,
    /// What is kept of their blocks from step to step; a clip that is measured is the first and the largest of them.
    pub residuals: Residuals,
    /// How they are decoded.
    pub tiling: Tiling,
    /// The tiny decoder that makes previews of them.
    pub preview: Option<TinySizes>,
    /// For each network that clips go through, the adapters that it has for them besides the trained one.
    pub attached: Vec<Adapters>,
    /// Groups of devices that clips go through, each with the whole network.
    pub clip_groups: NonZeroUsize,
    /// Devices of such a group that share the tokens of a call, each with the whole network; 1 where they are stages.
    pub clip_sharing: NonZeroUsize,
    /// What becomes of the DiT before clips are decoded.
    pub behind_sampling: BehindSampling,
}

/// What becomes of the DiT when clips are sampled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BehindSampling {
    /// It continues to train.
    Stays,
    /// It is dropped.
    Dropped,
}

/// The DiT that it is made with, split over devices.
#[derive(Debug, Clone, Copy)]
pub struct Split<'a> {
    /// What is trained; of `tandem sample` nothing.
    pub task: &'a Task<'a>,
    /// The devices.
    pub machine: &'a Machine,
    /// Blocks of each stage.
    pub blocks: &'a [usize],
    /// The most tokens that go through a feed-forward layer at once.
    pub ffn_tokens: usize,
    /// Bytes of host memory that steps pin.
    pub pinned: u64,
}

impl Rest {
    /// What a run makes besides steps: clips of `shapes`, with `beyond` latent
    /// frames besides their own, are encoded, `held_out` windows of them are held out, and those of
    /// `sample` are sampled. The sizes of the encoders are those of its files, or of the published model that is `assumed`.
    ///
    /// # Errors
    /// A part of the model, or an adapter for clips, that does not open.
    pub(super) fn of_run(
        (model, dit): (&BaseModel, &DitConfig),
        sample: &SamplePlan,
        (held_out, beyond): (usize, isize),
        shapes: &Shapes,
        assumed: Option<&Published>,
    ) -> Result<Self> {
        let experts: &[Expert] = match model.dits.networks() {
            Networks::Pair => &Expert::ALL,
            Networks::Whole => &[],
        };
        Ok(Self {
            precision: model.precision,
            encoders: match assumed {
                Some(_) => EncoderSizes::published(dit),
                None => model.encoder_sizes(dit)?,
            },
            defaults: *dit.defaults(model.dits.networks()),
            bucket: shapes.there.first().or(shapes.possible.first()).map(|shape| shape.1),
            beyond,
            control: dit.control.clone(),
            holds_out: held_out > 0,
            // Full clips take more than those of a preset, and are never in flight with them.
            clips: if sample.full_clips.is_empty() { &sample.clips } else { &sample.full_clips }.clone(),
            residuals: match (&sample.cache, &sample.cache_table) {
                (None, _) => Residuals::None,
                (Some(_), Some(_)) => Residuals::Kept,
                (Some(_), None) => Residuals::Measured,
            },
            tiling: Tiling::Off,
            preview: sample.preview.as_ref().map(|preview| TinySizes::at(&preview.decoder)).transpose()?,
            attached: attached(sample, experts, dit)?,
            clip_groups: NonZeroUsize::MIN,
            clip_sharing: NonZeroUsize::MIN,
            behind_sampling: BehindSampling::Stays,
        })
    }

    /// All phases, in the order in which they are run.
    ///
    /// # Errors
    /// Sizes that a model's code does not take.
    pub fn phases(&self, dit: Split) -> Result<Vec<PhaseForecast>> {
        let mut phases = vec![self.text_encoder(dit, self.precision.text())?];
        if self.clips.iter().any(ClipRequest::has_conditions) {
            phases.push(self.encoding_pictures(dit, &self.clips)?);
        }
        if let Some(bucket) = self.bucket {
            phases.push(self.encoding_clips(dit, bucket)?);
            if self.holds_out {
                phases.push(self.held_out_loss(dit, bucket)?);
            }
        }
        if !self.clips.is_empty() {
            phases.push(self.sampling(dit, &self.clips)?);
            phases.push(self.decoding(dit, &self.clips, self.tiling)?);
        }
        Ok(phases)
    }

    /// The longest prompt through UMT5, its weights held as `frozen` says.
    pub(super) fn text_encoder(&self, dit: Split, frozen: Frozen) -> Result<PhaseForecast> {
        let alone = ShadowDevice::new(dit.first());
        let encoder = Umt5::seeded(self.encoders.text, 0, frozen, alone.device())?;
        drop(encoder.encode(&[0; MAX_TOKENS])?);
        Ok(PhaseForecast::new(Phase::TextEncoder, dit.machine, [(0, alone.memory())]))
    }

    /// A clip of the latents `bucket` through the VAE, and its ends through CLIP beside it: on the first device, and where there is
    /// no CLIP on all behind it that have room.
    pub(super) fn encoding_clips(&self, dit: Split, bucket: Latents) -> Result<PhaseForecast> {
        let bucket = (bucket.0.saturating_add_signed(-self.beyond), bucket.1, bucket.2);
        let mut on = vec![(0, self.encoding_a_clip(dit, dit.first(), bucket)?)];
        if self.encoders.clip.is_none() {
            for (_, stages) in dit.machine.devices().into_iter().skip(1) {
                let stage = stages[0]; // a device is there for a stage
                let memory = self.encoding_a_clip(dit, dit.machine.stages[stage].engine, bucket)?;
                let more = PhaseForecast::new(Phase::EncodingClips, dit.machine, [(stage, memory.clone())]);
                if more.misfit().is_some() {
                    break;
                }
                on.push((stage, memory));
            }
        }
        Ok(PhaseForecast::new(Phase::EncodingClips, dit.machine, on))
    }

    fn encoding_a_clip(&self, dit: Split, engine: Engine, bucket: Latents) -> Result<DeviceMemory> {
        let alone = ShadowDevice::new(engine);
        let (device, vae) = (alone.device(), self.vae(alone.device())?);
        let clip = self.clip(device)?;
        let (frames, height, width) = self.pixels(bucket);
        let video = Tensor::zeros((1, 3, frames, height, width), DType::F32, device)?;
        drop(vae.encode(&video, Tiling::Off)?);
        if dit.task.config().kind.facts().beside.contains(&Beside::Given) {
            let frame = |n: usize| video.get(0)?.narrow(1, n, 1)?.squeeze(1);
            let last = sees_two(dit.task.config()).then(|| frame(frames - 1)).transpose()?;
            drop(condition_there(&vae, &frame(0)?, last.as_ref(), frames)?);
        }
        drop(video);
        look(clip.as_ref(), device)?;
        self.look_at_faces(device)?;
        Ok(alone.memory())
    }

    /// The pictures of the largest of `clips` through the VAE, then through CLIP.
    pub(super) fn encoding_pictures(&self, dit: Split, clips: &[ClipRequest]) -> Result<PhaseForecast> {
        let alone = ShadowDevice::new(dit.first());
        let device = alone.device();
        let largest = self.shapes(clips).first().map_or((1, 1, 1), |clip| clip.latents);
        let (frames, height, width) = self.pixels(largest);
        let vae = self.vae(device)?;
        match dit.task.config().pictures() {
            Pictures::InPlace => {
                let video = Tensor::zeros((1, 3, 1, height, width), DType::F32, device)?;
                drop(vae.encode(&video, Tiling::Off)?);
            }
            Pictures::Condition => {
                let host = Device::shadow_cpu(None);
                // S2V's poses have their first frame once more in front, and no frame of their own in their first latent frame.
                let frames = frames + if self.control.speech.is_some() { TEMPORAL_RATIO } else { 0 };
                drop(latents_there(&vae, &Tensor::zeros((1, 3, frames, height, width), DType::F32, &host)?)?);
            }
            _ => {
                let picture = Tensor::zeros((3, height, width), DType::F32, &Device::shadow_cpu(None))?;
                let last = sees_two(dit.task.config()).then_some(&picture);
                drop(condition_there(&vae, &picture, last, frames)?);
            }
        }
        self.look_at_faces(device)?;
        drop(vae);
        look(self.clip(device)?.as_ref(), device)?;
        Ok(PhaseForecast::new(Phase::EncodingPictures, dit.machine, [(0, alone.memory())]))
    }

    /// Held-out clips of the latents `bucket` through the DiT, one at a time.
    pub(super) fn held_out_loss(&self, dit: Split, bucket: Latents) -> Result<PhaseForecast> {
        let task = Task {
            latents: bucket,
            batch: 1,
            accumulate: 1,
            small: None,
            dropout: false,
            ..dit.task.clone()
        };
        let stages = dit.calls(&Forecaster::new(&task), &Calls::HeldOut, NonZeroUsize::MIN)?;
        Ok(PhaseForecast::new(Phase::HeldOutLoss, dit.machine, by_device(dit.machine, &stages)))
    }

    /// `clips` from noise to latents, all at once. Devices that share the tokens of a call are taken to have all of them, which is more.
    pub fn sampling(&self, dit: Split, clips: &[ClipRequest]) -> Result<PhaseForecast> {
        let shapes = in_group(self.shapes(clips), self.clip_groups);
        let latents = shapes.first().map_or((1, 1, 1), |clip| clip.latents);
        let continues = self.continues(clips);
        let task = Task {
            latents,
            continues,
            batch: 1,
            accumulate: 1,
            small: None,
            dropout: false,
            ..dit.task.clone()
        };
        let calls = Calls::Clips(shapes);
        let mut most: Option<Vec<StageMemory>> = None;
        for attached in &self.attached {
            let forecaster = Forecaster::new(&task).with_attached(attached);
            let whole = self.clip_groups.saturating_mul(self.clip_sharing);
            let stages = dit.calls(&forecaster, &calls, whole)?;
            most = Some(match most {
                None => stages,
                Some(most) => {
                    most.into_iter().zip(stages).map(|(a, b)| if a.peak < b.peak { b } else { a }).collect()
                }
            });
        }
        let mut devices = by_device(dit.machine, &most.unwrap_or_default());
        self.add_previews(dit, latents, &mut devices)?;
        Ok(PhaseForecast::new(Phase::Sampling, dit.machine, devices))
    }

    /// Adds the previews of a clip of `latents` to what the last stage's device holds. The decoder is there all the time, and works
    /// between calls of the stage: counted as if it worked beside them.
    fn add_previews(
        &self,
        dit: Split,
        (frames, height, width): Latents,
        devices: &mut [(usize, DeviceMemory)],
    ) -> Result<()> {
        let Some(sizes) = self.preview else { return Ok(()) };
        let last = &dit.machine.stages[dit.machine.stages.len() - 1]; // a settled config has a stage
        let alone = ShadowDevice::new(last.engine);
        let decoder = TinyDecoder::seeded(sizes, 0, self.precision.compute.dtype(), alone.device())?;
        let shape = (1, sizes.latent, frames, height, width);
        let latents = || Tensor::zeros(shape, DType::F32, alone.device());
        // The clean latents, and what they are computed from.
        let (_before, _velocity, predicted) = (latents()?, latents()?, latents()?);
        drop(preview_video(&decoder, &predicted, &Device::shadow_cpu(None))?);
        for (index, memory) in devices {
            if dit.machine.stages[*index].name == last.name {
                *memory = DeviceMemory::of(last.engine, memory.peak + alone.memory().peak);
            }
        }
        Ok(())
    }

    /// The largest of `clips` through the VAE, beside what its devices hold of the run: in bands on all of them where they have
    /// room, else on the first.
    pub(super) fn decoding(
        &self,
        dit: Split,
        clips: &[ClipRequest],
        tiling: Tiling,
    ) -> Result<PhaseForecast> {
        let (shapes, latents) = (self.shapes(clips), self.decoded(clips));
        let mut devices = Vec::new();
        for (_, stages) in dit.machine.devices() {
            let of_dit = match self.behind_sampling {
                BehindSampling::Stays => dit.held_by(&stages)?,
                BehindSampling::Dropped => 0,
            };
            let of_clips = if devices.is_empty() { self.held_by(dit.task, &shapes) } else { 0 };
            // A device is there for a stage.
            devices.push((stages[0], (dit.machine.stages[stages[0]].engine, of_dit + of_clips)));
        }
        let on = |devices: &[(usize, (Engine, u64))]| {
            let (stages, held): (Vec<usize>, Vec<(Engine, u64)>) = devices.iter().copied().unzip();
            let vae = (self.encoders.vae, self.precision.vae());
            let mut memory: Vec<_> = stages.into_iter().zip(decoding(&held, vae, latents, tiling)?).collect();
            if let (Some((_, first)), true) = (memory.first_mut(), self.continues(clips)) {
                // Animate encodes a whole piece again.
                let past = if self.control.speech.is_some() { PAST_PIXELS } else { self.pixels(latents).0 };
                let of_past = continuing(held[0], vae, latents, past)?;
                *first = if first.peak < of_past.peak { of_past } else { first.clone() };
            }
            Ok::<_, Error>(PhaseForecast::new(Phase::Decoding, dit.machine, memory))
        };
        if devices.len() > 1 && tiling == Tiling::Off && latents.1 >= devices.len() {
            let all = on(&devices)?;
            if all.misfit().is_none() {
                return Ok(all);
            }
        }
        on(&devices[..1])
    }

    /// Calls of a solver step of each clip.
    pub(super) fn halves(&self) -> Vec<usize> {
        self.shapes(&self.clips).iter().map(|clip| clip.halves).collect()
    }

    fn vae(&self, device: &Device) -> Result<Vae> {
        Ok(Vae::seeded(self.encoders.vae, 0, self.precision.vae(), device)?)
    }

    fn clip(&self, device: &Device) -> Result<Option<Clip>> {
        let load = |sizes| Clip::seeded(sizes, 0, self.precision.compute.dtype(), device);
        Ok(self.encoders.clip.map(load).transpose()?)
    }

    /// A few faces through Animate's motion encoder, which takes so many at once.
    fn look_at_faces(&self, device: &Device) -> Result<()> {
        let Some(animate) = &self.control.animate else { return Ok(()) };
        let (weights, side) = (Weights::seeded(animate.motion.tensors(), 0), animate.motion.side());
        let encoder = MotionEncoder::load(&weights, &animate.motion, device)?;
        let shape = (1, 3, MotionEncoder::AT_ONCE, side, side);
        drop(encoder.forward(&Tensor::zeros(shape, DType::F32, &Device::shadow_cpu(None))?)?);
        Ok(())
    }

    /// Bytes that clips hold while they are decoded: noise, latents and conditioning, f32.
    fn held_by(&self, task: &Task, clips: &[ClipShape]) -> u64 {
        let of = |ClipShape { latents: (t, h, w), .. }: &ClipShape| {
            let cond = task.dit.conditioning((*t, *h, *w)).merged(task.dit.continuing((*t, *h, *w)));
            let on_device = cond.iter().filter(|(role, _)| !role.is_on_host());
            let cond: usize = on_device.map(|(_, shape)| shape.iter().product::<usize>()).sum();
            (task.config().in_channels + task.config().out_channels) * t * h * w + 2 * cond
        };
        (clips.iter().map(of).sum::<usize>() * DType::F32.size_in_bytes()) as u64
    }
}

impl Split<'_> {
    /// What the device of each stage holds at its peak in `calls`, with the network on `groups` groups of devices.
    pub(crate) fn calls(
        &self,
        forecaster: &Forecaster,
        calls: &Calls,
        groups: NonZeroUsize,
    ) -> Result<Vec<StageMemory>> {
        let ranges: Vec<Range<usize>> = self.ranges().collect();
        let of = |index: usize| {
            let (engine, at) = (self.machine.stages[index].engine, self.machine.place_of(index));
            let held = held_by(index, groups.get());
            let held = Held {
                own: index - held.start,
                ranges: ranges[held].to_vec(),
                at: self.machine.place_in_group(index, groups.get()),
            };
            forecaster.calls(engine, (&held, self.ffn_tokens), at, calls)
        };
        (0..ranges.len()).map(of).collect()
    }

    /// What runs the operations of the first device.
    fn first(&self) -> Engine {
        self.machine.stages[0].engine // a settled config has a stage
    }

    /// What these stages, which are on one device, hold while clips are decoded.
    fn held_by(&self, stages: &[usize]) -> Result<u64> {
        let (forecaster, mut held) = (Forecaster::new(self.task), 0);
        for (index, blocks) in self.ranges().enumerate().filter(|(index, _)| stages.contains(index)) {
            let card = &self.machine.stages[index];
            let resident = forecaster.resident(card.engine, &blocks, self.machine.place_of(index))?;
            held += match self.task.decoding {
                Decoding::Beside => resident.bytes,
                Decoding::Alone => resident.bytes - resident.matrices,
            };
        }
        Ok(held)
    }

    /// Bytes of the matrices that can wait in host memory, of all stages.
    pub(super) fn matrices(&self) -> Result<u64> {
        let forecaster = Forecaster::new(self.task);
        let of = |(index, blocks): (usize, Range<usize>)| {
            let (engine, at) = (self.machine.stages[index].engine, self.machine.place_of(index));
            Ok(forecaster.resident(engine, &blocks, at)?.matrices)
        };
        self.ranges().enumerate().map(of).sum()
    }

    fn ranges(&self) -> impl Iterator<Item = Range<usize>> {
        self.blocks.iter().scan(0, |first, count| {
            let start = *first;
            *first += count;
            Some(start..*first)
        })
    }
}

/// The peaks of `stages`, those on one device together.
fn by_device(machine: &Machine, stages: &[StageMemory]) -> Vec<(usize, DeviceMemory)> {
    let of = |(_, on): (&str, Vec<usize>)| {
        let first = on[0]; // a device is there for a stage
        let peak = on.iter().map(|index| stages[*index].peak).sum();
        (first, DeviceMemory::of(machine.stages[first].engine, peak))
    };
    machine.devices().into_iter().map(of).collect()
}

/// A picture through CLIP.
fn look(clip: Option<&Clip>, device: &Device) -> Result<()> {
    if let Some(clip) = clip {
        let side = clip.image();
        drop(clip.encode(&Tensor::zeros((1, 3, side, side), DType::F32, device)?)?);
    }
    Ok(())
}

/// Whether a model looks at a first and a last picture.
fn sees_two(dit: &DitConfig) -> bool {
    dit.image.is_some_and(|image| image.positions.is_some())
}
