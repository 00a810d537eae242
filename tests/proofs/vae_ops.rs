//! The VAE's operations equal their readable definitions, which run in f64.

use candle_core::{DType, Tensor};
use kernels::channel_norm::{Activation, channel_norm};
use kernels::conv3d::{Conv3dGeometry, Padding, conv3d};
use kernels::resample::{average_down, duplicate_up, fold_pixels, unfold_pixels, upsample_nearest_2x};
use proofs::device;
use proptest::prelude::*;

/// f32 sums of up to a few hundred products of numbers of order one, against f64.
const ROUNDING: f64 = 1e-4;

fn random(shape: &[usize], seed: u64) -> Tensor {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    let next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    let values: Vec<f32> = std::iter::repeat_with(next).take(shape.iter().product()).collect();
    Tensor::from_vec(values, shape, &device()).unwrap()
}

fn f64s(x: &Tensor) -> Tensor {
    x.to_dtype(DType::F64).unwrap()
}

fn difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    let gap = (f64s(a) - f64s(b)).unwrap().abs().unwrap();
    gap.flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn conv3d_equals_summed_conv2d(
        (b, c_in, c_out, t, h, w) in (1usize..3, 1usize..20, 1usize..9, 3usize..6, 3usize..30, 3usize..40),
        (kt, k) in prop_oneof![Just((3, 3)), Just((1, 1)), Just((3, 1)), Just((1, 3))],
        (time_stride, space_stride) in (1usize..3, 1usize..3),
        (top, bottom, left, right) in (0usize..2, 0usize..2, 0usize..2, 0usize..2),
        seed in any::<u64>(),
    ) {
        let geometry = Conv3dGeometry { time_stride, space_stride, padding: Padding { top, bottom, left, right } };
        let (x, weight, bias) =
            (random(&[b, c_in, t, h, w], seed), random(&[c_out, c_in, kt, k, k], !seed), random(&[c_out], seed / 3));
        let fast = conv3d(&x, &weight, Some(&bias), geometry).unwrap();
        let slow = conv3d(&f64s(&x), &f64s(&weight), Some(&f64s(&bias)), geometry).unwrap();
        prop_assert!(difference(&fast, &slow) <= ROUNDING);
    }

    #[test]
    fn channel_norm_equals_its_definition(c in 1usize..40, n in 1usize..3000, seed in any::<u64>()) {
        let (x, gamma) = (random(&[2, c, n], seed), random(&[c, 1, 1, 1], !seed));
        for activation in [Activation::Identity, Activation::Silu] {
            let fast = channel_norm(&x, &gamma, activation).unwrap();
            let slow = channel_norm(&f64s(&x), &f64s(&gamma), activation).unwrap();
            prop_assert!(difference(&fast, &slow) <= ROUNDING);
        }
    }

    #[test]
    fn upsampling_repeats_each_pixel(h in 1usize..9, w in 1usize..9, seed in any::<u64>()) {
        let x = random(&[2, 3, 2, h, w], seed);
        let fast = upsample_nearest_2x(&x).unwrap();
        prop_assert_eq!(difference(&fast, &upsample_nearest_2x(&f64s(&x)).unwrap()), 0.0);
    }

    #[test]
    fn folding_and_copying_are_undone(h in 1usize..5, w in 1usize..5, seed in any::<u64>()) {
        let x = random(&[2, 3, 2, 2 * h, 2 * w], seed);
        let folded = fold_pixels(&x, 2).unwrap();
        prop_assert_eq!(difference(&unfold_pixels(&folded, 2).unwrap(), &x), 0.0);
        let copied = duplicate_up(&folded, 6, 2, 2).unwrap();
        prop_assert!(difference(&average_down(&copied, 12, 2, 2).unwrap(), &folded) <= 1e-6);
    }
}

#[test]
fn a_black_pixel_stays_black() {
    let x = Tensor::zeros((1, 4, 9), DType::F32, &device()).unwrap();
    let y = channel_norm(&x, &random(&[4], 1), Activation::Silu).unwrap();
    assert_eq!(difference(&y, &x), 0.0);
}
