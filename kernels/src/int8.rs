//! Products in 8-bit integers: y = x W^T + b and dx = dy W from one copy of a frozen matrix W, stored as codes of the
//! rotated matrix.
//!
//! Both factors are codes from -127 to 127 with a scale for each row, and their product is a sum of integers, which is exact: the
//! same on every device, in every tiling and however a model is split. Rows are rotated before they are quantised, in groups of up to
//! 256 numbers, by a Hadamard matrix H. That spreads a large number over its group, and since H is orthogonal, x H times (W H)^T is the
//! product itself (Xu et al. 2025, ConvRot, arXiv 2512.03673; comfy-kitchen).
//!
//! W is rotated along its outputs too, `H W H`, so that the rows of dy can be rotated as those of x are: a few outputs whose gradient
//! or weights are large spoil neither their row's scale nor, through the scales of W, everyone else's. y then comes out rotated
//! and is rotated back, as dx is.
//!
//! The scales of W belong to the rows of the rotated matrix. In the backward these are what the sum runs over, so they are multiplied
//! into the rotated dy before it is quantised: `dx = sum over n of (dy H s_W)[n] q_W[n]`, with a scale for each row of dy, rotated
//! back. So the matrix is neither transposed nor quantised a second time.

use candle_core::{DType, Result};
use rayon::prelude::*;

use crate::Tensor;
use crate::cpu::{codes_of, numbers_of};
use crate::gpu::{File, Gpu, Launch, fits, suffix};
use crate::product::{End, Then};
use crate::profile::{self, Class};

/// The longest run of numbers that is rotated together.
const LARGEST_GROUP: usize = 256;
/// Calls of at most this many rows use the dequantised matrix: to quantise them gains nothing.
pub const FEW_ROWS: usize = 16;
/// The kernels' longest row: two lines of sixteen numbers for each of 512 threads.
const LONGEST_ROW: usize = 16384;
/// The largest code.
const LARGEST: f32 = 127.0;
/// The least magnitude that a row's scale is derived from, so that its inverse is finite.
const LEAST: f32 = 1.175_494_35e-36;

/// A frozen matrix as codes, rotated along rows and columns.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Matrix<'a> {
    /// [out, in] u8.
    pub codes: &'a Tensor,
    /// `[out]` f32.
    pub scale: &'a Tensor,
}

/// Rows of activations as codes.
#[derive(Debug, Clone)]
pub struct Rows {
    /// [rows, width] u8.
    codes: Tensor,
    /// `[rows]` f32.
    scale: Tensor,
}

/// How many consecutive numbers of a row of `width` are rotated together: the largest power of four that divides it, at most 256.
pub fn group(width: usize) -> usize {
    let mut group = 1;
    while group < LARGEST_GROUP && width > 0 && width.is_multiple_of(4 * group) {
        group *= 4;
    }
    group
}

/// Whether GPUs have kernels for a matrix of `out` rows and `input` columns.
pub fn is_for_gpu(out: usize, input: usize) -> bool {
    [out, input].iter().all(|width| width.is_multiple_of(16) && (16..=LONGEST_ROW).contains(width))
}

/// Rotates each group of `rows` of `width` numbers, column by column and in place: at strides 1, 4, 16 and 64, as far as the group reaches.
/// A row is rotated in itself as rows of one number.
///
/// The regular Hadamard matrix of order 4 takes x to `y[p] = (x0 + x1 + x2 + x3) - 2 x[3 - p]`; that of a group is its Kronecker power over
/// the root of the group's size. It is symmetric, so the same rotation turns back.
pub(crate) fn rotate(rows: &mut [f32], group: usize, width: usize) {
    let factor = 1.0 / (group as f32).sqrt();
    for numbers in rows.chunks_exact_mut(group * width) {
        let mut stride = width;
        while stride < group * width {
            for block in numbers.chunks_exact_mut(4 * stride) {
                for i in 0..stride {
                    let [a, b, c, d] = [0, 1, 2, 3].map(|p| block[i + p * stride]);
                    let sum = (a + b) + (c + d);
                    for (p, opposite) in [d, c, b, a].into_iter().enumerate() {
                        block[i + p * stride] = sum - 2.0 * opposite;
                    }
                }
            }
            stride *= 4;
        }
        numbers.iter_mut().for_each(|number| *number *= factor);
    }
}

