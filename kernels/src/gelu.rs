//! GELU in its tanh form: 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).

use crate::Result;
use crate::Tensor;
use crate::gpu::{File, Gpu, Launch, fits, suffix};
use crate::profile::{self, Class};

/// sqrt(2/pi).
const K: f64 = 0.797_884_560_802_865_4;
/// The cubic coefficient of the tanh form (Hendrycks and Gimpel 2016, arXiv 1606.08415).
const C: f64 = 0.044_715;

/// GELU of every element, same shape and dtype.
pub fn forward(x: &Tensor) -> Result<Tensor> {
    let _noted = profile::scope(Class::Elementwise, x.device());
    on_gpu!(x, |gpu| gpu.gelu(x)?);
    x.gelu()
}

/// dx = dy * GELU'(x); all of one shape and dtype.
///
/// With u = K (x + C x^3) and t = tanh(u): GELU' = 0.5 (1 + t) + 0.5 x (1 - t^2) K (1 + 3 C x^2).
pub fn backward(x: &Tensor, dy: &Tensor) -> Result<Tensor> {
    let _noted = profile::scope(Class::Elementwise, x.device());
    on_gpu!(x, |gpu| gpu.gelu_backward(x, dy)?);
    let x2 = x.sqr()?;
    let t = (x * ((&x2 * (K * C))? + K)?)?.tanh()?;
    let slope = ((&x2 * (3.0 * C * K))? + K)?;
    let rise = ((x * t.sqr()?.affine(-1.0, 1.0)?)? * slope)?;
    dy * ((t + 1.0)? + rise)?.affine(0.5, 0.0)?
}

impl Gpu {
    fn gelu(&self, x: &Tensor) -> Result<Option<Tensor>> {
        let Some(suffix) = suffix(x.dtype()).filter(|_| x.elem_count().is_multiple_of(4)) else {
            return Ok(None);
        };
        if !fits(&[x])? {
            return Ok(None);
        }
        let (y, quads) = (self.empty(x.shape(), x.dtype())?, x.elem_count() / 4);
        let launch = Launch::new(self, File::Elementwise, &format!("gelu_{suffix}"))?;
        launch.tensor(x)?.tensor(&y)?.size(quads).each(quads)?;
        Ok(Some(y))
    }

    fn gelu_backward(&self, x: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let Some(suffix) = suffix(x.dtype()).filter(|_| x.elem_count().is_multiple_of(4)) else {
            return Ok(None);
        };
        if !(fits(&[x, dy])? && x.dtype() == dy.dtype()) {
            return Ok(None);
        }
        let (dx, quads) = (self.empty(x.shape(), x.dtype())?, x.elem_count() / 4);
        let launch = Launch::new(self, File::Elementwise, &format!("gelu_backward_{suffix}"))?;
        launch.tensor(x)?.tensor(dy)?.tensor(&dx)?.size(quads).each(quads)?;
        Ok(Some(dx))
    }
}
