//! `/api/datasets`: clips with their captions, to look at and to edit.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{Path as UrlPath, State};
use axum::http::HeaderMap;
use data::{DataConfig, Dataset, SizeMultiple, Takes, Watch};
use serde::Deserialize;
use serde_json::{Value, json};

use super::Server;
use super::files;
use super::reply::{self, Answer, Refusal, blocking};
use super::runs::view::names_in;
use crate::error::Error;

/// Where clips go that are not to be trained on: folders whose names begin with a dot are passed over by every scan.
const EXCLUDED: &str = ".excluded";
/// The most bytes of a caption.
const CAPTION: usize = 64 << 10;
/// Wan's frames a second, where the rate of the model is not known.
const FPS: f64 = 16.0;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct NewCaption {
    clip: String,
    caption: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Exclusion {
    clip: String,
    excluded: bool,
}

/// The folders with clips: those that the server was given, or those in them.
fn folders(server: &Server) -> Vec<PathBuf> {
    let has_clips = |folder: &Path| names_in(folder).iter().any(|name| is_clip(name));
    let mut found = Vec::new();
    for root in &server.places.data {
        if has_clips(root) {
            found.push(root.clone());
        }
        let below = names_in(root).into_iter().map(|name| root.join(name));
        found.extend(below.filter(|path| path.is_dir() && has_clips(path)));
    }
    found
}

/// Whether a file of this name is shown as a clip.
fn is_clip(name: &str) -> bool {
    let endings = [".mp4", ".mov", ".mkv", ".webm", ".m4v", ".gif", ".webp", ".png", ".jpg", ".jpeg"];
    let lower = name.to_lowercase();
    !name.starts_with('.') && endings.iter().any(|ending| lower.ends_with(ending))
}

fn folder(server: &Server, index: usize) -> Result<PathBuf, Refusal> {
    folders(server).into_iter().nth(index).ok_or_else(|| Refusal::missing(format!("dataset {index}")))
}

/// `GET /api/datasets`.
pub(super) async fn list(State(server): State<Arc<Server>>) -> Answer {
    let found = blocking(move || {
        let dataset = |(index, folder): (usize, PathBuf)| {
            let clips = names_in(&folder).iter().filter(|name| is_clip(name)).count();
            let name = folder.file_name().map(|name| name.to_string_lossy().into_owned());
            json!({ "index": index, "name": name, "folder": folder, "clips": clips })
        };
        Ok(folders(&server).into_iter().enumerate().map(dataset).collect::<Vec<_>>())
    });
    Ok(reply::json(&json!({ "datasets": found.await? })))
}

/// `GET /api/datasets/{index}/clips`: clips, captions, and what the checks say of them.
pub(super) async fn clips(State(server): State<Arc<Server>>, UrlPath(index): UrlPath<usize>) -> Answer {
    let found = blocking(move || {
        let folder = folder(&server, index)?;
        let clip = |folder: &Path, name: &str, excluded: bool| {
            let caption = std::fs::read_to_string(folder.join(name).with_extension("txt")).ok();
            json!({ "name": name, "caption": caption.map(|text| text.trim().to_owned()), "excluded": excluded })
        };
        let listed = |folder: PathBuf, excluded: bool| {
            let names = names_in(&folder).into_iter().filter(|name| is_clip(name));
            names.map(|name| clip(&folder, &name, excluded)).collect::<Vec<Value>>()
        };
        let mut clips = listed(folder.clone(), false);
        clips.extend(listed(folder.join(EXCLUDED), true));
        let (recipe, config) = recipe_for(&server, &folder);
        let (cut, warnings) = looked_at(&folder, config, &server.places.state.join("clips"));
        Ok(json!({ "clips": clips, "cut": cut, "warnings": warnings, "recipe": recipe }))
    });
    Ok(reply::json(&found.await?))
}

/// The newest recipe that trains on `folder` alone, and its `[data]` section; default settings where there is none.
fn recipe_for(server: &Server, folder: &Path) -> (Option<String>, Value) {
    let recipes = names_in(&server.places.recipes).into_iter().filter(|name| name.ends_with(".toml"));
    let matching = recipes.filter_map(|name| {
        let path = server.places.recipes.join(&name);
        let modified = std::fs::metadata(&path).and_then(|metadata| metadata.modified()).ok()?;
        let recipe: Value = toml::from_str(&std::fs::read_to_string(path).ok()?).ok()?;
        let data = recipe.get("data")?;
        let named = server.places.recipes.join(data.get("folder")?.as_str()?);
        (named.canonicalize().ok()? == folder).then(|| (modified, name, data.clone()))
    });
    match matching.max_by(|a, b| (a.0, &a.1).cmp(&(b.0, &b.1))) {
        Some((_, name, data)) => (Some(name), data),
        None => (None, json!({})),
    }
}

/// How the clips in `folder` are cut by the settings `config`, by name, and what is wrong with them. What was seen of clips that are to
/// lose their bars or to be split is kept in the folder `cache`.
fn looked_at(folder: &Path, mut config: Value, cache: &Path) -> (Value, Vec<String>) {
    config["folder"] = json!([folder]);
    config["bad"] = json!("skip");
    let config = serde_json::from_value(config);
    let model = Takes { multiple: SizeMultiple::new(16), fps: FPS, companions: &[] };
    let mut watch = Watch { progress: &mut |_, _| {}, is_stopped: &|| false, cache: Some(cache) };
    let built = config.map_err(|error| error.to_string()).and_then(|config: DataConfig| {
        Dataset::build_watched(&config, &model, &mut watch).map_err(|error| error.to_string())
    });
    let dataset = match built {
        Ok(dataset) => dataset,
        Err(error) => return (json!({}), vec![error]),
    };
    let mut cut = serde_json::Map::new();
    for window in &dataset.windows {
        let bucket = window.bucket;
        let words =
            format!("{}x{}, {} frames from {}", bucket.width, bucket.height, bucket.frames, window.start);
        let windows = cut.entry(dataset.sources[window.source].item.id.clone()).or_insert_with(|| json!([]));
        if let Value::Array(windows) = windows {
            windows.push(words.into());
        }
    }
    (Value::Object(cut), dataset.notes.iter().chain(&dataset.skipped).cloned().collect())
}

/// The clip `name` of a dataset, excluded or not.
fn found(folder: &Path, name: &str) -> Result<PathBuf, Refusal> {
    let is_plain = is_clip(name) && !name.contains(['/', '\\', '\0']);
    let candidates = [folder.join(name), folder.join(EXCLUDED).join(name)];
    let path = candidates.into_iter().find(|path| is_plain && path.is_file());
    path.ok_or_else(|| Refusal::missing(format!("clip {name:?}")))
}

/// `POST /api/datasets/{index}/caption`: writes a caption; the first one that it replaces stays beside it as `.txt.bak`.
pub(super) async fn set_caption(
    State(server): State<Arc<Server>>,
    UrlPath(index): UrlPath<usize>,
    body: Bytes,
) -> Answer {
    let new: NewCaption = reply::parsed(&body)?;
    blocking(move || {
        if new.caption.len() > CAPTION {
            return Err(Refusal::field("caption", "is longer than 64 KiB"));
        }
        let path = found(&folder(&server, index)?, &new.clip)?.with_extension("txt");
        if !server.places.contain(&path) || path.is_symlink() {
            return Err(Refusal::conflict(format!("{} is a link, and is left alone", path.display())));
        }
        let io = |source| Error::Io { action: "write the caption", path: path.clone(), source };
        let backup = path.with_extension("txt.bak");
        if path.is_file() && !backup.exists() {
            std::fs::copy(&path, &backup).map_err(io)?;
        }
        let text = format!("{}\n", new.caption.trim());
        data::atomic::write(&path, |file| std::io::Write::write_all(file, text.as_bytes())).map_err(io)?;
        Ok(())
    })
    .await?;
    Ok(reply::json(&json!({ "saved": true })))
}

/// `POST /api/datasets/{index}/exclude`: takes a clip with its caption out of the dataset, or back.
pub(super) async fn exclude(
    State(server): State<Arc<Server>>,
    UrlPath(index): UrlPath<usize>,
    body: Bytes,
) -> Answer {
    let wanted: Exclusion = reply::parsed(&body)?;
    blocking(move || {
        let folder = folder(&server, index)?;
        let path = found(&folder, &wanted.clip)?;
        let aside = folder.join(EXCLUDED);
        let target = if wanted.excluded { &aside } else { &folder };
        let io = |source| Error::Io { action: "move", path: path.clone(), source };
        std::fs::create_dir_all(&aside).map_err(io)?;
        for from in [path.clone(), path.with_extension("txt"), path.with_extension("txt.bak")] {
            let to = target.join(from.file_name().unwrap_or_default());
            if from == to || !from.is_file() {
                continue;
            }
            if to.exists() {
                return Err(Refusal::conflict(format!("{} is there already", to.display())));
            }
            std::fs::rename(&from, &to).map_err(io)?;
        }
        Ok(())
    })
    .await?;
    Ok(reply::json(&json!({ "excluded": wanted.excluded })))
}

/// `GET /api/datasets/{index}/files/{name}`.
pub(super) async fn file(
    State(own): State<Arc<Server>>,
    UrlPath((index, name)): UrlPath<(usize, String)>,
    headers: HeaderMap,
) -> Answer {
    let (folder, path) = blocking(move || {
        let folder = folder(&own, index)?;
        let path = found(&folder, &name)?;
        Ok((folder, path))
    })
    .await?;
    files::serve(&folder, &path, &headers).await
}
