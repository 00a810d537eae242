//! Layers over named streams: a model with a side chain, injections and a token in front equals its plain formula, forward
//! and backward, for every split and every choice of what is kept.

use std::collections::BTreeMap;

use kernels::transfer::Route;
use kernels::{D, Device, Tensor};
use models::dit::{
    Architecture, Base, BlockPlan, Boundary, Embed, Embedder, Keep, KeepPlace, LayerId, NetworkInput, Plans,
    Role,
};
use models::weights::{TensorSpec, Weights};
use proofs::autograd::{Slopes, Variable, detached};
use proofs::control::{
    CONTROL, ControlModel, HINT_SCALE, INJECTOR, REFERENCE, REFERENCE_DIM, SIDE, SOUND, SOUND_DIM,
};
use proofs::small::{micro_batch, trained, uniform, velocities};
use proofs::{Tolerance, assert_close, assert_same_bits, device, difference, randn};
use trainer::pipeline::{MicroBatch, Pipeline};

const RANK: usize = 3;
const SCALE: f64 = 0.6;
/// f32 sums in another order, through eight layers and back.
const PLAIN: Tolerance = Tolerance { absolute: 1e-6, relative: 1e-4 };

fn batch(name: &str, samples: usize, sound: usize, dropout: Option<f64>) -> MicroBatch {
    let mut batch = micro_batch(name, samples, 9, dropout);
    let latents = batch.input.x_bcthw.dims().to_vec();
    batch.input = batch
        .input
        .with(CONTROL, randn(&format!("{name}.control"), latents))
        .with(SOUND, randn(&format!("{name}.sound"), (samples, sound, SOUND_DIM)))
        .with(REFERENCE, randn(&format!("{name}.reference"), (samples, REFERENCE_DIM)));
    batch
}

fn batches() -> Vec<MicroBatch> {
    [(2, 4), (1, 7), (3, 1), (2, 5)]
        .into_iter()
        .enumerate()
        .map(|(i, (samples, sound))| batch(&format!("control {i}"), samples, sound, Some(0.2)))
        .collect()
}

fn split_into(model: &ControlModel, split: &[usize]) -> Pipeline {
    let mut next = 0;
    let ranges = split.iter().map(|&blocks| {
        next += blocks;
        (device(), next - blocks..next)
    });
    let (weights, adapters) = (Weights::from_tensors(model.weights()), model.adapters(RANK, SCALE));
    let split: Vec<_> = ranges.collect();
    let mut pipeline = Pipeline::load(&weights, model.shared(), &split, &adapters, Base::F32).unwrap();
    pipeline.set_ffn_tokens(5); // of 13, so that chunks are cut
    pipeline
}

/// The model written down plainly, out of ops that candle can differentiate.
struct Plain<'a> {
    model: &'a ControlModel,
    tensors: BTreeMap<String, Tensor>,
    /// Factors of adapters by tensor name.
    factors: BTreeMap<String, Variable>,
    cos: Tensor,
    sin: Tensor,
}

type Candle<T = Tensor> = kernels::Result<T>;