/// The codes of `row` into `codes`, and its scale: the largest magnitude / 127; code = number * (127 / that magnitude), to the nearest
/// integer, ties to even. NaN makes the scale NaN, and so all that is multiplied by it.
fn quantise(row: &[f32], codes: &mut [u8]) -> f32 {
    let larger =
        |top: f32, number: f32| if top.is_nan() || number.is_nan() { f32::NAN } else { top.max(number) };
    let top = row.iter().fold(LEAST, |top, number| larger(top, number.abs()));
    let inverse = LARGEST / top;
    codes
        .iter_mut()
        .zip(row)
        .for_each(|(code, number)| *code = (number * inverse).round_ties_even() as i32 as i8 as u8);
    top / LARGEST
}

impl Rows {
    /// The rows of `x` [m, k], of any float dtype, rotated and quantised: the first factor of [`forward`].
    pub(crate) fn rotated(x: &Tensor) -> Result<Self> {
        let _noted = profile::scope(Class::Elementwise, x.device());
        let group = group(x.dim(1)?);
        on_gpu!(x, |gpu| gpu.rotated_rows(x, group)?);
        Self::computed(x, |row| rotate(row, group, 1))
    }

    /// The rows of the gradient `dy` [m, n], rotated, each number times its column's `factor` `[n]`: the first factor of [`backward`].
    fn scaled(dy: &Tensor, factor: &Tensor) -> Result<Self> {
        let _noted = profile::scope(Class::Elementwise, dy.device());
        let (factor, group) = (numbers(Some(factor))?.unwrap_or_default(), group(dy.dim(1)?));
        Self::computed(dy, |row| {
            rotate(row, group, 1);
            row.iter_mut().zip(&factor).for_each(|(number, by)| *number *= by);
        })
    }

    /// The rows of `x`, changed by `change`, quantised on the CPU.
    fn computed(x: &Tensor, change: impl Fn(&mut [f32]) + Sync) -> Result<Self> {
        let ((rows, width), device) = (x.dims2()?, x.device());
        if device.is_shadow() {
            drop(x.to_dtype(DType::F32)?);
            let codes = Tensor::shadow((rows, width), DType::U8, device);
            return Ok(Self { codes, scale: Tensor::shadow(rows, DType::F32, device) });
        }
        let mut numbers = numbers_of(x)?;
        let (mut codes, mut scale) = (vec![0; rows * width], vec![0.0; rows]);
        let each = numbers.par_chunks_mut(width).zip(codes.par_chunks_mut(width)).zip(&mut scale);
        each.for_each(|((row, codes), scale)| {
            change(row);
            *scale = quantise(row, codes);
        });
        let codes = Tensor::from_vec(codes, (rows, width), device)?;
        Ok(Self { codes, scale: Tensor::from_vec(scale, rows, device)? })
    }
}

/// The codes [out, in] and scales `[out]` of `dense` [out, in], rotated along its columns in f32 and then along its rows.
pub(crate) fn quantised(dense: &Tensor) -> Result<(Tensor, Tensor)> {
    let Rows { codes, scale } = Rows::rotated(&columns_rotated(&dense.contiguous()?, DType::F32)?)?;
    Ok((codes, scale))
}

/// `x` [rows, width] rotated along its columns, in `dtype`. One of both is f32.
fn columns_rotated(x: &Tensor, dtype: DType) -> Result<Tensor> {
    let ((rows, width), device) = (x.dims2()?, x.device());
    let group = group(rows);
    on_gpu!(x, |gpu| gpu.columns_rotated(x, group, dtype)?);
    if device.is_shadow() {
        return Tensor::shadow((rows, width), DType::F32, device).to_dtype(dtype);
    }
    let mut numbers = numbers_of(x)?;
    numbers.par_chunks_mut(group * width).for_each(|rows| rotate(rows, group, width));
    Tensor::from_vec(numbers, (rows, width), device)?.to_dtype(dtype)
}

