//! Muon (Jordan et al. 2024), as `torch.optim.Muon` has it, with its iteration in f32; tensors that are not matrices take AdamW.

use kernels::optimiser::State;
use kernels::{Result, Tensor};
use serde::{Deserialize, Serialize};

use super::averaged;

/// The settings of Muon.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Muon {
    /// Decay of the momentum.
    pub momentum: f64,
    /// Whether the step looks ahead by the gradient.
    pub nesterov: bool,
    /// Factor of the learning rate by the shape of a matrix.
    pub scale: MuonScale,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Decay of AdamW's two moments.
    pub betas: [f64; 2],
    /// Added to the root of AdamW's second moment.
    pub eps: f64,
}

/// Factor of Muon's learning rate for a matrix of `rows` and `columns`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MuonScale {
    /// sqrt(max(1, rows / columns)).
    Original,
    /// 0.2 sqrt(max(rows, columns)): updates as large as AdamW's, so that its learning rates fit.
    MatchAdamw,
    /// sqrt(rows / columns).
    Spectral,
}

impl MuonScale {
    fn of(self, [rows, columns]: [f64; 2]) -> f64 {
        match self {
            Self::Original => (rows / columns).max(1.0).sqrt(),
            Self::MatchAdamw => 0.2 * rows.max(columns).sqrt(),
            Self::Spectral => (rows / columns).sqrt(),
        }
    }
}

/// Factors of x, x x^T x and (x x^T)^2 x: `torch/optim/_muon.py`.
const FACTORS: [f64; 3] = [3.4445, -4.7750, 2.0315];
/// Iterations, likewise.
const ITERATIONS: usize = 5;
/// Least norm that a matrix is divided by, likewise.
const LEAST_NORM: f64 = 1e-7;

/// One update of a matrix.
///
/// # Errors
/// A device that fails.
pub fn step(state: &State, gradient: &Tensor, settings: &Muon, lr: f64) -> Result<State> {
    let (rows, columns) = gradient.dims2()?;
    let momentum = averaged(&state.slots[0], gradient, settings.momentum)?;
    let looked_ahead = match settings.nesterov {
        true => averaged(&momentum, gradient, settings.momentum)?,
        false => momentum.clone(),
    };
    let direction = orthogonal(&looked_ahead)?;
    let rate = lr * settings.scale.of([rows as f64, columns as f64]);
    let decayed = (&state.parameter * (1.0 - lr * settings.weight_decay))?;
    Ok(State { parameter: (decayed - (direction * rate)?)?, slots: vec![momentum] })
}

/// Close to the nearest matrix whose singular values are one, by Newton-Schulz iterations: they end near 0.7 to 1.1.
fn orthogonal(x: &Tensor) -> Result<Tensor> {
    let (rows, columns) = x.dims2()?;
    let flip = |x: &Tensor| if rows > columns { x.t()?.contiguous() } else { Ok(x.clone()) };
    let x = flip(x)?;
    let mut x = x.broadcast_div(&x.sqr()?.sum_all()?.sqrt()?.maximum(LEAST_NORM)?)?;
    for _ in 0..ITERATIONS {
        let square = x.matmul(&x.t()?.contiguous()?)?;
        let both = ((&square * FACTORS[1])? + (square.matmul(&square)? * FACTORS[2])?)?;
        x = ((&x * FACTORS[0])? + both.matmul(&x)?)?;
    }
    flip(&x)
}