impl Plain<'_> {
    fn linear(&self, name: &str, x: &Tensor) -> Candle {
        let through = |x: &Tensor, matrix: &Tensor| x.contiguous()?.broadcast_matmul(&matrix.t()?);
        let y = through(x, &self.tensors[&format!("{name}.weight")])?
            .broadcast_add(&self.tensors[&format!("{name}.bias")])?;
        let factor = |end: &str| self.factors.get(&format!("{name}.{end}.weight")).map(Variable::as_tensor);
        match (factor("lora_A"), factor("lora_B")) {
            (Some(a), Some(b)) => y + (through(&through(x, a)?, b)? * SCALE)?,
            _ => Ok(y),
        }
    }

    fn layer_norm(&self, x: &Tensor) -> Candle {
        let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        let variance = (centred.sqr()?.mean_keepdim(D::Minus1)? + self.model.config.eps)?;
        centred.broadcast_div(&variance.sqrt()?)
    }

    fn modulated(&self, x: &Tensor, shift: &Tensor, scale: &Tensor) -> Candle {
        self.layer_norm(x)?.broadcast_mul(&(scale + 1.0)?)?.broadcast_add(shift)
    }

    fn rms_norm(&self, name: &str, x: &Tensor) -> Candle {
        let square = (x.sqr()?.mean_keepdim(D::Minus1)? + self.model.config.eps)?;
        x.broadcast_div(&square.sqrt()?)?.broadcast_mul(&self.tensors[&format!("{name}.weight")])
    }

    /// [b, l, d] -> [b, n, l, h].
    fn heads(&self, x: &Tensor) -> Candle {
        let (batch, tokens, width) = x.dims3()?;
        let heads = self.model.config.heads;
        x.reshape((batch, tokens, heads, width / heads))?.transpose(1, 2)?.contiguous()
    }

    /// Pairs (2j, 2j+1) of [b, n, l, h] turned by each token's angles.
    fn turned(&self, x: &Tensor) -> Candle {
        let (batch, heads, tokens, size) = x.dims4()?;
        let pairs = x.reshape((batch, heads, tokens, size / 2, 2))?;
        let part = |i: usize| pairs.narrow(4, i, 1)?.squeeze(4)?.contiguous();
        let (a, b) = (part(0)?, part(1)?);
        let first = (a.broadcast_mul(&self.cos)? - b.broadcast_mul(&self.sin)?)?;
        let second = (a.broadcast_mul(&self.sin)? + b.broadcast_mul(&self.cos)?)?;
        Tensor::stack(&[first, second], 4)?.reshape((batch, heads, tokens, size))
    }

    /// softmax(q k^T / sqrt(h)) v of heads, as [b, l, d].
    fn attention(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Candle {
        let scores = (q.matmul(&k.t()?)? / (q.dim(3)? as f64).sqrt())?;
        let scores = scores.broadcast_sub(&detached(&scores.max_keepdim(3)?))?.exp()?;
        let weights = scores.broadcast_div(&scores.sum_keepdim(3)?)?;
        weights.matmul(v)?.transpose(1, 2)?.contiguous()?.flatten_from(2)
    }

    fn block(&self, id: LayerId, x: &Tensor, modulation: &Tensor, text: &Tensor) -> Candle {
        let name = |part: &str| format!("{id}.{part}");
        let own = self.tensors[&name("modulation")].unsqueeze(1)?;
        let rows = modulation.broadcast_add(&own)?; // [b, 1, 6, d]
        let row = |i: usize| rows.narrow(2, i, 1)?.squeeze(2);
        let projected = |part: &str, x: &Tensor| self.linear(&name(part), x);
        let normed = |part: &str, norm: &str, x: &Tensor| {
            self.heads(&self.rms_norm(&name(norm), &projected(part, x)?)?)
        };
        let h = self.modulated(x, &row(0)?, &row(1)?)?;
        let q = self.turned(&normed("self_attn.q", "self_attn.norm_q", &h)?)?;
        let k = self.turned(&normed("self_attn.k", "self_attn.norm_k", &h)?)?;
        let o = self.attention(&q, &k, &self.heads(&projected("self_attn.v", &h)?)?)?;
        let x = (x + projected("self_attn.o", &o)?.broadcast_mul(&row(2)?)?)?;
        let h = self.layer_norm(&x)?.broadcast_mul(&self.tensors[&name("norm3.weight")])?;
        let h = h.broadcast_add(&self.tensors[&name("norm3.bias")])?;
        let q = normed("cross_attn.q", "cross_attn.norm_q", &h)?;
        let k = normed("cross_attn.k", "cross_attn.norm_k", text)?;
        let o = self.attention(&q, &k, &self.heads(&projected("cross_attn.v", text)?)?)?;
        let x = (x + projected("cross_attn.o", &o)?)?;
        let h = self.modulated(&x, &row(3)?, &row(4)?)?;
        let fed = projected("ffn.2", &projected("ffn.0", &h)?.gelu()?)?;
        x + fed.broadcast_mul(&row(5)?)?
    }

    /// The velocity: all hints from the side chain first, then the main blocks with what is added after them.
    fn velocity(&self, embedder: &Embedder, input: &NetworkInput) -> Candle {
        let mut plain = input.clone();
        let [control, sound, reference] =
            [CONTROL, SOUND, REFERENCE].map(|role| plain.cond.take(role).unwrap());
        let Boundary { streams, cond } = embedder.embed(&plain).unwrap();
        let [time, modulation, text] =
            [Role::TIME, Role::MODULATION, Role::TEXT].map(|role| cond.require(role).unwrap());
        let reference = self.linear("reference_embedding", &reference.unsqueeze(1)?)?;
        let sound = self.linear("sound_embedding", &sound)?;
        let begin = Tensor::cat(&[reference, streams.main], 1)?;
        let control = self.linear("side_before", &embedder.tokens(&control).unwrap())?;
        let (mut x, mut side) = (begin.clone(), (control.pad_with_zeros(1, 1, 0)? + begin)?);
        let mut hints = Vec::new();
        for n in 0..self.model.hints.len() {
            side = self.block(LayerId::new(SIDE, n), &side, modulation, text)?;
            hints.push((self.linear(&format!("{SIDE}.{n}.after"), &side)? * HINT_SCALE)?);
        }
        for n in 0..self.model.config.layers {
            x = self.block(LayerId::block(n), &x, modulation, text)?;
            if let Some(hint) = self.model.hints.iter().position(|&block| block == n) {
                x = (x + &hints[hint])?;
            }
            if let Some(injection) = self.model.injections.iter().position(|&block| block == n) {
                let part = |part: &str, x: &Tensor| self.linear(&format!("{INJECTOR}.{injection}.{part}"), x);
                let [q, k, v] = [part("q", &x)?, part("k", &sound)?, part("v", &sound)?];
                let o = self.attention(&self.heads(&q)?, &self.heads(&k)?, &self.heads(&v)?)?;
                x = (&x + part("o", &o)?)?;
            }
        }
        let rows = time.unsqueeze(2)?.broadcast_add(&self.tensors["head.modulation"].unsqueeze(1)?)?;
        let x = x.narrow(1, 1, x.dim(1)? - 1)?.contiguous()?;
        let x = self.modulated(&x, &rows.narrow(2, 0, 1)?.squeeze(2)?, &rows.narrow(2, 1, 1)?.squeeze(2)?)?;
        let (batch, channels, frames, height, width) = input.x_bcthw.dims5()?;
        let pixels = self.linear("head.head", &x)?;
        pixels
            .reshape(&[batch, frames, height / 2, width / 2, 2, 2, channels][..])?
            .permute([0, 6, 1, 2, 4, 3, 5])?
            .contiguous()?
            .reshape((batch, channels, frames, height, width))
    }
}

