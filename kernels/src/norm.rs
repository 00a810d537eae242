//! Norms over the model width, statistics in f32: modulated LayerNorm, affine LayerNorm, RMSNorm.
//!
//! All three share one core, `normalised`, and differ in the gain after it.

use crate::Result;
use crate::Tensor;
use crate::gpu::{File, Gpu, Launch, fits, suffix};
use crate::profile::{self, Class};
use crate::residual::Stream;
use crate::tokens::{Destination, by_group, from_group};
use candle_core::{D, DType};

/// Which statistics a norm divides by.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Layer,
    Rms,
}

/// What a row of gains means.
#[derive(Clone, Copy)]
enum Gain {
    /// The factor less one: modulation.
    AboveOne,
    /// The factor.
    Whole,
}

/// LayerNorm without affine, then modulation: y = LN(x) * (1 + scale) + shift, computed in f32 and rounded to `dtype`.
///
/// `x` [b, l, d]; `shift_bg1d`, `scale_bg1d` [b, g, 1, d] f32, one row for each group of l/g tokens.
pub fn modulated_layer_norm(
    x: impl Into<Stream>,
    shift_bg1d: &Tensor,
    scale_bg1d: &Tensor,
    eps: f64,
    dtype: DType,
) -> Result<Tensor> {
    let x = x.into();
    let _noted = profile::scope(Class::Elementwise, x.x.device());
    on_gpu!(&x.x, |gpu| gpu.layer_norm(&x, [scale_bg1d, shift_bg1d], Gain::AboveOne, eps, dtype)?);
    let x = &x.whole()?;
    let (x_hat, _) = normalised(x, eps, Kind::Layer)?;
    let gain = (scale_bg1d + 1.0)?;
    let y = by_group(&x_hat, scale_bg1d)?.broadcast_mul(&gain)?.broadcast_add(shift_bg1d)?;
    from_group(&y, x)?.to_dtype(dtype)
}

/// `onto` plus the gradient of the input of [`modulated_layer_norm`], in the dtype of `onto`.
///
/// `dy` [b, l, d]; `onto` [b, l, d] is the gradient that flows past the norm.
pub fn modulated_layer_norm_backward(
    x: impl Into<Stream>,
    dy: &Tensor,
    scale_bg1d: &Tensor,
    eps: f64,
    onto: &Tensor,
) -> Result<Tensor> {
    let x = x.into();
    let _noted = profile::scope(Class::Elementwise, onto.device());
    on_gpu!(onto, |gpu| {
        let dx = gpu.empty(onto.shape(), onto.dtype())?;
        gpu.layer_norm_backward(&x, dy, (scale_bg1d, Gain::AboveOne), eps, onto, &dx)?.then_some(dx)
    });
    let dy = dy.to_dtype(DType::F32)?;
    let dx_hat = from_group(&by_group(&dy, scale_bg1d)?.broadcast_mul(&(scale_bg1d + 1.0)?)?, &dy)?;
    onto + normalised_backward(&x.whole()?, &dx_hat, eps, Kind::Layer)?.to_dtype(onto.dtype())?
}

/// [`modulated_layer_norm_backward`], with the gradient written to `to`, which may be the memory of `onto`.
pub fn modulated_layer_norm_backward_at(
    to: Destination,
    x: impl Into<Stream>,
    dy: &Tensor,
    scale_bg1d: &Tensor,
    eps: f64,
    onto: &Tensor,
) -> Result<()> {
    let x = x.into();
    on_gpu!(onto, |gpu| {
        let _noted = profile::scope(Class::Elementwise, onto.device());
        match to.run(onto)? {
            Some(dx) => {
                gpu.layer_norm_backward(&x, dy, (scale_bg1d, Gain::AboveOne), eps, onto, &dx)?.then_some(())
            }
            None => None,
        }
    });
    to.put(&modulated_layer_norm_backward(x, dy, scale_bg1d, eps, onto)?)
}

/// LayerNorm with weight and bias `[d]`, computed in f32 and rounded to `dtype`: `x` [b, l, d] -> [b, l, d].
pub fn affine_layer_norm(
    x: impl Into<Stream>,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
    dtype: DType,
) -> Result<Tensor> {
    let x = x.into();
    let _noted = profile::scope(Class::Elementwise, x.x.device());
    on_gpu!(&x.x, |gpu| gpu.layer_norm(&x, [weight, bias], Gain::Whole, eps, dtype)?);
    let (x_hat, _) = normalised(&x.whole()?, eps, Kind::Layer)?;
    let y = x_hat.broadcast_mul(&weight.to_dtype(DType::F32)?)?;
    y.broadcast_add(&bias.to_dtype(DType::F32)?)?.to_dtype(dtype)
}

