//! Frozen weights: dense, or quantised to 8 bits with a scale for each output row or each block of a row.
//!
//! Of [`Format::E4m3`] and [`Format::Int8`] only the weight is quantised: a product is computed in the dtype of its input, from a
//! matrix that is dequantised before it and dropped after it. Those of [`Format::RotatedInt8`] are multiplied as they are
//! ([`crate::int8`]). Codes are stored in u8 tensors for every format, because every device supports those.

use crate::{Device, Tensor};
use candle_core::{D, DType};
use rayon::prelude::*;

use crate::Result;
use crate::cpu::with_slice;
use crate::gpu::{File, Gpu, Launch, fits, suffix};
use crate::int8;

/// The 8-bit number format of a quantised weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// OCP 8-bit float e4m3fn: 4 exponent bits with bias 7, 3 mantissa bits, no infinities, largest value 448.
    E4m3,
    /// A two's complement integer from -127 to 127.
    Int8,
    /// The same, of a matrix that was rotated along rows and columns before it was quantised: for products in integers.
    RotatedInt8,
}

/// The frozen matrix of a linear layer, [out, in].
#[derive(Debug, Clone)]
pub enum Weight {
    /// Floating-point numbers; products are computed in their dtype.
    Dense(Tensor),
    /// Bytes with scales.
    Quantised(Quantised),
}

/// A matrix whose numbers are `scale * value(code)`, with a scale for each row or each block of a row.
#[derive(Debug, Clone)]
pub struct Quantised {
    /// The number format of the codes.
    pub format: Format,
    /// [out, in] u8.
    pub codes: Tensor,
    /// f32: `[out]`, one for each row, or `[out, blocks]`, one for each of the blocks of equal length of a row. Those of
    /// [`Weight::quantise`] are positive normal numbers; those of a file are used as they are.
    pub scale: Tensor,
    /// The dtype of products.
    pub compute: DType,
}

impl Format {
    /// The number that a code represents, before its scale.
    pub const fn value(self, code: u8) -> f32 {
        match self {
            Self::E4m3 => e4m3_value(code),
            Self::Int8 | Self::RotatedInt8 => code as i8 as f32,
        }
    }

    /// The code nearest to a number: ties round to the even code, numbers beyond [`Format::largest`] saturate.
    pub fn code(self, number: f32) -> u8 {
        match self {
            Self::E4m3 => e4m3_code(number),
            Self::Int8 | Self::RotatedInt8 => number.round_ties_even().clamp(-127.0, 127.0) as i8 as u8,
        }
    }

    /// The largest number that has a code.
    pub const fn largest(self) -> f32 {
        match self {
            Self::E4m3 => 448.0,
            Self::Int8 | Self::RotatedInt8 => 127.0,
        }
    }
}

impl Weight {
    /// Quantises `dense` [out, in], of any float dtype, row by row; products with it are computed in `compute`.
    ///
    /// In f32: scale = max(largest of the row's magnitudes / [`Format::largest`], smallest normal number), which also
    /// gives a row of zeros a scale to divide by; code = [`Format::code`] of number / scale. The numbers must be finite, which
    /// readers of files check.
    ///
    /// A matrix in [`Format::RotatedInt8`] is rotated along both sides first, and its numbers are multiplied by the scale's inverse.
    pub fn quantise(dense: &Tensor, format: Format, compute: DType) -> Result<Self> {
        if format == Format::RotatedInt8 {
            let (codes, scale) = int8::quantised(dense)?;
            return Ok(Self::Quantised(Quantised { format, codes, scale, compute }));
        }
        on_gpu!(dense, |gpu| gpu.quantise(dense, format, compute)?.map(Self::Quantised));
        let (rows, columns) = dense.dims2()?;
        let device = dense.device();
        if device.is_shadow() {
            drop(dense.to_dtype(DType::F32)?);
            let (codes, scale) = (
                Tensor::shadow((rows, columns), DType::U8, device),
                Tensor::shadow(rows, DType::F32, device),
            );
            return Ok(Self::Quantised(Quantised { format, codes, scale, compute }));
        }
        let row_of = |row: &[f32], codes: &mut [u8], scale: &mut f32| {
            let largest = row.iter().fold(0f32, |largest, number| largest.max(number.abs()));
            *scale = (largest / format.largest()).max(f32::MIN_POSITIVE);
            codes.iter_mut().zip(row).for_each(|(code, number)| *code = format.code(number / *scale));
        };
        let (mut codes, mut scales) = (vec![0; rows * columns], vec![0.0; rows]);
        with_slice(&dense.to_dtype(DType::F32)?.to_device(&Device::Cpu)?, |numbers| {
            let rows = numbers.par_chunks(columns).zip(codes.par_chunks_mut(columns));
            rows.zip(&mut scales).for_each(|((row, codes), scale)| row_of(row, codes, scale));
            Ok(())
        })?;
        let codes = Tensor::from_vec(codes, (rows, columns), device)?;
        Ok(Self::Quantised(Quantised {
            format,
            codes,
            scale: Tensor::from_vec(scales, rows, device)?,
            compute,
        }))
    }