/// y = (q_x q_W^T) s_x s_W, rotated back, plus what `end` adds, in its dtype: `x` [m, k] -> [m, n].
pub(crate) fn forward(x: &Rows, weight: Matrix, end: End) -> Result<Tensor> {
    let ((m, k), (n, _)) = (x.codes.dims2()?, weight.codes.dims2()?);
    let operands = [&x.codes, &x.scale, weight.codes, weight.scale];
    on_gpu!(&x.codes, |gpu| gpu.int8_forward(x, weight, end)?);
    let sums = |a: &[u8], b: &[u8], y: &mut [f32]| {
        for (y, b) in y.iter_mut().zip(b.chunks_exact(k)) {
            *y = a.iter().zip(b).map(|(&a, &b)| i32::from(a as i8) * i32::from(b as i8)).sum::<i32>() as f32;
        }
    };
    let (bias, onto, group) = (numbers(end.bias)?, numbers(end.onto)?, group(n));
    computed(operands, (m, n), sums, |row, y, x_scale, w_scale| {
        y.iter_mut().zip(w_scale).for_each(|(y, w_scale)| *y = *y * x_scale * w_scale);
        rotate(y, group, 1);
        for (column, y) in y.iter_mut().enumerate() {
            *y += bias.as_ref().map_or(0.0, |bias| bias[column]);
            *y += onto.as_ref().map_or(0.0, |onto| onto[row * n + column]);
        }
    })
    .and_then(|y| match end.then {
        Then::Stay => y.to_dtype(end.dtype),
        Then::Gelu => y.gelu()?.to_dtype(end.dtype),
    })
}

/// dx = dy W, rotated back, plus `onto`, in `dtype`: `dy` [m, n] -> [m, k].
pub(crate) fn backward(dy: &Tensor, weight: Matrix, onto: Option<&Tensor>, dtype: DType) -> Result<Tensor> {
    on_gpu!(dy, |gpu| gpu.int8_backward(dy, weight, onto, dtype)?);
    let k = weight.codes.dim(1)?;
    let dy = &Rows::scaled(dy, weight.scale)?;
    let operands = [&dy.codes, &dy.scale, weight.codes, weight.scale];
    let sums = |a: &[u8], b: &[u8], y: &mut [f32]| {
        let mut sums = vec![0_i32; k];
        for (&a, b) in a.iter().zip(b.chunks_exact(k)) {
            let a = i32::from(a as i8);
            sums.iter_mut().zip(b).for_each(|(sum, &b)| *sum += a * i32::from(b as i8));
        }
        y.iter_mut().zip(sums).for_each(|(y, sum)| *y = sum as f32);
    };
    let (group, onto) = (group(k), numbers(onto)?);
    computed(operands, (dy.codes.dim(0)?, k), sums, |row, y, y_scale, _| {
        y.iter_mut().for_each(|y| *y *= y_scale);
        rotate(y, group, 1);
        if let Some(onto) = &onto {
            y.iter_mut().zip(&onto[row * k..]).for_each(|(y, onto)| *y += onto);
        }
    })?
    .to_dtype(dtype)
}

/// The f32 tensor [m, n] whose rows `sums` makes from a row of codes and all of the second factor's, and `end` completes given the row's
/// index, its scale and the matrix's. Of shadows it is a shadow.
fn computed(
    [a, a_scale, b, b_scale]: [&Tensor; 4],
    shape: (usize, usize),
    sums: impl Fn(&[u8], &[u8], &mut [f32]) + Sync,
    end: impl Fn(usize, &mut [f32], f32, &[f32]) + Sync,
) -> Result<Tensor> {
    let device = a.device();
    if device.is_shadow() {
        return Ok(Tensor::shadow(shape, DType::F32, device));
    }
    let (a_scale, b_scale) = (numbers_of(a_scale)?, numbers_of(b_scale)?);
    let (a, b) = (codes_of(a)?, codes_of(b)?);
    let mut y = vec![0.0; shape.0 * shape.1];
    let rows = y.par_chunks_mut(shape.1).zip(a.par_chunks(a.len() / shape.0)).zip(&a_scale).enumerate();
    rows.for_each(|(index, ((y, a), scale))| {
        sums(a, &b, y);
        end(index, y, *scale, &b_scale);
    });
    Tensor::from_vec(y, shape, device)
}

