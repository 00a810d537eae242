//! AdamW with its moments in 8 bits (Dettmers et al. 2022, arXiv 2110.02861), as bitsandbytes' block-wise CUDA kernel has it:
//! codes of a table for blocks of 256 elements of the flattened tensor, each with the largest magnitude of its block.

use kernels::optimiser::State;
use kernels::{DType, Device, Result, Tensor};

use crate::learning::optim::AdamW;
use crate::learning::optim::Step;

/// Elements of a block.
const BLOCK: usize = 256;

/// What values a moment's codes can stand for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Signs {
    Both,
    Positive,
}

/// The 256 values of the codes, ascending: for each power of ten a number of even intervals, by their middles.
/// `create_dynamic_map` of bitsandbytes' `functional.py`.
fn table(signs: Signs) -> Vec<f32> {
    let mut values = vec![0.0, 1.0];
    for power in 0..7_i32 {
        let intervals = match signs {
            Signs::Both => 1_u32 << power,
            Signs::Positive => 2_u32 << power,
        };
        let edge = |i: u32| linspace(0.1, 1.0, intervals, i);
        for i in 0..intervals {
            let middle = 10.0_f64.powi(power - 6) * f64::from((edge(i) + edge(i + 1)) / 2.0);
            values.push(middle as f32);
            if signs == Signs::Both {
                values.push(-middle as f32);
            }
        }
    }
    values.sort_by(f32::total_cmp);
    values
}

/// The edge `i` of `intervals` even ones, as `torch.linspace` in f32 rounds it: from the nearer end.
fn linspace(from: f32, to: f32, intervals: u32, i: u32) -> f32 {
    let step = (to - from) / intervals as f32;
    match i <= intervals / 2 {
        true => from + step * i as f32,
        false => to - step * (intervals - i) as f32,
    }
}

/// The tables of both moments on a device, with the middles between neighbours.
#[derive(Debug)]
pub struct Tables {
    first: Table,
    second: Table,
}

#[derive(Debug)]
struct Table {
    signs: Signs,
    values: Tensor,
    /// 255 of them, and infinity.
    middles: Tensor,
}

impl Tables {
    /// Those on `device`.
    ///
    /// # Errors
    /// A device without memory.
    pub fn on(device: &Device) -> Result<Self> {
        let on = |signs| -> Result<Table> {
            let values = table(signs);
            let mut middles: Vec<f32> = values.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0).collect();
            middles.push(f32::INFINITY);
            let middles = Tensor::from_vec(middles, 256, device)?;
            Ok(Table { signs, values: Tensor::from_vec(values, 256, device)?, middles })
        };
        Ok(Self { first: on(Signs::Both)?, second: on(Signs::Positive)? })
    }
}

/// Codes `[n]` u8 and block maxima `[blocks]` of both moments of `parameter` before the first update.
///
/// # Errors
/// A device without memory.
pub fn begin(parameter: &Tensor) -> Result<Vec<Tensor>> {
    let (count, device) = (parameter.elem_count(), parameter.device());
    let codes = || Tensor::zeros(count, DType::U8, device);
    let maxima = || Tensor::zeros(count.div_ceil(BLOCK), DType::F32, device);
    Ok(vec![codes()?, maxima()?, codes()?, maxima()?])
}