/// Velocity, loss and gradients of the plain formula.
fn plain(model: &ControlModel, batch: &MicroBatch) -> (Tensor, Tensor, BTreeMap<String, Tensor>) {
    let weights = Weights::from_tensors(model.weights());
    let embedder = Embedder::load(&weights, &model.config, Base::F32, &device()).unwrap();
    let positions = model.positions(&batch.input, &device()).unwrap();
    let parameters = model.adapters(RANK, SCALE).parameters();
    let factors: BTreeMap<String, Variable> =
        parameters.into_iter().map(|(name, factor)| (name, Variable::new(&factor))).collect();
    let (cos, sin) = (positions.cos_lp, positions.sin_lp);
    let plain = Plain { model, tensors: model.weights(), factors, cos, sin };
    let velocity = plain.velocity(&embedder, &batch.input).unwrap();
    let weights = Tensor::new(batch.weights.as_slice(), &device()).unwrap();
    let weights = weights.reshape((batch.weights.len(), 1, 1, 1, 1)).unwrap();
    let error = (&velocity - &batch.target).unwrap().sqr().unwrap();
    let loss = error.broadcast_mul(&weights).unwrap().mean_all().unwrap();
    let found = Slopes::of(&loss);
    let gradient = |(name, var): (&String, &Variable)| (name.clone(), found.get(var));
    (velocity, loss, plain.factors.iter().map(gradient).collect())
}

