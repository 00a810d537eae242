//! Random models, adapters and micro-batches of any size, all functions of their names.

use std::collections::BTreeMap;

use kernels::low_rank::Factors;
use kernels::random::Key;
use kernels::{Device, Tensor};
use models::adapter::{Adapter, Adapters};
use models::dit::animate::{Animate, MotionSizes};
use models::dit::{
    Base, BlockPlan, CameraSizes, Control, DitConfig, Dropout, ImageBranch, Plans, SideChain, Speech,
};
use models::published::Kind;
use models::weights::{TensorSpec, Weights};
use trainer::pipeline::{MicroBatch, NetworkInput, Objective, Pipeline};

use crate::{device, randn};

/// A T2V model small enough to run hundreds of times, with `layers` blocks of width `dim`.
pub fn config(layers: usize, dim: usize) -> DitConfig {
    DitConfig {
        kind: Kind::Text,
        dim,
        ffn_dim: dim + dim / 4,
        heads: 2,
        layers,
        in_channels: 16,
        out_channels: 16,
        text_dim: 24,
        text_len: 32,
        freq_dim: 32,
        eps: 1e-6,
        image: None,
        control: Control::default(),
    }
}

/// A tiny model of each kind, of `layers` blocks.
pub fn each_kind(layers: usize) -> Vec<DitConfig> {
    let text = config(layers, 24);
    let image = |positions| Some(ImageBranch { dim: 20, positions });
    vec![
        DitConfig { kind: Kind::Picture, in_channels: 36, image: image(None), ..text.clone() },
        DitConfig { kind: Kind::TwoPictures, in_channels: 36, image: image(Some(9)), ..text.clone() },
        DitConfig { kind: Kind::PictureWithoutClip, in_channels: 36, ..text.clone() },
        DitConfig { kind: Kind::TextOrPicture, in_channels: 48, out_channels: 48, ..text.clone() },
        DitConfig {
            kind: Kind::FunControl,
            in_channels: 48,
            image: image(None),
            control: Control { reference: Some(16), ..Control::default() },
            ..text.clone()
        },
        DitConfig {
            kind: Kind::FunCameraExpert,
            in_channels: 36,
            control: Control { camera: Some(CameraSizes { stride: 8 }), ..Control::default() },
            ..text.clone()
        },
        DitConfig { kind: Kind::FunInPlace, in_channels: 100, out_channels: 48, ..text.clone() },
        DitConfig {
            kind: Kind::FunControlInPlace,
            in_channels: 148,
            out_channels: 48,
            control: Control { reference: Some(48), ..Control::default() },
            ..text.clone()
        },
        DitConfig {
            kind: Kind::FunCameraInPlace,
            in_channels: 100,
            out_channels: 48,
            control: Control { camera: Some(CameraSizes { stride: 16 }), ..Control::default() },
            ..text.clone()
        },
        DitConfig {
            kind: Kind::Vace,
            control: Control { side_chain: SideChain::new(96, 2, layers, None).ok(), ..Control::default() },
            ..text.clone()
        },
        DitConfig {
            kind: Kind::Animate,
            in_channels: 36,
            image: image(None),
            control: Control { animate: Some(animate()), ..Control::default() },
            ..text.clone()
        },
        DitConfig {
            kind: Kind::Speech,
            control: Control {
                speech: Some(Speech { audio_width: 6, states: 4, after: vec![0] }),
                ..Control::default()
            },
            ..text.clone()
        },
        text,
    ]
}

/// Parts of Animate with one face block, for pictures of faces of 16 pixels.
pub fn animate() -> Animate {
    let motion = MotionSizes { channels: vec![6, 8, 8], style: 16, directions: 5, width: 12 };
    Animate { motion, face_width: 16, face_blocks: 1 }
}

/// Random weights for `config`: matrices that preserve the scale of activations, norms around 1, and biases and
/// modulation large enough that leaving one out shows.
pub fn weights(config: &DitConfig) -> Weights {
    Weights::from_tensors(tensors(config))
}

/// The tensors of [`weights`] by official name.
pub fn tensors(config: &DitConfig) -> BTreeMap<String, Tensor> {
    random(&config.tensors())
}

/// Random tensors of these names and shapes, as [`weights`] has them.
pub fn random(specs: &[TensorSpec]) -> BTreeMap<String, Tensor> {
    let tensor = |name: &str, shape: &[usize]| {
        let random = randn(name, shape);
        let inputs: usize = shape[1..].iter().product();
        let is_norm = name.contains("norm") && name.ends_with(".weight");
        match (is_norm, shape.len()) {
            (true, _) => ((random * 0.1).unwrap() + 1.0).unwrap(),
            (false, 1) => (random * 0.1).unwrap(),
            (false, _) if name.ends_with("modulation") => (random * 0.3).unwrap(),
            (false, _) => (random / (inputs as f64).sqrt()).unwrap(),
        }
    };
    specs.iter().map(|spec| (spec.name.clone(), tensor(&spec.name, &spec.shape))).collect()
}