/// One update. Weight decay comes after the step, as in bitsandbytes' kernel.
///
/// # Errors
/// A device that fails.
pub fn step(
    state: &State,
    gradient: &Tensor,
    settings: &AdamW,
    step: &Step,
    tables: &Tables,
) -> Result<State> {
    let AdamW { betas: [beta1, beta2], eps, weight_decay } = *settings;
    let number = step.number as f64;
    let (correction1, correction2) = (1.0 - beta1.powf(number), (1.0 - beta2.powf(number)).sqrt());
    let gradient = gradient.flatten_all()?;
    let first = tables.first.decoded(&state.slots[0], &state.slots[1])?;
    let second = tables.second.decoded(&state.slots[2], &state.slots[3])?;
    let second = ((second * beta2)? + (gradient.sqr()? * (1.0 - beta2))?)?;
    let first = ((first * beta1)? + (gradient * (1.0 - beta1))?)?;
    let update = (&first / (second.sqrt()? + correction2 * eps)?)?;
    let update = update.reshape(state.parameter.shape())?;
    let moved = (&state.parameter - (update * (step.lr * correction2 / correction1))?)?;
    let parameter = (moved * (1.0 - step.lr * weight_decay))?;
    let [codes1, maxima1] = tables.first.encoded(&first)?;
    let [codes2, maxima2] = tables.second.encoded(&second)?;
    Ok(State { parameter, slots: vec![codes1, maxima1, codes2, maxima2] })
}

impl Table {
    /// The values `[n]` of `codes` `[n]` with their blocks' `maxima` `[blocks]`.
    fn decoded(&self, codes: &Tensor, maxima: &Tensor) -> Result<Tensor> {
        let values = self.values.index_select(&codes.to_dtype(DType::U32)?, 0)?;
        let blocks = blocks_of(&values)?;
        blocks.broadcast_mul(&maxima.unsqueeze(1)?)?.flatten_all()?.narrow(0, 0, codes.elem_count())
    }

    /// The codes of `x` `[n]`, each the nearest of the table, and the largest magnitudes of its blocks.
    fn encoded(&self, x: &Tensor) -> Result<[Tensor; 2]> {
        let count = x.elem_count();
        let blocks = blocks_of(x)?;
        let maxima = blocks.abs()?.max_keepdim(1)?;
        // A block of zeros is divided by one: its codes are those of zero.
        let is_zero = (1.0 - maxima.gt(0.0)?.to_dtype(DType::F32)?)?;
        let scaled = blocks.broadcast_div(&(&maxima + is_zero)?)?.flatten_all()?;
        // A binary search: the codes whose middle is below x are counted, the highest bit first.
        let mut codes = scaled.zeros_like()?;
        for bit in (0..8).rev() {
            let size = f64::from(1_u32 << bit);
            let middles = self.middles.index_select(&(&codes + (size - 1.0))?.to_dtype(DType::U32)?, 0)?;
            let is_above = (&scaled - middles)?.gt(0.0)?.to_dtype(DType::F32)?;
            codes = (codes + (is_above * size)?)?;
        }
        if self.signs == Signs::Both {
            codes = self.with_sign(&codes, &scaled)?;
        }
        let codes = codes.to_dtype(DType::U8)?.narrow(0, 0, count)?.contiguous()?;
        Ok([codes, maxima.flatten_all()?])
    }

    /// `codes`, moved by one where their value does not have the sign of `x`: a small negative moment stays negative.
    fn with_sign(&self, codes: &Tensor, x: &Tensor) -> Result<Tensor> {
        let values = self.values.index_select(&codes.to_dtype(DType::U32)?, 0)?;
        let is = |x: &Tensor| x.gt(0.0)?.to_dtype(DType::F32);
        let is_negative = |x: &Tensor| x.neg()?.gt(0.0)?.to_dtype(DType::F32);
        // Zero counts as positive.
        let up = (is(x)? * is_negative(&values)?)?;
        let down = (is_negative(x)? * (1.0 - is_negative(&values)?)?)?;
        (codes + up)? - down
    }
}

/// `x` `[n]` as `[blocks, 256]`, with zeros behind it.
fn blocks_of(x: &Tensor) -> Result<Tensor> {
    let missing = x.elem_count().next_multiple_of(BLOCK) - x.elem_count();
    let padded = match missing {
        0 => x.clone(),
        _ => Tensor::cat(&[x, &Tensor::zeros(missing, x.dtype(), x.device())?], 0)?,
    };
    padded.reshape(((), BLOCK))
}
