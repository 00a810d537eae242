//! The VAE's operations equal their readable definitions, which run in f64.

use kernels::channel_norm::{Activation, channel_norm};
use kernels::conv3d::{Around, Before, Conv3dGeometry, Padding, conv3d, conv3d_after, conv3d_band};
use kernels::frame_attention::frame_attention;
use kernels::resample::{
    Rgb, average_down, duplicate_up, fold_pixels, frames_from_channels, rgb_bytes, unfold_pixels,
    upsample_nearest_2x,
};
use kernels::{DType, Tensor, video};
use proofs::device;
use proptest::prelude::*;

/// f32 sums of up to a few hundred products of numbers of order one, against f64.
const ROUNDING: f64 = 1e-4;
/// The same of up to 1,900 products, whose sums go up to 60: their roundings, 2e-6 each, walk further, and tensor cores cut what
/// they align. A product that is missing, or one too many, is a hundred times more.
const LONG_SUMS: f64 = 5e-4;

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

/// The largest error beyond `relative` times the expected value.
fn excess(got: &Tensor, expected: &Tensor, relative: f64) -> f64 {
    assert_eq!(got.dims(), expected.dims());
    let (got, expected) = (f64s(got), f64s(expected));
    let over =
        ((got - &expected).unwrap().abs().unwrap() - (expected.abs().unwrap() * relative).unwrap()).unwrap();
    over.flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

/// The same video in channels-last layout.
fn side_by_side(x: &Tensor) -> Tensor {
    x.permute((0, 2, 3, 4, 1)).unwrap().contiguous().unwrap().permute((0, 4, 1, 2, 3)).unwrap()
}

fn difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    let gap = (f64s(a) - f64s(b)).unwrap().abs().unwrap();
    gap.flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

/// An op on two videos, of which it may use one.
type Op<'a> = dyn Fn(&Tensor, &Tensor) -> kernels::Result<Tensor> + 'a;

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn conv3d_equals_summed_conv2d(
        (b, c_in, c_out, t, h, w) in (1usize..3, 1usize..20, 1usize..9, 3usize..6, 3usize..30, 3usize..40),
        (kt, k) in prop_oneof![Just((3usize, 3usize)), Just((1, 1)), Just((3, 1)), Just((1, 3))],
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

    /// Sums are f32 in every dtype, and rounded once: to 9 bits in bf16, to 12 in f16.
    #[test]
    fn frames_before_count_as_frames_in_every_dtype(
        (b, c_in, c_out, t, h, w) in (1usize..3, 1usize..70, 1usize..220, 1usize..4, 3usize..12, 3usize..12),
        (kt, k) in prop_oneof![Just((3usize, 3usize)), Just((1, 1)), Just((3, 1)), Just((1, 3))],
        (time_stride, space_stride, zeros, past) in (1usize..3, 1usize..3, 0usize..3, 0usize..3),
        (top, bottom, left, right) in prop_oneof![Just((1usize, 1usize, 1usize, 1usize)), (0usize..2, 0usize..2, 0usize..2, 0usize..2)],
        is_side_by_side in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let geometry = Conv3dGeometry { time_stride, space_stride, padding: Padding { top, bottom, left, right } };
        let zeros = zeros.max(kt.saturating_sub(t + past));
        for (dtype, rounding) in [(DType::F32, 0.0), (DType::BF16, 1.0 / 256.0), (DType::F16, 1.0 / 2048.0)] {
            let made = |shape: &[usize], seed| random(shape, seed).to_dtype(dtype).unwrap();
            let (x, weight, bias) =
                (made(&[b, c_in, t, h, w], seed), made(&[c_out, c_in, kt, k, k], !seed), made(&[c_out], seed / 3));
            let past = (past > 0).then(|| made(&[b, c_in, past, h, w], seed / 5));
            let all = match &past {
                Some(past) => Tensor::cat(&[f64s(past), f64s(&x)], 2).unwrap(),
                None => f64s(&x),
            };
            let all = all.pad_with_zeros(2, zeros, 0).unwrap();
            let slow = conv3d(&all, &f64s(&weight), Some(&f64s(&bias)), geometry).unwrap();
            let (x, past, weight) = match is_side_by_side {
                true => (side_by_side(&x), past.as_ref().map(side_by_side), video::arranged(&weight).unwrap()),
                false => (x, past, weight),
            };
            let before = Before { zeros, past: past.as_ref(), ..Before::default() };
            let fast = conv3d_after(before, &x, &weight, Some(&bias), geometry, None).unwrap();
            prop_assert_eq!(fast.dtype(), dtype);
            prop_assert!(excess(&fast, &slow, rounding) <= LONG_SUMS);
            let more = random(fast.dims(), seed / 7).to_dtype(dtype).unwrap();
            let more = if is_side_by_side { side_by_side(&more) } else { more };
            let onto = conv3d_after(before, &x, &weight, Some(&bias), geometry, Some(&more)).unwrap();
            prop_assert_eq!(difference(&onto, &video::add(&fast, &more).unwrap()), 0.0);
        }
    }

    #[test]
    fn the_order_in_memory_changes_no_value(
        (c, t, h, w) in (1usize..9, 1usize..4, 1usize..7, 1usize..7), seed in any::<u64>()
    ) {
        let c = 2 * c;
        let (x, y, gamma) = (random(&[2, c, t, h, w], seed), random(&[2, c, t, h, w], !seed), random(&[c], seed / 3));
        let ops: [&Op; 8] = [
            &|x, y| video::add(x, y),
            &|x, _| video::silu(x),
            &|x, y| video::join_frames(x, y),
            &|x, _| video::last_frames(x, 2),
            &|x, _| video::arranged(x),
            &|x, _| upsample_nearest_2x(x),
            &|x, _| frames_from_channels(x),
            &|x, _| channel_norm(x, &gamma, Activation::Silu),
        ];
        for (i, op) in ops.iter().enumerate() {
            let plain = op(&x, &y).unwrap();
            for (x, y) in [(side_by_side(&x), side_by_side(&y)), (x.clone(), side_by_side(&y))] {
                prop_assert!(difference(&op(&x, &y).unwrap(), &plain) <= ROUNDING, "op {}", i);
            }
        }
    }

    /// A byte for each number as the host rounds it, whatever the order in memory, and a word where one is not finite.
    #[test]
    fn bytes_are_rounded_as_on_the_host(
        patch in 1usize..3, (t, h, w) in (1usize..4, 1usize..7, 1usize..7), is_side_by_side in any::<bool>(), seed in any::<u64>()
    ) {
        for dtype in [DType::F32, DType::BF16] {
            let x = (random(&[2, 3 * patch * patch, t, h, w], seed) * 1.2).unwrap().to_dtype(dtype).unwrap();
            let plain = unfold_pixels(&x.to_dtype(DType::F32).unwrap(), patch).unwrap();
            let plain = plain.permute((0, 2, 3, 4, 1)).unwrap().contiguous().unwrap();
            let plain: Vec<f32> = plain.flatten_all().unwrap().to_vec1().unwrap();
            let expected: Vec<u8> =
                plain.iter().map(|v| ((v.clamp(-1.0, 1.0) + 1.0) * 127.5 + 0.5) as u8).collect();
            let x = if is_side_by_side { side_by_side(&x) } else { x };
            let Rgb { bytes, bad } = rgb_bytes(&x, patch).unwrap();
            prop_assert_eq!(bytes.dims(), &[2, t, patch * h, patch * w, 3]);
            prop_assert_eq!(bytes.flatten_all().unwrap().to_vec1::<u8>().unwrap(), expected);
            prop_assert_eq!(bad.to_vec1::<u8>().unwrap(), vec![0]);
            let damaged = (x / 0.0).unwrap();
            prop_assert_eq!(rgb_bytes(&damaged, patch).unwrap().bad.to_vec1::<u8>().unwrap(), vec![1]);
        }
    }

    /// Attention over a frame is what its definition says, and a query's result is the same to the bit in any band of rows.
    #[test]
    fn attention_over_a_frame_does_not_depend_on_other_queries(
        (c, h, w) in (1usize..5, 2usize..7, 2usize..6), cut in 1usize..6, seed in any::<u64>()
    ) {
        let (c, cut) = (8 * c, cut.min(h - 1));
        for (dtype, rounding) in [(DType::F32, 0.0), (DType::BF16, 1.0 / 32.0)] {
            let made = |shape: &[usize], seed| random(shape, seed).to_dtype(dtype).unwrap();
            let q = side_by_side(&made(&[1, c, 1, h, w], seed));
            let (k, v) = (made(&[h * w, c], !seed), made(&[h * w, c], seed / 3));
            let got = frame_attention(&q, &k, &v).unwrap();
            let rows = f64s(&q).permute((0, 2, 3, 4, 1)).unwrap().contiguous().unwrap().reshape((h * w, c)).unwrap();
            let scores = (rows.matmul(&f64s(&k).t().unwrap().contiguous().unwrap()).unwrap() / (c as f64).sqrt()).unwrap();
            let weights = scores.broadcast_sub(&scores.max_keepdim(1).unwrap()).unwrap().exp().unwrap();
            let weights = weights.broadcast_div(&weights.sum_keepdim(1).unwrap()).unwrap();
            let expected = weights.matmul(&f64s(&v)).unwrap().reshape((1, 1, h, w, c)).unwrap();
            let expected = expected.permute((0, 4, 1, 2, 3)).unwrap().contiguous().unwrap();
            prop_assert!(excess(&got, &expected, rounding) <= ROUNDING.max(rounding));
            for (first, count) in [(0, cut), (cut, h - cut)] {
                let band = side_by_side(&q.narrow(3, first, count).unwrap());
                let band = frame_attention(&band, &k, &v).unwrap();
                prop_assert_eq!(difference(&band, &got.narrow(3, first, count).unwrap()), 0.0);
            }
        }
    }

    /// A band with the rows around it, as tensors of their own or joined to it, gives the rows of the whole frame to the bit, wherever it
    /// is cut: also where a GPU's blocks begin at other pixels, and for the shapes that its kernels of bands do not take.
    #[test]
    fn a_band_with_its_rows_around_gives_the_rows_of_the_whole(
        (c_in, c_out, t, h, w) in (1usize..9, 1usize..140, 1usize..4, 3usize..20, 3usize..50),
        cuts in (1usize..20, 1usize..20), past in 0usize..3, is_side_by_side in any::<bool>(),
        (is_even, right) in prop_oneof![Just((true, 1usize)), (any::<bool>(), 0usize..2)], seed in any::<u64>(),
    ) {
        let c_in = if is_even { 8 * c_in } else { c_in };
        let cuts = [0, cuts.0.min(h - 2), cuts.0.min(h - 2) + cuts.1.min(h - 1 - cuts.0.min(h - 2)), h];
        for dtype in [DType::F32, DType::BF16] {
            let laid = |x: Tensor| if is_side_by_side { side_by_side(&x) } else { x };
            let made = |shape: &[usize], seed| random(shape, seed).to_dtype(dtype).unwrap();
            let (x, earlier) = (made(&[1, c_in, t, h, w], seed), made(&[1, c_in, 2, h, w], !seed));
            let earlier = earlier.narrow(2, 0, past).unwrap();
            let weight = video::arranged(&made(&[c_out, c_in, 3, 3, 3], seed / 3)).unwrap();
            let bias = made(&[c_out], seed / 5);
            let rows = |x: &Tensor, from: usize, to: usize| laid(x.narrow(3, from, to - from).unwrap().contiguous().unwrap());
            let run = |(x, around): (&Tensor, Around), (earlier, earlier_around): (&Tensor, Around), top: usize, bottom: usize| {
                let past = (past > 0).then_some(earlier);
                let before = Before { zeros: 2 - past.map_or(0, |past| past.dim(2).unwrap()), past, around: earlier_around };
                let geometry = Conv3dGeometry::unit(Padding { top, bottom, left: 1, right });
                conv3d_band(before, (x, around), &weight, Some(&bias), geometry, None).unwrap()
            };
            let none = Around::default();
            let whole = run((&laid(x.clone()), none), (&rows(&earlier, 0, h), none), 1, 1);
            for band in cuts.windows(2).filter(|band| band[0] < band[1]) {
                let (from, to) = (band[0], band[1]);
                let expected = whole.narrow(3, from, to - from).unwrap();
                let (top, bottom) = (usize::from(from == 0), usize::from(to == h));
                let edges = |x: &Tensor| {
                    let above = (from > 0).then(|| video::edge_row(&rows(x, from - 1, from), video::Edge::Bottom).unwrap());
                    let below = (to < h).then(|| video::edge_row(&rows(x, to, to + 1), video::Edge::Top).unwrap());
                    (above, below)
                };
                let (own, (above, below)) = (rows(&x, from, to), edges(&x));
                let around = Around { above: above.as_ref(), below: below.as_ref() };
                let (own_earlier, earlier_edges) = (rows(&earlier, from, to), (past > 0).then(|| edges(&earlier)));
                let earlier_around = earlier_edges.as_ref().map_or(none, |(above, below)| Around { above: above.as_ref(), below: below.as_ref() });
                let got = run((&own, around), (&own_earlier, earlier_around), top, bottom);
                prop_assert_eq!(difference(&got, &expected), 0.0);

                let joined = video::with_rows(above.as_ref(), &own, below.as_ref()).unwrap();
                let joined_earlier = rows(&earlier, from - (1 - top), to + (1 - bottom));
                let got = run((&joined, none), (&joined_earlier, none), top, bottom);
                prop_assert_eq!(difference(&got, &expected), 0.0);
            }
        }
    }

    /// Rows that would be read as those of other frames, or not at all.
    #[test]
    fn rows_that_do_not_fit_a_band_are_refused(past in 0usize..2) {
        let (x, weight) = (random(&[1, 8, 2, 4, 6], 1), random(&[3, 8, 3, 3, 3], 2));
        let row = |frames: usize, columns: usize| random(&[1, frames, 1, columns, 8], 3);
        let geometry = Conv3dGeometry::unit(Padding { top: 0, ..Padding::all(1) });
        let (good, short, narrow, earlier) = (row(2, 6), row(1, 6), row(2, 5), random(&[1, 8, 2, 4, 6], 4));
        let run = |above: &Tensor, around: Around| {
            let before = Before { zeros: 2, past: Some(&earlier).filter(|_| past > 0), around };
            let x = (&x, Around { above: Some(above), below: None });
            conv3d_band(before, x, &weight, None, geometry, None)
        };
        let paired = Around { above: Some(&good), below: None };
        prop_assert!(run(&good, paired).is_ok());
        for bad in [run(&short, paired), run(&narrow, paired)] {
            prop_assert!(bad.unwrap_err().to_string().contains("do not fit around"));
        }
        prop_assert_eq!(run(&good, Around::default()).is_err(), past > 0);
    }

    #[test]
    fn channel_norm_equals_its_definition(c in 1usize..40, wide in any::<bool>(), n in 1usize..3000, seed in any::<u64>()) {
        // Every second width is one that kernels take.
        let (c, n) = if wide { (16 * c, n / 16 + 1) } else { (c, n) };
        for (dtype, rounding) in [(DType::F32, 0.0), (DType::BF16, 1.0 / 256.0)] {
            let (x, gamma) = (random(&[2, c, n], seed), random(&[c, 1, 1, 1], !seed));
            let (x, gamma) = (x.to_dtype(dtype).unwrap(), gamma.to_dtype(dtype).unwrap());
            for activation in [Activation::Identity, Activation::Silu] {
                let fast = channel_norm(&x, &gamma, activation).unwrap();
                let slow = channel_norm(&f64s(&x), &f64s(&gamma), activation).unwrap();
                prop_assert!(excess(&fast, &slow, rounding) <= ROUNDING);
            }
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

    #[test]
    fn averages_and_copies_equal_their_definitions(
        (b, t, h, w) in (1usize..3, 1usize..4, 1usize..4, 1usize..4), (time, space) in (1usize..3, 1usize..3),
        seed in any::<u64>(),
    ) {
        let x = random(&[b, 6, t, 2 * h, 2 * w], seed);
        for x in [x.clone(), side_by_side(&x)] {
            let slow = average_down(&f64s(&x), 3, time, space).unwrap();
            prop_assert!(difference(&average_down(&x, 3, time, space).unwrap(), &slow) <= ROUNDING);
            let slow = duplicate_up(&f64s(&x), 12, time, space).unwrap();
            prop_assert_eq!(difference(&duplicate_up(&x, 12, time, space).unwrap(), &slow), 0.0);
        }
    }
}

#[test]
fn a_black_pixel_stays_black() {
    let x = Tensor::zeros((1, 4, 9), DType::F32, &device()).unwrap();
    let y = channel_norm(&x, &random(&[4], 1), Activation::Silu).unwrap();
    assert_eq!(difference(&y, &x), 0.0);
}
