//! A linear layer of a block: frozen weight and bias, and the adapters attached to its name.
//!
//! Layers with the same input are computed together: their adapters read it once.

use kernels::linear::{self, Input};
use kernels::low_rank::{self, Member};
use kernels::weight::Weight;
use kernels::{Device, Tensor};

use super::pass::{Gradients, Pass};
use crate::delta::{Adapter, Site};
use crate::weights::{Frozen, Weights};
use crate::{Error, Result};

/// A frozen linear layer that knows its official module name.
#[derive(Debug, Clone)]
pub struct Linear {
    name: String,
    weight: Weight,
    bias: Tensor,
}

/// An adapter of one of several layers, with the layer's index among them.
#[derive(Clone, Copy)]
struct Attached<'a> {
    layer: usize,
    name: &'a str,
    adapter: &'a Adapter,
}

impl Linear {
    /// Loads `<name>.weight` in the form of `frozen`, and `<name>.bias` in its compute dtype.
    pub fn load(weights: &Weights, name: String, frozen: Frozen, device: &Device) -> Result<Self> {
        let weight = weights.matrix(&format!("{name}.weight"), frozen, device)?;
        let bias = weights.tensor(&format!("{name}.bias"), frozen.compute, device)?;
        Ok(Self { name, weight, bias })
    }

    /// Reloads from `weights` the tensors that `changed` has patches for.
    pub fn reload(&mut self, weights: &Weights, changed: &Weights, frozen: Frozen) -> Result<()> {
        let device = self.bias.device().clone();
        let (weight, bias) = (format!("{}.weight", self.name), format!("{}.bias", self.name));
        if changed.is_patched(&weight) {
            self.weight = weights.matrix(&weight, frozen.of_weight(&self.weight), &device)?;
        }
        if changed.is_patched(&bias) {
            self.bias = weights.tensor(&bias, frozen.compute, &device)?;
        }
        Ok(())
    }

    /// Official module name, such as `blocks.0.self_attn.q`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The frozen matrix.
    pub fn weight(&self) -> &Weight {
        &self.weight
    }

    /// [`Self::weight`], to change.
    pub fn weight_mut(&mut self) -> &mut Weight {
        &mut self.weight
    }

    /// Every tensor of the layer.
    pub fn tensors_mut(&mut self) -> Vec<&mut Tensor> {
        let mut tensors = self.weight.tensors_mut();
        tensors.push(&mut self.bias);
        tensors
    }

