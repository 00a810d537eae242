//! `+`, `-`, `*` and `/` between tensors, results of operations and numbers.

use std::borrow::Borrow;
use std::ops::{Add, Div, Mul, Sub};

use candle_core::Result;

use super::Tensor;

/// The operator `$trait` by the method `$name`; with a number by x `$factor` + `$term`.
macro_rules! operator {
    ($trait:ident, $name:ident, $factor:expr, $term:expr) => {
        impl<B: Borrow<Tensor>> $trait<B> for Tensor {
            type Output = Result<Tensor>;
            fn $name(self, other: B) -> Self::Output {
                Tensor::$name(&self, other.borrow())
            }
        }

        impl<B: Borrow<Tensor>> $trait<B> for &Tensor {
            type Output = Result<Tensor>;
            fn $name(self, other: B) -> Self::Output {
                Tensor::$name(self, other.borrow())
            }
        }

        impl<B: Borrow<Tensor>> $trait<Tensor> for Result<B> {
            type Output = Result<Tensor>;
            fn $name(self, other: Tensor) -> Self::Output {
                Tensor::$name(self?.borrow(), &other)
            }
        }

        impl<B: Borrow<Tensor>> $trait<&Tensor> for Result<B> {
            type Output = Result<Tensor>;
            fn $name(self, other: &Tensor) -> Self::Output {
                Tensor::$name(self?.borrow(), other)
            }
        }

        impl<B: Borrow<Tensor>> $trait<Result<B>> for Tensor {
            type Output = Result<Tensor>;
            fn $name(self, other: Result<B>) -> Self::Output {
                Tensor::$name(&self, other?.borrow())
            }
        }

        impl<B: Borrow<Tensor>> $trait<Result<B>> for &Tensor {
            type Output = Result<Tensor>;
            fn $name(self, other: Result<B>) -> Self::Output {
                Tensor::$name(self, other?.borrow())
            }
        }

        impl $trait<f64> for Tensor {
            type Output = Result<Tensor>;
            fn $name(self, number: f64) -> Self::Output {
                self.affine($factor(number), $term(number))
            }
        }

        impl $trait<f64> for &Tensor {
            type Output = Result<Tensor>;
            fn $name(self, number: f64) -> Self::Output {
                self.affine($factor(number), $term(number))
            }
        }
    };
}

operator!(Add, add, |_| 1.0, |number| number);
operator!(Sub, sub, |_| 1.0, |number: f64| -number);
operator!(Mul, mul, |number| number, |_| 0.0);
operator!(Div, div, |number| 1.0 / number, |_| 0.0);

impl Sub<&Tensor> for f64 {
    type Output = Result<Tensor>;
    fn sub(self, x: &Tensor) -> Self::Output {
        x.affine(-1.0, self)
    }
}

impl Sub<Tensor> for f64 {
    type Output = Result<Tensor>;
    fn sub(self, x: Tensor) -> Self::Output {
        x.affine(-1.0, self)
    }
}
