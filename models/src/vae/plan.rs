//! The arrangement of the VAEs as data: one list of stages from which both the expected tensors and the network follow.
//!
//! Names are official. Source: Wan-Video/Wan2.1 `wan/modules/vae.py`, Wan-Video/Wan2.2 `wan/modules/vae2_2.py`.

use crate::weights::TensorSpec;

use super::sizes::{Generation, Sizes};

/// Width of each level, in units of the base width.
const WIDTHS: [usize; 4] = [1, 2, 4, 4];

/// Residual blocks in a level of the encoder and of the decoder.
const ENCODER_BLOCKS: usize = 2;
const DECODER_BLOCKS: usize = 3;

/// Whether a resampling step changes the number of frames too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reach {
    Space,
    SpaceAndTime,
}

const DOWN: [Reach; 3] = [Reach::Space, Reach::SpaceAndTime, Reach::SpaceAndTime];
const UP: [Reach; 3] = [Reach::SpaceAndTime, Reach::SpaceAndTime, Reach::Space];

/// A part of the network, with the name of its module and its channels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum PartPlan {
    Conv { name: String, from: usize, to: usize, kernel: usize },
    Norm { name: String, channels: usize },
    Silu,
    Residual { name: String, from: usize, to: usize },
    Attention { name: String, channels: usize },
    Down { name: String, channels: usize, reach: Reach },
    Up { name: String, from: usize, to: usize, reach: Reach },
}

/// A way around a stage that has no weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shortcut {
    None,
    /// Means of cells of `time` x `space` x `space`.
    AverageDown {
        to: usize,
        time: usize,
        space: usize,
    },
    /// Copies into cells of `time` x `space` x `space`.
    DuplicateUp {
        to: usize,
        time: usize,
        space: usize,
    },
}

/// Parts that run in sequence, with a shortcut around all of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct StagePlan {
    /// The diffusers name of the stage: what a probe sees.
    pub label: String,
    pub parts: Vec<PartPlan>,
    pub shortcut: Shortcut,
}

impl StagePlan {
    fn one(label: String, part: PartPlan) -> Self {
        Self { label, parts: vec![part], shortcut: Shortcut::None }
    }
}

/// The convolutions between network and latents: official `conv1` after the encoder, `conv2` before the decoder.
pub(super) fn latent_convs(sizes: &Sizes) -> [PartPlan; 2] {
    let conv = |name: &str, n| PartPlan::Conv { name: name.to_owned(), from: n, to: n, kernel: 1 };
    [conv("conv1", 2 * sizes.latent), conv("conv2", sizes.latent)]
}

/// The stages of the encoder: pixels to means and log-variances.
pub(super) fn encoder(sizes: &Sizes) -> Vec<StagePlan> {
    let base = sizes.encoder;
    let conv_in = PartPlan::Conv {
        name: "encoder.conv1".to_owned(),
        from: sizes.pixel_channels(),
        to: base,
        kernel: 3,
    };
    let mut stages = vec![StagePlan::one("encoder.conv_in".to_owned(), conv_in)];
    let mut from = base;
    for (level, width) in WIDTHS.into_iter().enumerate() {
        let to = base * width;
        let parts = encoder_level(sizes, level, from, to);
        match sizes.generation {
            Generation::Wan21 => {
                for part in parts {
                    // `conv_in` is the one stage before them.
                    let label = format!("encoder.down_blocks.{}", stages.len() - 1);
                    stages.push(StagePlan::one(label, part));
                }
            }
            Generation::Wan22 => {
                let time = if DOWN.get(level) == Some(&Reach::SpaceAndTime) { 2 } else { 1 };
                let space = if level < DOWN.len() { 2 } else { 1 };
                let shortcut = Shortcut::AverageDown { to, time, space };
                stages.push(StagePlan { label: format!("encoder.down_blocks.{level}"), parts, shortcut });
            }
        }
        from = to;
    }
    stages.extend(middle("encoder", from));
    stages.extend(head("encoder", from, 2 * sizes.latent));
    stages
}

fn encoder_level(sizes: &Sizes, level: usize, from: usize, to: usize) -> Vec<PartPlan> {
    let name = |j: usize| match sizes.generation {
        Generation::Wan21 => format!("encoder.downsamples.{}", level * (ENCODER_BLOCKS + 1) + j),
        Generation::Wan22 => format!("encoder.downsamples.{level}.downsamples.{j}"),
    };
    let residual = |j: usize| PartPlan::Residual { name: name(j), from: if j == 0 { from } else { to }, to };
    let mut parts: Vec<_> = (0..ENCODER_BLOCKS).map(residual).collect();
    if let Some(reach) = DOWN.get(level) {
        parts.push(PartPlan::Down { name: name(ENCODER_BLOCKS), channels: to, reach: *reach });
    }
    parts
}

/// The stages of the decoder: latents to pixels.
pub(super) fn decoder(sizes: &Sizes) -> Vec<StagePlan> {
    let base = sizes.decoder;
    let widest = base * WIDTHS[WIDTHS.len() - 1];
    let conv_in =
        PartPlan::Conv { name: "decoder.conv1".to_owned(), from: sizes.latent, to: widest, kernel: 3 };
    let mut stages = vec![StagePlan::one("decoder.conv_in".to_owned(), conv_in)];
    stages.extend(middle("decoder", widest));
    let mut from = widest;
    for (level, width) in WIDTHS.into_iter().rev().enumerate() {
        let to = base * width;
        let (parts, out) = decoder_level(sizes, level, from, to);
        let shortcut = match (sizes.generation, UP.get(level)) {
            (Generation::Wan22, Some(Reach::SpaceAndTime)) => Shortcut::DuplicateUp { to, time: 2, space: 2 },
            (Generation::Wan22, Some(Reach::Space)) => Shortcut::DuplicateUp { to, time: 1, space: 2 },
            _ => Shortcut::None,
        };
        stages.push(StagePlan { label: format!("decoder.up_blocks.{level}"), parts, shortcut });
        from = out;
    }
    stages.extend(head("decoder", base, sizes.pixel_channels()));
    stages
}

