//! Products in 8-bit integers: exact sums, the same on the CPU and on a GPU, an error within the bounds that training needs, and
//! adapters that never see a code.

use kernels::random::Key;
use kernels::weight::{Format, Quantised, Weight};
use kernels::{DType, Device, Tensor, int8, linear};
use models::dit::{Base, BlockPlan, Keep, KeepPlace};
use models::weights::{Frozen, Storage};
use proofs::small::{adapters, config, micro_batch, trained, velocities, weights};
use proofs::{Tolerance, assert_close, assert_same_bits, device, randn, second_device};
use trainer::pipeline::{MicroBatch, Pipeline};

const INT8: Frozen = Frozen { compute: DType::F32, storage: Storage::Quantised(Format::RotatedInt8) };

/// Integers from -127 to 127, [rows, width] f32, the first of each row 127, so that a row's scale is 1.
fn integers(name: &str, rows: usize, width: usize) -> Vec<i64> {
    let normals = Key::new(13, name, &[]).normals(rows * width);
    let of = |(index, number): (usize, f32)| match index % width {
        0 => 127,
        _ => ((number * 50.0) as i64).clamp(-127, 127),
    };
    normals.into_iter().enumerate().map(of).collect()
}

/// The matrix whose codes are `codes` and whose scales are 1.
fn coded(codes: &[i64], (rows, width): (usize, usize)) -> Weight {
    let bytes: Vec<u8> = codes.iter().map(|&code| code as i8 as u8).collect();
    Weight::Quantised(Quantised {
        format: Format::RotatedInt8,
        codes: Tensor::from_vec(bytes, (rows, width), &device()).unwrap(),
        scale: Tensor::from_vec(vec![1f32; rows], rows, &device()).unwrap(),
        compute: DType::F32,
    })
}

/// An entry of the rotation of `group` numbers: of a Kronecker power of the regular Hadamard matrix of order 4, whose entry at (i, j) is -1/2
/// where i + j = 3 and 1/2 elsewhere. It is its own inverse.
fn entry(group: usize, i: usize, j: usize) -> f64 {
    let digits = group.ilog2() / 2;
    let opposite = |digit: &u32| (i >> (2 * digit) & 3) + (j >> (2 * digit) & 3) == 3;
    let negative = (0..digits).filter(opposite).count();
    (-1f64).powi(negative as i32) / f64::from(1 << digits)
}

/// The rows of `x`, of `width` numbers each, rotated.
fn rotated(x: impl IntoIterator<Item = f64>, width: usize) -> Vec<f64> {
    let (x, group) = (x.into_iter().collect::<Vec<_>>(), int8::group(width));
    let of = |numbers: &[f64], j: usize| (0..group).map(|i| numbers[i] * entry(group, i, j)).sum();
    x.chunks(group).flat_map(|numbers| (0..group).map(move |j| of(numbers, j))).collect()
}

/// Integers as rows that rotate to them.
fn turned(integers: &[i64], (rows, width): (usize, usize)) -> Tensor {
    let numbers: Vec<f32> =
        rotated(integers.iter().map(|&x| x as f64), width).iter().map(|&x| x as f32).collect();
    Tensor::from_vec(numbers, (rows, width), &device()).unwrap()
}

/// The integers that rows rotate to: rotating them back rounded sums of 10^6 at their 24th bit.
fn integers_of(x: &Tensor) -> Vec<i64> {
    let numbers = rotated(values(x).into_iter().map(f64::from), x.dim(1).unwrap());
    numbers.into_iter().map(|number| number.round() as i64).collect()
}

