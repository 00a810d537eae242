//! The sizes of a speech encoder, and the names of its tensors.

use std::path::Path;

use serde::Deserialize;

use crate::weights::{Checkpoint, TensorClass, TensorSpec, Weights};
use crate::{Error, Result};

/// The kernel of the positions' convolution, as its direction and its length at each tap.
pub(super) const DIRECTION: &str = "encoder.pos_conv_embed.conv.weight_v";
pub(super) const LENGTH: &str = "encoder.pos_conv_embed.conv.weight_g";
/// The same in files of newer versions of PyTorch.
const NEW_NAMES: [(&str, &str); 2] = [
    (DIRECTION, "encoder.pos_conv_embed.conv.parametrizations.weight.original1"),
    (LENGTH, "encoder.pos_conv_embed.conv.parametrizations.weight.original0"),
];
/// The prefix of all names in files.
const PREFIX: &str = "wav2vec2.";
/// Steps of the convolutions, in samples and then in what the one before makes.
const STRIDES: [usize; 7] = [5, 2, 2, 2, 2, 2, 2];
/// Width of a head, where no config names their number.
const HEAD: usize = 64;

/// The sizes of a speech encoder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpeechSizes {
    /// (channels, taps, stride) of each convolution.
    pub convolutions: Vec<(usize, usize, usize)>,
    /// Width of a state.
    pub width: usize,
    /// Width of the feed-forward layers.
    pub inner: usize,
    /// Layers.
    pub layers: usize,
    /// Heads.
    pub heads: usize,
    /// Taps of the positions' convolution.
    pub taps: usize,
    /// Its groups of channels.
    pub groups: usize,
}

/// The keys of `config.json` that tensors do not show; none of them in that of another model, which may lie beside the file.
#[derive(Deserialize)]
struct ConfigFile {
    #[serde(default)]
    num_attention_heads: Option<usize>,
    #[serde(default)]
    conv_stride: Option<Vec<usize>>,
    #[serde(default)]
    do_stable_layer_norm: Option<bool>,
}

impl SpeechSizes {
    /// Those of wav2vec2-large-xlsr-53.
    pub fn published() -> Self {
        let taps = [10, 3, 3, 3, 3, 2, 2];
        Self {
            convolutions: taps.into_iter().zip(STRIDES).map(|(taps, stride)| (512, taps, stride)).collect(),
            width: 1024,
            inner: 4096,
            layers: 24,
            heads: 16,
            taps: 128,
            groups: 16,
        }
    }

    /// Samples that the first state is made of.
    pub fn samples_of_one_state(&self) -> usize {
        self.convolutions.iter().rev().fold(1, |count, &(_, taps, stride)| (count - 1) * stride + taps)
    }

    /// Its tensors, named without the prefix of files.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let mut all = Vec::new();
        let mut add = |name: String, shape: Vec<usize>| {
            all.push(TensorSpec::new(name, shape).of(TensorClass::Full));
        };
        let mut from = 1;
        for (n, &(channels, taps, _)) in self.convolutions.iter().enumerate() {
            let name = format!("feature_extractor.conv_layers.{n}");
            add(format!("{name}.conv.weight"), vec![channels, from, taps]);
            for vector in ["conv.bias", "layer_norm.weight", "layer_norm.bias"] {
                add(format!("{name}.{vector}"), vec![channels]);
            }
            from = channels;
        }
        let (width, inner) = (self.width, self.inner);
        for end in ["weight", "bias"] {
            add(format!("feature_projection.layer_norm.{end}"), vec![from]);
            add(format!("encoder.layer_norm.{end}"), vec![width]);
        }
        add("feature_projection.projection.weight".into(), vec![width, from]);
        add("feature_projection.projection.bias".into(), vec![width]);
        add(DIRECTION.into(), vec![width, width / self.groups, self.taps]);
        add(LENGTH.into(), vec![1, 1, self.taps]);
        add("encoder.pos_conv_embed.conv.bias".into(), vec![width]);
        for n in 0..self.layers {
            let name = |part: &str| format!("encoder.layers.{n}.{part}");
            for (part, out, input) in [
                ("attention.q_proj", width, width),
                ("attention.k_proj", width, width),
                ("attention.v_proj", width, width),
                ("attention.out_proj", width, width),
                ("feed_forward.intermediate_dense", inner, width),
                ("feed_forward.output_dense", width, inner),
            ] {
                add(format!("{}.weight", name(part)), vec![out, input]);
                add(format!("{}.bias", name(part)), vec![out]);
            }
            for norm in ["layer_norm", "final_layer_norm"] {
                add(format!("{}.weight", name(norm)), vec![width]);
                add(format!("{}.bias", name(norm)), vec![width]);
            }
        }
        all
    }
}

