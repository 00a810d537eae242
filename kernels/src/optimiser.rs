//! What all optimisers work on: parameters with what a rule keeps of each, and the squares of gradients.

use crate::{Result, Tensor};

/// A parameter with what an optimiser's rule keeps of it.
#[derive(Debug, Clone)]
pub struct State {
    /// The parameter, f32.
    pub parameter: Tensor,
    /// What the rule keeps, in the rule's order of names.
    pub slots: Vec<Tensor>,
}

/// The sum of squares of each of `tensors`, which are on one device: `[tensors]` f32, not finite where a tensor is not.
pub fn square_sums(tensors: &[&Tensor]) -> Result<Tensor> {
    let sums = tensors.iter().map(|tensor| tensor.sqr()?.sum_all());
    Tensor::stack(&sums.collect::<Result<Vec<_>>>()?, 0)
}