fn values(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

/// Rows that rotate to integers and have a scale of 1 are multiplied without any rounding, whatever the sizes: tiles that are not full,
/// sums that do not fill a stage, widths with groups of 16, 64 and 256.
#[test]
fn integer_products_are_exact() {
    for (index, rows) in [17, 64, 100, 127, 128, 129, 255, 300].into_iter().enumerate() {
        let [out, input] = [[16, 256], [48, 64], [272, 80], [256, 512], [528, 48]][index % 5];
        let (x, w) = (integers("x", rows, input), integers("w", out, input));
        let weight = coded(&w, (out, input));
        let y = linear::forward(&turned(&x, (rows, input)), &weight, None, None).unwrap();
        let expected = x
            .chunks(input)
            .flat_map(|x| w.chunks(input).map(move |w| x.iter().zip(w).map(|(x, w)| x * w).sum::<i64>()));
        assert!(integers_of(&y).into_iter().eq(expected), "y of {rows} x {out} x {input}");

        let dy = integers("dy", rows, out);
        let dx = linear::backward_input(&turned(&dy, (rows, out)), &weight, None).unwrap();
        let sums = integers_of(&dx);
        for (row, (dy, sums)) in dy.chunks(out).zip(sums.chunks(input)).enumerate() {
            for (column, sum) in sums.iter().enumerate() {
                let expected: i64 = dy.iter().zip(w.chunks(input)).map(|(dy, w)| dy * w[column]).sum();
                assert_eq!(*sum, expected, "dx[{row}, {column}] of {rows} x {out} x {input}");
            }
        }
    }
}

/// Rotation, scales, codes, sums and the epilogue in f32 take the same steps on both. Meaningless on the CPU alone.
#[test]
fn a_gpu_gives_the_bits_of_the_cpu() {
    for (rows, out, input) in [(33, 64, 256), (130, 272, 1024), (21, 512, 80)] {
        let (x, dy) = (randn("x", (rows, input)), randn("dy", (rows, out)));
        let (bias, onto, into) =
            (randn("bias", out), randn("onto", (rows, out)), randn("into", (rows, input)));
        let w = (randn("w", (out, input)) * 0.02).unwrap();
        let on = |device: &Device| {
            let [x, dy, bias, onto, into, w] =
                [&x, &dy, &bias, &onto, &into, &w].map(|tensor| tensor.to_device(device).unwrap());
            let weight = Weight::quantise(&w, Format::RotatedInt8, DType::F32).unwrap();
            let y = linear::forward(&x, &weight, Some(&bias), Some(&onto)).unwrap();
            let dx = linear::backward_input(&dy, &weight, Some(&into)).unwrap();
            [y, dx, weight.dequantised(DType::F32).unwrap()].map(|y| y.to_device(&Device::Cpu).unwrap())
        };
        let names = ["y", "dx", "dequantised"];
        for ((name, got), expected) in names.iter().zip(on(&device())).zip(on(&Device::Cpu)) {
            assert_same_bits(&format!("{name} of {rows} x {out} x {input}"), &got, &expected);
        }
    }
}

/// |got - expected| / |expected|.
fn relative(got: &Tensor, expected: &Tensor) -> f64 {
    let (got, expected) = (values(got), values(expected));
    let squares = |of: &dyn Fn(usize) -> f64| (0..got.len()).map(|i| of(i).powi(2)).sum::<f64>().sqrt();
    squares(&|i| f64::from(got[i]) - f64::from(expected[i])) / squares(&|i| f64::from(expected[i]))
}

/// The bounds for a layer: 2 % of y and 3 % of dx, also where four channels of the input are 60 times the others and the rows of the
/// gradient's columns differ by an order of magnitude, two of them by 60 times: rotated along the input alone, dx is off by 3.6 %. The same codes without rotation are off by 8 % and more.
#[test]
fn a_layer_is_within_two_percent_with_outliers_too() {
    let (rows, out, input) = (160, 320, 1280);
    let sizes = |name: &str, width: usize| (randn(name, width) * 0.7).unwrap().exp().unwrap();
    let spikes = |input: usize| {
        let of = |channel: usize| if channel % (input / 4) == 7 { 60f32 } else { 1.0 };
        Tensor::from_vec((0..input).map(of).collect::<Vec<_>>(), input, &device()).unwrap()
    };
    let x = randn("x", (rows, input)).broadcast_mul(&spikes(input)).unwrap();
    let w = randn("w", (out, input)).broadcast_mul(&sizes("rows", out).unsqueeze(1).unwrap()).unwrap();
    let dy = randn("dy", (rows, out)).broadcast_mul(&sizes("columns", out)).unwrap();
    let dy = dy.broadcast_mul(&spikes(out)).unwrap();
    let (dense, int8) =
        (Weight::Dense(w.clone()), Weight::quantise(&w, Format::RotatedInt8, DType::F32).unwrap());
    let forward = |weight: &Weight| linear::forward(&x, weight, None, None).unwrap();
    let backward = |weight: &Weight| linear::backward_input(&dy, weight, None).unwrap();
    let (y, dx) =
        (relative(&forward(&int8), &forward(&dense)), relative(&backward(&int8), &backward(&dense)));
    assert!(y < 0.02 && dx < 0.03, "y is off by {y:.4}, dx by {dx:.4}");
}

/// Few rows use the dequantised matrix: what they are multiplied with differs by the rounding of the codes alone.
#[test]
fn few_rows_are_multiplied_with_the_dequantised_matrix() {
    let (x, w) = (randn("x", (16, 64)), randn("w", (32, 64)));
    let weight = Weight::quantise(&w, Format::RotatedInt8, DType::F32).unwrap();
    let dense = Weight::Dense(weight.dequantised(DType::F32).unwrap());
    let forward = |weight: &Weight| linear::forward(&x, weight, None, None).unwrap();
    assert_same_bits("y", &forward(&weight), &forward(&dense));
    // Half a step of 1/127 of the largest number of a row, which is about three times the usual one.
    assert_close("matrix", &weight.dequantised(DType::F32).unwrap(), &w, Tolerance::relative(0.015));
}

/// A number that is not one must reach whoever looks at the loss, and not become a code.
#[test]
fn nan_stays_nan() {
    let mut numbers = vec![0.5f32; 32 * 64];
    numbers[70] = f32::NAN;
    let x = Tensor::from_vec(numbers, (32, 64), &device()).unwrap();
    let weight = Weight::quantise(&randn("w", (16, 64)), Format::RotatedInt8, DType::F32).unwrap();
    let y = values(&linear::forward(&x, &weight, None, None).unwrap());
    let is_nan = |row: usize| y[row * 16..(row + 1) * 16].iter().all(|number| number.is_nan());
    assert!(is_nan(1) && (0..32).filter(|&row| is_nan(row)).count() == 1);
}

const LAYERS: usize = 4;

fn batches() -> Vec<MicroBatch> {
    (0..2).map(|m| micro_batch(&format!("m{m}"), 1 + m, 9, Some(0.2))).collect()
}

/// Recomputed, kept or offloaded, on one stage or two: the same bits, as with floats.
#[test]
fn training_in_integers_does_not_depend_on_split_or_recomputation() {
    let dit = config(LAYERS, 32);
    let (own, adapters) = (weights(&dit), adapters(&dit, 3, 0.7));
    let on = |split: &[_]| Pipeline::load(&own, &dit, split, &adapters, Base::new(INT8)).unwrap();
    let whole = on(&[(device(), 0..LAYERS)]);
    let halves = on(&[(device(), 0..2), (second_device(), 2..LAYERS)]);
    let inputs: Vec<_> = batches().into_iter().map(|batch| batch.input).collect();
    let expected = velocities(&whole, &inputs);
    for (got, expected) in velocities(&halves, &inputs).iter().zip(&expected) {
        assert_same_bits("velocity", got, expected);
    }
    let (losses, gradients) = trained(&whole, &batches(), BlockPlan::default());
    for keep in [Keep::All, Keep::Input] {
        for place in [KeepPlace::Device, KeepPlace::Host] {
            let plan = BlockPlan { keep, place };
            for pipeline in [&whole, &halves] {
                let (got_losses, got) = trained(pipeline, &batches(), plan);
                assert_eq!(got_losses, losses, "{plan:?}");
                for (name, gradient) in &gradients {
                    assert_same_bits(&format!("{name}, {plan:?}"), &got[name], gradient);
                }
            }
        }
    }
}
