//! Opens the weights of a DiT in either layout, and explains why other files are refused.

use std::path::Path;

use crate::dit::DitConfig;
use crate::dit::animate::is_blur;
use crate::weights::{Checkpoint, Weights};
use crate::{Contents, Error, Result, names, published};

/// Opens the weights at `path` (a file, or a folder of shards), in either naming, and checks every tensor's name and
/// shape. `config_json` is the text of their `config.json`; without it the sizes are those of the tensors, and
/// heads are of 128, as in every published model.
///
/// # Errors
/// If the config does not fit, or tensors are missing, unexpected or misshapen; all of them are listed.
pub fn open_dit(path: &Path, config_json: Option<&str>) -> Result<(DitConfig, Weights)> {
    let checkpoint = Checkpoint::open(path)?.without_model_prefix()?;
    let is_diffusers = checkpoint.contains("condition_embedder.time_proj.weight");
    // One layer of Animate is two in diffusers.
    let checkpoint = match is_diffusers {
        true => with_joined_rows(checkpoint)?,
        false => checkpoint,
    };
    let to_file = |official: &str| if is_diffusers { names::tensor_to_diffusers(official) } else { None };
    let shape_of = |official: &str| {
        let name = to_file(official).unwrap_or_else(|| official.to_owned());
        checkpoint.shape(&name).map(<[usize]>::to_vec)
    };
    if shape_of("patch_embedding.weight").is_none() {
        return Err(Contents::Dit.refusal(&checkpoint, "patch_embedding.weight"));
    }
    if let Some(kind) = published::refused(&checkpoint) {
        return Err(Error::Mismatch(format!(
            "{}: this is {kind}, which Tandem does not train; its adapters are often made on the plain text-to-video or \
             image-to-video model of the same size",
            path.display()
        )));
    }
    let config_json = match config_json {
        Some(text) => text.to_owned(),
        None => published_config(path, shape_of("patch_embedding.weight"))?,
    };
    let config = DitConfig::from_parts(&config_json, shape_of).map_err(|error| match error {
        Error::Mismatch(why) => Error::Mismatch(format!("{}: {why}", path.display())),
        other => other,
    })?;
    // Some files of diffusers have a norm of queries that is not used; the official Animate has constants of its network.
    let ignored = |name: &str| name.ends_with(".attn2.norm_added_q.weight") || is_blur(name);
    let weights = Weights::from_checkpoint(checkpoint, &config.tensors(), to_file, ignored)?;
    Ok((config, weights))
}

/// A checkpoint of diffusers with the official tensors that it has in parts.
fn with_joined_rows(checkpoint: Checkpoint) -> Result<Checkpoint> {
    let is_there = |n: usize| checkpoint.contains(&format!("face_adapter.{n}.to_k.weight"));
    let blocks = (0..).take_while(|n| is_there(*n)).count();
    names::joined_from_diffusers(blocks)
        .try_fold(checkpoint, |checkpoint, (name, parts)| Ok(checkpoint.joining(name, &parts)?))
}

/// Width of a head in every published model.
const PUBLISHED_HEAD: usize = 128;

/// The `config.json` of a published model, from the shape of the patch embedding.
fn published_config(path: &Path, patch: Option<Vec<usize>>) -> Result<String> {
    match patch.and_then(|shape| shape.first().copied()) {
        Some(dim) if !dim.is_multiple_of(PUBLISHED_HEAD) => Err(Error::Mismatch(format!(
            "{}: a DiT of width {dim} is no published model, so only its config.json has the number of heads; put it \
             beside the weights, or name it with model.dit_config",
            path.display()
        ))),
        // A file without a DiT is refused for the missing tensors.
        dim => Ok(format!(r#"{{"num_heads":{}}}"#, dim.unwrap_or(PUBLISHED_HEAD) / PUBLISHED_HEAD)),
    }
}
