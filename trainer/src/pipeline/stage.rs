//! A stage: a device, the part of the model that is on it, and the adapters of that part.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use kernels::loss::Terms;
use kernels::transfer::HostStore;
use kernels::weight::Weight;
use kernels::{DType, Device, Tensor};
use models::adapter::Adapters;
use models::dit::pass::FFN_TOKENS;
use models::dit::{
    Architecture, Base, Boundary, Context, Dit, Dropout, Gradients, Keeping, Kept, Layer, LayerWatch,
    NetworkInput, Pass, Plans, Streams,
};
use models::weights::Weights;

use super::micro_batch::MicroBatch;
use super::residuals::{Blocks, Residuals};
use crate::error::Result;

/// A device with its part of the DiT.
#[derive(Debug)]
pub struct Stage {
    /// The device of all its tensors.
    pub device: Device,
    /// The layers, and the embeddings or the head at the ends.
    pub dit: Dit,
    /// The adapters of these layers.
    pub adapters: Adapters,
    /// The most tokens of a sample that go through a feed-forward layer at once.
    pub(super) ffn_tokens: usize,
    pub(super) store: HostStore,
    /// Who is shown what goes through the layers in a backward.
    pub(super) watch: Option<Arc<dyn LayerWatch>>,
}

/// What a stage uses of a micro-batch that comes from the host, on its device.
pub(super) struct Placed {
    input: Option<NetworkInput>,
    expected: Option<Expected>,
}

/// What the last stage holds the prediction against.
struct Expected {
    target: Tensor,
    samples: Tensor,
    counted: Option<Tensor>,
    scale: Option<Tensor>,
    weights: Option<Tensor>,
}

/// What a stage holds of a micro-batch between its forward and its backward.
pub(super) struct InFlight {
    context: Context,
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
    /// Reads the blocks of `range` and the layers that follow them onto `device`, with their share of `adapters`.
    pub fn load(
        weights: &Weights,
        architecture: impl Into<Arc<dyn Architecture>>,
        range: Range<usize>,
        adapters: &Adapters,
        base: Base,
        device: &Device,
    ) -> Result<Self> {
        let dit = Dit::load(weights, architecture, range, base, device)?;
        let (none, store) = (Adapters::default(), HostStore::new(device)?);
        let mut stage =
            Self { device: device.clone(), dit, adapters: none, ffn_tokens: FFN_TOKENS, store, watch: None };
        stage.attach(adapters)?;
        Ok(stage)
    }

    /// Lets at most `tokens` tokens of a sample through a feed-forward layer at once.
    pub(crate) fn set_ffn_tokens(&mut self, tokens: usize) {
        self.ffn_tokens = tokens;
    }

    /// Adds this stage's share of `adapters` to those that are there.
    ///
    /// # Errors
    /// Adapters of modules that its layers do not have.
    pub fn attach(&mut self, adapters: &Adapters) -> Result<()> {
        for (index, layer) in self.dit.layers.iter().enumerate() {
            let id = layer.id();
            let mut here = adapters.part(&self.device, |module| id.local(module).is_some())?;
            let wants_weights = here.wants_weights();
            let mut settle = |layer: &dyn Layer| {
                let linears = layer.linears();
                let weights: BTreeMap<&str, &Weight> =
                    linears.iter().map(|linear| (linear.name(), linear.weight())).collect();
                here.settle(|module| weights.get(module).copied())
            };
            // Matrices that are in host memory come for those that need them alone.
            match wants_weights {
                true => self.dit.with_layer(index, settle)?,
                false => settle(layer.as_ref())?,
            }
            self.adapters.extend(here);
        }
        Ok(())
    }

    /// Takes all adapters out and leaves the same in their place, of which those that are trained have no effect.
    pub(crate) fn take_trained(&mut self) -> Adapters {
        let off = self.adapters.trained_off();
        std::mem::replace(&mut self.adapters, off)
    }

    /// Puts what this stage uses of `batch` onto its device. Copies from the host wait for the device, so all of them
    /// are made before its first operation.
    pub(super) fn place(&self, batch: &MicroBatch) -> Result<Placed> {
        let here = |x: &Option<Tensor>| x.as_ref().map(|x| x.to_device(&self.device)).transpose();
        let (objective, has_scale) = (&batch.objective, batch.objective.penalty.has_scale());
        let scale = || Tensor::new(objective.scale.as_slice(), &self.device);
        let expected = match &self.dit.head {
            None => None,
            Some(_) => Some(Expected {
                target: batch.target.to_device(&self.device)?,
                samples: Tensor::new(batch.weights.as_slice(), &self.device)?,
                counted: here(&batch.mask)?,
                scale: has_scale.then(scale).transpose()?,
                weights: here(&objective.weights)?,
            }),
        };
        let input = self.dit.embedder.as_ref().map(|_| batch.input.to_device(&self.device)).transpose()?;
        Ok(Placed { input, expected })
    }

