//! The low-rank adapter pair: delta = scale * (x A^T) B^T, as two thin products, never as a full matrix.
//!
//! Layers that read the same input (q, k, v) have their A's stacked, so that the input is read once for all of them.

use crate::Result;
use crate::Tensor;
use crate::linear::{flat, flat_like, unflat};
use crate::product::{End, product};
use crate::profile::{self, Class};
use candle_core::{D, DType};

/// The factors of one adapter, f32 masters. In the GEMM they are cast to the dtype of the input.
#[derive(Debug, Clone)]
pub struct Factors {
    /// Down factor A [r, in].
    pub a: Tensor,
    /// Up factor B [out, r].
    pub b: Tensor,
    /// What the product is multiplied by: strength * alpha / rank (or alpha / sqrt(rank), rsLoRA).
    pub scale: f64,
}

/// An adapter of one of several layers that read the same input.
#[derive(Debug, Clone, Copy)]
pub struct Member<'a> {
    /// Which of the layers it belongs to. A layer may have none, or several.
    pub layer: usize,
    /// Its factors; ranks may differ.
    pub factors: &'a Factors,
}

/// The gradients of one adapter.
#[derive(Debug, Clone)]
pub struct FactorGradients {
    /// Of A, [r, in], f32.
    pub da: Tensor,
    /// Of B, [out, r], f32.
    pub db: Tensor,
}

/// The gradients of [`forward`] or [`forward_group`].
#[derive(Debug, Clone)]
pub struct Gradients {
    /// Of the input, [.., in], in the dtype of `x`, with what it was to be added onto.
    pub dx: Tensor,
    /// Of the factors, in the order of the members.
    pub factors: Vec<FactorGradients>,
}

/// delta = scale * (x A^T) B^T, plus `onto` where one is given: `x` [.., in] -> [.., out], in the dtype of `x`.
pub fn forward(x: &Tensor, factors: &Factors, onto: Option<&Tensor>) -> Result<Tensor> {
    let _noted = profile::scope(Class::Gemm, x.device());
    let a = factors.a.to_dtype(x.dtype())?;
    let h = product(&flat(x)?, &a.t()?, End::plain(x.dtype()))?;
    let onto = flat_like(onto, x.dtype())?;
    unflat(&up(&h, factors, onto.as_ref())?, x, factors.b.dim(0)?)
}

/// The gradients of [`forward`] for `x` [.., in] and `dy` [.., out]; dx comes with `onto` added.
pub fn backward(x: &Tensor, dy: &Tensor, factors: &Factors, onto: Option<&Tensor>) -> Result<Gradients> {
    backward_group(x, std::slice::from_ref(dy), &[Member { layer: 0, factors }], onto)
}

/// The sum of the members' deltas for each of `layers` layers, [.., out] in the dtype of `x` [.., in]; `None` for a
/// layer without members.
pub fn forward_group(x: &Tensor, members: &[Member], layers: usize) -> Result<Vec<Option<Tensor>>> {
    let mut deltas = vec![None; layers];
    if members.is_empty() {
        return Ok(deltas);
    }
    let _noted = profile::scope(Class::Gemm, x.device());
    let h = product(&flat(x)?, &stacked(members, x.dtype())?.t()?, End::plain(x.dtype()))?;
    for (member, h) in members.iter().zip(by_member(&h, members, 1)?) {
        let onto = flat_like(deltas[member.layer].as_ref(), x.dtype())?;
        deltas[member.layer] =
            Some(unflat(&up(&h, member.factors, onto.as_ref())?, x, member.factors.b.dim(0)?)?);
    }
    Ok(deltas)
}

/// The gradients of [`forward_group`] for `x` [.., in] and `dys` [.., out], one for each layer; dx comes with `onto`
/// added.
///
/// With h = x A^T and dh = scale * dy B: dB = scale * dy^T h, dA = dh^T x, dx = dh A. h is recomputed from `x`.
pub fn backward_group(
    x: &Tensor,
    dys: &[Tensor],
    members: &[Member],
    onto: Option<&Tensor>,
) -> Result<Gradients> {
    if members.is_empty() {
        let dx = onto.map_or_else(|| x.zeros_like(), |onto| Ok(onto.clone()))?;
        return Ok(Gradients { dx, factors: Vec::new() });
    }
    let _noted = profile::scope(Class::Gemm, x.device());
    let (x_flat, a, dtype) = (flat(x)?, stacked(members, x.dtype())?, x.dtype());
    let h = product(&x_flat, &a.t()?, End::plain(dtype))?;
    let (mut dhs, mut dbs) = (Vec::new(), Vec::new());
    for (member, h) in members.iter().zip(by_member(&h, members, 1)?) {
        let (dy, scale) = (flat(&dys[member.layer])?.to_dtype(dtype)?, member.factors.scale);
        dhs.push(product(&dy, &member.factors.b.to_dtype(dtype)?, End { scale, ..End::plain(dtype) })?);
        dbs.push(product(&dy.t()?, &h, End { scale, ..End::plain(DType::F32) })?);
    }
    let dh = Tensor::cat(&dhs, 1)?;
    let da = product(&dh.t()?, &x_flat, End::plain(DType::F32))?;
    let das = by_member(&da, members, 0)?;
    let onto = flat_like(onto, dtype)?;
    let dx = product(&dh, &a, End { onto: onto.as_ref(), ..End::plain(dtype) })?;
    let factors = das.into_iter().zip(dbs).map(|(da, db)| FactorGradients { da, db }).collect();
    Ok(Gradients { dx: unflat(&dx, x, x.dim(D::Minus1)?)?, factors })
}

/// scale * h B^T, plus `onto`: `h` [rows, r] -> [rows, out].
fn up(h: &Tensor, factors: &Factors, onto: Option<&Tensor>) -> Result<Tensor> {
    let b = factors.b.to_dtype(h.dtype())?;
    product(h, &b.t()?, End { scale: factors.scale, onto, ..End::plain(h.dtype()) })
}

/// The members' A matrices stacked, [sum of r, in], cast to `dtype`.
fn stacked(members: &[Member], dtype: DType) -> Result<Tensor> {
    let factors = members.iter().map(|member| member.factors.a.to_dtype(dtype));
    Tensor::cat(&factors.collect::<Result<Vec<_>>>()?, 0)
}

/// The part of each member of a tensor whose `axis` is the stacked ranks.
fn by_member(x: &Tensor, members: &[Member], axis: usize) -> Result<Vec<Tensor>> {
    let mut start = 0;
    let part = |member: &Member| {
        let rank = member.factors.a.dim(0)?;
        start += rank;
        x.narrow(axis, start - rank, rank)
    };
    members.iter().map(part).collect()
}