/// `onto` plus the gradient of the input of [`affine_layer_norm`], in the dtype of `onto`.
pub fn affine_layer_norm_backward(
    x: impl Into<Stream>,
    dy: &Tensor,
    weight: &Tensor,
    eps: f64,
    onto: &Tensor,
) -> Result<Tensor> {
    let x = x.into();
    let _noted = profile::scope(Class::Elementwise, onto.device());
    on_gpu!(onto, |gpu| {
        let dx = gpu.empty(onto.shape(), onto.dtype())?;
        gpu.layer_norm_backward(&x, dy, (weight, Gain::Whole), eps, onto, &dx)?.then_some(dx)
    });
    let dx_hat = dy.to_dtype(DType::F32)?.broadcast_mul(&weight.to_dtype(DType::F32)?)?;
    onto + normalised_backward(&x.whole()?, &dx_hat, eps, Kind::Layer)?.to_dtype(onto.dtype())?
}

/// RMSNorm over the whole last axis: y = x / sqrt(mean(x^2) + eps) * weight.
///
/// `x` [.., d]; normalised in f32, rounded to the dtype of `x`, then times the weight in f32 (the official order,
/// Wan-Video/Wan2.1 wan/modules/model.py `WanRMSNorm`), then rounded to `dtype`.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64, dtype: DType) -> Result<Tensor> {
    let _noted = profile::scope(Class::Elementwise, x.device());
    on_gpu!(x, |gpu| gpu.rms_norm(x, weight, eps, dtype)?);
    let (x_hat, _) = normalised(x, eps, Kind::Rms)?;
    let x_hat = x_hat.to_dtype(x.dtype())?.to_dtype(DType::F32)?;
    x_hat.broadcast_mul(&weight.to_dtype(DType::F32)?)?.to_dtype(dtype)
}

/// The gradient of the input of [`rms_norm`], computed in f32 and rounded to the dtype of `x`.
pub fn rms_norm_backward(x: &Tensor, dy: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let _noted = profile::scope(Class::Elementwise, x.device());
    on_gpu!(x, |gpu| gpu.rms_norm_backward(x, dy, weight, eps)?);
    let dx_hat = dy.to_dtype(DType::F32)?.broadcast_mul(&weight.to_dtype(DType::F32)?)?;
    normalised_backward(x, &dx_hat, eps, Kind::Rms)?.to_dtype(x.dtype())
}

/// (x_hat, 1/deviation), both f32: x centred (LayerNorm only) and divided by its deviation over the last axis.
fn normalised(x: &Tensor, eps: f64, kind: Kind) -> Result<(Tensor, Tensor)> {
    let x = x.to_dtype(DType::F32)?;
    let x = match kind {
        Kind::Layer => x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?,
        Kind::Rms => x,
    };
    let inverse = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()?;
    Ok((x.broadcast_mul(&inverse)?, inverse))
}

/// dx = (dx_hat - [mean(dx_hat)] - x_hat * mean(dx_hat * x_hat)) / deviation; the bracket for LayerNorm only.
fn normalised_backward(x: &Tensor, dx_hat: &Tensor, eps: f64, kind: Kind) -> Result<Tensor> {
    let (x_hat, inverse) = normalised(x, eps, kind)?;
    let along = (dx_hat * &x_hat)?.mean_keepdim(D::Minus1)?;
    let dx = (dx_hat - x_hat.broadcast_mul(&along)?)?;
    let dx = match kind {
        Kind::Layer => dx.broadcast_sub(&dx_hat.mean_keepdim(D::Minus1)?)?,
        Kind::Rms => dx,
    };
    dx.broadcast_mul(&inverse)
}

impl Gain {
    fn one(self) -> f64 {
        match self {
            Self::AboveOne => 1.0,
            Self::Whole => 0.0,
        }
    }
}

/// Threads of the block that has a row of `width`, for `norm.cu`: three quads each, which keeps loads in flight without
/// idle threads.
pub(crate) fn row_threads(width: usize) -> usize {
    (width / 12).next_multiple_of(32).clamp(32, 256)
}

