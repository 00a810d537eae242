//! candle's autograd, as an oracle for backwards that are written by hand.

use candle_core::Var;
use candle_core::backprop::GradStore;
use kernels::{Device, Tensor};

/// A tensor whose gradient is asked for.
pub struct Variable {
    var: Var,
    tensor: Tensor,
}

/// The gradients of one number.
pub struct Slopes {
    store: GradStore,
    device: Device,
}

impl Variable {
    /// With the numbers of `x`.
    pub fn new(x: &Tensor) -> Self {
        let var = Var::from_tensor(x.as_candle().unwrap()).unwrap();
        Self { tensor: Tensor::from_candle(var.as_tensor().clone(), x.device()), var }
    }

    /// The tensor, for formulas out of ops that candle can differentiate.
    pub fn as_tensor(&self) -> &Tensor {
        &self.tensor
    }
}

impl Slopes {
    /// Of the scalar `loss` with respect to every variable that it was made of.
    pub fn of(loss: &Tensor) -> Self {
        Self { store: loss.as_candle().unwrap().backward().unwrap(), device: loss.device().clone() }
    }

    /// With respect to `variable`.
    pub fn get(&self, variable: &Variable) -> Tensor {
        Tensor::from_candle(self.store.get(&variable.var).unwrap().clone(), &self.device)
    }
}

/// `x` as a constant.
pub fn detached(x: &Tensor) -> Tensor {
    Tensor::from_candle(x.as_candle().unwrap().detach(), x.device())
}
