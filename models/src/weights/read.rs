//! From the bytes of a file to a tensor: in pieces, so that only the result takes memory, on all cores, with every value
//! checked.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use kernels::weight::Format;
use kernels::{DType, Device, Tensor, WithDType};
use rayon::prelude::*;

use super::dtype::StoredDType;
use super::entry::Entry;
use super::error::{Result, WeightsError};

/// Bytes that a core reads at a time.
const PIECE: usize = 1 << 18;

/// From here on numbers round to infinity as f16 and as bf16: half a step above their largest values.
const F16_END: f32 = 65520.0;
const BF16_END: f32 = 3.396_177_5e38;

/// The stored bytes of a tensor in row-major order.
pub(crate) fn bytes(path: &Path, entry: &Entry) -> Result<Vec<u8>> {
    let mut span = vec![0; entry.span_bytes()];
    open_at(path, entry.offset)?.read_exact(&mut span).map_err(WeightsError::io("read", path))?;
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

/// Reads a tensor to the CPU as `dtype`.
pub(crate) fn tensor(
    path: &Path,
    name: &str,
    entry: &Entry,
    dtype: DType,
    scales: Option<&Scales>,
) -> crate::Result<Tensor> {
    let same_bytes = entry.dtype.to_candle() == Some(dtype) && scales.is_none();
    let source = Source { path, name, entry, scales };
    match dtype {
        DType::F32 if entry.dtype.is_float() => {
            source.floats::<f32>(f32::INFINITY, |to, from| to.copy_from_slice(from))
        }
        DType::F16 if entry.dtype.is_float() => {
            source.floats::<f16>(F16_END, |to, from| to.convert_from_f32_slice(from))
        }
        DType::BF16 if entry.dtype.is_float() => source.floats::<bf16>(BF16_END, |to, from| {
            to.iter_mut().zip(from).for_each(|(to, from)| *to = rounded(*from))
        }),
        _ if same_bytes => {
            let raw = bytes(path, entry)?;
            check_raw(&source, &raw, dtype)?;
            Ok(Tensor::from_raw_buffer(&raw, dtype, &entry.shape, &Device::Cpu)?)
        }
        _ => Err(source.cannot_become(dtype).into()),
    }
}

/// The bytes of a tensor of 8-bit floats, each checked to be a number, in a u8 tensor on the CPU.
pub(crate) fn codes(path: &Path, name: &str, entry: &Entry) -> crate::Result<Tensor> {
    let source = Source { path, name, entry, scales: None };
    let mut codes = vec![0u8; entry.elements()];
    let read = |(i, piece): (usize, &mut [u8])| {
        let first = i * PIECE;
        let mut file = open_at(path, entry.offset + first as u64)?;
        file.read_exact(piece).map_err(WeightsError::io("read", path))?;
        match piece.iter().position(|code| code & 0x7f == 0x7f) {
            Some(i) => Err(source.not_finite(DType::F8E4M3, f64::NAN, first + i)),
            None => Ok(()),
        }
    };
    match codes.par_chunks_mut(PIECE).enumerate().map(read).find_map_first(Result::err) {
        Some(error) => Err(error.into()),
        None => Ok(Tensor::from_vec(codes, entry.shape.as_slice(), &Device::Cpu)?),
    }
}

fn open_at(path: &Path, offset: u64) -> Result<File> {
    let mut file = File::open(path).map_err(WeightsError::io("open", path))?;
    file.seek(SeekFrom::Start(offset)).map_err(WeightsError::io("read", path))?;
    Ok(file)
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

/// Buffers for a piece as stored and as converted: one pair for each core, since allocating costs more than reading.
#[derive(Default)]
struct Buffers {
    raw: Vec<u8>,
    floats: Vec<f32>,
}

/// What is being read, for the messages.
struct Source<'a> {
    path: &'a Path,
    name: &'a str,
    entry: &'a Entry,
    scales: Option<&'a Scales>,
}

impl Source<'_> {
    /// Reads floats of any stored type through f32, which is exact for all of them but f64. Magnitudes from `end` on
    /// are infinite in the target.
    fn floats<T: WithDType>(
        &self,
        end: f32,
        convert: impl Fn(&mut [T], &[f32]) + Sync,
    ) -> crate::Result<Tensor> {
        let mut values = vec![T::zero(); self.entry.elements()];
        // A strided view is read whole; it is rare, and small.
        let piece = match self.entry.strides {
            Some(_) => values.len().max(1),
            None => PIECE / self.entry.dtype.size(),
        };
        let read = |buffers: &mut Buffers, (i, values): (usize, &mut [T])| {
            let first = i * piece;
            self.fill(first, values.len(), buffers)?;
            self.scale(first, &mut buffers.floats);
            // A value is good if it compares as smaller: NaN never does. All at once first, which is fast.
            let is_good = |v: &f32| v.abs() < end;
            let floats = &buffers.floats;
            if !floats.iter().fold(true, |good, v| good & is_good(v)) {
                let i = floats.iter().position(|v| !is_good(v)).unwrap_or(0);
                return Err(self.not_finite(T::DTYPE, f64::from(floats[i]), first + i));
            }
            convert(values, floats);
            Ok(())
        };
        let pieces = values.par_chunks_mut(piece).enumerate();
        match pieces.map_init(Buffers::default, read).find_map_first(Result::err) {
            Some(error) => Err(error.into()),
            None => Ok(Tensor::from_vec(values, self.entry.shape.as_slice(), &Device::Cpu)?),
        }
    }

    /// Reads `count` elements from the element `first` on; all of a strided view.
    fn fill(&self, first: usize, count: usize, Buffers { raw, floats }: &mut Buffers) -> Result<()> {
        floats.clear();
        if self.entry.strides.is_some() {
            decode(&bytes(self.path, self.entry)?, self.entry.dtype, floats);
            return Ok(());
        }
        let size = self.entry.dtype.size();
        raw.resize(count * size, 0);
        let mut file = open_at(self.path, self.entry.offset + (first * size) as u64)?;
        file.read_exact(raw).map_err(WeightsError::io("read", self.path))?;
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

    fn not_finite(&self, dtype: DType, value: f64, index: usize) -> WeightsError {
        let (path, name) = (self.path.to_owned(), self.name.to_owned());
        WeightsError::NotFinite { path, name, dtype: dtype.as_str().to_owned(), value, index }
    }

    fn cannot_become(&self, wanted: DType) -> WeightsError {
        let (path, name) = (self.path.to_owned(), self.name.to_owned());
        WeightsError::Conversion { path, name, stored: self.entry.dtype, wanted: wanted.as_str().to_owned() }
    }
}

fn check_raw(source: &Source, raw: &[u8], dtype: DType) -> Result<()> {
    let bad = match source.entry.dtype {
        StoredDType::F64 => words::<8>(raw).map(f64::from_le_bytes).enumerate().find(|(_, v)| !v.is_finite()),
        StoredDType::F8E4M3 => {
            raw.iter().map(|&b| f64::from(Format::E4m3.value(b))).enumerate().find(|(_, v)| !v.is_finite())
        }
        _ => None,
    };
    match bad {
        Some((i, value)) => Err(source.not_finite(dtype, value, i)),
        None => Ok(()),
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