    /// The matrix [out, in] in `dtype`: for a quantised one value * scale in f32, rounded once to `dtype`.
    pub fn dequantised(&self, dtype: DType) -> Result<Tensor> {
        match self {
            Self::Dense(dense) => dense.to_dtype(dtype),
            Self::Quantised(quantised) => {
                let matrix = quantised.dequantised(dtype)?;
                matrix.relabel("decoded weight");
                Ok(matrix)
            }
        }
    }

    /// The dtype of products.
    pub fn dtype(&self) -> DType {
        match self {
            Self::Dense(dense) => dense.dtype(),
            Self::Quantised(quantised) => quantised.compute,
        }
    }

    /// Whether products with it are of integers ([`crate::int8`]), but for those of a few rows.
    pub fn multiplies_integers(&self) -> bool {
        matches!(self, Self::Quantised(quantised) if quantised.format == Format::RotatedInt8)
    }

    /// (out, in).
    pub fn dims(&self) -> Result<(usize, usize)> {
        self.stored().dims2()
    }

    /// Its device.
    pub fn device(&self) -> &Device {
        self.stored().device()
    }

    /// Bytes on the device, scales included.
    pub fn bytes(&self) -> usize {
        let of = |tensor: &Tensor| tensor.elem_count() * tensor.dtype().size_in_bytes();
        match self {
            Self::Dense(dense) => of(dense),
            Self::Quantised(quantised) => of(&quantised.codes) + of(&quantised.scale),
        }
    }

    /// The numbers or the codes, to be taken out for a while and put back to the bit.
    pub fn stored_mut(&mut self) -> &mut Tensor {
        match self {
            Self::Dense(dense) => dense,
            Self::Quantised(quantised) => &mut quantised.codes,
        }
    }

    /// All that it is stored as: the numbers, or the codes and their scales.
    pub fn tensors_mut(&mut self) -> Vec<&mut Tensor> {
        match self {
            Self::Dense(dense) => vec![dense],
            Self::Quantised(Quantised { codes, scale, .. }) => vec![codes, scale],
        }
    }

    fn stored(&self) -> &Tensor {
        match self {
            Self::Dense(dense) => dense,
            Self::Quantised(quantised) => &quantised.codes,
        }
    }
}

impl Quantised {
    /// Codes and scales of the rotated matrix.
    pub(crate) fn matrix(&self) -> int8::Matrix<'_> {
        int8::Matrix { codes: &self.codes, scale: &self.scale }
    }

    fn dequantised(&self, dtype: DType) -> Result<Tensor> {
        let Self { format, codes, scale, .. } = self;
        if *format == Format::RotatedInt8 {
            return int8::dequantised(self.matrix(), dtype);
        }
        on_gpu!(codes, |gpu| gpu.dequantised(self, dtype)?);
        let values: Vec<f32> = (0..=u8::MAX).map(|code| format.value(code)).collect();
        let values = Tensor::new(values, codes.device())?;
        // As u32: candle takes the largest index of a type for "none" and answers zero.
        let indices = codes.to_dtype(DType::U32)?.flatten_all()?;
        let numbers = values.index_select(&indices, 0)?.reshape((scale.elem_count(), ()))?;
        numbers
            .broadcast_mul(&scale.flatten_all()?.unsqueeze(D::Minus1)?)?
            .reshape(codes.shape())?
            .to_dtype(dtype)
    }
}