/// The numbers of a tensor that has some: shadows have none.
fn numbers(x: Option<&Tensor>) -> Result<Option<Vec<f32>>> {
    x.filter(|x| !x.is_shadow()).map(numbers_of).transpose()
}

/// W [n, k] in `dtype`: codes times scales in f32, rotated back along rows and columns, rounded once.
pub(crate) fn dequantised(weight: Matrix, dtype: DType) -> Result<Tensor> {
    columns_rotated(&rows_rotated_back(weight)?, dtype)
}

/// Codes times scales, rotated along rows: [n, k] f32.
fn rows_rotated_back(weight: Matrix) -> Result<Tensor> {
    let (codes, scale) = (weight.codes, weight.scale);
    let ((rows, width), device) = (codes.dims2()?, codes.device());
    on_gpu!(codes, |gpu| gpu.rows_rotated_back(weight)?);
    if device.is_shadow() {
        return Ok(Tensor::shadow((rows, width), DType::F32, device));
    }
    let (codes, scale, group) = (codes_of(codes)?, numbers_of(scale)?, group(width));
    let mut numbers: Vec<f32> = codes.iter().map(|&code| f32::from(code as i8)).collect();
    numbers.par_chunks_mut(width).zip(&scale).for_each(|(row, scale)| {
        row.iter_mut().for_each(|number| *number *= scale);
        rotate(row, group, 1);
    });
    Tensor::from_vec(numbers, (rows, width), device)
}

/// Rows and columns of a block's tile of a product, bytes of its shared memory and its threads, as in `int8.cu`.
const TILE: (usize, usize) = (128, 256);
const TILE_BYTES: usize = 4 * (TILE.0 + TILE.1) * 64;
const THREADS: usize = 256;
/// Columns of a block that rotates columns, and its threads.
const TURNED_COLUMNS: usize = 32;
const TURN_THREADS: usize = 512;

/// Threads that have a row of `width`, and how many lines of sixteen numbers each has.
fn line_threads(width: usize) -> (usize, usize) {
    let lines = width.div_ceil(LONGEST_ROW / 2);
    ((width / (16 * lines)).next_multiple_of(32).max(32), lines)
}

impl Gpu {
    fn rotated_rows(&self, x: &Tensor, group: usize) -> Result<Option<Rows>> {
        let Some((rows, launch)) = self.rows("code_forward", x)? else { return Ok(None) };
        let ((count, width), (threads, _)) = (x.dims2()?, line_threads(x.dim(1)?));
        let launch = launch.tensor(x)?.tensor(&rows.codes)?.tensor(&rows.scale)?.int(width).int(group);
        launch.shared(threads * 17 * size_of::<f32>()).rows(count, threads)?;
        Ok(Some(rows))
    }

    /// Room for the codes of `x`, and the kernel `name` for rows like its.
    fn rows(&self, name: &str, x: &Tensor) -> Result<Option<(Rows, Launch<'_>)>> {
        let (count, width) = x.dims2()?;
        let Some(suffix) = suffix(x.dtype()).filter(|_| is_for_gpu(16, width)) else { return Ok(None) };
        if !fits(&[x])? {
            return Ok(None);
        }
        let codes = self.empty((count, width), DType::U8)?;
        let rows = Rows { codes, scale: self.empty(count, DType::F32)? };
        let lines = line_threads(width).1;
        Ok(Some((rows, Launch::new(self, File::Int8, &format!("{name}_{lines}_{suffix}"))?)))
    }

