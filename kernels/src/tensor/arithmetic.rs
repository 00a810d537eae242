//! Element by element, of one tensor and of two.

use candle_core::{DType, Error, Result, Shape};

use super::{Body, Tensor};

/// Methods of candle that write a new tensor of the same shape and dtype.
macro_rules! of_one {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        impl Tensor {
            $($(#[$doc])* pub fn $name(&self) -> Result<Self> {
                self.like_this(candle_core::Tensor::$name)
            })*
        }
    };
}

of_one!(
    /// 1 / x.
    recip,
    /// -x.
    neg,
    /// e^x.
    exp,
    /// The natural logarithm.
    log,
    /// The sine.
    sin,
    /// The cosine.
    cos,
    /// The hyperbolic tangent.
    tanh,
    /// The magnitude.
    abs,
    /// The square.
    sqr,
    /// The square root.
    sqrt,
    /// GELU, in its tanh form.
    gelu,
    /// GELU, by the error function.
    gelu_erf,
    /// x / (1 + e^-x).
    silu,
    /// The larger of x and 0.
    relu,
    /// Rounded down.
    floor,
    /// Rounded to the nearest.
    round,
);

/// Methods of candle on two tensors of one shape, and the same on shapes that broadcast.
macro_rules! of_two {
    ($($(#[$doc:meta])* $name:ident $broadcast:ident),* $(,)?) => {
        impl Tensor {
            $($(#[$doc])*
            ///
            /// # Errors
            /// Where shapes or dtypes differ.
            pub fn $name(&self, other: &Self) -> Result<Self> {
                self.with(other, stringify!($name), candle_core::Tensor::$name)
            }

            $(#[$doc])*
            /// Dimensions of size one are repeated.
            ///
            /// # Errors
            /// Where shapes do not broadcast, or dtypes differ.
            pub fn $broadcast(&self, other: &Self) -> Result<Self> {
                let shape = self.shape().broadcast_shape_binary_op(other.shape(), stringify!($broadcast))?;
                self.spread(&shape)?.$name(&other.spread(&shape)?)
            })*
        }
    };
}

of_two!(
    /// x + y.
    add broadcast_add,
    /// x - y.
    sub broadcast_sub,
    /// x y.
    mul broadcast_mul,
    /// x / y.
    div broadcast_div,
);

impl Tensor {
    /// An operation that writes a new tensor of the same shape and dtype.
    fn like_this(
        &self,
        real: impl FnOnce(&candle_core::Tensor) -> Result<candle_core::Tensor>,
    ) -> Result<Self> {
        match &self.body {
            Body::Real(x) => Ok(self.result(real(x)?)),
            Body::Shadow(_) if self.elem_count() == 0 => Ok(self.clone()),
            Body::Shadow(x) => Ok(Self::shadow(x.shape(), x.dtype, &self.device)),
        }
    }

    /// An operation on two tensors of one shape and dtype.
    fn with(
        &self,
        other: &Self,
        op: &'static str,
        real: impl FnOnce(&candle_core::Tensor, &candle_core::Tensor) -> Result<candle_core::Tensor>,
    ) -> Result<Self> {
        self.check_beside(other, op)?;
        match (&self.body, &other.body) {
            (Body::Real(x), Body::Real(y)) => Ok(self.result(real(x, y)?)),
            _ => self.like(other, op)?.like_this(real_of_shadow),
        }
    }

    /// `self`, where `other` has its shape and dtype.
    fn like(&self, other: &Self, op: &'static str) -> Result<&Self> {
        let (lhs, rhs) = (self.dtype(), other.dtype());
        if self.shape() != other.shape() {
            let (lhs, rhs) = (self.shape().clone(), other.shape().clone());
            return Err(Error::ShapeMismatchBinaryOp { lhs, rhs, op }.bt());
        }
        if lhs != rhs {
            return Err(Error::DTypeMismatchBinaryOp { lhs, rhs, op }.bt());
        }
        Ok(self)
    }

    /// Broadcast to `shape`, where it has another.
    fn spread(&self, shape: &Shape) -> Result<Self> {
        if self.shape() == shape { Ok(self.clone()) } else { self.broadcast_as(shape) }
    }

    /// `factor` x + `term`.
    pub fn affine(&self, factor: f64, term: f64) -> Result<Self> {
        self.like_this(|x| x.affine(factor, term))
    }

    /// The larger of x and `least`.
    pub fn maximum(&self, least: impl Into<f64>) -> Result<Self> {
        let least = least.into();
        self.like_this(|x| x.maximum(least))
    }

    /// The smaller of x and `most`.
    pub fn minimum(&self, most: impl Into<f64>) -> Result<Self> {
        let most = most.into();
        self.like_this(|x| x.minimum(most))
    }

    /// x, but at least `least` and at most `most`.
    pub fn clamp(&self, least: impl Into<f64>, most: impl Into<f64>) -> Result<Self> {
        self.maximum(least)?.minimum(most)
    }

    /// 1 where x is greater than `number`, else 0; u8.
    pub fn gt(&self, number: impl Into<f64>) -> Result<Self> {
        let number = number.into();
        self.compared(|x| x.gt(number))
    }

    fn compared(
        &self,
        real: impl FnOnce(&candle_core::Tensor) -> Result<candle_core::Tensor>,
    ) -> Result<Self> {
        match &self.body {
            Body::Real(x) => Ok(self.result(real(x)?)),
            Body::Shadow(x) => Ok(Self::shadow(x.shape(), DType::U8, &self.device)),
        }
    }

    /// In another dtype; the same where it has it already.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        match &self.body {
            _ if self.dtype() == dtype => Ok(self.clone()),
            Body::Real(x) => Ok(self.result(x.to_dtype(dtype)?)),
            Body::Shadow(x) => Ok(Self::shadow(x.shape(), dtype, &self.device)),
        }
    }
}

/// Never called on a shadow: `check_beside` refuses to combine tensors with shadows.
fn real_of_shadow(_: &candle_core::Tensor) -> Result<candle_core::Tensor> {
    Err(Error::wrap(super::NoNumbers))
}
