//! A linear layer of a block: frozen weight and bias, and whatever adapters are attached to its name.
//!
//! Layers that read the same input go through together: their adapters read it once.

use candle_core::{Device, Tensor};
use kernels::low_rank::{self, FactorGradients, Member};
use kernels::weight::Weight;

use super::pass::{Gradients, Pass};
use crate::adapter::Adapter;
use crate::weights::{Frozen, Weights};
use crate::{Error, Result};

/// A frozen linear layer that knows its official module name.
#[derive(Debug, Clone)]
pub struct Linear {
    name: String,
    weight: Weight,
    bias: Tensor,
}

/// An adapter of one of several layers, with the layer's place among them.
struct Attached<'a> {
    layer: usize,
    name: &'a str,
    adapter: &'a Adapter,
}

impl Linear {
    /// Reads `<name>.weight` as `frozen` says, and `<name>.bias` in its compute dtype.
    pub fn load(weights: &Weights, name: String, frozen: Frozen, device: &Device) -> Result<Self> {
        let weight = weights.matrix(&format!("{name}.weight"), frozen, device)?;
        let bias = weights.tensor(&format!("{name}.bias"), frozen.compute, device)?;
        Ok(Self { name, weight, bias })
    }

    /// Official module name, such as `blocks.0.self_attn.q`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The frozen matrix.
    pub fn weight(&self) -> &Weight {
        &self.weight
    }

    /// The layer with its weight as products want it, for callers that go through it many times in a row.
    pub(super) fn decoded(&self) -> Result<Self> {
        let weight = Weight::Dense(self.weight.dequantised(self.weight.dtype())?);
        Ok(Self { weight, ..self.clone() })
    }

    /// `x` [b, l, in] -> [b, l, out] in the weight's dtype.
    pub fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        let [y] = forward_all([self], x, pass)?;
        Ok(y)
    }

    /// GELU of [`Linear::forward`].
    pub fn forward_gelu(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        let [y] = forward_then([self], x, pass, Then::Gelu)?;
        Ok(y)
    }

    /// The gradient of the input, in the weight's dtype; gradients of trainable adapters go into `gradients`.
    pub fn backward(
        &self,
        x: &Tensor,
        dy: &Tensor,
        pass: &Pass,
        gradients: &mut Gradients,
    ) -> Result<Tensor> {
        backward_all([self], x, std::array::from_ref(dy), pass, gradients)
    }
}

/// What a layer's output goes through.
#[derive(Clone, Copy)]
enum Then {
    Stay,
    Gelu,
}

/// Several layers over one input: `x` [b, l, in] -> [b, l, out] each.
pub fn forward_all<const N: usize>(layers: [&Linear; N], x: &Tensor, pass: &Pass) -> Result<[Tensor; N]> {
    forward_then(layers, x, pass, Then::Stay)
}

fn forward_then<const N: usize>(
    layers: [&Linear; N],
    x: &Tensor,
    pass: &Pass,
    then: Then,
) -> Result<[Tensor; N]> {
    let x = &x.to_dtype(layers[0].weight.dtype())?;
    let attached = attached(&layers, pass);
    // Deltas first: the large product then adds them in its own pass.
    let mut deltas = vec![None; N];
    if pass.dropout.is_none() {
        deltas = low_rank::forward_group(x, &members(&attached), N)?;
    } else {
        // Every layer drops other elements of the input, so there is no input that they share.
        for Attached { layer, name, adapter } in attached {
            let x = pass.dropped(name, x)?;
            deltas[layer] = Some(low_rank::forward(&x, adapter.factors(), deltas[layer].as_ref())?);
        }
    }
    let whole = |(layer, delta): (&&Linear, &Option<Tensor>)| match then {
        Then::Stay => kernels::linear::forward(x, &layer.weight, Some(&layer.bias), delta.as_ref()),
        Then::Gelu => kernels::linear::forward_gelu(x, &layer.weight, Some(&layer.bias), delta.as_ref()),
    };
    let ys = layers.iter().zip(&deltas).map(whole).collect::<kernels::Result<Vec<_>>>()?;
    ys.try_into().map_err(|ys: Vec<Tensor>| Error::Mismatch(format!("{N} layers gave {} outputs", ys.len())))
}

/// The gradient of the input of [`forward_all`], in the weights' dtype; gradients of trainable adapters go into
/// `gradients`.
pub fn backward_all<const N: usize>(
    layers: [&Linear; N],
    x: &Tensor,
    dys: &[Tensor; N],
    pass: &Pass,
    gradients: &mut Gradients,
) -> Result<Tensor> {
    let mut dx = adapters_backward(&layers, x, dys, pass, gradients)?;
    for (layer, dy) in layers.iter().zip(dys) {
        dx = Some(kernels::linear::backward_input(dy, &layer.weight, dx.as_ref())?);
    }
    dx.ok_or_else(|| Error::Mismatch("the gradient of no layers was asked for".into()))
}

/// [`backward_all`] where nothing upstream wants the gradient of the input (text projections).
pub fn backward_adapters<const N: usize>(
    layers: [&Linear; N],
    x: &Tensor,
    dys: &[Tensor; N],
    pass: &Pass,
    gradients: &mut Gradients,
) -> Result<()> {
    adapters_backward(&layers, x, dys, pass, gradients).map(drop)
}

/// What goes back to the input through the adapters; nothing where there are none.
fn adapters_backward(
    layers: &[&Linear],
    x: &Tensor,
    dys: &[Tensor],
    pass: &Pass,
    gradients: &mut Gradients,
) -> Result<Option<Tensor>> {
    let x = &x.to_dtype(layers[0].weight.dtype())?;
    let attached = attached(layers, pass);
    if attached.is_empty() {
        return Ok(None);
    }
    if pass.dropout.is_none() {
        let grads = low_rank::backward_group(x, dys, &members(&attached), None)?;
        for (attached, factors) in attached.iter().zip(grads.factors) {
            attached.note(factors, gradients)?;
        }
        return Ok(Some(grads.dx));
    }
    let mut sum = x.zeros_like()?;
    for one in &attached {
        let dropped = pass.dropped(one.name, x)?;
        let grads = low_rank::backward(&dropped, &dys[one.layer], one.adapter.factors(), None)?;
        sum = (sum + pass.dropped(one.name, &grads.dx)?)?;
        for factors in grads.factors {
            one.note(factors, gradients)?;
        }
    }
    Ok(Some(sum))
}

/// The adapters of `layers`, layer by layer.
fn attached<'a>(layers: &[&'a Linear], pass: &Pass<'a>) -> Vec<Attached<'a>> {
    let adapters = pass.adapters;
    let of = |(layer, linear): (usize, &&'a Linear)| {
        let name = linear.name.as_str();
        adapters.of(name).iter().map(move |adapter| Attached { layer, name, adapter })
    };
    layers.iter().enumerate().flat_map(of).collect()
}

fn members<'a>(attached: &[Attached<'a>]) -> Vec<Member<'a>> {
    attached.iter().map(|one| Member { layer: one.layer, factors: one.adapter.factors() }).collect()
}

impl Attached<'_> {
    /// Adds the gradients of the factors to `gradients`, where they are wanted.
    fn note(&self, factors: FactorGradients, gradients: &mut Gradients) -> Result<()> {
        if self.adapter.is_trainable() {
            gradients.add(format!("{}.lora_A.weight", self.name), factors.da)?;
            gradients.add(format!("{}.lora_B.weight", self.name), factors.db)?;
        }
        Ok(())
    }
}