/// The parts of a level, and its output channels.
fn decoder_level(sizes: &Sizes, level: usize, from: usize, to: usize) -> (Vec<PartPlan>, usize) {
    let name = |j: usize| match sizes.generation {
        Generation::Wan21 => format!("decoder.upsamples.{}", level * (DECODER_BLOCKS + 1) + j),
        Generation::Wan22 => format!("decoder.upsamples.{level}.upsamples.{j}"),
    };
    let residual = |j: usize| PartPlan::Residual { name: name(j), from: if j == 0 { from } else { to }, to };
    let mut parts: Vec<_> = (0..DECODER_BLOCKS).map(residual).collect();
    let Some(reach) = UP.get(level) else { return (parts, to) };
    let out = match sizes.generation {
        Generation::Wan21 => to / 2,
        Generation::Wan22 => to,
    };
    parts.push(PartPlan::Up { name: name(DECODER_BLOCKS), from: to, to: out, reach: *reach });
    (parts, out)
}

fn middle(side: &str, channels: usize) -> [StagePlan; 3] {
    let residual =
        |i: usize| PartPlan::Residual { name: format!("{side}.middle.{i}"), from: channels, to: channels };
    let attention = PartPlan::Attention { name: format!("{side}.middle.1"), channels };
    [
        StagePlan::one(format!("{side}.mid_block.resnets.0"), residual(0)),
        StagePlan::one(format!("{side}.mid_block.attentions.0"), attention),
        // The output of the middle's last block is that of the middle.
        StagePlan::one(format!("{side}.mid_block"), residual(2)),
    ]
}

fn head(side: &str, from: usize, to: usize) -> [StagePlan; 2] {
    let norm = PartPlan::Norm { name: format!("{side}.head.0"), channels: from };
    let conv = PartPlan::Conv { name: format!("{side}.head.2"), from, to, kernel: 3 };
    let parts = vec![PartPlan::Silu, conv];
    [
        StagePlan::one(format!("{side}.norm_out"), norm),
        StagePlan { label: format!("{side}.conv_out"), parts, shortcut: Shortcut::None },
    ]
}

/// Every tensor of a VAE, by official name.
pub(super) fn specs(sizes: &Sizes) -> Vec<TensorSpec> {
    let stages = encoder(sizes).into_iter().chain(decoder(sizes));
    let parts = stages.flat_map(|s| s.parts).chain(latent_convs(sizes));
    parts.flat_map(|part| part.specs()).collect()
}

impl PartPlan {
    /// The tensors of this part.
    fn specs(&self) -> Vec<TensorSpec> {
        match self {
            Self::Silu => vec![],
            Self::Conv { name, from, to, kernel: k } => conv(name, &[*to, *from, *k, *k, *k]),
            Self::Norm { name, channels } => vec![gamma(name, &[*channels, 1, 1, 1])],
            Self::Residual { name, from, to } => residual(name, *from, *to),
            Self::Attention { name, channels: c } => {
                let mut specs = vec![gamma(&format!("{name}.norm"), &[*c, 1, 1])];
                specs.extend(conv(&format!("{name}.to_qkv"), &[3 * c, *c, 1, 1]));
                specs.extend(conv(&format!("{name}.proj"), &[*c, *c, 1, 1]));
                specs
            }
            Self::Down { name, channels, reach } => resample(name, *channels, *channels, *channels, *reach),
            Self::Up { name, from, to, reach } => resample(name, *from, *to, 2 * from, *reach),
        }
    }
}

fn conv(name: &str, shape: &[usize]) -> Vec<TensorSpec> {
    vec![
        TensorSpec::new(format!("{name}.weight"), shape),
        TensorSpec::new(format!("{name}.bias"), [shape[0]]),
    ]
}

fn gamma(name: &str, shape: &[usize]) -> TensorSpec {
    TensorSpec::new(format!("{name}.gamma"), shape)
}

fn residual(name: &str, from: usize, to: usize) -> Vec<TensorSpec> {
    let mut specs = vec![gamma(&format!("{name}.residual.0"), &[from, 1, 1, 1])];
    specs.extend(conv(&format!("{name}.residual.2"), &[to, from, 3, 3, 3]));
    specs.push(gamma(&format!("{name}.residual.3"), &[to, 1, 1, 1]));
    specs.extend(conv(&format!("{name}.residual.6"), &[to, to, 3, 3, 3]));
    if from != to {
        specs.extend(conv(&format!("{name}.shortcut"), &[to, from, 1, 1, 1]));
    }
    specs
}

fn resample(name: &str, from: usize, to: usize, time_to: usize, reach: Reach) -> Vec<TensorSpec> {
    let mut specs = conv(&format!("{name}.resample.1"), &[to, from, 3, 3]);
    if reach == Reach::SpaceAndTime {
        specs.extend(conv(&format!("{name}.time_conv"), &[time_to, from, 3, 1, 1]));
    }
    specs
}