/// The name in `checkpoint` of a tensor of the encoder.
fn in_file(checkpoint: &Checkpoint, name: &str) -> String {
    let other = NEW_NAMES.iter().find(|(old, _)| *old == name).map(|(_, new)| format!("{PREFIX}{new}"));
    other.filter(|new| checkpoint.contains(new)).unwrap_or_else(|| format!("{PREFIX}{name}"))
}

/// The sizes and the weights of the encoder at `path`.
pub(super) fn open(path: &Path, config: Option<&Path>) -> Result<(SpeechSizes, Weights)> {
    let checkpoint = Checkpoint::open(path)?;
    let beside = if path.is_dir() { path.join("config.json") } else { path.with_file_name("config.json") };
    let config = config.or_else(|| beside.is_file().then_some(&beside));
    let config = config.map(read_config).transpose()?;
    let refuse = |why: &str| Error::Mismatch(format!("{}: {why}", path.display()));
    if config.as_ref().is_some_and(|config| config.do_stable_layer_norm == Some(false)) {
        return Err(refuse(
            "this wav2vec has its norms behind its layers; S2V hears by wav2vec2-large-xlsr-53",
        ));
    }
    let sizes = detect(&checkpoint, config.as_ref()).ok_or_else(|| {
        refuse("this is no wav2vec 2.0 with norms in front; give model.safetensors of wav2vec2-large-xlsr-53-english")
    })?;
    if sizes.heads == 0 || !sizes.width.is_multiple_of(sizes.heads) {
        return Err(refuse(&format!("{} heads do not divide its width {}", sizes.heads, sizes.width)));
    }
    let names: std::collections::BTreeMap<String, String> = sizes
        .tensors()
        .into_iter()
        .map(|spec| (spec.name.clone(), in_file(&checkpoint, &spec.name)))
        .collect();
    // The head for letters and the mask of pre-training are not read.
    let ignored = |name: &str| name.starts_with("lm_head.") || name.ends_with("masked_spec_embed");
    let weights =
        Weights::from_checkpoint(checkpoint, &sizes.tensors(), |name| names.get(name).cloned(), ignored)?;
    Ok((sizes, weights))
}

fn read_config(path: &Path) -> Result<ConfigFile> {
    let refuse = |why: String| Error::Mismatch(format!("{}: {why}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|error| refuse(error.to_string()))?;
    serde_json::from_str(&text).map_err(|error| refuse(error.to_string()))
}

fn detect(checkpoint: &Checkpoint, config: Option<&ConfigFile>) -> Option<SpeechSizes> {
    let axis = |name: &str, axis: usize| {
        checkpoint.shape(&in_file(checkpoint, name)).and_then(|shape| shape.get(axis).copied())
    };
    let strides = config.and_then(|config| config.conv_stride.clone()).unwrap_or_else(|| STRIDES.to_vec());
    let convolution = |(n, stride): (usize, usize)| {
        let name = format!("feature_extractor.conv_layers.{n}.conv.weight");
        Some((axis(&name, 0)?, axis(&name, 2)?, stride))
    };
    // Norms of all convolutions' channels are what the other form lacks.
    axis("feature_extractor.conv_layers.1.layer_norm.weight", 0)?;
    let width = axis("feature_projection.projection.weight", 0)?;
    let of_group = axis(DIRECTION, 1).filter(|of_group| *of_group > 0)?;
    let layers = (0..).take_while(|n| axis(&format!("encoder.layers.{n}.layer_norm.weight"), 0).is_some());
    Some(SpeechSizes {
        convolutions: strides.into_iter().enumerate().map(convolution).collect::<Option<_>>()?,
        width,
        inner: axis("encoder.layers.0.feed_forward.intermediate_dense.weight", 0)?,
        layers: layers.count(),
        heads: config.and_then(|config| config.num_attention_heads).unwrap_or(width / HEAD),
        taps: axis(DIRECTION, 2)?,
        groups: width / of_group,
    })
}
