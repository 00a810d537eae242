//! Quantised weights: every code, every rounding, and products with them.

use float8::F8E4M3;
use kernels::weight::{Format, Quantised, Weight};
use kernels::{DType, Device, Tensor, linear};
use proofs::{assert_same_bits, device, randn};
use proptest::prelude::*;

/// A step of a code is 2^-3 of the number for e4m3 (2^-9 of a unit for subnormal ones) and a unit for int8;
/// rounding to nearest is off by half of it, and f32 arithmetic of scale and product adds three roundings of 2^-24.
const ROUNDING: f64 = 0.5 + 1e-4;

#[test]
fn every_code_stands_for_its_e4m3_number() {
    for code in 0..=u8::MAX {
        let (ours, theirs) = (Format::E4m3.value(code), F8E4M3::from_bits(code).to_f32());
        assert!(
            ours.to_bits() == theirs.to_bits() || ours.is_nan() && theirs.is_nan(),
            "{code:#x}: {ours} {theirs}"
        );
        assert!(ours.is_nan() || Format::E4m3.code(ours) == code, "{code:#x} does not come back");
        let integer = Format::Int8.value(code);
        assert!(code == 0x80 || Format::Int8.code(integer) == code, "{code:#x} is {integer}, another code");
    }
}

/// The code nearest to `number` by looking at all of them; of two as near, the even one. Beyond 1000 all are the same.
fn nearest(number: f32) -> u8 {
    let distance =
        |code: u8| (f64::from(F8E4M3::from_bits(code).to_f32()) - f64::from(number.abs().min(1e3))).abs();
    let closest =
        (0..0x7Fu8).min_by(|&a, &b| distance(a).total_cmp(&distance(b)).then((a & 1).cmp(&(b & 1))));
    closest.unwrap() | if number.is_sign_negative() { 0x80 } else { 0 }
}

#[test]
fn a_number_between_two_codes_becomes_the_nearer_and_a_tie_the_even_one() {
    for code in 0..0x7Eu8 {
        let middle = (Format::E4m3.value(code) + Format::E4m3.value(code + 1)) / 2.0;
        for number in [middle.next_down(), middle, middle.next_up()] {
            assert_eq!(Format::E4m3.code(number), nearest(number), "{number}");
            assert_eq!(Format::E4m3.code(-number), nearest(-number), "-{number}");
        }
    }
    for (number, code) in [(448.0, 0x7E), (464.0, 0x7E), (1e9, 0x7E), (f32::INFINITY, 0x7E), (0.0, 0)] {
        assert_eq!(Format::E4m3.code(number), code, "{number}");
    }
    for (number, integer) in [(0.5, 0), (1.5, 2), (2.5, 2), (126.6, 127), (1e9, 127)] {
        assert_eq!(Format::Int8.code(number) as i8, integer, "{number}");
        assert_eq!(Format::Int8.code(-number) as i8, -integer, "-{number}");
    }
}

proptest! {
    /// Any f32 at all, subnormal, huge and infinite ones too.
    #[test]
    fn every_number_becomes_its_nearest_code(bits in any::<u32>(), near in -500f32..500.0) {
        for number in [f32::from_bits(bits), near, near / 1000.0] {
            if number.is_nan() {
                prop_assert_eq!(Format::E4m3.code(number) & 0x7F, 0x7F);
            } else {
                prop_assert_eq!(Format::E4m3.code(number), nearest(number), "{}", number);
                prop_assert_eq!(Format::E4m3.code(number), F8E4M3::from_f32(number).to_bits(), "{}", number);
            }
        }
    }
}

/// Rows of very different sizes, with a row of zeros and a row of the smallest subnormal numbers.
fn uneven() -> Tensor {
    let sizes = [1.0f32, 1e-30, 3e30, 0.02, 0.0, 1e-44, 7.0];
    randn("uneven", (7, 40))
        .broadcast_mul(&Tensor::new(&sizes, &device()).unwrap().unsqueeze(1).unwrap())
        .unwrap()
}

