//! From the bytes of a file to a tensor on a device: in pieces, so that only the result takes memory, on all cores, with every
//! value checked.
//!
//! A core reads a step at a time, which is still in its cache when it is checked and converted. So conversions run at the speed of
//! reading, and the link to a GPU carries the converted numbers alone. Measured on two cores of an EPYC: 6.8 GB/s read from the
//! page cache into a ring of buffers, 6.0 GB/s with the check.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use kernels::fill::filled;
use kernels::weight::Format;
use kernels::{DType, Device, Tensor};

use super::dtype::StoredDType;
use super::entry::Entry;
use super::error::{Result, WeightsError};
use super::stored::StoredFile;

/// Bytes that are read at a time: half of a small level 2 cache.
const STEP: usize = 256 << 10;
/// Numbers that are converted at a time, as f32 as many bytes.
const STEP_NUMBERS: usize = STEP / size_of::<f32>();

/// From here on numbers round to infinity as f16 and as bf16: half a step above their largest values.
const F16_END: f32 = 65520.0;
const BF16_END: f32 = 3.396_177_5e38;

/// The stored bytes of a tensor in row-major order.
pub(crate) fn bytes(file: &StoredFile, entry: &Entry) -> Result<Vec<u8>> {
    let span = file.bytes_at(entry.offset, entry.span_bytes())?;
    Ok(match &entry.strides {
        None => span,
        Some(strides) => gather(&span, &entry.shape, strides, entry.dtype.size()),
    })
}

/// The scales of a tensor, f32.
pub(crate) struct Scales {
    /// In the order of the numbers.
    pub values: Vec<f32>,
    /// Number of consecutive numbers that share one.
    pub each: usize,
}

/// Reads a tensor to `device` as `dtype`.
pub(crate) fn tensor(
    file: &StoredFile,
    name: &str,
    entry: &Entry,
    dtype: DType,
    scales: Option<&Scales>,
    device: &Device,
) -> crate::Result<Tensor> {
    let source = Source::of(file, name, entry, scales)?;
    match dtype {
        _ if entry.dtype.to_candle() == Some(dtype) && scales.is_none() => {
            source.as_stored(dtype, dtype, device)
        }
        DType::F32 if entry.dtype.is_float() => {
            source.converted::<f32>(dtype, f32::INFINITY, |to, from| to.copy_from_slice(from), device)
        }
        DType::F16 if entry.dtype.is_float() => {
            source.converted::<f16>(dtype, F16_END, |to, from| to.convert_from_f32_slice(from), device)
        }
        DType::BF16 if entry.dtype.is_float() => {
            let convert = |to: &mut [bf16], from: &[f32]| {
                to.iter_mut().zip(from).for_each(|(to, from)| *to = rounded(*from));
            };
            source.converted(dtype, BF16_END, convert, device)
        }
        _ => Err(source.cannot_become(dtype).into()),
    }
}

/// The bytes of a tensor of 8-bit floats, each checked to be a number, in a u8 tensor on `device`.
pub(crate) fn codes(file: &StoredFile, name: &str, entry: &Entry, device: &Device) -> crate::Result<Tensor> {
    Source::of(file, name, entry, None)?.as_stored(DType::U8, DType::F8E4M3, device)
}

/// Copies a strided view out of `span` in row-major order.
fn gather(span: &[u8], shape: &[usize], strides: &[usize], size: usize) -> Vec<u8> {
    let elements = shape.iter().product::<usize>();
    let mut out = Vec::with_capacity(elements * size);
    let mut index = vec![0usize; shape.len()];
    for _ in 0..elements {
        let at = index.iter().zip(strides).map(|(i, s)| i * s).sum::<usize>() * size;
        out.extend_from_slice(&span[at..at + size]);
        for axis in (0..shape.len()).rev() {
            index[axis] += 1;
            if index[axis] < shape[axis] {
                break;
            }
            index[axis] = 0;
        }
    }
    out
}

/// What is being read.
struct Source<'a> {
    file: &'a StoredFile,
    name: &'a str,
    entry: &'a Entry,
    scales: Option<&'a Scales>,
    /// A strided view in row-major order: it is read whole, being rare and small.
    gathered: Option<Vec<u8>>,
}

/// A step as stored and as f32: allocated once a piece.
#[derive(Default)]
struct Buffers {
    raw: Vec<u8>,
    floats: Vec<f32>,
}

impl<'a> Source<'a> {
    fn of(file: &'a StoredFile, name: &'a str, entry: &'a Entry, scales: Option<&'a Scales>) -> Result<Self> {
        let gathered = entry.strides.as_ref().map(|_| bytes(file, entry)).transpose()?;
        Ok(Self { file, name, entry, scales, gathered })
    }

    /// The stored bytes as a tensor of `dtype`; messages call the numbers `named`.
    fn as_stored(&self, dtype: DType, named: DType, device: &Device) -> crate::Result<Tensor> {
        let size = self.entry.dtype.size();
        filled(&self.entry.shape, dtype, device, |first, piece| {
            for (i, step) in piece.chunks_mut(STEP).enumerate() {
                let at = first + i * STEP;
                self.read(at, step)?;
                if let Some((place, value)) = not_finite(self.entry.dtype, step) {
                    return Err(self.bad(named, value, at / size + place).into());
                }
            }
            Ok(())
        })
    }