/// Outputs, loss and the gradient of every adapter: on main blocks, on side blocks, whose gradient comes through their
/// hints and through the later blocks of the chain, and on injections.
#[test]
fn a_model_with_side_chain_and_injections_equals_its_plain_formula() {
    let (model, batch) = (ControlModel::small(), batch("plain", 2, 5, None));
    let (velocity, loss, gradients) = plain(&model, &batch);
    let pipeline = split_into(&model, &[4]);
    let got = velocities(&pipeline, std::slice::from_ref(&batch.input)).remove(0);
    assert_close("velocity", &got, &velocity, PLAIN);
    let (losses, found) = trained(&pipeline, std::slice::from_ref(&batch), BlockPlan::default());
    let expected: f32 = loss.to_scalar().unwrap();
    assert!((losses[0] / expected - 1.0).abs() < 1e-5, "loss {}, expected {expected}", losses[0]);
    assert!(found.keys().eq(gradients.keys()), "every adapter's tensors get gradients, and no others");
    for (name, gradient) in &gradients {
        assert!(difference(gradient, &gradient.zeros_like().unwrap()).0 > 1e-6, "{name}: no gradient");
        assert_close(name, &found[name], gradient, PLAIN);
    }
}

/// Splits before, within and after the side chain: streams and roles that only this model has cross the boundaries, and
/// their gradients come back.
#[test]
fn stages_of_a_model_with_a_side_chain_are_the_model_bit_for_bit() {
    let model = ControlModel::small();
    let whole = split_into(&model, &[4]);
    let inputs: Vec<NetworkInput> = batches().into_iter().map(|batch| batch.input).collect();
    let expected = velocities(&whole, &inputs);
    let (losses, gradients) = trained(&whole, &batches(), BlockPlan::default());
    for split in [&[2, 2][..], &[1, 3], &[3, 1], &[1, 1, 1, 1]] {
        let mut stages = split_into(&model, split);
        stages.set_route(Route::Host).unwrap();
        for (i, (got, expected)) in velocities(&stages, &inputs).iter().zip(&expected).enumerate() {
            assert_same_bits(&format!("velocity {i} of {split:?}"), got, expected);
        }
        let (split_losses, found) = trained(&stages, &batches(), BlockPlan::default());
        assert_eq!(split_losses, losses, "losses of {split:?}");
        assert!(found.keys().eq(gradients.keys()), "{split:?}: other gradients");
        for (name, gradient) in &gradients {
            assert_same_bits(&format!("{name} of {split:?}"), &found[name], gradient);
        }
        assert_eq!(stages.live_transfers(), 0, "{split:?}");
    }
}

/// A role that only this model's code uses is placed, crosses the boundary to the stage that reads it, and reaches
/// output and gradients there; without it that stage's model is refused by the role's name.
#[test]
fn a_role_of_one_model_reaches_the_stage_that_reads_it() {
    let model = ControlModel { injections: vec![3], ..ControlModel::small() };
    let stages = split_into(&model, &[2, 2]);
    let (quiet, mut loud) = (batch("roles", 2, 5, None), batch("roles", 2, 5, None));
    loud.input.cond.insert(SOUND, randn("louder", (2, 3, SOUND_DIM)));
    let of = |batch: &MicroBatch| trained(&stages, std::slice::from_ref(batch), BlockPlan::default());
    let ((quiet_loss, quiet_gradients), (loud_loss, loud_gradients)) = (of(&quiet), of(&loud));
    assert!((quiet_loss[0] - loud_loss[0]).abs() > 1e-4, "the role does nothing");
    let reader = format!("{INJECTOR}.0.k.lora_A.weight");
    assert!(difference(&quiet_gradients[&reader], &loud_gradients[&reader]).0 > 1e-6, "no gradient sees it");
    let mut silent = quiet;
    silent.input.cond.take(SOUND);
    let error = stages.predict(&[silent.input]).unwrap_err().to_string();
    assert!(error.contains("reads sound and was given none (role `sound`)"), "{error}");
}