/// Random weights whose head undoes the patch embedding, so that noise can pass: an adapter of a rank below the 64
/// numbers of a patch could not learn that, and no pretrained model asks it to.
pub fn open_weights(dit: &DitConfig) -> Weights {
    let mut tensors = tensors(dit);
    let patch = tensors["patch_embedding.weight"].flatten_from(1).unwrap();
    let mut columns: Vec<Vec<f32>> = patch.t().unwrap().to_vec2().unwrap();
    for i in 0..columns.len() {
        let (done, rest) = columns.split_at_mut(i);
        let column = &mut rest[0];
        for other in done.iter() {
            let along: f32 = column.iter().zip(other).map(|(a, b)| a * b).sum();
            column.iter_mut().zip(other).for_each(|(a, b)| *a -= along * b);
        }
        let length = column.iter().map(|a| a * a).sum::<f32>().sqrt();
        column.iter_mut().for_each(|a| *a /= length);
    }
    // A patch is (channel, row, column), a row of the head (row, column, channel).
    let head: Vec<f32> = (0..64).flat_map(|row| columns[row % 16 * 4 + row / 16].clone()).collect();
    let embedding: Vec<f32> = columns.concat();
    let device = device();
    let embedding = Tensor::from_vec(embedding, (64, dit.dim), &device).unwrap().t().unwrap();
    let embedding = embedding.reshape((dit.dim, 16, 1, 2, 2)).unwrap();
    tensors.insert("patch_embedding.weight".to_owned(), embedding);
    let scale = (64.0 / dit.dim as f64).sqrt();
    let head = (Tensor::from_vec(head, (64, dit.dim), &device).unwrap() * scale).unwrap();
    tensors.insert("head.head.weight".to_owned(), head);
    Weights::from_tensors(tensors)
}

/// Trainable adapters on every Linear of the blocks, both factors random, so that every gradient says something.
pub fn adapters(config: &DitConfig, rank: usize, scale: f64) -> Adapters {
    adapters_on(config.adaptable_modules(), rank, scale)
}

/// The same on `modules` (name, out, in).
pub fn adapters_on(modules: Vec<(String, usize, usize)>, rank: usize, scale: f64) -> Adapters {
    let mut adapters = Adapters::default();
    for (module, out, input) in modules {
        let a = (randn(&format!("{module}.a"), (rank, input)) / (input as f64).sqrt()).unwrap();
        let b = (randn(&format!("{module}.b"), (out, rank)) * 0.3).unwrap();
        adapters.attach(module, Adapter::trainable(Factors { a, b, scale }));
    }
    adapters
}

/// The pipeline over stages of `split` blocks each, all on the proofs' device.
pub fn pipeline(config: &DitConfig, weights: &Weights, adapters: &Adapters, split: &[usize]) -> Pipeline {
    pipeline_on(&vec![device(); split.len()], config, weights, adapters, split)
}

/// [`pipeline`] with each stage on a device of its own.
pub fn pipeline_on(
    devices: &[Device],
    config: &DitConfig,
    weights: &Weights,
    adapters: &Adapters,
    split: &[usize],
) -> Pipeline {
    let mut next = 0;
    let ranges = devices.iter().zip(split).map(|(device, &blocks)| {
        next += blocks;
        (device.clone(), next - blocks..next)
    });
    Pipeline::load(weights, config, &ranges.collect::<Vec<_>>(), adapters, Base::F32).unwrap()
}

/// A random micro-batch of `batch` samples with timesteps of their own, `rows` rows of text and uneven weights.
pub fn micro_batch(name: &str, batch: usize, rows: usize, dropout: Option<f64>) -> MicroBatch {
    let shape = (batch, 16, 2, 4, 6);
    let key = Key::new(21, name, &[]);
    let times: Vec<f32> = (0..batch as u64).map(|i| (1000.0 * key.uniform(i)) as f32).collect();
    MicroBatch {
        input: NetworkInput::new(
            randn(&format!("{name}.x"), shape),
            Tensor::new(times, &Device::Cpu).unwrap(),
            randn(&format!("{name}.text"), (batch, rows, 24)),
        ),
        target: randn(&format!("{name}.target"), shape),
        weights: (0..batch).map(|i| 0.25 + 0.5 * i as f32).collect(),
        mask: None,
        objective: Objective::default(),
        dropout: dropout
            .map(|p| Dropout { p, keys: (0..batch as u64).map(|i| key.child("dropout", i)).collect() }),
    }
}

/// The velocities of `inputs`, on the CPU.
pub fn velocities(pipeline: &Pipeline, inputs: &[NetworkInput]) -> Vec<Tensor> {
    let predicted = pipeline.predict(inputs).unwrap();
    predicted.iter().map(|velocity| velocity.to_device(&Device::Cpu).unwrap()).collect()
}

/// `plan` for every layer.
pub fn uniform(pipeline: &Pipeline, plan: BlockPlan) -> Plans {
    pipeline.layers().into_iter().map(|id| (id, plan)).collect()
}

/// The loss of each micro-batch and every gradient by name, on the CPU; `plan` is every layer's.
pub fn trained(
    pipeline: &Pipeline,
    batches: &[MicroBatch],
    plan: BlockPlan,
) -> (Vec<f32>, BTreeMap<String, Tensor>) {
    let outcome = pipeline.train(batches, &uniform(pipeline, plan)).unwrap();
    let losses = outcome.losses.iter().map(|loss| loss.to_scalar().unwrap()).collect();
    let on_cpu =
        |(name, gradient): (&str, &Tensor)| (name.to_owned(), gradient.to_device(&Device::Cpu).unwrap());
    (losses, outcome.gradients.iter().map(on_cpu).collect())
}
