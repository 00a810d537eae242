//! A linear layer of a block: frozen weight and bias, and whatever adapters are attached to its name.

use candle_core::{DType, Device, Tensor};
use kernels::low_rank;
use kernels::weight::Weight;

use super::pass::{Gradients, Pass};
use crate::Result;
use crate::weights::Weights;

/// A frozen linear layer that knows its official module name.
#[derive(Debug)]
pub struct Linear {
    name: String,
    weight: Weight,
    bias: Tensor,
}

impl Linear {
    /// Reads `<name>.weight` and `<name>.bias`.
    pub fn load(weights: &Weights, name: String, dtype: DType, device: &Device) -> Result<Self> {
        let weight = Weight::Dense(weights.tensor(&format!("{name}.weight"), dtype, device)?);
        let bias = weights.tensor(&format!("{name}.bias"), dtype, device)?;
        Ok(Self { name, weight, bias })
    }

    /// `x` [b, l, in] -> [b, l, out] in the weight's dtype.
    pub fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        let x = x.to_dtype(self.weight.dtype())?;
        let mut y = kernels::linear::forward(&x, &self.weight, Some(&self.bias), None)?;
        for adapter in pass.adapters.of(&self.name) {
            let x = pass.dropped(&self.name, &x)?;
            y = low_rank::forward(&x, adapter.factors(), Some(&y))?;
        }
        Ok(y)
    }

    /// The gradient of the input, in the weight's dtype; gradients of trainable adapters go into `gradients`.
    pub fn backward(
        &self,
        x: &Tensor,
        dy: &Tensor,
        pass: &Pass,
        gradients: &mut Gradients,
    ) -> Result<Tensor> {
        let dx = kernels::linear::backward_input(dy, &self.weight, None)?;
        self.adapters_backward(x, dy, pass, gradients)?
            .into_iter()
            .try_fold(dx, |sum, part| Ok((sum + part)?))
    }

    /// [`Linear::backward`] where nothing upstream wants the gradient of the input (text projections).
    pub fn backward_adapters(
        &self,
        x: &Tensor,
        dy: &Tensor,
        pass: &Pass,
        gradients: &mut Gradients,
    ) -> Result<()> {
        self.adapters_backward(x, dy, pass, gradients).map(drop)
    }

    fn adapters_backward(
        &self,
        x: &Tensor,
        dy: &Tensor,
        pass: &Pass,
        gradients: &mut Gradients,
    ) -> Result<Vec<Tensor>> {
        let x = x.to_dtype(self.weight.dtype())?;
        let mut parts = Vec::new();
        for adapter in pass.adapters.of(&self.name) {
            let grads = low_rank::backward(&pass.dropped(&self.name, &x)?, dy, adapter.factors(), None)?;
            if adapter.is_trainable() {
                let [factors] = &grads.factors[..] else { continue };
                gradients.add(format!("{}.lora_A.weight", self.name), factors.da.clone())?;
                gradients.add(format!("{}.lora_B.weight", self.name), factors.db.clone())?;
            }
            parts.push(pass.dropped(&self.name, &grads.dx)?);
        }
        Ok(parts)
    }
}
