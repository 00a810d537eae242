//! Tar files of clips (WebDataset's shards): each is unpacked once into the cache's folder and read as a folder of its name.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::BufReader;
use std::path::{Component, Path, PathBuf};

use crate::cache::Cache;
use crate::config::DataConfig;
use crate::error::{DataError, Result};
use crate::glob;
use crate::hashes::ContentHashes;
use crate::media::Media;

/// The extension of shards.
const EXTENSION: &str = "tar";

/// Puts the folders that shards were unpacked into in their place in `config`. `cache` is the folder of the cache.
///
/// # Errors
/// Shards that are not there, that are damaged, or that would write outside of their folder; no cache to unpack them into.
pub(crate) fn unpacked(mut config: DataConfig, cache: Option<&Path>) -> Result<DataConfig> {
    let is_shard =
        |path: &Path| path.extension().is_some_and(|extension| extension == EXTENSION) && !path.is_dir();
    if !config.folder.iter().any(|folder| is_shard(folder)) {
        return Ok(config);
    }
    let Some(cache) = cache else {
        let reason = "has tar files, which are unpacked into the cache of a recipe: name them in a recipe";
        return Err(DataError::Config { key: "folder", reason: reason.into() });
    };
    let cache = Cache::open(cache)?;
    let mut hashes = ContentHashes::open(&cache);
    let mut folders = Vec::new();
    for folder in std::mem::take(&mut config.folder) {
        if !is_shard(&folder) {
            folders.push(folder);
            continue;
        }
        for shard in matching(&folder)? {
            let hash = hashes.of(&Media::Video(shard.clone()))?;
            let to = cache.folder().join("shards").join(hash);
            if !to.is_dir() {
                unpack(&shard, &to)?;
            }
            config.folder_names.insert(to.clone(), name_of(&shard));
            folders.push(to);
        }
    }
    // A cache that takes no files only costs time: shards are hashed again at the next start.
    let _ = hashes.save();
    check_names(&config.folder_names)?;
    config.folder = folders;
    Ok(config)
}

/// The name of the folder that a shard is read as.
fn name_of(shard: &Path) -> String {
    shard.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

/// Clips of two shards of one name could not be told apart.
fn check_names(names: &BTreeMap<PathBuf, String>) -> Result<()> {
    let mut known: Vec<&String> = names.values().collect();
    known.sort();
    match known.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => {
            let reason = format!("has two tar files called {}: rename one of them", pair[0]);
            Err(DataError::Config { key: "folder", reason })
        }
        None => Ok(()),
    }
}

/// The shards that `pattern`, a path whose last part may have stars, names.
fn matching(pattern: &Path) -> Result<Vec<PathBuf>> {
    let name = pattern.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let missing = || {
        let reason = format!("there is no tar file {}", pattern.display());
        DataError::Config { key: "folder", reason }
    };
    if !name.contains(['*', '?']) {
        return if pattern.is_file() { Ok(vec![pattern.to_owned()]) } else { Err(missing()) };
    }
    let folder = pattern.parent().unwrap_or(Path::new(""));
    let entries = fs::read_dir(folder).map_err(DataError::io("list", folder))?;
    let mut shards = Vec::new();
    for entry in entries {
        let path = entry.map_err(DataError::io("list", folder))?.path();
        let own = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if glob::matches(&name, &own) && path.is_file() {
            shards.push(path);
        }
    }
    shards.sort();
    if shards.is_empty() { Err(missing()) } else { Ok(shards) }
}

/// Unpacks the files of `shard` into the folder `to`, which appears when it is complete.
fn unpack(shard: &Path, to: &Path) -> Result<()> {
    crate::decode::check_regular(shard)?;
    let above = to.parent().unwrap_or(to);
    let partial = above.join(format!("partial-{}-{}", std::process::id(), name_of(shard)));
    // What a process of this number left when it was killed.
    let _ = fs::remove_dir_all(&partial);
    let outcome = unpack_files(shard, &partial);
    let placed = outcome.and_then(|()| match fs::rename(&partial, to) {
        // Another process may have been faster.
        Err(_) if to.is_dir() => Ok(()),
        renamed => renamed.map_err(DataError::io("write", to)),
    });
    // What was placed is not there any more.
    let _ = fs::remove_dir_all(&partial);
    placed
}

fn unpack_files(shard: &Path, to: &Path) -> Result<()> {
    let damaged =
        |error: std::io::Error| DataError::unreadable(shard, format!("it is no whole tar file ({error})"));
    fs::create_dir_all(to).map_err(DataError::io("make", to))?;
    let file = File::open(shard).map_err(DataError::io("read", shard))?;
    let mut archive = tar::Archive::new(BufReader::with_capacity(1 << 20, file));
    let mut count = 0;
    for entry in archive.entries().map_err(damaged)? {
        let mut entry = entry.map_err(damaged)?;
        let name = entry.path().map_err(damaged)?.into_owned();
        let kind = entry.header().entry_type();
        if kind.is_dir() || kind.is_pax_global_extensions() {
            continue;
        }
        let parts: Vec<_> = name.components().filter(|part| *part != Component::CurDir).collect();
        let is_inside = !parts.is_empty() && parts.iter().all(|part| matches!(part, Component::Normal(_)));
        if !kind.is_file() || !is_inside {
            let reason = format!(
                "it holds {}, which is a link or lies outside of it: only files below the archive's own top are unpacked",
                name.display()
            );
            return Err(DataError::unreadable(shard, reason));
        }
        let place = to.join(parts.iter().collect::<PathBuf>());
        let folder = place.parent().unwrap_or(to);
        fs::create_dir_all(folder).map_err(DataError::io("make", folder))?;
        let mut out = File::create_new(&place).map_err(|error| match error.kind() {
            std::io::ErrorKind::AlreadyExists => {
                DataError::unreadable(shard, format!("it holds {} twice", name.display()))
            }
            _ => DataError::io("write", &place)(error),
        })?;
        let written = std::io::copy(&mut entry, &mut out).map_err(damaged)?;
        if written != entry.header().size().map_err(damaged)? {
            return Err(DataError::unreadable(shard, format!("it ends within {}", name.display())));
        }
        count += 1;
    }
    match count {
        0 => Err(DataError::unreadable(shard, "it holds no file")),
        _ => Ok(()),
    }
}