    /// The streams at the first layer of this stage, embedded here or taken over the boundary, and what its layers read
    /// besides, for `input`, which may be on the host.
    pub(super) fn entry(
        &self,
        input: &NetworkInput,
        placed: Option<NetworkInput>,
        from_previous: Option<Boundary>,
    ) -> Result<(Streams, Context)> {
        let Boundary { streams, cond } = match (&self.dit.embedder, placed, from_previous) {
            (Some(embedder), Some(placed), _) => embedder.embed(&placed)?,
            (_, _, Some(boundary)) => boundary,
            _ => return Err(kernels::Error::msg("a stage has no input").into()),
        };
        Ok((streams, self.dit.context(cond, input, &self.device)?))
    }

    /// Forward without a backward to come, of `input`, whose tensors are on the first stage's device, in `call`. The last
    /// stage gives the velocity, the others the boundary.
    pub(super) fn forward_only(
        &self,
        input: &NetworkInput,
        from_previous: Option<Boundary>,
        call: (usize, Blocks),
        residuals: &mut Residuals,
    ) -> Result<Passed> {
        let placed = self.dit.embedder.as_ref().map(|_| input.clone());
        let (streams, context) = self.entry(input, placed, from_previous)?;
        let streams = residuals.through(self, streams, &context, call)?;
        match &self.dit.head {
            Some(head) => Ok(Passed::Velocity(head.forward(&streams.main, &context)?)),
            None => Ok(Passed::On(Boundary { streams, cond: context.cond })),
        }
    }

    /// The streams through the blocks, forward only.
    pub(super) fn through(&self, streams: Streams, context: &Context) -> Result<Streams> {
        Ok(self.dit.through(streams, context, &self.pass(&None))?)
    }

    /// The dtype that products are made in.
    pub(crate) fn compute(&self) -> DType {
        self.dit.linears().next().map_or(DType::F32, |linear| linear.weight().dtype())
    }

    /// Forward with a backward to come. The last stage gives the loss, the others the boundary.
    pub(super) fn forward(
        &self,
        batch: &MicroBatch,
        placed: Placed,
        from_previous: Option<Boundary>,
        plans: &Plans,
    ) -> Result<(Passed, InFlight)> {
        let (streams, context) = self.entry(&batch.input, placed.input, from_previous)?;
        let (pass, keeping) = (self.pass(&batch.dropout), Keeping { plans, store: &self.store });
        let (streams, kept) = self.dit.through_keeping(streams, &context, &pass, &keeping)?;
        let (Some(head), Some(expected)) = (&self.dit.head, placed.expected) else {
            let passed = Passed::On(Boundary { streams, cond: context.cond.clone() });
            return Ok((passed, InFlight { context, kept, end: None }));
        };
        let x_bld = streams.main;
        let velocity = head.forward(&x_bld, &context)?;
        let Expected { target, samples, counted, scale, weights } = expected;
        let terms = Terms {
            penalty: batch.objective.penalty,
            scale: scale.as_ref(),
            samples: &samples,
            counted: counted.as_ref(),
            weights: weights.as_ref(),
            reduction: batch.objective.reduction,
        };
        let loss = kernels::loss::loss(&velocity, &target, &terms)?;
        let end = Some(End { x_bld, d_velocity: loss.d_prediction });
        Ok((Passed::Loss(loss.value), InFlight { context, kept, end }))
    }

    /// Backward of what is in flight; `from_next` are the gradients that the next stage sent, and the last stage needs
    /// none. The result is for the stage before.
    pub(super) fn backward(
        &self,
        batch: &MicroBatch,
        in_flight: InFlight,
        from_next: Option<Streams>,
        gradients: &mut Gradients,
    ) -> Result<Streams> {
        let InFlight { context, kept, end } = in_flight;
        let d_streams = match (&self.dit.head, end, from_next) {
            (Some(head), Some(End { x_bld, d_velocity }), _) => {
                Streams::new(head.backward(&x_bld, &d_velocity, &context)?)
            }
            (_, _, Some(d_streams)) => d_streams,
            _ => {
                return Err(
                    kernels::Error::msg("a stage before the last has no gradient to take back").into()
                );
            }
        };
        Ok(self.dit.backward(kept, d_streams, &context, &self.pass(&batch.dropout), gradients)?)
    }

    fn pass<'a>(&'a self, dropout: &'a Option<Dropout>) -> Pass<'a> {
        let pass = Pass::new(&self.adapters, dropout.as_ref()).with_ffn_tokens(self.ffn_tokens);
        pass.watched(self.watch.as_deref())
    }
}
