//! The updates of the rules besides AdamW, made of plain tensor operations in f32. Each function returns the new state of one
//! tensor; the old one stays as it was.

pub mod adafactor;
pub mod adamw8bit;
pub mod came;
mod factored;
pub mod lion;
pub mod muon;
pub mod prodigy;
pub mod schedule_free;

use kernels::{DType, Result, Tensor};

/// -1, 0 or 1 by the sign of each element of `x`.
fn sign(x: &Tensor) -> Result<Tensor> {
    x.gt(0.0)?.to_dtype(DType::F32)? - x.neg()?.gt(0.0)?.to_dtype(DType::F32)?
}

/// `decay` old + (1 - `decay`) new.
fn averaged(old: &Tensor, new: &Tensor, decay: f64) -> Result<Tensor> {
    (old * decay)? + (new * (1.0 - decay))?
}

/// The root of the mean square of all elements, a scalar tensor.
fn root_mean_square(x: &Tensor) -> Result<Tensor> {
    x.sqr()?.mean_all()?.sqrt()
}

/// `x`, divided by what its root mean square is above `limit`.
fn limited(x: &Tensor, limit: f64) -> Result<Tensor> {
    x.broadcast_div(&(root_mean_square(x)? / limit)?.maximum(1.0)?)
}