/// The number of an e4m3fn code; 0x7F and 0xFF are NaN.
const fn e4m3_value(code: u8) -> f32 {
    let sign = if code & 0x80 != 0 { -1.0 } else { 1.0 };
    let (exponent, mantissa) = ((code >> 3 & 15) as u32, (code & 7) as u32);
    match (exponent, mantissa) {
        (15, 7) => f32::NAN,
        // Subnormal numbers are steps of 2^-9.
        (0, _) => sign * mantissa as f32 / 512.0,
        _ => sign * f32::from_bits((exponent + 120) << 23 | mantissa << 20),
    }
}

/// The e4m3fn code nearest to `number`, ties to even; too large a number becomes 448, NaN stays NaN.
fn e4m3_code(number: f32) -> u8 {
    const SMALLEST_NORMAL: f32 = 1.0 / 64.0;
    const LARGEST_CODE: u32 = 0x7E;
    let (sign, size) = ((number.to_bits() >> 24) as u8 & 0x80, number.abs());
    let code = if size.is_nan() {
        0x7F
    } else if size < SMALLEST_NORMAL {
        // The scaling is exact, and 8 steps are the code of the smallest normal number.
        (size * 512.0).round_ties_even() as u32
    } else {
        // 20 of 23 mantissa bits are dropped; a carry out of the mantissa increments the exponent, as it should.
        let bits = size.to_bits();
        let rounded = (bits + 0x7_FFFF + (bits >> 20 & 1)) >> 20;
        (rounded - (120 << 3)).min(LARGEST_CODE)
    };
    sign | code as u8
}

impl Gpu {
    fn quantise(&self, dense: &Tensor, format: Format, compute: DType) -> Result<Option<Quantised>> {
        let (rows, columns) = dense.dims2()?;
        let Some(suffix) = suffix(dense.dtype()).filter(|_| columns % 16 == 0) else { return Ok(None) };
        if !fits(&[dense])? {
            return Ok(None);
        }
        let (codes, scale) = (self.empty((rows, columns), DType::U8)?, self.empty(rows, DType::F32)?);
        let launch = Launch::new(self, File::Weight, &format!("code_{}_{suffix}", format.name()))?;
        launch.tensor(dense)?.tensor(&codes)?.tensor(&scale)?.int(columns).rows(rows, 256)?;
        Ok(Some(Quantised { format, codes, scale, compute }))
    }

    fn dequantised(&self, quantised: &Quantised, dtype: DType) -> Result<Option<Tensor>> {
        let (rows, columns) = quantised.codes.dims2()?;
        // The kernel is given not rows but how many consecutive codes share a scale.
        let each = rows * columns / quantised.scale.elem_count();
        let Some(suffix) = suffix(dtype).filter(|_| each.is_multiple_of(16)) else { return Ok(None) };
        if !fits(&[&quantised.codes])? {
            return Ok(None);
        }
        let (y, sixteens) = (self.empty((rows, columns), dtype)?, rows * columns / 16);
        let launch =
            Launch::new(self, File::Weight, &format!("decode_{}_{suffix}", quantised.format.name()))?;
        let launch = launch.tensor(&quantised.codes)?.tensor(&quantised.scale)?.tensor(&y)?;
        launch.size(sixteens).int(each).each(sixteens)?;
        Ok(Some(y))
    }
}

impl Format {
    /// Its name, as in the names of the kernels.
    pub fn name(self) -> &'static str {
        match self {
            Self::E4m3 => "e4m3",
            Self::Int8 => "int8",
            Self::RotatedInt8 => "int8_rotated",
        }
    }
}
