//! One part of the program run on tensors from a file, so that anyone can compare it with another implementation.
//!
//! Every probe runs the code that trains and samples. Tensors are read and written as safetensors.

pub mod audio;
pub mod clip;
pub mod condition;
mod inputs;
pub mod loss;
pub mod optimizer;
pub mod sample;
pub mod schedule;
pub mod solver;
pub mod text;
pub mod timesteps;
pub mod train;

use std::collections::BTreeMap;
use std::path::Path;

use kernels::{DType, Tensor};
use models::dit::Role;
use models::dit::speech::PAST;

pub use inputs::Inputs;

use crate::error::{Error, Result};
use crate::pipeline::{NetworkInput, Pipeline};

/// Whether S2V is shown the frames before the clip.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Past {
    /// `motion_latents`, where there are some.
    Shown,
    /// As in the first of several clips.
    LeftOut,
}

/// Tensors by name.
pub type Outputs = BTreeMap<String, Tensor>;

/// The network's answer: `output` [b, c, t, h, w] for `input` [b, c, t, h, w], `timestep` `[b]` or [b, l], `context`
/// [b, s, text_dim], and where the model reads them `clip_fea` [b, s, image_dim], `ref_latent` [b, c, h, w], `camera`
/// [b, 24, t, 8h, 8w], `vace_context` [b, 96, t, h, w], `pose_latents` [b, c, t-1, h, w] (S2V: t frames) and `face_pixel_values`,
/// `audio_embeds` [b, 25, width, 4t], `motion_latents` [b, c, 19, h, w].
///
/// # Errors
/// Missing tensors, and shapes that the network does not take.
pub fn dit(pipeline: &Pipeline, inputs: &Inputs, past: Past) -> Result<Outputs> {
    let (x_bcthw, timestep) = (inputs.ranked("input", 5)?, inputs.float("timestep")?);
    let mut input = NetworkInput { x_bcthw, cond: inputs.conditioning()?.with(Role::TIMESTEP, timestep) };
    if past == Past::LeftOut {
        input.cond.take(PAST);
    }
    let velocity = pipeline.predict(&[input])?.remove(0);
    Ok(Outputs::from([("output".to_owned(), velocity.to_dtype(DType::F32)?)]))
}

/// The JSON file at `path`, which holds `what`.
fn cases<T: serde::de::DeserializeOwned>(path: &Path, what: &str) -> Result<T> {
    let io = |source| Error::Io { action: "read the cases", path: path.to_owned(), source };
    let text = std::fs::read(path).map_err(io)?;
    let refuse = |error| Error::ProbeInput { path: path.to_owned(), why: format!("not {what}: {error}") };
    serde_json::from_slice(&text).map_err(refuse)
}

/// Writes the outputs of a probe as a safetensors file.
///
/// # Errors
/// If the file cannot be written; no partial file is left.
pub fn write(path: &Path, outputs: &Outputs) -> Result<()> {
    let named = outputs.iter().map(|(name, tensor)| (name.as_str(), tensor));
    Ok(models::weights::write_safetensors(path, named, &BTreeMap::new())?)
}
