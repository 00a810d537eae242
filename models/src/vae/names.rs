//! The diffusers names of the VAE's tensors.
//!
//! Source: diffusers `autoencoder_kl_wan.py` and its checkpoint converter.

use super::sizes::Generation;

/// Modules outside the levels: (official, diffusers).
const MODULES: &[(&str, &str)] = &[
    ("encoder.conv1", "encoder.conv_in"),
    ("decoder.conv1", "decoder.conv_in"),
    ("encoder.middle.0", "encoder.mid_block.resnets.0"),
    ("encoder.middle.1", "encoder.mid_block.attentions.0"),
    ("encoder.middle.2", "encoder.mid_block.resnets.1"),
    ("decoder.middle.0", "decoder.mid_block.resnets.0"),
    ("decoder.middle.1", "decoder.mid_block.attentions.0"),
    ("decoder.middle.2", "decoder.mid_block.resnets.1"),
    ("encoder.head.0", "encoder.norm_out"),
    ("encoder.head.2", "encoder.conv_out"),
    ("decoder.head.0", "decoder.norm_out"),
    ("decoder.head.2", "decoder.conv_out"),
    ("conv1", "quant_conv"),
    ("conv2", "post_quant_conv"),
];

/// The tail of a residual block: (official, diffusers). Tails of attention and resampling are the same in both.
const RESIDUAL: &[(&str, &str)] = &[
    ("residual.0.", "norm1."),
    ("residual.2.", "conv1."),
    ("residual.3.", "norm2."),
    ("residual.6.", "conv2."),
    ("shortcut.", "conv_shortcut."),
];

/// The diffusers name of an official tensor name.
pub(super) fn to_diffusers(official: &str, generation: Generation) -> Option<String> {
    let module = MODULES.iter().find_map(|(from, to)| {
        official
            .strip_prefix(from)
            .and_then(|tail| tail.strip_prefix('.'))
            .map(|tail| ((*to).to_owned(), tail))
    });
    let (module, tail) = match module {
        Some(found) => found,
        None => level(official, generation)?,
    };
    let tail = RESIDUAL
        .iter()
        .find_map(|(from, to)| tail.strip_prefix(from).map(|rest| format!("{to}{rest}")))
        .unwrap_or_else(|| tail.to_owned());
    Some(format!("{module}.{tail}"))
}

/// The diffusers module of a tensor inside the levels, and what follows it.
fn level(official: &str, generation: Generation) -> Option<(String, &str)> {
    let (encoder, rest) = match official.strip_prefix("encoder.downsamples.") {
        Some(rest) => (true, rest),
        None => (false, official.strip_prefix("decoder.upsamples.")?),
    };
    let (index, rest) = rest.split_once('.')?;
    let index: usize = index.parse().ok()?;
    if let (Generation::Wan21, true) = (generation, encoder) {
        return Some((format!("encoder.down_blocks.{index}"), rest));
    }
    let (block, j, tail) = match generation {
        Generation::Wan21 => (index / 4, index % 4, rest),
        Generation::Wan22 => {
            let rest = rest.strip_prefix(if encoder { "downsamples." } else { "upsamples." })?;
            let (j, tail) = rest.split_once('.')?;
            (index, j.parse().ok()?, tail)
        }
    };
    let is_resample = tail.starts_with("resample.") || tail.starts_with("time_conv.");
    let module = match (encoder, is_resample, generation) {
        (true, false, _) => format!("encoder.down_blocks.{block}.resnets.{j}"),
        (true, true, _) => format!("encoder.down_blocks.{block}.downsampler"),
        (false, false, _) => format!("decoder.up_blocks.{block}.resnets.{j}"),
        (false, true, Generation::Wan21) => format!("decoder.up_blocks.{block}.upsamplers.0"),
        (false, true, Generation::Wan22) => format!("decoder.up_blocks.{block}.upsampler"),
    };
    Some((module, tail))
}
