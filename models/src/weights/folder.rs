//! A folder as a checkpoint: a single safetensors file, or shards named by an index.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::checkpoint::Checkpoint;
use super::error::{Result, WeightsError};

const INDEX: &str = ".safetensors.index.json";

/// `*.safetensors.index.json`: other keys (`metadata.total_size`) are remarks, often wrong, and not used.
#[derive(Deserialize)]
struct Index {
    /// Tensor name to file name in the same folder.
    weight_map: BTreeMap<String, String>,
}

/// Opens the one checkpoint in the folder `path`.
pub(super) fn open(path: &Path) -> Result<Checkpoint> {
    let names = file_names(path)?;
    let indices: Vec<_> = names.iter().filter(|n| n.ends_with(INDEX)).collect();
    let tensors: Vec<_> = names.iter().filter(|n| n.ends_with(".safetensors")).collect();
    match (indices.as_slice(), tensors.as_slice()) {
        ([index], _) => open_sharded(path, index),
        ([], [one]) if !is_shard(one) => Checkpoint::from_shards(path, vec![path.join(one)]),
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

fn open_sharded(path: &Path, index_name: &str) -> Result<Checkpoint> {
    let index_path = path.join(index_name);
    let text = std::fs::read(&index_path).map_err(WeightsError::io("read", &index_path))?;
    let index: Index = serde_json::from_slice(&text).map_err(|e| {
        WeightsError::file(&index_path, format!("this index is not valid ({e}); fetch it again"))
    })?;
    let shards = shard_paths(path, &index_path, &index)?;
    let checkpoint = Checkpoint::from_shards(path, shards)?;
    check_places(&checkpoint, &index_path, &index)?;
    Ok(checkpoint)
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

/// Every tensor of the index lies in the shard that the index names.
fn check_places(checkpoint: &Checkpoint, index_path: &Path, index: &Index) -> Result<()> {
    let files = checkpoint.files();
    let place: BTreeMap<&str, &Path> =
        checkpoint.entries().map(|(n, e)| (n, files[e.file].as_path())).collect();
    let lost: Vec<_> = index
        .weight_map
        .iter()
        .filter(|(name, shard)| place.get(name.as_str()).and_then(|p| p.file_name()) != Some(shard.as_ref()))
        .collect();
    let Some((name, shard)) = lost.first() else { return Ok(()) };
    let reason = format!(
        "{} tensors are not in the shard that this index names, the first is `{name}` in {shard}; \
         index and shards are of different checkpoints, fetch both again",
        lost.len()
    );
    Err(WeightsError::file(index_path, reason))
}
