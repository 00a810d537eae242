//! The optimiser's look at the gradients and its update of many tensors at once.

use kernels::adamw::{Update, step, step_all};
use kernels::optimiser::{State, square_sums};
use kernels::{DType, Tensor};
use proofs::{Tolerance, assert_close, device, randn};

/// Tensors of many sizes, one of them empty of everything but zeros, with their gradients.
fn tensors() -> Vec<(State, Tensor)> {
    let shapes = [(1, 1), (3, 7), (32, 129), (1, 1030), (64, 64)];
    let made = |(i, shape): (usize, &(usize, usize))| {
        let random = |name: &str| randn(&format!("{name}{i}"), *shape);
        let second = (random("second").sqr().unwrap() * 0.01).unwrap();
        let slots = vec![(random("first") * 0.1).unwrap(), second];
        let state = State { parameter: random("parameter"), slots };
        (state, if i == 1 { random("zero").zeros_like().unwrap() } else { random("gradient") })
    };
    shapes.iter().enumerate().map(made).collect()
}

/// The same few f32 operations for each element; a fused kernel may contract a product and a sum.
const ROUNDING: Tolerance = Tolerance { absolute: 1e-7, relative: 1e-6 };

#[test]
fn many_tensors_are_updated_as_each_alone() {
    const FACTOR: f64 = 0.37;
    let update = Update { lr: 1e-2, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1, step: 3 };
    let alone =
        tensors().into_iter().map(|(state, g)| step(&state, &(g * FACTOR).unwrap(), &update).unwrap());
    let alone: Vec<State> = alone.collect();
    let mut together = tensors();
    let mut items: Vec<_> = together.iter_mut().map(|(state, gradient)| (state, &*gradient)).collect();
    step_all(&mut items, FACTOR, &update).unwrap();
    for ((state, _), expected) in together.iter().zip(&alone) {
        assert_close("parameter", &state.parameter, &expected.parameter, ROUNDING);
        assert_close("first moment", &state.slots[0], &expected.slots[0], ROUNDING);
        assert_close("second moment", &state.slots[1], &expected.slots[1], ROUNDING);
    }
}

#[test]
fn sums_of_squares_are_those_of_each_tensor() {
    // f32 sums of up to four thousand squares.
    const SUM: f64 = 1e-5;
    let gradients: Vec<Tensor> = tensors().into_iter().map(|(_, gradient)| gradient).collect();
    let sums: Vec<f32> = square_sums(&gradients.iter().collect::<Vec<_>>()).unwrap().to_vec1().unwrap();
    for (sum, gradient) in sums.iter().zip(&gradients) {
        let values: Vec<f64> =
            gradient.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        let expected: f64 = values.iter().map(|v| v * v).sum();
        assert!((f64::from(*sum) - expected).abs() <= SUM * expected, "{sum}, expected {expected}");
    }
    for bad in [f32::NAN, f32::INFINITY] {
        let spoiled = Tensor::new(&[1f32, bad, 2.0], &device()).unwrap();
        let sums: Vec<f32> = square_sums(&[&gradients[0], &spoiled]).unwrap().to_vec1().unwrap();
        assert!(sums[0].is_finite() && !sums[1].is_finite(), "{bad} went unseen");
    }
}