impl Gpu {
    fn layer_norm(
        &self,
        x: &Stream,
        [gain, shift]: [&Tensor; 2],
        kind: Gain,
        eps: f64,
        dtype: DType,
    ) -> Result<Option<Tensor>> {
        let y = self.empty(x.x.shape(), dtype)?;
        let Some((rows, width)) = rows_of(&[&x.x, &y], &[gain, shift])? else { return Ok(None) };
        let Some(name) = name("layer_norm", x.x.dtype(), dtype) else { return Ok(None) };
        if !x.is_fit(dtype)? {
            return Ok(None);
        }
        let launch = x.arguments(Launch::new(self, File::Norm, &name)?)?;
        let launch = launch.tensor(gain)?.tensor(shift)?.tensor(&y)?;
        let launch = launch.int(width).int(rows * width / gain.elem_count()).float(kind.one()).float(eps);
        launch.rows(rows, row_threads(width))?;
        Ok(Some(y))
    }

    /// Writes `onto` plus the gradient of `x` to `dx`, which may be `onto`. Returns false and does nothing if no kernel supports
    /// them.
    fn layer_norm_backward(
        &self,
        x: &Stream,
        dy: &Tensor,
        (gain, kind): (&Tensor, Gain),
        eps: f64,
        onto: &Tensor,
        dx: &Tensor,
    ) -> Result<bool> {
        let Some((rows, width)) = rows_of(&[&x.x, dy, onto, dx], &[gain])? else { return Ok(false) };
        let Some(name) = name("layer_norm_backward", x.x.dtype(), dy.dtype()) else { return Ok(false) };
        // Gradients of the stream are f32, also where the stream is bf16.
        if onto.dtype() != DType::F32 || dx.dtype() != DType::F32 || !x.is_fit(dy.dtype())? {
            return Ok(false);
        }
        let launch = x.arguments(Launch::new(self, File::Norm, &name)?)?;
        let launch = launch.tensor(dy)?.tensor(gain)?.tensor(onto)?.tensor(dx)?;
        let launch = launch.int(width).int(rows * width / gain.elem_count()).float(kind.one()).float(eps);
        launch.rows(rows, row_threads(width))?;
        Ok(true)
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f64, dtype: DType) -> Result<Option<Tensor>> {
        let y = self.empty(x.shape(), dtype)?;
        let Some((rows, width)) = rows_of(&[x, &y], &[weight])? else { return Ok(None) };
        let Some(name) = name("rms_norm", x.dtype(), dtype) else { return Ok(None) };
        let launch = Launch::new(self, File::Norm, &name)?.tensor(x)?.tensor(weight)?.tensor(&y)?;
        launch.int(width).float(eps).rows(rows, row_threads(width))?;
        Ok(Some(y))
    }

    fn rms_norm_backward(
        &self,
        x: &Tensor,
        dy: &Tensor,
        weight: &Tensor,
        eps: f64,
    ) -> Result<Option<Tensor>> {
        let dx = self.empty(x.shape(), x.dtype())?;
        let dy = dy.to_dtype(x.dtype())?;
        let Some((rows, width)) = rows_of(&[x, &dy], &[weight])? else { return Ok(None) };
        let Some(suffix) = suffix(x.dtype()) else { return Ok(None) };
        let launch = Launch::new(self, File::Norm, &format!("rms_norm_backward_{suffix}"))?;
        let launch = launch.tensor(x)?.tensor(&dy)?.tensor(weight)?.tensor(&dx)?.int(width).float(eps);
        launch.rows(rows, row_threads(width))?;
        Ok(Some(dx))
    }
}

/// (rows, width) of [.., width] tensors, where the kernels take them and their f32 `gains`.
pub(crate) fn rows_of(tensors: &[&Tensor], gains: &[&Tensor]) -> Result<Option<(usize, usize)>> {
    /// What a block's registers hold, as in `norm.cu`.
    const WIDEST: usize = 6144;
    let width = tensors[0].dim(D::Minus1)?;
    let is_fit = width % 4 == 0
        && width <= WIDEST
        && gains.iter().all(|gain| gain.dtype() == DType::F32)
        && fits(tensors)?
        && fits(gains)?;
    Ok(is_fit.then_some((tensors[0].elem_count() / width, width)))
}

fn name(op: &str, x: DType, y: DType) -> Option<String> {
    // There are no kernels for f16 with bf16.
    let is_pair = x == y || x == DType::F32 || y == DType::F32;
    is_pair.then_some(format!("{op}_{}_{}", suffix(x)?, suffix(y)?))
}
