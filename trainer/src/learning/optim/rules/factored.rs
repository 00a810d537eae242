//! Second moments kept as the means of their rows and columns (Shazeer and Stern 2018, arXiv 1804.04235).

use kernels::{DType, Result, Tensor};

/// Whether a tensor of this shape has rows and columns; others keep their second moment whole.
pub fn is_factored(parameter: &Tensor) -> bool {
    parameter.rank() >= 2
}

/// Zeros for the moments of `parameter`: `[.., rows]` and `[.., columns]`, or one of its own shape.
pub fn zeros(parameter: &Tensor) -> Result<Vec<Tensor>> {
    let zeros = |dims: Vec<usize>| Tensor::zeros(dims, DType::F32, parameter.device());
    let dims = parameter.dims();
    match dims {
        [.., _, columns] => {
            let rows = dims[..dims.len() - 1].to_vec();
            let columns = [&dims[..dims.len() - 2], &[*columns]].concat();
            Ok(vec![zeros(rows)?, zeros(columns)?])
        }
        _ => Ok(vec![zeros(dims.to_vec())?]),
    }
}

/// The moments after `square`, whose own are averaged into `moments` with `decay`.
pub fn averaged(moments: &[Tensor], square: &Tensor, decay: f64) -> Result<Vec<Tensor>> {
    let rank = square.rank();
    let new = match moments.len() {
        1 => vec![square.clone()],
        _ => vec![square.mean(rank - 1)?, square.mean(rank - 2)?],
    };
    moments.iter().zip(&new).map(|(old, new)| super::averaged(old, new, decay)).collect()
}

/// `x` divided by the roots of the `moments`: `x / sqrt(rows / mean(rows)) / sqrt(columns)`.
pub fn divided(x: &Tensor, moments: &[Tensor]) -> Result<Tensor> {
    let [rows, columns] = moments else { return x.broadcast_div(&moments[0].sqrt()?) };
    let last = rows.rank() - 1;
    let rows = rows.broadcast_div(&rows.mean_keepdim(last)?)?.sqrt()?.unsqueeze(last + 1)?;
    x.broadcast_div(&rows)?.broadcast_div(&columns.sqrt()?.unsqueeze(columns.rank() - 1)?)
}
