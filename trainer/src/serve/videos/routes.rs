//! `/v1/videos`: the routes of OpenAI's API, as vLLM-Omni and SGLang have them.

use std::sync::Arc;

use axum::extract::{Path, Query, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::Response;
use serde::Deserialize;
use serde_json::json;

use super::job::{Job, JobStatus};
use super::{ask, upload};
use crate::error::Error;
use crate::serve::Server;
use crate::serve::files;
use crate::serve::reply::{self, Answer, Refusal, blocking};
use crate::serve::runs::view::names_in;

/// The clips of a list where nothing is said, and at most.
const LISTED: usize = 20;
const MOST: usize = 100;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::serve) struct Page {
    after: Option<String>,
    limit: Option<usize>,
    order: Option<String>,
}

/// `POST /v1/videos`.
pub(in crate::serve) async fn create(State(server): State<Arc<Server>>, request: Request) -> Answer {
    Ok(reply::json(&accepted(&server, request).await?))
}

/// `POST /v1/videos/sync`: the clip itself, when it is made.
pub(in crate::serve) async fn create_and_wait(
    State(server): State<Arc<Server>>,
    headers: HeaderMap,
    request: Request,
) -> Answer {
    let mut changes = server.videos.changes();
    let id = accepted(&server, request).await?.id;
    loop {
        let job = server.videos.get(&id).ok_or_else(|| Refusal::missing(format!("video {id} any more")))?;
        match (job.status, &job.error) {
            (JobStatus::Completed, _) => return file_of(&server, &job, &headers).await,
            (JobStatus::Failed, error) => {
                let why = error.as_ref().map_or("the clip failed", |error| error.message.as_str());
                return Err(Refusal::new(StatusCode::UNPROCESSABLE_ENTITY, why));
            }
            (JobStatus::Queued | JobStatus::InProgress, _) => {}
        }
        if changes.changed().await.is_err() {
            return Err(Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "the server stops"));
        }
    }
}

/// Reads a request and puts its job into the queue.
async fn accepted(server: &Arc<Server>, request: Request) -> Result<Job, Refusal> {
    let id = format!("video_gen_{}", server.fresh_id()?);
    let folder = server.videos.folder_of(&id);
    let io = |source| Error::Io { action: "create the folder", path: folder.clone(), source };
    std::fs::create_dir_all(&folder).map_err(io)?;
    // A client that goes away in the middle leaves nothing behind.
    let mut kept = Kept { folder: folder.clone(), is_kept: false };
    let (fields, picture) = upload::read(request, &folder).await?;
    let own = Arc::clone(server);
    let job = blocking(move || {
        let job = ask::job(&own, id, fields, picture)?;
        own.videos.add(job.clone())?;
        Ok(job)
    });
    let job = job.await?;
    kept.is_kept = true;
    Ok(job)
}

/// The folder of a job that may not come to be.
struct Kept {
    folder: std::path::PathBuf,
    is_kept: bool,
}

impl Drop for Kept {
    fn drop(&mut self) {
        if !self.is_kept && !self.folder.join("job.json").exists() {
            // What is left of it is of no consequence.
            let _ = std::fs::remove_dir_all(&self.folder);
        }
    }
}

/// `GET /v1/videos`.
pub(in crate::serve) async fn list(State(server): State<Arc<Server>>, Query(page): Query<Page>) -> Answer {
    let limit = page.limit.unwrap_or(LISTED);
    if !(1..=MOST).contains(&limit) {
        return Err(Refusal::field("limit", "must be 1 to 100"));
    }
    let mut jobs = server.videos.all();
    match page.order.as_deref() {
        None | Some("desc") => jobs.reverse(),
        Some("asc") => {}
        Some(_) => return Err(Refusal::field("order", "must be asc or desc")),
    }
    if let Some(after) = &page.after {
        let at = jobs.iter().position(|job| job.id == *after);
        jobs.drain(..=at.ok_or_else(|| Refusal::missing(format!("video {after}")))?);
    }
    let has_more = jobs.len() > limit;
    jobs.truncate(limit);
    let (first, last) = (jobs.first().map(|job| &job.id), jobs.last().map(|job| &job.id));
    Ok(reply::json(
        &json!({ "object": "list", "data": jobs, "first_id": first, "last_id": last, "has_more": has_more }),
    ))
}

fn job(server: &Server, id: &str) -> Result<Job, Refusal> {
    server.videos.get(id).ok_or_else(|| Refusal::missing(format!("video {id}")))
}

/// `GET /v1/videos/{id}`.
pub(in crate::serve) async fn one(State(server): State<Arc<Server>>, Path(id): Path<String>) -> Answer {
    Ok(reply::json(&job(&server, &id)?))
}

/// `GET /v1/videos/{id}/content`.
pub(in crate::serve) async fn content(
    State(server): State<Arc<Server>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Answer {
    let job = job(&server, &id)?;
    if job.status != JobStatus::Completed {
        return Err(Refusal::new(
            StatusCode::NOT_FOUND,
            format!("{id} is not completed; poll /v1/videos/{id}"),
        ));
    }
    file_of(&server, &job, &headers).await
}

async fn file_of(server: &Server, job: &Job, headers: &HeaderMap) -> Answer {
    let name = job.file_name.clone().unwrap_or_default();
    let folder = server.videos.folder_of(&job.id);
    let mut response: Response = files::serve(&folder, &folder.join(&name), headers).await?;
    files::put(&mut response, header::CONTENT_DISPOSITION, &format!("inline; filename=\"{}.mp4\"", job.id));
    Ok(response)
}

/// `GET /v1/videos/{id}/preview`: what the clip looks like so far, where the server has a tiny decoder.
pub(in crate::serve) async fn preview(
    State(server): State<Arc<Server>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Answer {
    let folder = server.videos.folder_of(&job(&server, &id)?.id);
    let name = names_in(&folder).into_iter().find(|name| name.ends_with(".preview.mp4"));
    let name = name.ok_or_else(|| Refusal::missing(format!("preview of {id} yet")))?;
    files::serve(&folder, &folder.join(name), &headers).await
}

/// `DELETE /v1/videos/{id}`.
pub(in crate::serve) async fn delete(State(server): State<Arc<Server>>, Path(id): Path<String>) -> Answer {
    let gone = id.clone();
    blocking(move || server.videos.delete(&gone)).await?;
    Ok(reply::json(&json!({ "id": id, "deleted": true, "object": "video.deleted" })))
}

/// `POST /v1/videos/{id}/cancel`.
pub(in crate::serve) async fn cancel(State(server): State<Arc<Server>>, Path(id): Path<String>) -> Answer {
    let (own, name) = (Arc::clone(&server), id.clone());
    blocking(move || own.videos.cancel(&name)).await?;
    Ok(reply::json(&job(&server, &id)?))
}

/// `GET /v1/models`: what `model` may name.
pub(in crate::serve) async fn models(State(server): State<Arc<Server>>) -> Answer {
    let data = blocking(move || {
        let snapshot = server.snapshot();
        let runs = snapshot["runs"].as_array().cloned().unwrap_or_default();
        let runs = runs.iter().filter(|run| run["steps"].is_u64()).map(|run| {
            json!({ "id": run["name"], "object": "model", "owned_by": "runs", "checkpoints": run["checkpoints"] })
        });
        let models = server.models();
        let models =
            models.iter().map(|model| json!({ "id": model.name, "object": "model", "owned_by": "models" }));
        Ok(runs.chain(models).collect::<Vec<_>>())
    });
    Ok(reply::json(&json!({ "object": "list", "data": data.await? })))
}
