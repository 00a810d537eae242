//! A stage: a device, the part of the model that lies on it, and the adapters of that part.

use std::ops::Range;

use candle_core::{Device, Tensor};
use kernels::transfer::HostStore;
use models::adapter::Adapters;
use models::dit::pass::FFN_TOKENS;
use models::dit::{Base, BlockPlan, Conditioning, Dit, DitConfig, Dropout, Gradients, Keeping, Kept, Pass};
use models::weights::Weights;

use super::micro_batch::{MicroBatch, NetworkInput};
use crate::error::Result;

/// A device with its part of the DiT.
#[derive(Debug)]
pub struct Stage {
    /// Where everything of this stage lies.
    pub device: Device,
    /// The blocks, and the embeddings or the head at the ends.
    pub dit: Dit,
    /// The adapters of these blocks.
    pub adapters: Adapters,
    /// The most tokens of a sample that go through a feed-forward layer at once.
    pub ffn_tokens: usize,
    store: HostStore,
}

/// What a stage hands to the next one: the stream, and the conditioning that came with it.
pub(super) struct Boundary {
    pub x_bld: Tensor,
    pub cond: Conditioning,
}

/// What a stage holds of a micro-batch between its forward and its backward.
pub(super) struct InFlight {
    cond: Conditioning,
    kept: Kept,
    end: Option<End>,
}

/// What the last stage holds besides: the end of the stream and the gradient of the loss.
struct End {
    x_bld: Tensor,
    d_velocity: Tensor,
}

impl Stage {
    /// Reads the blocks of `range` onto `device`, with their share of `adapters`.
    pub fn load(
        weights: &Weights,
        config: &DitConfig,
        range: Range<usize>,
        adapters: &Adapters,
        base: Base,
        device: &Device,
    ) -> Result<Self> {
        let dit = Dit::load(weights, config, range.clone(), base, device)?;
        let is_here =
            |module: &str| models::names::split_block(module).is_some_and(|(n, _)| range.contains(&n));
        let (adapters, store) = (adapters.part(device, is_here)?, HostStore::new(device)?);
        Ok(Self { device: device.clone(), dit, adapters, ffn_tokens: FFN_TOKENS, store })
    }

    /// The stream and conditioning at the first block of this stage: embedded here, or taken over the boundary.
    pub(super) fn entry(&self, input: &NetworkInput, from_previous: Option<Boundary>) -> Result<Boundary> {
        match (&self.dit.embedder, from_previous) {
            (Some(embedder), _) => {
                let x = input.x_bcthw.to_device(&self.device)?;
                let cond = embedder.conditioning(&input.timestep, &input.text_bsd, input.grid()?)?;
                Ok(Boundary { x_bld: embedder.tokens(&x)?, cond })
            }
            (None, Some(Boundary { x_bld, cond })) => {
                let (x_bld, cond) = (x_bld.to_device(&self.device)?, cond.to_device(&self.device)?);
                Ok(Boundary { x_bld, cond })
            }
            (None, None) => Err(candle_core::Error::msg("a later stage has no input").into()),
        }
    }

    /// Forward without a backward to come. The last stage gives the velocity, the others the boundary.
    pub(super) fn forward_only(&self, input: &NetworkInput, entry: Boundary) -> Result<Passed> {
        let Boundary { x_bld, cond } = entry;
        let x_bld = self.dit.through(x_bld, &cond, &self.pass(&None))?;
        match &self.dit.head {
            Some(head) => Ok(Passed::Velocity(head.forward(&x_bld, &cond, input.grid()?)?)),
            None => Ok(Passed::On(Boundary { x_bld, cond })),
        }
    }

    /// Forward with a backward to come. The last stage gives the loss, the others the boundary.
    pub(super) fn forward(
        &self,
        batch: &MicroBatch,
        entry: Boundary,
        keeping: &[BlockPlan],
    ) -> Result<(Passed, InFlight)> {
        let Boundary { x_bld, cond } = entry;
        let keeping = Keeping { plans: keeping, store: &self.store };
        let (x_bld, kept) = self.dit.through_keeping(x_bld, &cond, &self.pass(&batch.dropout), &keeping)?;
        let Some(head) = &self.dit.head else {
            let passed = Passed::On(Boundary { x_bld, cond: cond.clone() });
            return Ok((passed, InFlight { cond, kept, end: None }));
        };
        let velocity = head.forward(&x_bld, &cond, batch.input.grid()?)?;
        let target = batch.target.to_device(&self.device)?;
        let weights = Tensor::new(batch.weights.as_slice(), &self.device)?;
        let mask = batch.mask.as_ref().map(|mask| mask.to_device(&self.device)).transpose()?;
        let loss = kernels::loss::mse(&velocity, &target, &weights, mask.as_ref())?;
        let end = Some(End { x_bld, d_velocity: loss.d_prediction });
        Ok((Passed::Loss(loss.value), InFlight { cond, kept, end }))
    }

    /// Backward of what is in flight; `dy` comes from the next stage, and the last stage needs none. The result is
    /// for the stage before.
    pub(super) fn backward(
        &self,
        batch: &MicroBatch,
        in_flight: InFlight,
        dy: Option<Tensor>,
        gradients: &mut Gradients,
    ) -> Result<Tensor> {
        let InFlight { cond, kept, end } = in_flight;
        let dy = match (&self.dit.head, end, dy) {
            (Some(head), Some(end), _) => head.backward(&end.x_bld, &end.d_velocity, &cond)?,
            (_, _, Some(dy)) => dy.to_device(&self.device)?,
            _ => {
                return Err(
                    candle_core::Error::msg("a stage before the last has no gradient to take back").into()
                );
            }
        };
        Ok(self.dit.backward(kept, dy, &cond, &self.pass(&batch.dropout), gradients)?)
    }

    fn pass<'a>(&'a self, dropout: &'a Option<Dropout>) -> Pass<'a> {
        Pass::new(&self.adapters, dropout.as_ref()).with_ffn_tokens(self.ffn_tokens)
    }
}

/// What comes out of a stage's forward.
pub(super) enum Passed {
    /// To the next stage.
    On(Boundary),
    /// Of the last stage, forward only.
    Velocity(Tensor),
    /// Of the last stage, when training.
    Loss(Tensor),
}