    /// The layer with its weight dequantised, if its products are not of integers, for callers that use it many times in a row.
    pub(super) fn decoded(&self) -> Result<Self> {
        if self.weight.multiplies_integers() {
            return Ok(self.clone());
        }
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

    /// The gradient of the input, in the weight's dtype; gradients of trainable adapters are added to `gradients`.
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

/// The activation after a layer.
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
    let (plain, others) = attached(&layers, pass);
    // Deltas first: the large product then adds them in its own pass.
    let mut deltas = vec![None; N];
    if pass.dropout.is_none() {
        deltas = low_rank::forward_group(x, &members(&plain), N)?;
    } else {
        // With dropout each layer drops other elements of the input, so the layers share no input.
        for &Attached { layer, name, adapter } in &plain {
            let x = pass.dropped(name, x)?;
            let site = Site { weight: &layers[layer].weight, product: None };
            deltas[layer] = Some(added(deltas[layer].take(), adapter.delta().forward(&x, site)?)?);
        }
    }
    let input = Input::shared(x, &layers[0].weight)?;
    let products = products(&layers, &input, &others)?;
    for &Attached { layer, name, adapter } in &others {
        let site = Site { weight: &layers[layer].weight, product: products[layer].as_ref() };
        let delta = adapter.delta().forward(&pass.dropped(name, x)?, site)?;
        deltas[layer] = Some(added(deltas[layer].take(), delta)?);
    }
    let whole = |((layer, delta), product): ((&&Linear, &Option<Tensor>), Option<Tensor>)| {
        if let Some(product) = product {
            let y = added(delta.clone(), product)?.broadcast_add(&layer.bias)?;
            return match then {
                Then::Stay => Ok(y),
                Then::Gelu => kernels::gelu::forward(&y),
            };
        }
        match then {
            Then::Stay => linear::forward(&input, &layer.weight, Some(&layer.bias), delta.as_ref()),
            Then::Gelu => linear::forward_gelu(&input, &layer.weight, Some(&layer.bias), delta.as_ref()),
        }
    };
    let ys = layers.iter().zip(&deltas).zip(products).map(whole).collect::<kernels::Result<Vec<_>>>()?;
    ys.try_into().map_err(|ys: Vec<Tensor>| Error::Mismatch(format!("{N} layers gave {} outputs", ys.len())))
}

/// The products without bias of the layers whose adapters need them (DoRA).
fn products(
    layers: &[&Linear],
    input: impl Into<Input> + Copy,
    others: &[Attached],
) -> Result<Vec<Option<Tensor>>> {
    let is_wanted =
        |layer: usize| others.iter().any(|one| one.layer == layer && one.adapter.delta().wants_product());
    let product = |(index, layer): (usize, &&Linear)| match is_wanted(index) {
        true => Ok(Some(linear::forward(input, &layer.weight, None, None)?)),
        false => Ok(None),
    };
    layers.iter().enumerate().map(product).collect()
}

fn added(sum: Option<Tensor>, delta: Tensor) -> kernels::Result<Tensor> {
    match sum {
        Some(sum) => sum + delta,
        None => Ok(delta),
    }
}

/// The gradient of the input of [`forward_all`], in the weights' dtype; gradients of trainable adapters are added to
/// `gradients`.
pub fn backward_all<const N: usize>(
    layers: [&Linear; N],
    x: &Tensor,
    dys: &[Tensor; N],
    pass: &Pass,
    gradients: &mut Gradients,
) -> Result<Tensor> {
    if let Some(watch) = pass.watch {
        layers.iter().zip(dys).try_for_each(|(layer, dy)| watch.seen(layer, x, dy))?;
    }
    let Through { mut dx, d_products } = adapters_backward(&layers, x, dys, pass, gradients)?;
    for ((layer, dy), d_product) in layers.iter().zip(dys).zip(d_products) {
        let dy = match d_product {
            Some(d_product) => &(d_product + dy.to_dtype(layer.weight.dtype())?)?,
            None => dy,
        };
        dx = Some(linear::backward_input(dy, &layer.weight, dx.as_ref())?);
    }
    dx.ok_or_else(|| Error::Mismatch("the gradient of no layers was asked for".into()))
}

/// [`backward_all`] without the gradient of the input, where nothing needs it (text projections).
pub fn backward_adapters<const N: usize>(
    layers: [&Linear; N],
    x: &Tensor,
    dys: &[Tensor; N],
    pass: &Pass,
    gradients: &mut Gradients,
) -> Result<()> {
    adapters_backward(&layers, x, dys, pass, gradients).map(drop)
}

/// The gradients that flow back through adapters.
struct Through {
    /// Of the input; `None` without adapters.
    dx: Option<Tensor>,
    /// Of each layer's plain product.
    d_products: Vec<Option<Tensor>>,
}

fn adapters_backward(
    layers: &[&Linear],
    x: &Tensor,
    dys: &[Tensor],
    pass: &Pass,
    gradients: &mut Gradients,
) -> Result<Through> {
    let x = &x.to_dtype(layers[0].weight.dtype())?;
    let (plain, others) = attached(layers, pass);
    let mut through = Through { dx: None, d_products: vec![None; layers.len()] };
    if plain.is_empty() && others.is_empty() {
        return Ok(through);
    }
    let alone = match pass.dropout {
        None => {
            let grads = low_rank::backward_group(x, dys, &members(&plain), None)?;
            for (one, factors) in plain.iter().zip(grads.factors) {
                one.note(vec![("lora_A.weight", factors.da), ("lora_B.weight", factors.db)], gradients)?;
            }
            through.dx = (!plain.is_empty()).then_some(grads.dx);
            others.clone()
        }
        Some(_) => plain.iter().chain(&others).copied().collect(),
    };
    let products = products(layers, x, &alone)?;
    for one in &alone {
        let site = Site { weight: &layers[one.layer].weight, product: products[one.layer].as_ref() };
        let dropped = pass.dropped(one.name, x)?;
        let back = one.adapter.delta().backward(&dropped, &dys[one.layer], site)?;
        through.dx = Some(added(through.dx.take(), pass.dropped(one.name, &back.dx)?)?);
        if let Some(d_product) = back.d_product {
            let sum = &mut through.d_products[one.layer];
            *sum = Some(added(sum.take(), d_product)?);
        }
        one.note(back.gradients, gradients)?;
    }
    Ok(through)
}

/// The adapters of `layers`, layer by layer: plain LoRAs, whose products are batched, and the other kinds.
fn attached<'a>(layers: &[&'a Linear], pass: &Pass<'a>) -> (Vec<Attached<'a>>, Vec<Attached<'a>>) {
    let adapters = pass.adapters;
    let of = |(layer, linear): (usize, &&'a Linear)| {
        let name = linear.name.as_str();
        adapters.of(name).iter().map(move |adapter| Attached { layer, name, adapter })
    };
    layers.iter().enumerate().flat_map(of).partition(|one| one.adapter.delta().plain().is_some())
}

/// The factors of plain LoRAs.
fn members<'a>(attached: &[Attached<'a>]) -> Vec<Member<'a>> {
    let of = |one: &Attached<'a>| Some(Member { layer: one.layer, factors: one.adapter.delta().plain()? });
    attached.iter().filter_map(of).collect()
}

impl Attached<'_> {
    /// Adds the gradients of its tensors to `gradients`, if it is trainable.
    fn note(&self, found: Vec<(&'static str, Tensor)>, gradients: &mut Gradients) -> Result<()> {
        if self.adapter.is_trainable() {
            found
                .into_iter()
                .try_for_each(|(name, gradient)| gradients.add(format!("{}.{name}", self.name), gradient))?;
        }
        Ok(())
    }
}
