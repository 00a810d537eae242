//! Samples of one size as the tensors of a micro-batch.

use kernels::{Device, Tensor};
use models::dit::config::PATCH;
use models::dit::{Conditioning, Raw, Role};

use super::{Given, Sample};
use crate::error::Result;
use crate::pipeline::{Guide, MicroBatch, NetworkInput, Objective};

/// Samples of one size as a micro-batch; `weight` says what a sample counts for.
pub(super) fn stack(samples: &[Sample], weight: impl Fn(&Sample) -> f64) -> Result<MicroBatch> {
    let of = |part: fn(&Sample) -> &Tensor| samples.iter().map(part).collect::<Vec<_>>();
    let cond = Conditioning::stacked(&samples.iter().map(|sample| &sample.cond).collect::<Vec<_>>())?;
    let Counted { mask, shares } = counted(samples)?;
    let input = NetworkInput {
        x_bcthw: Tensor::stack(&of(|s| &s.noisy), 0)?,
        cond: cond.with(Role::TIMESTEP, timesteps(samples)?),
    };
    Ok(MicroBatch {
        input,
        target: Tensor::stack(&of(|s| &s.target), 0)?,
        weights: samples.iter().zip(shares).map(|(s, share)| (weight(s) * share) as f32).collect(),
        mask,
        objective: Objective::default(),
        dropout: None,
    })
}

/// Timesteps `[b]`, or [b, l] where a sample has its first frame given: that one's tokens have timestep 0.
fn timesteps(samples: &[Sample]) -> Result<Tensor> {
    let time = |sample: &Sample| (sample.sigma * 1000.0) as f32;
    if samples.iter().all(|sample| sample.given == Given::Nothing) {
        let times: Vec<f32> = samples.iter().map(time).collect();
        return Ok(Tensor::new(times.as_slice(), &Device::Cpu)?);
    }
    let (_, frames, height, width) = samples[0].target.dims4()?;
    let of_frame = (height / PATCH) * (width / PATCH);
    let of_token = |sample: &Sample, token: usize| match sample.given {
        Given::FirstFrame if token < of_frame => 0.0,
        _ => time(sample),
    };
    let times: Vec<f32> =
        samples.iter().flat_map(|s| (0..frames * of_frame).map(|token| of_token(s, token))).collect();
    Ok(Tensor::from_vec(times, (samples.len(), frames * of_frame), &Device::Cpu)?)
}

/// What counts in the loss of a micro-batch.
struct Counted {
    /// [b, 1, t, 1, 1], or all.
    mask: Option<Tensor>,
    /// What each sample's share is multiplied by, so that every sample counts alike however many of its frames do.
    shares: Vec<f64>,
}

/// Leaves out the frames that are given.
fn counted(samples: &[Sample]) -> Result<Counted> {
    let frames = samples[0].target.dim(1)?;
    let left_out = |sample: &Sample| usize::from(sample.given == Given::FirstFrame);
    if samples.iter().all(|sample| left_out(sample) == 0) {
        return Ok(Counted { mask: None, shares: vec![1.0; samples.len()] });
    }
    let count = |sample: &Sample| (frames - left_out(sample)) as f64;
    let mean = samples.iter().map(count).sum::<f64>() / samples.len() as f64;
    let counts = |sample: &Sample| {
        let given = left_out(sample);
        (0..frames).map(move |frame| if frame < given { 0f32 } else { 1.0 })
    };
    let mask: Vec<f32> = samples.iter().flat_map(counts).collect();
    Ok(Counted {
        mask: Some(Tensor::from_vec(mask, (samples.len(), 1, frames, 1, 1), &Device::Cpu)?),
        shares: samples.iter().map(|sample| mean / count(sample)).collect(),
    })
}

/// The weights of the latents of a micro-batch [b, 1, t, h, w], ones for clips without a mask; nothing where none has one.
pub(super) fn loss_weights(samples: &[Sample]) -> Result<Option<Tensor>> {
    let Some(some) = samples.iter().find_map(|sample| sample.loss_weights.as_ref()) else { return Ok(None) };
    let ones = some.ones_like()?;
    let each = samples.iter().map(|sample| sample.loss_weights.as_ref().unwrap_or(&ones));
    Ok(Some(Tensor::stack(&each.collect::<Vec<_>>(), 0)?))
}

/// The shares of the base's prediction in the targets of a micro-batch, which broadcast to [b, c, t, h, w]; nothing where no sample has
/// one.
pub(super) fn of_base(samples: &[Sample]) -> Result<Option<Tensor>> {
    let Some(some) = samples.iter().find_map(|sample| sample.of_base.as_ref()) else { return Ok(None) };
    let is_same = |sample: &Sample| sample.of_base.as_ref().is_some_and(|own| own.dims() == some.dims());
    let (_, frames, height, width) = match samples.iter().all(is_same) {
        true => some.dims4()?,
        false => samples[0].target.dims4()?,
    };
    let zero = some.zeros_like()?.narrow(1, 0, 1)?.narrow(2, 0, 1)?.narrow(3, 0, 1)?;
    let each = samples.iter().map(|sample| {
        let own = sample.of_base.as_ref().unwrap_or(&zero);
        own.broadcast_as((1, frames, height, width))?.contiguous()
    });
    Ok(Some(Tensor::stack(&each.collect::<kernels::Result<Vec<_>>>()?, 0)?))
}

/// What the base predicts besides for the targets of a micro-batch; nothing where its samples are on no slider.
pub(super) fn guides(samples: &[Sample]) -> Result<Vec<Guide>> {
    let count = samples.first().map_or(0, |sample| sample.guides.len());
    let guide = |index: usize| {
        let of = |sample: &Sample| sample.guides[index].clone();
        let (factors, texts): (Vec<f64>, Vec<Tensor>) = samples.iter().map(of).unzip();
        let factors: Vec<f32> = factors.into_iter().map(|factor| factor as f32).collect();
        let conds: Vec<_> =
            texts.into_iter().map(|text| Conditioning::new().with(Role::TEXT, text)).collect();
        let stacked = Conditioning::<Raw>::stacked(&conds.iter().collect::<Vec<_>>())?;
        Ok(Guide {
            factor: Tensor::from_vec(factors, (samples.len(), 1, 1, 1, 1), &Device::Cpu)?,
            text: stacked.require(Role::TEXT)?.clone(),
        })
    };
    (0..count).map(guide).collect()
}
