//! A folder as a checkpoint: a single safetensors file, or shards named by an index.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::error::{Result, WeightsError};

const INDEX: &str = ".safetensors.index.json";

/// `*.safetensors.index.json`: other keys (`metadata.total_size`) are remarks, often wrong, and not used.
#[derive(Deserialize)]
struct Index {
    /// Tensor name to file name in the same folder.
    weight_map: BTreeMap<String, String>,
}

/// The files of the one checkpoint in a folder.
pub(super) struct Shards {
    /// A single file, or all that the index names.
    pub paths: Vec<PathBuf>,
    /// The index, and where it is.
    index: Option<(PathBuf, Index)>,
}

/// Finds the one checkpoint in the folder `path`.
pub(super) fn find(path: &Path) -> Result<Shards> {
    let names = file_names(path)?;
    let indices: Vec<_> = names.iter().filter(|n| n.ends_with(INDEX)).collect();
    let tensors: Vec<_> = names.iter().filter(|n| n.ends_with(".safetensors")).collect();
    match (indices.as_slice(), tensors.as_slice()) {
        ([index], _) => indexed(path, index),
        ([], [one]) if !is_shard(one) => Ok(Shards { paths: vec![path.join(one)], index: None }),
        ([], []) => {
            Err(WeightsError::file(path, "no .safetensors file in this folder; name the weights file itself"))
        }
        ([], many) if many.iter().any(|n| is_shard(n)) => {
            Err(WeightsError::file(path, format!("shards without their *{INDEX}; fetch the index too")))
        }
        ([], many) => Err(WeightsError::file(path, format!("which of {}? Name the file itself", list(many)))),
        (several, _) => Err(WeightsError::file(path, format!("which of {}? Keep one", list(several)))),
    }
}

fn list(names: &[&String]) -> String {
    names.iter().map(|n| n.as_str()).collect::<Vec<_>>().join(", ")
}

/// `...-00002-of-00006.safetensors`.
fn is_shard(name: &str) -> bool {
    let digits = |s: &str| s.len() == 5 && s.bytes().all(|b| b.is_ascii_digit());
    let stem = name.trim_end_matches(".safetensors");
    stem.rsplit_once("-of-")
        .is_some_and(|(head, last)| digits(last) && head.rsplit('-').next().is_some_and(digits))
}

fn file_names(path: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for item in std::fs::read_dir(path).map_err(WeightsError::io("read", path))? {
        let item = item.map_err(WeightsError::io("read", path))?;
        if let Some(name) = item.file_name().to_str().filter(|n| !n.starts_with('.')) {
            names.push(name.to_owned());
        }
    }
    names.sort();
    Ok(names)
}

fn indexed(path: &Path, index_name: &str) -> Result<Shards> {
    let index_path = path.join(index_name);
    let text = std::fs::read(&index_path).map_err(WeightsError::io("read", &index_path))?;
    let index: Index = serde_json::from_slice(&text).map_err(|e| {
        WeightsError::file(&index_path, format!("this index is not valid ({e}); fetch it again"))
    })?;
    Ok(Shards { paths: shard_paths(path, &index_path, &index)?, index: Some((index_path, index)) })
}

fn shard_paths(path: &Path, index_path: &Path, index: &Index) -> Result<Vec<PathBuf>> {
    let names: BTreeSet<&String> = index.weight_map.values().collect();
    if let Some(name) = names.iter().find(|n| Path::new(n).file_name().is_none_or(|f| f != n.as_str())) {
        return Err(WeightsError::file(
            index_path,
            format!("`{name}` is not the name of a file in this folder"),
        ));
    }
    let missing: Vec<&String> = names.iter().copied().filter(|n| !path.join(n).is_file()).collect();
    if !missing.is_empty() {
        let reason = format!(
            "{} of {} shards are missing: {}; fetch them",
            missing.len(),
            names.len(),
            list(&missing)
        );
        return Err(WeightsError::file(path, reason));
    }
    Ok(names.into_iter().map(|n| path.join(n)).collect())
}

impl Shards {
    /// Checks that every tensor of the index is in the shard that the index names; `file_of` gives the file of a tensor.
    pub fn check<'a>(&self, file_of: impl Fn(&str) -> Option<&'a Path>) -> Result<()> {
        let Some((index_path, index)) = &self.index else { return Ok(()) };
        let is_lost = |(name, shard): &(&String, &String)| {
            file_of(name).and_then(Path::file_name) != Some(shard.as_str().as_ref())
        };
        let lost: Vec<_> = index.weight_map.iter().filter(is_lost).collect();
        let Some((name, shard)) = lost.first() else { return Ok(()) };
        let reason = format!(
            "{} tensors are not in the shard that this index names, the first is `{name}` in {shard}; \
             index and shards are of different checkpoints, fetch both again",
            lost.len()
        );
        Err(WeightsError::file(index_path, reason))
    }
}
