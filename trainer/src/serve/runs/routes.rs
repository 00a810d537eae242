//! `/api/runs`, `/api/plan`, `/api/draft`.

use std::path::PathBuf;
use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};

use super::process::{tail, tandem, told};
use super::record::{Record, Wanted};
use super::settings;
use super::view::names_in;
use crate::error::Error;
use crate::serve::Server;
use crate::serve::files;
use crate::serve::places::is_name;
use crate::serve::reply::{self, Answer, Refusal, blocking};
use crate::train::Asked;

/// The most bytes of a recipe.
const RECIPE: usize = 256 << 10;
/// Bytes of what a run has printed that are shown.
const LOG: u64 = 32 << 10;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct NewRun {
    name: String,
    /// TOML. Paths start in the folder of recipes.
    recipe: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct NewDraft {
    /// A folder of a model, or the name of one of the hub.
    model: String,
    /// A folder of clips.
    data: String,
}

/// `GET /api/runs`.
pub(in crate::serve) async fn list(State(server): State<Arc<Server>>) -> Answer {
    let snapshot = blocking(move || Ok(server.snapshot())).await?;
    Ok(reply::json(&json!({ "runs": snapshot["runs"] })))
}

/// `GET /api/runs/{name}`: the run, its plan and the memory that was planned for it.
pub(in crate::serve) async fn one(State(server): State<Arc<Server>>, Path(name): Path<String>) -> Answer {
    let found = blocking(move || {
        let run = server.runs.view(&name).ok_or_else(|| Refusal::missing(format!("run {name}")))?;
        let folder = server.places.runs.join(&name);
        let plan = std::fs::read_to_string(folder.join("plan.toml")).ok();
        let log = tail(&Record::log(&server.places.state.join("runs"), &name), LOG);
        Ok(json!({ "run": run, "plan": plan, "memory": server.runs.memory(&name), "log": log }))
    });
    Ok(reply::json(&found.await?))
}

/// `POST /api/runs`: plans a recipe, and puts its run into the queue.
pub(in crate::serve) async fn create(State(server): State<Arc<Server>>, body: Bytes) -> Answer {
    let new: NewRun = reply::parsed(&body)?;
    let run = blocking(move || {
        check(&server, &new)?;
        if server.runs.is_taken(&new.name) {
            return Err(Refusal::conflict(format!(
                "there is a run {} already; choose another name",
                new.name
            )));
        }
        let path = server.places.recipes.join(format!("{}.toml", new.name));
        let there = std::fs::read_to_string(&path).ok();
        if there.as_ref().is_some_and(|text| *text != new.recipe) || path.is_symlink() {
            let why = format!("{} is there and says something else; choose another name", path.display());
            return Err(Refusal::conflict(why));
        }
        let is_new = there.is_none();
        if is_new {
            write(&path, &new.recipe)?;
        }
        let planned = plan(&server, &new.name, &path).inspect_err(|_| {
            if is_new {
                // What is left of it does no harm.
                let _ = std::fs::remove_file(&path);
            }
        })?;
        let stages = planned["plan"]["devices"]["stages"].as_array().cloned().unwrap_or_default();
        let record = Record {
            name: new.name.clone(),
            recipe: path,
            devices: stages.iter().filter_map(|stage| stage.as_str().map(str::to_owned)).collect(),
            wanted: Wanted::Queued,
            place: 0,
            error: None,
            memory: planned["memory"].clone(),
        };
        server.runs.enqueue(record)?;
        server.runs.tick()?;
        Ok(server.runs.view(&new.name))
    });
    Ok(reply::json_with(StatusCode::CREATED, &run.await?))
}

/// `POST /api/plan`: what a recipe means, and whether it fits. Nothing is kept.
pub(in crate::serve) async fn check_plan(State(server): State<Arc<Server>>, body: Bytes) -> Answer {
    let new: NewRun = reply::parsed(&body)?;
    let planned = blocking(move || {
        check(&server, &new)?;
        let path = draft_file(&server)?;
        let planned = write(&path, &new.recipe).and_then(|()| plan(&server, &new.name, &path));
        let _ = std::fs::remove_file(&path);
        planned
    });
    Ok(reply::json(&planned.await?))
}

/// `POST /api/draft`: a commented recipe for a model and a folder of clips, as `tandem new` writes it.
pub(in crate::serve) async fn draft(State(server): State<Arc<Server>>, body: Bytes) -> Answer {
    let new: NewDraft = reply::parsed(&body)?;
    let text = blocking(move || {
        for (param, text) in [("model", &new.model), ("data", &new.data)] {
            let value = Value::from(text.as_str());
            if text.starts_with('-') || server.places.stray(&value, &server.places.recipes).is_some() {
                return Err(Refusal::field(param, "is not in the folders of this server"));
            }
        }
        let path = draft_file(&server)?;
        let from = |text: &str| match server.places.recipes.join(text) {
            there if there.exists() => there.display().to_string(),
            _ => text.to_owned(),
        };
        let (model, data, output) = (from(&new.model), from(&new.data), path.display().to_string());
        let command = tandem(&["--json", "new", "--model", &model, "--data", &data, "--output", &output])?;
        let text =
            told(command).and_then(|_| std::fs::read_to_string(&path).map_err(|error| error.to_string()));
        let _ = std::fs::remove_file(&path);
        text.map_err(Refusal::bad)
    });
    Ok(reply::json(&json!({ "recipe": text.await? })))
}

/// `POST /api/runs/{name}/{action}`.
pub(in crate::serve) async fn act(
    State(server): State<Arc<Server>>,
    Path((name, action)): Path<(String, String)>,
) -> Answer {
    let done = blocking(move || {
        match action.as_str() {
            "pause" | "stop" => server.runs.pause(&name)?,
            "resume" => server.runs.resume(&name)?,
            "sample" => server.runs.ask(&name, Asked::Sample)?,
            "save" => server.runs.ask(&name, Asked::Save)?,
            _ => {
                return Err(Refusal::missing(format!(
                    "action {action}; there are pause, resume, sample and save"
                )));
            }
        }
        server.runs.tick()?;
        Ok(server.runs.view(&name))
    });
    Ok(reply::json(&done.await?))
}

/// `DELETE /api/runs/{name}`: takes a run that has trained nothing off the list.
pub(in crate::serve) async fn forget(State(server): State<Arc<Server>>, Path(name): Path<String>) -> Answer {
    blocking(move || server.runs.forget(&name)).await?;
    Ok(reply::json(&json!({ "deleted": true })))
}

/// `GET /api/runs/{name}/files/{path}`: a clip, a picture, a log or an adapter of a run.
pub(in crate::serve) async fn file(
    State(server): State<Arc<Server>>,
    Path((name, path)): Path<(String, String)>,
    headers: HeaderMap,
) -> Answer {
    let folder = server.places.run(&name).filter(|folder| folder.join("plan.toml").is_file());
    let folder = folder.ok_or_else(|| Refusal::missing("such file"))?;
    files::serve(&folder, &folder.join(path.trim_start_matches('/')), &headers).await
}

/// `GET /api/recipes`: what a run can start from.
pub(in crate::serve) async fn recipes(State(server): State<Arc<Server>>) -> Answer {
    let found = blocking(move || {
        let names = names_in(&server.places.recipes);
        let recipe = |name: &String| {
            let text = std::fs::read_to_string(server.places.recipes.join(name)).ok()?;
            let short = name.strip_suffix(".toml").filter(|_| text.len() <= RECIPE)?;
            Some(json!({ "name": short, "text": text }))
        };
        let recipes: Vec<Value> = names.iter().filter_map(recipe).collect();
        Ok(json!({ "recipes": recipes, "models": server.models(), "published": published() }))
    });
    Ok(reply::json(&found.await?))
}

/// The published models, as the hub names them.
fn published() -> Vec<Value> {
    let model = |model: &models::published::Published| json!({ "id": models::published::Published::repository(model), "title": model.title });
    models::published::Published::ALL.iter().map(model).collect()
}

/// Checks name, size and paths of a recipe; what it means is for the plan.
fn check(server: &Server, new: &NewRun) -> Result<(), Refusal> {
    if !is_name(&new.name) || new.name == "cache" {
        return Err(Refusal::field(
            "name",
            "must be letters, digits, - and _ (at most 80), and not start with a dot",
        ));
    }
    if new.recipe.len() > RECIPE {
        return Err(Refusal::field("recipe", "is longer than 256 KiB"));
    }
    let value: toml::Table =
        toml::from_str(&new.recipe).map_err(|error| Refusal::field("recipe", error.to_string().trim()))?;
    let value = json!(value);
    stay_inside(server, &value, &server.places.recipes)?;
    // Files that may name others: lists of prompts, and dataset files of other trainers.
    for named in [&value["sample"]["prompts"], &value["data"]["import"]] {
        let path = named.as_str().map(|path| server.places.recipes.join(path)).filter(|path| path.is_file());
        if let Some(path) = path {
            let from = path.parent().unwrap_or(&server.places.recipes);
            stay_inside(server, &texts_of(&path)?, from)?;
        }
    }
    Ok(())
}

/// The texts in a file that is TOML, JSON or CSV by the line, or prompts by the line.
fn texts_of(path: &std::path::Path) -> Result<Value, Refusal> {
    let unreadable = |source| Error::Io { action: "read", path: path.to_owned(), source };
    let text = std::fs::read_to_string(path).map_err(unreadable)?;
    if let Ok(table) = toml::from_str::<toml::Table>(&text) {
        return Ok(json!(table));
    }
    let of_line = |line: &str| match serde_json::from_str::<Value>(line) {
        Ok(value) => value,
        Err(_) => json!([line, line.split([',', '"', ';', '\t']).map(str::trim).collect::<Vec<_>>()]),
    };
    Ok(text.lines().map(of_line).collect())
}

/// Refuses settings that name something outside of the folders.
fn stay_inside(server: &Server, settings: &Value, from: &std::path::Path) -> Result<(), Refusal> {
    match server.places.stray(settings, from) {
        Some((key, path)) => {
            let why = format!(
                "{path} is outside of the folders of this server; start it with --data or --models for that folder"
            );
            Err(Refusal::field(&key, why))
        }
        None => Ok(()),
    }
}

/// The plan of the recipe at `path`, as `tandem plan --json` tells it.
fn plan(server: &Server, name: &str, path: &std::path::Path) -> Result<Value, Refusal> {
    let _turn = server.planning.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let (path, own) = (path.display().to_string(), settings(&server.places, name));
    let mut words = vec!["--json", "plan", &path];
    own.iter().for_each(|setting| words.extend(["--set", setting]));
    let planned = told(tandem(&words)?).map_err(|why| Refusal::bad(why.replace(&path, "the recipe")))?;
    // Files that the recipe names may name others.
    stay_inside(server, &planned["plan"], std::path::Path::new(""))?;
    Ok(planned)
}

fn write(path: &std::path::Path, text: &str) -> Result<(), Refusal> {
    let io = |source| Error::Io { action: "write the recipe", path: path.to_owned(), source };
    Ok(data::atomic::write(path, |file| std::io::Write::write_all(file, text.as_bytes())).map_err(io)?)
}

/// A file for a recipe that is not kept, in the folder of recipes, from which its paths start.
fn draft_file(server: &Server) -> Result<PathBuf, Refusal> {
    Ok(server.places.recipes.join(format!(".draft-{}.toml", server.fresh_id()?)))
}