#[test]
fn a_row_is_off_by_half_a_step_at_most() {
    let dense = uneven();
    for format in [Format::E4m3, Format::Int8] {
        let weight = Weight::quantise(&dense, format, DType::F32).unwrap();
        assert_eq!(weight.bytes(), 7 * 40 + 7 * 4);
        let decoded: Vec<Vec<f32>> = weight.dequantised(DType::F32).unwrap().to_vec2().unwrap();
        for (row, decoded) in dense.to_vec2::<f32>().unwrap().iter().zip(decoded) {
            let largest = row.iter().fold(0f32, |largest, v| largest.max(v.abs()));
            let scale = (largest / format.largest()).max(f32::MIN_POSITIVE);
            for (&number, decoded) in row.iter().zip(decoded) {
                // On every device: the arithmetic is fixed to the bit.
                let expected = format.value(format.code(number / scale)) * scale;
                assert_eq!(decoded.to_bits(), expected.to_bits(), "{format:?}: {number} became {decoded}");
                let scale = f64::from(scale);
                let number = f64::from(number);
                let step = match format {
                    Format::E4m3 => scale * 2f64.powi(-9).max((number / scale).abs() / 8.0),
                    Format::Int8 | Format::RotatedInt8 => scale,
                };
                let error = (f64::from(decoded) - number).abs();
                assert!(error <= ROUNDING * step, "{format:?}: {number} became {decoded}, a step is {step}");
            }
        }
    }
}

/// bf16 and f32 hold the same numbers here, so that they must give the same codes; decoding rounds once.
#[test]
fn codes_depend_on_the_numbers_and_not_on_their_dtype() {
    let short = randn("short", (5, 16)).to_dtype(DType::BF16).unwrap();
    for format in [Format::E4m3, Format::Int8] {
        let weight = |dense: &Tensor| Weight::quantise(dense, format, DType::BF16).unwrap();
        let (from_short, from_long) = (weight(&short), weight(&short.to_dtype(DType::F32).unwrap()));
        let bits = |weight: &Weight, dtype| weight.dequantised(dtype).unwrap().to_dtype(DType::F32).unwrap();
        assert_same_bits("codes", &bits(&from_short, DType::F32), &bits(&from_long, DType::F32));
        let rounded = bits(&from_short, DType::F32).to_dtype(DType::BF16).unwrap();
        let once = rounded.to_dtype(DType::F32).unwrap();
        assert_same_bits("one rounding", &bits(&from_short, DType::BF16), &once);
    }
}

#[test]
fn a_product_with_codes_is_the_product_with_what_they_stand_for() {
    let (x, dy, bias) = (randn("x", (2, 3, 24)), randn("dy", (2, 3, 10)), randn("bias", 10));
    for format in [Format::E4m3, Format::Int8] {
        let quantised = Weight::quantise(&randn("w", (10, 24)), format, DType::F32).unwrap();
        let dense = Weight::Dense(quantised.dequantised(DType::F32).unwrap());
        let forward = |weight| linear::forward(&x, weight, Some(&bias), None).unwrap();
        assert_same_bits("forward", &forward(&quantised), &forward(&dense));
        let backward = |weight| linear::backward_input(&dy, weight, None).unwrap();
        assert_same_bits("backward", &backward(&quantised), &backward(&dense));
    }
}

/// Codes made by hand: the layout that files and kernels rely on.
#[test]
fn codes_are_bytes_in_rows_with_a_scale_each() {
    let dense =
        Tensor::new(&[[448f32, -1.0, 0.0], [0.0, 0.0, 0.0], [-63.5, 127.0, 0.25]], &device()).unwrap();
    let expected = [
        (Format::E4m3, [[0x7Eu8, 0xB8, 0], [0, 0, 0], [0xF6, 0x7E, 0x36]]),
        (Format::Int8, [[127, 0, 0], [0, 0, 0], [0xC0, 127, 0]]),
    ];
    for (format, bytes) in expected {
        let Weight::Quantised(Quantised { codes, scale, .. }) =
            Weight::quantise(&dense, format, DType::F32).unwrap()
        else {
            panic!("not quantised");
        };
        assert_eq!(codes.to_device(&Device::Cpu).unwrap().to_vec2::<u8>().unwrap(), bytes, "{format:?}");
        let scale: Vec<f32> = scale.to_vec1().unwrap();
        assert_eq!(scale, [448.0 / format.largest(), f32::MIN_POSITIVE, 127.0 / format.largest()]);
    }
}
