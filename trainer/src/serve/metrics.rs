//! `GET /metrics`, for Prometheus.

use std::fmt::Write;
use std::sync::Arc;

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde_json::Value;

use super::Server;
use super::files::put;
use super::reply::{Refusal, blocking};

/// The counters and gauges of the server, its runs and its clips.
pub(super) async fn metrics(State(server): State<Arc<Server>>) -> Result<Response, Refusal> {
    let text = blocking(move || Ok(text(&server))).await?;
    let mut response = text.into_response();
    put(&mut response, header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8");
    Ok(response)
}

fn text(server: &Server) -> String {
    let snapshot = server.snapshot();
    let mut text = String::new();
    let mut metric = |name: &str, kind: &str, help: &str, rows: Vec<(String, f64)>| {
        // Writing into a string does not fail.
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (labels, value) in rows {
            let _ = writeln!(text, "{name}{labels} {value}");
        }
    };
    let one = |value: f64| vec![(String::new(), value)];
    metric(
        "tandem_uptime_seconds",
        "gauge",
        "Seconds since the server started.",
        one(server.started.elapsed().as_secs_f64()),
    );
    let (made, seconds) = server.videos.totals();
    metric("tandem_clips_made_total", "counter", "Clips made since the server started.", one(made as f64));
    metric("tandem_clip_seconds_total", "counter", "Seconds that they took.", one(seconds));
    let videos = server.videos.all();
    let states = ["queued", "in_progress", "completed", "failed"].map(|state| {
        let count = videos.iter().filter(|job| serde_json::json!(job.status) == state).count();
        (format!("{{status=\"{state}\"}}"), count as f64)
    });
    metric("tandem_clips", "gauge", "Clips by status.", states.to_vec());
    let runs = snapshot["runs"].as_array().cloned().unwrap_or_default();
    let of_runs = |key: &str| -> Vec<(String, f64)> {
        // Names of folders that were not made here may be anything.
        let label = |run: &Value| format!("{{run={}}}", run["name"]);
        runs.iter().filter_map(|run| Some((label(run), run[key].as_f64()?))).collect()
    };
    let running = runs.iter().map(|run| {
        let is_running = run["status"] == "running";
        (format!("{{run={}}}", run["name"]), f64::from(u8::from(is_running)))
    });
    metric("tandem_run_training", "gauge", "Whether a run trains.", running.collect());
    metric("tandem_run_steps", "gauge", "Optimiser steps made.", of_runs("step"));
    metric("tandem_run_loss", "gauge", "Mean loss of the last 50 steps.", of_runs("loss"));
    metric(
        "tandem_run_step_seconds",
        "gauge",
        "Mean seconds of the last 20 steps.",
        of_runs("seconds_per_step"),
    );
    metric("tandem_run_host_bytes", "gauge", "Host memory of the process.", of_runs("host_memory"));
    text
}
