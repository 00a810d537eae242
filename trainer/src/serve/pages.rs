//! The page: files that are part of the program.

use std::sync::Arc;

use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;

use super::Server;
use super::access;
use super::files::put;
use super::reply::Refusal;

const HTML: &str = "text/html; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";

/// The files of the page by name, each with its kind.
const ASSETS: [(&str, &str, &str); 10] = [
    ("style.css", "text/css; charset=utf-8", include_str!("web/style.css")),
    ("app.js", SCRIPT, include_str!("web/app.js")),
    ("dom.js", SCRIPT, include_str!("web/dom.js")),
    ("runs.js", SCRIPT, include_str!("web/runs.js")),
    ("memory.js", SCRIPT, include_str!("web/memory.js")),
    ("new_run.js", SCRIPT, include_str!("web/new_run.js")),
    ("curve.js", SCRIPT, include_str!("web/curve.js")),
    ("clips.js", SCRIPT, include_str!("web/clips.js")),
    ("try.js", SCRIPT, include_str!("web/try.js")),
    ("data.js", SCRIPT, include_str!("web/data.js")),
];

#[derive(Debug, Deserialize)]
pub(super) struct Login {
    token: String,
}

fn page(kind: &str, text: &'static str) -> Response {
    let mut response = text.into_response();
    put(&mut response, header::CONTENT_TYPE, kind);
    put(&mut response, header::CACHE_CONTROL, "no-cache");
    response
}

/// `GET /`: the page, or the question for the token.
pub(super) async fn index(State(server): State<Arc<Server>>, headers: HeaderMap) -> Response {
    match access::is_known(&server, &headers) {
        true => page(HTML, include_str!("web/index.html")),
        false => (StatusCode::UNAUTHORIZED, page(HTML, include_str!("web/login.html"))).into_response(),
    }
}

/// `GET /login?token=...`.
pub(super) async fn login(State(server): State<Arc<Server>>, Query(login): Query<Login>) -> Response {
    access::login(&server, login.token.trim())
}

/// `GET /static/{name}`.
pub(super) async fn asset(Path(name): Path<String>) -> Response {
    match ASSETS.iter().find(|(known, ..)| *known == name) {
        Some((_, kind, text)) => page(kind, text),
        None => Refusal::missing("such page").into_response(),
    }
}

/// `GET /openapi.json`.
pub(super) async fn openapi() -> Response {
    page("application/json", include_str!("openapi.json"))
}

/// Everything else.
pub(super) async fn nothing() -> Response {
    Refusal::missing("such page").into_response()
}