    fn columns_rotated(&self, x: &Tensor, group: usize, dtype: DType) -> Result<Option<Tensor>> {
        let (rows, width) = x.dims2()?;
        let name = match (suffix(x.dtype()), suffix(dtype)) {
            (Some(from), _) if dtype == DType::F32 => format!("turn_columns_from_{from}"),
            (_, Some(to)) if x.dtype() == DType::F32 => format!("turn_columns_to_{to}"),
            _ => return Ok(None),
        };
        let y = self.empty((rows, width), dtype)?;
        let launch = Launch::new(self, File::Int8, &name)?.tensor(x)?.tensor(&y)?;
        let tiles = rows.div_ceil(LARGEST_GROUP) * width.div_ceil(TURNED_COLUMNS);
        launch.int(rows).int(width).int(group).rows(tiles, TURN_THREADS)?;
        Ok(Some(y))
    }

    fn rows_rotated_back(&self, weight: Matrix) -> Result<Option<Tensor>> {
        let (rows, width) = weight.codes.dims2()?;
        if !is_for_gpu(16, width) {
            return Ok(None);
        }
        let ((threads, lines), y) = (line_threads(width), self.empty((rows, width), DType::F32)?);
        let launch = Launch::new(self, File::Int8, &format!("decode_rotated_{lines}"))?;
        let launch = launch.tensor(weight.codes)?.tensor(weight.scale)?.tensor(&y)?;
        let launch = launch.int(width).int(group(width)).shared(threads * 17 * size_of::<f32>());
        launch.rows(rows, threads)?;
        Ok(Some(y))
    }

    fn int8_forward(&self, x: &Rows, weight: Matrix, end: End) -> Result<Option<Tensor>> {
        let ((m, k), n) = (x.codes.dims2()?, weight.codes.dim(0)?);
        let Some(suffix) = product_suffix(end.dtype).filter(|_| is_for_gpu(n, k)) else { return Ok(None) };
        let y = self.empty((m, n), end.dtype)?;
        let name = match end.then {
            Then::Stay => "int8_forward",
            Then::Gelu => "int8_forward_gelu",
        };
        let launch = Launch::new(self, File::Int8, &format!("{name}_{suffix}"))?;
        let launch = launch.tensor(&x.codes)?.tensor(weight.codes)?.tensor(&x.scale)?.tensor(weight.scale)?;
        let launch = launch.maybe(end.bias)?.maybe(end.onto)?.tensor(&y)?.int(m).int(n).int(k).int(group(n));
        let tiles = m.div_ceil(TILE.0) * n.div_ceil(TILE.1);
        launch.int(tiles).shared(TILE_BYTES).resident(tiles, THREADS)?;
        Ok(Some(y))
    }

    fn int8_backward(
        &self,
        dy: &Tensor,
        weight: Matrix,
        onto: Option<&Tensor>,
        dtype: DType,
    ) -> Result<Option<Tensor>> {
        let (m, (n, k)) = (dy.dim(0)?, weight.codes.dims2()?);
        let Some(suffix) = product_suffix(dtype).filter(|_| is_for_gpu(n, k)) else { return Ok(None) };
        let Some((rows, launch)) = self.rows("code_backward", dy)? else { return Ok(None) };
        let noted = profile::scope(Class::Elementwise, dy.device());
        let launch = launch.tensor(dy)?.tensor(weight.scale)?.tensor(&rows.codes)?.tensor(&rows.scale)?;
        let threads = line_threads(n).0;
        launch.int(n).int(group(n)).shared(threads * 17 * size_of::<f32>()).rows(m, threads)?;
        drop(noted);
        let dx = self.empty((m, k), dtype)?;
        let launch = Launch::new(self, File::Int8, &format!("int8_backward_{suffix}"))?;
        let launch = launch.tensor(&rows.codes)?.tensor(weight.codes)?.tensor(&rows.scale)?;
        let launch = launch.maybe(onto)?.tensor(&dx)?.int(m).int(k).int(n).int(group(k));
        let tiles = m.div_ceil(TILE.0) * k.div_ceil(TILE.1);
        launch.int(tiles).shared(TILE_BYTES).resident(tiles, THREADS)?;
        Ok(Some(dx))
    }
}

/// The suffix of the products' kernels, which write no f16.
fn product_suffix(dtype: DType) -> Option<&'static str> {
    suffix(dtype).filter(|_| dtype != DType::F16)
}
