//! Tokens and states of prompts.

use std::path::Path;

use kernels::{Device, Tensor};
use models::text::TextEncoder;

use super::Outputs;
use crate::error::{Error, Result};

/// The prompts in a JSON list of strings.
///
/// # Errors
/// When the file cannot be read or holds anything else.
pub fn read_prompts(path: &Path) -> Result<Vec<String>> {
    let text = std::fs::read(path).map_err(|source| Error::Io {
        action: "read the prompts",
        path: path.to_owned(),
        source,
    })?;
    serde_json::from_slice(&text).map_err(|error| Error::ProbeInput {
        path: path.to_owned(),
        why: format!("a JSON list of strings is expected: {error}"),
    })
}

/// `ids.N` `[length]` i64 and `context.N` `[length, width]` f32 of each prompt, real rows only.
///
/// # Errors
/// A tokenizer that belongs to another encoder.
pub fn encode(encoder: &TextEncoder, prompts: &[String]) -> Result<Outputs> {
    let mut outputs = Outputs::new();
    for (n, prompt) in prompts.iter().enumerate() {
        let ids = encoder.ids(prompt)?;
        outputs.insert(format!("context.{n}"), encoder.encode(&ids)?.to_dtype(kernels::DType::F32)?);
        let ids: Vec<i64> = ids.into_iter().map(i64::from).collect();
        outputs.insert(format!("ids.{n}"), Tensor::new(ids, &Device::Cpu)?);
    }
    Ok(outputs)
}