/// What is kept of each layer and where it waits, chosen for each by its id, changes no bit.
#[test]
fn what_is_kept_of_side_blocks_and_injections_changes_no_bit() {
    let model = ControlModel::small();
    let pipeline = split_into(&model, &[2, 2]);
    let (losses, gradients) = trained(&pipeline, &batches(), BlockPlan::default());
    let keeps = [Keep::Input, Keep::Attention, Keep::All];
    let places = [KeepPlace::Device, KeepPlace::Host, KeepPlace::HostUntilUsed];
    let plan = |keep, place| BlockPlan { keep, place };
    let mut all: Vec<Plans> =
        keeps.iter().map(|&keep| uniform(&pipeline, plan(keep, KeepPlace::Host))).collect();
    // Another plan for each layer, in every rotation.
    for turn in 0..9 {
        let ids = pipeline.layers().into_iter().enumerate();
        all.push(ids.map(|(i, id)| (id, plan(keeps[(i + turn) % 3], places[(i + turn) / 3 % 3]))).collect());
    }
    for plans in &all {
        let outcome = pipeline.train(&batches(), plans).unwrap();
        let bits = outcome.losses.iter().map(|loss| loss.to_scalar::<f32>().unwrap());
        assert!(bits.eq(losses.iter().copied()), "losses of {plans:?}");
        for (name, gradient) in outcome.gradients.iter() {
            let gradient = gradient.to_device(&Device::Cpu).unwrap();
            assert_same_bits(&format!("{name}, {plans:?}"), &gradient, &gradients[name]);
        }
    }
    // One plan for each main block is that of the layers that follow it too.
    let lean = BlockPlan::default();
    assert_eq!(pipeline.plans(&[lean; 4]).unwrap(), uniform(&pipeline, lean));
    let mut blocks = [lean; 4];
    blocks[2].keep = Keep::All;
    let plans = pipeline.plans(&blocks).unwrap();
    let all = pipeline.layers().into_iter().filter(|id| plans.of(*id).unwrap().keep == Keep::All);
    let expected = [LayerId::block(2), LayerId::new(SIDE, 1), LayerId::new(INJECTOR, 1)];
    assert_eq!(all.collect::<Vec<_>>(), expected);
    assert!(pipeline.plans(&[lean; 3]).is_err(), "three plans for four blocks");
    let without = pipeline.layers().into_iter().skip(1).map(|id| (id, BlockPlan::default())).collect();
    let error = pipeline.train(&batches(), &without).unwrap_err().to_string();
    assert!(error.contains("keep of the layer blocks.0"), "{error}");
}

/// What a model takes is counted from the tensors of its layers, those beside the main chain included, and on the stage of
/// the block that they follow.
#[test]
fn bytes_of_side_blocks_and_injections_are_counted_where_they_are() {
    let model = ControlModel::small();
    let numbers = |spec: &TensorSpec| 4 * spec.shape.iter().product::<usize>() as u64;
    let whole: u64 = model.tensors().iter().map(numbers).sum();
    assert_eq!(Base::F32.bytes(&model, &(0..4)), whole);
    assert_eq!(Base::F32.bytes(&model, &(0..1)) + Base::F32.bytes(&model, &(1..4)), whole);
    let pipeline = split_into(&model, &[1, 3]);
    for (stage, range) in pipeline.stages().iter().zip([0..1, 1..4]) {
        let held: usize = stage.dit.linears().map(|linear| linear.weight().bytes()).sum();
        assert_eq!(held as u64, Base::F32.matrix_bytes(&model, &range), "{range:?}");
    }
}

/// Layers are named as their tensors are, and one chain's name is not taken for another's.
#[test]
fn layers_are_known_by_the_names_of_their_tensors() {
    let ids = [LayerId::block(1), LayerId::block(12), LayerId::new(INJECTOR, 1)];
    assert_eq!(ids.map(|id| id.to_string()), ["blocks.1", "blocks.12", "injector.layers.1"]);
    assert_eq!(ids[0].local("blocks.1.ffn.0"), Some("ffn.0"));
    assert_eq!(ids[2].local("injector.layers.1.q.weight"), Some("q.weight"));
    for other in ["blocks.12.ffn.0", "side_blocks.1.ffn.0", "blocks.1", "blocks.x.ffn", "injector.layers.1.q"]
    {
        assert_eq!(ids[0].local(other), None, "{other}");
    }
    let adapters = ControlModel::small().adapters(RANK, SCALE);
    let pipeline = split_into(&ControlModel::small(), &[2, 2]);
    let on = |stage: usize| pipeline.stages()[stage].adapters.iter().count();
    assert_eq!(on(0) + on(1), adapters.iter().count(), "each adapter is on one stage");
}
