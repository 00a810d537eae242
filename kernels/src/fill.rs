//! New tensors from bytes that are made in host memory in pieces, on all cores: how files are read onto a device.
//!
//! On a GPU a piece is made in one of a ring of pinned buffers and copied from there while the next pieces are made, so that the
//! link is never idle and no tensor is ever whole in host memory. On the CPU a piece is made where it stays.

use std::result::Result;

use bytemuck::{Pod, cast_slice_mut, zeroed_vec};
use candle_core::{Error, WithDType};
use half::{bf16, f16};
use rayon::prelude::*;

use crate::{DType, Device, Tensor};

/// Bytes of a piece, a multiple of every dtype's size: small enough that a large matrix has work for all cores, large enough that
/// the start of a copy costs nothing beside it.
pub const PIECE: usize = 2 << 20;

/// A new tensor on `device`. `make` writes the bytes of each piece, little-endian numbers in row-major order: it gets the place of
/// the first byte in the tensor, and the piece, which is aligned as the dtype is. Several threads call it at once, in no order;
/// for a shadow it is not called.
///
/// When it returns, `make` is done with every piece; a GPU may still be copying, which its stream waits for.
///
/// # Errors
/// The error of `make` for the foremost piece that fails, and those of the device.
pub fn filled<E>(
    shape: &[usize],
    dtype: DType,
    device: &Device,
    make: impl Fn(usize, &mut [u8]) -> Result<(), E> + Sync,
) -> Result<Tensor, E>
where
    E: From<Error> + Send,
{
    if device.is_shadow() {
        return Ok(Tensor::zeros(shape, dtype, device)?);
    }
    #[cfg(feature = "cuda")]
    if let Some(card) = device.card().filter(|_| crate::cuda::upload::takes(dtype)) {
        return card.filled(shape, dtype, make);
    }
    let host = if device.is_cpu() { device } else { &Device::Cpu };
    let x = match dtype {
        DType::BF16 => in_place::<bf16, E>(shape, host, make),
        DType::F16 => in_place::<f16, E>(shape, host, make),
        DType::F32 => in_place::<f32, E>(shape, host, make),
        DType::F64 => in_place::<f64, E>(shape, host, make),
        DType::U8 => in_place::<u8, E>(shape, host, make),
        DType::U32 => in_place::<u32, E>(shape, host, make),
        DType::I64 => in_place::<i64, E>(shape, host, make),
        _ => {
            // As f64, whose alignment is enough for every dtype.
            let bytes = shape.iter().product::<usize>() * dtype.size_in_bytes();
            let mut words = zeroed_vec::<f64>(bytes.div_ceil(size_of::<f64>()));
            let bytes = &mut cast_slice_mut::<f64, u8>(&mut words)[..bytes];
            make_all(bytes, make)?;
            Ok(Tensor::from_raw_buffer(bytes, dtype, shape, host)?)
        }
    }?;
    Ok(x.to_device(device)?)
}

/// Copies from pinned host memory to `device` for about `seconds`, and returns how many bytes a second went over its link; `None`
/// for the CPU.
///
/// # Errors
/// When the device fails.
pub fn link_speed(device: &Device, seconds: f64) -> crate::Result<Option<f64>> {
    #[cfg(feature = "cuda")]
    if let Some(card) = device.card() {
        return card.link_speed(seconds).map(Some);
    }
    let _ = (device, seconds);
    Ok(None)
}

fn in_place<T: WithDType + Pod, E: From<Error> + Send>(
    shape: &[usize],
    device: &Device,
    make: impl Fn(usize, &mut [u8]) -> Result<(), E> + Sync,
) -> Result<Tensor, E> {
    // The system's own zeros: no thread writes them first.
    let mut values = zeroed_vec::<T>(shape.iter().product());
    make_all(cast_slice_mut(&mut values), make)?;
    Ok(Tensor::from_vec(values, shape, device)?)
}

fn make_all<E: Send>(
    bytes: &mut [u8],
    make: impl Fn(usize, &mut [u8]) -> Result<(), E> + Sync,
) -> Result<(), E> {
    if bytes.len() <= PIECE {
        return make(0, bytes);
    }
    let pieces = bytes.par_chunks_mut(PIECE).enumerate();
    foremost(pieces.map(|(n, piece)| make(n * PIECE, piece)))
}

/// The error of the foremost piece that failed.
pub(crate) fn foremost<E: Send>(pieces: impl IndexedParallelIterator<Item = Result<(), E>>) -> Result<(), E> {
    pieces.with_max_len(1).find_map_first(Result::err).map_or(Ok(()), Err)
}
