//! How far each linear layer's int8 products are from those of its own matrix, on what really goes through it.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use kernels::linear;
use kernels::weight::{Format, Weight};
use kernels::{DType, Tensor};
use models::dit::{LayerWatch, Linear};
use serde::Serialize;

/// Bounds of a layer: |difference| / |exact| of its output and of its input's gradient.
pub const BOUNDS: Deviation = Deviation { y: 0.02, dx: 0.03 };

/// Relative differences in the L2 norm.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Deviation {
    /// Of the output.
    pub y: f64,
    /// Of the gradient of the input.
    pub dx: f64,
}

/// The largest deviation of each layer so far, by module name.
#[derive(Debug, Default)]
pub struct Layers(Mutex<BTreeMap<String, Deviation>>);

impl Layers {
    /// The largest deviation of each layer that was seen.
    pub fn found(&self) -> BTreeMap<String, Deviation> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl LayerWatch for Layers {
    fn seen(&self, layer: &Linear, x: &Tensor, dy: &Tensor) -> models::Result<()> {
        let (exact, compute) = (layer.weight(), layer.weight().dtype());
        let matrix = exact.dequantised(compute)?;
        let coded = Weight::quantise(&matrix, Format::RotatedInt8, compute)?;
        let forward = |weight: &Weight| linear::forward(x, weight, None, None);
        let backward = |weight: &Weight| linear::backward_input(dy, weight, None);
        let found = Deviation {
            y: relative(&forward(&coded)?, &forward(exact)?)?,
            dx: relative(&backward(&coded)?, &backward(exact)?)?,
        };
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let worst = all.entry(layer.name().to_owned()).or_default();
        *worst = Deviation { y: worst.y.max(found.y), dx: worst.dx.max(found.dx) };
        Ok(())
    }
}

/// |got - expected| / |expected|; 0 where both are zero.
fn relative(got: &Tensor, expected: &Tensor) -> kernels::Result<f64> {
    let norm = |x: &Tensor| -> kernels::Result<f64> {
        Ok(f64::from(x.to_dtype(DType::F32)?.sqr()?.sum_all()?.to_scalar::<f32>()?).sqrt())
    };
    let difference = norm(&(got.to_dtype(DType::F32)? - expected.to_dtype(DType::F32)?)?)?;
    Ok(if difference == 0.0 { 0.0 } else { difference / norm(expected)? })
}