    /// Floats of any stored type as `dtype` through f32, which is exact for all of them but f64. Magnitudes from `end` on are
    /// infinite in the target.
    fn converted<T: bytemuck::Pod>(
        &self,
        dtype: DType,
        end: f32,
        convert: impl Fn(&mut [T], &[f32]) + Sync,
        device: &Device,
    ) -> crate::Result<Tensor> {
        filled(&self.entry.shape, dtype, device, |first, piece| {
            let mut buffers = Buffers::default();
            let values = bytemuck::cast_slice_mut::<u8, T>(piece);
            for (i, values) in values.chunks_mut(STEP_NUMBERS).enumerate() {
                let at = first / size_of::<T>() + i * STEP_NUMBERS;
                self.fill(at, values.len(), &mut buffers)?;
                self.scale(at, &mut buffers.floats);
                // A value is good if it compares as smaller: NaN never does. All at once first, which is fast.
                let is_good = |v: &f32| v.abs() < end;
                let floats = &buffers.floats;
                if !floats.iter().fold(true, |good, v| good & is_good(v)) {
                    let place = floats.iter().position(|v| !is_good(v)).unwrap_or(0);
                    return Err(self.bad(dtype, f64::from(floats[place]), at + place).into());
                }
                convert(values, floats);
            }
            Ok(())
        })
    }

    /// Fills `bytes` from the byte `at` of the tensor on.
    fn read(&self, at: usize, bytes: &mut [u8]) -> Result<()> {
        match &self.gathered {
            Some(gathered) => bytes.copy_from_slice(&gathered[at..at + bytes.len()]),
            None => self.file.read_at(self.entry.offset + at as u64, bytes)?,
        }
        Ok(())
    }

    /// `count` elements from the element `first` on, as f32.
    fn fill(&self, first: usize, count: usize, Buffers { raw, floats }: &mut Buffers) -> Result<()> {
        let size = self.entry.dtype.size();
        raw.resize(count * size, 0);
        self.read(first * size, raw)?;
        floats.clear();
        decode(raw, self.entry.dtype, floats);
        Ok(())
    }

    /// Multiplies the elements from `first` on by their scales.
    fn scale(&self, first: usize, floats: &mut [f32]) {
        let Some(Scales { values, each }) = self.scales else { return };
        let mut at = first;
        let mut rest = floats;
        while !rest.is_empty() {
            let (run, behind) = rest.split_at_mut((each - at % each).min(rest.len()));
            let scale = values[at / each];
            run.iter_mut().for_each(|number| *number *= scale);
            at += run.len();
            rest = behind;
        }
    }

    fn bad(&self, dtype: DType, value: f64, index: usize) -> WeightsError {
        let (path, name) = (self.file.path().to_owned(), self.name.to_owned());
        WeightsError::NotFinite { path, name, dtype: dtype.as_str().to_owned(), value, index }
    }

    fn cannot_become(&self, wanted: DType) -> WeightsError {
        let (path, name) = (self.file.path().to_owned(), self.name.to_owned());
        WeightsError::Conversion { path, name, stored: self.entry.dtype, wanted: wanted.as_str().to_owned() }
    }
}

/// The first of the numbers in `bytes` that is NaN or infinite: its place, and its value.
fn not_finite(dtype: StoredDType, bytes: &[u8]) -> Option<(usize, f64)> {
    // All exponent bits set; of e4m3 only with all mantissa bits too. Seen by their bits, many at a time.
    match dtype {
        StoredDType::BF16 => first(bytes, |w| u16::from_le_bytes(w) & 0x7fff >= 0x7f80),
        StoredDType::F16 => first(bytes, |w| u16::from_le_bytes(w) & 0x7fff >= 0x7c00),
        StoredDType::F32 => first(bytes, |w| u32::from_le_bytes(w) & 0x7fff_ffff >= 0x7f80_0000),
        StoredDType::F8E4M3 => first(bytes, |[byte]| byte & 0x7f == 0x7f),
        StoredDType::F64 => first(bytes, |w| u64::from_le_bytes(w) & (u64::MAX >> 1) >= 0x7ff0 << 48),
        _ => None,
    }
    .map(|place| {
        let mut value = Vec::new();
        decode(&bytes[place * dtype.size()..][..dtype.size()], dtype, &mut value);
        (place, value.first().map_or(f64::NAN, |value| f64::from(*value)))
    })
}

/// The place of the first number that `is_bad`.
fn first<const N: usize>(bytes: &[u8], is_bad: impl Fn([u8; N]) -> bool) -> Option<usize> {
    match words(bytes).fold(false, |any, word| any | is_bad(word)) {
        true => words(bytes).position(is_bad),
        false => None,
    }
}

fn words<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = [u8; N]> {
    bytes.as_chunks::<N>().0.iter().copied()
}

/// A finite number as bf16, ties to even. The library's function minds NaN too, one number at a time.
fn rounded(number: f32) -> bf16 {
    let bits = number.to_bits();
    bf16::from_bits(((bits + 0x7FFF + (bits >> 16 & 1)) >> 16) as u16)
}

/// Appends the floats in `bytes` to `out`.
fn decode(bytes: &[u8], dtype: StoredDType, out: &mut Vec<f32>) {
    match dtype {
        StoredDType::F32 => out.extend(words(bytes).map(f32::from_le_bytes)),
        StoredDType::F16 => out.extend(words(bytes).map(|w| f16::from_le_bytes(w).to_f32())),
        // The upper half of an f32.
        StoredDType::BF16 => {
            out.extend(words(bytes).map(|w| f32::from_bits(u32::from(u16::from_le_bytes(w)) << 16)));
        }
        StoredDType::F64 => out.extend(words(bytes).map(|w| f64::from_le_bytes(w) as f32)),
        StoredDType::F8E4M3 => out.extend(bytes.iter().map(|&b| Format::E4m3.value(b))),
        // Five exponent bits are those of f16: the byte is its upper half.
        StoredDType::F8E5M2 => out.extend(bytes.iter().map(|&b| f16::from_bits(u16::from(b) << 8).to_f32())),
        _ => {}
    }
}
