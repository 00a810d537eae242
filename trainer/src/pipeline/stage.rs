//! A stage: a device, the part of the model that lies on it, and the adapters of that part.

use std::collections::BTreeMap;
use std::ops::Range;

use candle_core::{Device, Tensor};
use kernels::transfer::HostStore;
use kernels::weight::Weight;
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
    pub(super) ffn_tokens: usize,
    pub(super) store: HostStore,
}

/// What comes over a boundary: the stream, and the conditioning without its tables.
pub(super) struct Onward {
    pub x_bld: Tensor,
    pub time_bgd: Tensor,
    pub time_bg6d: Tensor,
    pub text_bsd: Tensor,
    pub picture_bsd: Option<Tensor>,
}

/// The stream at a place between two blocks, with its conditioning.
pub(super) struct Boundary {
    pub x_bld: Tensor,
    pub cond: Conditioning,
}

/// What a stage uses of a micro-batch that comes from the host, on its device.
pub(super) struct Placed {
    input: Option<NetworkInput>,
    expected: Option<Expected>,
}

/// What the last stage holds the prediction against.
struct Expected {
    target: Tensor,
    weights: Tensor,
    mask: Option<Tensor>,
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

/// What comes out of a stage's forward.
pub(super) enum Passed {
    /// To the next stage.
    On(Boundary),
    /// Of the last stage, forward only.
    Velocity(Tensor),
    /// Of the last stage, when training.
    Loss(Tensor),
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
        let dit = Dit::load(weights, config, range, base, device)?;
        let (none, store) = (Adapters::default(), HostStore::new(device)?);
        let mut stage = Self { device: device.clone(), dit, adapters: none, ffn_tokens: FFN_TOKENS, store };
        stage.attach(adapters)?;
        Ok(stage)
    }

    /// Adds this stage's share of `adapters` to those that are there.
    ///
    /// # Errors
    /// Adapters of layers that its blocks do not have.
    pub fn attach(&mut self, adapters: &Adapters) -> Result<()> {
        let range = &self.dit.range;
        let is_here =
            |module: &str| models::names::split_block(module).is_some_and(|(n, _)| range.contains(&n));
        let mut here = adapters.part(&self.device, is_here)?;
        let weights: BTreeMap<&str, &Weight> =
            self.dit.linears().map(|linear| (linear.name(), linear.weight())).collect();
        here.settle(|module| weights.get(module).copied())?;
        self.adapters.extend(here);
        Ok(())
    }

    /// Puts what this stage uses of `batch` onto its device. Copies from the host wait for the device, so all of them
    /// are made before its first operation.
    pub(super) fn place(&self, batch: &MicroBatch) -> Result<Placed> {
        let expected = match &self.dit.head {
            None => None,
            Some(_) => Some(Expected {
                target: batch.target.to_device(&self.device)?,
                weights: Tensor::new(batch.weights.as_slice(), &self.device)?,
                mask: batch.mask.as_ref().map(|mask| mask.to_device(&self.device)).transpose()?,
            }),
        };
        Ok(Placed { expected, ..self.place_input(&batch.input)? })
    }

    /// [`Stage::place`] where nothing is expected.
    pub(super) fn place_input(&self, input: &NetworkInput) -> Result<Placed> {
        let placed = |input: &NetworkInput| -> Result<NetworkInput> {
            Ok(NetworkInput {
                x_bcthw: input.x_bcthw.to_device(&self.device)?,
                timestep: input.timestep.clone(),
                text_bsd: input.text_bsd.to_device(&self.device)?,
                picture_bsd: input.picture_bsd.as_ref().map(|x| x.to_device(&self.device)).transpose()?,
            })
        };
        let input = self.dit.embedder.as_ref().map(|_| placed(input)).transpose()?;
        Ok(Placed { input, expected: None })
    }

    /// The stream and conditioning at the first block of this stage for latents of `grid` = (frames, height, width):
    /// embedded here, or taken over the boundary.
    fn entry(
        &self,
        input: Option<NetworkInput>,
        from_previous: Option<Onward>,
        grid: (usize, usize, usize),
    ) -> Result<Boundary> {
        match (&self.dit.embedder, input, from_previous) {
            (Some(embedder), Some(input), _) => {
                let cond = embedder.conditioning(&input.timestep, &input.text_bsd, grid)?;
                let picture = input.picture_bsd.as_ref().map(|x| embedder.picture(x)).transpose()?;
                Ok(Boundary { x_bld: embedder.tokens(&input.x_bcthw)?, cond: cond.with_picture(picture) })
            }
            (_, _, Some(Onward { x_bld, time_bgd, time_bg6d, text_bsd, picture_bsd })) => {
                let cond = Conditioning::new(time_bgd, time_bg6d, text_bsd, &self.dit.config, grid)?;
                Ok(Boundary { x_bld, cond: cond.with_picture(picture_bsd) })
            }
            _ => Err(candle_core::Error::msg("a stage has no input").into()),
        }
    }

    /// Forward without a backward to come. The last stage gives the velocity, the others the boundary.
    pub(super) fn forward_only(
        &self,
        input: &NetworkInput,
        placed: Placed,
        from_previous: Option<Onward>,
    ) -> Result<Passed> {
        let grid = input.grid()?;
        let Boundary { x_bld, cond } = self.entry(placed.input, from_previous, grid)?;
        let x_bld = self.dit.through(x_bld, &cond, &self.pass(&None))?;
        match &self.dit.head {
            Some(head) => Ok(Passed::Velocity(head.forward(&x_bld, &cond, grid)?)),
            None => Ok(Passed::On(Boundary { x_bld, cond })),
        }
    }

    /// Forward with a backward to come. The last stage gives the loss, the others the boundary.
    pub(super) fn forward(
        &self,
        batch: &MicroBatch,
        placed: Placed,
        from_previous: Option<Onward>,
        keeping: &[BlockPlan],
    ) -> Result<(Passed, InFlight)> {
        let grid = batch.input.grid()?;
        let Boundary { x_bld, cond } = self.entry(placed.input, from_previous, grid)?;
        let keeping = Keeping { plans: keeping, store: &self.store };
        let (x_bld, kept) = self.dit.through_keeping(x_bld, &cond, &self.pass(&batch.dropout), &keeping)?;
        let (Some(head), Some(expected)) = (&self.dit.head, placed.expected) else {
            let passed = Passed::On(Boundary { x_bld, cond: cond.clone() });
            return Ok((passed, InFlight { cond, kept, end: None }));
        };
        let velocity = head.forward(&x_bld, &cond, grid)?;
        let Expected { target, weights, mask } = expected;
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
            (Some(head), Some(End { x_bld, d_velocity }), _) => head.backward(&x_bld, &d_velocity, &cond)?,
            (_, _, Some(dy)) => dy,
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
